"""Trouble planted on purpose: robots and dirty rows, with the truth of what was planted.

Taught in notebooks/01_data_prep.ipynb, where every cleaning rule is scored against it.
"""

import numpy as np
import pandas as pd

from adlib.catalogue import TRUTH
from adlib.traffic import utc


def add_robots(log: pd.DataFrame, robots: np.ndarray, share: float, rng: np.random.Generator) -> pd.DataFrame:
    """Replace a share of the rows by bursts of robots: one to three seconds between impressions, a click on every third."""
    rows = np.sort(rng.choice(len(log), round(share * len(log)), replace=False))
    burst = np.arange(len(rows)) // 60
    who = rng.choice(robots, burst.max(initial=0) + 1)[burst]
    first = np.minimum(burst * 60, len(rows) - 1)
    elapsed = np.cumsum(rng.integers(1_000_000, 3_000_000, len(rows)))
    when = pd.DatetimeIndex(log.timestamp).as_unit("us").asi8[rows][first] + elapsed - elapsed[first]
    log.loc[rows, "user_id"] = who
    log.loc[rows, "timestamp"] = utc(when)
    log.loc[rows, "click"] = (rng.random(len(rows)) < TRUTH["rates"]["bot_click"]).astype(np.int64)
    log.loc[rows, ["conversion", "revenue"]] = 0
    return log.sort_values("timestamp", kind="stable", ignore_index=True)


def soil(
    tables: dict[str, pd.DataFrame], share: float = 0.02, seed: int = 0
) -> tuple[dict[str, pd.DataFrame], pd.DataFrame]:
    """Plant dirty rows in the events and impressions of a shop, by the names of ``tables.CLEANING_RULES``.

    Parameters
    ----------
    tables : clean tables by name. share : dirty rows per table, of all rows, spread evenly over the rules. seed : decides which.

    Returns
    -------
    (dirty tables, truth): truth has the columns table, row (position in the dirty table) and rule, one line for each planted row.

    Raises
    ------
    ValueError : for a share outside 0 to 0.5.
    """
    if not 0 <= share <= 0.5:
        raise ValueError(f"share is a part of the rows between 0 and 0.5, not {share}.")
    dirty, truth = dict(tables), []
    names = [t for t in ("events", "impressions") if t in tables]
    people = np.sort(pd.concat([tables[t].user_id for t in names]).unique())
    rows = max(len(tables[t]) for t in names)
    robots = np.random.default_rng([seed, 15]).choice(people, max(1, round(share * rows / 2400)), replace=False)
    for number, name in enumerate(names):
        rng = np.random.default_rng([seed, 14, number])
        frame, planted = _spoil(tables[name].reset_index(drop=True), name, share, robots, rng)
        order = np.argsort(
            rng.random(len(frame)) + np.arange(len(frame)) // 5000
        )  # neighbours mix, the log stays roughly in time
        place = np.empty(len(frame), int)
        place[order] = np.arange(len(frame))
        dirty[name] = frame.iloc[order].reset_index(drop=True)
        truth += [
            pd.DataFrame({"table": name, "row": np.sort(place[rows]), "rule": rule}) for rule, rows in planted.items()
        ]
    return dirty, pd.concat(truth, ignore_index=True)


def _spoil(
    frame: pd.DataFrame, name: str, share: float, accounts: np.ndarray, rng: np.random.Generator
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Spoil disjoint groups of rows, one per rule, then append robots and duplicates; rows are positions in the result."""
    money, other = ("amount", "product_id") if name == "events" else ("revenue", "creative_id")
    each, n = max(1, round(share * len(frame) / 6)), len(frame)
    robots = _robot_rows(frame, max(40 * len(accounts), each), accounts, rng)
    account = frame.user_id.isin(accounts).to_numpy()  # all that a robot's account did is a robot's
    paid = rng.permutation(np.flatnonzero((frame[money].to_numpy() > 0) & ~account))
    outliers = paid[: min(each, len(paid) // 10)]
    free = rng.permutation(np.flatnonzero((frame[money].to_numpy() == 0) & ~account))
    missing, late, bad, ghost, copies = np.array_split(free[: 5 * each], 5)
    frame.loc[missing, "user_id"] = None
    future = frame["timestamp"].max() + pd.Timedelta(days=400)
    wrong = np.where(rng.random(len(late)) < 0.5, pd.Timestamp("1970-01-01", tz="UTC"), future)
    frame.loc[late, "timestamp"] = pd.DatetimeIndex(wrong).as_unit("us")
    frame.loc[bad, money] = -np.round(rng.uniform(1, 500, len(bad)), 2)
    frame.loc[ghost, other] = [f"x{i:05d}" for i in rng.integers(0, 99_999, len(ghost))]
    frame.loc[outliers, money] = frame.loc[outliers, money] * 10.0 ** rng.uniform(4, 6, len(outliers))
    planted = {
        "missing_value": missing,
        "impossible_time": late,
        "impossible_value": bad,
        "unknown_id": ghost,
        "outlier": outliers,
        "bot": np.concatenate([np.flatnonzero(account), n + np.arange(len(robots))]),
        "duplicate_row": n + len(robots) + np.arange(len(copies)),
    }
    return pd.concat([frame, robots, frame.iloc[np.sort(copies)]], ignore_index=True), planted


def _robot_rows(frame: pd.DataFrame, n: int, accounts: np.ndarray, rng: np.random.Generator) -> pd.DataFrame:
    """n rows of accounts that act every one to three seconds, made from ordinary rows."""
    rows = frame.iloc[rng.integers(0, len(frame), n)].copy()
    rows["user_id"] = np.repeat(accounts, -(-n // len(accounts)))[:n]
    if "impression_id" in rows:
        rows["impression_id"] = [f"b{i:09d}" for i in range(n)]
    start = frame["timestamp"].iloc[len(frame) // 2].value // 1000
    rows["timestamp"] = utc(start + np.cumsum(rng.integers(1_000_000, 3_000_000, n)))
    return rows
