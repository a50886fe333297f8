"""Which lessons there are, what they declare, and the values with which they run; all of it known before a kernel starts."""

import ast
import difflib
import functools
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from adlib.parameters import ParameterError, check_name, declared_parameters

PACKAGE = Path(__file__).resolve().parent


class CourseError(RuntimeError):
    """The course cannot run as asked: no notebooks, an unknown lesson, a full disk."""


@dataclass(frozen=True)
class Lesson:
    """A notebook of the course and what its metadata and its parameters cell say."""

    name: str
    path: Path
    title: str
    question: str
    minutes: float
    needs: tuple
    leaves: tuple  # artefacts that other lessons wait for; they need not wait for its end
    assets: tuple
    optional_assets: tuple
    parameters: dict
    cells: int
    source_hash: str
    problem: str


def notebooks_folder(folder=None):
    """Return the folder of the lessons: `folder`, else beside the installed package, else ``notebooks`` here; or raise CourseError."""
    places = [Path(folder)] if folder else [PACKAGE.parent / "notebooks", Path.cwd() / "notebooks"]
    for place in places:
        if next(place.glob("[0-9][0-9]_*.ipynb"), None):
            return place.resolve()
    raise CourseError(
        f"no lessons were found in {' or '.join(map(str, places))}. Run this inside a clone of the course, or install it with "
        "`python -m pip install -e .` from there."
    )


def code_hash(notebook, kinds=("code",)):
    """Return the hash of a notebook's code cells: equal hashes, equal code, so outputs belong to their source."""
    sources = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] in kinds]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()[:16]


def lessons(folder=None):
    """Return all lessons in order; what is wrong with one (an unread parameter, a need that is no earlier lesson) is its `problem`."""
    paths = sorted(notebooks_folder(folder).glob("[0-9][0-9]_*.ipynb"))
    return [_lesson(path, [p.stem for p in paths if p < path]) for path in paths]


