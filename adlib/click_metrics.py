"""Measures that judge click probabilities: log loss with intervals, calibration, thresholds, and what a ranking of ads is worth.

Taught in notebooks/03_ctr_modeling.ipynb.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
from statsmodels.stats.proportion import proportion_confint


class Interval(NamedTuple):
    """An estimate and its interval, in the unit of the estimate."""

    estimate: float
    low: float
    high: float


def log_losses(y, p) -> np.ndarray:
    """Log loss −(y log p + (1 − y) log(1 − p)) of each row, in nats; y: (n,) in [0, 1], p: (n,) or one number.

    With the true probabilities as y this is the expected loss, free of the luck of single clicks.
    Raises ValueError for a missing probability or one outside 0 to 1.
    Taught in notebooks/03_ctr_modeling.ipynb, section 2.
    """
    y, p = np.asarray(y, dtype=float), np.clip(_probabilities(p), 1e-15, 1 - 1e-15)
    return -(y * np.log(p) + (1 - y) * np.log1p(-p))


def _probabilities(p) -> np.ndarray:
    p = np.asarray(p, dtype=float)
    if not ((p >= 0) & (p <= 1)).all():
        odd = p[~((p >= 0) & (p <= 1))].flat[0]
        raise ValueError(f"Probabilities must lie between 0 and 1; one of them is {odd}.")
    return p


def mean_interval(values, users=None, repeats: int = 500, level: float = 0.95, seed: int = 0) -> Interval:
    """Mean of values with a bootstrap interval that redraws whole users.

    Rows of one person are alike: redrawing single rows would promise too narrow an interval.

    Parameters
    ----------
    values : (n,) in any unit, one a row.
    users : (n,) whose row it is; without it every row is a person of its own.
    repeats, level, seed : bootstrap draws, coverage, random seed.

    Raises
    ------
    ValueError : no rows, a value that is not finite, or a row without a user.

    Efron (1979), Annals of Statistics 7. Taught in notebooks/03_ctr_modeling.ipynb, section 2.
    """
    values = np.asarray(values, dtype=float)
    if len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(
            f"{len(values)} values, {np.isfinite(values).sum()} of them finite: a mean needs finite numbers."
        )
    who = np.arange(len(values)) if users is None else pd.factorize(np.asarray(users))[0]
    if (who < 0).any():
        raise ValueError(f"Row {np.flatnonzero(who < 0)[0]} has no user: fill in or leave out rows without one.")
    total, rows = np.bincount(who, values), np.bincount(who)
    rng = np.random.default_rng(seed)
    draws = (np.bincount(rng.integers(len(rows), size=len(rows)), minlength=len(rows)) for _ in range(repeats))
    means = [(weight @ total) / (weight @ rows) for weight in draws]
    return Interval(float(values.mean()), *map(float, np.quantile(means, [(1 - level) / 2, (1 + level) / 2])))


def log_loss_interval(
    y, p, users=None, baseline=None, repeats: int = 500, level: float = 0.95, seed: int = 0
) -> Interval:
    """Mean log loss, or its difference to a baseline, in nats, with the interval of ``mean_interval``.

    Parameters
    ----------
    y, p : clicks (n,) and predicted probabilities (n,) or one number.
    users, repeats, level, seed : as in ``mean_interval``.
    baseline : other probabilities; the result is loss(p) − loss(baseline), below zero where p is better.

    Taught in notebooks/03_ctr_modeling.ipynb, section 2.
    """
    losses = log_losses(y, p) - (0.0 if baseline is None else log_losses(y, baseline))
    return mean_interval(losses, users, repeats, level, seed)


def gap_to_oracle(loss: float, base_loss: float, oracle_loss: float) -> float:
    """Share of what could be learnt that is still missing: (loss − oracle) / (base − oracle).

    0 is the truth itself, 1 no better than always saying the base rate; all three are mean log losses on the same rows.
    Raises ValueError if the oracle is not better than the base. Taught in notebooks/03_ctr_modeling.ipynb, section 2.
    """
    if not base_loss > oracle_loss:
        raise ValueError(
            f"The oracle's loss {oracle_loss:.5f} is not below the base's {base_loss:.5f}: nothing to learn."
        )
    return (loss - oracle_loss) / (base_loss - oracle_loss)


# -- calibration -----------------------------------------------------------------------------------------------------------


def reliability(y, p, bins: int = 10, level: float = 0.95) -> pd.DataFrame:
    """Compare predicted with observed click rates in at most ``bins`` bins of equally many rows; equal p share a bin.

    Returns
    -------
    DataFrame, one row a bin: predicted (mean), observed (click rate), low, high (Wilson 1927, JASA 22), clicks, rows.

    Taught in notebooks/03_ctr_modeling.ipynb, section on calibration.
    """
    frame = pd.DataFrame({"y": np.asarray(y), "p": _probabilities(p)})
    which = (frame["p"].rank(method="min") - 1) * bins // len(frame)
    out = frame.groupby(which).agg(
        predicted=("p", "mean"), observed=("y", "mean"), clicks=("y", "sum"), rows=("y", "size")
    )
    low, high = proportion_confint(out["clicks"], out["rows"], alpha=1 - level, method="wilson")
    columns = ["predicted", "observed", "low", "high", "clicks", "rows"]
    return out.assign(low=low, high=high)[columns].reset_index(drop=True).rename_axis("bin")


def expected_calibration_error(y, p, bins: int = 10) -> float:
    """Mean distance between predicted and observed click rates over bins of equally many rows, Σ_b n_b/n · |p̄_b − ȳ_b|.

    It is never zero on finitely many rows, not even for the truth: compare it with the value for clicks drawn from p itself.

    Parameters
    ----------
    y, p : clicks (n,) of 0 and 1, or true probabilities; predicted probabilities (n,).
    bins : how many; more bins see finer faults and more noise.

    Guo, Pleiss, Sun, Weinberger (2017), On calibration of modern neural networks, ICML; bins of equal mass as in Nixon et
    al. (2019), CVPR workshops. Taught in notebooks/03_ctr_modeling.ipynb, section on calibration.
    """
    frame = pd.DataFrame({"y": np.asarray(y, dtype=float), "p": np.asarray(p, dtype=float)})
    which = (frame["p"].rank(method="min") - 1) * bins // len(frame)
    means = frame.groupby(which).agg(p=("p", "mean"), y=("y", "mean"), n=("y", "size"))
    return float(np.average((means["p"] - means["y"]).abs(), weights=means["n"]))


# -- decisions ---------------------------------------------------------------------------------------------------------------


def threshold_table(y, p, thresholds) -> pd.DataFrame:
    """What becomes of probabilities once a threshold turns them into yes (p ≥ t) and no.

    accuracy = (TP + TN) / n, error rate = 1 − accuracy, precision = TP / (TP + FP), recall = TP / (TP + FN),
    F1 = 2 TP / (2 TP + FP + FN). Precision is missing where nobody gets a yes, F1 is then 0.

    Parameters
    ----------
    y, p : clicks (n,) of 0 and 1; predicted probabilities (n,).
    thresholds : (t,) numbers.

    Returns
    -------
    DataFrame indexed by threshold: said_yes (share of the rows), accuracy, error_rate, precision, recall, f1.

    Raises ValueError if y holds no click: recall has no meaning then. Taught in notebooks/03_ctr_modeling.ipynb, section
    on metrics.
    """
    y, p, t = np.asarray(y).astype(bool), np.asarray(p, dtype=float), np.asarray(thresholds, dtype=float)
    if not y.any():
        raise ValueError(f"None of the {len(y)} rows was clicked: recall and F1 have no meaning without a click.")
    order = np.sort(p), np.sort(p[y])
    yes, hit = (len(values) - np.searchsorted(values, t, side="left") for values in order)
    right = hit + (len(y) - y.sum()) - (yes - hit)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(yes > 0, hit / yes, np.nan)
    columns = {"said_yes": yes / len(y), "accuracy": right / len(y), "error_rate": 1 - right / len(y)}
    columns |= {"precision": precision, "recall": hit / y.sum(), "f1": 2 * hit / (yes + y.sum())}
    return pd.DataFrame(columns, index=pd.Index(t, name="threshold"))


def rank_slate(p, k: int, value=None) -> np.ndarray:
    """Columns of the k best ads of each request, best first: the k largest of p · value.

    For independent clicks the k ads with the largest expected value make the best slate of k.

    Parameters
    ----------
    p : (n, m) click probabilities of m candidates for each of n requests.
    k : places of the slate, 1 to m.
    value : what a click on each candidate is worth, (m,) or (n, m), e.g. in yuan; without it a click is worth 1.

    Raises ValueError if k is not between 1 and m. Taught in notebooks/03_ctr_modeling.ipynb, section on slates.
    """
    p = np.asarray(p, dtype=float)
    if p.ndim != 2 or not 1 <= k <= p.shape[1]:
        raise ValueError(f"A slate of {k} from candidates of shape {p.shape}: give (n, m) and k between 1 and m.")
    return np.argsort(-p * (1.0 if value is None else np.asarray(value)), axis=1, kind="stable")[:, :k]


def slate_value(slates: np.ndarray, truth, value=None) -> np.ndarray:
    """Expected value of each slate, Σ_{a in slate} truth_a · value_a: (n,), in clicks or in the unit of ``value``.

    Parameters
    ----------
    slates : (n, k) candidate columns, from ``rank_slate``.
    truth : (n, m) true click probabilities.
    value : as in ``rank_slate``.

    The oracle's slate minus a model's is the regret of the model. Taught in notebooks/03_ctr_modeling.ipynb, section on
    slates.
    """
    worth = np.asarray(truth, dtype=float) * (1.0 if value is None else np.asarray(value))
    return np.take_along_axis(worth, slates, axis=1).sum(1)
