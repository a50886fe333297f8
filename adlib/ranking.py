"""One protocol for all recommenders: who touched what, what is held out, how a list is scored. Taught in notebooks/04_recommendation.ipynb."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse

K = 10  # length of a list where nothing else is said
BATCH = 1024  # users whose scores are in memory at once


@dataclass(frozen=True)
class Interactions:
    """Pairs of user and item in order of time, each pair once.

    Attributes
    ----------
    users, items : Index of all ids, also of those without an interaction; user, item : (n,) int, positions in them.
    weight : (n,) float, how much the pair says (all its events together); sets confidence, never order.
    """

    users: pd.Index
    items: pd.Index
    user: np.ndarray
    item: np.ndarray
    weight: np.ndarray

    @classmethod
    def of(
        cls,
        events: pd.DataFrame,
        *,
        user: str = "user_id",
        item: str = "product_id",
        time: str = "timestamp",
        weight: np.ndarray | None = None,
        users: Iterable | None = None,
        items: Iterable | None = None,
    ) -> "Interactions":
        """Make them from an events table; a pair that occurs again counts as of its first time, with its weights added up.

        `users` and `items` may name more than the events do: who has done nothing yet, what nobody has touched yet.
        Raises ValueError for missing columns, ids, times or weights, for no row at all, and for ids that `users` or `items` lack.
        Taught in notebooks/04_recommendation.ipynb, section 1.
        """
        lacking = [name for name in (user, item, time) if name not in events]
        if lacking or events.empty:
            raise ValueError(
                f"interactions need rows with {user}, {item} and {time}; missing: {lacking or 'every row'}"
            )
        if events[[user, item, time]].isna().any(axis=None):
            raise ValueError(f"a row without {user}, {item} or {time} cannot be placed: drop such rows first")
        frame = events[[user, item, time]].assign(weight=1.0 if weight is None else np.asarray(weight, float))
        if not (np.isfinite(frame["weight"]) & (frame["weight"] > 0)).all():
            raise ValueError("weights of interactions must be finite and above zero")
        frame = frame.sort_values(time, kind="stable")
        pairs = frame.groupby([user, item], sort=False, observed=True)["weight"].sum().reset_index()
        ids = [
            pd.Index(pd.unique(pd.Series(list(frame[n].unique() if g is None else g))))
            for n, g in ((user, users), (item, items))
        ]
        codes = [index.get_indexer(pairs[name]) for name, index in zip((user, item), ids, strict=True)]
        for name, index, code in zip((user, item), ids, codes, strict=True):
            if (code < 0).any():
                raise ValueError(
                    f"{name} {pairs[name][code < 0].iloc[0]!r} has events but is not in the list of {len(index)} given"
                )
        return cls(*ids, *codes, pairs["weight"].to_numpy())

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: np.ndarray) -> "Interactions":
        """The same users and items with some of the pairs, in the order given by `rows`."""
        return Interactions(self.users, self.items, self.user[rows], self.item[rows], self.weight[rows])

    def shuffled(self, seed: int = 0) -> "Interactions":
        """The negative control: deal the items out at random, so that popularity stays and taste is gone."""
        item = np.random.default_rng(seed).permutation(self.item)
        return Interactions(self.users, self.items, self.user, item, self.weight)

    @cached_property
    def matrix(self) -> sparse.csr_matrix:
        """(users, items) weights as float32; a pair that a shuffle dealt out twice counts once."""
        shape = len(self.users), len(self.items)
        found = sparse.csr_matrix((self.weight.astype(np.float32), (self.user, self.item)), shape)
        found.sum_duplicates()
        return found

    @cached_property
    def popularity(self) -> np.ndarray:
        """(items,) how many users touched each item."""
        return np.bincount(self.item, minlength=len(self.items)).astype(float)

    @cached_property
    def sequences(self) -> list[np.ndarray]:
        """For each user the items in order of time."""
        order = np.argsort(self.user, kind="stable")
        return np.split(self.item[order], np.cumsum(np.bincount(self.user, minlength=len(self.users)))[:-1])


class Split(NamedTuple):
    """Interactions to learn from, users (m,) and for each the item (m,) that was held out."""

    train: Interactions
    user: np.ndarray
    target: np.ndarray


def leave_last_out(interactions: Interactions, minimum: int = 3) -> Split:
    """Hold out the last item of every user with at least `minimum` items; called again on ``train``, it gives a validation split.

    Raises ValueError if nobody has that many. Taught in notebooks/04_recommendation.ipynb, section 1.
    """
    n = np.bincount(interactions.user, minlength=len(interactions.users))
    if n.max() < minimum:
        raise ValueError(
            f"nobody has {minimum} different items, so no last one can be held out (the most is {n.max()})"
        )
    last = np.zeros(len(interactions.users), int)
    last[interactions.user] = np.arange(len(interactions))  # rows are in order of time, so the last one stays
    held = np.flatnonzero(n >= minimum)
    keep = np.setdiff1d(np.arange(len(interactions)), last[held])
    return Split(interactions.take(keep), held, interactions.item[last[held]])


def top_k(scores: np.ndarray, k: int = K) -> np.ndarray:
    """(n, k) columns of the k highest scores (n, items) of each row, best first, equal scores in order of column.

    Raises ValueError unless 1 ≤ k ≤ items. Taught in notebooks/04_recommendation.ipynb, section 2.
    """
    n_items = scores.shape[1]
    if not 1 <= k <= n_items:
        raise ValueError(f"a list of {k} cannot be taken from {n_items} items")
    best = np.sort(np.argpartition(-scores, k - 1, axis=1)[:, :k], axis=1)
    order = np.argsort(-np.take_along_axis(scores, best, 1), axis=1, kind="stable")
    return np.take_along_axis(best, order, 1)


def ranking_metrics(lists: np.ndarray, target: np.ndarray) -> pd.DataFrame:
    """Score lists (n, k) against the one held-out item (n,) of each user.

    With r the rank of the item: recall = [r ≤ k], precision = recall / k, ndcg = [r ≤ k] / log2(1 + r), mrr = [r ≤ k] / r.

    Returns
    -------
    DataFrame (n, 4): one row a user, all between 0 and 1. Average over users.

    Raises
    ------
    ValueError : if lists and targets differ in length.

    Notes
    -----
    Järvelin and Kekäläinen (2002), ACM TOIS 20. Taught in notebooks/04_recommendation.ipynb, section 2.
    """
    lists, target = np.asarray(lists), np.asarray(target)
    if len(lists) != len(target):
        raise ValueError(f"{len(lists)} lists do not match {len(target)} held-out items")
    hit = lists == target[:, None]
    found, rank = hit.any(1), hit.argmax(1) + 1
    columns = {"precision": found / lists.shape[1], "recall": found * 1.0}
    return pd.DataFrame(columns | {"ndcg": found / np.log2(1 + rank), "mrr": found / rank})


def list_metrics(lists: np.ndarray, popularity: np.ndarray) -> dict[str, float]:
    """Describe what lists (n, k) show, whoever likes it: the side of a recommender that accuracy hides.

    Returns
    -------
    coverage : share of the items that stand in at least one list, 0–1.
    novelty : mean of −log2(share of all interactions that fall on the item), bits; more is rarer.
    popularity_bias : mean popularity of the listed items over that of an item drawn at random; 1 is neutral.

    Raises
    ------
    ValueError : if nothing was ever touched.

    Notes
    -----
    Castells, Hurley, Vargas (2022), Recommender Systems Handbook. Taught in notebooks/04_recommendation.ipynb, section 2.
    """
    popularity = np.asarray(popularity, float)
    if not popularity.sum():
        raise ValueError("popularity is zero everywhere: count the interactions first")
    share = (popularity + 1) / (popularity + 1).sum()  # one more each, or an untouched item were infinitely novel
    coverage = len(np.unique(lists)) / len(popularity)
    bias = popularity[lists].mean() / popularity.mean()
    return {"coverage": coverage, "novelty": float(-np.log2(share[lists]).mean()), "popularity_bias": float(bias)}


class Interval(NamedTuple):
    """An estimate with the two ends of its 95 % interval."""

    estimate: float
    low: float
    high: float


def interval(
    values: Sequence[float], other: Sequence[float] | None = None, *, n_boot: int = 1000, seed: int = 0
) -> Interval:
    """Mean over users with a 95 % bootstrap interval; with `other`, the mean of the differences user by user.

    Users are drawn with replacement. What another training run would change is not in the interval.
    Raises ValueError if the two do not list the same users, or list none. Efron (1979), Annals of Statistics 7.
    Taught in notebooks/04_recommendation.ipynb, section 2.
    """
    values = np.asarray(values, float)
    if other is not None:
        if len(values) != len(other):
            raise ValueError(f"a paired comparison needs the same users: {len(values)} against {len(other)}")
        values = values - np.asarray(other, float)
    if not len(values):
        raise ValueError("there are no users to average over")
    rng = np.random.default_rng(seed)
    draws = np.array([values[rng.integers(len(values), size=len(values))].mean() for _ in range(n_boot)])
    return Interval(float(values.mean()), *map(float, np.quantile(draws, [0.025, 0.975])))


def regret(lists: np.ndarray, truth: np.ndarray, seen: sparse.csr_matrix | None = None) -> np.ndarray:
    """Share of the clicks that lists miss against the best lists there could be, user by user.

    regret_u = 1 − Σ_{i ∈ list_u} p_ui / Σ_{i ∈ best_u} p_ui, with best_u the k items of highest p_ui among those not yet seen.

    Parameters
    ----------
    lists : (n, k) items; truth : (n, items) true click probabilities; seen : (n, items), nonzero where an item is no candidate.

    Returns
    -------
    (n,) : 0 is the oracle. Below 0 only if a list holds what is no candidate.

    Raises
    ------
    ValueError : if the rows do not match.

    Notes
    -----
    Taught in notebooks/04_recommendation.ipynb, section 3.
    """
    if not len(lists) == len(truth) or (seen is not None and seen.shape != truth.shape):
        raise ValueError(f"{len(lists)} lists do not match the truth of shape {truth.shape}")
    lists, candidates = np.asarray(lists), np.array(truth, float)
    if seen is not None:
        candidates[seen.nonzero()] = 0
    best = np.take_along_axis(candidates, top_k(candidates, lists.shape[1]), 1).sum(1)
    return 1 - np.take_along_axis(np.asarray(truth, float), lists, 1).sum(1) / best
