"""Click models: the estimator against a planted truth, the measures against their formulas, every error by its words."""

import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.inspection import permutation_importance
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import cross_val_score

from adlib import ctr, encoding, networks


def planted(n=30_000, seed=0, interaction=1.0):
    """Rows whose clicks come from known probabilities: two fields that interact, one that does not matter, a number."""
    rng = np.random.default_rng(seed)
    who, ad = rng.integers(8, size=n), rng.integers(6, size=n)
    number = rng.normal(size=n)
    match = np.where((who % 2) == (ad % 2), interaction, -interaction)
    p = 1 / (1 + np.exp(-(-2.5 + match + 0.5 * number + 0.2 * (ad - 2.5))))
    columns = {"who": [f"u{i}" for i in who], "ad": [f"a{i}" for i in ad], "noise": rng.integers(4, size=n).astype(str)}
    X = pd.DataFrame(columns | {"number": number * 40 + 7})
    return X, (rng.random(n) < p).astype(int), p


@pytest.fixture(scope="module")
def data():
    return planted()


@pytest.fixture(scope="module")
def model(data):
    X, y, _ = data
    return ctr.CTRModel(epochs=2, batch_size=256).fit(X, y)


def gap(model, seed=1):
    X, _, p = planted(20_000, seed)
    loss, base, oracle = (ctr.log_losses(p, q).mean() for q in (model.predict_proba(X)[:, 1], p.mean(), p))
    return ctr.gap_to_oracle(loss, base, oracle)


# -- the estimator --------------------------------------------------------------------------------------------------------


def test_it_finds_the_planted_truth_and_is_calibrated(model):
    X, _, p = planted(20_000, seed=1)
    q = model.predict_proba(X)
    assert q.shape == (len(X), 2) and np.allclose(q.sum(1), 1) and ((q > 0) & (q < 1)).all()
    assert gap(model) < 0.12
    assert 0.95 < q[:, 1].mean() / p.mean() < 1.05
    assert set(model.predict(X)) <= {0, 1}
    assert len(model.saved_curve_) == 20 and model.saved_curve_[-1] > 0.01 > abs(model.saved_curve_[0])


def test_shuffled_labels_teach_nothing(data):
    X, y, _ = data
    assert gap(ctr.CTRModel(epochs=2, batch_size=256).fit(X, np.random.default_rng(0).permutation(y))) > 0.9


def test_interactions_need_more_than_logistic_regression(data, model):
    X, y, _ = data
    linear, fm = (ctr.CTRModel(a, epochs=2, batch_size=256, learning_rate=0.3).fit(X, y) for a in ("lr", "fm"))
    assert gap(linear) > 0.6
    assert gap(fm) < 0.25 and gap(model) < 0.25


def test_lr_agrees_with_scikit_learn(data):
    X, y, _ = data
    ours = ctr.CTRModel("lr", epochs=5, batch_size=256).fit(X, y).predict_proba(X)[:, 1]
    Z = pd.get_dummies(X.assign(number=(X["number"] - 7) / 40), dtype=float)
    theirs = LogisticRegression(C=100).fit(Z, y).predict_proba(Z)[:, 1]
    assert np.abs(ours - theirs).mean() < 0.01


def test_the_factorisation_machine_is_the_sum_over_pairs():
    torch.manual_seed(0)
    network = networks.Network("fm", 3, 2, 4, (8,), 0.0, -1.0).requires_grad_()
    V, w, x = torch.randn(5, 3, 4, requires_grad=True), torch.randn(5, 3), torch.randn(5, 2)
    terms = torch.cat([V, x[:, :, None] * network.rows], 1)
    pairs = sum((terms[:, i] * terms[:, j]).sum(1) for i in range(5) for j in range(i))
    found = network(network.start(V, x), network.own(V, w), x)
    assert torch.allclose(found, -1.0 + w.sum(1) + x @ network.weights + pairs, atol=1e-5)
    wide = networks.Network("deepfm", 3, 2, 4, (8,), 0.0, -1.0)
    wide.load_state_dict(network.state_dict(), strict=False)  # its perceptron starts at zero
    assert torch.allclose(wide(wide.start(V, x), wide.own(V, w), x), found, atol=1e-5)
    wide.out.weight.data.normal_()
    perceptron = wide.out(wide.mlp(torch.cat([V.flatten(1), x], 1))).squeeze(1)
    assert torch.allclose(wide(wide.start(V, x), wide.own(V, w), x), found + perceptron, atol=1e-5)


