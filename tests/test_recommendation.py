"""Protocol, recommenders, plan and learning path: on tiny cases done by hand, as properties, and on input that is wrong."""

import ast
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.exceptions import NotFittedError

from adlib import planning, ranking
from adlib import recommendation as rec
from adlib import sequential as seq

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "04_recommendation.ipynb"


def events_of(*rows):
    """Rows of (user, product, day of March 2026)."""
    frame = pd.DataFrame(rows, columns=["user_id", "product_id", "day"])
    return frame.assign(timestamp=pd.Timestamp("2026-03-01", tz="UTC") + pd.to_timedelta(frame.pop("day"), unit="D"))


TINY = (
    ("ann", "a", 1),
    ("ben", "b", 2),
    ("ann", "b", 3),
    ("ann", "c", 4),
    ("ann", "a", 9),
    ("ben", "a", 5),
    ("cem", "c", 6),
)


@pytest.fixture(scope="module")
def crowd():
    """300 users in two camps over 40 items: each touches twelve items, nine in ten of the own half; the later the higher the number."""
    rng, rows = np.random.default_rng(0), []
    for u in range(300):
        p = np.where((np.arange(40) < 20) == (u % 2 == 0), 0.9, 0.1) / 20
        rows += [(f"u{u}", f"i{i:02d}", d) for d, i in enumerate(sorted(rng.choice(40, 12, replace=False, p=p)))]
    return ranking.Interactions.of(events_of(*rows), items=[f"i{i:02d}" for i in range(40)])


@pytest.fixture(scope="module")
def vectors():
    """Vectors of the 40 items: the half they belong to, and noise."""
    noise = np.random.default_rng(1).normal(0, 0.1, (40, 6))
    noise[:, 0] += np.where(np.arange(40) < 20, 1, -1)
    return noise


def models(vectors):
    return [
        rec.Popularity(),
        rec.ALS(4),
        rec.LightFM(4, epochs=5),
        rec.LightFM(4, epochs=5, item_features=vectors),
        rec.Fused(vectors),
        rec.Fused(vectors, learn=False),
        seq.SASRec(8, epochs=3),
        seq.GAN(16, epochs=4, batch_size=16),
        seq.GAN(16, epochs=4, batch_size=16, adversary=0.0),
    ]


NAMES = ["popularity", "als", "lightfm", "lightfm+features", "fused", "plain", "sasrec", "gan", "autoencoder"]


@pytest.fixture(params=range(len(NAMES)), ids=NAMES)
def model(request, vectors):
    """Return each recommender in turn, not fitted."""
    return models(vectors)[request.param]


# ---- interactions and the split


def test_pairs_count_once_as_of_their_first_time():
    made = ranking.Interactions.of(events_of(*TINY), weight=[1, 1, 2, 1, 3, 1, 1])
    assert [(made.users[u], made.items[i]) for u, i in zip(made.user, made.item, strict=True)] == [
        ("ann", "a"), ("ben", "b"), ("ann", "b"), ("ann", "c"), ("ben", "a"), ("cem", "c")
    ]  # fmt: skip
    assert made.weight.tolist() == [4, 1, 2, 1, 1, 1]  # ann touched a twice
    assert made.popularity.tolist() == [2, 2, 2]
    assert made.matrix.toarray().tolist() == [[4, 2, 1], [1, 1, 0], [0, 0, 1]]
    assert [s.tolist() for s in made.sequences] == [[0, 1, 2], [1, 0], [2]]


def test_leave_last_out_by_hand():
    split = ranking.leave_last_out(ranking.Interactions.of(events_of(*TINY)), minimum=2)
    assert split.user.tolist() == [0, 1] and split.target.tolist() == [2, 0]  # ann: c, ben: a; cem has too few
    assert [s.tolist() for s in split.train.sequences] == [[0, 1], [1], [2]]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6), st.integers(0, 9)), min_size=12, max_size=60))
