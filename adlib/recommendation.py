"""What should the ad show? Popularity, ALS, LightFM and fused features behind one interface. Taught in notebooks/04_recommendation.ipynb.

The neural ones, SASRec and the GAN, are in ``adlib.sequential``; the protocol is in ``adlib.ranking``; what follows from a list in ``adlib.planning``.
"""

import warnings
from collections.abc import Callable

import implicit.als
import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from threadpoolctl import threadpool_limits

from adlib.ranking import BATCH, Interactions, K, top_k

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # without OpenMP it says so at import; here one thread is wanted anyway
    from lightfm import LightFM as _LightFM


class Recommender(BaseEstimator):
    """What all recommenders share: ``fit(interactions)``, ``scores(users)``, ``recommend(users, k)``.

    A child writes ``_fit(interactions)`` and ``_scores(users)``. Users without a history get the popular items.

    Attributes
    ----------
    interactions_ : what it was fitted to; popularity_ : (items,) users of each item.

    Taught in notebooks/04_recommendation.ipynb, section 2.
    """

    def fit(self, interactions: Interactions) -> "Recommender":
        """Learn from interactions; what is known of a user at fit time is what is recommended from. Raises ValueError if there are none."""
        if not len(interactions):
            raise ValueError("there is no interaction to learn from")
        self._remember(interactions)
        self._fit(interactions)
        return self

    def _remember(self, interactions: Interactions) -> None:
        self.interactions_, self.popularity_ = interactions, interactions.popularity
        self._active = np.bincount(interactions.user, minlength=len(interactions.users)) > 0

    def scores(self, users: np.ndarray) -> np.ndarray:
        """(n, items) float32, higher is better, for users (n,), positions in ``interactions.users``; comparable within a row only."""
        check_is_fitted(self, "interactions_")
        users = np.asarray(users)
        if len(users) and not (users.min() >= 0 and users.max() < len(self._active)):
            raise ValueError(
                f"users are positions from 0 to {len(self._active) - 1}; got {users.min()} to {users.max()}"
            )
        found = np.array(self._scores(users), np.float32)
        if not np.isfinite(found).all():
            raise ValueError(
                f"{type(self).__name__} gave scores that are not finite: a smaller learning rate, or cleaner features"
            )
        found[~self._active[users]] = self.popularity_
        return found

    def recommend(self, users: np.ndarray, k: int = K, *, exclude_seen: bool = True, batch: int = BATCH) -> np.ndarray:
        """(n, k) items, best first, for users (n,), both as positions; memory is bounded by `batch` rows of scores.

        Raises ValueError if a user has fewer than k unseen items.
        """
        users, lists = np.asarray(users), np.empty((len(users), k), int)
        seen = np.diff(self.interactions_.matrix.indptr)[users] if exclude_seen else np.zeros(1, int)
        if (fewest := len(self.popularity_) - seen.max(initial=0)) < k:
            raise ValueError(f"a list of {k} is too long: a user has only {fewest} candidates left")
        for start in range(0, len(users), batch):
            some = users[start : start + batch]
            scores = self.scores(some)
            if exclude_seen:
                scores[self.interactions_.matrix[some].nonzero()] = -np.inf
            lists[start : start + batch] = top_k(scores, k)
        return lists


class Popularity(Recommender):
    """The baseline: for everybody the items that most users touched. Taught in notebooks/04_recommendation.ipynb, section 2."""

    def _fit(self, interactions: Interactions) -> None:
        pass

    def _scores(self, users: np.ndarray) -> np.ndarray:
        return np.tile(self.popularity_, (len(users), 1))


