"""Randomised tests beyond one look at one metric: CUPED, many A/A runs at once, looking early, Bayes, and the winner's curse.

Taught in notebooks/11_evaluation.ipynb, sections 4 to 9.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats
from scipy.optimize import brentq
from statsmodels.stats.meta_analysis import combine_effects

from adlib.evaluation import (
    Lift,
    _by_user,
    _check_columns,
    _check_range,
    _log_lift,
    _log_ratio_of_sums,
    user_level_lift,
)


@dataclass(frozen=True)
class Posterior:
    """What two click rates look like after the data: chance that treatment is better, expected losses, relative lift."""

    better: float
    loss_treatment: float
    loss_control: float
    low: float
    high: float


@dataclass(frozen=True)
class Shrunk:
    """Estimates pulled towards their common mean: posterior mean and standard error, (k,) each, and the prior's mean and spread."""

    estimate: np.ndarray
    error: np.ndarray
    mean: float
    spread: float


def cuped_lift(
    frame: pd.DataFrame,
    metric: str,
    before: str | Sequence[str],
    arm: str = "arm",
    user: str = "user_id",
    *,
    per: str | None = None,
    control: str = "control",
    alpha: float = 0.05,
) -> Lift:
    r"""Relative lift adjusted for what was known of the users before the test (CUPED).

    With :math:`e_u = (S_u - R N_u) / \bar S` within each arm and x the columns `before`,

    .. math:: \ln(1 + lift) = \ln\frac{R_t}{R_c} - \theta^\top (\bar x_t - \bar x_c), \quad
              \theta = Cov(x, x)^{-1} Cov(x, e), \quad Var = \sum_a Var_a(e - \theta^\top x) / U_a .

    Parameters
    ----------
    frame : DataFrame, one row a *user*
        The columns below; nothing missing.
    metric, arm, user, per, control, alpha
        As in `evaluation.user_level_lift`; without `per` the metric is the mean of a user.
    before : str or list
        Columns of numbers from before the test. What the test could change must not be among them.

    Raises ValueError: As `evaluation.user_level_lift`; more rows than users; a column of `before` that never varies.
    Deng, Xu, Kohavi, Walker (2013), WSDM. Taught in notebooks/11_evaluation.ipynb, section 5.
    """
    before = [before] if isinstance(before, str) else list(before)
    _check_columns(frame, [arm, user], [metric, *before, *([per] if per else [])])
    by_user, treated = _by_user(frame, metric, arm, user, per, control)
    if len(by_user) < len(frame):
        raise ValueError(f"{len(frame)} rows for {len(by_user)} users: CUPED needs one row a user, sum them up first")
    x = frame[before].to_numpy(float)
    if (x.std(axis=0) == 0).any():
        raise ValueError(f"a column of {before} never varies: it tells nothing about anybody")
    inside, residual, logs = np.empty_like(x), np.empty(len(x)), []
    for name, rows in (("control", ~treated), ("treatment", treated)):
        logs.append(_log_ratio_of_sums(by_user[rows], name, metric, per or "users")[0])
        ratio = by_user[rows, 0].sum() / by_user[rows, 1].sum()
        residual[rows] = (by_user[rows, 0] - ratio * by_user[rows, 1]) / by_user[rows, 0].mean()
        inside[rows] = x[rows] - x[rows].mean(axis=0)
    theta = np.linalg.lstsq(inside, residual, rcond=None)[0]
    shift = float((x[treated].mean(axis=0) - x[~treated].mean(axis=0)) @ theta)
    rest = residual - inside @ theta
    variance = sum(float(rest[rows].var(ddof=1)) / rows.sum() for rows in (treated, ~treated))
    return _log_lift(logs[1] - logs[0] - shift, variance, alpha)


