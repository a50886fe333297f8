"""Profiles, K-means, choices of k, and cards: on small tables whose answer is known, and on input that is wrong."""

import ast
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.datasets import make_blobs
from sklearn.metrics import adjusted_rand_score

from adlib import audience, personas

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "02_audience_clustering.ipynb"


def events_of(*rows):
    """Rows of (user, product, event, hour on the first of March 2026, amount)."""
    frame = pd.DataFrame(rows, columns=["user_id", "product_id", "event", "hour", "amount"])
    when = pd.Timestamp("2026-03-01", tz="UTC") + pd.to_timedelta(frame.pop("hour"), unit="h")
    return frame.assign(timestamp=when)


@pytest.fixture
def tables():
    events = events_of(
        ("ann", "p1", "view", 9, 0.0),
        ("ann", "p1", "purchase", 10, 100.0),
        ("ann", "p2", "view", 20, 0.0),
        ("ben", "p2", "view", 21, 0.0),
    )
    products = pd.DataFrame(
        {
            "product_id": ["p1", "p2", "p3"],
            "title": "x",
            "category": ["dress", "coat", "coat"],
            "price": [100.0, 400.0, 200.0],
        }
    )
    users = pd.DataFrame({"user_id": ["ann", "ben", "silent"]})
    return {"events": events, "products": products, "users": users}


@pytest.fixture(scope="module")
def blobs():
    return make_blobs(n_samples=400, n_features=5, centers=4, cluster_std=1.0, random_state=3)


# ---- profiles


def test_features_are_the_weighted_sum_of_what_was_touched(tables):
    profile = audience.features(tables)
    share = {
        "dress": 5 / 7,
        "coat": 2 / 7,
    }  # of all weight: ann 1 + 4 on the dress and 1 on the coat, ben 1 on the coat
    expected = (5 + audience.PRIOR * share["dress"]) / (6 + audience.PRIOR)
    assert profile.loc["ann", "category=dress"] == pytest.approx(expected)
    np.testing.assert_allclose(profile.filter(like="category=").sum(axis=1), 1)
    np.testing.assert_allclose(profile.filter(like="hour=").sum(axis=1), 1)
    assert profile.loc["ann", "log_spend"] == pytest.approx(np.log1p(100))
    assert profile.loc["ann", "log_events"] == pytest.approx(np.log1p(3))


def test_relative_price_compares_within_the_category(tables):
    profile = audience.features(tables)
    assert profile.loc["ben", "relative_price"] > 0  # 400 yuan is dear for a coat
    assert abs(profile.loc["ann", "relative_price"]) < profile.loc["ben", "relative_price"]  # the only dress is neither


def test_a_shopper_without_events_gets_the_average_interests_and_no_activity(tables):
    profile = audience.features(tables)
    assert list(profile.index) == ["ann", "ben", "silent"]
    assert profile.loc["silent", "category=dress"] == pytest.approx(5 / 7)
    assert profile.loc["silent", ["log_events", "log_spend"]].tolist() == [0, 0]
    assert np.isfinite(profile.to_numpy()).all()


def test_two_tables_of_an_own_shop_are_enough(tables):
    impressions = pd.DataFrame({"user_id": ["ann", "zoe"], "click": [1, 0], "device": ["mobile", "desktop"]})
    events = tables["events"].drop(columns=["product_id", "amount"])
    profile = audience.features({"events": events, "impressions": impressions})
    assert list(profile.index) == ["ann", "ben", "zoe"]
    assert {"device=mobile", "log_clicks", "hour=evening", "event=view"} <= set(profile)
    assert not profile.columns.str.startswith(("category", "log_spend", "relative_price")).any()
    assert np.isfinite(profile.to_numpy()).all()


def test_missing_values_and_many_categories(tables):
    many = pd.DataFrame({"product_id": [f"q{i}" for i in range(60)], "category": [f"c{i}" for i in range(60)]})
    many.loc[59, "category"] = None
    events = events_of(*[("ann", f"q{i}", "view", i % 24, None) for i in range(60)])
    profile = audience.features({"events": events, "products": many})
    assert profile.filter(like="category=").shape[1] == audience.MOST_VALUES + 1  # and "other"
    assert np.isfinite(profile.to_numpy()).all()
    products = tables["products"].assign(category=None, price=np.nan)
    profile = audience.features({**tables, "products": products})
    assert np.isfinite(profile.to_numpy()).all()


