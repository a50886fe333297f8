"""The command line as a person meets it: help, errors in one sentence, exit codes, tables."""

import subprocess
import sys
import time

import pytest
from conftest import ROOT, write_notebook

from adlib import assets, cli, readiness

pytestmark = pytest.mark.timeout(180)


def adlib(*line, cwd=ROOT):
    """Run the command in a process of its own, in a terminal of 120 columns."""
    command = [sys.executable, "-m", "adlib.cli", *map(str, line)]
    environment = __import__("os").environ | {"COLUMNS": "120", "NO_COLOR": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=170)


@pytest.mark.parametrize(
    "line, words",
    [
        (["--help"], ["run", "list", "fetch", "assets", "check"]),
        (["run", "--help"], ["adlib run 03 -p seed=1", "runs/latest", "--profile", "--data", "resumed"]),
        (["list", "--help"], ["--parameters"]),
        (["fetch", "--help"], ["--mirror", "ADLIB_MIRROR"]),
        (["assets", "--help"], ["licence"]),
        (["check", "--help"], ["exit code 1", "teacher"]),
    ],
)
def test_help_helps(line, words):
    done = adlib(*line)
    assert done.returncode == 0 and all(word in done.stdout for word in words), done.stdout


def test_import_and_help_are_fast_and_light():
    slow = ["torch", "pandas", "papermill", "transformers", "sklearn", "matplotlib", "pandera"]
    code = f"import sys, adlib, adlib.cli; print([m for m in {slow} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    best = min(_seconds("--help") for _ in range(3))
    bare = min(_seconds() for _ in range(3))  # what this machine takes to start Python at all
    assert best < max(1.0, 12 * bare), f"adlib --help takes {best:.2f} s, Python alone {bare:.2f} s"


def _seconds(*line):
    command = [sys.executable, *(["-m", "adlib.cli", *line] if line else ["-c", "pass"])]
    begin = time.perf_counter()
    subprocess.run(command, capture_output=True, check=True)
    return time.perf_counter() - begin


@pytest.mark.parametrize(
    "line, message",
    [
        (["run", "99"], "there is no lesson 99"),
        (["run", "-p", "seeed=3"], "no parameter is called seeed. Did you mean seed?"),
        (["run", "-p", "seed=three"], "parameter seed must be a whole number (int), but 'three' was given."),
        (["run", "--profile", "huge"], "no profile is called huge"),
        (["run", "--data", "no/such/folder"], "no/such/folder"),
        (["run", "--save", "-p", "seed=1"], "--save keeps the outputs of the default run"),
        (["run", "--notebooks", "no/such"], "no lessons were found in no/such"),
        (["fetch", "no_such_asset"], "no_such_asset"),
    ],
)
def test_our_errors_are_one_sentence_and_exit_code_2(tmp_path, line, message):
    write_notebook(tmp_path / "notebooks", "01_a")
    if line[0] == "run" and "--notebooks" not in line:
        line = [*line, "--notebooks", tmp_path / "notebooks"]
    done = adlib(*line, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "runs").exists()


def test_run_tells_progress_failures_in_five_lines_and_where_the_report_is(tmp_path):
    write_notebook(tmp_path / "notebooks", "01_a")
    write_notebook(tmp_path / "notebooks", "02_b", ["# Part\n\n## 2.1 Division", "1 / 0", "print('never')"])
    done = adlib("run", "--notebooks", "notebooks", "-p", "seed=3", cwd=tmp_path)
    assert done.returncode == 1
    assert (
        "01_a                         completed" in done.stdout and "02_b                         failed" in done.stdout
    )
    assert done.stdout.rstrip().endswith("Report: runs/latest/index.html")
    assert done.stderr.strip().splitlines() == [
        "02_b failed",
        "cell 5 of 6, in section “2.1 Division”",
        "ZeroDivisionError: division by zero",
        "line 1: 1 / 0",
        "full traceback: runs/latest/02_b/notebook.html; again: adlib run 02_b -p seed=3 --notebooks notebooks",
    ]
    again = adlib("run", "01", "--notebooks", "notebooks", "-p", "seed=3", cwd=tmp_path)
    assert again.returncode == 0 and "unchanged" in again.stdout


def test_save_names_what_it_wrote(tmp_path):
    path = write_notebook(tmp_path / "notebooks", "01_a")
    done = adlib("run", "--notebooks", "notebooks", "--save", cwd=tmp_path)
    assert done.returncode == 0 and "saved 01_a.ipynb" in done.stdout and '"code_hash"' in path.read_text()


def test_list_shows_the_lessons_of_the_course_from_anywhere(tmp_path):
    done = adlib("list", "--parameters", cwd=tmp_path)
    assert done.returncode == 0 and "00_start_here" in done.stdout and "12_case_studies" in done.stdout
    assert "decides" in done.stdout  # a help text


def test_assets_shows_every_entry_of_the_registry():
    done = adlib("assets")
    assert done.returncode == 0 and all(name in done.stdout for name in assets.registry())


def test_check_answers_each_question_and_says_how_to_mend(monkeypatch, capsys):
    found = readiness.findings()
    assert [f.what for f in found[:8]] == [
        "Python",
        "Packages",
        "Lessons",
        "Disk",
        "Memory",
        "Cores",
        "Device",
        "Kernel",
    ]
    assert all(f.ok for f in found if f.what in ("Python", "Kernel", "Disk")), found
    assert {f.what for f in found} >= {f"Asset {name}" for name in assets.default_names()}
    for points, code in (
        ([readiness.Finding("Disk", False, "1 GB free", "free some space")], 1),
        ([readiness.Finding("Disk", True, "9 GB free")], 0),
    ):
        monkeypatch.setattr(readiness, "findings", lambda points=points: points)
        with pytest.raises(cli.typer.Exit) as ended:
            cli.check()
        assert ended.value.exit_code == code
    text = capsys.readouterr().out
    assert (
        "✗ Disk: 1 GB free\n    mend it: free some space\n1 points are open." in text
        and "Ready: go on with `adlib run`." in text
    )


def test_check_names_a_wrong_package(monkeypatch):
    monkeypatch.setattr(
        readiness.importlib.metadata,
        "requires",
        lambda _: ["numpy<1", "no-such-thing>=2", "pytest>=1; extra == 'test'"],
    )
    finding = readiness._packages()
    assert not finding.ok and "numpy 2" in finding.found and "no-such-thing missing (wanted >=2)" in finding.found
    assert "pytest" not in finding.found and "pip install" in finding.fix
