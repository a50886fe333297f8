"""From click to conversion: rates along the funnel, and conversions that arrive after the model was trained.

Taught in notebooks/03_ctr_modeling.ipynb.
"""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.optimize import brentq, minimize
from scipy.special import expit
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_array, check_is_fitted
from torch import nn

from adlib import compute
from adlib.encoding import Encoder

__all__ = [
    "METHODS",
    "TOWERS",
    "DelayedConversion",
    "Feedback",
    "FunnelModel",
    "arrival_rate",
    "delayed",
    "delayed_loss",
]

TOWERS = ("clicks", "esmm")
METHODS = ("naive", "window", "weighted", "delayed")


# -- click, conversion, click and conversion --------------------------------------------------------------------------------


class _Towers(nn.Module):
    """One table of embeddings under two perceptrons: a logit of a click, and one of a conversion given a click."""

    def __init__(self, slots: int, fields: int, numbers: int, dim: int, hidden: int, rates: tuple[float, float]):
        super().__init__()
        self.table = nn.Embedding(slots, 2 + dim)  # of each value: a weight for either logit, then its embedding
        nn.init.normal_(self.table.weight, std=0.01)
        nn.init.zeros_(self.table.weight[:, :2].detach())
        inner = fields * dim + numbers
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(inner, hidden), nn.ReLU(), nn.Linear(hidden, 1)) for _ in rates
        )
        for tower, rate in zip(self.towers, rates, strict=True):  # the first prediction is the base rate
            nn.init.zeros_(tower[-1].weight)
            nn.init.constant_(tower[-1].bias, math.log(rate / (1 - rate)))

    def forward(self, slots, numbers) -> tuple[torch.Tensor, torch.Tensor]:
        """Two logits (n,) each from slots (n, fields) and numbers (n, m)."""
        values = self.table(slots)
        x = torch.cat([values[..., 2:].flatten(1), numbers], dim=1)
        click, conversion = (values[..., j].sum(1) + tower(x).squeeze(1) for j, tower in enumerate(self.towers))
        return click, conversion


def _towers_loss(method: str, click_logit, conversion_logit, click, conversion) -> torch.Tensor:
    """Summed log loss of clicks plus that of conversions, over clicked rows ("clicks") or over all rows ("esmm")."""
    bce = nn.functional.binary_cross_entropy_with_logits
    loss = bce(click_logit, click, reduction="sum")
    if method == "clicks":
        return loss + bce(conversion_logit[click > 0], conversion[click > 0], reduction="sum")
    both = nn.functional.logsigmoid(click_logit) + nn.functional.logsigmoid(conversion_logit)  # log CTR + log CVR
    neither = torch.log(-torch.expm1(both.clamp(max=-1e-6)))
    return loss - (conversion * both + (1 - conversion) * neither).sum()