@pytest.mark.parametrize("given_tables", [{}, {"events": events_of()}])
def test_features_without_events_is_a_clear_error(given_tables):
    with pytest.raises(ValueError, match="need an events table with at least one row"):
        audience.features(given_tables)


def test_one_user(tables):
    events = tables["events"].query("user_id == 'ann'")
    profile = audience.features({"events": events})
    assert profile.shape[0] == 1
    assert audience.kmeans(profile, 1).inertia == pytest.approx(0)
    cards = personas.persona_cards(profile, [0])
    assert (cards[0].size, cards[0].share, cards[0].name) == (1, 1.0, "close to average")
    with pytest.raises(ValueError, match="k is 2, and there are 1 shoppers"):
        audience.choose_k(profile, [2])


def test_rfm(tables):
    table = audience.rfm(tables["events"], users=["ann", "ben", "silent"])
    assert table.loc["ann"].tolist() == pytest.approx([11 / 24, 1, 100])
    assert table.loc["silent"].tolist() == pytest.approx([12 / 24, 0, 0])
    later = audience.rfm(tables["events"], end=pd.Timestamp("2026-03-03", tz="UTC"))
    assert later.loc["ann", "recency"] == pytest.approx(2 - 10 / 24)
    assert audience.rfm(tables["events"].drop(columns="amount"))["monetary"].eq(0).all()


def test_an_item_never_seen_says_nothing_about_taste(tables):
    events = events_of(("ann", "p1", "view", 9, 0.0), ("ann", "gone", "view", 9, 0.0), ("cy", "gone", "view", 9, 0.0))
    profile = audience.features({**tables, "events": events})
    only_known = audience.features({**tables, "events": events.query("product_id != 'gone'")})
    taste = ["category=dress", "relative_price"]
    np.testing.assert_allclose(profile.loc["ann", taste], only_known.loc["ann", taste])
    np.testing.assert_allclose(profile.loc["cy", taste], only_known.loc["silent", taste])  # nothing known: the average
    assert profile.loc["ann", "log_events"] == pytest.approx(np.log(3))  # that something was viewed still counts


def test_duplicate_interactions_count_twice_until_they_are_cleaned(tables):
    events = tables["events"]
    doubled = audience.features({**tables, "events": pd.concat([events, events])})
    assert doubled.loc["ann", "log_events"] == pytest.approx(np.log1p(6))
    share = {"dress": 5 / 7}  # of all weight; the same shop, twice
    expected = (10 + audience.PRIOR * share["dress"]) / (12 + audience.PRIOR)
    assert doubled.loc["ann", "category=dress"] == pytest.approx(expected)
    cleaned = audience.features({**tables, "events": pd.concat([events, events]).drop_duplicates()})
    pd.testing.assert_frame_equal(cleaned, audience.features(tables))


@pytest.mark.parametrize("amount", [np.nan, np.inf])
def test_amounts_that_are_not_finite_are_refused_by_kmeans_by_name(tables, amount):
    events = tables["events"].assign(amount=[0.0, amount, 0.0, 0.0])
    profile = audience.features({**tables, "events": events})
    if np.isnan(amount):  # an unknown amount is no spending that is known
        assert profile.loc["ann", "log_spend"] == 0
    else:
        with pytest.raises(ValueError, match="column 'log_spend' has 1 missing or infinite"):
            audience.kmeans(profile, 2)


# ---- life cycle


@pytest.fixture
def orders():
    """Orders on days of the year 2026: one customer for each stage, one who only looks."""
    days = {"fresh": [95], "twice": [80, 99], "faithful": [10, 90], "slipping": [5, 55], "gone": [1, 2]}
    rows = [(user, "purchase", day) for user, list_ in days.items() for day in list_] + [("looker", "view", 99)]
    frame = pd.DataFrame(rows, columns=["user_id", "event", "day"])
    return frame.assign(timestamp=pd.Timestamp("2026-01-01", tz="UTC") + pd.to_timedelta(frame.pop("day"), unit="D"))


def on_day(day):
    return pd.Timestamp("2026-01-01", tz="UTC") + pd.Timedelta(days=day)


