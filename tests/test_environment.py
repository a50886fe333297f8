"""environment.yml, pyproject.toml and constraints.txt say the same, and environment.yml says truly which lessons use what.

``python tests/test_environment.py`` rewrites environment.yml.
"""

import ast
import json
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODULES = {
    "scikit-learn": "sklearn",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "jupyterlab": "",
    "jupyter-client": "jupyter_client",
    "ipython": "IPython",
    "lightfm-next": "lightfm",
    "huggingface-hub": "huggingface_hub",
    "rouge-score": "rouge_score",
}
HEAD = """# conda route: Python from conda-forge, everything else by pip with the versions that CI tested (constraints.txt).
# Use: conda env create -f environment.yml && conda activate adlib
# Beside each line: the lessons that use it; "course" is what runs and shows them. tests/test_environment.py writes and checks this file.
name: adlib
channels:
  - conda-forge
dependencies:
  - python=3.12
  - pip
  - pip:
      - -c constraints.txt
      - -e .
"""


def requirements() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["dependencies"]


def name_of(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9_.-]+", requirement)[0].lower()


def imports(source: str) -> set[str]:
    """Top-level names imported anywhere in the source; modules of ours as adlib.<module>."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {a.name if a.name.startswith("adlib.") else a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "adlib":
            found |= {f"adlib.{a.name}" for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(
                ".".join(node.module.split(".")[:2]) if node.module.startswith("adlib.") else node.module.split(".")[0]
            )
    return found


def uses(start: set[str]) -> set[str]:
    """Everything that these imports reach through modules of ours."""
    seen, todo = set(), list(start)
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            path = ROOT / (name.replace(".", "/") + ".py")
            if name.startswith("adlib.") and path.exists():
                todo += imports(path.read_text(encoding="utf-8"))
    return seen


def by_lesson() -> dict[str, set[str]]:
    reached = {}
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
        reached[path.name[:2]] = uses(set().union(*(imports(c) for c in code)))
    return reached


def environment() -> str:
    lines, lessons = [], by_lesson()
    for requirement in requirements():
        module = MODULES.get(name_of(requirement), name_of(requirement))
        used = [number for number, reached in lessons.items() if module in reached]
        lines.append(f"      - {requirement:28} # used in {', '.join(used) or 'course'}\n")
    return HEAD + "".join(lines)


def test_environment_is_what_pyproject_and_the_lessons_say():
    assert (ROOT / "environment.yml").read_text(encoding="utf-8") == environment(), (
        "run python tests/test_environment.py"
    )


def test_every_requirement_is_imported_somewhere():
    """A package that nobody imports is dead weight; the four that serve the reader's desk are named here."""
    code = [p.read_text(encoding="utf-8") for p in (ROOT / "adlib").glob("*.py")]
    reached = set().union(*(imports(c) for c in code), *by_lesson().values())
    unused = {name_of(r) for r in requirements() if MODULES.get(name_of(r), name_of(r)) not in reached}
    assert unused <= {"jupyterlab", "ipykernel"}, unused


def test_constraints_pin_every_requirement_within_its_range():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    for text in requirements():
        requirement = Requirement(text)
        assert requirement.name in pins, f"constraints.txt does not pin {requirement.name}"
        assert requirement.specifier.contains(pins[requirement.name].strip()), (
            f"{requirement} excludes {pins[requirement.name]}"
        )


def test_every_cap_has_a_reason():
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    capped = [line for line in lines if re.match(r'\s*"[a-z0-9-]+[^"]*<', line)]
    assert len(capped) >= 10
    assert all("#" in line and re.search(r"# .*<", line) for line in capped), [c for c in capped if "#" not in c]


if __name__ == "__main__":
    (ROOT / "environment.yml").write_text(environment(), encoding="utf-8")
    sys.stdout.write(environment())