@pytest.mark.parametrize("architecture", networks.ARCHITECTURES)
def test_one_step_is_a_step_down_the_gradient_that_autograd_finds(architecture):
    X, y, _ = planted(64)
    model = ctr.CTRModel(
        architecture,
        dim=3,
        hidden=(5,),
        l2=0.1,
        initial_accumulator=1e12,
        learning_rate=1e3,
        init_scale=0.5,
        bf16=False,
    )
    model._start(ctr.Encoder().fit(X), float(y.mean()))
    torch.manual_seed(0)
    model.weights_.normal_()
    for p in model.network_.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    slots, x, clicks = model._encode(X, y.astype("float32"))
    table, weights = model.table_.clone().requires_grad_(), model.weights_.clone().requires_grad_()
    used, net = slots.long(), model.network_
    logit = net(net.start(table[used], x), net.own(table[used], weights[used]), x)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logit, clicks, reduction="sum")
    loss = loss + 0.05 * (table[used].square().sum() + weights[used].square().sum())
    slopes = torch.autograd.grad(loss, [table, weights])
    model._step(slots, x, clicks, 1.0)  # accumulators of 1e12 make Adagrad plain descent, at a rate of 1e3 / 1e6
    for before, after, slope in zip((table, weights), (model.table_, model.weights_), slopes, strict=True):
        if before.numel():
            assert torch.allclose(before - after, 1e-3 * slope, atol=2e-6), architecture


def test_a_cross_layer_is_the_formula():
    torch.manual_seed(0)
    network = networks.Network("dcnv2", 2, 1, 3, (4,), 0.0, -1.0)
    torch.nn.init.normal_(network.out.weight)
    V, w, x = torch.randn(5, 2, 3), torch.randn(5, 2), torch.randn(5, 1)
    c0 = torch.cat([V.flatten(1), x], 1)
    c1 = c0 * network.crosses[0](c0) + c0
    top = torch.cat([network.mlp(c0), c0 * network.crosses[1](c1) + c1], 1)
    expected = -1.0 + w.sum(1) + x @ network.weights + network.out(top).squeeze(1)
    assert torch.allclose(network(network.start(V, x), network.own(V, w), x), expected, atol=1e-5)


def test_row_adagrad_is_adagrad_on_summed_gradients():
    for shape in ((6, 3), (6,)):
        table = torch.randn(shape)
        before, slots, gradient = table.clone(), torch.tensor([4, 1, 4, 4]), torch.randn(4, *shape[1:])
        adagrad, sums = networks.RowAdagrad(table, initial=2.0), networks.RowSums(table)
        total, G = torch.zeros(shape).index_add(0, slots, gradient), torch.full((6,), 2.0)
        expected = before.clone()
        for _ in range(2):
            rows = sums.rows(slots)
            adagrad.step(rows, *sums(slots, rows, gradient), rate=0.5)
            G += total.reshape(6, -1).square().mean(1)
            expected -= 0.5 * (total.reshape(6, -1) / G.sqrt()[:, None]).reshape(shape)
        assert torch.allclose(table, expected, atol=1e-6)
        assert torch.equal(table[[0, 2, 3, 5]], before[[0, 2, 3, 5]])


def test_the_same_seed_gives_the_same_model_and_leaves_the_global_generator_alone(data):
    X, y, _ = data
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second, other = (ctr.CTRModel(seed=s).fit(X[:5000], y[:5000]).predict_proba(X[:50]) for s in (3, 3, 4))
    assert np.allclose(first, second, atol=1e-6) and not np.allclose(first, other, atol=1e-6)
    assert torch.equal(before, torch.get_rng_state())


