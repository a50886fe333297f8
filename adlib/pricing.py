"""Prices from choices: conditional logit, elasticities, the most profitable price, and a bound on how far prices may differ.

Taught in notebooks/08_ad_serving.ipynb, section 10.
"""

import numpy as np
from scipy import optimize, special, stats
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from adlib.serving import Interval


class ConditionalLogit(BaseEstimator):
    r"""Which of J alternatives is chosen, by McFadden's model: utilities linear in what the alternatives are like.

    .. math:: P_{nj} = \frac{e^{x_{nj}^\top \beta}}{\sum_k e^{x_{nk}^\top \beta}}, \qquad
              \nabla \ln L = \sum_n (x_{n y_n} - \sum_j P_{nj} x_{nj})

    Attributes
    ----------
    coef_ : (d,); covariance_ : (d, d), robust to choices of one person that resemble each other; log_likelihood_.

    Raises
    ------
    ValueError : choices that are no alternative, numbers that are not finite, an attribute that never differs between alternatives.

    McFadden (1974). Taught in notebooks/08_ad_serving.ipynb, section 10.
    """

    def fit(self, X, y, groups=None) -> "ConditionalLogit":
        """Maximise the likelihood of choices y: (n,) in 0 … J - 1 given X: (n, J, d); groups: (n,) who chose."""
        X, y = _alternatives(X), np.asarray(y)
        if y.shape != X.shape[:1] or not np.isin(y, np.arange(X.shape[1])).all():
            raise ValueError(f"each of the {len(X)} choices must be a whole number from 0 to {X.shape[1] - 1}")
        spread = (X - X.mean(1, keepdims=True)).reshape(-1, X.shape[2])
        if np.linalg.matrix_rank(spread) < X.shape[2]:
            raise ValueError(
                "an attribute never differs between the alternatives, or repeats others: it has no effect here"
            )
        found = optimize.minimize(
            lambda b: self._terms(X, y, b)[0],
            np.zeros(X.shape[2]),
            jac=lambda b: -self._terms(X, y, b)[1].sum(0),
            hess=lambda b: self._terms(X, y, b)[2],
            method="trust-exact",
        )
        if not np.isfinite(found.fun) or np.abs(found.x).max() > 1e3:
            raise ValueError("the choices are separated perfectly by an attribute: its effect has no finite estimate")
        self.coef_, self.log_likelihood_ = found.x, float(-found.fun)
        _, score, hessian = self._terms(X, y, found.x)
        if groups is not None:
            _, who = np.unique(np.asarray(groups), return_inverse=True)
            total = np.zeros((who.max() + 1, X.shape[2]))
            np.add.at(total, who, score)
            score = total * np.sqrt(len(total) / max(len(total) - 1, 1))
        bread = np.linalg.inv(hessian)
        self.covariance_ = bread @ (score.T @ score) @ bread if groups is not None else bread
        return self

    @staticmethod
    def _terms(X, y, beta) -> tuple[float, np.ndarray, np.ndarray]:
        """Minus log likelihood, score of each choice (n, d), and Hessian of the first (d, d)."""
        u = X @ beta
        log_p = u - special.logsumexp(u, axis=1, keepdims=True)
        p, rows = np.exp(log_p), np.arange(len(X))
        centred = X - (p[..., None] * X).sum(1, keepdims=True)
        hessian = np.einsum("nj,njd,nje->de", p, centred, centred, optimize=True)
        return -log_p[rows, y].sum(), centred[rows, y], hessian

    def predict_proba(self, X) -> np.ndarray:
        """(n, J) probabilities of the alternatives."""
        check_is_fitted(self, "coef_")
        return special.softmax(_alternatives(X) @ self.coef_, axis=1)

    def intervals(self) -> list[Interval]:
        """95 % interval of each coefficient."""
        check_is_fitted(self, "coef_")
        half = stats.norm.ppf(0.975) * np.sqrt(np.diag(self.covariance_))
        return [Interval(float(b), float(b - h), float(b + h)) for b, h in zip(self.coef_, half, strict=True)]

    def draws(self, n: int, seed: int = 0) -> np.ndarray:
        """(n, d) coefficients drawn from their normal distribution, to carry their uncertainty into a price."""
        return np.random.default_rng(seed).multivariate_normal(self.coef_, self.covariance_, n)


