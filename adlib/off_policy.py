"""What would another policy have earned? Estimates from a log with propensities, intervals that cover, and when to abstain.

Taught in notebooks/11_evaluation.ipynb, sections 10 to 12.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

ESTIMATORS = ("ips", "snips", "dm", "dr", "switch", "shrinkage")
WITH_MODEL = ("dm", "dr", "switch", "shrinkage")


@dataclass(frozen=True)
class Log:
    """A log of n decisions, as a policy's evaluation needs it; everything is checked and turned into arrays (n,) of float.

    Parameters
    ----------
    reward : (n,) what followed: 1 for a click, or yuan.
    propensity : (n,) probability, in (0, 1], with which the logging policy chose what it chose.
    target : (n,) probability, in [0, 1], with which the policy to be judged would have chosen the same.
    q_logged, q_target : (n,), optional
        A reward model's prediction q for what was chosen, and the mean of its predictions under the policy to be judged,
        Σ_a π(a|x) q(x, a). The model must not have seen these rows.

    Raises ValueError: no rows, lengths that differ, something that is not a number or missing, a probability outside its range.
    """

    reward: np.ndarray
    propensity: np.ndarray
    target: np.ndarray
    q_logged: np.ndarray | None = None
    q_target: np.ndarray | None = None

    def __post_init__(self) -> None:
        if (self.q_logged is None) != (self.q_target is None):
            raise ValueError("q_logged and q_target come from one reward model: give both or neither")
        for name in ("reward", "propensity", "target", "q_logged", "q_target"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _numbers(name, getattr(self, name)))
        sizes = {k: len(v) for k, v in vars(self).items() if v is not None}
        if len(set(sizes.values())) > 1 or not len(self.reward):
            raise ValueError(f"a log needs at least one row and columns of one length, got {sizes}")
        for name, low in (("propensity", np.nextafter(0, 1)), ("target", 0)):
            values = getattr(self, name)
            wrong = np.flatnonzero((values < low) | (values > 1))
            if len(wrong):
                what = (
                    "above 0 and at most 1: an action that the log could not choose says nothing" if low else "0 to 1"
                )
                raise ValueError(
                    f"{name}: {len(wrong)} values are not {what} (first: row {wrong[0]} = {values[wrong[0]]:g})"
                )

    @property
    def weight(self) -> np.ndarray:
        """(n,) importance weights w = target / propensity; their mean is 1 where the propensities are right."""
        return self.target / self.propensity


@dataclass(frozen=True)
class PolicyValue:
    """Estimated mean reward of a policy with its interval; all three are NaN where `abstained` says why."""

    estimate: float
    low: float
    high: float
    effective_size: float
    mean_weight: float
    abstained: str = ""

    def __str__(self) -> str:
        return (
            f"abstains: {self.abstained}"
            if self.abstained
            else f"{self.estimate:.3%} [{self.low:.3%}, {self.high:.3%}]"
        )


def effective_sample_size(weight: np.ndarray) -> float:
    r"""How many equally weighted rows these weights are worth, :math:`(\sum w)^2 / \sum w^2`; 0 if all are 0.

    Kish (1965), Survey Sampling. Taught in notebooks/11_evaluation.ipynb, section 11.
    """
    weight = np.asarray(weight, float)
    if not weight.any():
        return 0.0
    weight = weight / weight.max()  # the square of a tiny weight would vanish
    return float(weight.sum() ** 2 / (weight @ weight))


def estimate_policy_value(log: Log, estimator: str = "dr", parameter: float | None = None) -> float:
    r"""Mean reward that a policy would have earned on the visitors of a log.

    ============= ====================================================================================
    ips           :math:`\frac1n \sum w r`
    snips         :math:`\sum w r / \sum w`
    dm            :math:`\frac1n \sum \hat q_\pi` (direct method; q_target)
    dr            :math:`\frac1n \sum [\hat q_\pi + w (r - \hat q)]`
    switch        like dr with w replaced by 0 where w > τ
    shrinkage     like dr with w replaced by λ w / (w² + λ)
    ============= ====================================================================================

    Parameters
    ----------
    log : Log
    estimator : one of `ESTIMATORS`.
    parameter : float, optional
        τ of switch (0 gives dm, infinity dr) or λ of shrinkage (likewise); `choose_parameter` picks it when left out.

    Raises ValueError: an unknown estimator, a missing reward model, a negative parameter, weights that are all 0 (snips).
    Horvitz and Thompson (1952); Swaminathan and Joachims (2015); Dudík et al. (2014), Statistical Science 29; Wang, Agarwal,
    Dudík (2017), ICML; Su et al. (2020), ICML. Taught in notebooks/11_evaluation.ipynb, section 10.
    """
    parameter = _check(log, estimator, parameter)
    if estimator == "snips":
        if not log.target.any():
            raise ValueError("the policy would have chosen nothing that the log holds: all weights are 0")
        return float(log.weight @ log.reward / log.weight.sum())
    return float(_terms(log, estimator, parameter).mean())


def choose_parameter(log: Log, estimator: str) -> float:
    r"""The τ or λ with the smallest estimated error: bias² + variance over a grid.

    .. math:: \Big[\frac1n \sum (\hat w - w)(r - \hat q)\Big]^2 + \frac{1}{n} Var[\hat q_\pi + \hat w (r - \hat q)]

    Su et al. (2020), ICML, section 5. Raises ValueError for an estimator without parameter. Taught in notebooks/11_evaluation.ipynb,
    section 10.
    """
    if estimator not in ("switch", "shrinkage"):
        raise ValueError(f"{estimator!r} has no parameter: only switch and shrinkage have")
    w = log.weight
    top = max(float(w.max()), 1.0)
    grid = np.append(np.geomspace(1, top, 8) if estimator == "switch" else np.geomspace(1, 100 * top**2, 12), np.inf)
    errors = []
    for value in grid:
        bias = float(((_shrunk(w, estimator, value) - w) * (log.reward - log.q_logged)).mean())
        errors.append(bias**2 + _terms(log, estimator, value).var() / len(w))
    return float(grid[int(np.argmin(errors))])


def estimate_interval(
    log: Log,
    estimator: str = "dr",
    parameter: float | None = None,
    *,
    method: str = "gamma",
    alpha: float = 0.05,
    minimum_size: float = 100,
    draws: int = 2000,
    seed: int = 0,
) -> PolicyValue:
    r"""The estimate of `estimate_policy_value` with an interval that covers where rewards are rare and weights uneven.

    *gamma* (Fay and Feuer): Σ w r is a weighted sum of rare events with estimate y and variance v, and :math:`w_+` the weight of
    one more event. For ips

    .. math:: low = \frac{v}{2 y n} \chi^2_{\alpha/2}(2 y^2 / v), \quad
              high = \frac{v + w_+^2}{2 (y + w_+) n} \chi^2_{1-\alpha/2}\Big(\frac{2 (y + w_+)^2}{v + w_+^2}\Big), \quad
              v = \sum w^2 r^2, \quad w_+ = E_\pi[w] = \sum w^2 / \sum w .

    For the others v is the variance of the whole sum, and the model's part is a shift. *bootstrap*: percentiles of multinomial
    resamples, too short for small logs. The interval of switch and shrinkage knows nothing of their bias.

    Parameters
    ----------
    log, estimator, parameter : see `estimate_policy_value`.
    method : {"gamma", "bootstrap"}
    alpha : 1 - confidence level.
    minimum_size : abstain below this effective sample size, in rows.
    draws, seed : of the bootstrap.

    Returns
    -------
    PolicyValue; abstains below `minimum_size` and where no weighted row has a reward (zero clicks).

    Raises ValueError: As `estimate_policy_value`; negative rewards or dm with gamma (dm's error is its model's, which the log's spread does not show).
    Fay and Feuer (1997), Statistics in Medicine 16; Tiwari, Clegg, Zou (2006) for smaller :math:`w_+`. Taught in
    notebooks/11_evaluation.ipynb, section 11.
    """
    if not 0 < alpha < 1 or method not in ("gamma", "bootstrap"):
        raise ValueError(f"alpha must lie between 0 and 1 and method be gamma or bootstrap, got {alpha} and {method!r}")
    parameter = _check(log, estimator, parameter)
    size, mean_weight = effective_sample_size(log.weight), float(log.weight.mean())
    reason = ""
    if size < minimum_size:
        reason = f"the effective sample size is {size:.0f}, below {minimum_size:g}"
    elif not (log.weight * log.reward).any():
        reason = "zero clicks (rewards) on what the policy would choose"
    if reason:
        return PolicyValue(math.nan, math.nan, math.nan, size, mean_weight, reason)
    value = estimate_policy_value(log, estimator, parameter)
    if method == "gamma":
        low, high = _gamma(log, estimator, parameter, value, alpha)
    else:
        tails = [alpha / 2, 1 - alpha / 2]
        low, high = np.quantile(_resampled(log, estimator, parameter, draws, seed), tails).tolist()
    return PolicyValue(value, min(low, value), max(high, value), size, mean_weight)


def bootstrap_means(values: np.ndarray, draws: int = 10_000, seed: int = 0) -> np.ndarray:
    r"""Means of multinomial resamples of n values, (draws,) or (draws, d), exact in distribution and fast where most values are 0.

    Of n draws with replacement, H ~ Binomial(n, m / n) fall on one of the m rows that are not 0, each of these with equal
    probability: so only H rows need drawing, not n.

    Parameters
    ----------
    values : (n,) or (n, d), rows are drawn.
    draws, seed : number of resamples and seed.

    Raises ValueError: no values. Efron (1979). Taught in notebooks/11_evaluation.ipynb, section 11.
    """
    values = np.asarray(values, float)
    n = len(values)
    if not n:
        raise ValueError("no values to resample")
    rng, filled = np.random.default_rng(seed), values[values.reshape(n, -1).any(1)]
    means, m = np.zeros((draws, *values.shape[1:])), len(filled)
    if not m:
        return means
    hits = rng.binomial(n, m / n, draws)
    step = max(1, int(2**17 / max(hits.mean(), 1)))  # resamples at once: the drawn values stay in the cache
    for first in range(0, draws, step):
        part = hits[first : first + step]
        some = np.flatnonzero(part)  # reduceat would give an empty resample its neighbour's first value
        drawn = filled.take(rng.integers(m, size=part.sum(), dtype=np.int32), axis=0)
        if len(some):
            means[first + some] = np.add.reduceat(drawn, (np.cumsum(part) - part)[some], axis=0) / n
    return means


def _numbers(name: str, values) -> np.ndarray:
    try:
        array = np.asarray(values, float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must hold numbers: {error}") from None
    if array.ndim != 1:
        raise ValueError(f"{name} must have shape (n,), got {array.shape}")
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise ValueError(f"{name}: {bad} values are missing or infinite; a row without its {name} cannot be used")
    return array


def _check(log: Log, estimator: str, parameter: float | None) -> float:
    """Raise on what an estimator cannot use; return its parameter (infinity where it has none)."""
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, not {estimator!r}")
    if estimator in WITH_MODEL and log.q_logged is None:
        raise ValueError(f"{estimator} needs a reward model: give the log q_logged and q_target")
    if estimator not in ("switch", "shrinkage"):
        return math.inf
    if parameter is None:
        return choose_parameter(log, estimator)
    if not parameter >= 0:
        raise ValueError(f"the parameter of {estimator} must be 0 or more, got {parameter}")
    return float(parameter)


def _shrunk(weight: np.ndarray, estimator: str, parameter: float) -> np.ndarray:
    """The weights that an estimator uses instead of w."""
    if estimator == "dm":
        return np.zeros_like(weight)
    if estimator == "switch":
        return np.where(weight <= parameter, weight, 0.0)
    if estimator == "shrinkage" and math.isfinite(parameter):
        return parameter * weight / np.maximum(weight**2 + parameter, np.finfo(float).tiny)
    return weight


def _terms(log: Log, estimator: str, parameter: float) -> np.ndarray:
    """(n,) terms whose mean is the estimate (all but snips)."""
    if estimator == "ips":
        return log.weight * log.reward
    return log.q_target + _shrunk(log.weight, estimator, parameter) * (log.reward - log.q_logged)


def _gamma(log: Log, estimator: str, parameter: float, value: float, alpha: float) -> tuple[float, float]:
    """The interval of Fay and Feuer, shifted by what the reward model adds."""
    if estimator == "dm":
        raise ValueError(
            "dm has no interval from the log alone, its error is the model's: use dr, or method='bootstrap'"
        )
    if (log.reward < 0).any():
        raise ValueError("gamma intervals need rewards of 0 or more: use method='bootstrap'")
    w, shift, scale = _shrunk(log.weight, estimator, parameter), 0.0, len(log.reward)
    if estimator == "ips":
        v = float((w * log.reward) @ (w * log.reward))
    elif estimator == "snips":
        scale = w.sum()
        v = float(((w * (log.reward - value)) ** 2).sum())
    else:
        terms = _terms(log, estimator, parameter)
        v = float(((terms - value) ** 2).sum())
        shift = float((log.q_target - w * log.q_logged).sum())
    y, size = float(w @ log.reward), float(log.reward[log.reward > 0].mean())
    more = size * float(w @ w) / max(float(w.sum()), np.finfo(float).tiny)  # what one more event would weigh
    low = v / (2 * y) * stats.chi2.ppf(alpha / 2, 2 * y**2 / v) if y > 0 and v > 0 else y
    wide = v + more**2
    high = wide / (2 * (y + more)) * stats.chi2.ppf(1 - alpha / 2, 2 * (y + more) ** 2 / wide) if wide > 0 else y
    return (shift + float(low)) / scale, (shift + float(high)) / scale


def _resampled(log: Log, estimator: str, parameter: float, draws: int, seed: int) -> np.ndarray:
    """(draws,) estimates from resampled rows."""
    if estimator == "snips":
        sums = bootstrap_means(np.column_stack([log.weight * log.reward, log.weight]), draws, seed)
        return sums[:, 0] / np.maximum(sums[:, 1], np.finfo(float).tiny)
    return bootstrap_means(_terms(log, estimator, parameter), draws, seed)