def test_life_cycle_has_a_stage_for_everyone(orders):
    stages = audience.life_cycle(orders, end=on_day(100), window=30).astype(str).to_dict()
    assert stages == {
        "fresh": "new",
        "twice": "new",
        "faithful": "loyal",
        "slipping": "at risk",
        "gone": "lost",
        "looker": "no order yet",
    }


def test_life_cycle_does_not_look_ahead(orders):
    early = audience.life_cycle(orders, users=[*orders["user_id"].unique(), "never seen"], end=on_day(11), window=5)
    assert early[["fresh", "twice", "looker", "never seen"]].eq("no order yet").all()
    assert early[["faithful", "slipping", "gone"]].tolist() == ["new", "at risk", "at risk"]
    again = audience.life_cycle(orders[orders["timestamp"] <= on_day(11)], users=early.index, end=on_day(11), window=5)
    pd.testing.assert_series_equal(early, again)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 8), st.integers(0, 99), st.floats(0.5, 60))
def test_life_cycle_is_a_partition_and_time_only_ages(n, users, seed, window):
    rng = np.random.default_rng(seed)
    who = [f"u{u}" for u in rng.integers(users, size=n)]
    events = pd.DataFrame(
        {"user_id": who, "event": "purchase", "timestamp": [on_day(d) for d in rng.uniform(0, 90, n)]}
    )
    now = audience.life_cycle(events, window=window)
    assert now.notna().all() and list(now.cat.categories) == list(audience.STAGES) and not now.eq("no order yet").any()
    much_later = audience.life_cycle(events, end=on_day(90 + 3 * window), window=window)
    assert much_later.eq("lost").all()


@pytest.mark.parametrize("window", [0, -3, float("nan")])
def test_life_cycle_needs_a_window(orders, window):
    with pytest.raises(ValueError, match="window must be a number of days above 0"):
        audience.life_cycle(orders, window=window)


# ---- K-means


@pytest.mark.parametrize("k", [1, 2, 4, 7])
def test_kmeans_equals_scikit_learn_from_the_same_start(blobs, k):
    X = blobs[0]
    start = X[np.random.default_rng(k).choice(len(X), k, replace=False)]
    ours = audience.kmeans(X, k, start=start)
    theirs = KMeans(k, init=start, n_init=1, tol=0, algorithm="lloyd").fit(X)
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-6)
    assert adjusted_rand_score(ours.labels, theirs.labels_) == 1
    np.testing.assert_array_equal(audience.assign(X, ours.centres), ours.labels)


def test_kmeans_finds_blobs_and_its_objective_never_rises(blobs):
    found = audience.kmeans(blobs[0], 4, seed=1)
    assert adjusted_rand_score(found.labels, blobs[1]) > 0.95
    assert found.centres.shape == (4, 5)
    assert (np.diff(found.history) <= 1e-9).all()
    again = audience.kmeans(blobs[0], 4, seed=1)
    np.testing.assert_array_equal(found.labels, again.labels)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 30), st.integers(1, 4), st.integers(1, 6), st.integers(0, 99))
def test_kmeans_is_a_fixed_point_with_no_empty_group(n, d, k, seed):
    X = np.random.default_rng(seed).normal(size=(n, d))
    k = min(k, n)
    found = audience.kmeans(X, k, seed, n_init=2)
    assert set(found.labels) == set(range(k))
    means = np.array([X[found.labels == g].mean(0) for g in range(k)])
    np.testing.assert_allclose(found.centres, means, atol=1e-9)
    assert found.inertia <= ((X - X.mean(0)) ** 2).sum() + 1e-9


def test_an_empty_group_takes_the_farthest_row():
    X = np.array([[0.0], [0.1], [0.2], [9.0]])
    found = audience.kmeans(X, 2, start=np.array([[0.1], [500.0]]))
    assert found.labels.tolist() == [0, 0, 0, 1]
    assert found.inertia == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("X", "k", "message"),
    [
        (np.zeros((3, 2)), 4, "k is 4, and there are 3 shoppers"),
        (np.zeros((3, 2)), 0, "k must lie between 1"),
        (np.ones((5, 2)), 2, "need at least 2 different profiles; X has only 1"),
        (np.array([[1.0, np.nan], [1, 2]]), 1, "column 1 has 1 missing or infinite"),
        (pd.DataFrame({"spend": [1.0, np.inf, -np.inf]}), 1, "column 'spend' has 2 missing or infinite"),
        (np.zeros(4), 1, "must be a matrix"),
        (np.zeros((0, 3)), 1, "not empty"),
    ],
)
def test_kmeans_says_what_is_wrong(X, k, message):
    with pytest.raises(ValueError, match=message):
        audience.kmeans(X, k)


