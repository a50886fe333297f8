"""Why this number? What a model reads in general, why one person got the prediction, and a test whether the reasons hold.

All three ask the same question: what does the model say if some columns of a row come from somebody else?

Taught in notebooks/03_ctr_modeling.ipynb, section on explanations.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import stats
from sklearn import inspection
from sklearn.base import BaseEstimator, ClassifierMixin

from adlib.click_metrics import log_losses, mean_interval

Groups = Mapping[str, Sequence[str]]


def permutation_importance(
    model, X: pd.DataFrame, y, groups: Groups | None = None, repeats: int = 5, rows: int | None = None, seed: int = 0
) -> pd.DataFrame:
    """How much log loss a fitted model loses when a column (or a group of columns) is dealt out among the rows.

    importance = mean log loss with the column shuffled − without. Columns that tell the same stand in for each other: each
    looks unimportant alone, so shuffle them together as a group. Computed by scikit-learn's function of this name.

    Parameters
    ----------
    model : fitted classifier with ``predict_proba``.
    X, y : rows (n, d) that it was not fitted on; clicks (n,) of 0 and 1, or true probabilities.
    groups : name -> columns that are shuffled together; without it each column is a group of its own.
    repeats, rows, seed : shuffles a group; rows drawn for each (all of them without it); random seed.

    Returns
    -------
    DataFrame by group, most important first: importance, low, high in nats a row; 95 % t-interval over the repeats, so it
    holds the luck of the shuffles and of the rows drawn, and not that of the training rows.

    Raises ValueError for a column that X does not have, one that stands in two groups, or fewer than two repeats.

    Breiman (2001), Random forests, Machine Learning 45. Taught in notebooks/03_ctr_modeling.ipynb, section on explanations.
    """
    if repeats < 2:
        raise ValueError(f"repeats={repeats}: an interval over the shuffles needs at least two.")
    groups, y, rng = _groups(X, groups), np.asarray(y, dtype=float), np.random.default_rng(seed)
    patchwork, found = _Patchwork(model, X, groups).fit(), []
    for repeat in range(
        repeats
    ):  # one shuffle a call: scikit-learn takes the unshuffled loss from all rows that it is given
        drawn = np.arange(len(X)) if rows is None else rng.choice(len(X), min(rows, len(X)), replace=False)
        origin = np.tile(drawn[:, None], (1, len(groups)))  # from which row each group of columns is taken
        options = {"scoring": _minus_log_loss, "n_repeats": 1, "random_state": seed * repeats + repeat}
        found.append(inspection.permutation_importance(patchwork, origin, y[drawn], **options).importances_mean)
    mean = np.mean(found, axis=0)
    reach = stats.t.ppf(0.975, repeats - 1) * np.std(found, axis=0, ddof=1) / np.sqrt(repeats)
    table = pd.DataFrame({"importance": mean, "low": mean - reach, "high": mean + reach}, index=list(groups))
    return table.sort_values("importance", ascending=False)


def shapley_values(
    predict: Callable,
    X: pd.DataFrame,
    background: pd.DataFrame,
    groups: Groups | None = None,
    rounds: int = 1,
    seed: int = 0,
) -> pd.DataFrame:
    """Share out f(x) − mean f(background) among the columns of each row: Shapley values by sampled orders.

    A row of the background turns into x, column by column, in a random order and then in the reverse one; a column is worth
    the mean of the steps that it makes. The values of a row sum to f(x) − mean f(background) exactly.

    Parameters
    ----------
    predict : function from rows like X, (k, d), to numbers (k,), best in logits, in which columns add up.
    X : (n, d) the rows to explain.
    background : (b, d) rows that stand for "not known"; b of 30 to 200 from the training rows.
    groups : name -> columns that come together; without it each column is a group of its own.
    rounds, seed : passes over the background (2 · rounds · b orders a row); random seed.

    Returns
    -------
    DataFrame (n, groups) in the unit of ``predict``, with the index of X.

    Raises ValueError as ``permutation_importance``, or for an empty background.

    Štrumbelj and Kononenko (2014), Knowledge and Information Systems 41; Lundberg and Lee (2017), SHAP, NeurIPS.
    Taught in notebooks/03_ctr_modeling.ipynb, section on explanations.
    """
    if len(background) == 0:
        raise ValueError("The background is empty: give rows that stand for what is not known, 30 to 200 of them.")
    groups, rng = _groups(X, groups), np.random.default_rng(seed)
    d, orders = len(groups), 2 * rounds * len(background)
    both = pd.concat([background, X])  # positions: first the background, then the rows to explain
    values = np.empty((len(X), d))
    for i in range(len(X)):
        half = rng.permuted(np.tile(np.arange(d), (orders // 2, 1)), axis=1)
        order = np.concatenate([half, half[:, ::-1]])
        place = np.argsort(order, axis=1)  # at which step each column comes
        start = np.tile(np.arange(len(background)), orders // len(background))
        ours = place[:, None, :] < np.arange(d + 1)[None, :, None]  # (orders, d + 1, d): taken from x so far
        origin = np.where(ours, len(background) + i, start[:, None, None]).reshape(-1, d)
        steps = np.diff(
            np.asarray(predict(_assemble(both, origin, groups)), dtype=float).reshape(orders, d + 1), axis=1
        )
        values[i] = np.take_along_axis(steps, place, axis=1).mean(0)
    return pd.DataFrame(values, index=X.index, columns=list(groups))


def deletion_curve(
    predict: Callable,
    X: pd.DataFrame,
    reasons: pd.DataFrame,
    background: pd.DataFrame,
    groups: Groups | None = None,
    most: int = 5,
    draws: int = 10,
    repeats: int = 500,
    seed: int = 0,
) -> pd.DataFrame:
    """Test reasons: delete the k columns that speak most for a row, and see if the prediction falls more than at random.

    To delete is to take the columns from rows of the background, the mean over all of them. The control deletes k random
    columns, ``draws`` times a row. Reasons that say nothing about the model fall as fast as the control.

    Parameters
    ----------
    predict, X, background, groups : as in ``shapley_values``; take other background rows than the reasons were made with.
    reasons : (n, groups) from ``shapley_values`` or any other method; large is a reason for a high prediction.
    most : largest k. draws : random deletions a row. repeats, seed : bootstrap draws over the rows; random seed.

    Returns
    -------
    DataFrame by k: top and random (mean fall of the prediction), extra (top − random), low, high (95 % over rows).

    Raises ValueError if the reasons do not fit X and the groups, or ``most`` exceeds their number.

    Samek et al. (2017), Evaluating the visualization of what a deep neural network has learned, IEEE TNNLS 28.
    Taught in notebooks/03_ctr_modeling.ipynb, section on explanations.
    """
    groups, rng = _groups(X, groups), np.random.default_rng(seed)
    if reasons.shape != (len(X), len(groups)) or list(reasons) != list(groups) or not 1 <= most <= len(groups):
        raise ValueError(f"Reasons of shape {reasons.shape} for {len(X)} rows and {len(groups)} columns, most={most}.")
    best = np.argsort(-reasons.to_numpy(), axis=1)
    chance = rng.permuted(np.tile(np.arange(len(groups)), (draws, len(X), 1)), axis=2)
    before, found = np.asarray(predict(X), dtype=float), {}
    for k in range(1, most + 1):
        top = before - _without(predict, X, best[:, :k], background, groups)
        other = before - np.mean([_without(predict, X, o[:, :k], background, groups) for o in chance], axis=0)
        extra = mean_interval(top - other, repeats=repeats, seed=seed)
        found[k] = [top.mean(), other.mean(), *extra]
    columns = ["top", "random", "extra", "low", "high"]
    return pd.DataFrame.from_dict(found, orient="index", columns=columns).rename_axis("k")


# -- one table from many rows ------------------------------------------------------------------------------------------------


class _Patchwork(ClassifierMixin, BaseEstimator):
    """A fitted model seen as a function of row numbers: (n, groups), from which row each group of columns is taken."""

    def __init__(self, model, X, groups):
        self.model, self.X, self.groups = model, X, groups

    def fit(self, X=None, y=None):
        """Nothing to learn: the model is fitted already."""
        self.classes_ = np.array([0, 1])
        return self

    def predict_proba(self, origin: np.ndarray) -> np.ndarray:
        """Probabilities (n, 2) of the rows that the origin puts together."""
        return self.model.predict_proba(_assemble(self.X, origin, self.groups))


def _minus_log_loss(patchwork: _Patchwork, origin: np.ndarray, y: np.ndarray) -> float:
    """Score for scikit-learn, larger is better; clicks may be probabilities, which its own scorers refuse."""
    return -log_losses(y, patchwork.predict_proba(origin)[:, 1]).mean()


def _assemble(source: pd.DataFrame, origin: np.ndarray, groups: Groups) -> pd.DataFrame:
    """Rows whose g-th group of columns comes from the row ``origin[:, g]`` of the source."""
    parts = {
        name: source[name].take(where).array
        for where, names in zip(origin.T, groups.values(), strict=True)
        for name in names
    }
    return pd.DataFrame(parts, columns=source.columns)


def _without(
    predict: Callable, X: pd.DataFrame, gone: np.ndarray, background: pd.DataFrame, groups: Groups
) -> np.ndarray:
    """Mean prediction (n,) of each row with the groups ``gone`` (n, k) taken from the rows of the background."""
    n, b = len(X), len(background)
    origin = np.tile(b + np.arange(n)[:, None, None], (1, b, len(groups)))
    rows = np.broadcast_to(np.arange(b)[None, :, None], (n, b, gone.shape[1]))
    np.put_along_axis(origin, np.broadcast_to(gone[:, None, :], rows.shape), rows, axis=2)
    both = pd.concat([background, X])
    return np.asarray(predict(_assemble(both, origin.reshape(n * b, -1), groups)), dtype=float).reshape(n, b).mean(1)


def _groups(X: pd.DataFrame, groups: Groups | None) -> dict[str, list[str]]:
    """The groups with each column of X in exactly one; columns that no group names form groups of their own."""
    groups = {name: list(columns) for name, columns in (groups or {}).items()}
    named = [column for columns in groups.values() for column in columns]
    if unknown := [str(c) for c in named if c not in X]:
        raise ValueError(f"The groups name columns that the table does not have: {', '.join(unknown)}.")
    if len(set(named)) < len(named):
        twice = sorted({str(c) for c in named if named.count(c) > 1})
        raise ValueError(f"These columns stand in two groups: {', '.join(twice)}. Put each into one.")
    return groups | {str(c): [c] for c in X if c not in named}
