"""What the six tables of a shop hold: one pandera model each, and the checks that every table passes.

Ids and words have the dtype ``str``, times ``datetime64[us, UTC]``, measures ``float64``, counts and flags ``int64``. A
shop of your own needs only some of the tables, and of a table only the columns without ``| None``; further columns are
kept as they are. Absent columns stay absent: nothing is filled in, because an invented propensity or price would be
read as a measurement.

Taught in notebooks/01_data_prep.ipynb.
"""

import difflib
from collections.abc import Iterable, Iterator
from typing import Annotated

import numpy as np
import pandas as pd
import pandera.pandas as pa

Time = Annotated[pd.DatetimeTZDtype, "us", "UTC"]
HOME = {"user_id": "users", "product_id": "products", "creative_id": "creatives"}  # the table that defines an id
NO_VALUE = ("", "NULL", "null", "NaN", "nan", "None", "NaT", "N/A", "\\N")  # missing, except in free text
NOUN = {"time": "a time", "number": "a number", "whole": "a whole number"}
HOW_TO_WRITE = {
    "time": "Write ISO times such as 2025-03-31 or 2025-03-31T14:05:00+08:00 (without an offset, UTC is assumed); turn "
    'seconds into times first, with pandas.to_datetime(column, unit="s").',
    "number": "Write plain numbers such as 1299.00: no currency sign, no thousands separator, a point for decimals.",
    "whole": "Write whole numbers such as 0, 1 or 2.",
}
HOW_TO_MEND = {
    "missing_value": "Fill these cells or remove the rows.",
    "impossible_value": "Correct these cells.",
    "duplicate_row": "Keep one row of each.",
}
LET_CLEAN = "Or read with check=False and let tables.clean set such rows aside."


def _full(about: str, **rules) -> object:
    """Field that holds a value in every row."""
    return pa.Field(description=about, nullable=False, **rules)


def _gaps(about: str, **rules) -> object:
    """Field that may be empty in some rows."""
    return pa.Field(description=about, nullable=True, **rules)


class Users(pa.DataFrameModel):
    """Shoppers, one row each; a pseudonym is enough, no names or addresses."""

    user_id: str = _full("pseudonym of the shopper", unique=True)
    age_band: str | None = _gaps("age in years as a band, such as 25-34")
    gender: str | None = _gaps("as the shop records it")
    region: str | None = _gaps("where the shopper lives, in the shop's own words")
    spend_level: str | None = _gaps("how much the shopper spends, such as low, middle, high")
    signup_date: Time | None = _gaps("day of registration (UTC)")


class Products(pa.DataFrameModel):
    """The catalogue, one row per product."""

    product_id: str = _full("key of the product", unique=True)
    title: str = _full("name as the shopper reads it")
    brand: str | None = _gaps("brand")
    category: str | None = _gaps("category, such as Coat")
    price: float | None = _gaps("price in yuan", ge=0)
    colour: str | None = _gaps("colour in words")
    material: str | None = _gaps("material in words")
    features: str | None = _gaps("further facts, separated by |, such as waterproof|hooded")
    description: str | None = _gaps("free text")
    image: str | None = _gaps("path or address of a picture")


class Creatives(pa.DataFrameModel):
    """Advertisements, one row each: the words and the picture that a shopper sees."""

    creative_id: str = _full("key of the advertisement", unique=True)
    product_id: str | None = _gaps("product it advertises")
    headline: str = _full("headline")
    body: str | None = _gaps("text below the headline")
    appeal: str | None = _gaps("what it appeals to: price, quality, novelty, social_proof, urgency, sustainability")
    tone: str | None = _gaps("tone of voice, such as plain or playful")
    image: str | None = _gaps("path or address of a picture")
    origin: str | None = _gaps("who wrote it: human, template or a model's name")