def test_a_start_of_the_wrong_shape_is_an_error():
    with pytest.raises(ValueError, match=r"start must have the shape \(2, 3\); it has \(2, 2\)"):
        audience.kmeans(np.random.default_rng(0).normal(size=(9, 3)), 2, start=np.zeros((2, 2)))


# ---- how good are the groups


def test_choose_k_finds_the_number_of_blobs(blobs):
    table = audience.choose_k(blobs[0], range(2, 7), n_boot=5)
    assert table["silhouette"].idxmax() == 4
    assert table.loc[4, "stability"] > 0.95
    assert table["inertia"].is_monotonic_decreasing
    assert (table["low"] <= table["stability"]).all() and (table["stability"] <= table["high"]).all()


def test_choose_k_starts_at_two(blobs):
    with pytest.raises(ValueError, match="starts at 2, not at 1"):
        audience.choose_k(blobs[0], [1, 2])


def test_stability_of_few_or_repeated_rows():
    assert audience.stability(np.arange(8.0)[:, None], 4, n_boot=30).high <= 1
    repeated = np.repeat([[0.0], [1.0], [5.0]], [30, 1, 1], axis=0)
    assert 0 < audience.stability(repeated, 3, n_boot=10).estimate <= 1


def test_noise_is_not_stable():
    noise = np.random.default_rng(0).normal(size=(300, 8))
    assert audience.stability(noise, 6, n_boot=5).estimate < 0.6


def test_interval_holds_the_estimate_and_falls_with_n(blobs):
    X, truth = blobs
    labels = audience.kmeans(X[:, :1], 4).labels
    wide = audience.interval(adjusted_rand_score, truth[:100], labels[:100])
    narrow = audience.interval(adjusted_rand_score, truth, labels)
    assert narrow.low < narrow.estimate < narrow.high
    assert narrow.high - narrow.low < wide.high - wide.low
    assert narrow.estimate == adjusted_rand_score(truth, labels)


def test_interval_covers_the_truth():
    rng = np.random.default_rng(0)
    found = [audience.interval(np.mean, rng.exponential(size=100), n_boot=200, seed=i) for i in range(300)]
    assert 0.89 <= np.mean([low <= 1 <= high for _, low, high in found]) <= 0.99


def test_interval_of_random_labels_holds_zero():
    rng = np.random.default_rng(1)
    for seed in range(8):  # a shopper drawn twice agrees with itself: without centring, zero would often lie below
        one, other = rng.integers(4, size=(2, 100))
        _, low, high = audience.interval(adjusted_rand_score, one, other, n_boot=60, seed=seed)
        assert low <= 0 <= high


@pytest.mark.parametrize("columns", [([1], [1]), ([1, 2, 3], [1, 2])])
def test_interval_needs_the_same_shoppers(columns):
    with pytest.raises(ValueError, match="same two or more shoppers"):
        audience.interval(adjusted_rand_score, *columns)


# ---- cards


@pytest.fixture
def profile():
    rng = np.random.default_rng(0)
    n = 200
    dress = np.r_[rng.normal(0.8, 0.05, n), rng.normal(0.1, 0.05, n)]
    return pd.DataFrame(
        {
            "log_events": rng.normal(2, 0.3, 2 * n),
            "relative_price": np.r_[rng.normal(0.3, 0.1, n), rng.normal(-0.3, 0.1, n)],
            "category=dress": dress,
            "category=coat": 1 - dress,
            "hour=evening": rng.normal(0.5, 0.1, 2 * n),
            "constant": 1.0,
        }
    )


