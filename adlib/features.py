"""From tables to what a click model reads: features of an impression, a split by time, columns that know the answer.

Taught in notebooks/03_ctr_modeling.ipynb.
"""

import warnings
from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from adlib.encoding import is_numeric

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


def leaking_columns(X: pd.DataFrame, y, most: int = 25_000, level: float = 1e-9) -> dict[str, str]:
    """Name the columns that know the click: each separates it almost alone, or has a value that (almost) decides it.

    A number is cut into at most twenty parts. A value is suspicious if all, or none, of its rows are clicked and the base
    rate would give that with a probability below ``level``, or if ranking by the column's click rates has AUC over .99.

    Parameters
    ----------
    X, y : columns (n, d) and clicks (n,); of more than ``most`` rows a regular sample is looked at.

    Returns
    -------
    dict from the name of a column to the reason, in words; empty if nothing is found.

    Kaufman, Rosset, Perlich, Stitelman (2012), Leakage in data mining, ACM TKDD 6.
    Taught in notebooks/03_ctr_modeling.ipynb, section "What can go wrong".
    """
    every = slice(None, None, max(1, len(X) // most))
    X, y = X.iloc[every], np.asarray(y, dtype=float)[every]
    base, found = y.mean(), {}
    for name in X if 0 < base < 1 else []:
        column = X[name]
        if is_numeric(column):
            number = column.to_numpy(dtype=float, na_value=np.nan)
            edges = np.unique(np.nanquantile(number, np.linspace(0, 1, 21))) if column.notna().any() else np.zeros(1)
            part = np.where(np.isnan(number), len(edges), np.searchsorted(edges, number))
            values = [f"up to {edge:.6g}" for edge in edges] + ["missing"]
        elif column.dtype == object and not column.map(lambda value: isinstance(value, str), na_action="ignore").all():
            continue  # vectors
        else:
            part, values = pd.factorize(column, use_na_sentinel=False)
        clicked, rows = np.bincount(part, y), np.bincount(part)
        never = (clicked == 0) & (rows * np.log1p(-base) < np.log(level))
        always = (clicked == rows) & (rows > 0) & (rows * np.log(base) < np.log(level))
        rates = (clicked[part] - y) / np.maximum(rows[part] - 1, 1)  # of the other rows of the same value
        for odd, kind in [(never, "never"), (always, "always")]:
            if odd.any():
                most_rows = int(np.argmax(np.where(odd, rows, 0)))
                found[name] = f"'{values[most_rows]}' is {kind} clicked in {rows[most_rows]} rows"
        if name not in found and roc_auc_score(y, rates) > 0.99:
            found[name] = "it separates clicks from the rest almost alone"
    return found


def warn_of_leaks(X: pd.DataFrame, y: np.ndarray) -> None:
    """Warn of each column that decides the click in these rows, by name."""
    for name, reason in leaking_columns(X, y).items():
        warnings.warn(f"Column '{name}' seems to know the click ({reason}): was it known before?", stacklevel=3)


def clicks(y, n: int, both: bool = True) -> np.ndarray:
    """Clicks (n,) in float32, or a sentence that says what is wrong with them."""
    y = np.asarray(y)
    if y.shape != (n,) or n == 0:
        raise ValueError(f"The table has {n} rows and the target has shape {y.shape}: give one click, 0 or 1, a row.")
    found = pd.unique(pd.Series(y)).tolist()
    if not set(found) <= {0, 1}:
        raise ValueError(f"The target must be 0 (no click) or 1 (click); it holds {', '.join(map(str, found[:5]))}.")
    if both and len(found) == 1:
        raise ValueError(
            f"Every row of the target is {int(found[0])}: a click model needs rows with and without a click."
        )
    return y.astype(np.float32)
