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
table { border: 0; border-collapse: collapse; margin: .5rem 0; font-variant-numeric: tabular-nums; } .wide { overflow-x: auto; }
th, td { padding: .25rem .6rem; border: 0; border-bottom: 1px solid #d8dee4; text-align: right; vertical-align: top; }
@media (max-width: 30rem) { body { padding: .6rem; } th, td { padding: .25rem .35rem; } }
th:first-child, td:first-child { text-align: left; } math[display=block] { margin: .75rem 0; overflow-x: auto; }
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

    def _markdown(text):
        return MarkdownWithMath(renderer=Renderer(escape=False)).render(text)

    return HTMLExporter(
        template_name="basic",
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        filters={"markdown2html": _markdown},
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
    body = re.sub(r'href="(\d\d_\w+)\.ipynb(?=[#"])', r'href="../\1/notebook.html', body)
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
    known = [(x, results[x.name], bands.get(x.name, {}).get("metrics", {})) for x in every if x.name in results]
    done = sum(r.status == "completed" for _, r, _ in known)
    minutes = sum(r.seconds for _, r, _ in known) / 60
    begun = max((r.begun for _, r, _ in known), key=lambda b: len(b.get("versions", {})), default={})
    about = ", ".join(f"{k} {v}" for k, v in begun.get("versions", {}).items()) + f" · {begun.get('device', '')}"
    body = [
        f"<h1>adlib: run “{html.escape(out.name)}”</h1>",
        f"<p>{done} of {len(known)} lessons completed, {minutes:.1f} minutes of work, {datetime.now():%Y-%m-%d %H:%M}.</p>",
        f'<p class="muted">{html.escape(about)}</p>',
        _table(["Lesson", "Status", "Seconds", "Checks", "Bands"], [_row(*item) for item in known]),
        *(_section(out, *item) for item in known),
    ]
    write_atomic(out / "index.html", _page(f"adlib: {out.name}", "\n".join(body)))


def _table(head, rows):
    """Return a table; the cells are HTML already."""
    lines = [f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows]
    return f'<div class="wide"><table><tr>{"".join(f"<th>{h}</th>" for h in head)}</tr>{"".join(lines)}</table></div>'


def _mark(status):
    waits = status in ("waiting", "running", "not run", "interrupted")
    return (
        f'<span class="{"good" if status == "completed" else "wait" if waits else "bad"}">{html.escape(status)}</span>'
    )


def _share(good, of):
    return f'<span class="{"good" if good == of else "bad"}">{good}/{of}</span>' if of else "–"


def _title(lesson):
    return html.escape(f"{lesson.name[:2]} {lesson.title}")


def _row(lesson, result, bands):
    held = [holds(result.metrics[name], band) for name, band in bands.items() if name in result.metrics]
    checks = _share(sum(c["ok"] for c in result.checks), len(result.checks))
    link = f'<a href="#{lesson.name}">{_title(lesson)}</a>'
    return link, _mark(result.status), f"{result.seconds:.0f}", checks, _share(sum(held), len(held))


def _section(out, lesson, result, bands):
    name = html.escape(lesson.name)
    ending = next((e for e in ("html", "ipynb") if (out / lesson.name / f"notebook.{e}").exists()), None)
    link = f' · <a href="{name}/notebook.{ending}">read the lesson</a>' if ending else ""
    facts = f"{result.cells} of {result.of} cells, {result.seconds:.0f} s, {result.finished.replace('T', ' ')}"
    parts = [f'<h2 id="{name}">{_title(lesson)}</h2>', f"<p>{_mark(result.status)}, {html.escape(facts)}{link}</p>"]
    if result.failure:
        parts.append(f'<pre class="failure">{html.escape(chr(10).join(result.failure))}</pre>')
    parts += [f'<p class="bad">✗ {html.escape(c["message"])}</p>' for c in result.checks if not c["ok"]]
    if result.metrics:
        note = " (meant for the defaults)" if result.parameters else ""
        parts.append(_table(["Metric", "Value", "Interval", f"Band{note}"], _metric_rows(result.metrics, bands)))
    given = ", ".join(f"{k} = {v!r}" for k, v in result.parameters.items()) or "defaults"
    parts.append(f'<p class="muted">Parameters: {html.escape(given)}</p>')
    for item in result.skipped:
        section, how = html.escape(item["section"]), html.escape(item["how"])
        parts.append(f'<p class="wait">Skipped: {section}. To have it: <code>{how}</code></p>')
    return "\n".join(parts)


def _metric_rows(metrics, bands):
    """Return a row a metric; ``x_low`` and ``x_high`` become the interval of ``x``, unless they have a band of their own."""
    rows = []
    for name, value in metrics.items():
        base = name.removesuffix("_low").removesuffix("_high")
        if base != name and base in metrics and name not in bands:
            continue
        ends = [metrics.get(f"{name}_{end}") for end in ("low", "high")]
        interval = " to ".join(map(_number, ends)) if None not in ends else ""
        rows.append((html.escape(name), _number(value), interval, _band(value, bands.get(name))))
    return rows


def _number(value):
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _band(value, band):
    if not band:
        return ""
    good = holds(value, band)
    span = ", ".join(f"{sign} {band[side]:g}" for side, sign in (("min", "≥"), ("max", "≤")) if side in band)
    return f'<span class="{"good" if good else "bad"}">{"✓" if good else "✗"} {span}</span>'
