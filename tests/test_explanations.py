"""Explanations: against closed forms, exact enumeration and shap; every control must fail to explain."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from adlib import explanations


def table(n, seed=0):
    """Rows with two numbers, a copy of the first, and a category."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({"a": rng.normal(size=n), "b": rng.normal(size=n), "word": rng.choice(["x", "y", "z"], n)})
    return frame.assign(copy=frame["a"], word=frame["word"].astype("category"))


def interacting(X):
    """A function with an interaction and a category, in logits."""
    word = X["word"].map({"x": 0.0, "y": 1.0, "z": -2.0}).astype(float)
    return (2 * X["a"] * X["b"] + word + 0.5 * X["copy"] * word).to_numpy()


def exact_shapley(predict, x, background):
    """Sum over all subsets of the other columns, weighted by |S|! (d − |S| − 1)! / d!: (d,)."""
    columns = list(x)

    def value(known):
        rows = background.copy()
        for name in known:
            rows[name] = pd.Series([x[name].iloc[0]] * len(rows), index=rows.index).astype(background[name].dtype)
        return predict(rows).mean()

    d, out = len(columns), []
    for name in columns:
        others, total = [c for c in columns if c != name], 0.0
        for size in range(d):
            weight = math.factorial(size) * math.factorial(d - size - 1) / math.factorial(d)
            total += weight * sum(value([*s, name]) - value(s) for s in itertools.combinations(others, size))
        out.append(total)
    return np.array(out)


@pytest.fixture(scope="module")
def model():
    X = table(6000)
    y = np.random.default_rng(1).random(len(X)) < 1 / (1 + np.exp(-(1.5 * X["a"] - 2)))
    numbers = FunctionTransformer(lambda t: t[["a", "copy", "b"]])
    return make_pipeline(numbers, LogisticRegression()).fit(X, y.astype(int))


# -- one person's reasons ----------------------------------------------------------------------------------------------------


def test_sampled_shapley_values_meet_the_exact_ones():
    background, x = table(20, seed=1), table(3, seed=2)
    found = explanations.shapley_values(interacting, x, background, rounds=60)
    for i in range(3):
        assert np.allclose(found.iloc[i], exact_shapley(interacting, x.iloc[[i]], background), atol=0.06)


def test_they_meet_those_of_shap():
    shap = pytest.importorskip("shap")
    background, x = table(15, seed=3)[["a", "b", "copy"]], table(2, seed=4)[["a", "b", "copy"]]

    def predict(rows):
        a, b, c = np.asarray(rows, dtype=float).T
        return a * b + np.sin(c) * a + 0.3 * c

    theirs = shap.KernelExplainer(predict, background.to_numpy()).shap_values(x.to_numpy(), silent=True)
    ours = explanations.shapley_values(predict, x, background, rounds=100)
    assert np.abs(ours.to_numpy() - theirs).max() < 0.05


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), rows=st.integers(1, 3), b=st.integers(1, 9))
def test_they_sum_to_the_prediction_and_skip_what_is_not_read(seed, rows, b):
    x, background = table(rows, seed), table(b, seed + 1)
    found = explanations.shapley_values(interacting, x, background, seed=seed)
    assert np.allclose(found.sum(axis=1), interacting(x) - interacting(background).mean())
    linear = explanations.shapley_values(lambda t: 3 * t["a"].to_numpy(), x, background, seed=seed)
    assert np.allclose(linear["a"], 3 * (x["a"] - background["a"].mean())) and (linear.drop(columns="a") == 0).all(
        axis=None
    )


def test_a_group_of_columns_is_one_reason():
    x, background = table(2, seed=5), table(10, seed=6)
    found = explanations.shapley_values(interacting, x, background, {"all but b": ["a", "copy", "word"]}, rounds=5)
    assert list(found) == ["all but b", "b"] and found.index.equals(x.index)
    assert np.allclose(found.sum(axis=1), interacting(x) - interacting(background).mean())


def by_hand():
    """What the cells of lesson 03 with the tag by-hand define."""
    path = Path(__file__).parents[1] / "notebooks" / "03_ctr_modeling.ipynb"
    names = {"np": np, "pd": pd, "itertools": itertools}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if "by-hand" in cell["metadata"].get("tags", []):
            exec("".join(cell["source"]), names)
    return names


def test_the_lesson_by_hand_agrees_with_the_package():
    background, x = table(12, seed=7), table(1, seed=8)
    theirs = by_hand()["shapley_by_hand"](interacting, x, background)
    assert np.allclose([theirs[c] for c in x], exact_shapley(interacting, x, background))
    ours = explanations.shapley_values(interacting, x, background, rounds=100).iloc[0]
    assert np.abs(ours - pd.Series(theirs)).max() < 0.06


# -- what the model reads in general -----------------------------------------------------------------------------------------