class ALS(Recommender):
    """Matrix factorisation of implicit feedback by alternating least squares, by the library `implicit`.

    min Σ_ui c_ui (p_ui − x_u·y_i)² + λ (Σ‖x_u‖² + Σ‖y_i‖²), with p = 1 and the confidence c = α · weight where the
    user touched the item, p = 0 and c = 1 where not.

    Parameters
    ----------
    factors, regularization, alpha, iterations : length of a vector, λ, α, rounds; seed : of the first vectors.

    Hu, Koren, Volinsky (2008), ICDM. Taught in notebooks/04_recommendation.ipynb, section 3.
    """

    def __init__(self, factors=32, *, regularization=5.0, alpha=1.0, iterations=12, seed=0):
        self.factors, self.regularization, self.alpha = factors, regularization, alpha
        self.iterations, self.seed = iterations, seed

    def _fit(self, interactions: Interactions) -> None:
        with threadpool_limits(1, "blas"):  # the library's own threads are quicker, and it warns otherwise
            model = implicit.als.AlternatingLeastSquares(
                self.factors,
                self.regularization,
                self.alpha,
                iterations=self.iterations,
                random_state=self.seed,
                num_threads=1,
            )
            model.fit(interactions.matrix, show_progress=False)
        self.user_vectors_, self.item_vectors_ = np.asarray(model.user_factors), np.asarray(model.item_factors)

    def _scores(self, users: np.ndarray) -> np.ndarray:
        return self.user_vectors_[users] @ self.item_vectors_.T


class LightFM(Recommender):
    """Factorisation with side features, trained to rank (WARP), by the library `lightfm` (from ``lightfm-next``).

    score = x_u·y_i + b_u + b_i, where x and y are sums of the vectors of a user's and an item's features. WARP draws items until one
    scores above a touched one, and the step grows with how soon that happens.

    Parameters
    ----------
    factors, epochs, learning_rate : length of a vector, passes, rate of Adagrad; regularization : on item and user vectors.
    item_features, user_features : (items, f) and (users, f) finite numbers (DataFrame, array or sparse), added to one own feature each.
    seed : decides everything; one thread, since two make it random.

    Raises
    ------
    ValueError : at fit, for features that are not finite or not one row an item (a user).

    Kula (2015), arXiv 1507.08439; Weston, Bengio, Usunier (2011), IJCAI. Taught in notebooks/04_recommendation.ipynb, section 3.
    """

    def __init__(
        self,
        factors=32,
        *,
        epochs=15,
        learning_rate=0.05,
        regularization=0.0,
        item_features=None,
        user_features=None,
        seed=0,
    ):
        self.factors, self.epochs, self.learning_rate, self.seed = factors, epochs, learning_rate, seed
        self.regularization, self.item_features, self.user_features = regularization, item_features, user_features

    def _fit(self, interactions: Interactions) -> None:
        items = _with_identity(self.item_features, len(interactions.items), "item")
        users = _with_identity(self.user_features, len(interactions.users), "user")
        model = _LightFM(
            self.factors,
            loss="warp",
            learning_rate=self.learning_rate,
            item_alpha=self.regularization,
            user_alpha=self.regularization,
            random_state=self.seed,
        )
        touched = (interactions.matrix > 0).astype(np.float32).tocoo()
        model.fit(touched, user_features=users, item_features=items, epochs=self.epochs, num_threads=1)
        self._item_bias, self.item_vectors_ = model.get_item_representations(items)
        _, self.user_vectors_ = model.get_user_representations(users)  # a user's bias does not change the order

    def _scores(self, users: np.ndarray) -> np.ndarray:
        return self.user_vectors_[users] @ self.item_vectors_.T + self._item_bias


def _with_identity(features, n: int, what: str) -> sparse.csr_matrix:
    """One column for each row itself, then its features, scaled so that a row of features weighs as much as the row itself."""
    own = sparse.identity(n, dtype=np.float32, format="csr")
    if features is None:
        return own
    values = sparse.csr_matrix(finite(features, n, what, sparse_too=True), dtype=np.float32)
    size = np.maximum(np.asarray(abs(values).sum(1)).ravel(), 1e-9)
    return sparse.hstack([own, sparse.diags((1 / size).astype(np.float32)) @ values], format="csr")


def finite(vectors, n: int, what: str, sparse_too: bool = False) -> np.ndarray:
    """Return vectors (n, d) as they are; ValueError, naming `what` they describe, unless they are n finite rows."""
    if sparse_too and sparse.issparse(vectors):
        values, shape = vectors.data, vectors.shape
    else:
        vectors = values = np.asarray(
            vectors.to_numpy(float) if isinstance(vectors, pd.DataFrame) else vectors, np.float32
        )
        shape = values.shape
    if len(shape) != 2 or shape[0] != n:
        raise ValueError(f"{what} vectors must have one row for each of the {n} {what}s; their shape is {shape}")
    if bad := int((~np.isfinite(values)).sum()):
        raise ValueError(f"{what} vectors hold {bad} numbers that are missing or infinite: fill them first")
    return vectors


