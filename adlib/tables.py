"""The six tables of a shop as files: reading, writing, and the data cards that describe them.

A folder holds some of users, products, creatives, events, reviews and impressions as CSV, CSV.gz or Parquet; CSV in
UTF-8 (with or without BOM) or GB18030, separated by comma, semicolon or tab. A file ``columns.yaml`` beside them may
give other file names, column names and words::

    events:
      file: klicks.csv
      columns: {Kunde: user_id, Aktion: event, Zeit: timestamp}
      values: {event: {ansehen: view, kaufen: purchase}}

What the tables hold is in `adlib.schemas`, how they are cleaned in `adlib.cleaning`; both are reached from here.

Taught in notebooks/01_data_prep.ipynb.
"""

import codecs
import gzip
import io
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from adlib import schemas
from adlib.cleaning import CLEANING_RULES, Cleaned, clean
from adlib.schemas import SCHEMAS, TableError, check_references, columns_of, kind_of, like, validate

__all__ = ["CLEANING_RULES", "SCHEMAS", "Cleaned", "TableError", "article_table", "check_references", "clean"]
__all__ += ["data_cards", "read_tables", "validate", "write", "write_cards", "write_set_aside"]

ENDINGS = (".csv", ".csv.gz", ".parquet")
DTYPES = {"id": "id (text)", "text": "text", "time": "time (UTC)", "number": "number", "whole": "whole number"}


def read_tables(
    folder: str | Path, *, only: Iterable[str] | None = None, check: bool = True
) -> dict[str, pd.DataFrame]:
    """Return the tables that a folder holds, typed and checked.

    Parameters
    ----------
    folder : path
        Holds ``<table>.csv``, ``.csv.gz`` or ``.parquet``, and perhaps ``columns.yaml``.
    only : names, optional
        Read these tables, and insist that they are there.
    check : bool
        Also refuse unreadable cells, impossible values and ids that point nowhere. Without it, a column with unreadable
        cells stays as it came, for `clean` to sort out.

    Raises
    ------
    TableError
        The folder holds no table, a file cannot be read, a needed column is missing, or a check fails.

    Taught in notebooks/01_data_prep.ipynb, section 1.
    """
    if not (folder := Path(folder)).is_dir():
        raise TableError(
            "there is no such folder.",
            "Check the path; a relative one starts where the notebook runs.",
            source=str(folder),
        )
    mapping, wanted = _read_mapping(folder), [only] if isinstance(only, str) else only
    tables, sources = {}, {}
    for table in SCHEMAS if wanted is None else wanted:
        columns_of(table)
        if path := _find(folder, table, mapping.get(table, {}).get("file")):
            frame = _read_file(path, table, mapping.get(table, {}))
            tables[table] = (
                validate(table, frame, path.name) if check else clean({table: frame}, rules=[]).tables[table]
            )
            sources[table] = path.name
        elif wanted is not None:
            raise TableError(f"holds no table {table}.", _how_to_name(folder), table=table, source=str(folder))
    if not tables:
        raise TableError("holds none of the tables.", _how_to_name(folder), source=str(folder))
    if check:
        check_references(tables, sources)
    return tables


def _how_to_name(folder: Path) -> str:
    """Say what is in the folder and what names would be found."""
    held = sorted(path.name for path in folder.iterdir())
    names = f"It holds {', '.join(held[:10])}{', …' if held[10:] else ''}." if held else "It is empty."
    return f"{names} Name files {', '.join(SCHEMAS)} + {' or '.join(ENDINGS)}, or name yours in columns.yaml."


