"""Cleaning: seven rules that set rows aside, and a report of what each of them touched.

The rules work on tables as they come, even where cells cannot be read yet. Each row is set aside at most once, by the
first rule that it breaks, so clean rows and rows set aside always add up to the rows that came in.

Taught in notebooks/01_data_prep.ipynb.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd

from adlib.schemas import (
    HOME,
    HOW_TO_WRITE,
    SCHEMAS,
    check_header,
    columns_of,
    faults,
    kind_of,
    like,
    parse,
    refuse,
    settle,
)

DAY = 86_400_000_000  # microseconds
FIRST_YEAR = pd.Timestamp("1995-01-01", tz="UTC").value // 1000  # before the web had shops
BOT_ROWS, BOT_GAP = 20, 5_000_000  # rows, microseconds
MONEY = {"events": "amount", "impressions": "revenue"}


class Cleaned(NamedTuple):
    """The clean tables, the report, and per table the rows set aside with their ``reason``; row labels are kept."""

    tables: dict[str, pd.DataFrame]
    report: pd.DataFrame
    set_aside: dict[str, pd.DataFrame]


class _Sieve:
    """One table on its way through the rules: cells as they came, parsed values, and which rows are still in."""

    def __init__(self, table: str, raw: pd.DataFrame):
        check_header(table, raw, f"table {table}")
        self.table, self.raw, self.columns = table, raw, {n: c for n, c in columns_of(table).items() if n in raw}
        parsed = {name: parse(raw[name], kind_of(name, column)) for name, column in self.columns.items()}
        self.values = pd.DataFrame({name: values for name, (values, _) in parsed.items()}, index=raw.index)
        self.unread = {name: unread for name, (_, unread) in parsed.items()}
        self.keep, self.reason = np.ones(len(raw), bool), np.full(len(raw), "", object)

    def micros(self, name: str) -> np.ndarray:
        """Microseconds since 1970 (n,), the smallest integer where there is no time."""
        return self.values[name].dt.tz_localize(None).to_numpy("datetime64[us]").astype(np.int64)

    def clean(self) -> pd.DataFrame:
        """The rows still in, each column in its dtype if all its cells could be read."""
        good = [name for name, unread in self.unread.items() if not unread[self.keep].any()]
        kept = self.values.loc[self.keep, good]
        return self.raw[self.keep].assign(**{n: settle(kept[n], kind_of(n, self.columns[n])) for n in good})


Hits = Iterator[tuple[str, str, np.ndarray]]  # table, column, which rows (n,) break the rule


def duplicate_row(sieves: dict[str, _Sieve]) -> Hits:
    """The row repeats an earlier one in all columns (events, impressions), or an earlier row has the same key."""
    for table in ("events", "impressions"):
        if table in sieves:
            sieve = sieves[table]
            twins = sieve.values.duplicated(["user_id", "timestamp"], keep=False).to_numpy(
                copy=True
            )  # few: compare these fully
            rows = sieve.raw[twins]
            rows = rows.astype({name: "str" for name in rows.select_dtypes("object")})
            twins[twins] = rows.duplicated().to_numpy()
            yield table, "all columns", twins
    for table, sieve in sieves.items():
        for key in (name for name, column in sieve.columns.items() if column.unique):
            yield table, key, (sieve.values[key].duplicated() & sieve.values[key].notna()).to_numpy()


def missing_value(sieves: dict[str, _Sieve]) -> Hits:
    """A cell is empty in a column that needs a value in every row."""
    for table, sieve in sieves.items():
        for name in (name for name, column in sieve.columns.items() if not column.nullable):
            yield table, name, sieve.values[name].isna().to_numpy() & ~sieve.unread[name]


def impossible_time(sieves: dict[str, _Sieve]) -> Hits:
    """The time cannot be read, lies before 1995, after the end of the log, or before the shopper signed up.

    The log ends a day (or 2 % of its middle nine tenths) after its 99.9th percentile; so that many wrong dates cannot
    move the end, it is also at most three times as far from the median as the 98th percentile.
    """
    for table, sieve in sieves.items():
        for name in (name for name, column in sieve.columns.items() if kind_of(name, column) == "time"):
            when, bad = sieve.micros(name), sieve.unread[name].copy()
            known = sieve.values[name].notna().to_numpy()
            bad |= known & (when < FIRST_YEAR)
            if (sane := when[known & sieve.keep & ~bad]).size:
                start, middle, late, end = np.quantile(sane, [0.05, 0.5, 0.95, 0.999], method="higher")
                far = middle + 3 * (np.quantile(sane, 0.98, method="higher") - middle)
                bad |= known & (when > min(end, far) + max(DAY, (late - start) // 50))
            if (
                name == "timestamp"
                and "signup_date" in sieves.get("users", sieve).columns
                and "user_id" in sieve.columns
            ):
                users = sieves["users"].values[sieves["users"].keep]
                signup = users.drop_duplicates("user_id").set_index("user_id")["signup_date"].dt.floor("D")
                bad |= (sieve.values[name] < sieve.values["user_id"].map(signup)).to_numpy()
            yield table, name, bad


def impossible_value(sieves: dict[str, _Sieve]) -> Hits:
    """The number cannot be read, or the value is outside what the column allows, such as a negative price."""
    for table, sieve in sieves.items():
        for name, column in sieve.columns.items():
            bad = np.zeros(len(sieve.raw), bool)
            for fault, _, rows in faults(column, sieve.values[name]):
                bad |= rows & (fault == "impossible_value")
            if column.checks or kind_of(name, column) in ("number", "whole"):
                yield table, name, bad | sieve.unread[name]


def outlier(sieves: dict[str, _Sieve]) -> Hits:
    """The amount or revenue is far too large: its logarithm lies over 6 robust standard deviations above the median."""
    for table, name in MONEY.items():
        if table in sieves and name in sieves[table].columns:
            money = sieves[table].values[name].to_numpy()
            logs = np.log(money, where=money > 0, out=np.full(len(money), np.nan))
            if (paid := logs[sieves[table].keep & ~np.isnan(logs)]).size:
                middle = np.median(paid)
                spread = max(1.4826 * np.median(np.abs(paid - middle)), 0.1)  # at least 10 %, else one price is all
                yield table, name, logs > middle + 6 * spread


def unknown_id(sieves: dict[str, _Sieve]) -> Hits:
    """The id points to no row, or to a row that was itself set aside, in a table that is present."""
    for table, sieve in sieves.items():
        for name in sieve.columns:
            home = sieves.get(HOME.get(name))
            if home not in (None, sieve):
                ids, there = sieve.values[name], home.values[name]
                yield table, name, (ids.notna() & ~ids.isin(there)).to_numpy()
                yield table, f"{name} set aside in {home.table}", ids.isin(there[~home.keep]).to_numpy()


def bot(sieves: dict[str, _Sieve]) -> Hits:
    """The account acts like a robot: 20 or more rows with a median gap under 5 seconds; all its rows are set aside."""
    logs = [table for table in ("events", "impressions") if table in sieves]
    hasty = set().union(*(_hasty(sieves[table]) for table in logs))
    for table in logs:
        yield table, "user_id", sieves[table].values["user_id"].isin(hasty).to_numpy()


def _hasty(sieve: _Sieve) -> set[str]:
    """Accounts with many rows and a short median gap; rows of one moment, such as one page, count as one."""
    code, names = pd.factorize(sieve.values["user_id"])
    when = sieve.micros("timestamp")
    good = sieve.keep & (code >= 0) & sieve.values["timestamp"].notna().to_numpy()
    many = np.bincount(code[good], minlength=len(names) + 1) >= BOT_ROWS
    rows = np.flatnonzero(good & many[code])
    rows = rows[np.lexsort((when[rows], code[rows]))]
    gap, same = np.diff(when[rows]), np.diff(code[rows]) == 0
    median = pd.Series(gap[same & (gap > 0)]).groupby(code[rows][1:][same & (gap > 0)]).median()
    return set(names[median.index[median < BOT_GAP]])


RULES = (duplicate_row, missing_value, impossible_time, impossible_value, outlier, unknown_id, bot)
CLEANING_RULES = {rule.__name__: rule.__doc__.split("\n")[0] for rule in RULES}


def clean(tables: dict[str, pd.DataFrame], *, rules: list[str] | None = None) -> Cleaned:
    """Set aside the rows that break a rule, in the order of `CLEANING_RULES`, and report what was touched.

    Parameters
    ----------
    tables : dict of DataFrame
        Tables by name, as they come; they are not changed.
    rules : list of str, optional
        Names from `CLEANING_RULES`; all of them by default. An empty list switches cleaning off.

    Returns
    -------
    Cleaned
        ``tables``: clean rows in their dtypes. ``report``: one line for each rule, table and column with ``rows`` (number),
        ``share`` (of the table's rows, 0-1) and ``action``. ``set_aside``: rows as they came, with a ``reason``.

    Raises
    ------
    TableError
        A needed column is missing, or a rule would set aside more than half of 20 or more rows: then the column means
        something else than the schema says, and that is not dirt.
    ValueError
        A rule is unknown.

    Taught in notebooks/01_data_prep.ipynb, section 2.
    """
    if unknown := [name for name in rules or () if name not in CLEANING_RULES]:
        raise ValueError(f'there is no cleaning rule "{unknown[0]}".{like(unknown[0], CLEANING_RULES)}')
    sieves = {table: _Sieve(table, tables[table]) for table in sorted(tables, key=[*SCHEMAS, *tables].index)}
    lines = []
    for rule in (rule for rule in RULES if rules is None or rule.__name__ in rules):
        looked = {}
        for table, column, bad in rule(sieves):
            sieve = sieves[table]
            bad = bad & sieve.keep
            _refuse_most(rule.__name__, sieve, column, bad)
            sieve.keep, sieve.reason[bad] = sieve.keep & ~bad, rule.__name__
            looked.setdefault(table, {})[column] = int(bad.sum())
        for table, counts in looked.items():
            hit = {column: n for column, n in counts.items() if n} or {", ".join(counts): 0}
            action = "set aside, first kept" if rule is duplicate_row else "set aside"
            lines += [(rule.__name__, table, c, n, n / max(len(tables[table]), 1), action) for c, n in hit.items()]
    report = pd.DataFrame(lines, columns=["rule", "table", "column", "rows", "share", "action"])
    aside = {t: s.raw[~s.keep].assign(reason=s.reason[~s.keep].astype(str)) for t, s in sieves.items()}
    return Cleaned({table: sieve.clean() for table, sieve in sieves.items()}, report, aside)


def _refuse_most(rule: str, sieve: _Sieve, column: str, bad: np.ndarray) -> None:
    """Raise a TableError if most of a column breaks a rule about single cells."""
    if rule in ("missing_value", "impossible_time", "impossible_value", "unknown_id") and column in sieve.columns:
        most = bad if len(bad) >= 20 and bad.mean() > 0.5 else bad & False
        hint = HOW_TO_WRITE.get(kind_of(column, sieve.columns[column]), "")
        advice = f"{hint} Check what the column holds, or map it in columns.yaml.".strip()
        where = {"table": sieve.table, "source": f"table {sieve.table}", "column": column}
        refuse(most, sieve.raw[column], f"breaks the rule {rule} in over half of the rows.", advice, **where)