def test_the_split_keeps_everything_else_and_never_leaks(rows):
    made = ranking.Interactions.of(events_of(*((f"u{u}", f"p{p}", d) for u, p, d in rows)))
    most = np.bincount(made.user).max()
    split = ranking.leave_last_out(made, minimum=most)
    assert len(split.train) + len(split.user) == len(made)
    held = {*zip(split.user, split.target, strict=True)}
    assert not held & {*zip(split.train.user, split.train.item, strict=True)}
    assert all(made.sequences[u][-1] == i for u, i in held)


def test_shuffling_keeps_popularity_and_breaks_taste(crowd):
    shuffled = crowd.shuffled(3)
    assert (shuffled.popularity == crowd.popularity).all() and (shuffled.user == crowd.user).all()
    own = [np.mean((made.item < 20) == (made.user % 2 == 0)) for made in (crowd, shuffled)]
    assert own[0] > 0.8 and abs(own[1] - 0.5) < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.drop(columns="timestamp"), "missing: \\['timestamp'\\]"),
        (lambda e: e.iloc[:0], "missing: every row"),
        (lambda e: e.assign(user_id=None), "a row without user_id, product_id or timestamp"),
        (lambda e: e.assign(timestamp=pd.NaT), "cannot be placed"),
    ],
)
def test_events_that_cannot_be_used(change, message):
    with pytest.raises(ValueError, match=message):
        ranking.Interactions.of(change(events_of(*TINY)))


def test_other_wrong_interactions():
    events = events_of(*TINY)
    with pytest.raises(ValueError, match="finite and above zero"):
        ranking.Interactions.of(events, weight=[np.nan] * len(events))
    with pytest.raises(ValueError, match="product_id 'c' has events but is not in the list of 2 given"):
        ranking.Interactions.of(events, items=["a", "b"])
    with pytest.raises(ValueError, match=r"nobody has 4 different items.*the most is 3"):
        ranking.leave_last_out(ranking.Interactions.of(events), minimum=4)


# ---- measures


def test_ranking_metrics_by_hand():
    found = ranking.ranking_metrics([[5, 6, 7], [5, 6, 7], [5, 6, 7]], [5, 7, 9])
    assert found["recall"].tolist() == [1, 1, 0]
    assert found["precision"].tolist() == pytest.approx([1 / 3, 1 / 3, 0])
    assert found["ndcg"].tolist() == pytest.approx([1, 1 / math.log2(4), 0])
    assert found["mrr"].tolist() == pytest.approx([1, 1 / 3, 0])
    with pytest.raises(ValueError, match="1 lists do not match 2"):
        ranking.ranking_metrics([[1]], [1, 2])


def test_ndcg_equals_scikit_learns():
    from sklearn.metrics import ndcg_score

    rng = np.random.default_rng(0)
    scores, target = rng.random((50, 30)), rng.integers(30, size=50)
    ours = ranking.ranking_metrics(ranking.top_k(scores, 10), target)["ndcg"].mean()
    assert ours == pytest.approx(ndcg_score(np.eye(30)[target], scores, k=10))


def test_list_metrics_by_hand():
    found = ranking.list_metrics(np.array([[0, 1], [0, 1]]), [3, 1, 0, 0])
    assert found["coverage"] == 0.5 and found["popularity_bias"] == pytest.approx(2 / 1)
    assert found["novelty"] == pytest.approx((-math.log2(4 / 8) - math.log2(2 / 8)) / 2)
    with pytest.raises(ValueError, match="popularity is zero everywhere"):
        ranking.list_metrics(np.array([[0]]), [0, 0])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 12), st.integers(0, 999), st.booleans())
def test_top_k_is_a_stable_sort(n, m, seed, ties):
    rng = np.random.default_rng(seed)
    scores = rng.integers(3, size=(n, m)).astype(float) if ties else rng.random((n, m))
    k = int(rng.integers(1, m + 1))
    values = np.take_along_axis(scores, ranking.top_k(scores, k), 1)
    np.testing.assert_array_equal(values, -np.sort(-scores, axis=1)[:, :k])
    assert all(len({*row}) == k for row in ranking.top_k(scores, k))


@pytest.mark.parametrize("k", [0, 6])
def test_a_list_longer_than_the_shop_is_an_error(k):
    with pytest.raises(ValueError, match=f"a list of {k} cannot be taken from 5 items"):
        ranking.top_k(np.zeros((1, 5)), k)


