"""What several test modules share: paths, tiny notebooks, and the environment in which lessons are tested."""

import os
from pathlib import Path

import nbformat
import pytest

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # two files at a time on two cores; and with more threads lightfm is not deterministic
ROOT = Path(__file__).resolve().parents[1]
OFFLINE = os.pathsep.join([str(ROOT / "tests" / "offline"), str(ROOT)])

START = "from adlib import lesson\n\nlesson.start({name!r})"
PARAMETERS = 'data: str = "market"  # where the tables come from\nseed: int = 0  # of all random numbers'
READ = "print(data, seed)"


def write_notebook(folder, name, cells=(), *, parameters=PARAMETERS, read=READ, **facts):
    """Write a small lesson: start, parameters, a cell that reads them, then `cells`; a cell that starts with # is Markdown."""
    new = nbformat.v4
    nodes = [
        new.new_code_cell(START.format(name=name)),
        new.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
    ]
    nodes.append(new.new_code_cell(read))
    nodes += [new.new_markdown_cell(c) if c.startswith("# ") else new.new_code_cell(c) for c in cells]
    nodes.insert(0, new.new_markdown_cell(f"# {name}\n\nWhat is $x^2$?"))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = new.new_notebook(cells=nodes, metadata={"kernelspec": kernel})
    notebook.metadata["adlib"] = {"question": "Does it run?", "minutes": 1, **facts}
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    path = Path(folder) / f"{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path


def pytest_collection_modifyitems(items):
    """Put the lessons first: they take longest, and the other worker does the rest meanwhile."""
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")


def needs(asset):
    """Mark a test that reads an asset; where it could not be fetched, the test is skipped until it is."""
    from adlib import assets  # not above: numpy must not be loaded before the number of threads is set

    return pytest.mark.skipif(not assets.available(asset), reason=f"until `adlib fetch {asset}`: the asset is not here")


@pytest.fixture(autouse=True)
def _own_artefacts(tmp_path_factory, monkeypatch):
    """Keep what tests leave behind out of the user's cache, and the outer run's settings out of the tests."""
    monkeypatch.setenv("ADLIB_ARTEFACTS", str(tmp_path_factory.mktemp("artefacts")))
    for name in ("ADLIB_STRICT", "ADLIB_RUN_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(tmp_path):
    """Return an empty folder for notebooks."""
    path = tmp_path / "notebooks"
    path.mkdir()
    return path
