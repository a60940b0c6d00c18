"""What `make` makes again, and where it refuses to begin."""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import nbformat
import pytest

TOP = Path(__file__).parent.parent
NOTEBOOKS = sorted((TOP / "notebooks").glob("*.ipynb"))
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkout in which the digits book is up to date, as far as make can see."""
    top = tmp_path_factory.mktemp("checkout")
    shutil.copy(TOP / "Makefile", top)
    shutil.copytree(TOP / "tpbook", top / "tpbook", ignore=shutil.ignore_patterns("__pycache__"))
    sources = ("notebooks", "book", "recipes", "tests", "pyproject.toml", "requirements.txt", "constraints.txt")
    for name in (*sources, "_config.yml", "_toc.yml"):
        (top / name).symlink_to(TOP / name)
    out = top / "_build/digits"
    targets = [top / ".venv/.ready", top / "_build/javascript/.ready", out / "site/_build/html/index.html"]
    for age, target in enumerate((targets[0], *(out / "notebooks" / path.name for path in NOTEBOOKS), *targets[1:])):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
        os.utime(target, (time.time() + age,) * 2)
    return top


def again(top, changed):
    """The notebooks that `make book` would run if a file changed."""
    command = ["make", "-n", "PROFILE=digits", "TPBOOK_DATA=/nowhere", "-W", changed, "book"]
    ran = subprocess.run(command, cwd=top, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return set(re.findall(r"run\.py notebooks/([\w-]+)\.ipynb", ran.stdout))


def reads(path):
    """The committed files that a notebook's cells name, as far as literals say; `{…}` is a parameter, or anything."""
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    given = {}
    exec(next(cell.source for cell in code if "parameters" in cell.metadata.get("tags", [])), given)
    text = "\n".join(cell.source for cell in code)
    named = re.findall(r"""["'](results/[^"']*|\.\./(?:book|recipes|tests)/[^"']*)["']""", text)
    named += [f"{module}.py" for module in re.findall(r"^(?:import|from) (\w+)", text, flags=re.MULTILINE)]
    if "import ledger" in text:  # which asks for the claims at least
        named += ["../book/claims.csv"]
    if "ledger.ledger()" in text:  # which asks for what the claims are tested on
        named += [f"results/{name}" for name in ("digits", "imagenette", "imagewoof-gpu", "cost-and-speed.json")]
    if "imagenet.md" in text:  # whose commands are of recipes
        named += ["../recipes/imagenet"]
    files = set()
    for name in named:
        pattern = re.sub(r"\{(\w+)\}", lambda m: "*" if m[1] == "profile" else str(given.get(m[1], "*")), name)
        base, pattern = (TOP, pattern[3:]) if pattern.startswith("../") else (TOP / "notebooks", pattern)
        for found in base.glob(pattern):
            files |= {found} if found.is_file() else {inner for inner in found.rglob("*") if inner.is_file()}
    return {file.relative_to(TOP).as_posix() for file in files}


def test_nothing_is_made_twice(made):
    assert again(made, "README.md") == set()


CHANGED = [
    "notebooks/results/digits/matrix.json", "notebooks/results/digits/ablations.json", "book/claims.csv",
    "notebooks/results/cost-and-speed.json", "notebooks/results/imagenette/plain-s0.json", "notebooks/ledger.py",
    "notebooks/results/speed/ratios.json", "notebooks/pooling.py", "book/imagenet.md", "recipes/digits/evit.yaml",
    "tests/fixtures/images.safetensors", "notebooks/results/fast-path.json",
    "notebooks/results/digits/backbones.json", "notebooks/results/imagewoof-gpu/plain-s0.json",
    "notebooks/results/loading.json", "notebooks/results/operators.json", "book/photographs/bee.json",
]  # fmt: skip


@pytest.mark.parametrize("changed", CHANGED)
def test_a_notebook_runs_again_when_what_it_reads_changed(made, changed):
    """All that name the file, and of the others none."""
    readers = {path.stem for path in NOTEBOOKS if changed in reads(path)}
    found = again(made, changed)
    if changed.startswith("recipes"):  # recipes begin with one another
        readers = {path.stem for path in NOTEBOOKS if any(file.startswith("recipes/") for file in reads(path))}
    assert readers and found == readers and len(found) < len(NOTEBOOKS)


@pytest.mark.parametrize("changed", ["engine.py", "methods/evit.py", "pretrained/vit_digits_patch4_56.json"])
def test_every_notebook_runs_again_with_the_package(made, changed):
    assert again(made, f"tpbook/{changed}") == {path.stem for path in NOTEBOOKS}


def test_what_a_notebook_wrote_goes_before_it_runs_again(made):
    command = ["make", "-n", "PROFILE=digits", "TPBOOK_DATA=/nowhere", "-W", "notebooks/evit.ipynb", "book"]
    lines = subprocess.run(command, cwd=made, capture_output=True, text=True).stdout.splitlines()
    runs = next(i for i, line in enumerate(lines) if "run.py notebooks/evit.ipynb" in line)
    assert lines[runs - 1] == "rm -rf _build/digits/results/evit" and "out=../_build/digits/results/evit" in lines[runs]


@pytest.mark.parametrize("folder, variable", [("a b", ""), ("b", "TPBOOK_DATA=/my data"), ("c", "TPBOOK_WEIGHTS=d e")])
def test_a_path_with_a_space_is_refused_in_words(tmp_path, folder, variable):
    (tmp_path / folder).mkdir()
    shutil.copy(TOP / "Makefile", tmp_path / folder)
    command = ["make", "-n", "book", *filter(None, [variable])]
    ran = subprocess.run(command, cwd=tmp_path / folder, capture_output=True, text=True)
    assert ran.returncode != 0 and "a path has a space in it" in ran.stderr and (variable or folder) in ran.stderr