def test_it_works_with_scikit_learn(data, model):
    X, y, _ = data
    X, y = X[:6000], y[:6000]
    small = ctr.CTRModel("fm", dim=4, batch_size=256, seed=7)
    assert clone(small).get_params() == small.get_params() and clone(small).set_params(dim=2).dim == 2
    scores = cross_val_score(small, X, y, cv=3, scoring="neg_log_loss")
    assert np.isfinite(scores).all()
    calibrated = CalibratedClassifierCV(small, cv=2).fit(X, y)
    assert calibrated.predict_proba(X).shape == (len(X), 2)
    drop = permutation_importance(model, X, y, scoring="neg_log_loss", n_repeats=1, random_state=0).importances_mean
    assert drop[0] > 0.01 > abs(drop[2])


def test_bfloat16_predicts_nearly_the_same(data, model):
    X, y, _ = data
    half = ctr.CTRModel(epochs=2, batch_size=256, bf16=True).fit(X, y)
    assert abs(gap(half) - gap(model)) < 0.05


def test_unseen_and_missing_values_have_slots_of_their_own(data, model):
    X, y, _ = data
    row = X[:1]
    strange = model.predict_proba(row.assign(who="somebody new", noise=None, number=np.nan))
    assert np.isfinite(strange).all()
    slots, _ = ctr.Encoder().fit(X).transform(row.assign(who="somebody new", ad=None))
    assert slots[0, 0] == encoding.UNSEEN and slots[0, 1] == 2 + 8 + encoding.MISSING
    learnt = X.assign(who=X["who"].where(y == 0))  # missing exactly where a click follows
    p = ctr.CTRModel(batch_size=256).fit(learnt, y).predict_proba(learnt)[:, 1]
    assert p[y == 1].mean() > 0.9


def test_rare_values_share_the_slot_of_the_unseen(data):
    X, _, _ = data
    X = X.assign(who=X["who"].where(X.index > 3, "once" + X.index.astype(str)))
    encoder = ctr.Encoder(min_count=2).fit(X)
    assert (encoder.transform(X)[0][:4, 0] == encoding.UNSEEN).all()
    assert len(ctr.Encoder().fit(X).values_["who"]) == len(encoder.values_["who"]) + 4


def test_numbers_are_scaled_robustly_and_a_missing_one_is_flagged():
    X = pd.DataFrame({"price": [*range(10, 60, 10), np.nan, 1e9], "same": 5})
    slots, numbers = ctr.Encoder().fit(X).transform(X)
    assert slots.shape == (7, 0) and numbers.dtype == np.float32
    assert numbers[6, 0] == 5.0 and numbers[5, 0] == 0.0  # clipped; the median
    assert (numbers[:, 1] == 0).all() and numbers[:, 2].tolist() == [0, 0, 0, 0, 0, 1, 0]


@pytest.mark.parametrize("dtype", ["category", "bool", "Int64", "string"])
def test_other_column_types(data, dtype):
    _, y, _ = data
    column = pd.Series(y[:2000] == 1).astype(dtype)
    X, model = pd.DataFrame({"c": column}), ctr.CTRModel("lr", batch_size=32, epochs=8, learning_rate=0.3)
    with pytest.warns(UserWarning, match="Column 'c' seems to know the click"):
        p = model.fit(X, y[:2000]).predict_proba(X)
    assert p[y[:2000] == 1, 1].mean() > p[y[:2000] == 0, 1].mean() + 0.3


def test_fewer_rows_than_a_batch_and_only_numbers_and_any_order_of_columns(data, model):
    X, y, _ = data
    assert np.isfinite(ctr.CTRModel().fit(X[:40], y[:40]).predict_proba(X)).all()
    assert np.isfinite(ctr.CTRModel().fit(X[["number"]], y).predict_proba(X[["number"]])).all()
    assert np.allclose(model.predict_proba(X[:9]), model.predict_proba(X[:9][["number", "noise", "ad", "who"]]))


