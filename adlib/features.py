"""From tables to what a click model reads: features of an impression, a split by time, and numbers for a network.

Taught in notebooks/03_ctr_modeling.ipynb, sections 1 and 4.
"""

import warnings
from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, TransformerMixin

UNSEEN, MISSING, KNOWN = 0, 1, 2  # the first slots of every categorical field; the known values start at KNOWN
LOOKUPS = (  # table, its key, what an impression learns from it
    ("users", "user_id", ("age_band", "gender", "region", "spend_level")),
    ("creatives", "creative_id", ("product_id", "appeal", "tone", "origin", "words")),
    ("products", "product_id", ("brand", "category", "colour", "material", "log_price")),
)


class Split(NamedTuple):
    """Row positions of the parts of a split, earliest first."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def impression_features(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Describe each impression by what was known at its time: who, which ad, where, when, and what came before.

    Takes what is there of users, creatives, products and events. Counts look strictly backwards and are log(1 + count):
    how often this person was shown this ad, viewed, liked, put into the cart and bought anything, viewed this product and
    viewed its category. What followed (click, conversion, revenue, cost) and how the ad was chosen (propensity) stay out.

    Returns
    -------
    DataFrame (n, d) with the order and index of ``tables["impressions"]``; text columns are categorical.

    Taught in notebooks/03_ctr_modeling.ipynb, section 1.
    """
    shown = tables["impressions"]
    names = [c for c in ("user_id", "creative_id", "product_id", "position", "channel", "device") if c in shown]
    frame = shown[names].astype("category")
    frame["hour"] = shown["timestamp"].dt.hour.astype("category")
    frame["weekday"] = shown["timestamp"].dt.day_of_week.astype("category")
    for table, key, columns in LOOKUPS:
        if table in tables and key in frame:
            frame = _look_up(frame, tables[table], key, columns)
    now = frame[[c for c in ("user_id", "creative_id", "product_id", "category") if c in frame]].astype("str")
    now["timestamp"] = shown["timestamp"]
    for name, keys, log in _histories(now, tables):
        if set(keys) <= set(now) and set(keys) <= set(log):
            frame[name] = _count_before(now, log, keys)
    return frame


def _histories(now: pd.DataFrame, tables: dict[str, pd.DataFrame]):
    """Yield (name, keys, log) of each count of what came before."""
    yield "past_showings", ["user_id", "creative_id"], now
    if "events" not in tables:
        return
    events = tables["events"]
    for event in ("view", "favourite", "cart", "purchase"):
        yield f"past_{event}s", ["user_id"], events[events["event"] == event]
    views = events[events["event"] == "view"]
    yield "past_product_views", ["user_id", "product_id"], views
    if "category" in now and "product_id" in events:
        of = tables["products"].drop_duplicates("product_id").set_index("product_id")["category"].astype("str")
        yield "past_category_views", ["user_id", "category"], views.assign(category=views["product_id"].map(of))


def _look_up(frame: pd.DataFrame, source: pd.DataFrame, key: str, columns: tuple[str, ...]) -> pd.DataFrame:
    """Add columns of a table by key: each id is looked up once and then spread by its code."""
    source = source.drop_duplicates(key).set_index(key)
    if "headline" in source:
        text = source.reindex(columns=["headline", "body"]).fillna("").agg(" ".join, axis=1)
        source = source.assign(words=text.str.split().str.len())
    if "price" in source:
        source = source.assign(log_price=np.log1p(source["price"]))
    row = np.append(source.index.get_indexer(frame[key].cat.categories), -1)[frame[key].cat.codes]
    for name in (name for name in columns if name in source):
        values = source[name].astype(float if is_numeric(source[name]) else "category")
        frame[name] = values.reset_index(drop=True).reindex(row).set_axis(frame.index)
    return frame


