"""Notebooks as a learner meets them: short, nothing said twice, from any folder, also where nothing is installed."""

import ast
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import nbformat
import pytest
import torch
import yaml

import tpbook
from tpbook.book import differences, experiments, home

TOP = Path(__file__).parent.parent
NOTEBOOKS = sorted((TOP / "notebooks").glob("*.ipynb"))
LINES = 250


def code_of(path):
    """The code cells of a notebook, without the one that all begin with."""
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"][1:]


def first_of(path):
    return nbformat.read(path, as_version=4).cells[1]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_can_be_read(path):
    cells = code_of(path)
    assert sum(len(cell.source.splitlines()) for cell in cells) <= LINES
    for cell in cells:  # what is imported, drawn for the pages and written for them is one click away
        folded = "hide-input" in cell.metadata.get("tags", [])
        if re.match(r"(import|from) ", cell.source) or re.search(r"^(plots|results)\.save\(", cell.source, re.MULTILINE):
            assert folded, cell.source


def test_no_function_is_defined_in_two_notebooks():
    """Of one name or of one body; what two need is in the package."""
    names, bodies = defaultdict(set), defaultdict(set)
    for path in NOTEBOOKS:
        for cell in code_of(path):
            for node in ast.parse(cell.source).body:
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    said = ast.get_docstring(node) is not None
                    names[node.name].add(path.stem)
                    bodies[ast.dump(ast.Module(node.body[said:], []))].add((path.stem, node.name))
    assert not {name: sorted(where) for name, where in names.items() if len(where) > 1}
    assert not [sorted(where) for where in bodies.values() if len({notebook for notebook, _ in where}) > 1]


# ---- from any folder


def test_home_is_around_the_working_folder_or_the_package(tmp_path, monkeypatch):
    for folder in (tmp_path, TOP, TOP / "notebooks" / "results"):
        monkeypatch.chdir(folder)
        assert home.find() == TOP
    other = tmp_path / "other"
    (other / "notebooks" / "deep").mkdir(parents=True)
    (other / "_toc.yml").touch()
    monkeypatch.chdir(other / "notebooks" / "deep")
    assert home.find() == other.resolve()  # where one works counts more
    assert home.enter() == Path.cwd() == other.resolve() / "notebooks"


def test_without_a_checkout_it_is_said_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(home, "__file__", str(tmp_path / "site-packages/tpbook/book/home.py"))
    with pytest.raises(FileNotFoundError, match=f"neither {tmp_path} nor the package lies in a checkout"):
        home.find()


def test_a_notebook_runs_from_another_folder(tmp_path):
    """Its own first cell, then what the others do: import a module beside it, read a committed file and a recipe."""
    notebook = nbformat.read(TOP / "notebooks/questions-speed.ipynb", as_version=4)
    notebook.cells = [
        notebook.cells[1],
        nbformat.v4.new_code_cell("import pooling\nfrom pathlib import Path"),
        nbformat.v4.new_code_cell(
            'print(Path("results/loading.json").is_file(), Path("../recipes/digits/evit.yaml").is_file(), pooling.POOLING.paper)'
        ),
    ]
    nbformat.write(notebook, tmp_path / "here.ipynb")
    command = [sys.executable, "-m", "papermill", "here.ipynb", "there.ipynb", "--no-progress-bar"]
    environment = os.environ | {"PYTHONPATH": str(TOP)}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    printed = nbformat.read(tmp_path / "there.ipynb", as_version=4).cells[2].outputs
    assert [output.text for output in printed if output.get("name") == "stdout"] == ["True True Rao et al. 2021, Table 3\n"]


def test_all_begin_alike_and_name_the_one_address():
    cells = [first_of(path) for path in NOTEBOOKS]
    assert len({cell.source for cell in cells}) == 1 and all(cell.metadata.tags == ["remove-cell"] for cell in cells)
    [address] = re.findall(r'address = "(.*)"', cells[0].source)
    url = yaml.safe_load((TOP / "_config.yml").read_text())["repository"]["url"] or ""
    assert address == url, f"set it in every notebook: sed -i 's|address = .*\"  #|address = \\\\\"{url}\\\\\"  #|' notebooks/*.ipynb"


