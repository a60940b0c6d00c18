"""Notebooks are clean sources, and a run is whole or not there."""

import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
from colorspacious import cspace_convert, deltaE
from matplotlib.colors import to_rgb

from tpbook import METHODS, diagrams, plots

TOP = Path(__file__).parent.parent
NOTEBOOKS = sorted((TOP / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_sources(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    parameters = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert len(parameters) == 1
    for line in parameters[0].source.splitlines():  # typed and commented, as `papermill --help-notebook` shows them
        assert re.fullmatch(r"\w+: (str|int|float|bool|list) = .+  # .+", line), line
    for cell in code:
        if "plt." in cell.source or "plots.figure" in cell.source:
            if "plots.save" in cell.source:
                assert cell.metadata["mystnb"]["image"]["alt"], cell.source


@pytest.mark.parametrize("page", sorted((TOP / "book").glob("*.md")), ids=lambda p: p.stem)
def test_every_picture_has_a_text_alternative(page):
    text = page.read_text()
    for figure in re.findall(r"```\{figure\}.*?```", text, flags=re.DOTALL):
        assert re.search(r"^:alt: \S.{30,}", figure, flags=re.MULTILINE), figure


TEMPLATE = [
    "The problem", "The idea in one picture", "The equations", "The code that is those equations", "The experiment",
    "Where it breaks", "Summary", "Exercises",
]  # fmt: skip


@pytest.mark.parametrize("name", ["masked-fine-tuning", "dynamicvit", "evit", "tps"])
def test_a_method_chapter_follows_the_template(name):
    text = (TOP / "book" / f"{name}.md").read_text()
    assert re.findall(r"^## (.+)$", text, flags=re.MULTILINE) == TEMPLATE
    for part in ("**What you will learn.**", "{literalinclude} ../tpbook/", "results/stage-", "**Further reading.**"):
        assert part in text


@pytest.mark.parametrize("sight", ["protanomaly", "deuteranomaly", "tritanomaly"])
def test_colours_are_told_apart(sight):
    def seen(colour):
        return cspace_convert(to_rgb(colour), {"name": "sRGB1+CVD", "cvd_type": sight, "severity": 100}, "sRGB1")

    assert all(deltaE(seen(a), seen(b)) > 10 for a, b in combinations(plots.COLOURS.values(), 2))
    assert len(set(plots.MARKS.values())) == len(plots.MARKS)


def test_a_diagram_shows_what_the_package_does():
    """Each stage names its score and reduction, keeps the four best, and mixes the colours as the method does."""
    for method, how in METHODS.items():
        figure = diagrams.stage(method)
        words = {text.get_text() for text in figure.axes[0].texts}
        assert {diagrams.SAY[how.score], diagrams.SAY[how.reduce]} <= words
        assert ("Σ" in words) == (how.reduce == "fuse")
        crosses = sum(text.get_text() == "×" for text in figure.axes[0].texts)
        assert crosses == (4 if how.reduce == "drop" else 0)
        plt.close(figure)


def run(source, target, *parameters):
    command = [sys.executable, TOP / "notebooks" / "run.py", source, target, *parameters]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def source(tmp_path):
    notebook = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    )
    notebook.cells = [
        nbformat.v4.new_code_cell("n: int = 1  # how many", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("print(6 // n)"),
    ]
    nbformat.write(notebook, tmp_path / "source.ipynb")
    return tmp_path / "source.ipynb"


def test_run(source, tmp_path):
    target = tmp_path / "out" / "done.ipynb"
    assert run(source, target, "n=3").returncode == 0
    cells = nbformat.read(target, as_version=4).cells
    assert cells[2].outputs[0].text == "2\n"
    assert {"injected-parameters", "hide-input"} <= set(cells[1].metadata.tags)
    assert all(output.get("name") != "stderr" for cell in cells[1:] for output in cell.outputs)
    assert [p.name for p in target.parent.iterdir()] == ["done.ipynb"]


def test_a_failing_notebook(source, tmp_path):
    target = tmp_path / "out" / "done.ipynb"
    run(source, target, "n=1")
    failed = run(source, target, "n=0")
    assert failed.returncode != 0
    assert "ZeroDivisionError" in failed.stderr and "done.failed.ipynb" in failed.stderr
    assert [p.name for p in target.parent.iterdir()] == ["done.failed.ipynb"]
    run(source, target, "n=2")  # mended
    assert [p.name for p in target.parent.iterdir()] == ["done.ipynb"]
