"""lesson and parameters: what a notebook calls, and the guard that holds also in plain papermill."""

import base64
import io
import json
import random

import numpy as np
import pandas as pd
import papermill
import pytest
from conftest import write_notebook
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from papermill.exceptions import PapermillExecutionError
from PIL import Image

from adlib import lesson, parameters
from adlib.parameters import ParameterError


@pytest.fixture
def shown(monkeypatch):
    """Collect what is displayed as (data, metadata)."""
    seen = []
    monkeypatch.setattr(lesson, "display", lambda data, raw, metadata=None: seen.append((data, metadata)))
    return seen


# ---- what a notebook calls ------------------------------------------------------------------------------------------


def test_start_shows_one_line_and_seeds(shown):
    lesson.start("99_demo", seed=3)
    first = random.random(), np.random.rand()  # noqa: NPY002 -- the global generator is what start seeds
    lesson.start("99_demo", seed=3)
    assert (random.random(), np.random.rand()) == first  # noqa: NPY002
    text = shown[0][0]["text/plain"]
    assert "\n" not in text and "99_demo" in text and f"numpy {np.__version__}" in text


def test_start_wants_a_lesson_name():
    with pytest.raises(ValueError, match="named like '03_ctr_modeling'"):
        lesson.start("ctr modelling")


@pytest.mark.parametrize("value", [True, np.bool_(True), np.array([True]), pd.Series([True]), np.all([1, 1])])
def test_check_holds(shown, value):
    lesson.check("one & one", value)
    data = shown[0][0]
    assert data[lesson.EVENT_MIME] == {"kind": "check", "message": "one & one", "ok": True}
    assert data["text/plain"].startswith("✓") and "one &amp; one" in data["text/html"]


@pytest.mark.parametrize("value", ["yes", 1, None, [True], np.array([True, False]), float("nan"), pd.NA])
def test_check_refuses_what_is_no_truth_value(value):
    with pytest.raises(TypeError, match="needs True or False"):
        lesson.check("message", value)


def test_check_shows_a_cross_to_a_learner_and_stops_a_strict_run(shown, monkeypatch):
    lesson.check("1 > 2", 1 > 2)
    assert shown[0][0]["text/plain"] == "✗ 1 > 2"
    monkeypatch.setenv("ADLIB_STRICT", "1")
    with pytest.raises(lesson.CheckFailed, match="1 > 2"):
        lesson.check("1 > 2", 1 > 2)
    assert shown[1][0][lesson.EVENT_MIME]["ok"] is False


def test_show_embeds_a_picture_with_its_text_and_closes_the_figure(shown):
    fig, ax = plt.subplots(figsize=(4, 3))
    ax.plot([1, 2])
    lesson.show(ax, alt="The line rises.")
    data, metadata = shown[0]
    picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
    assert picture.width == metadata["image/png"]["width"] and 300 < picture.width < 420
    assert metadata["alt"] == metadata["image/png"]["alt"] == "The line rises." and not plt.fignum_exists(fig.number)


def test_show_takes_a_pil_image_and_wants_a_text(shown):
    lesson.show(Image.new("L", (20, 10)), alt="A black box.")
    assert shown[0][1]["image/png"]["width"] == 20
    with pytest.raises(ValueError, match="needs a sentence"):
        lesson.show(Image.new("L", (20, 10)), alt=" ")


def test_show_html_is_labelled(shown):
    lesson.show_html("<b>Coat</b>", alt='A "card"')
    assert shown[0][0]["text/html"] == '<div role="group" aria-label="A &quot;card&quot;"><b>Coat</b></div>'


def test_record_writes_metrics_and_adds_up(shown, monkeypatch, tmp_path):
    monkeypatch.setenv("ADLIB_RUN_DIR", str(tmp_path / "run"))
    lesson.start("99_demo")
    lesson.record(auc=np.float32(0.5), n=np.int64(3))
    lesson.record(gap=0.25)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == {"auc": 0.5, "n": 3, "gap": 0.25}
    assert shown[1][0][lesson.METRICS_MIME] == {"auc": 0.5, "n": 3}


def test_record_outside_a_run_writes_nothing(shown, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    lesson.record(auc=0.5)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "value, error",
    [("0.5", TypeError), (None, TypeError), (True, TypeError), (float("nan"), ValueError), (np.inf, ValueError)],
)
def test_record_refuses_what_is_no_finite_number(value, error):
    with pytest.raises(error, match="auc"):
        lesson.record(auc=value)


def test_skip_says_how(shown):
    lesson.skip("Upworthy", "adlib fetch upworthy")
    assert shown[0][0][lesson.EVENT_MIME] == {"kind": "skip", "section": "Upworthy", "how": "adlib fetch upworthy"}


def test_artefact_depends_on_its_key_and_is_ready_only_when_finished():
    folder = lesson.artefact("adapter", seed=0, steps=60)
    assert folder == lesson.artefact("adapter", steps=60, seed=0) != lesson.artefact("adapter", seed=1, steps=60)
    assert not lesson.ready(folder)
    (lesson.begin(folder) / "weights").write_text("1")
    assert not lesson.ready(folder)
    assert lesson.ready(lesson.finish(folder))
    lesson.begin(folder)
    assert not lesson.ready(folder) and not list(folder.iterdir())
    with pytest.raises(ValueError, match="named with letters"):
        lesson.artefact("../adapter")


