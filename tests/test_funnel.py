"""The funnel: likelihoods against integrals and scikit-learn, models against planted rates, every error by its words."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import expit
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from adlib import funnel
from adlib.funnel import DelayedConversion, Feedback, FunnelModel, arrival_rate, delayed, delayed_loss

NOW = pd.Timestamp("2026-03-30", tz="UTC")
DAY = 24.0


def clicks(n=4000, seed=0, days=28):
    """Clicks (features, final conversions, their true probabilities) spread evenly over the days before NOW."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, 3))
    p = expit(-1.5 + 0.8 * X[:, 0] - 0.4 * X[:, 1])
    time = NOW - pd.to_timedelta(days * rng.random(n), unit="D")
    return X, pd.DataFrame({"timestamp": time, "conversion": (rng.random(n) < p).astype(int)}), p


def impressions(n=60_000, seed=0):
    """Impressions whose click and conversion probabilities share a taste, so that clicks select good converters."""
    rng = np.random.default_rng(seed)
    who, ad = rng.integers(20, size=n), rng.integers(10, size=n)
    taste = np.random.default_rng(99).normal(size=(20, 10))[who, ad]
    ctr, cvr = expit(-3 + taste), expit(-2 + taste)
    click = (rng.random(n) < ctr).astype(int)
    X = pd.DataFrame({"pair": [f"{a}-{b}" for a, b in zip(who, ad, strict=True)], "noise": rng.normal(size=n)})
    return X, click, click * (rng.random(n) < cvr), ctr, cvr


# -- delayed feedback: formulas ----------------------------------------------------------------------------------------------

number = st.floats(-3, 3)