def test_regret_by_hand():
    truth = np.array([[0.4, 0.3, 0.2, 0.1]])
    assert ranking.regret([[0, 1]], truth).tolist() == pytest.approx([0])
    assert ranking.regret([[2, 3]], truth).tolist() == pytest.approx([1 - 0.3 / 0.7])
    seen = sparse.csr_matrix([[1, 0, 0, 0]])  # the best list is then 1, 2
    assert ranking.regret([[1, 3]], truth, seen).tolist() == pytest.approx([1 - 0.4 / 0.5])
    with pytest.raises(ValueError, match="2 lists do not match the truth"):
        ranking.regret([[1], [2]], truth)


def test_interval_covers_and_pairing_narrows():
    rng = np.random.default_rng(0)
    found = [ranking.interval(rng.exponential(size=100), n_boot=200, seed=i) for i in range(200)]
    assert 0.87 <= np.mean([low <= 1 <= high for _, low, high in found]) <= 0.99
    ease = rng.random(400)
    a, b = ease + rng.normal(0, 0.01, 400) + 0.02, ease + rng.normal(0, 0.01, 400)
    paired, alone = ranking.interval(a, b), ranking.interval(a)
    assert paired.low > 0 and paired.high - paired.low < 0.2 * (alone.high - alone.low)