def test_write_atomic_keeps_the_old_text_when_the_disk_is_full(tmp_path, monkeypatch):
    lesson.write_atomic(tmp_path / "a.json", "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lesson.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        lesson.write_atomic(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


# ---- parameters -----------------------------------------------------------------------------------------------------

SOURCE = """\
data: str = "market"  # where the tables # come from
seed: int = 0
rate: float = 1  # share
flag: bool = False  # switch
limit: int | None = (
    None  # at most
)
"""


def test_declared_parameters_have_type_default_and_help():
    found = parameters.declared_parameters(SOURCE)
    assert list(found) == ["data", "seed", "rate", "flag", "limit"]
    assert found["data"] == parameters.Parameter("data", "str", False, "market", "where the tables # come from")
    assert (
        found["limit"].help == "at most"
        and found["limit"].optional
        and found["limit"].type == "int"
        and found["seed"].help == ""
    )


@pytest.mark.parametrize(
    "source, message",
    [
        ("seed = 0", "should read `name: type = value"),
        ("seed: int", "should read"),
        ("seed: list = []", "should be one of str, int, float, bool"),
        ("seed: int = 2 ** 10", "plain value, not an expression"),
        ("seed: int = 0.5", "must be a whole number"),
        ("seed: int = True", "must be a whole number"),
        ("seed: int = None", "must be a whole number"),
        ("rate: float = 1e999", "must be a number"),
        ("seed: int = 0\nseed: int = 1", "declared twice"),
        ("import os", "should read"),
        ("seed: int = ", "not valid Python, line 1"),
    ],
)
def test_a_wrong_declaration_is_named(source, message):
    with pytest.raises(ParameterError, match=message):
        parameters.declared_parameters(source)


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("data", "my shop/", "my shop/"),
        ("data", "123", "123"),
        ("seed", "-3", -3),
        ("rate", "1", 1.0),
        ("rate", ".5", 0.5),
        ("flag", "True", True),
        ("flag", "no", False),
        ("limit", "none", None),
        ("limit", "7", 7),
    ],
)
def test_text_is_read_by_the_declared_type(name, text, value):
    found = parameters.declared_parameters(SOURCE)[name].parse(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "name, text",
    [
        ("seed", "abc"),
        ("seed", "1.5"),
        ("seed", "none"),
        ("rate", "nan"),
        ("rate", "x"),
        ("flag", "maybe"),
        ("limit", ""),
    ],
)
def test_text_of_another_type_is_refused(name, text):
    with pytest.raises(ParameterError, match=f"parameter {name} must be .* was given"):
        parameters.declared_parameters(SOURCE)[name].parse(text)


@given(st.integers())
def test_any_whole_number_survives_the_command_line(value):
    assert parameters.Parameter("seed", "int", False, 0, "").parse(str(value)) == value


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_any_finite_number_survives_the_command_line(value):
    assert parameters.Parameter("rate", "float", False, 0.0, "").parse(repr(value)) == value


@given(st.text())
def test_any_text_survives_or_is_refused_by_name(value):
    assert parameters.Parameter("data", "str", False, "", "").parse(value) == value
    for kind in ("int", "float", "bool"):
        try:
            found = parameters.Parameter("x", kind, False, 0, "").parse(value)
        except ParameterError as error:
            assert "parameter x must be" in str(error)
        else:
            assert type(found) is parameters.TYPES[kind]


def test_an_unknown_name_gets_a_suggestion():
    with pytest.raises(
        ParameterError, match=r"no parameter is called seeed\. Did you mean seed\? There are: data, seed"
    ):
        parameters.check_name("seeed", {"seed", "data"})
    with pytest.raises(ParameterError, match="is not a parameter name"):
        parameters.check_name("x;import os", {"seed"})


# ---- plain papermill ------------------------------------------------------------------------------------------------

NAMES = (
    'data: str = "market"  # where\nseed: int = 0  # numbers\nrate: float = 0.5  # share\nflag: bool = False  # switch'
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Return a function that runs a small lesson with papermill itself and returns its printed text."""
    folder = tmp_path_factory.mktemp("plain")
    path = write_notebook(folder, "99_demo", parameters=NAMES, read="print(data, seed, rate, flag)")

    def run(**values):
        return papermill.execute_notebook(str(path), None, values, progress_bar=False, kernel_name="python3")

    return run


def test_plain_papermill_takes_good_parameters(plain):
    done = plain(seed=3, rate=1, flag=True)
    assert "market 3 1 True" in json.dumps(done.cells)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "values, message",
    [
        ({"seeed": 3}, "Did you mean seed"),
        ({"seed": "three"}, "seed must be a whole number"),
        ({"seed": True}, "seed must be a whole number"),
        ({"rate": float("nan")}, "rate must be a number"),
        ({"flag": 1}, "flag must be True or False"),
        ({"data": [1, 2]}, "data must be text"),
        ({"seed = 1; import os; x": 1}, "may be injected|no parameter is called"),
    ],
)
def test_plain_papermill_stops_at_bad_parameters(plain, values, message):
    with pytest.raises(PapermillExecutionError, match="ParameterError") as caught:
        plain(**values)
    assert any(word in str(caught.value) for word in message.split("|"))