@settings(max_examples=40, deadline=None)
@given(number, number, st.floats(0.01, 20))
def test_the_likelihood_is_the_integral_over_what_may_still_come(logit, log_rate, elapsed):
    p, rate = expit(logit), np.exp(log_rate)
    density = lambda d: np.exp(-delayed_loss(*map(np.array, ([logit], [log_rate], [1], [d], [elapsed])))[0][0])  # noqa: E731
    by_now = quad(density, 0, elapsed, limit=200)[0]  # the chance to see a conversion within the elapsed time
    none = np.exp(-delayed_loss(*map(np.array, ([logit], [log_rate], [0], [np.nan], [elapsed])))[0][0])
    assert by_now + none == pytest.approx(1, abs=1e-6)
    assert none == pytest.approx(1 - p + p * np.exp(-rate * elapsed), rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(number, number, st.booleans(), st.floats(0.01, 10), st.floats(0, 1))
def test_its_derivatives_are_its_slopes(logit, log_rate, converted, elapsed, share):
    rest = np.array([float(converted)]), np.array([share * elapsed]), np.array([elapsed])
    loss = lambda a, g: delayed_loss(np.array([a]), np.array([g]), *rest)[0][0]  # noqa: E731
    _, by_logit, by_log_rate = delayed_loss(np.array([logit]), np.array([log_rate]), *rest)
    step = 1e-5
    assert (loss(logit + step, log_rate) - loss(logit - step, log_rate)) / (2 * step) == pytest.approx(
        by_logit[0], abs=1e-5
    )
    assert (loss(logit, log_rate + step) - loss(logit, log_rate - step)) / (2 * step) == pytest.approx(
        by_log_rate[0], abs=1e-5
    )


@pytest.mark.parametrize("method", funnel.METHODS)
def test_without_delays_every_method_is_logistic_regression(method):
    X, log, _ = clicks(1500)
    feedback = delayed(log, 0.0, NOW + pd.Timedelta(hours=1))
    ours = DelayedConversion(method, penalty=2.0, window=0.5).fit(X, feedback)
    theirs = LogisticRegression(C=0.5, tol=1e-8).fit(X, log["conversion"])
    assert np.allclose(ours.coef_, theirs.coef_[0], atol=2e-3) and ours.intercept_ == pytest.approx(
        theirs.intercept_[0], abs=2e-3
    )
    assert ours.predict_proba(X).shape == (1500, 2) and ours.n_used_ == 1500


def test_the_arrival_rate_by_hand():
    many = Feedback(np.ones(3), np.array([1.0, 2.0, 3.0]), np.full(3, 1e6))
    assert arrival_rate(many) == pytest.approx(0.5, rel=1e-3)  # nothing is cut off: one over the mean
    rng = np.random.default_rng(0)
    delay, elapsed = rng.exponential(10, 20_000), rng.uniform(0, 30, 20_000)
    seen = delay <= elapsed
    cut = Feedback(seen.astype(int), np.where(seen, delay, np.nan), elapsed)
    assert np.nanmean(cut.delay) < 1 / 0.14  # the short delays are the ones that were seen
    assert arrival_rate(cut) == pytest.approx(0.1, rel=0.06)


# -- delayed feedback: recovery ----------------------------------------------------------------------------------------------


def test_planted_delays_have_the_planted_mean_and_hide_what_is_to_come():
    _, log, _ = clicks(40_000)
    log["conversion"] = 1
    feedback = delayed(log, 5 * DAY, NOW, seed=2)
    chance = 1 - np.exp(-feedback.elapsed / (5 * DAY))
    assert feedback.converted.mean() == pytest.approx(chance.mean(), abs=0.01)
    assert (feedback.delay[feedback.converted == 1] <= feedback.elapsed[feedback.converted == 1]).all()
    assert np.isnan(feedback.delay[feedback.converted == 0]).all()
    later = delayed(log, 5 * DAY, NOW + pd.Timedelta(days=1000), seed=2)
    assert later.converted.all() and later.delay.mean() == pytest.approx(5 * DAY, rel=0.03)
    assert delayed(log, 5 * DAY, NOW, seed=2).converted.tolist() == feedback.converted.tolist()


def test_only_the_models_of_the_delay_are_right_on_average():
    bias = {method: [] for method in funnel.METHODS}
    for seed in range(6):
        X, log, p = clicks(6000, seed)
        feedback = delayed(log, 7 * DAY, NOW, seed)
        for method, found in bias.items():
            q = DelayedConversion(method, window=7 * DAY).fit(X, feedback).predict_proba(X)[:, 1]
            found.append(q.mean() / p.mean() - 1)
    mean = {method: np.mean(found) for method, found in bias.items()}
    error = {method: np.std(found, ddof=1) / np.sqrt(6) for method, found in bias.items()}
    assert mean["naive"] == pytest.approx(-0.25, abs=0.05)  # a quarter of 28 days of conversions is still on its way
    assert mean["window"] == pytest.approx(-np.exp(-1), abs=0.05)  # e^(-window / mean delay) never counts
    for method in ("weighted", "delayed"):
        assert abs(mean[method]) < max(0.03, 3 * error[method]) and error[method] < 0.04


def test_it_recovers_coefficients_and_a_delay_that_depends_on_the_click():
    X, log, _ = clicks(40_000, seed=5)
    feedback = delayed(log, 4 * DAY * np.exp(-0.7 * X[:, 2]), NOW, seed=5)
    model = DelayedConversion().fit(X, feedback)
    assert np.allclose(model.coef_, [0.8, -0.4, 0], atol=0.1) and model.intercept_ == pytest.approx(-1.5, abs=0.1)
    assert np.allclose(model.delay_coef_, [0, 0, 0.7], atol=0.1)
    assert np.exp(-model.delay_intercept_) == pytest.approx(4 * DAY, rel=0.1)
    naive = DelayedConversion("naive").fit(X, feedback)
    assert naive.coef_[2] > 0.08  # who is quick looks as if she converted more


def test_it_works_in_a_pipeline():
    X, log, _ = clicks(2000)
    feedback = delayed(log, 3 * DAY, NOW)
    model = make_pipeline(StandardScaler(), DelayedConversion(penalty=0.0))
    wide = model.fit(1000 * X + 5, feedback).predict_proba(1000 * X + 5)
    assert np.allclose(wide, DelayedConversion(penalty=0.0).fit(X, feedback).predict_proba(X), atol=0.01)
    assert clone(DelayedConversion("window", window=3)).get_params()["window"] == 3


# -- click, conversion, both -------------------------------------------------------------------------------------------------


def test_the_losses_by_hand():
    a, b = torch.tensor([-1.0, 0.5, 2.0]), torch.tensor([0.3, -0.7, 0.1])
    click, conversion = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0.0, 0.0, 1.0])
    p, q = torch.sigmoid(a), torch.sigmoid(b)
    of_clicks = -(torch.log(1 - p[0]) + torch.log(p[1]) + torch.log(p[2]))
    only = of_clicks - torch.log(1 - q[1]) - torch.log(q[2])
    entire = of_clicks - torch.log(1 - p[0] * q[0]) - torch.log(1 - p[1] * q[1]) - torch.log(p[2] * q[2])
    assert funnel._towers_loss("clicks", a, b, click, conversion) == pytest.approx(only.item(), rel=1e-6)
    assert funnel._towers_loss("esmm", a, b, click, conversion) == pytest.approx(entire.item(), rel=1e-6)


def test_the_loss_of_a_sure_and_wrong_conversion_stays_finite():
    sure = torch.full((2,), 60.0, requires_grad=True)
    loss = funnel._towers_loss("esmm", sure, sure, torch.ones(2), torch.zeros(2))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(sure.grad).all()