class FunnelModel(BaseEstimator):
    """Click rate, conversion rate after a click, and their product, from two towers over one table of embeddings.

    CTCVR = P(click and conversion | shown) = P(click | shown) · P(conversion | click, shown) = CTR · CVR. ``"clicks"`` learns
    CVR from clicked rows, a sample that was selected by what the model should tell: nobody saw the rest. ``"esmm"`` never
    trains CVR on its own; it fits CTR and CTCVR to all rows, and CVR is what has to stand between them.

    Parameters
    ----------
    method : "esmm" or "clicks".
    dim, hidden : length of an embedding; width of each tower's layer.
    epochs, batch_size, learning_rate, dense_learning_rate : passes, rows a step, highest rate of the table (Adagrad) and of
        the towers (Adam); both fall to zero. seed : first weights and order of rows.

    Raises
    ------
    ValueError : unknown method, no click, no conversion, a conversion without a click, values other than 0 and 1.

    Ma et al. (2018), Entire space multi-task model, SIGIR. Taught in notebooks/03_ctr_modeling.ipynb.
    """

    def __init__(
        self,
        method="esmm",
        dim=8,
        hidden=32,
        epochs=1,
        batch_size=2048,
        learning_rate=0.1,
        dense_learning_rate=0.01,
        seed=0,
    ):
        self.method, self.dim, self.hidden, self.epochs, self.batch_size = method, dim, hidden, epochs, batch_size
        self.learning_rate, self.dense_learning_rate, self.seed = learning_rate, dense_learning_rate, seed

    def fit(self, X: pd.DataFrame, click, conversion) -> "FunnelModel":
        """Train on X: (n, d), clicks (n,) and conversions (n,), both 0 or 1 for every impression."""
        if self.method not in TOWERS:
            raise ValueError(f"method={self.method!r} is unknown; choose one of {', '.join(TOWERS)}.")
        click, conversion = _funnel(click, conversion, len(X))
        self.click_rate_, self.conversion_rate_ = float(click.mean()), float(conversion.sum() / click.sum())
        self.encoder_ = Encoder().fit(X)
        slots, numbers, *targets = map(torch.from_numpy, (*self.encoder_.transform(X), click, conversion))
        rates = tuple(np.clip((self.click_rate_, self.conversion_rate_), 1e-6, 1 - 1e-6))
        with torch.random.fork_rng(devices=[]), compute.fast_cpu():
            torch.manual_seed(self.seed)
            shape = int(self.encoder_.offsets_[-1]), slots.shape[1], numbers.shape[1]
            self.network_ = _Towers(*shape, self.dim, self.hidden, rates)
            self._train([slots, numbers, *targets])
        return self

    def _train(self, parts: list[torch.Tensor]) -> None:
        network = self.network_
        # a large starting sum works like a prior: an embedding that was seen a few times moves little
        table = torch.optim.Adagrad(network.table.parameters(), self.learning_rate, initial_accumulator_value=50.0)
        dense = torch.optim.Adam(network.towers.parameters(), self.dense_learning_rate)
        batches = torch.cat([torch.randperm(len(parts[0])) for _ in range(self.epochs)]).split(self.batch_size)
        schedules = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, len(batches)) for o in (table, dense)]
        for batch in batches:
            slots, numbers, click, conversion = (t[batch] for t in parts)
            loss = _towers_loss(self.method, *network(slots, numbers), click, conversion)
            network.zero_grad()
            loss.backward()
            for step in (table, dense, *schedules):
                step.step()

    @torch.no_grad()
    def predict(self, X: pd.DataFrame) -> pd.DataFrame:
        """Probabilities of n impressions: columns ctr, cvr (given a click) and ctcvr = ctr · cvr."""
        check_is_fitted(self)
        slots, numbers = map(torch.from_numpy, self.encoder_.transform(X))
        parts = [self.network_(s, v) for s, v in zip(slots.split(8192), numbers.split(8192), strict=True)]
        ctr, cvr = (torch.sigmoid(torch.cat(logits)).double().numpy() for logits in zip(*parts, strict=True))
        return pd.DataFrame({"ctr": ctr, "cvr": cvr, "ctcvr": ctr * cvr}, index=X.index)


# -- conversions that come later ---------------------------------------------------------------------------------------------


class Feedback(NamedTuple):
    """What is known of n clicks at training time: converted (n,) 0/1 so far; delay (n,) hours from click to conversion,
    NaN without one; elapsed (n,) hours from click to now."""

    converted: np.ndarray
    delay: np.ndarray
    elapsed: np.ndarray

    def take(self, rows) -> "Feedback":
        """The feedback on these clicks (positions or a mask)."""
        return Feedback(*(values[rows] for values in self))


def delayed(clicks: pd.DataFrame, mean_delay, now=None, seed: int = 0) -> Feedback:
    """Plant delays into a log that has none: each conversion comes an exponential time after its click. Simulated.

    Parameters
    ----------
    clicks : (n, ...) with timestamp and conversion (0/1, whether the click converts in the end).
    mean_delay : hours, one number or (n,).
    now : when the log is read; default the latest timestamp. What comes later has not been seen yet.

    Raises
    ------
    ValueError : a negative or missing delay, a missing time, a click after now, a conversion that is not 0 or 1.

    Taught in notebooks/03_ctr_modeling.ipynb.
    """
    if missing := [c for c in ("timestamp", "conversion") if c not in clicks]:
        raise ValueError(f"The clicks lack {' and '.join(missing)}: a delay needs to know when, and whether at all.")
    if lost := int(clicks["timestamp"].isna().sum()):
        raise ValueError(f"The time of {lost} clicks is missing; clean the table first.")
    mean = np.broadcast_to(np.asarray(mean_delay, dtype=float), len(clicks))
    if not (mean >= 0).all():
        raise ValueError("mean_delay holds a negative or missing number; give hours, zero or more.")
    now = clicks["timestamp"].max() if now is None else now
    elapsed = ((now - clicks["timestamp"]) / pd.Timedelta(hours=1)).to_numpy()
    if len(elapsed) and elapsed.min() < 0:
        raise ValueError(f"{(elapsed < 0).sum()} clicks come after now, {now}: leave out what is not known yet.")
    final = _zero_one(clicks["conversion"], len(clicks), "conversion")
    delay = mean * np.random.default_rng(seed).exponential(size=len(mean))
    seen = (final == 1) & (delay <= elapsed)
    return Feedback(seen.astype(int), np.where(seen, delay, np.nan), elapsed)


