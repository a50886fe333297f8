"""Measures of click probabilities against scikit-learn, closed forms, tiny cases by hand and their own control."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, log_loss, precision_score, recall_score

from adlib import click_metrics as cm


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    p = rng.beta(1, 30, 60_000)
    return (rng.random(len(p)) < p).astype(int), p


def test_the_interval_of_a_mean_is_the_normal_one_for_independent_rows():
    values = np.random.default_rng(0).normal(3, 2, 4000)
    found = cm.mean_interval(values, repeats=2000)
    assert found.estimate == pytest.approx(values.mean())
    assert np.allclose(
        [found.low, found.high], values.mean() + np.array([-1.96, 1.96]) * values.std() / 4000**0.5, atol=0.01
    )
    twice = cm.mean_interval(values.repeat(4), np.arange(4000).repeat(4), repeats=2000)
    assert np.allclose(twice, found, atol=1e-12), "four equal rows of a person are no more news than one"


def test_log_loss_interval_is_the_mean_interval_of_losses(rows):
    y, p = rows
    assert cm.log_loss_interval(y, p, repeats=50).estimate == pytest.approx(log_loss(y, p))
    assert cm.log_loss_interval(y, p, repeats=50) == cm.mean_interval(cm.log_losses(y, p), repeats=50)


@pytest.mark.parametrize("values", [[], [1.0, np.nan], [np.inf]])
def test_a_mean_of_nothing_is_explained(values):
    with pytest.raises(ValueError, match="a mean needs finite numbers"):
        cm.mean_interval(values)


# -- calibration -----------------------------------------------------------------------------------------------------------


def test_ece_by_hand():
    y, p = [0, 1, 0, 0, 1, 1, 0, 1], [0.1, 0.2, 0.1, 0.2, 0.6, 0.8, 0.6, 0.8]
    # two halves: means 0.15 against 1/4, and 0.7 against 3/4
    assert cm.expected_calibration_error(y, p, bins=2) == pytest.approx((0.10 + 0.05) / 2)
    assert cm.expected_calibration_error([0, 0, 1, 1], [0.5] * 4) == 0, "equal predictions share one bin"


def test_ece_of_the_truth_is_noise_and_of_doubled_probabilities_the_excess(rows):
    y, p = rows
    honest, doubled = cm.expected_calibration_error(y, p), cm.expected_calibration_error(y, np.minimum(2 * p, 1))
    assert 0 < honest < 0.003
    assert doubled == pytest.approx(p.mean(), rel=0.1)
    assert cm.expected_calibration_error(p, p) == pytest.approx(0, abs=1e-12)


def test_ece_agrees_with_the_reliability_table(rows):
    y, p = rows
    table = cm.reliability(y, p)
    by_table = np.average((table["predicted"] - table["observed"]).abs(), weights=table["rows"])
    assert cm.expected_calibration_error(y, p) == pytest.approx(by_table)


# -- thresholds --------------------------------------------------------------------------------------------------------------


def test_the_threshold_table_is_scikit_learns(rows):
    y, p = rows
    table = cm.threshold_table(y, p, [0.0, 0.02, 0.1, 0.3])
    for t, row in table.iterrows():
        said = p >= t
        assert row["said_yes"] == pytest.approx(said.mean())
        assert row["accuracy"] == pytest.approx(accuracy_score(y, said)) == pytest.approx(1 - row["error_rate"])
        assert row["precision"] == pytest.approx(precision_score(y, said))
        assert row["recall"] == pytest.approx(recall_score(y, said))
        assert row["f1"] == pytest.approx(f1_score(y, said))


def test_whoever_never_says_yes_is_accurate_and_useless(rows):
    y, p = rows
    never = cm.threshold_table(y, p, [1.1]).iloc[0]
    assert never["accuracy"] == pytest.approx(1 - y.mean()) and never["recall"] == 0 and never["f1"] == 0
    assert np.isnan(never["precision"])
    with pytest.raises(ValueError, match="None of the 3 rows was clicked"):
        cm.threshold_table([0, 0, 0], [0.1, 0.2, 0.3], [0.5])


# -- slates ------------------------------------------------------------------------------------------------------------------


def test_a_slate_by_hand():
    p = np.array([[0.1, 0.3, 0.2], [0.3, 0.1, 0.2]])
    assert cm.rank_slate(p, 2).tolist() == [[1, 2], [0, 2]]
    assert cm.rank_slate(p, 1, value=[9, 1, 1]).tolist() == [[0], [0]]
    assert cm.slate_value(np.array([[1, 2], [0, 2]]), p).tolist() == pytest.approx([0.5, 0.5])
    assert cm.slate_value(np.array([[0], [0]]), p, [9, 1, 1]).tolist() == pytest.approx([0.9, 2.7])


@given(seed=st.integers(0, 10_000), k=st.integers(1, 6))
def test_no_slate_beats_the_one_ranked_by_the_truth(seed, k):
    rng = np.random.default_rng(seed)
    truth, other, value = rng.random((4, 6)), rng.random((4, 6)), rng.random(6) * 50
    best = cm.slate_value(cm.rank_slate(truth, k, value), truth, value)
    assert (best >= cm.slate_value(cm.rank_slate(other, k, value), truth, value) - 1e-12).all()
    assert (np.diff(np.sort(cm.rank_slate(other, k), axis=1), axis=1) > 0).all(), "no ad twice"


@pytest.mark.parametrize("k", [0, 4])
def test_an_impossible_slate_is_explained(k):
    with pytest.raises(ValueError, match=f"A slate of {k} from candidates of shape \\(2, 3\\)"):
        cm.rank_slate(np.zeros((2, 3)), k)


def test_impossible_probabilities_and_rows_without_a_user_are_named():
    for p in ([0.2, np.nan], [0.2, 1.7], [-0.1, 0.5]):
        for measure in (cm.log_losses, cm.reliability):
            with pytest.raises(ValueError, match="between 0 and 1; one of them is"):
                measure([0, 1], p)
    with pytest.raises(ValueError, match="Row 1 has no user"):
        cm.mean_interval([1.0, 2.0], users=["a", None])