def _read_mapping(folder: Path) -> dict[str, dict]:
    """Return columns.yaml with every key and word as text, or nothing if there is none."""
    path, asked = folder / "columns.yaml", {"file": str, "columns": dict, "values": dict}
    if not path.exists():
        return {}
    import yaml  # late: most folders have no such file

    try:
        mapping = yaml.load(path.read_bytes(), yaml.BaseLoader) or {}  # BaseLoader: `no` and `1` stay words
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        reason = " ".join(str(problem).split())
        raise TableError(f"not valid YAML: {reason}.", "Compare it with data/README.md.", source=path.name) from None
    advice = "Each table may have `file: name`, `columns: {yours: ours}` and `values: {column: {yours: ours}}`."
    for table, entry in mapping.items() if isinstance(mapping, dict) else [("", mapping)]:
        columns = columns_of(table, path.name) if table else {}
        if not isinstance(entry, dict) or not all(isinstance(entry.get(k, v()), v) for k, v in asked.items()):
            raise TableError(f'the entry "{table}" has not the expected form.', advice, table=table, source=path.name)
        values = entry.get("values", {})
        named = [(k, asked) for k in entry] + [(c, columns) for c in [*entry.get("columns", {}).values(), *values]]
        for name, known in named:
            if name not in known or (name in values and not isinstance(values[name], dict)):
                rule = f'"{name}" is not known under {table}.{like(name, known)}'
                raise TableError(rule, advice, table=table, source=path.name, column=name)
    return mapping


def _find(folder: Path, table: str, name: str | None) -> Path | None:
    """Return the file of a table, if there is one."""
    if name is not None:
        if not (folder / name).is_file():
            rule = f'columns.yaml names the file "{name}", which is not there.'
            raise TableError(rule, _how_to_name(folder), table=table, source=str(folder))
        return folder / name
    found = sorted(p for p in folder.iterdir() if p.name.lower() in {table + ending for ending in ENDINGS})
    if len(found) > 1:
        rule = f"more than one file for {table}: {', '.join(path.name for path in found)}."
        raise TableError(rule, "Keep one, or name it in columns.yaml.", table=table, source=str(folder))
    return found[0] if found else None


def _read_file(path: Path, table: str, entry: dict) -> pd.DataFrame:
    """Return a file's cells under our column names, with the needed columns there and at least one row."""
    where, names, values = {"table": table, "source": path.name}, entry.get("columns", {}), entry.get("values", {})
    try:
        if path.name.lower().endswith(".parquet"):
            frame = pd.read_parquet(path)
        else:
            words = [name for name, c in columns_of(table).items() if kind_of(name, c) in ("id", "text", "time")]
            words = {*words, *values} | {own for own, name in names.items() if name in {*words, *values}}
            frame = _read_csv(path, where, words)
    except TableError:
        raise
    except (OSError, EOFError, zlib.error, ValueError, NotImplementedError) as problem:
        reason = " ".join(str(problem).split())[:300]
        raise TableError(f"cannot be read: {reason}.", "Export or download the file again.", **where) from None
    for own in names:
        if own not in frame:
            rule = f"columns.yaml names this column, but the file has none.{like(own, frame)}"
            raise TableError(rule, f"The columns are {', '.join(map(str, frame))}.", column=own, **where)
    frame = frame.rename(columns=names).reset_index(drop=True)
    schemas.check_header(table, frame, path.name)
    if frame.empty:
        raise TableError("is empty: it has a header but no rows.", "Export it again, or remove the file.", **where)
    for name in (name for name in values if name in frame):
        own = frame[name].astype("str")
        frame[name] = own.map(values[name]).where(own.isin(list(values[name])), frame[name].astype("object"))
    return frame


def _read_csv(path: Path, where: dict, words: Iterable[str]) -> pd.DataFrame:
    """Return the cells of a CSV file; the columns named in words stay text, so that an id 007 keeps its zeros."""
    import pyarrow as arrow
    from pyarrow import csv  # twice as fast as pandas' own reader

    data = path.read_bytes()
    data = _as_utf8(gzip.decompress(data) if path.name.lower().endswith(".gz") else data, where)
    if not data.strip():
        raise TableError("is empty.", "Export it again, or remove the file.", **where)
    mark = max(",;\t", key=data[: data.find(b"\n")].decode().count)
    types = dict.fromkeys(words, arrow.string())
    convert = csv.ConvertOptions(column_types=types, strings_can_be_null=True, null_values=[""])
    parsing = csv.ParseOptions(newlines_in_values=True, delimiter=mark)
    table = csv.read_csv(io.BytesIO(data), parse_options=parsing, convert_options=convert)
    return pd.concat([column.to_pandas() for column in table.columns], axis=1, keys=table.column_names)


