"""Run one lesson with papermill in a process of its own, and say honestly how it ended.

`course` starts ``python -m adlib.execution`` for each lesson, writes the job as one line of JSON to its standard input and reads one line of
JSON an event from its standard output. When the input closes, because `course` was stopped or killed, the kernel is killed too.
"""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager

from adlib.lesson import EVENT_MIME, METRICS_MIME

DISK_FULL = "the disk is full: free some space and run the same command again, finished lessons are kept."


class ThisPython(AsyncKernelManager):
    """A kernel of the interpreter that runs the course, whatever kernels are installed on the machine."""

    latest = None  # the one kernel of this process

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        type(self).latest = self

    @property
    def kernel_spec(self):
        """The kernel that papermill asks for as ``python3``."""
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name="Python 3", language="python")

    @classmethod
    def process(cls):
        """Return the kernel's process (a Popen), or None before it started."""
        return getattr(getattr(cls.latest, "provisioner", None), "process", None)


def code_cells(notebook):
    """Return the code cells of a notebook that hold any code, without what papermill adds after a failure."""
    cells = [c for c in notebook["cells"] if c["cell_type"] == "code" and "".join(c["source"]).strip()]
    return [c for c in cells if "papermill-error-cell-tag" not in c["metadata"].get("tags", [])]


def events(notebook):
    """Return what the cells told, as dict: metrics, checks, skipped (sections), begun (versions and device)."""
    metrics, told = {}, []
    for output in (o for cell in code_cells(notebook) for o in cell.get("outputs", [])):
        metrics |= output.get("data", {}).get(METRICS_MIME, {})
        if EVENT_MIME in output.get("data", {}):
            told.append(dict(output["data"][EVENT_MIME]))
    begun = next((e for e in told if e["kind"] == "start"), {})
    checks, skipped = ([e for e in told if e["kind"] == kind] for kind in ("check", "skip"))
    return {"metrics": metrics, "checks": checks, "skipped": skipped, "begun": begun}


def judge(notebook):
    """Tell from the cells alone how a run ended; papermill's own metadata calls a dead kernel "completed".

    Returns dict: status (completed, failed, stopped early), cells (executed), of (all), failure (four lines, if any).
    """
    cells = code_cells(notebook)
    executed = [c for c in cells if c.get("execution_count")]
    facts = {"status": "completed", "cells": len(executed), "of": len(cells), "failure": []}
    broken = [(c, o) for c in cells for o in c.get("outputs", []) if o["output_type"] == "error"]
    if broken:
        cell, error = broken[0]
        left = error["ename"] == "SystemExit"
        facts["status"] = "stopped early" if left else "failed"
        what = "the cell called sys.exit()" if left else f"{error['ename']}: {error['evalue']}"
        facts["failure"] = describe(notebook, cell, what, "\n".join(error["traceback"]))
    elif len(executed) < len(cells):
        facts["status"] = "stopped early"
        facts["failure"] = [f"only {len(executed)} of {len(cells)} cells were executed"]
    return facts


def describe(notebook, cell, what, traceback=""):
    """Return where a cell broke in three lines: cell and section, error, source line."""
    cells = notebook["cells"]
    before = ["".join(c["source"]) for c in cells[: cells.index(cell)] if c["cell_type"] == "markdown"]
    heads = re.findall(r"^#+ +(.+)$", "\n".join(before), re.MULTILINE)
    place = f"cell {code_cells(notebook).index(cell) + 1} of {len(code_cells(notebook))}"
    lines = "".join(cell["source"]).splitlines()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", traceback)
    numbers = re.findall(rf"Cell In\[{cell.get('execution_count')}\], line (\d+)", plain)
    number = min(int(numbers[-1]), len(lines)) if numbers else 0
    what = " ".join(what.split())
    return [
        place + (f", in section “{heads[-1]}”" if heads else ""),
        what if len(what) < 400 else what[:400] + " …",
        f"line {number}: {lines[number - 1].strip()}" if number else f"the cell begins: {lines[0].strip()}",
    ]


