"""Did it work? Sample-ratio check, lift with an interval, power, and a verdict on a claim. Lessons 11 and 12."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.power import NormalIndPower
from statsmodels.stats.proportion import proportion_effectsize

VERDICTS = {
    "confirmed": "the whole interval lies at or above the claim",
    "directionally supported": "the interval is above zero and holds the claim, but smaller effects too",
    "refuted": "the whole interval lies below the claim (an effect may exist, but not one of the claimed size)",
    "underpowered": "the interval holds both no effect and the claim: too little traffic to tell them apart",
}


@dataclass(frozen=True)
class Lift:
    """A relative lift (0.2 means +20 %) with its interval and two-sided p-value."""

    estimate: float
    low: float
    high: float
    p_value: float

    def __str__(self) -> str:
        return f"{self.estimate:+.1%} [{self.low:+.1%}, {self.high:+.1%}]"


@dataclass(frozen=True)
class SampleRatio:
    """Shares of the arms as observed and as planned, the p-value of the difference, and whether to stop."""

    observed: dict[str, float]
    expected: dict[str, float]
    p_value: float
    alarm: bool


def two_proportion(clicks_c: int, n_c: int, clicks_t: int, n_t: int, alpha: float = 0.05) -> Lift:
    r"""Relative lift of a click rate, treatment over control, for *independent* impressions.

    .. math:: \ln(1 + lift) = \ln\frac{x_t / n_t}{x_c / n_c} \pm z_{1-\alpha/2}
              \sqrt{\frac{1}{x_t} - \frac{1}{n_t} + \frac{1}{x_c} - \frac{1}{n_c}}

    Interval and p-value share one statistic: the interval excludes 0 exactly when p < alpha. Users who see several ads
    make impressions dependent and this interval too narrow: see `user_level_lift`.

    Parameters
    ----------
    clicks_c, n_c, clicks_t, n_t : int
        Clicks and impressions of control and treatment.
    alpha : float
        1 - confidence level.

    Raises
    ------
    ValueError
        Zero impressions or clicks in an arm, more clicks than impressions, a rate of 1 in both arms.

    References
    ----------
    Katz et al. (1978), Biometrics 34. Taught in notebooks/12_case_studies.ipynb, section 4.
    """
    variance = 0.0
    for name, clicks, n in (("control", clicks_c, n_c), ("treatment", clicks_t, n_t)):
        if n == 0:
            raise ValueError(f"zero impressions in the {name} arm: nothing was shown, so nothing can be compared")
        if not 0 <= clicks <= n < math.inf:
            raise ValueError(f"{name}: {clicks} clicks in {n} impressions is impossible (0 <= clicks <= impressions)")
        if clicks == 0:
            raise ValueError(f"zero clicks in the {name} arm: a relative lift needs some in both; collect more traffic")
        variance += 1 / clicks - 1 / n
    return _log_lift(math.log(clicks_t / n_t) - math.log(clicks_c / n_c), variance, alpha)


def user_level_lift(
    frame: pd.DataFrame,
    metric: str,
    arm: str = "arm",
    user: str = "user_id",
    *,
    per: str | None = None,
    control: str = "control",
    alpha: float = 0.05,
) -> Lift:
    r"""Relative lift of a ratio of sums when *users* were randomised, by the delta method.

    With S the sum of `metric` and N the impressions of each of an arm's U users, and R = ΣS / ΣN,

    .. math:: Var(\ln R) = \frac{Var(S) - 2 R\,Cov(S, N) + R^2 Var(N)}{U \bar{S}^2}, \quad
              \ln(1 + lift) = \ln\frac{R_t}{R_c} \pm z_{1-\alpha/2} \sqrt{Var(\ln R_t) + Var(\ln R_c)}

    Parameters
    ----------
    frame : DataFrame, one row an impression
        The columns below; nothing missing.
    metric, arm, user : str
        Column of numbers (any unit), column of two arms, column of users.
    per : str, optional
        N is the sum of this column instead of the rows: ``metric="conversion", per="click"`` is conversions per click.
    control : str
        The control's value in `arm`.
    alpha : float
        1 - confidence level.

    Raises
    ------
    ValueError
        A missing column or value, a metric that is not numeric, one arm only or more than two, a user in both arms,
        fewer than two users in an arm, a sum in an arm that is not above zero.

    References
    ----------
    Deng, Knoblich, Lu (2018), arXiv 1803.06336. Taught in notebooks/12_case_studies.ipynb, section 4.
    """
    _check_columns(frame, [arm, user], [metric, per] if per else [metric])
    by_user, treated = _by_user(frame, metric, arm, user, per, control)
    logs, variance = [], 0.0
    for name, rows in (("control", by_user[~treated]), ("treatment", by_user[treated])):
        log, more = _log_ratio_of_sums(rows, name, metric, per or "impressions")
        logs.append(log)
        variance += more
    return _log_lift(logs[1] - logs[0], variance, alpha)


def sample_ratio_test(
    counts: Mapping[str, int] | Sequence[int],
    expected: Mapping[str, float] | Sequence[float] | None = None,
    alpha: float = 0.001,
) -> SampleRatio:
    r"""Chi-square test that the arms hold the planned shares; read it before anything else and stop on an alarm.

    .. math:: \chi^2 = \sum_a (n_a - N\,share_a)^2 / (N\,share_a)

    Parameters
    ----------
    counts : mapping arm -> count, or sequence
        Units *that were randomised*: users when users were, not their impressions.
    expected : mapping or sequence over the same arms, optional
        Planned shares or ratios; equal when left out.
    alpha : float
        Alarm below this p-value: small, since the check runs on every test and a real fault is far below it.

    Raises
    ------
    ValueError
        One arm only, arms that differ between the two arguments, impossible counts or shares.

    References
    ----------
    Fabijan et al. (2019), Diagnosing sample ratio mismatch, KDD. Taught in notebooks/12_case_studies.ipynb, section 3.
    """
    counts = dict(counts) if isinstance(counts, Mapping | pd.Series) else dict(enumerate(counts))
    expected = dict.fromkeys(counts, 1.0) if expected is None else expected
    expected = dict(expected) if isinstance(expected, Mapping | pd.Series) else dict(enumerate(expected))
    if len(counts) < 2:
        raise ValueError("one arm only: a sample ratio needs at least two arms")
    if set(counts) != set(expected):
        raise ValueError(f"arms differ: counted {list(counts)}, expected {list(expected)}")
    observed = np.array(list(counts.values()), dtype=float)
    shares = np.array([expected[name] for name in counts], dtype=float)
    if not (np.isfinite(observed).all() and (observed >= 0).all() and observed.sum() > 0):
        raise ValueError(f"counts must be 0 or more and not all 0, got {counts}")
    if not (np.isfinite(shares).all() and (shares > 0).all()):
        raise ValueError(f"expected shares must be above 0, got {expected}")
    total, shares = observed.sum(), shares / shares.sum()
    p_value = float(stats.chisquare(observed, shares * total).pvalue)
    by_arm = [dict(zip(counts, row.tolist(), strict=True)) for row in (observed / total, shares)]
    return SampleRatio(*by_arm, p_value=p_value, alarm=p_value < alpha)


def sample_ratio_alarms(tests, counts, alpha: float = 0.001) -> pd.Series:
    """Sample-ratio alarm of many tests with equal shares at once: bool by test, tests of one arm left out.

    Parameters
    ----------
    tests, counts : (n,) the test of each arm and the units it got. alpha : alarm below this p-value.

    Raises
    ------
    ValueError : counts that are not finite, negative, or all 0 in a test. Taught in notebooks/11_evaluation.ipynb, section 15.
    """
    arms = pd.DataFrame({"test": np.asarray(tests), "n": np.asarray(counts, dtype=float)})
    by_test = arms.groupby("test")["n"]
    mean, size = by_test.transform("mean"), by_test.size()
    if not (np.isfinite(arms["n"]).all() and (arms["n"] >= 0).all() and (mean > 0).all()):
        raise ValueError("counts must be 0 or more, and not all 0 in a test")
    chi = ((arms["n"] - mean) ** 2 / mean).groupby(arms["test"]).sum()[size > 1]
    return pd.Series(stats.chi2.sf(chi, size[size > 1] - 1) < alpha, chi.index)


def sample_size(
    base_rate: float, lift: float, power: float = 0.8, alpha: float = 0.05, design_effect: float = 1.0
) -> int:
    r"""Impressions needed *in each arm* to tell `lift` from no effect (two-sided, equal arms).

    .. math:: n = 2\,deff\,(z_{1-\alpha/2} + z_{power})^2 / h^2, \quad h = 2\arcsin\sqrt{p(1+lift)} - 2\arcsin\sqrt{p}

    Parameters
    ----------
    base_rate, lift : float
        The control's rate p and the relative lift to detect (0.2 is +20 %).
    power, alpha : float
        Probability to find the lift when it is there, and to find one when there is none.
    design_effect : float
        Variance of the user-level estimate over that of independent impressions.

    Raises
    ------
    ValueError
        An argument outside its range.

    References
    ----------
    Cohen (1988), chapter 6 (statsmodels solves it); Kish (1965). Taught in notebooks/12_case_studies.ipynb, section 7.
    """
    effect = _effect_size(base_rate, lift, alpha, design_effect)
    if not alpha < power < 1:
        raise ValueError(f"power must lie between alpha ({alpha}) and 1, got {power}")
    n = NormalIndPower().solve_power(effect_size=effect, alpha=alpha, power=power)
    return math.ceil(float(n) * design_effect)


def power(base_rate: float, lift: float, n: float, alpha: float = 0.05, design_effect: float = 1.0) -> float:
    """Probability that `n` impressions in each arm find `lift`; the inverse of `sample_size`, with its arguments.

    Raises
    ------
    ValueError
        An argument outside its range. Taught in notebooks/12_case_studies.ipynb, section 7.
    """
    effect = _effect_size(base_rate, lift, alpha, design_effect)
    if not 1 <= n < math.inf:
        raise ValueError(f"n must be at least 1 impression an arm, got {n}")
    return float(NormalIndPower().power(effect, n / design_effect, alpha))


def verdict(claim: float, low: float, high: float) -> str:
    """What an interval [low, high] says about "the effect is at least `claim`": one of the keys of `VERDICTS`.

    ======================== ======================================= ========================================
    verdict                  rule                                    on the boundary
    ======================== ======================================= ========================================
    confirmed                low >= claim                            low == claim confirms
    refuted                  high < claim, whatever low is           high == claim does not refute
    directionally supported  0 < low < claim <= high                 low == 0 is not above zero: underpowered
    underpowered             low <= 0 and claim <= high
    ======================== ======================================= ========================================

    The rules share no point and leave none out. A positive interval below the claim is *refuted*, since the claim names a
    size. And a claim that is exactly true is confirmed in alpha / 2 of tests only, whatever the traffic.

    Parameters
    ----------
    claim : float
        Relative effect above 0, larger is better.
    low, high : float
        Interval on the same scale; may be infinite.

    Raises
    ------
    ValueError
        A claim not above 0, a bound that is not a number, low > high. Taught in notebooks/12_case_studies.ipynb, section 6.
    """
    if not 0 < claim < math.inf:
        raise ValueError(f"claim must be a number above 0, got {claim}: turn the signs so that larger is better")
    if not low <= high:
        raise ValueError(f"low and high must be numbers with low <= high, got low={low}, high={high}")
    if low >= claim:
        return "confirmed"
    if high < claim:
        return "refuted"
    return "directionally supported" if low > 0 else "underpowered"


def _log_lift(log_ratio: float, variance: float, alpha: float) -> Lift:
    """From the log ratio and its variance to a lift."""
    _check_range("alpha", alpha)
    if variance <= 0:
        raise ValueError("the metric is the same for every unit in both arms: without variation there is no interval")
    error = math.sqrt(variance)
    half = float(stats.norm.ppf(1 - alpha / 2)) * error
    bounds = (math.expm1(log_ratio + shift) for shift in (0.0, -half, half))
    return Lift(*bounds, p_value=float(2 * stats.norm.sf(abs(log_ratio) / error)))


def _log_ratio_of_sums(by_user: np.ndarray, name: str, metric: str, per: str) -> tuple[float, float]:
    """ln(ΣS / ΣN) of one arm and its delta-method variance; by_user: (U, 2), the columns S and N."""
    n_users = len(by_user)
    if n_users < 2:
        raise ValueError(f"the {name} arm has one user: the spread between users needs at least two")
    mean_sum, mean_size = by_user.mean(axis=0)
    for column, mean in ((per, mean_size), (metric, mean_sum)):
        if mean <= 0:
            what = "zero clicks" if column == "click" and mean == 0 else f"a sum of {column!r} that is not above zero"
            raise ValueError(f"{what} in the {name} arm: a relative lift needs some in both; collect more traffic")
    ratio = mean_sum / mean_size
    (var_sum, covariance), (_, var_size) = np.cov(by_user, rowvar=False)
    variance = (var_sum - 2 * ratio * covariance + ratio**2 * var_size) / (n_users * mean_sum**2)
    return math.log(ratio), float(variance)


def _by_user(
    frame: pd.DataFrame, metric: str, arm: str, user: str, per: str | None, control: str
) -> tuple[np.ndarray, np.ndarray]:
    """Each user's sums S and N, (U, 2), and whether the user is treated, (U,); raises if the arms are not as they must be."""
    arms = list(frame[arm].unique())
    if len(arms) < 2:
        raise ValueError(f"one arm only {arms}: a comparison needs a control and a treatment")
    if len(arms) > 2 or control not in arms:
        raise ValueError(f"arms must be {control!r} and one other, got {arms}")
    who, users = pd.factorize(frame[user])
    rows = np.bincount(who)
    treated = np.bincount(who, (frame[arm] != control).to_numpy())
    twice = users[(treated > 0) & (treated < rows)]
    if len(twice):
        raise ValueError(f"{len(twice)} users are in both arms (first: {twice[0]}): assignment or logging is broken")
    sums = np.bincount(who, frame[metric].to_numpy(dtype=float))
    sizes = np.bincount(who, frame[per].to_numpy(dtype=float)) if per else rows
    return np.column_stack([sums, sizes]), treated > 0


