"""What every notebook uses: start, check, show, record, skip, and folders for what it leaves behind.

Everything a lesson leaves behind is an output of a notebook cell: a check, a skipped section and the metrics are also MIME bundles, so that the
executed notebook alone tells what held. Taught in notebooks/00_start_here.ipynb.
"""

import base64
import hashlib
import html
import io
import json
import math
import os
import platform
import random
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import platformdirs
from IPython import get_ipython
from IPython.display import display

from adlib import __version__
from adlib.parameters import Guard

EVENT_MIME = "application/vnd.adlib.event+json"
METRICS_MIME = "application/vnd.adlib.metrics+json"


class CheckFailed(AssertionError):
    """A check of a lesson that did not hold while ADLIB_STRICT=1."""


@dataclass
class _State:
    name: str = ""
    metrics: dict = field(default_factory=dict)
    artefacts: list = field(default_factory=list)


_state = _State()


def _emit(kind, plain, markup, **facts):
    data = {"text/plain": plain, "text/html": markup, EVENT_MIME: {"kind": kind, **facts}}
    display(data, raw=True)


def start(name, seed=0):
    """Begin the lesson `name`: seeds, figure style, strict parameters, and one line of versions and device.

    Parameters
    ----------
    name : str, the file name of the notebook without its ending, e.g. "03_ctr_modeling".
    seed : int, for the global generators of `random`, NumPy and (if already imported) torch.

    Raises ValueError if `name` is not of that form. Taught in notebooks/00_start_here.ipynb.
    """
    if not re.fullmatch(r"\d\d_\w+", name):
        raise ValueError(f"a lesson is named like '03_ctr_modeling', not {name!r}.")
    global _state
    _state = _State(name=name)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 -- libraries that still draw from the global generator
    from adlib import plots  # late: matplotlib is slow to import, and only notebooks draw

    plots.style()
    _register_guard()
    versions = {"adlib": __version__, "Python": platform.python_version()}
    versions |= {
        p: sys.modules[p].__version__
        for p in ("numpy", "pandas", "sklearn", "torch", "transformers")
        if p in sys.modules
    }
    device = "cpu"
    if "torch" in sys.modules:
        from adlib import compute

        sys.modules["torch"].manual_seed(seed)
        device = compute.describe()
    line = f"{name} · " + ", ".join(f"{k} {v}" for k, v in versions.items()) + f" · {device}"
    _emit("start", line, f"<small>{html.escape(line)}</small>", lesson=name, versions=versions, device=device)


def _register_guard():
    shell = get_ipython()
    if shell is not None:
        others = [t for t in shell.input_transformers_post if type(t).__name__ != Guard.__name__]
        shell.input_transformers_post[:] = [*others, Guard()]


def check(message, condition):
    """Show a tick if `condition` holds, a cross if not; with ADLIB_STRICT=1 a cross also stops the lesson.

    Parameters
    ----------
    message : str, what should hold, as a sentence with its numbers.
    condition : bool (also numpy.bool_ or a one-element boolean array or tensor).

    Raises TypeError if `condition` is no truth value, CheckFailed if it is false and ADLIB_STRICT=1. Taught in notebooks/00_start_here.ipynb.
    """
    if hasattr(condition, "item"):
        try:
            condition = condition.item()
        except (ValueError, RuntimeError):  # more than one element: the TypeError below says so
            condition = list(condition)
    if type(condition) is not bool:
        raise TypeError(
            f"check({message!r}, …) needs True or False, not {type(condition).__name__}: compare something, or use .all()."
        )
    sign, colour, word = ("✓", "#1a7f37", "holds") if condition else ("✗", "#b42318", "does not hold")
    markup = f'<p style="margin:.3em 0"><b style="color:{colour}" role="img" aria-label="{word}">{sign}</b> {html.escape(message)}</p>'
    _emit("check", f"{sign} {message}", markup, message=message, ok=condition)
    if not condition and os.environ.get("ADLIB_STRICT") == "1":
        raise CheckFailed(message)


def show(fig, alt):
    """Show a figure as a PNG at 100 dpi that carries `alt`, what the picture says, for those who cannot see it.

    Parameters
    ----------
    fig : matplotlib Figure (or Axes, or a seaborn grid) or PIL image.
    alt : str, one or two sentences with the finding, not "a bar chart".

    Raises ValueError if `alt` is missing. Taught in notebooks/00_start_here.ipynb.
    """
    if not str(alt).strip():
        raise ValueError("show(fig, alt=…) needs a sentence that says what the picture shows.")
    from PIL import Image

    figure = getattr(fig, "figure", fig)
    picture = figure
    if hasattr(figure, "savefig"):
        from matplotlib import pyplot as plt

        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=100, bbox_inches="tight", facecolor="white")
        plt.close(figure)
        picture = Image.open(buffer)
    # 64 colours are enough for a chart and cut the size of a notebook to a third
    picture = picture.convert("RGB").quantize(64, dither=Image.Dither.NONE)
    out = io.BytesIO()
    picture.save(out, format="png", optimize=True)
    facts = {"alt": alt, "width": picture.width, "height": picture.height}
    data = {"image/png": base64.b64encode(out.getvalue()).decode(), "text/plain": alt}
    display(data, raw=True, metadata={"alt": alt, "image/png": facts})