def _count_before(now: pd.DataFrame, log: pd.DataFrame, keys: list[str]) -> np.ndarray:
    """log(1 + rows of the log with equal keys in an earlier second), one number a row of ``now``."""
    n = len(now)
    both = pd.concat([now[[*keys, "timestamp"]], log[[*keys, "timestamp"]]], ignore_index=True)
    second = ((both["timestamp"] - both["timestamp"].min()) // pd.Timedelta(seconds=1)).to_numpy(np.int64)
    group = np.zeros(len(both), dtype=np.int64)
    for key in keys:
        code, values = pd.factorize(both[key])
        group = group * (len(values) + 1) + code + 1
    begin = group * (second.max() + 1)
    happened, end = np.sort((begin + second)[n:]), (begin + second)[:n]
    order = np.argsort(end)  # searching in order is kind to the processor's cache
    count = np.empty(n)
    count[order] = np.searchsorted(happened, end[order]) - np.searchsorted(happened, begin[:n][order])
    return np.log1p(count)


def time_split(frame: pd.DataFrame, share=(0.7, 0.1, 0.2), column: str = "timestamp") -> Split:
    """Split rows by time, so that a model learns from the past and is judged on the future.

    Parameters
    ----------
    frame : (n, …) with a time column; rows of one moment stay together.
    share : parts for training, validation and test; they sum to one.

    Raises
    ------
    ValueError : a missing time, shares that do not sum to one, or a part that is left without rows.

    Taught in notebooks/03_ctr_modeling.ipynb, section 1.
    """
    if len(share) != 3 or min(share) <= 0 or abs(sum(share) - 1) > 1e-9:
        raise ValueError(f"share={share}: give three positive numbers that sum to one.")
    if lost := int(frame[column].isna().sum()):
        raise ValueError(f"Column '{column}' lacks the time of {lost} rows; clean the table first.")
    times = frame[column].astype("int64").to_numpy()
    cuts = np.sort(times)[[int(len(times) * s) for s in np.cumsum(share)[:2]]] if len(times) else times
    part = np.searchsorted(cuts, times, side="right")
    split = Split(*(np.flatnonzero(part == k) for k in range(3)))
    if empty := [name for name, rows in split._asdict().items() if len(rows) == 0]:
        raise ValueError(f"The {len(times)} rows span too few moments: nothing is left for {' and '.join(empty)}.")
    return split


# -- a table as numbers ---------------------------------------------------------------------------------------------------


class Encoder(TransformerMixin, BaseEstimator):
    """Turn a table into integer slots (categorical columns) and robustly scaled numbers (numeric columns).

    Each categorical column owns a run of slots in one stacked table: one for values that training did not hold, one for
    missing values, then the known ones. A number becomes (x − median) / interquartile range, clipped to ±5; a missing one
    becomes 0, the median, and is flagged in a column of its own if training had such rows.

    Parameters
    ----------
    min_count : values seen in fewer rows share the first slot, which so learns what a rare value is like.
    """

    def __init__(self, min_count: int = 1):
        self.min_count = min_count

    def fit(self, X: pd.DataFrame, y=None) -> "Encoder":
        """Learn the values of each categorical column, and centre and scale of each numeric one; X: (n, d)."""
        self.feature_names_in_, self.n_features_in_ = np.array(X.columns, dtype=object), X.shape[1]
        for name in X.columns[X.isna().all()]:
            warnings.warn(f"Column '{name}' holds no value at all: the model learns nothing from it.", stacklevel=3)
        self.numeric_ = [name for name in X if is_numeric(X[name])]
        counts = {name: _texts(X[name]).value_counts(sort=False) for name in X if name not in self.numeric_}
        self.values_ = {name: pd.Index(c.index[c >= self.min_count].astype(object)) for name, c in counts.items()}
        self.offsets_ = np.cumsum([0] + [KNOWN + len(values) for values in self.values_.values()])
        numbers = _numbers(X, self.numeric_)
        self.flagged_ = np.isnan(numbers).any(axis=0)
        self.centre_, self.scale_ = _centre_and_scale(numbers)
        return self

    def transform(self, X: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        """Encode a table with the columns of ``fit``, in any order: slots (n, fields) int32, numbers (n, m) float32."""
        known = list(self.feature_names_in_)
        missing, new = [str(c) for c in known if c not in X], [str(c) for c in X if c not in known]
        if missing or new:
            found = f"missing: {', '.join(missing) or 'none'}; not known: {', '.join(new) or 'none'}"
            raise ValueError(f"The columns differ from those the model was fitted on ({found}).")
        slots = np.empty((len(X), len(self.values_)), dtype=np.int32)
        for j, (name, values) in enumerate(self.values_.items()):
            texts = _texts(X[name])
            at = values.get_indexer(texts.cat.categories.astype(object))
            lookup = np.append(np.where(at < 0, UNSEEN, at + KNOWN), MISSING)  # a missing value has code −1: the last
            slots[:, j] = self.offsets_[j] + lookup[texts.cat.codes]
        numbers = _numbers(X, self.numeric_)
        scaled = np.nan_to_num(np.clip((numbers - self.centre_) / self.scale_, -5, 5))
        return slots, np.hstack([scaled, np.isnan(numbers[:, self.flagged_])]).astype(np.float32)


def is_numeric(column: pd.Series) -> bool:
    """Say whether a column holds numbers (truth values count as categories); a column of times is an error."""
    if pd.api.types.is_datetime64_any_dtype(column):
        raise ValueError(f"Column '{column.name}' holds times: turn it into hour, weekday or an age in days first.")
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def _texts(column: pd.Series) -> pd.Series:
    """The column as categories of text; missing values stay missing."""
    column = column.astype("category")
    return column.cat.rename_categories(column.cat.categories.map(str))


def _numbers(X: pd.DataFrame, names: list[str]) -> np.ndarray:
    """Numeric columns (n, m) in float64; a missing number is NaN, infinity an error that names column and row."""
    out = np.empty((len(X), len(names)))
    for j, name in enumerate(names):
        if not is_numeric(X[name]):
            raise ValueError(f"Column '{name}' held numbers when the model was fitted; now it holds {X[name].dtype}.")
        out[:, j] = X[name].to_numpy(dtype=float, na_value=np.nan)
        if np.isinf(out[:, j]).any():
            row = int(np.flatnonzero(np.isinf(out[:, j]))[0])
            raise ValueError(f"Column '{name}' holds an infinite number (first in row {row}): correct or empty it.")
    return out


def _centre_and_scale(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Median and interquartile range a column; where that is 0 the standard deviation, and 1 where that is 0 too."""
    centre, scale = np.zeros(numbers.shape[1]), np.ones(numbers.shape[1])
    for j, column in enumerate(numbers.T):
        if len(known := column[~np.isnan(column)]):
            low, centre[j], high = np.quantile(known, [0.25, 0.5, 0.75])
            scale[j] = (high - low) or known.std() or 1.0
    return centre, scale