def _check_columns(frame: pd.DataFrame, labels: list[str], metrics: list[str]) -> None:
    """Raise on a column that is missing or holds what cannot be compared."""
    for column in labels + metrics:
        if column not in frame:
            raise ValueError(f"column {column!r} is missing: the frame has {list(frame.columns)}")
        if frame[column].isna().any():
            raise ValueError(f"column {column!r} has {frame[column].isna().sum()} missing values: clean them first")
    for column in metrics:
        if not pd.api.types.is_numeric_dtype(frame[column]):
            raise ValueError(f"metric {column!r} is not numeric but {frame[column].dtype}: turn it into numbers first")
        if not np.isfinite(frame[column].to_numpy(dtype=float)).all():
            raise ValueError(f"metric {column!r} has infinite values: clean them first")


def _effect_size(base_rate: float, lift: float, alpha: float, design_effect: float) -> float:
    """Cohen's h of a relative lift."""
    _check_range("alpha", alpha)
    _check_range("base_rate", base_rate)
    if lift == 0 or not 0 < base_rate * (1 + lift) < 1:
        raise ValueError(f"lift must not be 0 and base_rate * (1 + lift) must lie between 0 and 1, got lift={lift}")
    if not 0 < design_effect < math.inf:
        raise ValueError(f"design_effect must be above 0, got {design_effect}")
    return float(proportion_effectsize(base_rate * (1 + lift), base_rate))


def _check_range(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie between 0 and 1, got {value}")