@pytest.mark.parametrize("around", [True, False])
def test_the_first_cell_installs_what_is_missing(tmp_path, monkeypatch, around):
    """From the checkout around it; elsewhere a clone is made first. Then it is in the notebooks' folder."""
    ran = []

    def run(command, check):
        ran.append(command)
        if command[0] == "git":
            make(tmp_path / command[-1])
        else:
            del sys.modules["tpbook.book.home"]  # there it is

    def make(top):
        (top / "notebooks").mkdir(parents=True)
        (top / "_toc.yml").touch()

    if around:
        make(tmp_path)
    monkeypatch.chdir(tmp_path / "notebooks" if around else tmp_path)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.delattr(tpbook.book, "home")
    monkeypatch.setitem(sys.modules, "tpbook.book.home", None)  # an import of it fails
    exec(first_of(NOTEBOOKS[0]).source.replace('address = ""', 'address = "https://host/book"'), {})
    top = tmp_path if around else tmp_path / "book"
    *clones, install = ran
    assert clones == ([] if around else [["git", "clone", "--quiet", "--depth", "1", "https://host/book", "book"]])
    assert install[:4] == [sys.executable, "-m", "pip", "install"] and install[-1].startswith(f"{top}[book")
    assert Path.cwd() == top / "notebooks"


# ---- what the notebooks on papers and codes share


def test_differences_of_logits(small, images):
    ours = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 3.0]])
    theirs = torch.tensor([[1.0, 0.5], [1.5, 1.0], [2.0, 0.0], [0.0, 3.0]])
    assert differences.apart(ours, theirs) == {"largest change of a logit": 1.5, "answers that change, %": 25}
    model = tpbook.prune(small("deit"), "dynamicvit", keep_ratio=0.5, at=(1, 3)).train()
    assert differences.even_odds(model) is model
    x = images(model, 60)
    with tpbook.trace(model) as t:
        logits = differences.drawn(model, x, seed=3, batch=60)
    share = t.decisions[0].float().mean().item()  # of 60 · 36 coins
    assert abs(share - 0.5) < 0.04
    assert torch.equal(logits, differences.drawn(model, x, seed=3, batch=60))
    assert not torch.equal(logits, differences.drawn(model, x, seed=4, batch=60))


def test_how_numbers_are_said():
    assert [differences.ten(v) for v in (3.2e-6, 1e-20, 0.0123, 0.0, 2.0)] == ["3·10⁻⁶", "1·10⁻²⁰", "0.012", "0", "2"]
    assert differences.span([0.25, -1, 3], "+.1f") == "−1.0 to +3.0"


def test_the_list_of_differences():
    parts = [{"2": ("b", "two", "as the code", "exact")}, {1: ("a", "one", "ours", "measured"), 3: ("c", "", "", "exact")}]
    found = differences.listed(parts)
    assert found["listed"] == 3 and found["kinds"] == {"published": 0, "exact": 2, "measured": 1, "not_measured": 0}
    assert found["table"].splitlines()[2:4] == ["| [1 a](#pc-1) | one | ours |", "| [2 b](#pc-2) | two | as the code |"]
    with pytest.raises(ValueError, match=r"once each, got \[1, 2, 2, 3\]"):
        differences.listed([*parts, {2: ("again", "", "", "exact")}])
    with pytest.raises(ValueError, match="a kind must be one of .*, got guess"):
        differences.listed([{1: ("a", "", "", "guess")}])


def test_every_section_of_the_list_is_in_a_notebook():
    sections = re.findall(r"^\(pc-(\d+)\)=$", (TOP / "book/paper-and-code.md").read_text(), re.MULTILINE)
    named = []
    for path in NOTEBOOKS:
        for cell in code_of(path):
            if found := re.search(r"^DIFFERENCES = \{\n(.*?)^\}", cell.source, re.MULTILINE | re.DOTALL):
                named += re.findall(r"^    (\d+): ", found[1], re.MULTILINE)
    assert sorted(named, key=int) == sections


def test_costs_and_traces_leave_a_model_as_it_was(small, images):
    model = small("deit")
    x, whole = images(model), tpbook.flops.closed_form(model).total / 1e9
    assert 0 < experiments.gmacs(model, "evit", 0.5) < whole == tpbook.flops.closed_form(model).total / 1e9
    t = experiments.traced(model, x, "etps", keep_ratio=0.5, at=(1, 3))
    assert [kept.shape[1] for kept in t.kept] == [18, 9] and len(t.host) == 2
    with pytest.raises(TypeError):
        experiments.traced(model, None, "evit")
    assert not hasattr(model, "pruning")