def _as_utf8(data: bytes, where: dict) -> bytes:
    """Return the text as UTF-8, from UTF-8 with or without BOM or from GB18030."""
    data = data.removeprefix(codecs.BOM_UTF8)
    advice = "Save it as UTF-8, in Excel as 'CSV UTF-8'."
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as problem:
        row = data.count(b"\n", 0, problem.start) + 1
        text = data.decode("gb18030", "replace")
        plain = len(text.encode("ascii", "ignore"))
        # Latin-1 letters often decode as GB18030, but to characters that Chinese hardly uses: GB2312 lacks them
        common = (len(text.encode("gb2312", "ignore")) - plain) / 2
        if "\ufffd" in text or common < 0.3 * (len(text) - plain):
            rule = f"broken encoding: row {row} (the header is row 1) is neither UTF-8 nor GB18030."
            raise TableError(rule, advice, **where) from None
        data = text.encode()
    if b"\0" in data:
        raise TableError("broken encoding: zero bytes, as in UTF-16 or a binary file.", advice, **where)
    return data


def write(tables: dict[str, pd.DataFrame], folder: str | Path, format: str = "csv") -> list[Path]:
    """Write tables so that `read_tables` gives them back, and return the paths; a file is replaced whole or not at all.

    Parameters
    ----------
    tables : dict of DataFrame
        Tables by name. The index is not written; in CSV, times are ISO 8601 in UTC and missing cells empty.
    folder : path
        Made if it is not there.
    format : {"csv", "csv.gz", "parquet"}

    Raises
    ------
    TableError
        A name is not that of a table.
    ValueError
        The format is unknown.

    Taught in notebooks/01_data_prep.ipynb, section 4.
    """
    if f".{format}" not in ENDINGS:
        raise ValueError(f'format is "csv", "csv.gz" or "parquet", not "{format}".')
    for table in tables:
        columns_of(table)
    return [_write_one(frame, Path(folder) / f"{table}.{format}") for table, frame in tables.items()]


def write_set_aside(cleaned: Cleaned, folder: str | Path) -> list[Path]:
    """Write the rows that cleaning set aside (``set_aside_<table>.csv``) and ``cleaning_report.csv``; return the paths.

    Parameters
    ----------
    cleaned : Cleaned
        From `clean`.
    folder : path
        Made if it is not there.

    Taught in notebooks/01_data_prep.ipynb, section 2.
    """
    frames = {f"set_aside_{table}": rows for table, rows in cleaned.set_aside.items() if len(rows)}
    frames["cleaning_report"] = cleaned.report
    return [_write_one(frame, Path(folder) / f"{name}.csv") for name, frame in frames.items()]


