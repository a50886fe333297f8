"""Every lesson, executed as a reader would, strictly and without a network, and held against its contract.

The default run is made once: all lessons, two at a time. Then each lesson runs again with its negative control (shuffled labels, an untrained
model, …), which must break the bands that `contracts.yaml` names: a check that cannot fail is worthless.
"""

import functools
import json
import multiprocessing
import re
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import yaml
from conftest import OFFLINE, ROOT, write_notebook

from adlib import course, report, syllabus

NOTEBOOKS = ROOT / "notebooks"
LESSONS = sorted(p.stem for p in NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
CONTRACTS = yaml.safe_load((ROOT / "tests" / "contracts.yaml").read_text(encoding="utf-8"))
for _contract in CONTRACTS.values():  # YAML reads a bare `null` as None, also where it is a key
    _contract["control"]["null"] = _contract["control"].pop(None, None) or _contract["control"].get("null", {})
pytestmark = pytest.mark.timeout(1500)


def run(out, artefacts, *wanted, **options):
    environment = {"PYTHONPATH": OFFLINE, "ADLIB_ARTEFACTS": str(artefacts), "OMP_NUM_THREADS": "1"}
    environment |= options.pop("environment", {})
    return course.run(wanted, folder=NOTEBOOKS, out=out, environment=environment, timeout=900, **options)


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """Return the folder of this session's runs."""
    return tmp_path_factory.mktemp("course")


@pytest.fixture(scope="session")
def default_run(place):
    """Run all lessons once with their defaults; a check that does not hold stops its lesson."""
    return run(place / "out", place / "artefacts", jobs=2, environment={"ADLIB_STRICT": "1"})


def control(place, name):
    """Run a lesson with its negative control; what earlier lessons left is at hand, copied so that no control spoils another's."""
    artefacts = place / f"artefacts-{name}"
    if (place / "artefacts").exists():
        shutil.copytree(place / "artefacts", artefacts)
    parameters = CONTRACTS[name]["control"]["parameters"]
    return run(place / f"control-{name}", artefacts, name, parameters=parameters, jobs=1)[name]


@pytest.fixture(scope="session")
def controls(place, default_run):
    """Run each lesson once more with its negative control, two at a time, longest first.

    In processes: two threads that parse lessons at once meet a fault of Python 3.11 ("AST constructor recursion depth mismatch").
    """
    names = sorted((n for n in LESSONS if n in CONTRACTS), key=lambda name: -default_run[name].seconds)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        return dict(zip(names, pool.map(functools.partial(control, place), names), strict=True))


# ---- the contracts themselves ---------------------------------------------------------------------------------------


def faults(contract):
    """Return what is wrong with a lesson's contract: a band that no number can miss, or that its control or no effect would pass."""
    bands, control = contract.get("metrics", {}), contract.get("control", {})
    found = [f"{name} has neither min nor max" for name, band in bands.items() if not band.keys() & {"min", "max"}]
    found += [
        f"{name} has an empty band"
        for name, band in bands.items()
        if band.get("min", float("-inf")) > band.get("max", float("inf"))
    ]
    if not control.get("parameters"):
        found.append("the control sets no parameter")
    if not control.get("breaks"):
        found.append("the control breaks nothing")
    for name in control.get("breaks", []):
        for kind in ("value", "null"):
            if name not in control.get(kind, {}):
                found.append(f"{name}: {kind} is missing")
    for kind in ("value", "null"):
        for name, value in control.get(kind, {}).items():
            if name not in bands:
                found.append(f"{name}: {kind} is given, but there is no band")
            elif (kind == "null" or name in control["breaks"]) and report.holds(value, bands[name]):
                found.append(f"{name}: the band holds {kind} = {value}")
    return found


@pytest.mark.parametrize("name", LESSONS)
def test_each_lesson_has_a_contract_that_can_be_broken(name):
    assert name in CONTRACTS, f"add a block for {name} to tests/contracts.yaml"
    assert not faults(CONTRACTS[name])


def test_no_contract_is_left_over():
    assert set(CONTRACTS) <= set(LESSONS)


@pytest.mark.parametrize(
    "metrics, control, fault",
    [
        ({"auc": {"min": 0.6}}, {"value": {"auc": 0.7}, "null": {"auc": 0.5}}, "holds value = 0.7"),
        ({"auc": {"min": 0.4}}, {"value": {"auc": 0.3}, "null": {"auc": 0.5}}, "holds null = 0.5"),
        ({"auc": {}}, {"value": {"auc": 0.5}, "null": {"auc": 0.5}}, "neither min nor max"),
        ({"auc": {"min": 2, "max": 1}}, {"value": {"auc": 0.5}, "null": {"auc": 0.5}}, "empty band"),
        ({"auc": {"min": 0.6}}, {"value": {"auc": 0.5}}, "null is missing"),
        ({"auc": {"min": 0.6}}, {"breaks": [], "value": {}, "null": {}}, "breaks nothing"),
        ({"auc": {"min": 0.6}}, {"parameters": {}, "value": {"auc": 0.5}, "null": {"auc": 0.5}}, "sets no parameter"),
        ({}, {"value": {"auc": 0.5}, "null": {"auc": 0.5}}, "there is no band"),
    ],
)
def test_a_vacuous_contract_is_found(metrics, control, fault):
    contract = {"metrics": metrics, "control": {"parameters": {"shuffle": True}, "breaks": ["auc"], **control}}
    assert any(fault in text for text in faults(contract)), faults(contract)


# ---- the lessons ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LESSONS)
def test_the_lesson_completes_and_every_check_holds(default_run, name):
    result = default_run[name]
    assert result.status == "completed", "\n".join(result.failure)
    assert len(result.checks) >= 3 and all(c["ok"] for c in result.checks)


@pytest.mark.parametrize("name", LESSONS)
def test_the_metrics_lie_in_their_bands(default_run, name):
    metrics, bands = default_run[name].metrics, CONTRACTS[name]["metrics"]
    assert not bands.keys() - metrics.keys(), "the lesson does not record what its contract holds"
    missed = {k: (metrics[k], band) for k, band in bands.items() if not report.holds(metrics[k], band)}
    assert not missed


def test_lessons_leave_what_they_promise(place, default_run):
    promised = [(x.name, name) for x in syllabus.lessons(NOTEBOOKS) for name in x.leaves]
    for lesson, name in promised:  # of these the lessons that need it wait
        made = json.loads((place / "out" / lesson / "artefacts.json").read_text())
        assert any(Path(path).name.startswith(f"{name}-") for path in made), (lesson, name, made)
    assert promised


@pytest.mark.parametrize("name", LESSONS)
def test_the_negative_control_breaks_the_contract(controls, name):
    result, contract = controls[name], CONTRACTS[name]
    assert result.status == "completed", "\n".join(result.failure)
    passed = {
        k: result.metrics[k]
        for k in contract["control"]["breaks"]
        if report.holds(result.metrics[k], contract["metrics"][k])
    }
    assert not passed, "these bands hold although the control leaves nothing to find"


def test_the_report_opens_offline_and_says_it_all(place, default_run):
    out = place / "out"
    index = (out / "index.html").read_text(encoding="utf-8")
    for name, result in default_run.items():
        assert f'href="{name}/notebook.html"' in index
        assert all(re.sub("_(low|high)$", "", metric) in index for metric in result.metrics)
    for page in [out / "index.html", *out.glob("*/notebook.html")]:
        text = page.read_text(encoding="utf-8")
        assert "<script" not in text and "Content-Security-Policy" in text
        assert not re.findall(r"<(?:link|img|iframe|source|video)\b[^>]*(?:src|href)=[\"']?(?:https?:)?//", text)
        assert not re.findall(r"url\([\"']?https?:|@import", text)
        assert all("alt=" in tag for tag in re.findall(r"<img\b[^>]*>", text)), page
        assert not re.findall(
            r"\$\$|\\begin\{|<code>[^<]*\\frac", re.sub(r'<div class="highlight.*?</div>', "", text, flags=re.S)
        ), page


def test_two_own_tables_are_enough_for_lessons_01_to_03(tmp_path):
    shop = tmp_path / "shop"
    shop.mkdir()
    for name in ("events.csv", "impressions.csv"):
        shutil.copy(ROOT / "data" / "sample" / name, shop)
    found = run(tmp_path / "out", tmp_path / "artefacts", "01-03", data=shop, jobs=2)
    assert {name: result.status for name, result in found.items()} == dict.fromkeys(found, "completed"), found
    assert all(result.parameters == {"data": str(shop)} for result in found.values())


def test_every_profile_fits_the_lessons():
    every = syllabus.lessons(NOTEBOOKS)
    names = sorted(p.stem for p in (NOTEBOOKS / "profiles").glob("*.yaml"))
    assert names == ["cpu", "gpu", "workshop"]
    for name in names:
        syllabus.settings(every, every, profile=name, folder=NOTEBOOKS)


def test_the_network_is_closed_in_these_runs(folder):
    tries = [
        "import socket\ntry:\n    socket.create_connection(('192.0.2.1', 80), timeout=2)\nexcept OSError as e:\n    lesson.check(str(e), 'closed in tests' in str(e))",
        "try:\n    socket.create_connection(('example.org', 80), timeout=2)\nexcept OSError as e:\n    lesson.check(str(e), 'closed in tests' in str(e))",
    ]
    write_notebook(folder, "01_a", tries)
    found = course.run(folder=folder, out=folder.parent / "out", environment={"PYTHONPATH": OFFLINE})["01_a"]
    assert found.status == "completed" and [c["ok"] for c in found.checks] == [True, True]
