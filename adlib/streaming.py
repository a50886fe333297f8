"""Click models from Parquet files that are larger than memory, by one process or by several.

    torchrun --nproc_per_node 2 -m adlib.streaming log.parquet --target click --save model/

Taught in notebooks/03_ctr_modeling.ipynb, section "Own rows, larger than memory".
"""

import argparse
import ast
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import torch
from torch import distributed

from adlib import parallel
from adlib.ctr import CTRModel
from adlib.features import clicks, warn_of_leaks

PART = 262_144  # rows in memory at a time


def fit_parquet(model: CTRModel, path, target: str = "click", columns: Sequence[str] | None = None, part: int = PART):
    """Train a click model on one or more Parquet files, part by part, twice through: for the columns, then for the weights.

    Memory grows with the embedding table and with ``part``, not with the number of rows. Rows are shuffled within a part;
    write a log in random order, or by time if the last part is to count most. Under ``torchrun`` each process takes its
    share of every batch.

    Parameters
    ----------
    model : an unfitted CTRModel; path : a file, a folder of files or a list of files.
    target, columns : name of the clicks; features, by default all others.
    part : rows in memory at a time.

    Returns
    -------
    The model, trained in place.

    Raises
    ------
    ValueError : no rows, a missing column, or bad clicks.
    """
    log = ds.dataset(path, format="parquet")
    columns = [name for name in log.schema.names if name != target] if columns is None else list(columns)
    if lost := [name for name in [*columns, target] if name not in log.schema.names]:
        raise ValueError(f"{path} has no column {', '.join(lost)}; it has {', '.join(log.schema.names)}.")
    n, clicked = 0, 0.0

    def features() -> Iterator[pd.DataFrame]:
        """Tables of features, counting rows and clicks as they pass."""
        nonlocal n, clicked
        for X, y in parts(log, columns, target, part):
            if not n:
                warn_of_leaks(X, y)
            n, clicked = n + len(y), clicked + float(y.sum())
            yield X

    encoder = model._encoder().fit_batches(features())
    if not 0 < clicked < n:
        raise ValueError(
            f"{path} has {int(clicked)} clicks in {n} rows: a click model needs rows with and without a click."
        )
    model._start(encoder, clicked / n)
    return model._train(lambda epoch: (model._encode(X, y) for X, y in parts(log, columns, target, part)), n, None)


def parts(log: ds.Dataset, columns: list[str], target: str, rows: int) -> Iterator[tuple[pd.DataFrame, np.ndarray]]:
    """Read a log as tables of ``rows`` rows (the last one is shorter) with their clicks; text comes as categories."""
    ready, size = [], 0
    lean = ds.ParquetFragmentScanOptions(
        pre_buffer=False, use_buffered_stream=True
    )  # else a whole file piles up in memory
    batches = log.to_batches(
        columns=[*columns, target],
        batch_size=min(rows, 65_536),
        batch_readahead=1,
        fragment_readahead=1,
        fragment_scan_options=lean,
    )
    for batch in batches:
        while batch.num_rows:
            piece = batch.slice(0, rows - size)
            batch, size = batch.slice(piece.num_rows), size + piece.num_rows
            ready.append(piece)
            if size == rows:
                yield _frame(ready, columns, target)
                ready, size = [], 0
    if size:
        yield _frame(ready, columns, target)


def _frame(batches: list[pa.RecordBatch], columns: list[str], target: str) -> tuple[pd.DataFrame, np.ndarray]:
    table = pa.Table.from_batches(batches).unify_dictionaries()
    for j, field in enumerate(table.schema):
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
            table = table.set_column(j, field.name, table[field.name].dictionary_encode())
    frame = table.to_pandas()
    y = frame.pop(target).to_numpy()
    return frame[columns], clicks(y, len(y), both=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train from the command line; started by ``torchrun``, the processes share the work."""
    ask = argparse.ArgumentParser(prog="python -m adlib.streaming", description="Train a click model on Parquet files.")
    ask.add_argument("path", nargs="+", help="Parquet files, or one folder of them")
    ask.add_argument("--save", type=Path, required=True, help="folder for the model")
    ask.add_argument("--target", default="click", help="column of the clicks, 0 or 1 (default: click)")
    ask.add_argument("--columns", nargs="*", help="features (default: all other columns)")
    ask.add_argument("--part", type=int, default=PART, help=f"rows in memory at a time (default: {PART})")
    ask.add_argument(
        "-p", "--parameter", action="append", default=[], metavar="NAME=VALUE", help="of CTRModel, as dim=16"
    )
    given = ask.parse_args(arguments)
    model = CTRModel()
    for name, _, value in (text.partition("=") for text in given.parameter):
        if name not in model.get_params():
            ask.error(f"CTRModel has no parameter {name!r}; it has {', '.join(model.get_params())}")
        model.set_params(**{name: _value(value)})
    if together := int(os.environ.get("WORLD_SIZE", 1)) > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        distributed.init_process_group("gloo")
    try:
        path = given.path[0] if len(given.path) == 1 else given.path
        fit_parquet(model, path, given.target, given.columns, given.part)
        if parallel.rank() == 0:
            model.save(given.save)
    except (ValueError, OSError) as error:
        raise SystemExit(f"adlib.streaming: {error}") from None
    finally:
        if together:
            distributed.destroy_process_group()


def _value(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


if __name__ == "__main__":
    main()