def delayed_loss(logit, log_rate, converted, delay, elapsed) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Negative log-likelihood of delayed feedback for n clicks, and its derivatives by logit and by log-rate.

    With p = σ(logit) and rate λ a conversion after d hours has the density p λ e^(−λd); no conversion within e hours the
    probability 1 − p + p e^(−λe): either never, or not yet. All arguments and results are (n,).

    Chapelle (2014), Modeling delayed feedback in display advertising, KDD, eq. 8. Taught in notebooks/03_ctr_modeling.ipynb.
    """
    p, rate, yes = expit(logit), np.exp(np.clip(log_rate, -30, 30)), np.asarray(converted) == 1
    d, later = np.where(yes, delay, 0.0), np.exp(-rate * elapsed)
    none = (1 - p) + p * later
    loss = np.where(yes, np.logaddexp(0, -logit) - log_rate + rate * d, -np.log(np.maximum(none, 1e-300)))
    by_logit = np.where(yes, p - 1, p * (1 - p) * (1 - later) / none)
    by_log_rate = np.where(yes, rate * d - 1, p * later * rate * elapsed / none)
    return loss, by_logit, by_log_rate


class DelayedConversion(ClassifierMixin, BaseEstimator):
    """Logistic regression of conversions of which some have not arrived yet; four ways to deal with that.

    ``"naive"`` takes "not yet" for "no". ``"window"`` takes only clicks older than a window and what converted within it.
    ``"weighted"`` counts a conversion 1/F(e) times, F(e) = 1 − e^(−λe) being its chance to be seen by now, with λ fitted to the
    delays (exponential, cut off at e). ``"delayed"`` fits conversion and delay together by maximum likelihood, the rate of
    arrival λ(x) = exp(v·x + c) depending on the click, too.

    Parameters
    ----------
    method : "naive", "window", "weighted" or "delayed".
    penalty : weight of the squared coefficients without intercepts; 1 / C of scikit-learn's LogisticRegression.
    window : hours, for "window". resolution : hours, delays below it count as it, since a log's clock ticks.

    Attributes
    ----------
    coef_ (d,), intercept_; delay_coef_ (d,) and delay_intercept_ of log λ ("delayed"); n_used_, clicks that were used.

    Raises
    ------
    ValueError : unknown method, no clicks, no conversion, negative or missing delays, a delay longer than the time passed.

    Chapelle (2014), KDD. Taught in notebooks/03_ctr_modeling.ipynb.
    """

    def __init__(self, method="delayed", penalty=1.0, window=24.0 * 14, resolution=1 / 60):
        self.method, self.penalty, self.window, self.resolution = method, penalty, window, resolution

    def fit(self, X, feedback: Feedback) -> "DelayedConversion":
        """Train on clicks X: (n, d) numbers of similar scale, and what is known of them now."""
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is unknown; choose one of {', '.join(METHODS)}.")
        feedback = _feedback(feedback, len(X))
        X = check_array(X, dtype=float)
        if self.method == "window":
            old = feedback.elapsed >= self.window
            X, feedback = X[old], feedback.take(old)
            feedback = feedback._replace(converted=(feedback.converted == 1) & (feedback.delay <= self.window))
        if not np.sum(feedback.converted):
            raise ValueError(f"None of the {len(X)} clicks that method={self.method!r} may use has converted.")
        self.classes_, self.n_used_, self.n_features_in_ = np.array([0, 1]), len(X), X.shape[1]
        feedback = feedback._replace(delay=np.maximum(feedback.delay, self.resolution))
        together = self.method == "delayed"
        y = np.asarray(feedback.converted, dtype=float)
        if self.method == "weighted":
            rate = arrival_rate(feedback)
            y = y / -np.expm1(-rate * np.maximum(feedback.elapsed, self.resolution))
        start = np.zeros((2 if together else 1, X.shape[1] + 1))
        start[0, -1] = np.log(y.mean() / max(1 - y.mean(), 1e-3))
        if together:
            start[1, -1] = -np.log(np.nanmean(feedback.delay))
        found = minimize(self._loss, start.ravel(), (X, y, feedback), jac=True, method="L-BFGS-B").x.reshape(
            start.shape
        )
        self.coef_, self.intercept_ = found[0, :-1], found[0, -1]
        if together:
            self.delay_coef_, self.delay_intercept_ = found[1, :-1], found[1, -1]
        return self

    def _loss(self, flat, X, y, feedback: Feedback) -> tuple[float, np.ndarray]:
        """Penalised loss and gradient for one row of weights (conversion) or two (conversion, delay)."""
        w = flat.reshape(-1, X.shape[1] + 1)
        z = [X @ row[:-1] + row[-1] for row in w]
        if len(w) == 2:
            loss, *slopes = delayed_loss(*z, *feedback)
        else:  # y above 1 is allowed: the loss stays convex and its mean is that of the final conversions
            loss, slopes = np.logaddexp(0, z[0]) - y * z[0], [expit(z[0]) - y]
        gradient = np.array([np.append(X.T @ s, s.sum()) for s in slopes])
        gradient[:, :-1] += self.penalty * w[:, :-1]
        return loss.sum() + self.penalty / 2 * (w[:, :-1] ** 2).sum(), gradient.ravel()

    def predict_proba(self, X) -> np.ndarray:
        """Probabilities (n, 2) that a click never converts, and that it does, sooner or later."""
        check_is_fitted(self)
        p = expit(check_array(X, dtype=float) @ self.coef_ + self.intercept_)
        return np.column_stack([1 - p, p])


def arrival_rate(feedback: Feedback) -> float:
    """Maximum-likelihood rate λ (per hour) of exponential delays, each seen only because it was shorter than elapsed.

    The density of a delay d that had e hours to show is λ e^(−λd) / (1 − e^(−λe)); where the delays look uniform up to e, λ is
    near zero and nothing can be said about what is still to come. Taught in notebooks/03_ctr_modeling.ipynb.
    """
    yes = np.asarray(feedback.converted) == 1
    d, e = feedback.delay[yes], np.maximum(feedback.elapsed[yes], feedback.delay[yes])
    slope = lambda rate: (1 / rate - d - e / np.expm1(np.minimum(rate * e, 700))).sum()  # noqa: E731
    low, high = 1e-3 / e.max(), 1e3 / d.mean()
    return brentq(slope, low, high) if slope(low) > 0 > slope(high) else (high if slope(high) > 0 else low)


# -- checks --------------------------------------------------------------------------------------------------------------------


def _zero_one(values, n: int, name: str) -> np.ndarray:
    """Zeros and ones (n,) in float32."""
    values = np.asarray(values)
    if values.shape != (n,) or not np.isin(values, (0, 1)).all():
        raise ValueError(f"{name} must hold 0 or 1 for each of the {n} rows.")
    return values.astype(np.float32)


def _funnel(click, conversion, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Clicks and conversions (n,) that make a funnel."""
    click, conversion = _zero_one(click, n, "click"), _zero_one(conversion, n, "conversion")
    if not click.any():
        raise ValueError(f"None of the {n} impressions was clicked: there is nothing to learn about conversions.")
    if bad := int((conversion > click).sum()):
        raise ValueError(f"{bad} rows hold a conversion without a click: attribute each conversion to a click first.")
    if not conversion.any():
        raise ValueError(
            f"None of the {int(click.sum())} clicks converted: there is nothing to learn about conversions."
        )
    return click, conversion


def _feedback(feedback: Feedback, n: int) -> Feedback:
    """Feedback on n clicks that is possible, in float64."""
    if n == 0:
        raise ValueError("There are no clicks to learn from.")
    converted = _zero_one(feedback.converted, n, "converted")
    delay, elapsed = (np.asarray(values, dtype=float) for values in feedback[1:])
    yes = converted == 1
    if not np.isfinite(elapsed).all() or not np.isfinite(delay[yes]).all():
        raise ValueError("A time is missing: each click needs its elapsed hours, and each conversion its delay.")
    if (elapsed < 0).any() or (delay[yes] < 0).any():
        raise ValueError("A delay or an elapsed time is negative: a conversion cannot come before its click.")
    if late := int((delay[yes] > elapsed[yes]).sum()):
        raise ValueError(f"{late} conversions come later than the time that has passed since their click.")
    return Feedback(converted, np.where(yes, delay, np.nan), elapsed)