def test_interval_needs_the_same_users():
    with pytest.raises(ValueError, match="the same users: 2 against 3"):
        ranking.interval([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="no users to average over"):
        ranking.interval([])


# ---- every recommender


def test_it_ranks_the_unseen_and_tells_the_camps_apart(model, crowd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.fit(crowd)
        users = np.arange(60)
        lists = model.recommend(users, 5)
    assert lists.shape == (60, 5) and all(len({*row}) == 5 for row in lists)
    assert all(not set(row) & set(crowd.sequences[u]) for u, row in zip(users, lists, strict=True))
    small = model.recommend(users, 5, batch=7)
    np.testing.assert_array_equal(lists, small)  # memory is bounded, the lists are the same
    again = model.recommend(users, 5, exclude_seen=False)
    own = np.mean((again < 20) == (users % 2 == 0)[:, None])
    assert own > 0.9 if model.__class__.__name__ not in ("Popularity", "SASRec") else own >= 0.4


def test_it_is_the_same_for_the_same_seed(model, crowd):
    first = model.fit(crowd).scores(np.arange(20))
    np.testing.assert_allclose(first, model.fit(crowd).scores(np.arange(20)), atol=1e-5)


def test_a_user_without_an_event_gets_the_popular_items(model, crowd):
    everyone = crowd.users.append(pd.Index(["new"]))
    more = ranking.Interactions(everyone, crowd.items, crowd.user, crowd.item, crowd.weight)
    found = model.fit(more).recommend([300], 5)[0]
    np.testing.assert_array_equal(found, ranking.top_k(crowd.popularity[None], 5)[0])


def test_one_single_user(model, crowd):
    one = ranking.Interactions(
        crowd.users[:1], crowd.items, *(x[crowd.user == 0] for x in (crowd.user, crowd.item, crowd.weight))
    )
    found = model.fit(one).recommend([0], 3)
    assert found.shape == (1, 3) and not set(found[0]) & set(one.sequences[0])


def test_an_item_that_nobody_touched_is_no_trouble(model, crowd):
    keep = np.flatnonzero(crowd.item != 7)
    scores = model.fit(crowd.take(keep)).scores([0, 1])
    assert scores.shape == (2, 40) and np.isfinite(scores).all()


def test_duplicate_interactions_change_nothing():
    rows = [(f"u{u}", f"p{(u + i) % 5}", i) for u in range(6) for i in range(3)]
    once, twice = (ranking.Interactions.of(events_of(*rows * n), weight=np.full(18 * n, 1 / n)) for n in (1, 2))
    lists = [rec.ALS(2, seed=1).fit(made).recommend(np.arange(6), 2) for made in (once, twice)]
    np.testing.assert_array_equal(*lists)


def test_what_every_recommender_refuses(model, crowd):
    with pytest.raises(NotFittedError):
        model.scores([0])
    with pytest.raises(ValueError, match="no interaction to learn from"):
        model.fit(crowd.take(np.zeros(0, int)))
    model.fit(crowd)
    with pytest.raises(ValueError, match="positions from 0 to 299; got 0 to 300"):
        model.scores([0, 300])
    with pytest.raises(ValueError, match="a list of 29 is too long: a user has only 28 candidates left"):
        model.recommend([0], 29)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_vectors_that_are_not_finite(crowd, vectors, bad):
    wrong = vectors.copy()
    wrong[3, 2] = bad
    for model in (
        rec.Fused(wrong),
        rec.LightFM(item_features=wrong),
        rec.LightFM(item_features=sparse.csr_matrix(wrong)),
    ):
        with pytest.raises(ValueError, match="item vectors hold 1 numbers that are missing or infinite"):
            model.fit(crowd)
    users = np.full((300, 2), bad)
    with pytest.raises(ValueError, match="user vectors hold 600 numbers"):
        rec.Fused(vectors, users).fit(crowd)


def test_vectors_of_the_wrong_shape(crowd, vectors):
    with pytest.raises(ValueError, match=r"one row for each of the 40 items; their shape is \(39, 6\)"):
        rec.Fused(vectors[:39]).fit(crowd)
    with pytest.raises(ValueError, match="X Yᵀ needs one space: items have 6 numbers, users 3; use learn=True"):
        rec.Fused(vectors, np.ones((300, 3)), learn=False).fit(crowd)


def test_constant_features_fall_back_to_popularity(crowd):
    flat = np.ones((40, 4))
    for model in (rec.Fused(flat), rec.Fused(flat, learn=False)):
        lists = model.fit(crowd).recommend([0, 1], 40, exclude_seen=False)
        np.testing.assert_array_equal(lists, ranking.top_k(np.tile(crowd.popularity, (2, 1)), 40))
    assert np.isfinite(rec.LightFM(4, item_features=flat).fit(crowd).scores([0])).all()


def test_the_bridge_is_the_ridge_solution(crowd, vectors):
    """Without a penalty, no matrix between X and Y comes nearer to what was touched."""
    model = rec.Fused(vectors, penalty=1e-9).fit(crowd)
    touched = (crowd.matrix > 0).toarray()
    X, Y = (np.asarray(vectors), touched @ vectors / touched.sum(1, keepdims=True))
    X, Y = ((v - v.mean(0)) for v in (X, Y))
    goal = touched - touched.mean(0)
    A, *_ = np.linalg.lstsq(np.kron(Y, X), goal.ravel(), rcond=None)
    best = Y @ A.reshape(6, 6) @ X.T
    tie = 1e-6 * crowd.popularity / crowd.popularity.max()
    np.testing.assert_allclose(model.scores(np.arange(300)) - touched.mean(0) - tie, best, atol=2e-3)


def test_als_minimises_the_objective_of_its_docstring(crowd):
    """At the minimum each vector is the ridge solution given the others: (YᵀCY + λI) x = YᵀCp."""
    heavy = ranking.Interactions(crowd.users, crowd.items, crowd.user, crowd.item, crowd.weight + (crowd.item % 3))
    model = rec.ALS(3, regularization=4.0, alpha=2.0, iterations=200).fit(heavy)
    touched, Y = heavy.matrix.toarray(), model.item_vectors_
    for u in (0, 7, 250):
        c = np.where(touched[u] > 0, 2.0 * touched[u], 1.0)
        x = np.linalg.solve((Y.T * c) @ Y + 4.0 * np.eye(3), Y.T @ (c * (touched[u] > 0)))
        np.testing.assert_allclose(model.user_vectors_[u], x, rtol=0.02, atol=2e-3)


def test_new_items_are_found_by_their_content(crowd, vectors):
    model = rec.Fused(vectors).fit(crowd)
    fresh = np.zeros((2, 6))
    fresh[:, 0] = [1, -1]  # one for each camp
    scores = model.new_scores(np.arange(100), fresh)
    right = (scores[:, 0] > scores[:, 1]) == (np.arange(100) % 2 == 0)
    assert right.mean() > 0.9
    with pytest.raises(ValueError, match="item vectors hold"):
        model.new_scores([0], np.full((1, 6), np.nan))


def test_sasrec_learns_an_order_that_a_bag_cannot(crowd):
    """After item i comes i + 1: only a model that reads the order can know what is next."""
    rows = [(f"u{u}", f"i{(u + d) % 20:02d}", d) for u in range(200) for d in range(6)]
    split = ranking.leave_last_out(ranking.Interactions.of(events_of(*rows)))
    hits = {}
    for name, model in {"sasrec": seq.SASRec(16, epochs=12, length=10), "als": rec.ALS(8)}.items():
        hits[name] = (model.fit(split.train).recommend(split.user, 1)[:, 0] == split.target).mean()
    assert hits["sasrec"] > 0.95 > hits["als"]


def test_sasrec_reads_later_histories_without_learning(crowd):
    split = ranking.leave_last_out(crowd)
    model = seq.SASRec(8, epochs=1).fit(split.train)
    before = model.scores([0])
    after = model.read(crowd).scores([0])
    assert not np.allclose(before, after)
    assert not set(model.recommend([0], 5)[0]) & set(crowd.sequences[0])
    with pytest.raises(ValueError, match="over other items"):
        model.read(ranking.Interactions.of(events_of(*TINY)))


def test_sasrec_sees_no_future(crowd):
    network = seq.SASRec(8, epochs=1).fit(crowd).network_
    import torch

    rows = torch.tensor([[1, 2, 3, 4], [1, 2, 9, 8]])
    with torch.inference_mode():
        h = network(rows)
    np.testing.assert_allclose(h[0, :2], h[1, :2], atol=1e-6)
    assert not np.allclose(h[0, 2:], h[1, 2:], atol=1e-3)


# ---- plan


@pytest.fixture
def shop():
    products = pd.DataFrame(
        {
            "product_id": ["p0", "p1", "p2", "p3"],
            "title": ["a", "b", "c", "d"],
            "category": ["coat"] * 4,
            "price": [100.0, 100.0, 200.0, 50.0],
            "features": ["hood", "recycled fibres", "belt", "hood|belt"],
        }
    )
    creatives = pd.DataFrame({"creative_id": ["c0", "c1"], "appeal": ["price", "sustainability"]})
    n = 1000
    shown = pd.DataFrame({"user_id": ["ann"] * 2 * n + ["ben"] * 2 * n, "creative_id": (["c0"] * n + ["c1"] * n) * 2})
    shown["click"] = np.tile(np.arange(n) % 100, 4) < np.repeat([4, 1, 1, 4], n)  # ann likes price, ben sustainability
    return products, creatives, shown.astype({"click": int})


def test_appeal_response_by_hand(shop):
    _, creatives, shown = shop
    found = planning.appeal_response(shown, creatives, pd.Series({"ann": "A", "ben": "B"}), prior=200)
    row = found.set_index(["segment", "appeal"]).loc[("A", "price")]
    assert (row["shown"], row["clicks"]) == (1000, 40)
    assert row["rate"] == pytest.approx((200 * 0.025 + 40) / 1200)
    assert row["low"] < row["rate"] < row["high"]
    with pytest.raises(ValueError, match="no impression belongs to both a segment and an ad"):
        planning.appeal_response(shown, creatives, pd.Series({"zoe": "A"}))


def test_a_plan_follows_lists_clicks_claims_and_prices(shop, tmp_path):
    products, creatives, shown = shop
    response = planning.appeal_response(shown, creatives, pd.Series({"ann": "A", "ben": "B"}))
    lists = np.array([[2, 3], [2, 0], [1, 0], [1, 3]])
    made = planning.plan(lists, ["A", "A", "B", "B"], products, response, price_taste={"A": -1.0, "B": 1.0}, n=2)
    assert tuple(made) == planning.PLAN_COLUMNS and not made.isna().any(axis=None)
    assert made["product_id"].tolist() == ["p2", "p0", "p1", "p0"]
    assert made["appeal"].tolist() == ["price", "price", "sustainability", "price"]  # p0 does not keep the claim
    assert made["promotion"].tolist() == ["10 % voucher", "none", "none", "none"]
    assert made["reason"][0].startswith("in 100% of the segment's lists (50% of all); price ads are clicked")
    made.to_csv(tmp_path / "plan.csv", index=False)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "plan.csv"), made)


