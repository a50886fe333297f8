"""What a run leaves to read: each lesson as one HTML file, and an index of all; both open without a network.

Nothing is loaded from anywhere: pictures are embedded, formulas become MathML, and a content policy forbids scripts, so that a text from a
product or a review that found its way into a page can do nothing there.
"""

import html
import re
from datetime import datetime

import yaml

from adlib.lesson import write_atomic

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:; frame-src data:"
PROGRESS = re.compile(r".*\d+%\|.*|.*\d+it \[\d.*|.*\[\d\d:\d\d<.*")
CSS = """
:root { color-scheme: light; }
body { margin: 0 auto; padding: 1rem; max-width: 56rem; font: 16px/1.55 system-ui, sans-serif; color: #1f2328; background: #fff; }
h1, h2, h3 { line-height: 1.25; } h2 { margin-top: 2rem; border-bottom: 1px solid #d0d7de; } a { color: #175cd3; }
pre, code { font: .86em/1.45 ui-monospace, Consolas, monospace; } pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.input_area, .text_cell_render pre { background: #f6f8fa; border-left: 3px solid #d0d7de; padding: .5rem .75rem; margin: .75rem 0 .25rem; }
.output_subarea { padding: .15rem .75rem; overflow-x: auto; } .output_stderr, .muted { color: #57606a; } .output_error { color: #b42318; }
img { max-width: 100%; height: auto; } blockquote { margin: 0; padding-left: 1rem; border-left: 3px solid #d0d7de; color: #57606a; }
table { border-collapse: collapse; margin: .5rem 0; font-variant-numeric: tabular-nums; } .wide { overflow-x: auto; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #d8dee4; text-align: right; vertical-align: top; }
th:first-child, td:first-child, .text td, .text th { text-align: left; } math[display=block] { margin: .75rem 0; overflow-x: auto; }
.good { color: #1a7f37; } .bad { color: #b42318; } .wait { color: #9a6700; } .failure { background: #fff1f0; padding: .5rem .75rem; }
details > summary { cursor: pointer; }
"""


def _page(title, body, css=CSS):
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n<style>{css}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


# ---- one lesson -----------------------------------------------------------------------------------------------------


def mathml(latex, display="inline"):
    """Return a formula as MathML, which browsers draw without a script; what cannot be converted stays LaTeX in a code element."""
    from latex2mathml.converter import convert

    latex = latex.strip().replace("{aligned}", "{split}")  # the same table, under the name that the converter knows
    try:
        return convert(latex, display=display)
    except Exception:  # the converter has no common error class; the formula stays readable
        return f"<code>{html.escape(latex)}</code>"


def without_noise(outputs):
    """Return a cell's outputs with its streams joined, and without progress bars and widgets, which say nothing once they have ended."""
    kept = []
    for output in outputs:
        data = output.get("data", {})
        data.pop("application/vnd.jupyter.widget-view+json", None)
        if data.keys() == {"text/plain"} and _is_progress("".join(data["text/plain"])):
            continue
        if output["output_type"] == "stream":
            if kept and kept[-1].get("name") == output["name"]:
                kept[-1]["text"] += "".join(output["text"])
                continue
            output["text"] = "".join(output["text"])
        kept.append(output)
    for output in kept:
        if output["output_type"] == "stream":  # a carriage return overwrites what the line had before
            lines = [line.rstrip("\r").rpartition("\r")[2] for line in output["text"].split("\n")]
            output["text"] = "\n".join(line for line in lines if not _is_progress(line))
    return [o for o in kept if o["output_type"] != "stream" or o["text"].strip()]


def _is_progress(line):
    return len(line) < 300 and bool(PROGRESS.fullmatch(line.strip()))


def _exporter():
    from nbconvert import HTMLExporter
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    class Renderer(IPythonRenderer):
        def heading(
            self, text, level, **_
        ):  # the id that JupyterLab gives, so that links within a lesson work here too
            anchor = re.sub(r"<[^>]+>", "", text).strip().replace(" ", "-")
            return f'<h{level} id="{html.escape(anchor)}">{text}</h{level}>\n'

        def block_math(self, body):
            return mathml(body, "block")

        def inline_math(self, body):
            return mathml(body)

        def latex_environment(self, name, body):
            return mathml(rf"\begin{{{name}}}{body}\end{{{name}}}", "block")

    def markdown(text):
        return MarkdownWithMath(renderer=Renderer(escape=False)).render(text)

    return HTMLExporter(
        template_name="basic",
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        filters={"markdown2html": markdown},
    )


