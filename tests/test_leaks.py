"""Columns that know the click are named with a reason, honest ones are not, and a large table is looked through in no time."""

import time

import numpy as np
import pandas as pd
import pytest

from adlib import ctr


@pytest.fixture(scope="module")
def log():
    rng = np.random.default_rng(0)
    n = 40_000
    y = (rng.random(n) < 0.02).astype(int)
    columns = {"who": rng.integers(3000, size=n).astype(str), "ad": rng.integers(50, size=n).astype(str)}
    X = pd.DataFrame(columns | {"number": rng.normal(size=n), "flag": rng.random(n) < 0.5})
    X["holes"] = X["number"].where(rng.random(n) < 0.8)
    return X.astype({"who": "category"}), y


def test_an_honest_table_is_silent(log):
    assert ctr.leaking_columns(*log) == {}


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        (lambda y: np.where(y == 1, "bought", "left"), "'bought' is always clicked"),
        (lambda y: y * 3.5, r"'\(0, 3.5\]' is always clicked"),
        (lambda y: pd.Series(y).map({1: "paid"}), "'paid' is always clicked"),
        (lambda y: y + np.linspace(0, 0.9, len(y)), "is never clicked|separates clicks"),
        (lambda y: pd.Series(np.where(y == 1, "yes", "no")).astype("category"), "'yes' is always clicked"),
    ],
)
def test_a_column_that_knows_the_click_is_named(log, column, reason):
    X, y = log
    found = ctr.leaking_columns(X.assign(spy=column(y)), y)
    assert list(found) == ["spy"]
    assert pd.Series(found["spy"]).str.contains(reason).all(), found


def test_it_takes_the_words_of_a_warning_to_the_reader(log):
    X, y = log
    with pytest.warns(UserWarning, match="Column 'spy' seems to know the click .*was it known before"):
        ctr.CTRModel("lr").fit(X.assign(spy=y.astype(str)), y)


def test_it_is_quick(log):
    X, y = log
    best = []
    for _ in range(3):
        start = time.perf_counter()
        ctr.leaking_columns(X, y)
        best.append(time.perf_counter() - start)
    start = time.perf_counter()
    ctr.Encoder().fit(X).transform(X)
    assert min(best) < 20 * (time.perf_counter() - start)