def test_a_plan_without_prices_and_features_and_with_wrong_input(shop):
    products, creatives, shown = shop
    response = planning.appeal_response(shown, creatives, pd.Series({"ann": "A"}))
    made = planning.plan([[0], [1]], ["A", "A"], products[["product_id", "title"]], response, n=1)
    assert made["promotion"].tolist() == ["none"]
    with pytest.raises(ValueError, match="2 lists do not match 1 segments"):
        planning.plan([[0], [1]], ["A"], products, response)
    with pytest.raises(ValueError, match="segment Z has no row in appeals"):
        planning.plan([[0]], ["Z"], products, response)


# ---- courses


def test_simulated_histories_respect_the_prerequisites():
    for s in range(3):
        table, enrolments = planning.courses(200, seed=s)
        needs, row = planning.prerequisites_of(table), {c: i for i, c in enumerate(table["course_id"])}
        for _, own in enrolments.groupby("user_id"):
            done = set()
            for course in own.sort_values("timestamp")["course_id"]:
                assert needs[row[course]] <= done
                done.add(row[course])


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 14), st.integers(0, 9999), st.integers(0, 8))
def test_a_path_never_breaks_an_order(n, seed, length):
    rng = np.random.default_rng(seed)
    needs = [
        set(rng.choice(c, rng.integers(0, min(c, 3) + 1), replace=False).tolist()) if c else set() for c in range(n)
    ]
    done: set[int] = set()
    for c in range(n):
        if needs[c] <= done and rng.random() < 0.3:
            done.add(c)
    path = planning.learning_path(rng.normal(size=n), needs, sorted(done), length)
    assert len(path) == len(set(path)) <= length and not set(path) & done
    assert all(needs[c] <= done | set(path[:i]) for i, c in enumerate(path))
    if length and len(done) < n:
        assert path  # something can always be begun


