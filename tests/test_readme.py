"""The README's table says what the committed notebooks recorded. ``python tests/test_readme.py`` rewrites it from them."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MARKS = re.compile(r"(?<=<!-- lessons -->\n).*?(?=<!-- /lessons -->)", re.DOTALL)
METRICS = "application/vnd.adlib.metrics+json"


def recorded(notebook: dict) -> dict[str, float]:
    """All metrics in a notebook's outputs; the last value of a name counts."""
    outputs = [o for c in notebook["cells"] for o in c.get("outputs", [])]
    return {k: v for o in outputs for k, v in o.get("data", {}).get(METRICS, {}).items()}


def table() -> str:
    rows = ["| lesson | question | minutes | real data | headline result |", "|---|---|---|---|---|"]
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        facts = notebook["metadata"]["adlib"]
        headline = facts["headline"].format(**recorded(notebook))
        link = f"[{path.stem[:2]} {path.stem[3:].replace('_', ' ')}](notebooks/{path.name})"
        rows.append(f"| {link} | {facts['question']} | {facts['minutes']} | {facts['real_data']} | {headline} |")
    return "\n".join(rows) + "\n"


def test_the_table_is_what_the_notebooks_recorded():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert MARKS.search(readme)[0] == table(), "run python tests/test_readme.py"


def test_every_file_and_command_that_the_readme_names_exists():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", readme):
        assert (ROOT / target).exists(), target
    from typer.main import get_command

    from adlib.cli import app

    commands = get_command(app).commands
    used = set(re.findall(r"\badlib (\w+)", " ".join(re.findall(r"(?m)^    .*$|`[^`\n]+`", readme))))
    assert used <= set(commands), used - set(commands)


if __name__ == "__main__":
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (ROOT / "README.md").write_text(MARKS.sub(lambda _: table(), text), encoding="utf-8")
