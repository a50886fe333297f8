"""A reader's own shop: two tables in odd names and encodings, mapped by columns.yaml, run through lessons 01 to 03 by the command line."""

import json
import os
import subprocess
import sys

import pandas as pd
import pytest
from conftest import OFFLINE, ROOT

from adlib import assets, market, tables

COLUMNS = """events:
  file: 点击.csv
  columns: {Kunde: user_id, Artikel: product_id, Art: event, Zeit: timestamp, Betrag: amount}
  values: {event: {ansehen: view, merken: favourite, Korb: cart, kaufen: purchase}}
impressions:
  file: anzeigen.csv.gz
  columns: {Zeit: timestamp, Kunde: user_id, Anzeige: creative_id, geklickt: click, Platz: position}
"""
WORDS = {"view": "ansehen", "favourite": "merken", "cart": "Korb", "purchase": "kaufen"}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A folder as a shop in Hamburg with a Chinese warehouse might send it: GB18030, a gzip with a byte-order mark, German names."""
    assets.fetch(["cdnow", "open_bandit"], progress=False)  # before the network is closed
    folder = tmp_path_factory.mktemp("laden")
    made = market.Market(seed=4, n_users=700, n_products=60)
    events, shown = made.events(0), made.serve(n=30_000, seed=0)
    events = events.assign(event=events.event.map(WORDS), user_id="客户" + events.user_id)
    events.columns = ["Kunde", "Artikel", "Art", "Zeit", "Betrag"]
    events.to_csv(folder / "点击.csv", index=False, encoding="gb18030")
    shown = shown.assign(user_id="客户" + shown.user_id)[["timestamp", "user_id", "creative_id", "click", "position"]]
    shown.columns = ["Zeit", "Kunde", "Anzeige", "geklickt", "Platz"]
    shown.to_csv(folder / "anzeigen.csv.gz", index=False, encoding="utf-8-sig")
    (folder / "columns.yaml").write_text(COLUMNS, encoding="utf-8")
    return folder


def adlib(*arguments, **environment):
    command = [sys.executable, "-m", "adlib.cli", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": OFFLINE, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=900, check=False)


def test_the_tables_are_read_as_they_are(shop):
    read = tables.read_tables(shop)
    assert set(read) == {"events", "impressions"}
    assert set(read["events"].event) == set(WORDS) and read["events"].user_id.str.startswith("客户").all()
    assert isinstance(read["impressions"].timestamp.dtype, pd.DatetimeTZDtype)


@pytest.mark.timeout(900)
def test_lessons_01_to_03_run_on_it(shop, tmp_path):
    done = adlib("run", "01-03", "--data", shop, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("01_data_prep", "02_audience_clustering", "03_ctr_modeling"):
        status = json.loads((tmp_path / "out" / name / "status.json").read_text(encoding="utf-8"))
        assert status["status"] == "completed" and status["cells"] == status["of"]
        assert status["skipped"], "what needs the planted truth or further tables says so"
    assert (tmp_path / "out" / "index.html").exists()


def test_a_missing_column_is_one_sentence_before_anything_runs(shop, tmp_path):
    (tmp_path / "impressions.csv").write_text("timestamp,user_id\n2026-01-01,a\n")
    done = adlib("run", "03", "--data", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 2 and "click" in done.stderr and "impressions" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) < 12