def test_shuffling_hurts_where_the_model_reads_and_copies_hide_each_other(model):
    X = table(4000, seed=9)
    p = model.predict_proba(X)[:, 1]
    alone = explanations.permutation_importance(model, X, p)
    assert abs(alone.loc["word", "importance"]) < 1e-12 and alone.loc["b", "importance"] < 0.002
    together = explanations.permutation_importance(model, X, p, groups={"a and its copy": ["a", "copy"]})
    assert together.index[0] == "a and its copy"
    assert together["importance"].iloc[0] > 1.5 * alone[["importance"]].loc[["a", "copy"]].sum().item()
    assert ((together["low"] <= together["importance"]) & (together["importance"] <= together["high"])).all()


def test_importance_is_the_rise_of_the_log_loss(model):
    X = table(3000, seed=10)
    truth, base = model.predict_proba(X)[:, 1], X.assign(a=0.0, copy=0.0)
    found = explanations.permutation_importance(model, X, truth, {"both": ["a", "copy"]}, repeats=20).loc["both"]
    shuffled = X.copy()
    mixed = np.random.default_rng(0).permutation(len(X))
    shuffled[["a", "copy"]] = X[["a", "copy"]].to_numpy()[mixed]
    q = model.predict_proba(shuffled)[:, 1]
    rise = (
        -(truth * np.log(q) + (1 - truth) * np.log(1 - q)) + truth * np.log(truth) + (1 - truth) * np.log(1 - truth)
    ).mean()
    assert found["importance"] == pytest.approx(rise, rel=0.1)
    assert np.ptp(model.predict_proba(base)[:, 1]) < 0.05, "nothing but these two is read"


def test_rows_limits_the_work_and_widens_the_interval(model):
    X = table(4000, seed=11)
    y = np.random.default_rng(2).random(4000) < model.predict_proba(X)[:, 1]
    widths = [
        (t["high"] - t["low"]).max()
        for t in (explanations.permutation_importance(model, X, y, repeats=8, rows=r) for r in (None, 200))
    ]
    assert widths[1] > 2 * widths[0]
    few = explanations.permutation_importance(model, X, y, repeats=8, rows=200)
    assert abs(few.loc["word", "importance"]) < 1e-12, "what is not read costs nothing, whichever rows are drawn"


# -- the test of reasons -----------------------------------------------------------------------------------------------------


def test_true_reasons_pass_the_deletion_test_and_shuffled_ones_do_not():
    X, background, other = table(60, seed=12), table(25, seed=13), table(20, seed=14)
    reasons = explanations.shapley_values(interacting, X, background, rounds=2)
    found = explanations.deletion_curve(interacting, X, reasons, other, most=4)
    assert (found.loc[1:3, "low"] > 0).all() and found.index.tolist() == [1, 2, 3, 4]
    assert found.loc[4, "extra"] == pytest.approx(0, abs=1e-9), "without any column nothing is left to choose"
    passed = 0
    for seed in range(20):
        mixed = np.random.default_rng(100 + seed).permuted(reasons.to_numpy(), axis=1)
        fake = pd.DataFrame(mixed, index=reasons.index, columns=list(reasons))
        passed += explanations.deletion_curve(interacting, X, fake, other, most=1, seed=seed).loc[1, "low"] > 0
    assert passed <= 2


def test_deletion_by_hand():
    X, background = pd.DataFrame({"a": [3.0], "b": [10.0]}), pd.DataFrame({"a": [0.0, 2.0], "b": [4.0, 4.0]})
    found = explanations.deletion_curve(
        lambda t: (t["a"] + t["b"]).to_numpy(), X, pd.DataFrame({"a": [0.0], "b": [1.0]}), background, most=2, draws=400
    )
    assert found.loc[1, "top"] == 6.0 and found.loc[2, "top"] == 8.0
    assert found.loc[1, "random"] == pytest.approx((6 + 2) / 2, abs=0.3) and found.loc[2, "random"] == 8.0


# -- bad input ---------------------------------------------------------------------------------------------------------------


def test_bad_groups_and_reasons_are_explained(model):
    X = table(5)
    with pytest.raises(ValueError, match="columns that the table does not have: age"):
        explanations.permutation_importance(model, X, [0, 1, 0, 1, 0], {"who": ["age"]})
    with pytest.raises(ValueError, match="repeats=1: an interval over the shuffles needs at least two"):
        explanations.permutation_importance(model, X, [0, 1, 0, 1, 0], repeats=1)
    with pytest.raises(ValueError, match="stand in two groups: a"):
        explanations.shapley_values(interacting, X, X, {"one": ["a", "b"], "two": ["a"]})
    with pytest.raises(ValueError, match="The background is empty"):
        explanations.shapley_values(interacting, X, X[:0])
    with pytest.raises(ValueError, match=r"Reasons of shape \(5, 1\) for 5 rows and 4 columns"):
        explanations.deletion_curve(interacting, X, pd.DataFrame({"a": range(5)}), X)
