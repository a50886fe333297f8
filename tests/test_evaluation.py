"""Evaluation: against textbook values and statsmodels, over many simulated tests, and every error by its message."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from statsmodels.stats.proportion import confint_proportions_2indep

from adlib.evaluation import (
    VERDICTS,
    Lift,
    power,
    sample_ratio_alarms,
    sample_ratio_test,
    sample_size,
    two_proportion,
    user_level_lift,
    verdict,
)

SEEDS = range(5)


def simulated_test(rng, n_users=600, lift=0.0, base_rate=0.06, spread=0.5):
    """One row an impression; users differ in click rate (gamma, shape `spread`) and in how often they come."""
    arm = np.arange(n_users) % 2
    rate = base_rate * rng.gamma(spread, 1 / spread, n_users) * (1 + lift * arm)
    visits = rng.geometric(0.1, n_users)
    user = np.repeat(np.arange(n_users), visits)
    click = (rng.random(len(user)) < np.minimum(rate[user], 1)).astype(int)
    return pd.DataFrame({"user_id": user, "arm": np.array(["control", "treatment"])[arm[user]], "click": click})


def impression_lift(frame):
    treated, click = (frame.arm == "treatment").to_numpy(), frame.click.to_numpy()
    return two_proportion(click[~treated].sum(), (~treated).sum(), click[treated].sum(), treated.sum())


# -- lift against the textbook ---------------------------------------------------------------------------------------------


def test_two_proportion_is_the_textbook_formula():
    lift = two_proportion(100, 10_000, 130, 10_000)
    half = 1.959963984540054 * math.sqrt(1 / 130 + 1 / 100 - 2 / 10_000)
    assert lift.estimate == pytest.approx(0.3, abs=1e-12)
    assert lift.low == pytest.approx(1.3 * math.exp(-half) - 1, abs=1e-12)
    assert lift.high == pytest.approx(1.3 * math.exp(half) - 1, abs=1e-12)


def test_two_proportion_agrees_with_statsmodels():
    lift = two_proportion(41, 9_000, 73, 11_000, alpha=0.1)
    low, high = confint_proportions_2indep(73, 11_000, 41, 9_000, compare="ratio", method="log", alpha=0.1)
    assert (lift.low, lift.high) == pytest.approx((low - 1, high - 1), abs=1e-12)


def test_user_level_equals_two_proportion_when_every_user_sees_one_ad():
    rng = np.random.default_rng(3)
    frame = pd.DataFrame({"user_id": np.arange(4000), "click": (rng.random(4000) < 0.1).astype(int)})
    frame["arm"] = np.where(frame.user_id % 2, "treatment", "control")
    by_user, by_impression = user_level_lift(frame, "click"), impression_lift(frame)
    assert by_user.estimate == pytest.approx(by_impression.estimate, abs=1e-12)
    assert (by_user.low, by_user.high) == pytest.approx((by_impression.low, by_impression.high), rel=5e-3)


def test_user_level_is_the_delta_method_by_hand():
    frame = pd.DataFrame(
        {
            "user_id": list("aabcddd") + list("eefgg"),
            "arm": ["control"] * 7 + ["treatment"] * 5,
            "revenue": [3.0, 0, 1, 2, 0, 4, 0, 5, 1, 2, 0, 6],
        }
    )
    variance, ratios = 0.0, []
    for sums, sizes in (([3, 1, 2, 4], [2, 1, 1, 3]), ([6, 2, 6], [2, 1, 2])):
        s, n = np.array(sums, float), np.array(sizes, float)
        ratios.append(s.sum() / n.sum())
        residual = s - ratios[-1] * n  # the delta method is the variance of these residuals
        variance += residual.var(ddof=1) / len(s) / s.mean() ** 2
    lift = user_level_lift(frame, "revenue")
    assert lift.estimate == pytest.approx(ratios[1] / ratios[0] - 1, abs=1e-12)
    width = math.log1p(lift.high) - math.log1p(lift.low)
    assert width == pytest.approx(2 * 1.959963984540054 * math.sqrt(variance), abs=1e-12)


def test_per_divides_by_another_column():
    frame = simulated_test(np.random.default_rng(0), base_rate=0.2)
    frame["conversion"] = frame.click * (np.arange(len(frame)) % 3 == 0)
    rates = frame.groupby("arm")[["conversion", "click"]].sum()
    rates = rates.conversion / rates.click
    lift = user_level_lift(frame, "conversion", per="click")
    assert lift.estimate == pytest.approx(rates["treatment"] / rates["control"] - 1, abs=1e-12)


def test_names_of_columns_and_control_are_free():
    frame = simulated_test(np.random.default_rng(0)).rename(columns={"arm": "group", "user_id": "customer"})
    frame["group"] = frame.group.map({"control": "old", "treatment": "new"}).astype("category")
    lift = user_level_lift(frame, "click", arm="group", user="customer", control="old")
    mirror = user_level_lift(frame, "click", arm="group", user="customer", control="new")
    assert lift.estimate == pytest.approx(1 / (1 + mirror.estimate) - 1)
    assert lift.p_value == pytest.approx(mirror.p_value)


@given(
    x=st.integers(1, 400),
    y=st.integers(1, 400),
    n=st.integers(401, 9000),
    m=st.integers(401, 9000),
    a=st.floats(0.001, 0.5),
)
def test_interval_holds_the_estimate_and_agrees_with_p(x, n, y, m, a):
    lift = two_proportion(x, n, y, m, alpha=a)
    assert -1 < lift.low <= lift.estimate <= lift.high
    assume(abs(lift.p_value - a) > 1e-9)
    assert (lift.low > 0 or lift.high < 0) == (lift.p_value < a)


def test_lift_prints_as_per_cent():
    assert str(two_proportion(100, 10_000, 130, 10_000)) == "+30.0% [+0.3%, +68.5%]"


# -- over many simulated tests ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many_tests():
    """A/A and +20 % tests, 200 each by seed: rows (user-level p, impression p, user-level interval holds the truth)."""
    results = {0.0: [], 0.2: []}
    for lift, rows in results.items():
        for seed in SEEDS:
            rng = np.random.default_rng([seed, int(lift * 10)])
            for _ in range(200):
                frame = simulated_test(rng, lift=lift)
                by_user = user_level_lift(frame, "click")
                rows.append((by_user.p_value, impression_lift(frame).p_value, by_user.low <= lift <= by_user.high))
    return {lift: np.array(rows, float) for lift, rows in results.items()}


def test_user_level_keeps_its_error_rate_and_impressions_do_not(many_tests):
    user, impression = (many_tests[0.0][:, :2] < 0.05).mean(axis=0)
    assert 0.035 <= user <= 0.065
    assert impression > 0.10


@pytest.mark.parametrize("lift", [0.0, 0.2])
def test_user_level_interval_covers(many_tests, lift):
    assert many_tests[lift][:, 2].mean() >= 0.94


def test_two_proportion_covers_at_the_markets_click_rate():
    rng = np.random.default_rng(5)
    clicks = rng.binomial(20_000, [0.015, 0.018], (4000, 2))
    lifts = [two_proportion(c, 20_000, t, 20_000) for c, t in clicks]
    assert np.mean([lift.low <= 0.2 <= lift.high for lift in lifts]) >= 0.94


# -- sample ratio ----------------------------------------------------------------------------------------------------------


def test_sample_ratio_is_the_chi_square_by_hand():
    result = sample_ratio_test({"control": 5100, "treatment": 4900})
    assert result.p_value == pytest.approx(math.erfc(math.sqrt(4.0 / 2)), abs=1e-12)  # chi-square 4 with one degree
    assert not result.alarm
    assert result.observed == pytest.approx({"control": 0.51, "treatment": 0.49})


def test_sample_ratio_alarms_on_a_mismatch_and_knows_unequal_plans():
    assert sample_ratio_test({"control": 5300, "treatment": 4700}).alarm
    assert sample_ratio_test([9000, 1000]).alarm
    assert not sample_ratio_test([9000, 1000], [9, 1]).alarm
    assert not sample_ratio_test({"a": 9000, "b": 1000}, {"b": 0.1, "a": 0.9}).alarm
    assert sample_ratio_test(pd.Series(["a", "b", "a", "b"]).value_counts()).p_value == 1


def test_many_sample_ratios_at_once_are_the_single_ones():
    tests = ["b", "b", "a", "a", "a", "alone"]
    counts = [5300, 4700, 3000, 3100, 2950, 70]
    alarms = sample_ratio_alarms(tests, counts)
    assert alarms.to_dict() == {"a": sample_ratio_test([3000, 3100, 2950]).alarm, "b": True}
    for bad in ([0, 0], [-1, 5], [np.nan, 3]):
        with pytest.raises(ValueError, match="0 or more"):
            sample_ratio_alarms(["a", "a"], bad)


def test_sample_ratio_false_alarms_are_rare():
    counts = np.random.default_rng(0).binomial(4000, 0.5, 2000)
    assert np.mean([sample_ratio_test([c, 4000 - c]).alarm for c in counts]) <= 0.003


# -- power -----------------------------------------------------------------------------------------------------------------


def test_power_inverts_sample_size():
    n = sample_size(0.015, 0.2)
    assert power(0.015, 0.2, n) == pytest.approx(0.8, abs=1e-3)
    assert power(0.015, 0.2, n - 100) < 0.8
    assert power(0.015, -0.2, n, design_effect=2.0) < power(0.015, -0.2, n)
    assert sample_size(0.015, 0.2, design_effect=2.0) == pytest.approx(2 * n, abs=1)
    assert sample_size(0.015, 0.1) > 3.5 * n


def test_sample_size_is_the_formula_by_hand():
    h = 2 * math.asin(math.sqrt(0.018)) - 2 * math.asin(math.sqrt(0.015))
    by_hand = 2 * ((1.959963984540054 + 0.8416212335729143) / h) ** 2
    assert sample_size(0.015, 0.2) == pytest.approx(by_hand, rel=1e-4)


def test_promised_power_is_reached():
    n = sample_size(0.015, 0.2)
    clicks = np.random.default_rng(1).binomial(n, [0.015, 0.018], (4000, 2))
    found = np.mean([two_proportion(c, n, t, n).p_value < 0.05 for c, t in clicks])
    assert found == pytest.approx(0.8, abs=0.025)


# -- verdict ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.25, 0.40, "confirmed"),
        (0.20, 0.40, "confirmed"),  # low == claim
        (0.20, 0.20, "confirmed"),
        (0.10, 0.30, "directionally supported"),
        (0.10, 0.20, "directionally supported"),  # high == claim
        (1e-9, 0.20, "directionally supported"),
        (0.05, 0.19, "refuted"),  # an effect, but not of the claimed size
        (0.00, 0.19, "refuted"),
        (-0.10, 0.10, "refuted"),
        (-0.30, -0.10, "refuted"),
        (0.00, 0.20, "underpowered"),  # low == 0 and high == claim
        (0.00, 0.50, "underpowered"),
        (-0.10, 0.20, "underpowered"),
        (-0.10, 0.50, "underpowered"),
        (-math.inf, math.inf, "underpowered"),
    ],
)
def test_verdict_in_every_region_and_on_every_boundary(low, high, expected):
    assert verdict(0.20, low, high) == expected


@given(claim=st.floats(1e-6, 10), a=st.floats(-1, 10), b=st.floats(-1, 10))
def test_verdict_rules_share_no_point_and_leave_none_out(claim, a, b):
    low, high = sorted((a, b))
    rules = {
        "confirmed": low >= claim,
        "refuted": high < claim,
        "directionally supported": 0 < low < claim <= high,
        "underpowered": low <= 0 and claim <= high,
    }
    assert [name for name, holds in rules.items() if holds] == [verdict(claim, low, high)]
    assert set(rules) == set(VERDICTS)


# -- the notebook's own versions -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hand_written():
    """The functions that lesson 12 writes out before it imports them, by name."""
    path = Path(__file__).parents[1] / "notebooks" / "12_case_studies.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names = {"math": math, "z": 1.959963984540054}
    for name in ("log_rate", "judge"):
        exec(next(source for source in code if source.startswith(f"def {name}(")), names)
    return names


def test_the_notebooks_delta_method_is_the_packages(hand_written):
    frame = simulated_test(np.random.default_rng(8), lift=0.3)
    by_user = frame.groupby(["arm", "user_id"]).click.agg(["sum", "size"])
    (log_c, var_c), (log_t, var_t) = (hand_written["log_rate"](by_user.loc[arm]) for arm in ("control", "treatment"))
    lift = user_level_lift(frame, "click")
    half = 1.959963984540054 * math.sqrt(var_c + var_t)
    assert lift.low == pytest.approx(math.expm1(log_t - log_c - half), abs=1e-12)
    assert lift.high == pytest.approx(math.expm1(log_t - log_c + half), abs=1e-12)


@given(claim=st.floats(0.01, 2), a=st.floats(-1, 3), b=st.floats(-1, 3))
def test_the_notebooks_verdict_is_the_packages(hand_written, claim, a, b):
    low, high = sorted((a, b))
    assert hand_written["judge"](claim, Lift(0.0, low, high, 1.0)) == verdict(claim, low, high)


# -- every error by its message --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((0, 100, 5, 100), "zero clicks in the control arm"),
        ((5, 100, 0, 100), "zero clicks in the treatment arm"),
        ((0, 0, 5, 100), "zero impressions in the control arm"),
        ((5, 100, 0, 0), "zero impressions in the treatment arm"),
        ((5, 4, 5, 100), "control: 5 clicks in 4 impressions is impossible"),
        ((5, 100, -1, 100), "treatment: -1 clicks in 100 impressions is impossible"),
        ((math.nan, 100, 5, 100), "control: nan clicks in 100 impressions is impossible"),
        ((100, 100, 100, 100), "without variation there is no interval"),
    ],
)
def test_two_proportion_errors(counts, message):
    with pytest.raises(ValueError, match=message):
        two_proportion(*counts)


def small(**columns):
    """Two users and four impressions an arm, with columns replaced."""
    return pd.DataFrame(
        {"user_id": list("aabbccdd"), "arm": ["control"] * 4 + ["treatment"] * 4, "click": [1, 0, 0, 0, 1, 0, 1, 0]}
        | columns
    )


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (small(click=[0, 0, 0, 0, 1, 0, 1, 0]), "zero clicks in the control arm"),
        (small(click=[1, 0, 1, 0, 0, 0, 0, 0]), "zero clicks in the treatment arm"),
        (small(user_id=list("aabbaadd")), r"1 users are in both arms \(first: a\)"),
        (small(click=list("yesnonon")), "metric 'click' is not numeric"),
        (small(click=[1, 0, 0, 0, 1, 0, math.inf, 0]), "metric 'click' has infinite values"),
        (small(click=[1, 0, 0, 0, 1, 0, None, 0]), "column 'click' has 1 missing values"),
        (small(arm=["control"] * 4 + ["treatment"] * 3 + [None]), "column 'arm' has 1 missing values"),
        (small(arm=["control"] * 8), "one arm only"),
        (small(arm=["treatment"] * 8), "one arm only"),
        (small(arm=["control"] * 4 + ["b"] * 2 + ["c"] * 2), "arms must be 'control' and one other"),
        (small(arm=["a"] * 4 + ["b"] * 4), "arms must be 'control' and one other"),
        (small(user_id=list("aabbcccc")), "the treatment arm has one user"),
        (small(click=[1] * 8), "without variation there is no interval"),
        (small(click=[1, 0, 0, 0, -1, 0, -1, 0]), "a sum of 'click' that is not above zero in the treatment arm"),
        (small().drop(columns="click"), "column 'click' is missing"),
        (small().iloc[:0], "one arm only"),
    ],
)
def test_user_level_errors(frame, message):
    with pytest.raises(ValueError, match=message):
        user_level_lift(frame, "click")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([100],), "one arm only"),
        (({"a": 1, "b": 2}, {"a": 1, "c": 2}), "arms differ"),
        (([100, 100], [1, 1, 1]), "arms differ"),
        (([100, -1],), "counts must be 0 or more"),
        (([0, 0],), "not all 0"),
        (([100, math.nan],), "counts must be 0 or more"),
        (([100, 100], [1, 0]), "expected shares must be above 0"),
    ],
)
def test_sample_ratio_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_ratio_test(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_rate": 0}, "base_rate must lie between 0 and 1"),
        ({"lift": 0}, "lift must not be 0"),
        ({"lift": -1}, "must lie between 0 and 1"),
        ({"base_rate": 0.9}, "must lie between 0 and 1, got lift=0.2"),
        ({"power": 1.0}, "power must lie between alpha"),
        ({"power": 0.01}, "power must lie between alpha"),
        ({"alpha": 0}, "alpha must lie between 0 and 1"),
        ({"design_effect": 0}, "design_effect must be above 0"),
    ],
)
def test_sample_size_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_size(**({"base_rate": 0.015, "lift": 0.2} | arguments))


def test_power_and_alpha_errors():
    with pytest.raises(ValueError, match="n must be at least 1"):
        power(0.015, 0.2, 0)
    with pytest.raises(ValueError, match="alpha must lie between 0 and 1"):
        two_proportion(5, 100, 5, 100, alpha=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0.1, 0.2), "claim must be a number above 0"),
        ((-0.2, 0.1, 0.2), "turn the signs"),
        ((math.nan, 0.1, 0.2), "claim must be a number above 0"),
        ((0.2, 0.3, 0.1), "low <= high"),
        ((0.2, math.nan, 0.1), "low and high must be numbers"),
    ],
)
def test_verdict_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        verdict(*arguments)