def own_elasticity(X, beta, j: int, price: int) -> float:
    r"""Change of the demand for alternative j in per cent when its price rises by one per cent.

    .. math:: \epsilon_j = \frac{\sum_n \beta_{price}\, x_{nj}\, P_{nj} (1 - P_{nj})}{\sum_n P_{nj}}

    Parameters
    ----------
    X : (n, J, d); beta : (d,); price : column of X that holds prices. Taught in section 10.
    """
    X = _alternatives(X)
    p = special.softmax(X @ np.asarray(beta), axis=1)[:, j]
    return float((beta[price] * X[:, j, price] * p * (1 - p)).sum() / p.sum())


def best_price(X, beta, j: int, price: int, cost: float, grid) -> float:
    r"""The price of alternative j on `grid` with the largest profit, others' prices as they were: :math:`(p - c) \sum_n P_{nj}(p)`.

    Parameters
    ----------
    X : (n, J, d) choice situations; beta : (d,); price : column of prices. cost, grid : same unit as the prices.

    Raises
    ------
    ValueError : negative prices, or a grid with no price above the cost. Taught in section 10.
    """
    X, beta, grid = _alternatives(X), np.asarray(beta, float), np.asarray(grid, float)
    if cost < 0 or (grid < 0).any() or (X[:, :, price] < 0).any():
        raise ValueError("negative prices: prices and cost must be 0 or more")
    if not (grid > cost).any():
        raise ValueError(f"no price of the grid exceeds the cost of {cost:g}: every sale would lose money")
    u = X @ beta
    rivals = special.logsumexp(np.delete(u, j, axis=1), axis=1)
    rest = u[:, j] - beta[price] * X[:, j, price] - rivals
    demand = special.expit(rest[:, None] + beta[price] * grid).sum(0)
    return float(grid[((grid - cost) * demand).argmax()])


def fair_prices(intercept, slope, size, cost: float, max_ratio: float = np.inf) -> np.ndarray:
    r"""Prices of G groups with the largest profit of which none exceeds another by more than `max_ratio`.

    .. math:: \max_p \sum_g n_g (p_g - c)\, \sigma(a_g + b_g p_g) \quad \text{with} \quad \max p \le max\_ratio \cdot \min p

    Each term has one peak, so within a window [l, l max_ratio] every group takes its own best price or the nearer end; what is
    left is a search over l.

    Parameters
    ----------
    intercept, slope, size : (G,) a, b < 0 and number of shoppers n. cost : c. max_ratio : 1 is one price for all.

    Returns
    -------
    (G,) prices.

    Raises
    ------
    ValueError : negative prices (cost), a demand that does not fall with the price, a ratio below 1. Taught in section 10.
    """
    a, b, n = (np.asarray(x, float) for x in (intercept, slope, size))
    if cost < 0:
        raise ValueError(f"negative prices: the cost of {cost:g} must be 0 or more")
    if not (b < 0).all():
        raise ValueError("demand must fall with the price in every group: a slope is not below 0, so no price is best")
    if not max_ratio >= 1:
        raise ValueError(f"max_ratio is the dearest price over the cheapest, at least 1, not {max_ratio}")
    # first-order condition of one group in closed form: p = c + (1 + W(exp(a + b c - 1))) / -b
    own = cost + (1 + special.lambertw(np.exp(a + b * cost - 1)).real) / -b
    if own.max() <= max_ratio * own.min():
        return own
    window = lambda low: np.clip(own, low[:, None], low[:, None] * max_ratio)  # noqa: E731
    profit = lambda p: (n * (p - cost) * special.expit(a + b * p)).sum(1)  # noqa: E731
    low, high = own.min() / max_ratio, own.max()
    for _ in range(4):  # a finer grid around the best point of the last
        lows = np.linspace(low, high, 401)
        best, step = lows[profit(window(lows)).argmax()], lows[1] - lows[0]
        low, high = best - step, best + step
    return window(np.array([best]))[0]


def _alternatives(X) -> np.ndarray:
    X = np.asarray(X, float)
    if X.ndim != 3 or X.shape[1] < 2 or not np.isfinite(X).all():
        raise ValueError(
            f"X must be (choices, alternatives, attributes) with two alternatives or more, all finite; got {X.shape}"
        )
    return X