def death(notebook, cell, code):
    """Return the facts of a run whose kernel died in `cell` with exit code `code` (negative: the signal that killed it)."""
    why = f"exit code {code}"
    if code is not None and code < 0:
        why = signal.Signals(-code).name + (", as when memory runs out" if code == -9 else "")
    return {"status": "kernel died", "failure": describe(notebook, cell, f"the kernel died ({why})")}


def save_sometimes(manager, seconds=2.0):
    """Let papermill's manager write the notebook at the start, at most so often, and at the end, not twice a cell."""
    write = manager.save

    def _save(self, **options):
        first, self.begun = not hasattr(self, "begun"), True
        if first or self.end_time is not None or (self.now() - self.last_save_time).total_seconds() >= seconds:
            write(self, **options)

    manager.save = _save


def execute(job, tell):
    """Execute ``job["notebook"]`` with ``job["parameters"]`` in ``job["folder"]``; returns the facts of `judge` and `events`."""
    import nbformat
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    from adlib import report

    path, began, done = Path(job["folder"], "notebook.ipynb"), [], []

    def _executed(cell_index, **_):
        done.append(cell_index)
        tell(cells=len(done), of=job["of"])

    dead = False
    save_sometimes(papermill.engines.NotebookExecutionManager)
    try:
        papermill.execute_notebook(
            job["notebook"].replace("{", "{{").replace("}", "}}"),  # papermill formats paths
            str(path).replace("{", "{{").replace("}", "}}"),
            parameters=job["parameters"],
            kernel_name="python3",
            language="python",
            progress_bar=False,
            cwd=job["folder"],
            kernel_manager_class=ThisPython,
            on_cell_execute=lambda cell_index, **_: began.append(cell_index),
            on_cell_executed=_executed,
        )
    except PapermillExecutionError:
        pass  # the notebook holds the error, and judge reads it
    except DeadKernelError:
        dead = True
    notebook = nbformat.read(path, as_version=4)
    facts = judge(notebook)
    if dead:
        facts |= death(notebook, notebook.cells[began[-1]], ThisPython.process().poll()) | {"cells": len(done)}
    elif facts["status"] == "completed" and len(done) < facts["of"]:
        facts |= {"status": "stopped early", "failure": [f"only {len(done)} of {facts['of']} cells answered"]}
    page = report.lesson_page(notebook, job["lesson"])
    path.with_suffix(".html").write_text(page, encoding="utf-8")
    return facts | events(notebook)


def start(job, folder, environment, events):
    """Start a process that executes `job` in `folder`; puts (lesson, event) and at its end (lesson, None) into the queue `events`."""
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "adlib.execution"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment | {"ADLIB_RUN_DIR": str(folder)},
            cwd=folder,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # a Ctrl-C reaches the parent only, which then ends its processes in order
        )
    process.stdin.write(json.dumps(job | {"folder": str(folder)}) + "\n")
    process.stdin.flush()

    def _hear():
        for line in process.stdout:
            events.put((job["lesson"], json.loads(line)))
        events.put((job["lesson"], None))

    threading.Thread(target=_hear, daemon=True).start()
    return process


def stop(*_):
    """Kill the kernel with everything it started, and this process."""
    process = ThisPython.process()
    if process is not None and process.poll() is None:
        if hasattr(os, "killpg"):  # the kernel leads a process group of its own
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    os._exit(1)


def _watch():
    sys.stdin.read()  # returns when the parent has closed the pipe or died
    stop()


def main():
    """Read a job from standard input, execute it, and tell the events to standard output."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever the kernel writes to its standard output must not get between the events

    def _tell(**event):
        print(json.dumps(event), file=channel, flush=True)

    signal.signal(signal.SIGTERM, stop)
    sys.modules["rfc3987_syntax"] = (
        None  # jsonschema would compile 38 grammars of addresses with it (1.2 s); notebooks have none
    )
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_watch, daemon=True).start()
    started = time.perf_counter()
    try:
        facts = execute(job, _tell)
    except Exception as error:  # whatever it is must reach the person who waits, as one line
        what = DISK_FULL if getattr(error, "errno", None) == errno.ENOSPC else f"{type(error).__name__}: {error}"
        facts = {"status": "failed", "failure": [what]}
    _tell(**facts, seconds=round(time.perf_counter() - started, 1), done=True)


if __name__ == "__main__":
    main()
