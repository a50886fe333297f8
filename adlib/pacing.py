"""Spending a budget: over the hours of a day, against rival bids, and over channels.

Taught in notebooks/08_ad_serving.ipynb, sections 8 and 9.
"""

from dataclasses import dataclass

import numpy as np
from scipy import optimize

RULES = ("none", "throttle", "dual")


def check_budget(budget: float) -> float:
    """The budget in yuan; raises ValueError unless it is a finite number above 0."""
    if not 0 < budget < np.inf:
        raise ValueError(f"the budget is {budget} yuan: nothing can be bought or divided; give an amount above 0")
    return float(budget)


def spending_plan(hours) -> np.ndarray:
    """(25,) share of a day's budget to be spent by each full hour, in proportion to `hours` (24,), the traffic by hour.

    Raises ValueError for other shapes, negative or no traffic. Taught in section 8.
    """
    hours = np.asarray(hours, float)
    if hours.shape != (24,) or not np.isfinite(hours).all() or (hours < 0).any() or hours.sum() == 0:
        raise ValueError("a daily traffic curve has 24 numbers, none negative and not all 0")
    return np.r_[0, hours.cumsum() / hours.sum()]


def allowance(plan: np.ndarray, budget: float, hour) -> np.ndarray:
    """Yuan that may have been spent by `hour` (0 to 24, fractions allowed) under a `spending_plan`. Taught in section 8."""
    return check_budget(budget) * np.interp(hour, np.arange(25), plan)


@dataclass(frozen=True)
class Days:
    """What D days of auctions gave: value won (D,) and spent (D,) in yuan, and the share of the budget gone over time (D, n)."""

    value: np.ndarray
    spent: np.ndarray
    gone: np.ndarray


def run_days(value, price, budget: float, rule: str = "dual", *, rate: float | None = None) -> Days:
    r"""Bid through D days of n second-price auctions with one budget a day.

    ``none`` bids the value v until the money is gone; ``throttle`` does so only while no more is spent than the share of the day that has
    passed; ``dual`` bids less in every auction,

    .. math:: b_t = \frac{v_t}{1 + \lambda_t}, \qquad \lambda_{t+1} = \max(0,\; \lambda_t + \eta\,(z_t [b_t > z_t] - B / n))

    so that :math:`\lambda` rises when spending runs ahead of :math:`B / n` an auction, and only the best bargains are bought.

    Parameters
    ----------
    value, price : (D, n) yuan that each impression is worth, and the highest rival bid. budget : yuan a day, B.
    rate : :math:`\eta`, per yuan; default sqrt(n) / B: a step of 1 / sqrt(n) when twice the plan is paid.

    Raises
    ------
    ValueError : a budget of zero, negative prices, an unknown rule. Balseiro and Gur (2019), Management Science 65. Taught in section 8.
    """
    value, price = (np.atleast_2d(np.asarray(x, float)) for x in (value, price))
    budget = check_budget(budget)
    if value.shape != price.shape or not np.isfinite(value).all() or not (price >= 0).all() or (value < 0).any():
        raise ValueError(
            "negative prices or values, or shapes that differ: both must be (days, auctions), 0 yuan or more"
        )
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is unknown; choose one of {', '.join(RULES)}")
    days, n = value.shape
    rate = np.sqrt(n) / budget if rate is None else rate
    spent, won, dual, gone = np.zeros(days), np.zeros(days), np.zeros(days), np.empty((days, n))
    for t in range(n):
        bid = value[:, t] / (1 + dual)
        if rule == "throttle":
            bid = np.where(spent <= budget * (t + 1) / n, bid, 0)
        take = (bid > price[:, t]) & (spent + price[:, t] <= budget)
        paid = np.where(take, price[:, t], 0)
        spent, won, gone[:, t] = spent + paid, won + np.where(take, value[:, t], 0), (spent + paid) / budget
        if rule == "dual":
            dual = np.maximum(0, dual + rate * (paid - budget / n))
    return Days(won, spent, gone)


