"""Who are they? Profiles of shoppers from their behaviour, K-means groups of them, and what these groups are worth.

Taught in notebooks/02_audience_clustering.ipynb.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn.metrics import adjusted_rand_score, silhouette_score

# How much one event says about interest: a purchase costs a shopper more than a view. The ladder is a convention.
EVENT_WEIGHTS = {"view": 1.0, "favourite": 2.0, "cart": 3.0, "purchase": 4.0}
DAY_PARTS = ("night", "morning", "afternoon", "evening")  # six hours each, from midnight UTC
PRIOR = 5.0  # average behaviour that every shopper starts with, in event weights: two events make no extreme profile
STAGES = (
    "no order yet",
    "new",
    "loyal",
    "at risk",
    "lost",
)  # of the life cycle, in the order in which a customer meets them
MOST_VALUES = 20  # of a column with more values the heaviest are kept, the rest is "other"


class Clustering(NamedTuple):
    """What K-means found: labels (n,), centres (k, d), inertia J, and the history of J round by round."""

    labels: np.ndarray
    centres: np.ndarray
    inertia: float
    history: tuple[float, ...]


class Interval(NamedTuple):
    """An estimate with the two ends of its 95 % interval."""

    estimate: float
    low: float
    high: float


def features(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Describe each shopper by what the tables say that the shopper did.

    Shares are weighted sums, ``x_i = Σ_j w_ij v_j / Σ_j w_ij``: v_j describes what event j touched, w_ij is its weight
    (`EVENT_WEIGHTS`), and each shopper starts with a weight of `PRIOR` on the shop's average.
    Age, gender and region are left out on purpose: the profile is behaviour only.

    Parameters
    ----------
    tables : events are needed; products add categories and prices, impressions devices and clicks, users those who did
        nothing.

    Returns
    -------
    DataFrame (n, d), index user_id, nothing missing: ``log_…`` = log(1 + count), log(1 + days), log(1 + yuan);
        ``name=value`` = shares, 0–1; ``relative_price`` = mean of log(price / typical price of the category).

    Raises
    ------
    ValueError : if there is no events table or it is empty.

    Notes
    -----
    Taught in notebooks/02_audience_clustering.ipynb, section 1.
    """
    events = tables.get("events")
    if events is None or events.empty:
        raise ValueError("profiles of shoppers need an events table with at least one row, and there is none")
    ids = pd.concat([tables[name]["user_id"] for name in ("events", "users", "impressions") if name in tables])
    users = pd.Index(ids.dropna().unique(), name="user_id").sort_values()
    row, weight = users.get_indexer(events["user_id"]), events["event"].map(EVENT_WEIGHTS).fillna(1.0).to_numpy(float)
    day_part = (events["timestamp"].dt.hour // 6).map(dict(enumerate(DAY_PARTS))).rename("hour")
    parts = [
        _activity(tables, users),
        _average(events["event"], row, None, users),
        _average(day_part, row, weight, users),
    ]
    if "products" in tables and "product_id" in events:
        products = tables["products"].drop_duplicates("product_id").set_index("product_id")
        touched = products.reindex(events["product_id"])
        if "category" in products:
            parts.append(_average(touched["category"].astype(object), row, weight, users))
        if "price" in products:
            log_price = np.log1p(products["price"].astype(float)).rename("relative_price")
            kind = products["category"] if "category" in products else np.zeros(len(products))
            log_price -= log_price.groupby(kind).transform("mean")
            parts.append(_average(log_price.reindex(events["product_id"]), row, weight, users))
    if "impressions" in tables and "device" in tables["impressions"]:
        ads = tables["impressions"]
        parts.append(_average(ads["device"].astype(object), users.get_indexer(ads["user_id"]), None, users))
    return pd.concat(parts, axis=1)


def _activity(tables: Mapping[str, pd.DataFrame], users: pd.Index) -> pd.DataFrame:
    by_user, times = tables["events"].groupby("user_id"), tables["events"]["timestamp"]
    last = by_user["timestamp"].max().reindex(users).fillna(times.min())
    out = {"log_events": by_user.size(), "log_days_since": (times.max() - last) / pd.Timedelta(days=1)}
    if "amount" in tables["events"]:
        out["log_spend"] = rfm(tables["events"], users=users)["monetary"]
    if len(tables.get("impressions", ())):
        out["log_clicks"] = tables["impressions"].groupby("user_id")["click"].sum()
    return pd.DataFrame({name: np.log1p(column.reindex(users).fillna(0).astype(float)) for name, column in out.items()})


def _average(values: pd.Series, row: np.ndarray, weight: np.ndarray | None, users: pd.Index) -> pd.DataFrame:
    """Each shopper's weighted mean of a number, or of a category's one-hot vectors, drawn to the shop's mean."""
    known = values.notna().to_numpy()
    weight = np.ones(known.sum()) if weight is None else weight[known]
    values, row, n = values[known].reset_index(drop=True), row[known], len(users)
    if not pd.api.types.is_numeric_dtype(values):
        heaviest = pd.Series(weight).groupby(values).sum().nlargest(MOST_VALUES).index
        values = pd.get_dummies(values.where(values.isin(heaviest), "other"), prefix=values.name, prefix_sep="=")
    V = pd.DataFrame(values)
    total = np.array([np.bincount(row, weight * V[name], n) for name in V]).reshape(V.shape[1], n).T
    mass = np.bincount(row, weight, n)[:, None]
    mean = total.sum(0) / max(mass.sum(), 1e-12)
    return pd.DataFrame((total + PRIOR * mean) / (mass + PRIOR), index=users, columns=V.columns)


def rfm(events: pd.DataFrame, *, users: Iterable[str] | None = None, end: pd.Timestamp | None = None) -> pd.DataFrame:
    """Recency, frequency and monetary value of each shopper's purchases: direct marketing's oldest profile.

    Parameters
    ----------
    events : user_id, event, timestamp and, where known, amount (yuan); only purchases count.
    users : shoppers to list; default: all in `events`.
    end : the moment from which recency counts back; default: the last event.

    Returns
    -------
    DataFrame (n, 3), index user_id: recency (days since the last purchase; without one, since the first event of all),
        frequency (purchases), monetary (total yuan; 0 where amounts are unknown).

    Notes
    -----
    Hughes (1994), Strategic Database Marketing. Taught in notebooks/02_audience_clustering.ipynb, section 4.
    """
    users = pd.Index(pd.unique(pd.Series(list(events["user_id"] if users is None else users))), name="user_id")
    end = events["timestamp"].max() if end is None else end
    bought = events[events["event"] == "purchase"].groupby("user_id")
    days = (end - bought["timestamp"].max().reindex(users).fillna(events["timestamp"].min())) / pd.Timedelta(days=1)
    money = bought["amount"].sum() if "amount" in events else pd.Series(dtype=float)
    table = {"recency": days, "frequency": bought.size(), "monetary": money}
    return pd.DataFrame({name: column.reindex(users).fillna(0.0).astype(float) for name, column in table.items()})


def life_cycle(
    events: pd.DataFrame, *, users: Iterable[str] | None = None, end: pd.Timestamp | None = None, window: float = 30.0
) -> pd.Series:
    """Say in which stage of the customer life cycle each shopper is at one moment; everyone is in exactly one of `STAGES`.

    Last order at most `window` days ago: "new" if it was the first such time, that is if all orders lie in the window, else
    "loyal". Up to 2 · window days: "at risk". Longer: "lost". Without an order: "no order yet".

    Parameters
    ----------
    events : user_id, event, timestamp; purchases up to `end` count, later ones are not looked at.
    users : shoppers to list; default: all in `events`.
    end : the moment; default: the last event.
    window : days, about the time between two orders of a regular customer.

    Returns a Series (n,), index user_id, ordered categorical; a stage may be empty. Raises ValueError if window is not above 0.
    The thresholds are a convention. Taught in notebooks/02_audience_clustering.ipynb, section 9.
    """
    if not window > 0:
        raise ValueError(f"window must be a number of days above 0; it is {window}")
    users = pd.Index(pd.unique(pd.Series(list(events["user_id"] if users is None else users))), name="user_id")
    end = events["timestamp"].max() if end is None else end
    bought = events[(events["event"] == "purchase") & (events["timestamp"] <= end)].groupby("user_id")["timestamp"]
    first, last = ((end - time.reindex(users)) / pd.Timedelta(days=window) for time in (bought.min(), bought.max()))
    rules = [last.isna(), first <= 1, last <= 1, last <= 2]
    stage = np.select(rules, STAGES[:4], STAGES[4])
    return pd.Series(pd.Categorical(stage, STAGES, ordered=True), index=users, name="stage")


def kmeans(X: np.ndarray, k: int, seed: int = 0, *, start: np.ndarray | None = None, n_init: int = 10) -> Clustering:
    """Group the rows of X around k centres that make the squared distances small.

    Lloyd's rounds on ``J = Σ_k Σ_i w_ik ‖x_i − μ_k‖²``: assign each row to its nearest centre, move each centre to the
    mean of its rows, until no row changes (or 300 rounds are over); the best of `n_init` k-means++ starts. An empty
    group takes the row that is farthest from its centre.

    Parameters
    ----------
    X : array or DataFrame (n, d), finite numbers on comparable scales.
    k : number of groups, 1 ≤ k ≤ n.
    start : array (k, d), centres to start from instead of k-means++; one run only.

    Raises
    ------
    ValueError : if X is not a finite matrix, or it has fewer (different) rows than k.

    Notes
    -----
    Lloyd (1982), IEEE Trans. Inf. Theory 28; Arthur and Vassilvitskii (2007), k-means++.
    Taught in notebooks/02_audience_clustering.ipynb, section 2.
    """
    X = finite_matrix(X)
    if not 1 <= k <= len(X):
        raise ValueError(f"k must lie between 1 and the number of shoppers: k is {k}, and there are {len(X)} shoppers")
    if start is not None:
        start = finite_matrix(start)
        if start.shape != (k, X.shape[1]):
            raise ValueError(f"start must have the shape ({k}, {X.shape[1]}); it has {start.shape}")
        return _lloyd(X, start)
    rng = np.random.default_rng(seed)
    return min((_lloyd(X, _plus_plus(X, k, rng)) for _ in range(n_init)), key=lambda run: run.inertia)


def assign(X: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Return the number of the nearest centre (k, d) for each row of X (n, d): also for shoppers who came later.

    Taught in notebooks/02_audience_clustering.ipynb, section 2.
    """
    # ‖x − μ‖² = ‖x‖² − 2 x·μ + ‖μ‖², and the first term is the same for all centres
    return np.argmin((centres**2).sum(1) - 2 * np.asarray(X, float) @ centres.T, axis=1)


def _lloyd(X: np.ndarray, centres: np.ndarray, max_iter: int = 300) -> Clustering:
    k, history, labels, total = len(centres), [], np.full(len(X), -1), (X**2).sum()
    for _ in range(max_iter):
        old, labels = labels, assign(X, centres)
        if np.bincount(labels, minlength=k).min() == 0:
            empty = np.setdiff1d(np.arange(k), labels)
            labels[np.argsort(((X - centres[labels]) ** 2).sum(1))[::-1][: empty.size]] = empty
        if (labels == old).all():
            break
        member = np.eye(k)[labels]  # w_ik: (n, k)
        size = member.sum(0)
        centres = (member.T @ X) / np.maximum(size, 1)[:, None]
        history.append(float(total - size @ (centres**2).sum(1)))  # J, since each centre is the mean of its group
    return Clustering(labels, centres, float(((X - centres[labels]) ** 2).sum()), tuple(history))


def _plus_plus(X: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """Choose k rows as centres, each with a probability that grows with its squared distance to those chosen."""
    chosen = [int(rng.integers(len(X)))]
    distance = ((X - X[chosen[0]]) ** 2).sum(1)
    while len(chosen) < k:
        if not distance.any():
            raise ValueError(f"{k} groups need at least {k} different profiles; X has only {len(chosen)}")
        chosen.append(int(rng.choice(len(X), p=distance / distance.sum())))
        distance = np.minimum(distance, ((X - X[chosen[-1]]) ** 2).sum(1))
    return X[chosen]


def finite_matrix(X: np.ndarray) -> np.ndarray:
    """Return X as a float array (n, d), or raise ValueError naming what is missing, infinite or no matrix.

    Taught in notebooks/02_audience_clustering.ipynb, section 2.
    """
    values = np.asarray(X, dtype=float)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"X must be a matrix (shoppers, features) that is not empty; its shape is {values.shape}")
    if (bad := ~np.isfinite(values)).any():
        j = int(bad.any(0).argmax())
        name = X.columns[j] if isinstance(X, pd.DataFrame) else j
        raise ValueError(f"column {name!r} has {bad[:, j].sum()} missing or infinite values: fill or drop them first")
    return values


def choose_k(X: np.ndarray, ks: Iterable[int] = range(2, 10), seed: int = 0, *, n_boot: int = 10) -> pd.DataFrame:
    """Tabulate inertia J, silhouette (−1 to 1, on 2,000 rows at most) and stability (ARI; with low and high) for each k.

    Raises ValueError if a k is below 2 or above half the number of rows. Rousseeuw (1987), J. Comput. Appl. Math. 20.
    Taught in notebooks/02_audience_clustering.ipynb, section 3.
    """
    X, rows = finite_matrix(X), {}
    for k in ks:
        if k < 2:
            raise ValueError(f"a choice among numbers of groups starts at 2, not at {k}")
        found, steady = kmeans(X, k, seed), stability(X, k, seed, n_boot=n_boot)
        width = silhouette_score(X, found.labels, sample_size=min(2000, len(X)), random_state=seed)
        rows[k] = (found.inertia, width, *steady)
    names = ["inertia", "silhouette", "stability", "low", "high"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=names).rename_axis("k")


def stability(X: np.ndarray, k: int, seed: int = 0, *, n_boot: int = 20, n_init: int = 4) -> Interval:
    """Ask whether the groups come back: mean ARI between the groups of X and those of bootstrap samples of its rows.

    Each sample is clustered anew, its centres label all rows of X, and these labels are held against the reference. The
    interval is the middle 95 % of the `n_boot` agreements. Stable does not mean true. Raises ValueError like `kmeans`.
    von Luxburg (2010), Clustering stability: an overview. Taught in notebooks/02_audience_clustering.ipynb, section 3.
    """
    X, rng = finite_matrix(X), np.random.default_rng(seed)
    if 2 * k > len(X):
        raise ValueError(f"stability needs two shoppers for each group: k is {k}, and there are {len(X)} shoppers")
    reference, scores = kmeans(X, k, seed, n_init=n_init).labels, []
    same = np.unique(X, axis=0, return_inverse=True)[1].ravel()  # rows with the same number are the same profile
    for _ in range(n_boot):
        pick = rng.integers(len(X), size=len(X))
        while len(np.unique(same[pick])) < k:  # small or repetitive tables can draw too few different profiles
            pick = rng.integers(len(X), size=len(X))
        centres = kmeans(X[pick], k, int(rng.integers(2**31)), n_init=n_init).centres
        scores.append(adjusted_rand_score(reference, assign(X, centres)))
    return Interval(float(np.mean(scores)), *map(float, np.quantile(scores, [0.025, 0.975])))


def interval(score: Callable[..., float], *columns: np.ndarray, n_boot: int = 300, seed: int = 0) -> Interval:
    """Give score(*columns) a 95 % bootstrap interval: resample shoppers, the rows that all columns (n,) share.

    The percentiles are centred on the estimate: a shopper drawn twice agrees with itself, which lifts an ARI a little.
    Groupings are held fixed: what another run of K-means would change is not in the interval. Raises ValueError if the
    columns do not list the same two or more shoppers. Efron and Tibshirani (1993), An Introduction to the Bootstrap.
    Taught in notebooks/02_audience_clustering.ipynb, section 4.
    """
    columns = [np.asarray(column) for column in columns]
    if len(columns[0]) < 2 or len({len(column) for column in columns}) > 1:
        raise ValueError(f"columns must list the same two or more shoppers; they list {[len(c) for c in columns]}")
    rng, n, estimate = np.random.default_rng(seed), len(columns[0]), float(score(*columns))
    picks = (rng.integers(n, size=n) for _ in range(n_boot))
    draws = np.array([score(*(column[pick] for column in columns)) for pick in picks])
    low, high = np.quantile(draws, [0.025, 0.975]) - draws.mean() + estimate
    return Interval(estimate, min(float(low), estimate), max(float(high), estimate))