class Events(pa.DataFrameModel):
    """What shoppers did in the shop, one row per action."""

    user_id: str = _full("who")
    product_id: str | None = _gaps("with which product")
    event: str = _full("what", isin=["view", "favourite", "cart", "purchase"])
    timestamp: Time = _full("when (UTC)")
    amount: float | None = _gaps("paid, in yuan; empty or 0 where nothing was paid", ge=0)


class Reviews(pa.DataFrameModel):
    """What shoppers wrote about products, one row per review."""

    user_id: str | None = _gaps("who")
    product_id: str | None = _gaps("about which product")
    rating: float | None = _gaps("stars", ge=1, le=5)
    text: str = _full("free text")
    timestamp: Time | None = _gaps("when (UTC)")


class Impressions(pa.DataFrameModel):
    """Advertisements shown, one row per showing, with what came of it."""

    impression_id: str | None = _full("key of the showing", unique=True)
    timestamp: Time = _full("when it was shown (UTC)")
    user_id: str = _full("to whom")
    creative_id: str | None = _gaps("which advertisement")
    position: int | None = _full("slot on the page, counted from the top", ge=1)
    channel: str | None = _gaps("where it was shown, such as feed or search")
    device: str | None = _gaps("on what, such as phone or desktop")
    propensity: float | None = _gaps("probability with which the logging policy chose this advertisement", gt=0, le=1)
    click: int = _full("1 if it was clicked", isin=[0, 1])
    conversion: int | None = _full("1 if a purchase followed", isin=[0, 1])
    revenue: float | None = _gaps("revenue that followed, in yuan", ge=0)
    cost: float | None = _gaps("what the showing cost, in yuan", ge=0)


SCHEMAS = {model.__name__.lower(): model for model in (Users, Products, Creatives, Events, Reviews, Impressions)}


class TableError(ValueError):
    """A table that cannot be used: says where, which rule is broken, in which rows, and what to do.

    Attributes
    ----------
    table, source, column : str or None
        Name of the table, the file (or what else it came from) and the column.
    rule : str
        The broken rule.
    rows : list of int
        The first five bad rows, counted as a spreadsheet counts: the header is row 1.
    advice : str
        What to do.
    """

    def __init__(
        self, rule: str, advice: str = "", *, table=None, source=None, column=None, rows=(), count=0, shown=""
    ):
        self.table, self.source, self.column, self.rule = table, source, column, rule
        self.rows, self.advice = list(rows), advice
        where = ", ".join(([str(source)] if source else []) + ([f'column "{column}"'] if column else []))
        spots = f"Rows {', '.join(map(str, self.rows))}" if len(self.rows) > 1 else f"Row {[*self.rows, ''][0]}"
        spots += f" ({count:,} in all; the header is row 1)" if count > len(self.rows) else " (the header is row 1)"
        bad = f"{spots}: {shown}." if self.rows else ""
        super().__init__(" ".join(part for part in (f"{where}:" if where else "", rule, bad, advice) if part))


def like(word: str, choices: Iterable[str]) -> str:
    """Return ' Did you mean …?' with the nearest of the choices, or nothing."""
    plain = {str(choice).lower().replace("_", "").replace(" ", ""): choice for choice in choices}
    near = difflib.get_close_matches(str(word).lower().replace("_", "").replace(" ", ""), plain, n=1, cutoff=0.6)
    return f' Did you mean "{plain[near[0]]}"?' if near else ""


def columns_of(table: str, source: str | None = None) -> dict:
    """Return the pandera columns of a table by name.

    Raises
    ------
    TableError
        There is no such table.
    """
    if table not in SCHEMAS:
        rule = f'there is no table "{table}".{like(table, SCHEMAS)}'
        raise TableError(rule, f"The tables are {', '.join(SCHEMAS)}.", table=table, source=source)
    return SCHEMAS[table].to_schema().columns


def kind_of(name: str, column: pa.Column) -> str:
    """Return what a column holds: id, text, time, number or whole (number)."""
    dtype = str(column.dtype)
    if dtype.startswith("datetime"):
        return "time"
    return {"float64": "number", "int64": "whole"}.get(dtype, "id" if name.endswith("_id") else "text")