def rerandomise(by_user: np.ndarray, runs: int = 10_000, seed: int = 0) -> pd.DataFrame:
    r"""p-values of `runs` A/A tests: the same users dealt anew into two halves, analysed as impressions, as users and with CUPED.

    Everything that the three tests need are sums over an arm of ten products of a user's numbers. So all runs are one product of a
    (runs, U) matrix of zeros and ones with a (U, 10) matrix; no run touches a table.

    Parameters
    ----------
    by_user : (U, 3)
        Of each user the metric's sum S, impressions N, and one number from before the test.
    runs, seed : number of re-randomisations and seed.

    Returns
    -------
    DataFrame (runs, 3), columns impression, user, cuped: two-sided p-values of the log ratio.

    Raises ValueError: not three columns, or so few users with a reward that an arm may stay without. Taught in
        notebooks/11_evaluation.ipynb, section 4.
    """
    by_user = np.asarray(by_user, float)
    if by_user.ndim != 2 or by_user.shape[1] != 3 or (by_user[:, 0] > 0).sum() < 30:
        raise ValueError(
            "by_user needs three columns (sum, impressions, before) and at least 30 users with a sum above 0"
        )
    s, n, x = by_user.T
    products = np.column_stack([np.ones_like(s), s, n, x, s * s, s * n, n * n, s * x, n * x, x * x])
    rng, found = np.random.default_rng(seed), []
    for first in range(0, runs, 256):
        bits = rng.integers(0, 256, (min(256, runs - first), -(-len(s) // 8)), dtype=np.uint8)
        treated = np.unpackbits(bits, axis=1)[:, : len(s)].astype(float) @ products
        found.append(_three_z(products.sum(axis=0) - treated, treated))
    return pd.DataFrame(2 * stats.norm.sf(np.abs(np.vstack(found))), columns=["impression", "user", "cuped"])


def spending_bounds(fractions: Sequence[float], alpha: float = 0.05, kind: str = "obrien-fleming") -> np.ndarray:
    r"""Bounds on |z| for looks at given shares of the planned information, which together spend `alpha`.

    .. math:: \alpha_{OBF}(t) = 4 - 4\Phi(z_{1-\alpha/4} / \sqrt t), \qquad \alpha_{Pocock}(t) = \alpha \ln(1 + (e - 1) t)

    The chance of a first crossing at each look is found by integrating over the paths that have not yet crossed.

    Parameters
    ----------
    fractions : (k,) rising shares in (0, 1]; the last is 1 unless the test goes on.
    alpha : two-sided error rate of the whole test.
    kind : {"obrien-fleming", "pocock"}

    Returns
    -------
    (k,) bounds; the interval at look j is estimate ± bounds[j] · standard error.

    Raises ValueError: information that does not grow, an unknown kind, alpha outside (0, 1).
    Lan and DeMets (1983), Biometrika 70; Armitage, McPherson, Rowe (1969). Taught in notebooks/11_evaluation.ipynb, section 7.
    """
    _check_range("alpha", alpha)
    t = np.asarray(fractions, float)
    if t.ndim != 1 or not len(t) or not (np.diff(t, prepend=0) > 0).all() or t[-1] > 1:
        raise ValueError(f"information must grow from look to look, from above 0 to at most 1, got {list(fractions)}")
    if kind not in ("obrien-fleming", "pocock"):
        raise ValueError(f"kind must be obrien-fleming or pocock, not {kind!r}")
    z = stats.norm.isf(alpha / 4)
    spent = 4 * stats.norm.sf(z / np.sqrt(t)) if kind == "obrien-fleming" else alpha * np.log1p((math.e - 1) * t)
    bounds, place, mass = [], np.zeros(1), np.ones(1)  # of the paths that still run: where, and how likely
    nodes, weights = np.polynomial.legendre.leggauss(400)
    for now, was, share in zip(t, np.r_[0, t[:-1]], np.diff(spent, prepend=0), strict=True):
        step, root = math.sqrt(now - was), math.sqrt(now)
        beyond = lambda c: mass @ (stats.norm.sf((c - place) / step) + stats.norm.cdf((-c - place) / step))  # noqa: B023, E731
        edge = brentq(lambda c: beyond(c) - share, 0, 40 * root)  # noqa: B023
        bounds.append(edge / root)
        arrive = edge * nodes
        mass = edge * weights * (stats.norm.pdf((arrive[:, None] - place) / step) / step @ mass)
        place = arrive
    return np.array(bounds)


def confidence_sequence(
    estimate: np.ndarray, variance: np.ndarray, tau: float, alpha: float = 0.05
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    r"""Intervals that hold at all looks together, however many, and p-values that may be read at any time (mSPRT).

    .. math:: \hat\theta \pm \sqrt{\frac{V (V + \tau^2)}{\tau^2} \Big( 2 \ln\frac1\alpha + \ln\frac{V + \tau^2}{V} \Big)}, \qquad
              p_j = \min_{i \le j} \sqrt{\frac{V_i + \tau^2}{V_i}} \exp\Big(-\frac{\tau^2 \hat\theta_i^2}{2 V_i (V_i + \tau^2)}\Big)

    Parameters
    ----------
    estimate, variance : (..., k)
        Estimated effect (a log ratio, say) and its variance at each look, in order of time.
    tau : float
        Size of the effects that one expects, in the unit of `estimate`; fixed before the data.
    alpha : chance that the truth ever leaves the interval, at most.

    Returns
    -------
    low, high, p_value : (..., k)

    Raises ValueError: a variance that is not above 0 or that grows with time, tau not above 0.
    Robbins (1970); Johari, Koomen, Pekelis, Walsh (2022), Operations Research 70. Taught in notebooks/11_evaluation.ipynb, section 7.
    """
    _check_range("alpha", alpha)
    estimate, variance = np.asarray(estimate, float), np.asarray(variance, float)
    if not 0 < tau < math.inf or not (variance > 0).all():
        raise ValueError("tau and every variance must be above 0")
    if (np.diff(variance.mean(axis=tuple(range(variance.ndim - 1)))) > 0).any():
        raise ValueError("the variance grows from look to look: are the looks in order of time?")
    both = variance + tau**2
    half = np.sqrt(variance * both / tau**2 * (2 * math.log(1 / alpha) + np.log(both / variance)))
    p = np.sqrt(both / variance) * np.exp(-(tau**2) * estimate**2 / (2 * variance * both))
    return estimate - half, estimate + half, np.minimum.accumulate(np.minimum(p, 1), axis=-1)


def look_at(frame: pd.DataFrame, metric: str, looks: int, **options) -> pd.DataFrame:
    """Lifts after 1/looks, 2/looks, … of the rows of a test: columns share, estimate (log ratio), variance, z.

    Parameters
    ----------
    frame, metric, options : as in `evaluation.user_level_lift`, and a column timestamp in order of time.
    looks : number of looks.

    Raises ValueError: timestamps that go backwards, fewer rows than looks. Taught in notebooks/11_evaluation.ipynb, section 7.
    """
    time = pd.Series(frame["timestamp"])
    if not time.is_monotonic_increasing:
        where = int(np.argmax(time.to_numpy()[1:] < time.to_numpy()[:-1])) + 1
        raise ValueError(f"the clock goes backwards at row {where} ({time.iloc[where]}): repair or sort the log first")
    if not 1 <= looks <= len(frame):
        raise ValueError(f"looks must be between 1 and the number of rows, got {looks}")
    rows, z = [], stats.norm.ppf(0.975)
    for share in np.arange(1, looks + 1) / looks:
        lift = user_level_lift(frame.iloc[: round(share * len(frame))], metric, **options)
        error = (math.log1p(lift.high) - math.log1p(lift.low)) / (2 * z)
        rows.append((share, math.log1p(lift.estimate), error**2, math.log1p(lift.estimate) / error))
    return pd.DataFrame(rows, columns=["share", "estimate", "variance", "z"])


def beta_binomial(
    clicks_c: int, n_c: int, clicks_t: int, n_t: int, prior: tuple[float, float] = (1, 1), alpha: float = 0.05
) -> Posterior:
    r"""Posterior of two click rates with a beta prior, for independent impressions.

    .. math:: p_a \sim Beta(a + x_a, b + n_a - x_a), \qquad loss_t = E[\max(p_c - p_t, 0)]

    Parameters
    ----------
    clicks_c, n_c, clicks_t, n_t : clicks and impressions of control and treatment; zero clicks are no problem here.
    prior : (a, b), clicks and non-clicks that one believes to have seen before.
    alpha : 1 - credible level of the relative lift.

    Returns
    -------
    Posterior; losses in clicks per impression, low and high of the relative lift.

    Raises ValueError: zero impressions, impossible clicks, a prior not above 0.
    Stucchio (2015), Bayesian A/B testing at VWO. Taught in notebooks/11_evaluation.ipynb, section 8.
    """
    _check_range("alpha", alpha)
    if not min(prior) > 0:
        raise ValueError(f"both numbers of the prior must be above 0, got {prior}")
    for name, clicks, n in (("control", clicks_c, n_c), ("treatment", clicks_t, n_t)):
        if not (0 <= clicks <= n and n > 0):
            raise ValueError(f"{name}: {clicks} clicks in {n} impressions is impossible, or nothing was shown")
    c, t = ((prior[0] + x, prior[1] + n - x) for x, n in ((clicks_c, n_c), (clicks_t, n_t)))
    middle = (
        np.arange(4000) + 0.5
    ) / 4000  # midpoints in probability: an integral over the density is a mean over these

    def expected_loss(of, other):
        """Mean of (other − of) where it is positive: what choosing `of` loses."""
        p = stats.beta.ppf(middle, *of)
        more = stats.beta.sf(p, other[0] + 1, other[1]) * other[0] / sum(other)
        return float((more - p * stats.beta.sf(p, *other)).mean())

    rates = stats.beta.ppf(middle, *c)
    below = lambda ratio: float(stats.beta.cdf(ratio * rates, *t).mean())  # noqa: E731 -- P(p_t / p_c < ratio)
    low, high = (
        math.expm1(brentq(lambda x, q: below(math.exp(x)) - q, -40, 40, args=(q,))) for q in (alpha / 2, 1 - alpha / 2)
    )
    return Posterior(1 - below(1.0), expected_loss(t, c), expected_loss(c, t), low, high)


def shrink(estimates: Sequence[float], errors: Sequence[float]) -> Shrunk:
    r"""Pull several estimates towards their mean, the more the less they know (empirical Bayes).

    .. math:: \tilde\theta_i = \mu + B_i (\hat\theta_i - \mu), \quad B_i = \frac{\tau^2}{\tau^2 + s_i^2}, \quad
              \tilde s_i^2 = B_i s_i^2 + (1 - B_i)^2 Var(\mu)

    Parameters
    ----------
    estimates, errors : (k,) effects and their standard errors, k at least 3. All that were tried, not only the good ones.

    Returns
    -------
    Shrunk; τ comes from the spread of the estimates beyond their errors (Paule and Mandel).

    Raises ValueError: fewer than three estimates, lengths that differ, an error not above 0.
    Efron and Morris (1975), JASA 70. Taught in notebooks/11_evaluation.ipynb, section 9.
    """
    value, error = np.asarray(estimates, float), np.asarray(errors, float)
    if value.ndim != 1 or value.shape != error.shape or len(value) < 3:
        raise ValueError("shrinking needs at least three estimates, each with its standard error")
    if not (np.isfinite(value).all() and np.isfinite(error).all() and (error > 0).all()):
        raise ValueError("estimates must be numbers and standard errors numbers above 0")
    with np.errstate(divide="ignore", invalid="ignore"):  # estimates that are all equal
        tau2 = max(float(combine_effects(value, error**2, method_re="iterated").tau2), 0.0)
    weight = 1 / (tau2 + error**2)
    mean, pull = float(weight @ value / weight.sum()), tau2 * weight
    spread = np.sqrt(pull * error**2 + (1 - pull) ** 2 / weight.sum())
    return Shrunk(mean + pull * (value - mean), spread, mean, math.sqrt(tau2))


def _three_z(control: np.ndarray, treated: np.ndarray) -> np.ndarray:
    """(runs, 3) z-values by impression, by user and with CUPED, from the ten sums of each arm (runs, 10)."""
    log, by_row, spread, with_x, of_x, mean_x = ([] for _ in range(6))
    for u, s, n, x, ss, sn, nn, sx, nx, xx in (control.T, treated.T):
        ratio, mean = s / n, s / u
        log.append(np.log(ratio))
        by_row.append(1 / s - 1 / n)
        spread.append((ss - 2 * ratio * sn + ratio**2 * nn) / (u - 1) / mean**2 / u)
        with_x.append((sx - ratio * nx) / (u - 1) / mean / u)
        of_x.append((xx - x**2 / u) / (u - 1) / u)
        mean_x.append(x / u)
    lift, size = log[1] - log[0], [arm[:, 0] * (arm[:, 0] - 1) for arm in (control, treated)]
    theta = sum(a * b for a, b in zip(with_x, size, strict=True)) / sum(a * b for a, b in zip(of_x, size, strict=True))
    rest = sum(spread) - 2 * theta * sum(with_x) + theta**2 * sum(of_x)
    adjusted = (lift - theta * (mean_x[1] - mean_x[0])) / np.sqrt(rest)
    return np.column_stack([lift / np.sqrt(sum(by_row)), lift / np.sqrt(sum(spread)), adjusted])