def _write_one(frame: pd.DataFrame, path: Path) -> Path:
    """Write one file beside its place, then move it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        if path.suffix == ".parquet":
            frame.to_parquet(part, index=False)
        else:
            data = _csv_bytes(frame)
            part.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)  # same rows, same bytes
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _csv_bytes(frame: pd.DataFrame) -> bytes:
    """Return the rows as CSV, cells in quotes only if some cell needs them."""
    import pyarrow as arrow
    from pyarrow import csv

    times, mixed = frame.select_dtypes(["datetime", "datetimetz"]), frame.select_dtypes(["object", "category"])
    plain = {name: _iso(times[name]) for name in times} | {name: mixed[name].astype("str") for name in mixed}
    table = arrow.Table.from_pandas(frame.assign(**plain), preserve_index=False)
    try:
        csv.write_csv(table, sink := io.BytesIO(), csv.WriteOptions(quoting_style="none"))
    except arrow.ArrowInvalid:
        csv.write_csv(table, sink := io.BytesIO(), csv.WriteOptions(quoting_style="needed"))
    return sink.getvalue()


def _iso(when: pd.Series) -> pd.Series:
    """Return times as ISO 8601 text, as short as all of them allow: days, seconds or microseconds."""
    utc = when.dt.tz_localize("UTC") if when.dt.tz is None else when.dt.tz_convert("UTC")
    moments = utc.dt.tz_localize(None).to_numpy("datetime64[us]")
    known = moments[~np.isnat(moments)]
    unit = next(u for u in ("D", "s", "us") if (known.astype(f"datetime64[{u}]") == known).all())
    text = np.datetime_as_string(moments, unit=unit, timezone="naive" if unit == "D" else "UTC")
    return pd.Series(text, when.index, dtype="str").where(when.notna())


def data_cards() -> str:
    """Return one Markdown table for each of the six tables, made from the schemas.

    Taught in notebooks/01_data_prep.ipynb, section 1.
    """
    cards = ["Written by `adlib.tables.write_cards` from the schemas in `adlib/schemas.py`; edit those."]
    for table, model in SCHEMAS.items():
        rows = ["| column | needed | type | what it holds |", "|---|---|---|---|"]
        for name, column in columns_of(table).items():
            needed = "yes" if column.required else "" if column.nullable else "if there, no gaps"
            rules = [
                *map(schemas.in_words, column.checks),
                *(["must differ from row to row."] if column.unique else []),
            ]
            about = "; ".join([column.description.replace("|", "\\|"), *(rule.rstrip(".") for rule in rules)])
            rows.append(f"| `{name}` | {needed} | {DTYPES[kind_of(name, column)]} | {about} |")
        cards.append("\n".join([f"### {table}", "", model.__doc__, "", *rows]))
    return "\n\n".join(cards)


def write_cards(path: str | Path) -> None:
    """Put `data_cards` between the markers ``<!-- tables -->`` and ``<!-- /tables -->`` of a Markdown file.

    Raises
    ------
    ValueError
        The file has no such markers.

    Taught in notebooks/01_data_prep.ipynb, section 1.
    """
    start, end = "<!-- tables -->", "<!-- /tables -->"
    before, opened, rest = Path(path).read_text(encoding="utf-8").partition(start)
    _, closed, after = rest.partition(end)
    if not (opened and closed):
        raise ValueError(f"{path} has no lines {start} and {end} to write between.")
    Path(path).write_text(f"{before}{start}\n{data_cards()}\n{end}{after}", encoding="utf-8")


def article_table(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return the two-table example: what each shopper did in the shop, and whether she clicked an advertisement.

    Parameters
    ----------
    tables : dict of DataFrame
        Valid ``events`` and ``impressions``. To predict, pass events from before the impressions: what is counted here is
        everything that was passed.

    Returns
    -------
    DataFrame, one row for each shopper with an impression, sorted by user_id
        user_id; v1 views, v2 purchases, v3 favourites (counts); y, 1 if at least one impression was clicked.

    Raises
    ------
    TableError
        One of the two tables is missing.

    Taught in notebooks/01_data_prep.ipynb, section 4.
    """
    for table in ("events", "impressions"):
        if table not in tables:
            raise TableError(f"needs the table {table}.", f"Got {', '.join(tables) or 'none'}.", table=table)
    clicked = tables["impressions"].groupby("user_id")["click"].max()
    counts = tables["events"].groupby(["user_id", "event"]).size().unstack(fill_value=0)
    counts = counts.reindex(index=clicked.index, columns=["view", "purchase", "favourite"], fill_value=0)
    return counts.set_axis(["v1", "v2", "v3"], axis=1).assign(y=clicked).rename_axis(columns=None).reset_index()
