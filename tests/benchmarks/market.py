"""Speed and memory of the market: ``python tests/benchmarks/market.py`` prints one JSON object a line."""

import json
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from adlib import market


def say(name: str, value: float, unit: str, target: str, holds: bool, **more) -> None:
    print(
        json.dumps(
            {"name": name, "value": round(value, 3), "unit": unit, "target": target, "holds": bool(holds), **more}
        ),
        flush=True,
    )


def serve() -> None:
    """Best of five: one million decisions, log included."""
    shop = market.Market(seed=0)
    shop.serve(n=1000)
    seconds = []
    for repeat in range(5):
        begin = time.perf_counter()
        shop.serve(n=1_000_000, seed=repeat)
        seconds.append(time.perf_counter() - begin)
    say(
        "market.serve",
        1 / min(seconds),
        "million impressions/s",
        ">= 1",
        min(seconds) <= 1,
        runs=[round(s, 3) for s in seconds],
    )


def to_parquet(rows: int = 20_000_000) -> None:
    """Stream a log to Parquet and read the peak memory of this process."""
    shop, begin = market.Market(seed=0), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path, writer = Path(folder) / "impressions.parquet", None
        for chunk in shop.stream(n=rows, seed=0):
            table = pa.Table.from_pandas(chunk, preserve_index=False)
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
        writer.close()
        stored = pq.ParquetFile(path).metadata.num_rows
    unit = 1024**3 if sys.platform == "darwin" else 1024**2
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    seconds = time.perf_counter() - begin
    say(
        "market.stream",
        peak,
        "GiB peak",
        "< 1.5",
        peak < 1.5 and stored == rows,
        rows=stored,
        seconds=round(seconds, 1),
    )


if __name__ == "__main__":
    for task in (serve, to_parquet):  # each in a process of its own, so that peak memory is its own
        process = multiprocessing.get_context("spawn").Process(target=task)
        process.start()
        process.join()