def parse(raw: pd.Series, kind: str) -> tuple[pd.Series, np.ndarray]:
    """Return the values (n,) in the dtype of their kind (whole numbers as float64), and which cells (n,) are unreadable."""
    nothing = np.zeros(len(raw), bool)
    if kind == "time" and isinstance(raw.dtype, np.dtype | pd.DatetimeTZDtype) and raw.dtype.kind == "M":
        values = raw.dt.tz_localize("UTC") if raw.dt.tz is None else raw.dt.tz_convert("UTC")
        return values.dt.as_unit("us"), nothing
    if kind in ("number", "whole"):
        return _parse_number(raw, kind)
    numeric = pd.api.types.is_numeric_dtype(raw.dtype)
    if kind == "id" and pd.api.types.is_float_dtype(raw.dtype) and (raw.dropna() % 1 == 0).all():
        raw = raw.astype("Int64")  # 17.0 is what pandas makes of the id 17 when its column has gaps
    words = _words(raw, kind)
    if kind != "time":
        return words, nothing
    # bare numbers could be seconds or a date, and pandas reads "now" as a time: neither is guessed at
    dated = words.str.match(r"\d{4}\D?\d") & (not numeric)
    values = pd.to_datetime(words.where(dated), utc=True, format="ISO8601", errors="coerce").dt.as_unit("us")
    return values, (words.notna() & values.isna()).to_numpy()


def _words(raw: pd.Series, kind: str) -> pd.Series:
    """Return the cells as text, missing where they stand for nothing."""
    words = raw.astype("str")
    if kind == "text":
        return words.where(words != "")
    words = words.str.strip()
    return words.where(~words.isin(NO_VALUE))


def _parse_number(raw: pd.Series, kind: str) -> tuple[pd.Series, np.ndarray]:
    """Return finite numbers as float64, and which cells could not be read."""
    if pd.api.types.is_numeric_dtype(raw.dtype):
        given = raw.notna().to_numpy()
        values = pd.Series(raw.to_numpy("float64", na_value=np.nan), raw.index)
    else:
        words = _words(raw, kind)
        given = words.notna().to_numpy()
        if kind == "whole":
            flags = words.str.lower().map({"true": "1", "false": "0"})
            words = flags.where(flags.notna(), words)
        values = pd.to_numeric(words, errors="coerce").astype("float64")
    good = np.isfinite(values)
    if kind == "whole":
        good &= (values % 1 == 0) & (values.abs() < 2**53)
    return values.where(good), given & ~good.to_numpy()


def settle(values: pd.Series, kind: str) -> pd.Series:
    """Return parsed whole numbers as int64 once no cell is empty; other values as they are."""
    return values.astype("int64") if kind == "whole" and values.notna().all() else values


def in_words(check: pa.Check) -> str:
    """Return a check as a sentence, such as 'must be at least 0.'"""
    if check.name == "isin":
        return f"must be one of {', '.join(map(str, check.statistics['allowed_values']))}."
    word = {"greater_than_or_equal_to": "at least", "greater_than": "above", "less_than_or_equal_to": "at most"}
    return f"must be {word[check.name]} {next(iter(check.statistics.values()))}."