def show_html(markup, alt):
    """Show a piece of HTML (an ad card, say) with `alt` as its label; the caller escapes what comes from data."""
    if not str(alt).strip():
        raise ValueError("show_html(markup, alt=…) needs a sentence that says what is shown.")
    markup = f'<div role="group" aria-label="{html.escape(alt)}">{markup}</div>'
    display({"text/html": markup, "text/plain": alt}, raw=True, metadata={"alt": alt})


def skip(section, how):
    """Say in one line that `section` is left out and `how` to get what it needs; the report lists it.

    Example: ``lesson.skip("Upworthy headlines", "adlib fetch upworthy")``.
    """
    plain = f"Skipped: {section}. To have it: {how}"
    markup = f"<p><b>Skipped:</b> {html.escape(section)}. To have it: <code>{html.escape(how)}</code></p>"
    _emit("skip", plain, markup, section=section, how=how)


def record(**metrics):
    """Record the lesson's numbers: shown as a table, kept in the notebook, and in a run written to ``metrics.json``.

    Parameters
    ----------
    metrics : finite numbers by name, e.g. ``auc=.71, auc_low=.69, auc_high=.73``. Several calls add up.

    Raises TypeError for what is no number, ValueError for NaN or infinity. Taught in notebooks/00_start_here.ipynb.
    """
    for name, value in metrics.items():
        value = value.item() if hasattr(value, "item") else value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"record({name}=…) needs a number, not {type(value).__name__}.")
        if not math.isfinite(value):
            raise ValueError(f"record({name}={value}): a metric must be finite; find out where it was lost.")
        metrics[name] = value
    _state.metrics |= metrics
    rows = "".join(
        f'<tr><td style="text-align:left">{html.escape(k)}</td><td>{v:,.5g}</td></tr>' for k, v in metrics.items()
    )
    plain = "\n".join(f"{k} = {v:,.5g}" for k, v in metrics.items())
    display({"text/plain": plain, "text/html": f"<table>{rows}</table>", METRICS_MIME: metrics}, raw=True)
    if os.environ.get("ADLIB_RUN_DIR"):
        write_atomic(folder() / "metrics.json", json.dumps(_state.metrics, indent=1))


def write_atomic(path, text):
    """Write `text` so that `path` holds either what it held before or all of it."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


# ---- files ----------------------------------------------------------------------------------------------------------


def folder():
    """Return the folder for files that this lesson writes: its place in the run, else ``runs/by_hand/<lesson>`` here."""
    path = Path(os.environ.get("ADLIB_RUN_DIR") or Path("runs", "by_hand", _state.name or "lesson"))
    path.mkdir(parents=True, exist_ok=True)
    return path


def artefact(name, **key):
    """Return the folder of what one lesson leaves to another, e.g. ``artefact("sft_adapter", seed=0, steps=60)``.

    The key decides what it is: another key is another folder. Write into it between `begin` and `finish`; ask `ready` first.
    It lies below ADLIB_ARTEFACTS, else below the cache. Raises ValueError if `name` is no plain name. Taught in notebooks/05_gpu_fine_tuning.ipynb.
    """
    if not re.fullmatch(r"\w+", name):
        raise ValueError(f"an artefact is named with letters, digits and underscores, not {name!r}.")
    cache = os.environ.get("ADLIB_CACHE") or platformdirs.user_cache_dir("adlib")
    root = Path(os.environ.get("ADLIB_ARTEFACTS") or Path(cache, "artefacts"))
    text = json.dumps({"adlib": __version__, **key}, sort_keys=True, default=str)
    return root / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def ready(path):
    """Return True if the artefact folder was finished."""
    return (Path(path) / "done").is_file()


def begin(path):
    """Empty the artefact folder, so that an interrupt from here on leaves it unfinished, and return it."""
    shutil.rmtree(path, ignore_errors=True)
    Path(path).mkdir(parents=True)
    return Path(path)


def finish(path):
    """Mark the artefact folder as complete, and return it."""
    write_atomic(Path(path) / "done", "complete\n")
    if os.environ.get(
        "ADLIB_RUN_DIR"
    ):  # so that a run knows what must still be there before it reuses this lesson's result
        _state.artefacts.append(str(path))
        write_atomic(folder() / "artefacts.json", json.dumps(_state.artefacts))
    later = os.environ.pop("ADLIB_THREADS_LATER", None)
    if later and "torch" in sys.modules:  # from here on, lessons that waited for this run beside it
        sys.modules["torch"].set_num_threads(int(later))
    return Path(path)