def test_both_methods_learn_the_planted_rates_and_esmm_is_less_misled_by_who_clicks():
    bias = {method: [] for method in funnel.TOWERS}
    for seed in range(4):
        X, click, conversion, ctr, cvr = impressions(40_000, seed)
        assert conversion.sum() / click.sum() > 1.4 * cvr.mean()  # clicks convert better than the rest would
        for method, found in bias.items():
            model = FunnelModel(method, epochs=2, batch_size=1024, learning_rate=0.3, seed=seed)
            p = model.fit(X, click, conversion).predict(X)
            assert np.allclose(p["ctcvr"], p["ctr"] * p["cvr"]) and p.index.equals(X.index)
            assert min(np.corrcoef(p["ctr"], ctr)[0, 1], np.corrcoef(p["ctcvr"], ctr * cvr)[0, 1]) > 0.9
            assert p["ctcvr"].mean() == pytest.approx(conversion.mean(), rel=0.15)
            found.append(p["cvr"].mean() / cvr.mean() - 1)
    assert 0 < np.mean(bias["esmm"]) < np.mean(bias["clicks"])


def test_the_same_seed_gives_the_same_funnel_and_leaves_the_global_generator_alone():
    X, click, conversion, *_ = impressions(3000)
    before = torch.get_rng_state()
    first, second, other = (FunnelModel(seed=s).fit(X, click, conversion).predict(X) for s in (3, 3, 4))
    assert np.allclose(first, second, atol=1e-6) and not np.allclose(first, other, atol=1e-6)
    assert torch.equal(before, torch.get_rng_state())


# -- bad input ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "change", "words"),
    [
        ("both", lambda c, v: (c, v), "method='both' is unknown; choose one of clicks, esmm"),
        ("esmm", lambda c, v: (c * 0, v * 0), "None of the 3000 impressions was clicked"),
        ("esmm", lambda c, v: (c, v * 0), r"None of the \d+ clicks converted"),
        ("esmm", lambda c, v: (c, np.maximum(v, np.arange(len(c)) < 5)), r"\d rows hold a conversion without a click"),
        ("esmm", lambda c, v: (c * 2, v), "click must hold 0 or 1 for each of the 3000 rows"),
        ("esmm", lambda c, v: (c, v[:9]), "conversion must hold 0 or 1"),
    ],
)
def test_an_impossible_funnel_is_explained(method, change, words):
    X, click, conversion, *_ = impressions(3000)
    with pytest.raises(ValueError, match=words):
        FunnelModel(method).fit(X, *change(click, conversion))


@pytest.mark.parametrize(
    ("change", "delay", "words"),
    [
        (lambda t: t, -1.0, "mean_delay holds a negative or missing number"),
        (lambda t: t, np.nan, "mean_delay holds a negative or missing number"),
        (lambda t: t.drop(columns="timestamp"), 1.0, "The clicks lack timestamp"),
        (lambda t: t.drop(columns="conversion"), 1.0, "The clicks lack conversion"),
        (lambda t: t.assign(timestamp=t["timestamp"].where(t.index > 2)), 1.0, "The time of 3 clicks is missing"),
        (lambda t: t.assign(timestamp=t["timestamp"] + pd.Timedelta(days=99)), 1.0, "20 clicks come after now"),
        (lambda t: t.assign(conversion=2), 1.0, "conversion must hold 0 or 1"),
    ],
)
def test_a_log_that_cannot_be_delayed_is_explained(change, delay, words):
    with pytest.raises(ValueError, match=words):
        delayed(change(clicks(20)[1]), delay, NOW)


@pytest.mark.parametrize(
    ("method", "change", "words"),
    [
        ("esmm", lambda f: f, "method='esmm' is unknown; choose one of naive, window"),
        ("naive", lambda f: f.take(slice(0, 0)), "There are no clicks to learn from"),
        (
            "naive",
            lambda f: f._replace(converted=f.converted * 0),
            "None of the 4 clicks .*'naive' may use has converted",
        ),
        ("window", lambda f: f._replace(elapsed=f.elapsed + 5), "None of the 0 clicks .*'window' may use"),
        ("naive", lambda f: f._replace(converted=f.converted * 2), "converted must hold 0 or 1"),
        ("delayed", lambda f: f._replace(delay=-f.delay), "A delay or an elapsed time is negative"),
        ("delayed", lambda f: f._replace(elapsed=-f.elapsed), "A delay or an elapsed time is negative"),
        ("delayed", lambda f: f._replace(delay=f.delay * np.nan), "A time is missing"),
        ("delayed", lambda f: f._replace(elapsed=f.elapsed * np.nan), "A time is missing"),
        ("delayed", lambda f: f._replace(delay=f.delay + 99), "2 conversions come later than the time that has passed"),
    ],
)
def test_impossible_feedback_is_explained(method, change, words):
    feedback = change(Feedback(np.array([1, 0, 1, 0]), np.array([1, np.nan, 2, np.nan]), np.array([9.0, 8, 7, 6])))
    X = np.arange(2.0 * len(feedback.converted)).reshape(-1, 2)
    with pytest.raises(ValueError, match=words):
        DelayedConversion(method).fit(X, feedback)


def test_predicting_before_fitting_is_explained():
    for model, X in ((FunnelModel(), pd.DataFrame({"a": [1.0]})), (DelayedConversion(), [[1.0]])):
        with pytest.raises(ValueError, match="not fitted"):
            getattr(model, "predict_proba", getattr(model, "predict", None))(X)