def faults(column: pa.Column, values: pd.Series) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield (cleaning rule, the broken rule in words, which rows (n,) break it) for the parsed values of one column."""
    values = values.reset_index(drop=True)
    if not column.nullable:
        yield "missing_value", "must not be empty.", values.isna().to_numpy()
    for check in column.checks:
        passed = check(values).check_output.reindex(values.index, fill_value=True)  # pandera leaves empty cells out
        yield "impossible_value", in_words(check), ~passed.to_numpy(bool)
    if column.unique:
        yield "duplicate_row", "must differ from row to row.", (values.duplicated() & values.notna()).to_numpy()


def refuse(bad: np.ndarray, raw: pd.Series, rule: str, advice: str, **where) -> None:
    """Raise the TableError of the rows (n,) that are marked bad, if there are any."""
    first = np.flatnonzero(bad)[:5]
    if first.size:
        cells = raw.iloc[first].astype("object").where(raw.iloc[first].notna(), "")
        shown = ", ".join(dict.fromkeys(repr(str(cell)[:40]) for cell in cells))
        raise TableError(rule, advice, rows=(first + 2).tolist(), count=int(bad.sum()), shown=shown, **where)


def check_header(table: str, frame: pd.DataFrame, source: str) -> None:
    """Raise a TableError unless every needed column is there, each under a name of its own."""
    columns, names = columns_of(table, source), [str(name) for name in frame.columns]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        advice = "Rename or remove one; in columns.yaml, map only one column to this name."
        raise TableError("two columns have this name.", advice, table=table, source=source, column=twice[0])
    for name in (name for name, column in columns.items() if column.required and name not in names):
        rule = f"needed, but missing.{like(name, [own for own in names if own not in columns])}"
        advice = f"The columns are {', '.join(names) or '(none)'}. If yours has another name, say so in columns.yaml: "
        advice += f"`{table}: {{columns: {{your_name: {name}}}}}`."
        raise TableError(rule, advice, table=table, source=source, column=name)


def validate(table_name: str, frame: pd.DataFrame, source: str | None = None) -> pd.DataFrame:
    """Return the table with every known column in its dtype, or say what is wrong with it.

    Numbers must be plain: "1,299.00" and "¥12.5" are errors, since a comma or a currency means different things in
    different files. Times are ISO 8601; without an offset, UTC is assumed.

    Parameters
    ----------
    table_name : str
        A key of `SCHEMAS`.
    frame : DataFrame, n rows
        The table; it is not changed. Further columns are kept.
    source : str, optional
        What to call it in an error, such as a file name.

    Returns
    -------
    DataFrame, n rows, with the index of `frame`

    Raises
    ------
    TableError
        A needed column is missing, a cell cannot be read, or a value is impossible.

    Taught in notebooks/01_data_prep.ipynb, section 1.
    """
    source = source or f"table {table_name}"
    columns = columns_of(table_name, source)
    check_header(table_name, frame, source)
    settled = {}
    for name in (name for name in columns if name in frame):
        kind, where = kind_of(name, columns[name]), {"table": table_name, "source": source, "column": name}
        values, unread = parse(frame[name], kind)
        refuse(unread, frame[name], f"not {NOUN.get(kind)}.", f"{HOW_TO_WRITE.get(kind)} {LET_CLEAN}", **where)
        for fault, rule, bad in faults(columns[name], values):
            mend = HOW_TO_MEND[fault]
            if "one of" in rule:
                word = rule.removeprefix("must be one of ").split(",")[0]
                mend = f"Map your own words in columns.yaml: `{table_name}: {{values: {{{name}: {{your_word: {word}}}}}}}`."
            refuse(bad, frame[name], rule, f"{mend} {LET_CLEAN}", **where)
        settled[name] = settle(values, kind)
    return frame.assign(**settled)


def check_references(tables: dict[str, pd.DataFrame], sources: dict[str, str] | None = None) -> None:
    """Raise unless every id points to a row of the table that defines it, where that table is present.

    Parameters
    ----------
    tables : dict of DataFrame
        Valid tables by name.
    sources : dict of str, optional
        What to call them in an error, such as file names.

    Raises
    ------
    TableError
        An id points nowhere.

    Taught in notebooks/01_data_prep.ipynb, section 1.
    """
    for table, frame in tables.items():
        for name in columns_of(table):
            home = HOME.get(name)
            if name in frame and home in tables and home != table:
                lost = frame[name].notna() & ~frame[name].isin(tables[home][name])
                source = (sources or {}).get(table, f"table {table}")
                advice = f"Add the missing rows to {home}, or leave that table out. {LET_CLEAN}"
                rule = f"points to a row that is not in {home}."
                refuse(lost.to_numpy(), frame[name], rule, advice, table=table, source=source, column=name)