def by_hand():
    """What the cells of lesson 03 with the tag by-hand define."""
    notebook = json.loads(
        (Path(__file__).parents[1] / "notebooks" / "03_ctr_modeling.ipynb").read_text(encoding="utf-8")
    )
    names = {"np": np}
    for cell in notebook["cells"]:
        if "by-hand" in cell["metadata"].get("tags", []):
            exec("".join(cell["source"]), names)
    return names


def test_the_lesson_by_hand_agrees_with_the_package(data):
    lesson, (X, y, _) = by_hand(), data
    Z = pd.get_dummies(X.assign(number=(X["number"] - 7) / 40), drop_first=True, dtype=float).to_numpy()
    Z = (Z - Z.mean(0)) / Z.std(0)
    w, b = lesson["fit_by_hand"](Z, y)
    p = lesson["sigmoid"](Z @ w + b)
    theirs = LogisticRegression(C=1e9, tol=1e-8).fit(Z, y).predict_proba(Z)[:, 1]
    assert np.abs(p - theirs).max() < 1e-4
    assert np.abs(p - ctr.CTRModel("lr", epochs=5, batch_size=256).fit(X, y).predict_proba(X)[:, 1]).mean() < 0.01
    slope, _ = lesson["gradient"](w + 0.3, b, Z, y)
    nudge = [ctr.log_losses(y, lesson["sigmoid"](Z @ (w + 0.3 + e) + b)).mean() for e in 1e-5 * np.eye(len(w))]
    here = ctr.log_losses(y, lesson["sigmoid"](Z @ (w + 0.3) + b)).mean()
    assert np.allclose((np.array(nudge) - here) / 1e-5, slope, atol=1e-4)


# -- bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda X, y: (X, y * 0), "Every row of the target is 0"),
        (lambda X, y: (X, y * 0 + 1), "Every row of the target is 1"),
        (lambda X, y: (X, y * 2), "must be 0 .* or 1 .*; it holds .*2"),
        (lambda X, y: (X, np.where(y == 1, np.nan, 0)), "must be 0 .* or 1 .*; it holds .*nan"),
        (lambda X, y: (X, np.where(y == 1, "yes", "no")), "must be 0 .* or 1 .*; it holds .*no"),
        (lambda X, y: (X, y[:-1]), "100 rows and the target has shape"),
        (lambda X, y: (X[:0], y[:0]), "0 rows"),
        (lambda X, y: (X.assign(number=X["number"].where(X.index != 3, np.inf)), y), "'number' holds an infinite number .*row 3"),
        (lambda X, y: (X.assign(when=pd.Timestamp("2026-03-02")), y), "'when' holds times"),
    ],
)  # fmt: skip
def test_bad_training_data_is_explained(data, change, words):
    X, y, _ = data
    with pytest.raises(ValueError, match=words):
        ctr.CTRModel().fit(*change(X[:100], y[:100]))


def test_an_unknown_architecture_is_explained(data):
    with pytest.raises(ValueError, match="'transformer' is unknown; choose one of lr, fm, dnn, deepfm, dcnv2"):
        ctr.CTRModel("transformer").fit(*data[:2])


def test_other_columns_at_prediction_are_named(model, data):
    X = data[0][:5]
    with pytest.raises(ValueError, match="missing: ad; not known: advert"):
        model.predict_proba(X.rename(columns={"ad": "advert"}))
    with pytest.raises(ValueError, match="missing: none; not known: click"):
        model.predict_proba(X.assign(click=0))
    with pytest.raises(ValueError, match="'number' held numbers when the model was fitted"):
        model.predict_proba(X.assign(number="cheap"))
    with pytest.raises(ValueError, match="not fitted"):
        ctr.CTRModel().predict_proba(X)


def test_a_column_without_any_value_is_named_and_survived(data):
    X, y, _ = data
    with pytest.warns(UserWarning, match="Column 'hollow' holds no value at all"):
        fitted = ctr.CTRModel("lr").fit(X.assign(hollow=None), y)
    assert np.isfinite(fitted.predict_proba(X.assign(hollow="x"))).all()
    with pytest.warns(UserWarning, match="Column 'empty' holds no value at all"):
        fitted = ctr.CTRModel("lr").fit(X.assign(empty=np.nan), y)
    assert np.isfinite(fitted.predict_proba(X.assign(empty=1.0))).all()


