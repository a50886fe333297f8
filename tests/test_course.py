"""Running lessons: what is refused before a kernel starts, how each end is told, what is run again, and that nothing is lost."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import psutil
import pytest
from conftest import PARAMETERS, ROOT, write_notebook

from adlib import course, results, syllabus
from adlib.parameters import ParameterError
from adlib.syllabus import CourseError
from adlib.tables import TableError

pytestmark = pytest.mark.timeout(180)
EVENTS = "user_id,event,timestamp\nu1,view,2024-01-01T10:00:00Z\nu2,purchase,2024-01-02T10:00:00Z\n"


def run(folder, *wanted, **options):
    return course.run(wanted, folder=folder, out=folder.parent / "out", **options)


# ---- before a kernel starts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wanted, found",
    [
        ((), "00 01 05 12"),
        (("05",), "05"),
        (("5",), "05"),
        (("05_x", "01"), "01 05"),
        (("01-05",), "01 05"),
        (("0-1", "12"), "00 01 12"),
    ],
)
def test_select(folder, wanted, found):
    for number in ("12", "05", "00", "01"):
        write_notebook(folder, f"{number}_x")
    assert " ".join(x.name[:2] for x in syllabus.select(syllabus.lessons(folder), wanted)) == found


@pytest.mark.parametrize("name", ["07", "06_y", "20-30", "clustering", ""])
def test_select_names_what_there_is(folder, name):
    write_notebook(folder, "02_audience_clustering")
    with pytest.raises(CourseError, match=rf"no lesson {re.escape(name)}.*There are: 02_audience_clustering"):
        syllabus.select(syllabus.lessons(folder), [name])


def test_no_lessons_says_where_it_looked(tmp_path):
    with pytest.raises(CourseError, match=r"no lessons were found in .*nowhere.*clone of the course"):
        course.run(folder=tmp_path / "nowhere", out=tmp_path / "out")


def test_a_broken_notebook_is_named(folder):
    (folder / "03_broken.ipynb").write_text("{")
    with pytest.raises(CourseError, match=r"03_broken\.ipynb is not a readable notebook"):
        run(folder)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"parameters": ["seeed=3"]}, "no parameter is called seeed. Did you mean seed"),
        ({"parameters": {"seed": "3"}}, "seed must be a whole number .* but '3' was given"),
        ({"parameters": {"seed": True}}, "seed must be a whole number"),
        ({"parameters": ["seed=three"]}, "seed must be a whole number .* but 'three' was given"),
        ({"parameters": ["x; import os=1"]}, "is not a parameter name"),
        ({"parameters": ["seed"]}, "given as name=value"),
        ({"profile": "huge"}, "no profile is called huge. There are: none, small, wild, wrong"),
        ({"profile": "wild"}, "names a lesson 04_none"),
        ({"profile": "wrong"}, "no parameter is called sed. Did you mean seed"),
    ],
)
def test_what_is_wrong_is_refused_before_a_kernel_starts(folder, options, message):
    write_notebook(folder, "03_demo")
    for name, text in {
        "none": "",
        "small": "all: {seed: 7}",
        "wild": "04_none: {seed: 1}",
        "wrong": "all: {sed: 1}",
    }.items():
        (folder / "profiles").mkdir(exist_ok=True)
        (folder / "profiles" / f"{name}.yaml").write_text(text)
    with pytest.raises(ParameterError, match=message):
        run(folder, **options)
    assert not (folder.parent / "out").exists()


@pytest.mark.parametrize(
    "parameters, read, facts, message",
    [
        (
            PARAMETERS + "\nlimit: int = 3  # unread",
            "print(data, seed)",
            {},
            "03_demo.ipynb: parameter limit is declared, but no cell reads",
        ),
        ("seed: int = int(1)  # x", "print(seed)", {}, "plain value"),
        (PARAMETERS, "print(data, seed)", {"needs": ["05_later"]}, "needs 05_later, which is no earlier lesson"),
    ],
)
def test_a_lesson_with_a_problem_cannot_be_selected(folder, parameters, read, facts, message):
    write_notebook(folder, "03_demo", parameters=parameters, read=read, **facts)
    write_notebook(folder, "05_later")
    every = syllabus.lessons(folder)
    with pytest.raises(ParameterError, match=message):
        syllabus.select(every)
    assert [x.name for x in syllabus.select(every, ["05"])] == ["05_later"]


def test_the_parameters_cell_must_be_tagged_once(folder):
    path = write_notebook(folder, "03_demo")
    path.write_text(path.read_text().replace('"parameters"', '"other"'))
    with pytest.raises(ParameterError, match="0 cells are tagged"):
        run(folder)


def test_settings_apply_in_order_and_only_where_they_exist(folder):
    write_notebook(folder, "01_a", parameters=PARAMETERS + "\nrate: float = .5  # r", read="print(data, seed, rate)")
    write_notebook(folder, "02_b")
    (folder / "profiles").mkdir()
    (folder / "profiles" / "small.yaml").write_text("all: {seed: 7}\n01_a: {rate: 1}")
    every = syllabus.lessons(folder)
    found = syllabus.settings(every, every, parameters=["rate=.25"], profile="small", folder=folder)
    assert found == {"01_a": {"seed": 7, "rate": 0.25}, "02_b": {"seed": 7}}
    assert syllabus.settings(every, every, parameters=["seed=0", "data=market"]) == {"01_a": {}, "02_b": {}}


def test_own_data_is_read_before_a_kernel_starts(folder, tmp_path):
    write_notebook(folder, "01_a")
    with pytest.raises(TableError):
        run(folder, data=tmp_path / "nowhere")
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "events.csv").write_text(EVENTS.replace("event,", "evnt,"))
    with pytest.raises(TableError, match=r"events\.csv"):
        run(folder, data=tmp_path / "shop")
    assert not (folder.parent / "out").exists()


# ---- how a lesson ends ----------------------------------------------------------------------------------------------

ENDS = {
    "01_good": [
        "lesson.check('holds', True)",
        "lesson.check('fails', False)",
        "lesson.record(auc=.5)\nlesson.skip('S', 'adlib fetch s')",
    ],
    "02_error": ["# Reading\n\n## 2.1 Division", "a = 1\n\ndef f():\n    return a / 0\n\nf()", "print('never')"],
    "03_exit": ["import sys\nsys.exit(0)", "print('never')"],
    "04_killed": ["import os, signal\nprint('now')", "os.kill(os.getpid(), signal.SIGKILL)", "print('never')"],
    "05_quit": ["import os\nos._exit(0)"],
    "06_slow": ["import time\ntime.sleep(60)"],
    "07_needs": ["print('never')"],
    "08_needs": ["print('never')"],
    "09_syntax": ["a = = 3"],
    "10_asset": ["print('never')"],
    "11_inside": [
        "import sys, os, json\nprint(json.dumps([sys.executable, os.environ['ADLIB_OFFLINE'], os.environ['OMP_NUM_THREADS']]))"
    ],
}
FACTS = {
    "07_needs": {"needs": ["02_error", "01_good"]},
    "08_needs": {"needs": ["07_needs"]},
    "10_asset": {"assets": ["no_such_asset"]},
}


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """Run one lesson for each way in which a lesson can end."""
    folder = tmp_path_factory.mktemp("ends") / "notebooks"
    for name, cells in ENDS.items():
        write_notebook(folder, name, cells, **FACTS.get(name, {}))
    heard = []
    found = run(folder, jobs=2, timeout=25, tell=lambda r: heard.append((r.lesson, r.status, r.cells)))
    return folder.parent / "out", found, heard


def test_a_completed_lesson_tells_what_held(ends):
    out, found, heard = ends
    good = found["01_good"]
    assert good.status == "completed" and (good.cells, good.of) == (6, 6) and not good.failure
    assert [c["ok"] for c in good.checks] == [True, False] and good.metrics == {"auc": 0.5}
    assert good.skipped == [{"kind": "skip", "section": "S", "how": "adlib fetch s"}]
    assert [h[2] for h in heard if h[:2] == ("01_good", "running")] == list(range(7))
    assert json.loads((out / "metrics.json").read_text())["01_good"] == {"auc": 0.5}
    assert results.read(out / "01_good") == good


@pytest.mark.parametrize(
    "name, status, cells, lines",
    [
        (
            "02_error",
            "failed",
            4,
            ["cell 4 of 5, in section “2.1 Division”", "ZeroDivisionError: division by zero", "line 4: return a / 0"],
        ),
        ("03_exit", "stopped early", 4, ["cell 4 of 5", "the cell called sys.exit()", "the cell begins: import sys"]),
        (
            "04_killed",
            "kernel died",
            4,
            ["cell 5 of 6", "SIGKILL, as when memory runs out", "the cell begins: os.kill"],
        ),
        ("05_quit", "kernel died", 3, ["cell 4 of 4", "exit code 0", "import os"]),
        ("06_slow", "timed out", 3, ["longer than 25 seconds"]),
        ("07_needs", "not run", 0, ["needs 02_error, which failed"]),
        ("08_needs", "not run", 0, ["needs 07_needs, which was not run"]),
        ("09_syntax", "failed", 4, ["cell 4 of 4", "SyntaxError: invalid syntax", "line 1: a = = 3"]),
        ("10_asset", "not run", 0, ["needs the asset no_such_asset"]),
    ],
)
def test_each_other_end_is_told_by_name_in_a_few_lines(ends, name, status, cells, lines):
    _, found, _ = ends
    result = found[name]
    text = "\n".join(result.failure)
    assert (result.status, result.cells) == (status, cells), text
    assert len(result.failure) <= 4 and all(line in text for line in lines), text


def test_the_traceback_stays_in_the_notebook(ends):
    out, _, _ = ends
    assert "return a / 0" in (out / "02_error" / "notebook.ipynb").read_text()
    assert "ZeroDivisionError" in (out / "02_error" / "notebook.html").read_text()
    assert (out / "06_slow" / "notebook.ipynb").is_file() and not list(out.glob(".*"))


def test_the_kernel_is_this_interpreter_offline_with_its_share_of_the_cores(ends):
    out, found, _ = ends
    printed = re.search(
        r"\[.*?\]", str(nbformat.read(out / "11_inside" / "notebook.ipynb", 4).cells[-1].outputs[0].text)
    )
    assert json.loads(printed[0])[:2] == [sys.executable, "1"] and found["11_inside"].status == "completed"


def test_the_index_tells_all_of_it_without_a_network(ends):
    out, _, _ = ends
    page = (out / "index.html").read_text()
    for text in [
        "1/2",
        "kernel died",
        "ZeroDivisionError",
        "✗ fails",
        "Skipped: S",
        "adlib fetch s",
    ]:
        assert text in page, text
    for path in out.rglob("*.html"):
        assert not re.search(r"<script|<(?:link|img|iframe)[^>]*(?:src|href)=[\"']?https?:", path.read_text())
    assert "<msup><mi>x</mi><mn>2</mn></msup>" in (out / "01_good" / "notebook.html").read_text()


# ---- what is run again ----------------------------------------------------------------------------------------------


def reused(folder, *wanted, **options):
    return {name: r.reused for name, r in run(folder, *wanted, **options).items() if r.status == "completed"}


def test_only_what_has_changed_is_run_again(folder, tmp_path):
    left = "path = lesson.finish(lesson.begin(lesson.artefact('thing', seed=seed)))\nlesson.record(seed=seed)"
    write_notebook(folder, "01_a", [left])
    write_notebook(folder, "02_b", needs=["01_a"])
    write_notebook(folder, "03_c")
    assert reused(folder) == {"01_a": False, "02_b": False, "03_c": False}
    assert reused(folder) == {"01_a": True, "02_b": True, "03_c": True}
    assert reused(folder, "03", parameters=["seed=1"]) == {"03_c": False}
    assert reused(folder, "03", parameters={"seed": 1}) == {"03_c": True}
    assert reused(folder, "03", force=True, parameters={"seed": 1}) == {"03_c": False}
    write_notebook(folder, "01_a", [left, "# More\n\nwords"])
    assert reused(folder) == {"01_a": False, "02_b": False, "03_c": False}
    shutil.rmtree(os.environ["ADLIB_ARTEFACTS"])
    assert reused(folder) == {"01_a": False, "02_b": True, "03_c": True}


def test_own_data_is_known_by_its_content(folder, tmp_path):
    write_notebook(folder, "01_a")
    shop = tmp_path / "shop"
    shop.mkdir()
    (shop / "events.csv").write_text(EVENTS)
    assert reused(folder, data=shop) == {"01_a": False}
    assert reused(folder, parameters=[f"data={shop}"]) == {"01_a": True}
    (shop / "events.csv").write_text(EVENTS + "u3,view,2024-01-03T10:00:00Z\n")
    assert reused(folder, data=shop) == {"01_a": False}
    assert str(shop) in (folder.parent / "out" / "01_a" / "notebook.ipynb").read_text()


def test_lessons_that_do_not_wait_run_side_by_side(folder):
    clock = "import time\nlesson.record(begin=time.time())\ntime.sleep(2)\nlesson.record(end=time.time())"
    write_notebook(folder, "01_a", [clock])
    write_notebook(folder, "02_b", [clock], needs=["01_a"])
    write_notebook(folder, "03_c", [clock])
    a, b, c = (r.metrics for r in run(folder, jobs=2).values())
    assert a["end"] <= b["begin"]
    assert max(a["begin"], c["begin"]) < min(a["end"], c["end"])


def test_a_lesson_starts_when_what_it_needs_is_there(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    leave = "lesson.finish(lesson.begin(lesson.artefact('thing', seed=seed)))\nlesson.finish(lesson.begin(lesson.artefact('more')))"
    begin = "import os, pathlib, time\nlesson.record(begin=time.time(), threads=int(os.environ['OMP_NUM_THREADS']))"
    flag = f"flag = pathlib.Path({str(tmp_path / 'flag')!r})"
    wait = f"{flag}\nlast = time.time() + float(os.environ['WAIT'])\nwhile not flag.exists() and time.time() < last:\n    time.sleep(0.05)\nlesson.record(end=time.time())"
    later = "lesson.record(later=torch.get_num_threads())"
    write_notebook(folder, "01_a", [begin, f"import torch\n{leave}\n{later}", wait], leaves=["thing", "more"])
    write_notebook(folder, "02_b", [begin, f"{flag}\nflag.touch()"], needs=["01_a"])
    write_notebook(folder, "03_c", [begin, leave, wait], leaves=["other"])
    write_notebook(folder, "04_d", [begin], needs=["03_c"])
    write_notebook(folder, "05_e", [begin, wait])
    patient, hasty = {"WAIT": "60"}, {"WAIT": "3"}
    a, b = (r.metrics for r in run(folder, "01", "02", environment=patient).values())
    assert b["begin"] < a["end"], "02 waits for the artefacts of 01, not for its end"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert a["threads"] == cores, "nothing runs beside 01 while 02 waits"
    assert a["later"] == b["threads"] == max(1, cores // 2), "from then on they can run beside each other"
    (tmp_path / "flag").unlink()
    a, b, e = (r.metrics for r in run(folder, "01", "02", "05", force=True, environment=patient).values())
    assert b["begin"] < min(a["end"], e["end"]), "beside the rest of 01 one more may run"
    (tmp_path / "flag").unlink()
    a, b = (r.metrics for r in run(folder, "01", "02", force=True, jobs=1, environment=hasty).values())
    assert b["begin"] >= a["end"], "one at a time stays one at a time"
    (tmp_path / "flag").unlink()
    c, d = (r.metrics for r in run(folder, "03", "04", environment=hasty).values())
    assert c["end"] <= d["begin"], "03 never left what it says, so its end counts"


def test_lessons_that_wait_for_each_other_get_all_cores(folder, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads = "import os\nlesson.record(threads=int(os.environ['OMP_NUM_THREADS']))"
    write_notebook(folder, "01_a", [threads])
    write_notebook(folder, "02_b", [threads], needs=["01_a"])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert [r.metrics["threads"] for r in run(folder, jobs=2).values()] == [cores, cores]
    write_notebook(folder, "03_c", [threads])
    found = [r.metrics["threads"] for r in run(folder, jobs=2, force=True).values()]
    assert found[0] == found[2] == max(1, cores // 2)  # beside each other
    assert found[1] in (cores, max(1, cores // 2))  # all cores if 03_c has ended by then


def test_the_longest_chain_starts_first(folder):
    clock = "import time\nlesson.record(begin=time.time())"
    write_notebook(folder, "01_a", [clock], minutes=2)
    write_notebook(folder, "02_b", [clock], minutes=1)
    write_notebook(folder, "03_c", [clock], minutes=1.5)
    write_notebook(folder, "04_d", [clock], minutes=3, needs=["02_b"])
    found = run(folder, jobs=1)
    assert list(found) == ["01_a", "02_b", "03_c", "04_d"]
    assert sorted(found, key=lambda name: found[name].metrics["begin"]) == ["02_b", "04_d", "01_a", "03_c"]


# ---- nothing is lost ------------------------------------------------------------------------------------------------


def command(folder, *more):
    """Start the command line as a person would, and return the process."""
    line = [
        sys.executable,
        "-m",
        "adlib.cli",
        "run",
        "--notebooks",
        folder,
        "--out",
        folder.parent / "out",
        "--jobs",
        "1",
        *more,
    ]
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a suite run in the background ignores SIGINT, and hands that on
    return subprocess.Popen(list(map(str, line)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def wait_for(what, seconds=60):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_kernel_and_goes_on_where_it_was(folder, how, tmp_path):
    mark = tmp_path / "pid"
    write_notebook(folder, "01_a")
    slow = f"import os, time, pathlib\npathlib.Path({str(mark)!r}).write_text(str(os.getpid()))\ntime.sleep(60 * (os.getpid() > 0))"
    write_notebook(folder, "02_b", [slow])
    process = command(folder)
    wait_for(mark.exists)
    wait_for(lambda: mark.read_text())
    process.send_signal(how)
    text, _ = process.communicate(timeout=30)
    wait_for(lambda: not psutil.pid_exists(int(mark.read_text())), 15)
    if how == signal.SIGINT:
        assert process.returncode == 130 and "the same command goes on from here" in text
        assert not list((folder.parent / "out").glob(".*"))
    write_notebook(folder, "02_b")
    found = run(folder)
    assert {n: (r.status, r.reused) for n, r in found.items()} == {
        "01_a": ("completed", True),
        "02_b": ("completed", False),
    }


FULL = """
import sys
if "adlib.execution" in " ".join(sys.orig_argv):
    import papermill.iorw
    def full(self, *_):
        raise OSError(28, "No space left on device")
    papermill.iorw.LocalHandler.write = full
