"""What is installed is whole: every folder of the package, every file of data, every library that it imports."""

import ast
import re
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from setuptools.config.pyprojecttoml import read_configuration

import tpbook

TOP = Path(__file__).parent.parent
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
# import → distribution
CALLED = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml", "open_clip": "open-clip-torch"}
BROUGHT = {"IPython": "ipywidgets", "traitlets": "anywidget", "pandas": "seaborn"}  # by whom, always
BROUGHT["triton"] = "torch"  # where it is made for CUDA, and there alone it is imported


def names(requirements):
    return {re.split(r"[\[<>=,; ]", line)[0].lower().replace("_", "-") for line in requirements}


ALWAYS = names(PROJECT["dependencies"])
ANY = ALWAYS | {name for extra in PROJECT["optional-dependencies"].values() for name in names(extra)}


@pytest.fixture(scope="module")
def tools():
    return read_configuration(TOP / "pyproject.toml")["tool"]["setuptools"]


def test_every_folder_is_a_package(tools):
    folders = {path.parent.relative_to(TOP) for path in (TOP / "tpbook").rglob("*.py")}
    assert set(tools["packages"]) == {".".join(folder.parts) for folder in folders}


def test_every_file_of_data_is_taken_along(tools):
    data = tools["package-data"]
    for path in (TOP / "tpbook").rglob("*"):
        if path.is_dir() or path.suffix in (".py", ".pyc"):
            continue
        patterns = [TOP / package.replace(".", "/") / pattern for package, some in data.items() for pattern in some]
        assert any(fnmatch(str(path), str(pattern)) for pattern in patterns), path


def imports(path):
    """(library, whether the module cannot be imported without it) of a file."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found = [node.module]
        else:
            continue
        yield from ((name.split(".")[0], node in tree.body) for name in found)


def test_every_import_is_declared():
    """What the package cannot do without, always; what the book or a library's family needs, by an extra."""
    for path in sorted((TOP / "tpbook").rglob("*.py")):
        where = path.relative_to(TOP)
        for library, needed in imports(path):
            if library in sys.stdlib_module_names or library == "tpbook":
                continue
            name = CALLED.get(library, BROUGHT.get(library, library)).lower().replace("_", "-")
            optional = not needed or where.parts[1] in ("book", "families") and where.name != "results.py"
            optional = optional or where.name == "digits_cvt.py"  # imported where one is made, in words if it cannot be
            assert name in (ANY if optional else ALWAYS), f"{where} imports {library}, which no dependency brings"


def test_extras_reach_the_tests():
    extras = PROJECT["optional-dependencies"]
    assert "tpbook[huggingface,open_clip,datasets]" in extras["test"]
    pinned = names((TOP / "constraints.txt").read_text().split())
    listed = names(line for line in (TOP / "requirements.txt").read_text().splitlines() if re.match(r"\w", line))
    assert {"transformers", "open-clip-torch", "datasets", *ALWAYS} <= listed <= pinned
    assert names(extras["test"]) - {"tpbook"} <= listed
    assert not {"ruff", "py-spy"} & pinned


def test_one_version_and_its_date():
    """In what is installed, what is cited, and what is told."""
    citation = yaml.safe_load((TOP / "CITATION.cff").read_text())
    newest = re.search(r"^## (\S+) \(([\d-]+)", (TOP / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert PROJECT["version"] == tpbook.__version__ == str(citation["version"]) == newest[1]
    assert str(citation["date-released"]) == newest[2]


def test_the_citation_has_what_its_format_asks_for():
    citation = yaml.safe_load((TOP / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["license"] == PROJECT["license"]
    for work in (citation, *citation["references"]):
        assert work["title"] and work["authors"]
        assert all(set(author) in ({"name"}, {"family-names", "given-names"}) for author in work["authors"])
    assert all(type(work["year"]) is int and work["type"] for work in citation["references"])
