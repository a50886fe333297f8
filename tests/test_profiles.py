"""Learnt profiles: pooled vectors by hand, the ELBO against closed forms, networks against data whose answer is known, and wrong input."""

import ast
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.metrics import r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from adlib import audience, market, profiles

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "02_audience_clustering.ipynb"


def by_hand():
    """The functions that the notebook writes out."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    source = "\n".join("".join(c["source"]) for c in cells if "by-hand" in c["metadata"].get("tags", []))
    names = {"np": np, "pd": pd}
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    exec(compile(ast.Module(functions, type_ignores=[]), NOTEBOOK.name, "exec"), names)
    return names


@pytest.fixture(scope="module")
def bow():
    """A bent line in five dimensions: one hidden number, which no straight line can follow; noise of variance 0.04."""
    rng = np.random.default_rng(0)
    t = rng.normal(size=1500)
    curve = np.c_[t, (t**2 - 1) / 1.4, np.sin(2 * t), np.cos(2 * t), -t]
    return curve + rng.normal(0, 0.2, (1500, 5))


# ---- pooled vectors


def test_pool_is_the_weighted_sum_drawn_to_the_average():
    vectors = np.array([[1.0, 0.0], [0.0, 2.0]])
    pooled = profiles.pool(vectors, [0, 1, 1], [0, 0, 1], 3, [1.0, 3.0, 4.0], prior=2.0)
    mean = np.array([1.0, 14.0]) / 8
    np.testing.assert_allclose(pooled[0], ([1, 6] + 2 * mean) / 6)
    np.testing.assert_allclose(pooled[1], ([0, 8] + 2 * mean) / 6)
    np.testing.assert_allclose(pooled[2], mean)  # without an event: the average


def test_pool_of_one_hot_vectors_is_what_features_computes():
    shop = market.Market(seed=1, n_users=60, n_products=30)
    events, products = shop.events(0, per_user=8), shop.products
    table = audience.features({"events": events, "products": products}).filter(like="category=")
    one_hot = pd.get_dummies(products["category"].astype(object), prefix="category", prefix_sep="=").astype(float)
    item, row = (
        pd.Index(i).get_indexer(e) for i, e in ((products.product_id, events.product_id), (table.index, events.user_id))
    )
    weight = events["event"].map(audience.EVENT_WEIGHTS)
    np.testing.assert_allclose(
        profiles.pool(one_hot, item, row, len(table), weight), table[one_hot.columns], atol=1e-12
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 5), st.integers(0, 99))
def test_pool_passes_over_unknown_items_and_counts_duplicates_twice(events, m, n, seed):
    rng = np.random.default_rng(seed)
    vectors, item, row = rng.normal(size=(m, 3)), rng.integers(m, size=events), rng.integers(n, size=events)
    plain = profiles.pool(vectors, item, row, n)
    never_seen = profiles.pool(vectors, np.r_[item, -1, -1], np.r_[row, row[:1], 0], n)
    np.testing.assert_allclose(never_seen, plain)
    doubled = profiles.pool(vectors, np.r_[item, item], np.r_[row, row], n)
    np.testing.assert_allclose(doubled, profiles.pool(vectors, item, row, n, np.full(events, 2.0)))
    assert (doubled <= vectors.max(0) + 1e-9).all() and (doubled >= vectors.min(0) - 1e-9).all()


@pytest.mark.parametrize(
    ("item", "row", "weight", "message"),
    [
        ([-1, -1], [0, 1], None, "no event touches an item that has a vector"),
        ([0, 1], [0, 1], [0.0, 0.0], "no event touches"),
        ([0, 1], [0], None, "must list the same events; they list 2, 1, 2"),
        ([0, 2], [0, 0], None, "item must lie below 2 and row below 2; the largest are 2, 0"),
        ([0, 1], [0, 5], None, "row below 2"),
    ],
)
def test_pool_says_what_is_wrong(item, row, weight, message):
    with pytest.raises(ValueError, match=message):
        profiles.pool(np.eye(2), item, row, 2, weight)


def test_pool_refuses_vectors_that_are_not_finite():
    with pytest.raises(ValueError, match="column 1 has 1 missing or infinite"):
        profiles.pool(np.array([[0.0, np.nan], [1, 1]]), [0], [0], 1)


# ---- the ELBO


@pytest.fixture
def terms():
    """Random arguments of the ELBO: x, mean, log variance, decoded, log noise."""
    torch.manual_seed(0)
    return torch.randn(7, 4), torch.randn(7, 3), torch.randn(7, 3), torch.randn(7, 4), torch.tensor(-0.7)


def test_elbo_terms_equal_the_closed_forms(terms):
    x, mean, log_variance, decoded, log_noise = terms
    reconstruction, kl = profiles.elbo_terms(*terms)
    normal = torch.distributions.Normal
    torch.testing.assert_close(reconstruction, normal(decoded, (log_noise / 2).exp()).log_prob(x).sum(1))
    guess, prior = normal(mean, (log_variance / 2).exp()), normal(torch.zeros(3), torch.ones(3))
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(guess, prior).sum(1))
    assert (kl >= 0).all()


def test_the_notebooks_elbo_equals_the_packages(terms):
    x, mean, log_variance, decoded, log_noise = (t.double().numpy() for t in terms)
    ours = by_hand()["elbo_by_hand"](x, decoded, mean, np.exp(log_variance), np.exp(log_noise))
    for one, other in zip(ours, profiles.elbo_terms(*terms), strict=True):
        np.testing.assert_allclose(one, other.numpy(), rtol=1e-5)


def test_a_linear_vae_reaches_probabilistic_pca_and_never_passes_it():
    rng = np.random.default_rng(1)
    X = StandardScaler().fit_transform(
        rng.normal(size=(600, 2)) @ rng.normal(size=(2, 6)) + 0.5 * rng.normal(size=(600, 6))
    )
    exact = PCA(2).fit(X).score(X)  # mean log p(x), the best that any linear model can reach
    for seed in range(2):
        vae = profiles.ProfileVAE(2, hidden=0, epochs=80, batch_size=64, learning_rate=1e-2, seed=seed, progress=False)
        reached = vae.fit(X).elbo(X, draws=100).mean()
        assert exact - 0.15 < reached < exact + 0.03  # the bound is one; the margin is that of 100 draws


def test_a_bent_vae_passes_the_best_linear_model_where_the_truth_is_bent(bow):
    vae = profiles.ProfileVAE(1, epochs=100, batch_size=64, learning_rate=5e-3, progress=False).fit(bow[:1000])
    held = bow[1000:]
    assert vae.elbo(held).mean() > PCA(1).fit(bow[:1000]).score(held) + 1
    assert np.abs(vae.inverse_transform(vae.transform(held)) - held).mean() < 0.3
    assert vae.history_.shape == (100, 2) and 0.02 < vae.noise_ < 0.15  # planted: 0.04


def test_encode_gives_means_and_variances(bow):
    vae = profiles.ProfileVAE(3, epochs=2, progress=False).fit(bow)
    mean, variance = vae.encode(bow[:10])
    assert mean.shape == variance.shape == (10, 3) and (variance > 0).all()
    np.testing.assert_array_equal(vae.transform(bow[:10]), mean)


# ---- both networks


@pytest.fixture(scope="module")
def correlated():
    rng = np.random.default_rng(2)
    return StandardScaler().fit_transform(
        rng.normal(size=(1200, 2)) @ rng.normal(size=(2, 5)) + 0.3 * rng.normal(size=(1200, 5))
    )


@pytest.mark.parametrize("network", [profiles.ProfileVAE, profiles.ProfileGAN])
def test_invented_rows_resemble_real_ones(network, correlated):
    made = network(4, epochs=80, progress=False).fit(correlated).sample(3000, seed=5)
    assert made.shape == (3000, 5) and np.isfinite(made).all()
    error = np.abs(np.corrcoef(made.T) - np.corrcoef(correlated.T)).mean()
    nothing = np.abs(np.eye(5) - np.corrcoef(correlated.T)).mean()  # columns drawn by themselves
    assert error < 0.5 * nothing
    assert np.abs(made.mean(0)).max() < 0.35 and np.abs(made.std(0) - 1).max() < 0.35


@pytest.mark.parametrize("network", [profiles.ProfileVAE, profiles.ProfileGAN])
def test_it_is_a_transformer_that_keeps_to_its_seed(network, bow):
    torch.manual_seed(3)
    untouched = torch.rand(1)
    torch.manual_seed(3)
    one = network(3, epochs=2, seed=1, progress=False).fit(bow)
    assert torch.equal(torch.rand(1), untouched), "training must not move the global generator"
    np.testing.assert_array_equal(one.transform(bow), clone(one).fit(bow).transform(bow))
    assert not np.allclose(one.transform(bow), network(3, epochs=2, seed=2, progress=False).fit(bow).transform(bow))
    assert make_pipeline(StandardScaler(), clone(one)).fit_transform(bow).shape == (1500, 3)
    np.testing.assert_array_equal(one.sample(4, seed=9), one.sample(4, seed=9))
    assert one.history_.shape == (2, 2)


@pytest.mark.parametrize("network", [profiles.ProfileVAE, profiles.ProfileGAN])
def test_constant_columns_and_tiny_tables_stay_finite(network):
    for X in (np.ones((30, 4)), np.c_[np.ones(30), np.arange(30.0) / 10], np.arange(4.0).reshape(2, 2)):
        found = network(2, epochs=40, batch_size=8, learning_rate=1e-2, progress=False).fit(X)
        assert (
            np.isfinite(found.transform(X)).all()
            and np.isfinite(found.sample(5)).all()
            and np.isfinite(found.history_).all()
        )


@pytest.mark.parametrize("network", [profiles.ProfileVAE, profiles.ProfileGAN])
@pytest.mark.parametrize(
    ("X", "settings", "message"),
    [
        (np.ones((1, 3)), {}, "at least two shoppers to learn from; X has 1"),
        (pd.DataFrame({"spend": [1.0, np.nan]}), {}, "column 'spend' has 1 missing or infinite"),
        (np.array([[1.0, np.inf], [0, 0]]), {}, "column 1 has 1 missing or infinite"),
        (np.ones((4, 3)), {"n_latent": 0}, "n_latent must be at least 1; it is 0"),
        (np.ones((4, 3)), {"epochs": 0}, "epochs must be at least 1"),
        (np.zeros((0, 3)), {}, "not empty"),
    ],
)
def test_fit_says_what_is_wrong(network, X, settings, message):
    with pytest.raises(ValueError, match=message):
        network(progress=False).set_params(**settings).fit(X)


@pytest.mark.parametrize("network", [profiles.ProfileVAE, profiles.ProfileGAN])
def test_transform_says_what_is_wrong(network, bow):
    with pytest.raises(NotFittedError):
        network().transform(bow)
    found = network(2, epochs=1, progress=False).fit(bow)
    with pytest.raises(ValueError, match="this profile has 5 columns, the table given has 4"):
        found.transform(bow[:, :4])
    with pytest.raises(ValueError, match="missing or infinite"):
        found.transform(np.full((2, 5), np.nan))


def test_the_notebooks_explained_variance_is_r2():
    rng = np.random.default_rng(0)
    groups, spend = rng.integers(5, size=300), rng.exponential(size=300)
    expected = r2_score(spend, pd.Series(spend).groupby(groups).transform("mean"))
    assert by_hand()["explained"](spend, groups) == pytest.approx(expected)
    assert by_hand()["explained"](spend, np.where(groups == 2, 3, groups)) < expected  # number 2 has no member