def test_a_path_by_hand():
    needs = [set(), {0}, {1}, set()]
    assert planning.learning_path([0.0, 0.0, 9.0, 1.0], needs, length=4) == [0, 1, 2, 3]  # the goal is worth its way
    assert planning.learning_path([0.0, 0.0, 9.0, 4.0], needs, length=4) == [3, 0, 1, 2]
    assert planning.learning_path([0.0, 0.0, 9.0, 1.0], needs, done=[0, 1], length=1) == [2]
    assert planning.learning_path([0.0, 0.0, 9.0, 1.0], needs, length=2) == [3, 0]  # the goal does not fit
    with pytest.raises(ValueError, match="one finite score for each of the 4 courses"):
        planning.learning_path([np.nan] * 4, needs)


@pytest.mark.parametrize(
    ("before", "message"),
    [
        (["b", "c", "a"], "wait for each other: .* → .*Nobody could ever begin"),
        (["", "zz", ""], "course b needs zz, which is no course"),
    ],
)
def test_catalogues_that_cannot_be_taken(before, message):
    with pytest.raises(ValueError, match=message):
        planning.prerequisites_of(pd.DataFrame({"course_id": ["a", "b", "c"], "prerequisites": before}))


# ---- the notebook


def test_the_notebooks_scores_equal_the_packages():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    source = "\n".join("".join(c["source"]) for c in cells if "by-hand" in c["metadata"].get("tags", []))
    names = {"np": np}
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    exec(compile(ast.Module(functions, type_ignores=[]), NOTEBOOK.name, "exec"), names)
    rng = np.random.default_rng(0)
    lists, target = ranking.top_k(rng.random((80, 25)), 10), rng.integers(25, size=80)
    theirs = ranking.ranking_metrics(lists, target)[["recall", "precision", "ndcg", "mrr"]]
    np.testing.assert_allclose(names["score_by_hand"](lists, target), theirs)