"""


def test_a_full_disk_is_one_sentence_and_the_earlier_result_stays(folder, tmp_path, monkeypatch):
    write_notebook(folder, "01_a", ["lesson.record(auc=.5)"])
    run(folder)
    (tmp_path / "sitecustomize.py").write_text(FULL)
    full = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    found = run(folder, force=True, environment=full)["01_a"]
    assert found.status == "failed" and "the disk is full: free some space" in found.failure[1]
    kept = results.read(folder.parent / "out" / "01_a")
    assert kept.status == "completed" and kept.metrics == {"auc": 0.5}

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(course, "write_atomic", no_space)
    with pytest.raises(CourseError, match="the disk is full"):
        run(folder, force=True)
    monkeypatch.undo()
    assert reused(folder) == {"01_a": True}


def test_a_run_that_was_killed_between_two_renames_is_mended(folder):
    write_notebook(folder, "01_a")
    run(folder)
    out = folder.parent / "out"
    (out / "01_a").rename(out / ".01_a.old")
    assert reused(folder) == {"01_a": True} and not list(out.glob(".*"))


def test_two_runs_do_not_write_to_one_folder(folder):
    write_notebook(folder, "01_a")
    (folder.parent / "out").mkdir()
    (folder.parent / "out" / ".running").write_text(str(os.getppid()))
    with pytest.raises(CourseError, match=rf"another run \(process {os.getppid()}\)"):
        run(folder)


def test_a_folder_with_braces_and_spaces_works(tmp_path):
    folder = tmp_path / "my {shop} ü" / "notebooks"
    write_notebook(folder, "01_a")
    assert run(folder, parameters={"seed": 2})["01_a"].status == "completed"


# ---- the committed outputs ------------------------------------------------------------------------------------------


def test_save_writes_outputs_back_and_nothing_else(folder):
    noise = "import sys\nprint('  3%|▎    | 3/100 [00:00<00:01, 70.1it/s]', file=sys.stderr)\nprint('kept')"
    path = write_notebook(folder, "01_a", [noise, "lesson.record(auc=.5)"])
    before = nbformat.read(path, 4)
    found = run(folder)
    assert results.save(found, folder.parent / "out", folder) == [path]
    after = nbformat.read(path, 4)
    assert [c.id for c in after.cells] == [c.id for c in before.cells]
    assert [c.source for c in after.cells] == [c.source for c in before.cells]
    assert [c.execution_count for c in after.cells if c.cell_type == "code"] == [1, 2, 3, 4, 5]
    assert after.metadata.adlib.code_hash == syllabus.code_hash(after) and "papermill" not in after.metadata
    text = path.read_text()
    assert (
        after.cells[4].outputs == [{"output_type": "stream", "name": "stdout", "text": "kept\n"}]
        and "iopub" not in text
    )
    assert reused(folder) == {"01_a": True}


@pytest.mark.parametrize(
    "cell, options, message",
    [
        ("1 / 0", {}, "01_a is not complete .failed."),
        ("print(seed)", {"parameters": ["seed=3"]}, "ran with seed; only a run with the defaults"),
        ("import os\nprint(os.getcwd())", {}, "shows a path of this machine"),
        ("print('x' * 600_000)", {}, "would have 6.. KB, at most 550"),
    ],
)
def test_save_refuses_what_should_not_be_committed(folder, cell, options, message):
    path = write_notebook(folder, "01_a", [cell])
    before = path.read_text()
    found = run(folder, **options)
    with pytest.raises(CourseError, match=message):
        results.save(found, folder.parent / "out", folder)
    assert path.read_text() == before


def test_save_refuses_a_notebook_that_changed_since(folder):
    write_notebook(folder, "01_a")
    found = run(folder)
    write_notebook(folder, "01_a", ["print(1)"])
    with pytest.raises(CourseError, match="has changed since it ran"):
        results.save(found, folder.parent / "out", folder)
