"""Run lessons: check everything first, then execute those that changed in parallel, and keep each result as it ends.

A lesson runs in a folder of its own that takes the place of the earlier result in one step, so that neither an interrupt nor a full disk costs
a result that was there.
"""

import contextlib
import errno
import json
import os
import queue
import shutil
import subprocess
import time
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import psutil

from adlib import execution, report
from adlib.execution import DISK_FULL
from adlib.lesson import write_atomic
from adlib.results import plan, previous
from adlib.syllabus import PACKAGE, CourseError, lessons, notebooks_folder, select, settings

QUIET = {"PYTHONHASHSEED": "0", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore:IProgress not found"}


def run(
    wanted=(),
    *,
    parameters=(),
    profile=None,
    data=None,
    jobs=2,
    out="runs/latest",
    force=False,
    folder=None,
    timeout=None,
    environment=None,
    tell=lambda result: None,
):
    """Run lessons and write their results and ``index.html`` below `out`; returns dict lesson → Result.

    Parameters
    ----------
    wanted : names such as "03", "03_ctr_modeling", "01-03"; none means all.
    parameters, profile, data : as in `syllabus.settings`; everything is checked before a kernel starts.
    jobs : how many lessons at a time. A lesson waits for those it needs, if they are selected: for their end, or, where one's metadata
        names the artefacts that it ``leaves``, for those; then, if `jobs` is above 1, one lesson more may run for a while,
        and it goes on if the other fails later.
    force : run also what is unchanged.
    folder : of the notebooks, else the course's own.
    timeout : seconds a lesson may take, None for no limit.
    environment : mapping of further environment variables for the kernels.
    tell : called with a Result whenever one has changed.

    Raises CourseError, ParameterError, TableError or AssetError; KeyboardInterrupt after a clean end. Taught in notebooks/00_start_here.ipynb.
    """
    every = lessons(folder)
    selected = select(every, wanted)
    values = settings(every, selected, parameters=parameters, profile=profile, data=data, folder=folder)
    out = Path(out).resolve()
    try:
        with _alone(out):
            results = plan(selected, values, out, force, environment or {})
            _fetch_assets(selected, results)
            try:
                _Run(selected, results, out, jobs, timeout, environment or {}, tell).go()
            finally:
                _write_summary(out, every, results, folder)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise CourseError(DISK_FULL) from None
        raise
    return results


@contextlib.contextmanager
def _alone(out):
    """Hold the folder `out` for this process, and mend what a killed one left there."""
    out.mkdir(parents=True, exist_ok=True)
    mark = out / ".running"
    with contextlib.suppress(FileNotFoundError, ValueError):
        other = int(mark.read_text())
        if other != os.getpid() and psutil.pid_exists(other):
            raise CourseError(
                f"another run (process {other}) writes to {out.name}. Wait for it, or choose another --out."
            )
    write_atomic(mark, str(os.getpid()))
    for old in out.glob(".*.old"):
        final = out / old.name[1:-4]
        old.rename(final) if not final.exists() else shutil.rmtree(old)
    try:
        yield
    finally:
        mark.unlink(missing_ok=True)


def _fetch_assets(selected, results):
    """Fetch what the lessons about to run cannot do without; one that cannot be had keeps only its own lessons from running."""
    lost, todo = {}, [x for x in selected if x.assets and not results[x.name].reused]
    if todo:
        from adlib import assets  # late, and only where a lesson names one

        for name in sorted({a for x in todo for a in x.assets}):
            try:
                assets.fetch([name])
            except assets.AssetError as error:
                lost[name] = str(error)
    for x in todo:
        for name in lost.keys() & set(x.assets):
            results[x.name].status = "not run"
            results[x.name].failure = [f"{x.name} was not run", f"it needs the asset {name}: {lost[name]}"]


def _write_summary(out, every, results, folder):
    metrics = {name: result.metrics for name, result in previous(out, every, results).items()}
    write_atomic(out / "metrics.json", json.dumps(metrics, indent=1))
    report.write_index(out, every, previous(out, every, results), notebooks_folder(folder))


class _Run:
    """The lessons of one call: starts a process for each that is ready, listens to all, keeps each result at its end."""

    def __init__(self, selected, results, out, jobs, timeout, environment, tell):
        self.lessons = {x.name: x for x in selected}
        self.results, self.out, self.timeout, self.tell = results, out, timeout, tell
        waiting = [name for name, result in results.items() if not result.reused]
        self.jobs = max(1, min(jobs, len(waiting)))
        paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        fixed = {"ADLIB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
        self.environment = QUIET | os.environ | fixed | environment
        self.processes, self.events, self.began, self.outcomes = {}, queue.Queue(), {}, {}

    def go(self):
        """Run until every lesson has ended; on Ctrl-C end all of them and raise KeyboardInterrupt."""
        try:
            for result in self.results.values():
                self.tell(result)
            while self.processes or any(r.status == "waiting" for r in self.results.values()):
                self._start_ready()
                self._listen()
        except BaseException:
            self._stop()
            raise

    def _start_ready(self):
        for name in sorted(self.results, key=self._minutes_behind, reverse=True):
            result = self.results[name]
            states = {n: self.results[n].status for n in self.lessons[name].needs if n in self.results}
            if result.status != "waiting":
                continue
            lost = [n for n, state in states.items() if state not in ("waiting", "running", "completed")]
            if lost:
                result.status, result.failure = "not run", [f"needs {lost[0]}, which {_ended(states[lost[0]])}"]
                self.tell(result)
            elif len(self.processes) < self._room(states) and all(map(self._served, states)):
                self._start(name, result)

    def _room(self, states):
        """Return how many lessons may run when one starts whose needs are in `states`: one more than `jobs` beside the rest of a need.

        It belongs to a chain that others wait for; without that it would wait until some short lesson ends. Not where only one may run.
        """
        return self.jobs + (self.jobs > 1 and "running" in states.values())

    def _served(self, name):
        """Return whether those that need this lesson can start: it has ended, or has finished all artefacts that it leaves."""
        lesson, found = self.lessons[name], []
        if lesson.leaves and self.results[name].status == "running":
            with contextlib.suppress(OSError, ValueError):
                found = json.loads((self.out / f".{name}.new" / "artefacts.json").read_text())
        left = {Path(path).name.rpartition("-")[0] for path in found}
        return self.results[name].status == "completed" or (bool(left) and left >= set(lesson.leaves))

    def _threads(self, name):
        """Return the threads for a lesson that starts now: the cores, shared with all that can run beside it.

        As a pair: until the lesson has finished an artefact that it leaves, and from then on, when those that waited for it run too.
        """
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        ahead = [n for n, result in self.results.items() if result.status in ("waiting", "running")]
        others = [self._side_by_side(ahead, waited) for waited in (True, False)]
        return [max(1, cores // min(self.jobs, n)) for n in (others if self.lessons[name].leaves else others[1:] * 2)]

    def _side_by_side(self, names, waited):
        """Return how many of the lessons can run at the same time at most, as lessons of one depth in the chain of needs.

        A need that leaves artefacts is a step of the chain only if what still waits for those counts as waiting.
        """

        def step(need):
            return not self.lessons[need].leaves or (waited and not self._served(need))

        def depth(name):
            needs = [need for need in self.lessons[name].needs if need in names]
            return max((depth(need) + step(need) for need in needs), default=0)

        depths = [depth(name) for name in names]
        return max(map(depths.count, depths), default=1)

    def _minutes_behind(self, name):
        """Return the minutes of a lesson and of the longest chain that waits for it: the longest chain starts first."""
        behind = [self._minutes_behind(x.name) for x in self.lessons.values() if name in x.needs]
        return self.lessons[name].minutes + max(behind, default=0)

    def _start(self, name, result):
        stage = self.out / f".{name}.new"
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir()
        path = str(self.lessons[name].path)
        job = {"lesson": name, "notebook": path, "parameters": result.parameters, "of": result.of}
        now, later = map(str, self._threads(name))
        environment = {"OMP_NUM_THREADS": now} | self.environment
        if "OMP_NUM_THREADS" not in self.environment and later != now:
            environment["ADLIB_THREADS_LATER"] = later
        self.processes[name] = execution.start(job, stage, environment, self.events)
        self.began[name], result.status = time.monotonic(), "running"
        self.tell(result)

    def _listen(self):
        for name in self.processes:
            late = self.timeout and time.monotonic() - self.began[name] > self.timeout
            if late and self.results[name].status == "running":
                self.results[name].status = "timed out"
                self.results[name].failure = [f"it took longer than {self.timeout:g} seconds"]
                self.processes[name].terminate()
        try:
            name, event = self.events.get(timeout=0.2)
        except queue.Empty:
            return
        result = self.results[name]
        if event is None:
            self._end(name, result)
        elif event.pop("done", False):
            self.outcomes[name] = event
        else:
            result.cells, result.of = event["cells"], event["of"]
            self.tell(result)

    def _end(self, name, result):
        code = self.processes.pop(name).wait()
        vars(result).update(self.outcomes.pop(name, {}) if result.status == "running" else {})
        if result.status == "running":
            result.status, result.failure = "failed", [f"the process that ran it ended with exit code {code}"]
        result.seconds = result.seconds or round(time.monotonic() - self.began[name], 1)
        result.finished = datetime.now().isoformat(timespec="seconds")
        if result.status != "completed":
            result.failure = [f"{name} {_ended(result.status)}", *result.failure]
        self._keep(name, result)
        self.tell(result)

    def _keep(self, name, result):
        """Put the new result in the place of the old one; if the disk is full, the old one stays."""
        stage, final, old = (self.out / n for n in (f".{name}.new", name, f".{name}.old"))
        try:
            if DISK_FULL in result.failure:
                raise OSError(errno.ENOSPC, DISK_FULL)
            write_atomic(stage / "status.json", json.dumps(asdict(result), indent=1))
            if final.exists():
                final.rename(old)
            stage.rename(final)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            result.status, result.failure = "failed", [f"{name} failed", DISK_FULL]
            shutil.rmtree(stage, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)

    def _stop(self):
        for process in self.processes.values():
            process.terminate()
        for name, process in self.processes.items():
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
            shutil.rmtree(self.out / f".{name}.new", ignore_errors=True)
        for result in self.results.values():
            if result.status in ("waiting", "running"):
                result.status = "interrupted" if result.status == "running" else "not run"
                self.tell(result)


def _ended(status):
    return {"failed": "failed", "not run": "was not run", "kernel died": "lost its kernel"}.get(status, status)