# -- measures -------------------------------------------------------------------------------------------------------------


def test_log_losses_are_the_textbook_formula():
    y, p = np.array([0, 1, 1]), np.array([0.2, 0.2, 0.9])
    assert np.allclose(ctr.log_losses(y, p), [-np.log(0.8), -np.log(0.2), -np.log(0.9)])
    assert ctr.log_losses(y, p).mean() == pytest.approx(log_loss(y, p))
    assert np.isfinite(ctr.log_losses([0, 1], [1.0, 0.0])).all()


def test_intervals_cover_and_widen_when_rows_come_in_users():
    rng, covered, widths = np.random.default_rng(0), 0, []
    truth = 2 * (0.05 * np.log(1 / 0.05) + 0.95 * np.log(1 / 0.95)) / 2
    for k in range(60):
        y, users = (rng.random(400) < 0.05).repeat(5), np.arange(400).repeat(5)  # five equal rows a user
        by_user, by_row = (
            ctr.log_loss_interval(y, 0.05, users, repeats=200, seed=k),
            ctr.log_loss_interval(y, 0.05, repeats=200),
        )
        covered += by_user.low <= truth <= by_user.high
        widths.append((by_user.high - by_user.low) / (by_row.high - by_row.low))
    assert covered >= 51 and 1.9 < np.mean(widths) < 2.6  # a design effect of 5: the width should grow by its root


def test_a_paired_difference_is_below_zero_for_the_better_model(model):
    X, y, _ = planted(5000, seed=2)
    q = model.predict_proba(X)[:, 1]
    better = ctr.log_loss_interval(y, q, baseline=y.mean())
    assert better.low <= better.estimate <= better.high < 0
    assert ctr.log_loss_interval(y, q, baseline=q) == (0, 0, 0)


def test_gap_to_oracle():
    assert ctr.gap_to_oracle(0.2, 0.3, 0.1) == pytest.approx(0.5)
    assert ctr.gap_to_oracle(0.1, 0.3, 0.1) == 0 and ctr.gap_to_oracle(0.3, 0.3, 0.1) == 1
    with pytest.raises(ValueError, match="nothing to learn"):
        ctr.gap_to_oracle(0.2, 0.1, 0.1)


def test_reliability_holds_for_the_truth_and_fails_for_doubled_probabilities():
    _, y, p = planted(40_000, seed=3)
    good, bad = ctr.reliability(y, p), ctr.reliability(y, np.minimum(2 * p, 1))
    inside = [((t["low"] <= t["predicted"]) & (t["predicted"] <= t["high"])).mean() for t in (good, bad)]
    assert inside[0] >= 0.8 and inside[1] <= 0.2
    assert good["rows"].sum() == len(y) and good["clicks"].sum() == y.sum() and len(good) == 10
    assert len(ctr.reliability(y, np.full(len(y), 0.1))) == 1


# -- features and split ---------------------------------------------------------------------------------------------------


def shop():
    minute = pd.to_datetime(["2026-03-02 10:00", "2026-03-02 10:01", "2026-03-02 10:02", "2026-03-07 23:00"], utc=True)
    return {
        "impressions": pd.DataFrame(
            {
                "timestamp": minute, "user_id": ["u1", "u1", "u2", "u1"], "creative_id": ["c1", "c1", "c1", "c9"],
                "position": [1, 2, 1, 1], "click": [0, 1, 0, 0], "conversion": [0, 1, 0, 0], "revenue": [0.0, 9.0, 0.0, 0.0],
                "cost": 0.1, "propensity": 0.5,
            },
            index=[7, 3, 9, 4],
        ),
        "users": pd.DataFrame({"user_id": ["u2", "u1"], "age_band": ["25-34", "35-44"]}),
        "creatives": pd.DataFrame({"creative_id": ["c1"], "product_id": ["p1"], "headline": ["Two words"], "body": [None]}),
        "products": pd.DataFrame({"product_id": ["p1", "p2"], "category": ["shoe", "shoe"], "price": [np.e - 1, 5.0]}),
        "events": pd.DataFrame(
            {
                "user_id": ["u1", "u1", "u1", "u2"], "product_id": ["p1", "p2", "p1", "p1"],
                "event": ["view", "view", "purchase", "view"],
                "timestamp": [minute[0] - pd.Timedelta("1D"), minute[0], minute[0], minute[2] + pd.Timedelta("1D")],
            }
        ),
    }  # fmt: skip