def best_in_hindsight(value, price, budget: float) -> np.ndarray:
    """(D,) most value that the budget could have bought on each day, knowing all prices: the best bargains first, the last one in part.

    An upper bound for every rule of `run_days` (Dantzig 1957). Taught in section 8.
    """
    value, price = (np.atleast_2d(np.asarray(x, float)) for x in (value, price))
    order = np.argsort(-value / np.maximum(price, 1e-12), axis=1)
    value, price = (np.take_along_axis(x, order, 1) for x in (value, price))
    before = price.cumsum(1) - price
    part = np.clip((check_budget(budget) - before) / np.maximum(price, 1e-12), 0, 1)
    return (value * part).sum(1)


@dataclass(frozen=True)
class Response:
    r"""A channel's response to spending s, :math:`f(s) = a (1 - e^{-s / b})`: at most a, and b yuan bring 63 % of it."""

    ceiling: float
    scale: float
    covariance: np.ndarray | None = None

    def __call__(self, spend) -> np.ndarray:
        """Expected response (clicks, say) to `spend` yuan."""
        return self.ceiling * -np.expm1(-np.asarray(spend, float) / self.scale)

    def draws(self, n: int, rng: np.random.Generator) -> list["Response"]:
        """n curves from the normal distribution of the estimates' logarithms, which keeps both above 0."""
        mean = np.log([self.ceiling, self.scale])
        scale = np.diag(1 / np.array([self.ceiling, self.scale]))
        return [Response(*np.exp(x)) for x in rng.multivariate_normal(mean, scale @ self.covariance @ scale, n)]


def fit_response(spend, response) -> Response:
    """Fit a `Response` by least squares weighted by the square root of the response, as counts want it.

    Parameters
    ----------
    spend : (n,) yuan a period. response : (n,) clicks (or orders) in it.

    Raises
    ------
    ValueError : fewer than four periods, negative numbers, spending that never varied. Taught in section 9.
    """
    s, y = np.asarray(spend, float), np.asarray(response, float)
    if len(s) < 4 or len(s) != len(y) or not (np.isfinite(s) & np.isfinite(y) & (s >= 0) & (y >= 0)).all():
        raise ValueError("a response curve needs at least four periods, with spending and response of 0 or more")
    if np.ptp(s) < 1e-9 * s.max() or s.max() == 0:
        raise ValueError("spending never varied: its response cannot be told; vary the budget on purpose")
    start = np.log([max(1.5 * y.max(), 1e-9), max(s.mean(), 1e-9)])
    curve = lambda s, a, b: np.exp(a) * -np.expm1(-s / np.exp(b))  # noqa: E731  -- in logarithms, so both stay above 0
    found, cov = optimize.curve_fit(curve, s, y, start, sigma=np.sqrt(y + 1), maxfev=20_000)
    size = np.diag(np.exp(found))
    return Response(*np.exp(found), covariance=size @ cov @ size)


def allocate(curves: list[Response], budget: float) -> np.ndarray:
    r"""Divide a budget over channels so that the last yuan brings the same everywhere.

    .. math:: f_c'(s_c) = \mu \;\Rightarrow\; s_c = b_c \max(0, \ln \tfrac{a_c}{b_c \mu}), \qquad \sum_c s_c = B

    Parameters
    ----------
    curves : one `Response` a channel. budget : yuan, B.

    Returns
    -------
    (channels,) yuan, found by root search on the price of money mu (scipy's brentq).

    Raises
    ------
    ValueError : no channel, a budget of zero. Taught in section 9.
    """
    if not curves:
        raise ValueError("no channel to spend on: give at least one response curve")
    budget = check_budget(budget)
    a, b = np.array([(c.ceiling, c.scale) for c in curves]).T
    spend = lambda log_mu: b * np.maximum(0, np.log(a / b) - log_mu)  # noqa: E731
    top = np.log(a / b).max()
    log_mu = optimize.brentq(lambda m: spend(m).sum() - budget, top - 2 - budget / b.min(), top)
    return spend(log_mu)
