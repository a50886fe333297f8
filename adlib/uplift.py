"""Whom does the ad change? Uplift from a randomised test, and a curve that scores it. Taught in notebooks/11_evaluation.ipynb, section 13."""

from dataclasses import dataclass

import numpy as np
from sklearn.base import BaseEstimator, clone
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


@dataclass(frozen=True)
class Qini:
    """The curve (share of people, gain a person) and the area between it and the diagonal, with its interval."""

    share: np.ndarray
    gain: np.ndarray
    area: float
    low: float
    high: float


class TLearner(BaseEstimator):
    r"""Two models, one for each arm; their difference is the uplift.

    .. math:: \hat u(x) = \hat E[y | x, t = 1] - \hat E[y | x, t = 0]

    Parameters
    ----------
    estimator : classifier with predict_proba, or regressor; default a standardised logistic regression.
    Künzel, Sekhon, Bickel, Yu (2019), PNAS 116. Taught in notebooks/11_evaluation.ipynb, section 13.
    """

    def __init__(self, estimator=None):
        self.estimator = estimator

    def fit(self, X, y, treated):
        """Fit one model an arm; X: (n, d), y: (n,) outcome, treated: (n,) 0 or 1. Raises ValueError if an arm has one outcome only."""
        X, y, treated = np.asarray(X), np.asarray(y), np.asarray(treated).astype(bool)
        base = self.estimator if self.estimator is not None else make_pipeline(StandardScaler(), LogisticRegression())
        for name, rows in (("control", ~treated), ("treatment", treated)):
            if len(np.unique(y[rows])) < 2:
                raise ValueError(
                    f"the {name} arm has {rows.sum()} people and not two different outcomes: nothing to learn"
                )
        self.models_ = [clone(base).fit(X[rows], y[rows]) for rows in (~treated, treated)]
        return self

    def predict(self, X):
        """Return the uplift (n,), in the unit of y."""
        control, treated = (
            m.predict_proba(X)[:, 1] if hasattr(m, "predict_proba") else m.predict(X) for m in self.models_
        )
        return treated - control


def qini(uplift, y, treated, *, draws: int = 500, alpha: float = 0.05, seed: int = 0) -> Qini:
    r"""Gain of treating the people with the largest predicted uplift first, over treating the same number at random.

    .. math:: Q(s) = \frac1{N_t} \Big( Y_t(s) - Y_c(s) \frac{N_t(s)}{N_c(s)} \Big), \quad area = \int_0^1 [Q(s) - s\,Q(1)]\,ds

    Y and N are the outcomes and people of an arm among the first share s. Interval: bootstrap over people.

    Parameters
    ----------
    uplift, y, treated : (n,) prediction, outcome, 0 or 1, of people that the model has not learnt from.
    draws, alpha, seed : resamples behind the interval, 1 - its level, seed.

    Raises ValueError: lengths that differ, predictions that are missing, an arm of fewer than two people.
    Radcliffe (2007), Direct Marketing Analytics Journal. Taught in notebooks/11_evaluation.ipynb, section 13.
    """
    uplift, y, treated = np.asarray(uplift, float), np.asarray(y, float), np.asarray(treated).astype(bool)
    if not len(uplift) == len(y) == len(treated) or not np.isfinite(uplift).all():
        raise ValueError("uplift, y and treated need one number a person, none of them missing")
    if min(treated.sum(), (~treated).sum()) < 2:
        raise ValueError("each arm needs at least two people to draw a Qini curve")
    rng = np.random.default_rng(seed)
    order = np.lexsort(
        (rng.random(len(y)), -uplift)
    )  # ties are broken at random, or the order of the file would decide
    y, t = y[order], treated[order].astype(float)
    share, gain = _curve(y, t, np.ones(len(y)))
    areas = [_area(*_curve(y, t, w)) for w in rng.multinomial(len(y), np.full(len(y), 1 / len(y)), size=draws)]
    low, high = np.quantile(areas, [alpha / 2, 1 - alpha / 2])
    return Qini(share, gain, _area(share, gain), float(low), float(high))


def _curve(y: np.ndarray, t: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share (n + 1,) and gain a treated person (n + 1,), from the best prediction down."""
    sums = np.cumsum([weight, weight * t, weight * t * y, weight * (1 - t) * y], axis=1)
    people, n_t, y_t, y_c = np.c_[np.zeros(4), sums]
    n_c = people - n_t
    gain = y_t - y_c * np.divide(n_t, n_c, out=np.zeros_like(n_t), where=n_c > 0)
    return people / people[-1], gain / max(n_t[-1], 1)


def _area(share: np.ndarray, gain: np.ndarray) -> float:
    return float(np.trapezoid(gain, share) - gain[-1] / 2)