def test_features_join_what_is_there_and_keep_order_and_index():
    X = ctr.impression_features(shop())
    assert X.index.tolist() == [7, 3, 9, 4]
    assert X["age_band"].tolist() == ["35-44", "35-44", "25-34", "35-44"]
    assert X["hour"].tolist() == [10, 10, 10, 23] and X["weekday"].tolist() == [0, 0, 0, 5]
    assert X["category"].tolist()[:3] == ["shoe"] * 3 and X["category"].isna().tolist() == [False] * 3 + [True]
    assert X["words"].iloc[0] == 2 and X["log_price"].iloc[0] == pytest.approx(1.0)


def test_counts_look_strictly_backwards():
    X = np.expm1(
        ctr.impression_features(shop())[[c for c in ctr.impression_features(shop()) if c.startswith("past_")]]
    ).round()
    assert X["past_showings"].tolist() == [0, 1, 0, 0]
    assert X["past_views"].tolist() == [1, 2, 0, 2] and X["past_purchases"].tolist() == [0, 1, 0, 1]
    assert X["past_product_views"].tolist() == [1, 1, 0, 0]
    assert X["past_category_views"].tolist() == [1, 2, 0, 0]


def test_nothing_leaks_and_the_future_changes_nothing():
    tables = shop()
    X = ctr.impression_features(tables)
    assert not {"click", "conversion", "revenue", "cost", "propensity", "timestamp"} & set(X)
    first = {
        k: t[t["timestamp"] <= tables["impressions"]["timestamp"].iloc[2]] if "timestamp" in t else t
        for k, t in tables.items()
    }
    pd.testing.assert_frame_equal(ctr.impression_features(first).astype(str), X[:3].astype(str))


def test_two_tables_are_enough():
    tables = {k: v for k, v in shop().items() if k in ("impressions", "events")}
    tables["impressions"] = tables["impressions"][["timestamp", "user_id", "click"]]
    X = ctr.impression_features(tables)
    assert {"user_id", "hour", "past_views"} <= set(X) and "past_showings" not in X
    assert len(ctr.impression_features({"impressions": tables["impressions"]})) == 4


def test_time_split_never_mixes_past_and_future():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {"timestamp": pd.Timestamp("2026-03-02", tz="UTC") + pd.to_timedelta(rng.integers(500, size=3000), "h")}
    )
    parts = ctr.time_split(frame)
    times = [frame["timestamp"].iloc[rows] for rows in parts]
    assert times[0].max() < times[1].min() and times[1].max() < times[2].min()
    assert sorted(np.concatenate(parts)) == list(range(3000))
    assert [round(len(rows) / 3000, 1) for rows in parts] == [0.7, 0.1, 0.2]


@pytest.mark.parametrize(
    ("times", "share", "words"),
    [
        (["2026-03-02"] * 9, (0.7, 0.1, 0.2), "too few moments: nothing is left for"),
        ([], (0.7, 0.1, 0.2), "0 rows span too few moments"),
        (["2026-03-02", None, "2026-03-03"], (0.7, 0.1, 0.2), "lacks the time of 1 rows"),
        (["2026-03-02", "2026-03-03"], (0.7, 0.1, 0.1), "sum to one"),
    ],
)
def test_a_split_that_cannot_be_is_explained(times, share, words):
    with pytest.raises(ValueError, match=words):
        ctr.time_split(pd.DataFrame({"timestamp": pd.to_datetime(pd.Series(times, dtype="object"), utc=True)}), share)


def test_no_warning_on_good_data(data):
    X, y, _ = data
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ctr.CTRModel().fit(X[:2000], y[:2000]).predict_proba(X[:10])
        ctr.impression_features(shop())
