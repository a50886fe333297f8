"""From a prediction to an action: A = g(Y), caps, second prices, replay of a log, intervals over runs.

Nothing here knows a model: predictions come in as numbers. Taught in notebooks/08_ad_serving.ipynb.
"""

from dataclasses import dataclass

import numpy as np
from scipy import stats

LEAST_MATCHES = 100  # replayed rows below which `replay` abstains


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its 95 % interval."""

    estimate: float
    low: float
    high: float

    def __iter__(self):
        return iter((self.estimate, self.low, self.high))

    def __str__(self) -> str:
        return f"{self.estimate:,.4g} [{self.low:,.4g}, {self.high:,.4g}]"


def mean_interval(values, minus=None) -> Interval:
    r"""Mean of independent runs, or of paired differences, :math:`\bar x \pm t_{n-1, .975}\, s / \sqrt n`.

    Parameters
    ----------
    values : (n,) one number a run, user or test; minus : (n,) the rival's numbers in the same runs.

    Raises
    ------
    ValueError : fewer than two runs, numbers that are not finite, lengths that differ. Taught in section 2.
    """
    x = np.asarray(values, float)
    if minus is not None and np.shape(minus) != x.shape:
        raise ValueError(f"paired runs must have equal lengths, got {x.shape} and {np.shape(minus)}")
    x = x if minus is None else x - np.asarray(minus, float)
    if x.ndim != 1 or len(x) < 2 or not np.isfinite(x).all():
        raise ValueError("an interval needs at least two runs with finite numbers")
    half = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))
    return Interval(float(x.mean()), float(x.mean() - half), float(x.mean() + half))


def expected_value(p_click, *, p_conversion=1.0, margin=1.0, cost=0.0) -> np.ndarray:
    r"""What showing an ad is worth, in yuan: :math:`v = p_{click}\; p_{conversion}\; margin - cost`.

    Parameters
    ----------
    p_click, p_conversion : probabilities of a click, and of a purchase after it; any shapes that broadcast.
    margin : yuan earned by a purchase (or by a click, with p_conversion = 1). cost : yuan an impression.

    Raises
    ------
    ValueError : probabilities outside [0, 1] or not finite. Taught in section 1.
    """
    for name, p in (("p_click", p_click), ("p_conversion", p_conversion)):
        if not ((np.asarray(p, float) >= 0) & (np.asarray(p, float) <= 1)).all():
            raise ValueError(f"{name} must hold finite probabilities between 0 and 1")
    return np.asarray(p_click, float) * p_conversion * margin - cost


def best_ad(value, allowed=None, reserve: float = 0.0) -> int:
    r"""The allowed ad with the largest value above `reserve`, or -1: show nothing. A = g(Y) as a decision of one visitor.

    .. math:: A = \arg\max_{a\ allowed} v_a \quad \text{if } \max v_a > reserve, \text{ else } -1

    Parameters
    ----------
    value : (k,) expected values in yuan. allowed : (k,) bool, e.g. from `under_cap`.

    Raises
    ------
    ValueError : an empty candidate set, values that are not finite. Taught in section 1.
    """
    value = np.asarray(value, float)
    if value.ndim != 1 or len(value) == 0:
        raise ValueError("an empty candidate set: there is no ad to choose from; give at least one candidate")
    if not np.isfinite(value).all():
        bad = int(np.flatnonzero(~np.isfinite(value))[0])
        raise ValueError(
            f"the score of candidate {bad} is {value[bad]}: a decision needs finite scores; mend the model"
        )
    value = value if allowed is None else np.where(allowed, value, -np.inf)
    return int(value.argmax()) if value.max() > reserve else -1


def under_cap(shown, cap: int) -> np.ndarray:
    """Which ads may be shown once more: `shown` (k,) earlier showings to this visitor are fewer than `cap`.

    Raises ValueError for a cap below one or negative counts. Taught in section 5.
    """
    shown = np.asarray(shown)
    if cap < 1 or (shown < 0).any():
        raise ValueError(f"a frequency cap is at least 1 showing and counts are not negative; got cap {cap}")
    return shown < cap


def second_price(bids, reserve: float = 0.0) -> tuple[int, float]:
    """Winner and price of a sealed second-price auction: the highest bid wins and pays the second highest, or the reserve.

    Returns (-1, 0.0) where no bid reaches the reserve; the first of equal bids wins.

    Raises
    ------
    ValueError : negative prices, bids that are not finite. Vickrey (1961). Taught in section 8.
    """
    bids = np.asarray(bids, float)
    if not np.isfinite(bids).all() or (bids < 0).any() or reserve < 0:
        raise ValueError("negative prices: bids and reserve must be finite numbers, 0 yuan or more")
    if len(bids) == 0 or bids.max() < reserve:
        return -1, 0.0
    winner = int(bids.argmax())
    return winner, float(max(np.delete(bids, winner).max(initial=0.0), reserve))


def auction_profit(value, bid, rival) -> np.ndarray:
    r"""Profit of a bid against the highest rival bid z, :math:`(v - z)\,[b > z]`, in yuan; arrays that broadcast.

    Raises ValueError for negative prices. Taught in section 8.
    """
    value, bid, rival = (np.asarray(x, float) for x in (value, bid, rival))
    if (bid < 0).any() or (rival < 0).any():
        raise ValueError("negative prices: bids must be 0 yuan or more")
    return np.where(bid > rival, value - rival, 0.0)


@dataclass(frozen=True)
class Replay:
    """Click rate of a policy on the rows of a uniform log where it agrees with the log; `rate` is None where it abstains."""

    matches: int
    clicks: int
    rate: Interval | None


def replay(log, policy, *, action: str = "item_id", reward: str = "click") -> Replay:
    r"""Estimate a policy's click rate on a log of *uniformly random* choices, by keeping the rows in which it agrees.

    .. math:: \hat V = \frac{\sum_t [\pi(h_t) = a_t]\, r_t}{\sum_t [\pi(h_t) = a_t]}

    Rows go by in order of time; a policy learns from the rows it matched, as it would have learnt in the shop.

    Parameters
    ----------
    log : DataFrame with the columns `action`, `reward` (0/1) and propensity.
    policy : object with choose() -> action and learn(action, reward).

    Returns
    -------
    Replay with a Wilson interval; fewer than 100 matches, or no click among them, and it abstains.

    Raises
    ------
    ValueError : propensities that are missing, 0, above 1, or not all equal (lesson 11 has estimators for those).
    Li, Chu, Langford, Wang (2011), arXiv 1003.5956. Taught in section 11.
    """
    p = log["propensity"].to_numpy(float)
    if np.isnan(p).any():
        raise ValueError(f"{int(np.isnan(p).sum())} propensities are missing: without them no policy can be replayed")
    if ((p <= 0) | (p > 1)).any():
        raise ValueError(f"propensities must lie above 0 and at most at 1; the log holds {p.min():g} to {p.max():g}")
    if np.ptp(p) > 1e-9:
        raise ValueError("the log was not uniform: matched rows are a biased sample; use the estimators of lesson 11")
    matches = clicks = 0
    for a, r in zip(log[action].tolist(), log[reward].tolist(), strict=True):
        if policy.choose() == a:
            matches, clicks = matches + 1, clicks + int(r)
            policy.learn(a, r)
    if matches < LEAST_MATCHES or clicks == 0:
        return Replay(matches, clicks, None)
    test = stats.binomtest(clicks, matches).proportion_ci(method="wilson")
    return Replay(matches, clicks, Interval(clicks / matches, float(test.low), float(test.high)))