def test_cards_say_what_differs(profile):
    first, second = personas.persona_cards(profile, np.repeat([0, 1], 200))
    assert first.favourites == ("dress",) and second.favourites == ("coat",)
    assert (first.size, first.share) == (200, 0.5)
    assert any(trait.startswith("category dress: 80% (shop 45%)") for trait in first.traits)
    assert "dress" in first.sentence and "dearer" in first.sentence and "cheaper" in second.sentence
    assert "were not measured" in first.caution and "% of them" in first.caution


def test_traits_of_a_constant_column_are_zero(profile):
    table = personas.traits(profile, np.repeat([0, 1], 200))
    assert table["constant"].eq(0).all()
    np.testing.assert_allclose(table.sum(), 0, atol=1e-9)  # two groups of equal size


def test_a_group_that_is_average_says_so():
    flat = pd.DataFrame({"log_events": [1.0, 1.0, 1.0], "x": [2.0, 2.0, 2.0]})
    (card,) = personas.persona_cards(flat, ["all"] * 3)
    assert (card.name, card.traits, card.sentence) == ("close to average", (), "Keep the general copy.")


def test_cards_are_escaped(profile):
    evil = profile.rename(columns={"category=dress": "category=<script>alert(1)</script>"})
    markup = personas.cards_html(personas.persona_cards(evil, ["<b>", "b"] * 200))
    markup += personas.cards_html(personas.persona_cards(evil, np.repeat(["<b>", "b"], 200)))
    assert "<script" not in markup and "<b>:" not in markup
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in markup


def test_cards_need_one_label_per_shopper(profile):
    with pytest.raises(ValueError, match="400 shoppers but 3 labels"):
        personas.persona_cards(profile, [0, 1, 2])


def test_a_segment_without_members_has_no_card(profile):
    labels = pd.Categorical(np.repeat(["a", "c"], 200), categories=["a", "b", "c"])
    cards = personas.persona_cards(profile, labels)
    assert [card.group for card in cards] == ["a", "c"] and sum(card.size for card in cards) == len(profile)


# ---- flows


def ribbons(fig):
    """Thickness of each ribbon, in shoppers."""
    paths = [collection.get_paths()[0].vertices for collection in fig.axes[0].collections]
    return sorted(round(float(np.ptp(v[np.isclose(v[:, 0], v[:, 0].min()), 1]))) for v in paths)


def test_flow_plot_draws_as_many_shoppers_as_move():
    before, after = np.repeat(["a", "b"], [30, 70]), np.repeat(["a", "b", "b"], [20, 10, 70])
    fig = personas.flow_plot({"spring": before, "summer": after}, order=["a", "empty", "b"])
    assert ribbons(fig) == [10, 20, 70]  # nobody goes from b to a, and "empty" takes no room
    heights = [round(bar.get_height()) for bar in fig.axes[0].patches]
    assert heights == [30, 0, 70, 20, 0, 80]
    plt.close(fig)


@pytest.mark.parametrize(
    ("snapshots", "order", "message"),
    [
        ({"now": [1, 2]}, None, "two or more snapshots"),
        ({"now": [1, 2], "then": [1]}, None, r"of the same shoppers; got \[2, 1\]"),
        ({"now": [1, 2], "then": [1, 3]}, [1, 2], r"1 segments are not in the order given: \['3'\]"),
        ({"now": range(9), "then": range(9)}, None, "9 segments cannot be told apart; draw at most 8"),
    ],
)
def test_flow_plot_says_what_is_wrong(snapshots, order, message):
    with pytest.raises(ValueError, match=message):
        personas.flow_plot(snapshots, order=order)


# ---- the notebook's own K-means


def test_the_notebooks_kmeans_equals_the_packages_and_scikit_learns(blobs):
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    source = "\n".join("".join(c["source"]) for c in cells if "by-hand" in c["metadata"].get("tags", []))
    names = {"np": np, "pd": pd}
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    exec(compile(ast.Module(functions, type_ignores=[]), NOTEBOOK.name, "exec"), names)
    X = blobs[0]
    start = X[:4]
    labels, _, history = names["kmeans_by_hand"](X, start)
    ours = audience.kmeans(X, 4, start=start)
    theirs = KMeans(4, init=start, n_init=1, tol=0, algorithm="lloyd").fit(X)
    assert history[-1] == pytest.approx(theirs.inertia_, rel=1e-6) == pytest.approx(ours.inertia, rel=1e-6)
    np.testing.assert_array_equal(labels, ours.labels)