def _lesson(path, earlier):
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        code = [c for c in notebook["cells"] if c["cell_type"] == "code" and "".join(c["source"]).strip()]
    except (ValueError, KeyError) as error:
        raise CourseError(f"{path.name} is not a readable notebook ({error}).") from None
    facts, parameters, problem = notebook["metadata"].get("adlib", {}), {}, ""
    try:
        parameters = _parameters(code)
        for name in set(facts.get("needs", ())) - set(earlier):
            raise ParameterError(f"it needs {name}, which is no earlier lesson.")
    except ParameterError as error:
        problem = f"{path.name}: {error}"
    prose = "\n".join("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "markdown")
    title = re.search(r"^# +(.+)$", prose, re.MULTILINE)
    return Lesson(
        name=path.stem,
        path=path,
        title=title[1] if title else path.stem,
        question=facts.get("question", ""),
        minutes=facts.get("minutes", 1),
        **{key: tuple(facts.get(key, ())) for key in ("needs", "leaves", "assets", "optional_assets")},
        parameters=parameters,
        cells=len(code),
        source_hash=code_hash(notebook, ("code", "markdown")),
        problem=problem,
    )


def _parameters(code):
    """Return what the tagged cell declares; each must be read by another cell."""
    tagged = [c for c in code if "parameters" in c["metadata"].get("tags", [])]
    if len(tagged) != 1:
        raise ParameterError(f"{len(tagged)} cells are tagged `parameters`, there must be one.")
    parameters = declared_parameters("".join(tagged[0]["source"]))
    read = set().union(*(_names_read("".join(c["source"])) for c in code if c is not tagged[0]))
    for name in sorted(parameters.keys() - read):
        raise ParameterError(f"parameter {name} is declared, but no cell reads it.")
    return parameters


def _names_read(source):
    lines = ["pass" if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines()]
    try:
        tree = ast.parse("\n".join(lines))
    except SyntaxError:  # the cell will fail by itself; until then its words count as read
        return set(re.findall(r"\w+", source))
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def select(every, wanted=()):
    """Return the lessons named by `wanted` ("03", "03_ctr_modeling", "01-03"), or all.

    Raises CourseError for a name that is none, ParameterError if a selected lesson has a problem.
    """
    chosen = set()
    for name in wanted:
        low, _, high = name.partition("-")
        if re.fullmatch(r"\d\d?-\d\d?", name):
            found = [x.name for x in every if int(low) <= int(x.name[:2]) <= int(high)]
        else:
            found = [x.name for x in every if name in (x.name, x.name[:2], x.name[1:2] if x.name[0] == "0" else None)]
        if not found:
            near = difflib.get_close_matches(name, [x.name for x in every], n=1, cutoff=0.4)
            hint = f"Did you mean {near[0]}? " if near else ""
            raise CourseError(f"there is no lesson {name}. {hint}There are: {', '.join(x.name for x in every)}.")
        chosen.update(found)
    selected = [x for x in every if x.name in chosen or not wanted]
    for x in selected:
        if x.problem:
            raise ParameterError(x.problem)
    return selected


def settings(every, selected, *, parameters=(), profile=None, data=None, folder=None):
    """Return lesson name → values that differ from the defaults, or raise ParameterError before anything starts.

    Parameters
    ----------
    every, selected : lists of Lesson; a parameter must exist in at least one selected lesson and applies to those that have it.
    parameters : texts "name=value", read by the declared type; or a mapping whose values have that type already.
    profile : str, a file in ``notebooks/profiles``: {lesson or "all": {parameter: value}}; `parameters` win over it.
    data : folder of own tables for the parameter `data`; it is read and checked here (TableError).
    """
    given = {x.name: {} for x in selected}
    if profile:
        _apply_profile(_profile(profile, folder), every, given)
    pairs = list(parameters.items()) if hasattr(parameters, "items") else [_pair(text) for text in parameters]
    for name, value in ([("data", str(data))] if data else []) + pairs:
        having = [x for x in selected if name in x.parameters]
        if not having:
            check_name(name, {p for x in selected for p in x.parameters})
        for x in having:
            parameter = x.parameters[name]
            text = isinstance(value, str) and not hasattr(parameters, "items")
            given[x.name][name] = parameter.parse(value) if text else parameter.accept(value)
    for x in selected:
        values = given[x.name]
        if values.get("data", "market") != "market":
            values["data"] = _own_data(values["data"], check=x.name != "01_data_prep")  # that lesson cleans it
        given[x.name] = {k: v for k, v in values.items() if v != x.parameters[k].default}
    return given


def _pair(text):
    name, equals, value = text.partition("=")
    if not equals:
        raise ParameterError(f"a parameter is given as name=value, not as {text!r}.")
    return name.strip(), value


def _profile(name, folder):
    import yaml

    profiles = notebooks_folder(folder) / "profiles"
    names = sorted(p.stem for p in profiles.glob("*.yaml"))
    if name not in names:
        raise ParameterError(f"no profile is called {name}. There are: {', '.join(names) or 'none'}.")
    return yaml.safe_load((profiles / f"{name}.yaml").read_text(encoding="utf-8")) or {}


def _apply_profile(profile, every, given):
    for target, values in profile.items():
        aimed = [x for x in every if target in ("all", x.name)]
        if not aimed:
            raise ParameterError(f"the profile names a lesson {target}, but there is none.")
        for name, value in (values or {}).items():
            having = [x for x in aimed if name in x.parameters]
            if not having:
                check_name(name, {p for x in aimed for p in x.parameters})
            for x in having:
                accepted = x.parameters[name].accept(value)
                if x.name in given:
                    given[x.name][name] = accepted


@functools.lru_cache(maxsize=8)
def _own_data(folder, check):
    from adlib import tables  # late: pandas is slow to import, and most runs use the market

    tables.read_tables(folder, check=check)
    return str(Path(folder).resolve())
