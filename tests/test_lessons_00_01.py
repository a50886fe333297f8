"""What lessons 00 and 01 write out by hand, held against the package and the libraries that later lessons use."""

import ast
import json

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import MinMaxScaler, OneHotEncoder, StandardScaler
from statsmodels.stats.proportion import proportion_confint

from adlib import tables

NOTEBOOK = ROOT / "notebooks" / "01_data_prep.ipynb"
NUMBERS = st.lists(st.floats(-1e4, 1e4, allow_subnormal=False).map(lambda x: round(x, 3)), min_size=6, max_size=40)


@pytest.fixture(scope="module")
def lesson():
    """Return the functions of the cells with the tag by-hand."""
    import hashlib
    import hmac

    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    source = "\n".join("".join(c["source"]) for c in cells if "by-hand" in c["metadata"].get("tags", []))
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    names = {"np": np, "pd": pd, "hmac": hmac, "hashlib": hashlib}
    exec(compile(ast.Module(functions, type_ignores=[]), NOTEBOOK.name, "exec"), names)
    return names


@pytest.fixture(scope="module")
def log():
    """Return a log of forty people, two robots, and amounts of which some are absurd."""
    rng = np.random.default_rng(0)
    start = pd.Timestamp("2026-03-02", tz="UTC")
    people = pd.DataFrame({"user_id": rng.integers(0, 40, 3000).astype(str), "second": rng.uniform(0, 2e6, 3000)})
    robots = pd.DataFrame({"user_id": np.repeat(["r1", "r2"], 200), "second": np.cumsum(rng.uniform(1, 3, 400))})
    slow = pd.DataFrame({"user_id": "slow", "second": np.cumsum(rng.uniform(7, 9, 200))})
    few = pd.DataFrame({"user_id": "few", "second": np.arange(19.0)})
    frame = pd.concat([people, robots, slow, few], ignore_index=True)
    frame["timestamp"] = start + pd.to_timedelta(frame.pop("second"), unit="s").dt.as_unit("us")
    frame["event"], frame["amount"] = "purchase", np.exp(rng.normal(5, 0.7, len(frame)))
    frame.loc[rng.choice(len(frame), 30, replace=False), "amount"] *= 1e5
    return frame.sample(frac=1, random_state=0, ignore_index=True)


def set_aside(log, rule):
    return tables.clean({"events": log}, rules=[rule]).set_aside["events"]


def test_the_limit_for_outliers_is_that_of_the_cleaning(lesson, log):
    beyond = log.index[log.amount > lesson["outlier_limit"](log.amount)]
    assert len(beyond) == 30 and beyond.equals(set_aside(log, "outlier").index)


def test_one_usual_price_leaves_room_for_others(lesson):
    assert lesson["outlier_limit"](pd.Series([100.0] * 50 + [150.0])) > 150


def test_the_robots_are_those_of_the_cleaning(lesson, log):
    accounts = lesson["robots_by_hand"](log)
    robots = set(accounts.index[accounts.robot])
    assert robots == {"r1", "r2"} == set(set_aside(log, "bot").user_id)


def test_a_pseudonym_is_stable_keyed_and_keeps_gaps(lesson):
    ids = pd.Series(["a", "b", None, "a"], dtype="str")
    one, again, other = (lesson["pseudonym"](ids, key) for key in (b"key", b"key", b"other"))
    assert one.equals(again) and one[0] == one[3] != one[1] and one.isna().tolist() == [False, False, True, False]
    assert not set(one.dropna()) & set(other.dropna())


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_interval_is_statsmodels(lesson, pair):
    assert lesson["wilson"](*pair) == pytest.approx(proportion_confint(*pair, method="wilson"), abs=1e-6)


def test_no_tries_say_nothing(lesson):
    assert lesson["wilson"](0, 0) == (0.0, 1.0)


@given(NUMBERS.filter(lambda x: np.std(x[:4]) > 1e-3))
def test_scales_are_scikit_learns_and_learnt_from_known_rows_only(lesson, values):
    x, known = np.array(values), np.arange(len(values)) < 4
    for name, scaler in (("normalise", MinMaxScaler()), ("standardise", StandardScaler())):
        theirs = scaler.fit(x[known, None]).transform(x[:, None])[:, 0]
        np.testing.assert_allclose(lesson[name](x, known), theirs, rtol=1e-6, atol=1e-9)


@given(st.lists(st.sampled_from("abcde"), min_size=1))
def test_one_hot_is_scikit_learns_also_for_unseen_words(lesson, words):
    encoder = OneHotEncoder(categories=[["a", "b", "c"]], handle_unknown="ignore").fit([["a"], ["b"], ["c"]])
    theirs = encoder.transform(np.array(words)[:, None]).toarray()
    np.testing.assert_array_equal(lesson["one_hot"](words, ["a", "b", "c"]), theirs)


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 9)), min_size=6).filter(
        lambda x: 2 <= sum(y for y, _ in x) <= len(x) - 2
    )
)
def test_the_auc_is_scikit_learns_with_ties(lesson, rows):
    y, p = np.array([r[0] for r in rows], int), np.array([r[1] for r in rows], float)
    value, low, high = lesson["auc"](y, p)
    assert value == pytest.approx(roc_auc_score(y, p)) and low <= value <= high


def test_the_interval_of_the_auc_covers(lesson):
    rng, truth, hits = np.random.default_rng(0), 0.7602, 0  # Φ(1/√2): scores N(1, 1) against N(0, 1)
    for _ in range(400):
        y = np.repeat([0, 1], [300, 40])
        _, low, high = lesson["auc"](y, rng.normal(y, 1.0))
        hits += low <= truth <= high
    assert 0.91 <= hits / 400 <= 0.98


def test_the_rate_so_far_never_looks_ahead(lesson):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"user_id": rng.integers(0, 9, 200).astype(str), "click": rng.integers(0, 2, 200)})
    changed = frame.assign(click=frame.click.where(frame.index < 120, 1 - frame.click))
    before, after = (lesson["rate_so_far"](f, 0.1) for f in (frame, changed))
    assert np.array_equal(before[:121], after[:121]) and not np.array_equal(before[121:], after[121:])
    leaky, after = (lesson["rate_overall"](f, 0.1) for f in (frame, changed))
    assert not np.array_equal(leaky[:120], after[:120])
