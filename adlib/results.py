"""What a run keeps: the result of each lesson, whether it still holds, and the outputs that are committed.

A result is the folder ``<out>/<lesson>/`` with ``notebook.ipynb``, ``notebook.html``, ``metrics.json`` and ``status.json``.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

from adlib import report
from adlib.lesson import write_atomic
from adlib.syllabus import PACKAGE, CourseError, code_hash, lessons

LIMIT = 550_000  # bytes of one committed notebook
FLOOR_4 = ("cli", "course", "execution", "readiness", "report", "results", "syllabus")  # no lesson computes with these
KEY_PACKAGES = (
    "numpy",
    "scipy",
    "pandas",
    "scikit-learn",
    "statsmodels",
    "matplotlib",
    "torch",
    "transformers",
    "peft",
)


@dataclass
class Result:
    """How a lesson ended, or how far it is; the content of ``status.json``."""

    lesson: str
    status: str = "waiting"  # running, completed, failed, stopped early, kernel died, timed out, interrupted, not run
    seconds: float = 0.0
    cells: int = 0
    of: int = 0
    failure: list = field(default_factory=list)
    parameters: dict = field(default_factory=dict)
    metrics: dict = field(default_factory=dict)
    checks: list = field(default_factory=list)
    skipped: list = field(default_factory=list)
    begun: dict = field(default_factory=dict)
    finished: str = ""
    key: str = ""
    reused: bool = False


def _hash(*parts):
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _fingerprint(folder, pattern="**/*"):
    """Return the hash of the names and contents of the files in a folder."""
    facts = []
    for path in sorted(p for p in Path(folder).glob(pattern) if p.is_file() and p.stem not in FLOOR_4):
        with path.open("rb") as file:
            facts.append([path.relative_to(folder).as_posix(), hashlib.file_digest(file, "sha256").hexdigest()])
    return _hash(facts)


def _versions():
    return {d.name: d.version for d in importlib.metadata.distributions() if d.name in KEY_PACKAGES}


def plan(selected, values, out, force, environment):
    """Return lesson name → Result: the one in `out` where nothing has changed, else one that waits.

    Unchanged means equal hashes of source, parameter values, the contents of own data, package, versions, optional assets, and of all that
    in the lessons it needs; and that what it left to others is still there.
    """
    strict = environment.get("ADLIB_STRICT", os.environ.get("ADLIB_STRICT", ""))
    package = [_fingerprint(PACKAGE, "*.*"), _fingerprint(PACKAGE.parent / "data", "assets.toml")]
    common = [sys.version, _versions(), package, strict]
    folders = {v["data"] for v in values.values() if "data" in v}
    data = {folder: _fingerprint(folder) for folder in folders}
    results = {}
    for x in selected:
        needed = [results[name].key for name in x.needs if name in results]
        own = data.get(values[x.name].get("data"))
        key = _hash(x.source_hash, values[x.name], own, common, _optional(x), needed)
        old = read(out / x.name)
        if not force and old and (old.key, old.status) == (key, "completed") and _artefacts_there(out / x.name):
            results[x.name] = replace(old, reused=True)
        else:
            results[x.name] = Result(x.name, of=x.cells + bool(values[x.name]), parameters=values[x.name], key=key)
    return results


def _optional(lesson):
    """Return which optional assets are here: one that arrives adds a section, so the lesson must run again."""
    if not lesson.optional_assets:
        return []
    from adlib import assets

    return [name for name in lesson.optional_assets if assets.available(name)]


def _artefacts_there(folder):
    with contextlib.suppress(FileNotFoundError):
        return all(Path(p, "done").is_file() for p in json.loads((folder / "artefacts.json").read_text()))
    return True


def read(folder):
    """Return the Result kept in a folder, or None if there is none that is whole."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        result = Result(**json.loads((folder / "status.json").read_text(encoding="utf-8")))
        return result if (folder / "notebook.ipynb").is_file() else None
    return None


def previous(out, every, results=()):
    """Return lesson name → Result in the order of the course: those of this run, else those that lie in `out`."""
    found = {x.name: results[x.name] if x.name in results else read(Path(out) / x.name) for x in every}
    return {name: result for name, result in found.items() if result}


def save(results, out, folder=None):
    """Write the outputs of executed lessons back into the notebooks; returns the paths. Sources, ids and metadata stay as they are.

    Raises CourseError, before any file is touched, if a lesson did not complete, ran with other values than the defaults, became longer than
    550 KB or shows a path of this machine.
    """
    texts = {}
    for x in (x for x in lessons(folder) if x.name in results):
        result = results[x.name]
        if result.status != "completed":
            raise CourseError(f"not saved: {x.name} is not complete ({result.status}).")
        if result.parameters:
            raise CourseError(
                f"not saved: {x.name} ran with {', '.join(result.parameters)}; only a run with the defaults is committed."
            )
        text = _with_outputs(x, Path(out) / x.name / "notebook.ipynb")
        if len(text.encode()) > LIMIT:
            raise CourseError(
                f"not saved: {x.name} would have {len(text.encode()) // 1000} KB, at most {LIMIT // 1000} are allowed."
            )
        texts[x.path] = text
    for path, text in texts.items():
        write_atomic(path, text)
    return list(texts)


def _with_outputs(lesson, executed):
    import nbformat

    source, done = nbformat.read(lesson.path, as_version=4), nbformat.read(executed, as_version=4)
    if code_hash(source, ("code", "markdown")) != code_hash(done, ("code", "markdown")):
        raise CourseError(f"not saved: {lesson.name} has changed since it ran.")
    for cell, ran in zip(source.cells, done.cells, strict=True):
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = report.without_noise(ran.outputs), ran.execution_count
            cell.metadata.pop("execution", None)
    for key in ("papermill", "widgets"):
        source.metadata.pop(key, None)
    source.metadata.setdefault("adlib", {})["code_hash"] = code_hash(source)
    outputs = [o for c in source.cells for o in c.get("outputs", [])]
    pictures = "image/png", "image/jpeg"  # their base64 can spell any short path
    words = [{**o, "data": {k: v for k, v in o.get("data", {}).items() if k not in pictures}} for o in outputs]
    shown = json.dumps(words, ensure_ascii=False)
    places = [Path.home(), sys.prefix, sys.base_prefix, PACKAGE.parent, tempfile.gettempdir(), executed.parent]
    found = [text for text in map(str, places) if len(text) > 3 and json.dumps(text)[1:-1] in shown]
    if found:
        raise CourseError(f"not saved: an output of {lesson.name} shows a path of this machine: {found[0]}")
    return nbformat.writes(source) + "\n"