class Fused(Recommender):
    r"""Fused features of items and users: :math:`W = X A Y^\top`, :math:`R = f(X, Y, W)`.

    Both sides are brought to `dim` principal components of variance 1. With `learn`, the bridge A (dim, dim) is the ridge solution of
    r_ui − r̄_i ≈ x_i A y_u (r = 1 where touched), and f adds r̄_i, the share of users who touched the item. Without, A = I and f is W alone: the
    plain product X Yᵀ, which needs both in one space.

    Parameters
    ----------
    item_vectors : (items, d) finite; user_vectors : (users, e) finite, or None: the mean vector of the items that a user touched.
    dim : components kept (fewer where the vectors have fewer). penalty : of the ridge, in observations. learn : fit A, or not.

    Raises
    ------
    ValueError : at fit, for vectors that are not finite or not one row an item (a user); without `learn`, for user vectors of another length.

    Taught in notebooks/04_recommendation.ipynb, section 4.
    """

    def __init__(self, item_vectors, user_vectors=None, *, dim=48, penalty=30.0, learn=True):
        self.item_vectors, self.user_vectors = item_vectors, user_vectors
        self.dim, self.penalty, self.learn = dim, penalty, learn

    def _fit(self, interactions: Interactions) -> None:
        X = np.asarray(finite(self.item_vectors, len(interactions.items), "item"), np.float32)
        touched = (interactions.matrix > 0).astype(np.float32)
        n = np.maximum(np.diff(touched.indptr), 1)[:, None]
        Y = touched @ X / n if self.user_vectors is None else finite(self.user_vectors, touched.shape[0], "user")
        if not self.learn and np.shape(Y)[1] != X.shape[1]:
            raise ValueError(
                f"X Yᵀ needs one space: items have {X.shape[1]} numbers, users {np.shape(Y)[1]}; use learn=True"
            )
        self._project = _whitener(X, self.dim)
        self._x, self._base = self._project(X), np.zeros(len(X), np.float32)
        self._y = self._project(Y) if not self.learn else _whitener(np.asarray(Y, np.float32), self.dim)(Y)
        if self.learn:
            self._base = (self.popularity_ / len(n)).astype(np.float32)
            self._y = self._y @ self._bridge(touched)

    def _bridge(self, touched: sparse.csr_matrix) -> np.ndarray:
        """Aᵀ, (user components, item components): two ridge regressions, one a side; what nobody touched says nothing about taste."""
        known, active = self.popularity_ > 0, self._active
        x, y = self._x[known], self._y[active]
        residual = y.T @ touched[active][:, known] - np.outer(y.sum(0), self._base[known])
        left = np.linalg.solve(y.T @ y + self.penalty * np.eye(y.shape[1]), residual @ x)
        return np.linalg.solve(x.T @ x + self.penalty * len(x) / len(y) * np.eye(x.shape[1]), left.T).T.astype(
            np.float32
        )

    def _scores(self, users: np.ndarray) -> np.ndarray:
        tie = 1e-6 * self.popularity_ / max(self.popularity_.max(), 1)  # where vectors say nothing, the popular first
        return self._base + self._y[users] @ self._x.T + tie

    def new_scores(self, users: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        """(n, m) W of users (n,) for m items that were not there at fit, by their vectors (m, d). Taught in section 6."""
        check_is_fitted(self, "interactions_")
        return self._y[np.asarray(users)] @ self._project(finite(vectors, len(vectors), "item")).T


def _whitener(vectors: np.ndarray, dim: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function to at most `dim` principal components of variance 1; without any variance, to one component of zeros."""
    mean = vectors.mean(0)
    _, size, axes = np.linalg.svd(vectors - mean, full_matrices=False)
    size = size[:dim] / np.sqrt(max(len(vectors) - 1, 1))
    keep = size > max(1e-5 * size[0], 1e-6)
    axes = axes[: len(size)][keep] / size[keep, None] if keep.any() else np.zeros((1, len(mean)))
    return lambda other: ((np.asarray(other, np.float32) - mean) @ axes.T).astype(np.float32)