def lesson_page(notebook, title):
    """Return an executed notebook as one HTML page that needs no network and runs no script."""
    import copy

    from pygments.formatters import HtmlFormatter

    notebook = copy.deepcopy(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = without_noise(cell.outputs)
            for data in (o.data for o in cell.outputs if "text/latex" in o.get("data", {})):
                data["text/html"] = mathml("".join(data.pop("text/latex")).strip("$ \n"), "block")
    body, _ = _exporter().from_notebook_node(notebook)
    css = CSS + HtmlFormatter(style="default").get_style_defs(".highlight")
    return _page(title, f'<p><a href="../index.html">All lessons</a></p>\n{body}', css)


# ---- the index ------------------------------------------------------------------------------------------------------


def contracts(folder):
    """Return the metric bands of all lessons from ``tests/contracts.yaml`` beside the notebooks, {} if there is no such file."""
    path = folder.parent / "tests" / "contracts.yaml"
    return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}


def holds(value, band):
    """Return True if `value` lies in `band`, a mapping with min, max or both."""
    return band.get("min", value) <= value <= band.get("max", value)


def write_index(out, every, results, folder):
    """Write ``index.html`` below `out`: what ran, how it ended, its numbers and their bands; raises OSError if the disk is full."""
    bands = contracts(folder)
    known = [(x, results[x.name]) for x in every if x.name in results]
    done = sum(r.status == "completed" for _, r in known)
    minutes = sum(r.seconds for _, r in known) / 60
    begun = next((r.begun for _, r in known if r.begun), {})
    versions = ", ".join(f"{k} {v}" for k, v in begun.get("versions", {}).items())
    body = [
        f"<h1>adlib: run “{html.escape(out.name)}”</h1>",
        f"<p>{done} of {len(known)} lessons completed, {minutes:.1f} minutes of work, {datetime.now():%Y-%m-%d %H:%M}.</p>",
        f'<p class="muted">{html.escape(versions)}{" · " if versions else ""}{html.escape(begun.get("device", ""))}</p>',
        '<div class="wide"><table><tr><th>Lesson</th><th>Status</th><th>Seconds</th><th>Checks</th><th>Bands</th></tr>',
        *(_row(x, r, bands.get(x.name, {}).get("metrics", {})) for x, r in known),
        "</table></div>",
        *(_section(x, r, bands.get(x.name, {}).get("metrics", {})) for x, r in known),
    ]
    write_atomic(out / "index.html", _page(f"adlib: {out.name}", "\n".join(body)))


def _mark(status):
    kind = {"completed": "good", "waiting": "wait", "running": "wait", "not run": "wait", "interrupted": "wait"}.get(
        status, "bad"
    )
    return f'<span class="{kind}">{html.escape(status)}</span>'


def _share(good, of):
    return f'<span class="{"good" if good == of else "bad"}">{good} of {of}</span>' if of else "–"


def _row(lesson, result, bands):
    held = [holds(result.metrics[name], band) for name, band in bands.items() if name in result.metrics]
    checks = _share(sum(c["ok"] for c in result.checks), len(result.checks))
    return (
        f'<tr><td><a href="#{lesson.name}">{html.escape(lesson.title)}</a></td><td>{_mark(result.status)}</td>'
        f"<td>{result.seconds:.0f}</td><td>{checks}</td><td>{_share(sum(held), len(held))}</td></tr>"
    )


def _section(lesson, result, bands):
    name = html.escape(lesson.name)
    parts = [f'<h2 id="{name}">{html.escape(lesson.title)}</h2>', f"<p>{html.escape(lesson.question)}</p>"]
    parts.append(
        f"<p>{_mark(result.status)}, {result.cells} of {result.of} cells, {result.seconds:.0f} s, {html.escape(result.finished)}"
    )
    parts.append("</p>" if result.status == "not run" else f' · <a href="{name}/notebook.html">read the lesson</a></p>')
    if result.failure:
        parts.append(f'<pre class="failure">{html.escape(chr(10).join(result.failure))}</pre>')
    parts += [f'<p class="bad">✗ {html.escape(c["message"])}</p>' for c in result.checks if not c["ok"]]
    if result.metrics:
        note = " (the bands are meant for the defaults)" if result.parameters else ""
        rows = "".join(_metric(k, v, bands.get(k)) for k, v in result.metrics.items())
        parts.append(
            f'<div class="wide"><table><tr><th>Metric</th><th>Value</th><th>Band{note}</th></tr>{rows}</table></div>'
        )
    given = ", ".join(f"{k} = {v!r}" for k, v in result.parameters.items()) or "defaults"
    parts.append(f'<p class="muted">Parameters: {html.escape(given)}</p>')
    for item in result.skipped:
        parts.append(
            f'<p class="wait">Skipped: {html.escape(item["section"])}. To have it: <code>{html.escape(item["how"])}</code></p>'
        )
    return "\n".join(parts)


def _metric(name, value, band):
    text = "–"
    if band:
        span = " to ".join(f"{side} {band[side]:g}" for side in ("min", "max") if side in band)
        text = f'<span class="{"good" if holds(value, band) else "bad"}">{"✓" if holds(value, band) else "✗"} {span}</span>'
    return f"<tr><td>{html.escape(name)}</td><td>{value:,.5g}</td><td>{text}</td></tr>"
