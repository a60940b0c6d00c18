"""What `make` makes again, and where it refuses to begin."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import pytest

TOP = Path(__file__).parent.parent
sys.path.insert(0, str(TOP / "notebooks"))
import editions  # noqa: E402
import needs  # noqa: E402
import turns  # noqa: E402

NOTEBOOKS = sorted((TOP / "notebooks").glob("*.ipynb"))
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make")


def again(changed):
    """The notebooks that the digits book would run if a file changed, and all had been up to date."""
    gave = {editions.given("digits", path) for path in NOTEBOOKS}
    runs, _ = editions.due(["digits"], modified=lambda path: 1 if path in gave else 2 * (path == TOP / changed))
    return {path.stem for _, path in runs}


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


def test_nothing_is_made_twice():
    assert again("README.md") == set()


def test_everything_is_made_once():
    never = editions.due(["digits"], modified=lambda path: float("-inf") if "_build" in path.parts else 0)
    assert [path for _, path in never[0]] == [
        *(TOP / f"notebooks/{name}.ipynb" for name in needs.LONGEST),
        *(path for path in NOTEBOOKS if path.stem not in needs.LONGEST),
    ]


CHANGED = [
    "notebooks/results/digits/matrix.json", "notebooks/results/digits/ablations.json", "book/claims.csv",
    "notebooks/results/cost-and-speed.json", "notebooks/results/imagenette/plain-s0.json", "notebooks/ledger.py",
    "notebooks/results/speed/ratios.json", "notebooks/pooling.py", "book/imagenet.md", "recipes/digits/evit.yaml",
    "tests/fixtures/images.safetensors", "notebooks/results/fast-path.json",
    "notebooks/results/digits/backbones.json", "notebooks/results/imagewoof-gpu/plain-s0.json",
    "notebooks/results/loading.json", "notebooks/results/operators.json", "notebooks/results/speed-official.csv",
    "notebooks/results/speed-h100/eager-small.json", "notebooks/results/speed-masked/masked.json",
    "book/photographs/bee.json",
]  # fmt: skip


@pytest.mark.parametrize("changed", CHANGED)
def test_a_notebook_runs_again_when_what_it_reads_changed(changed):
    """All that name the file, and of the others none."""
    readers = {path.stem for path in NOTEBOOKS if changed in reads(path)}
    found = again(changed)
    if changed.startswith("recipes"):  # recipes begin with one another
        readers = {path.stem for path in NOTEBOOKS if any(file.startswith("recipes/") for file in reads(path))}
    assert readers and found == readers and len(found) < len(NOTEBOOKS)


@pytest.mark.parametrize("changed", ["engine.py", "families/beit.py"])
def test_every_notebook_runs_again_with_the_package(changed):
    assert again(f"tpbook/{changed}") == {path.stem for path in NOTEBOOKS}


def imports(path):
    """What a notebook's cells import of this repository, by their text."""
    cells = nbformat.read(path, as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "code" and "tpbook" in cell.source)


@pytest.mark.parametrize("module, asked", [("diagrams", r"\bdiagrams\b"), ("exporting", r"tpbook\.export\(")])
def test_a_notebook_does_not_run_again_with_what_it_does_not_import(module, asked):
    [changed] = [path.relative_to(TOP) for path in TOP.glob(f"tpbook/**/{module}.py")]
    users = {path.stem for path in NOTEBOOKS if re.search(asked, imports(path))}
    assert users and again(changed.as_posix()) == users < {path.stem for path in NOTEBOOKS}


@pytest.mark.parametrize("changed", ["notebooks/run.py", "tpbook/onnx_graph.py"])
def test_how_notebooks_are_run_is_none_of_what_they_read(changed):
    assert len(again(changed)) <= 0.1 * len(NOTEBOOKS)


RECORD = """
import json, os, sys
top, seen = os.getcwd(), set()
sys.path[:0] = [top, os.path.join(top, "notebooks")]
os.chdir("notebooks")
sys.addaudithook(lambda event, args: seen.add(args[0]) if event == "open" and isinstance(args[0], str) else None)
exec(sys.stdin.read())
modules = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
files = {os.path.relpath(os.path.abspath(path), top) for path in seen | modules if path}
print(json.dumps(sorted(f for f in files if f.startswith(("tpbook/", "notebooks/")) and "__pycache__" not in f)))
"""


def test_what_python_opens_is_among_what_make_knows():
    """The imports of a notebook, run: every module and file that Python then asks for is in its list."""
    path = TOP / "notebooks/your-own.ipynb"
    lines = [line for line in imports(path).splitlines() if re.match(r"(import|from) ", line)]
    lines += ["import tpbook.weights, tpbook.families"]  # a family is imported when a model asks for its own
    lines += ["tpbook.families.family_of(tpbook.weights.load_trained_digits('dtps'))"]
    command = [sys.executable, "-c", RECORD]
    ran = subprocess.run(command, input="\n".join(lines), cwd=TOP, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    opened = {file for file in json.loads(ran.stdout) if (TOP / file).is_file()}
    assert len(opened) > 60 and "tpbook/families/timm_vit.py" in opened
    assert opened <= set(needs.needs(path)), opened - set(needs.needs(path))


def notebook(folder, name, *cells, parameters=""):
    """A notebook of a made-up repository."""
    new = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    new.cells.insert(0, nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    nbformat.write(new, folder / "notebooks" / f"{name}.ipynb")
    return folder / "notebooks" / f"{name}.ipynb"


FILES = {
    "tpbook/__init__.py": '_LATER = {"late": (".book.late", None)}\nfrom .core import x',
    "tpbook/core.py": "", "tpbook/alone.py": "from .core import x", "tpbook/deep.py": "",
    "tpbook/book/__init__.py": "", "tpbook/book/late.py": "def f():\n    from ..deep import y",
    "tpbook/book/weighs.py": "a = 'kept/w'",
    "tpbook/kept/w.bin": "", "tpbook/kept/v.bin": "", "notebooks/help.py": "from tpbook import alone",
    "notebooks/results/a/one.json": "", "notebooks/results/a/two.json": "", "notebooks/results/b/one.json": "",
    "book/words.csv": "", "recipes/digits/x.yaml": "", "recipes/own/y.yaml": "",
}  # fmt: skip
CORE = {"tpbook/__init__.py", "tpbook/core.py"}
WEIGHED = CORE | {"tpbook/book/__init__.py", "tpbook/book/weighs.py", "tpbook/kept/v.bin", "tpbook/kept/w.bin"}


@pytest.mark.parametrize(
    "cells, wanted",
    [
        ("import json", set()),
        ("import tpbook", CORE), ("%pip install x\nawait y()\nif z:\n    !ls\nimport tpbook", CORE),
        ("import tpbook\ntpbook.late.f()", CORE | {"tpbook/book/__init__.py", "tpbook/book/late.py", "tpbook/deep.py"}),
        ("from tpbook import late", CORE | {"tpbook/book/__init__.py", "tpbook/book/late.py", "tpbook/deep.py"}),
        ("import help", CORE | {"notebooks/help.py", "tpbook/alone.py"}),
        ("from tpbook.book import weighs", WEIGHED),
        ("open('results/a/one.json')", {"notebooks/results/a/one.json"}),
        ("open(f'results/{which}/one.json')", {"notebooks/results/b/one.json"}),
        ("open(f'results/{other}/one.json')", {"notebooks/results/a/one.json", "notebooks/results/b/one.json"}),
        ("list('results/a')", {"notebooks/results/a/one.json", "notebooks/results/a/two.json"}),
        ("open('../book/words.csv')", {"book/words.csv"}),
        ("open(f'../recipes/{profile}/x.yaml')", {"recipes/digits/x.yaml", "recipes/own/y.yaml"}),
        ("'see results/a/one.json'", set()),
    ],
)  # fmt: skip
def test_what_a_notebook_needs(tmp_path, cells, wanted):
    for file, text in FILES.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    path = notebook(tmp_path, "it", cells, parameters='profile: str = "digits"\nwhich: str = "b"')
    assert set(needs.needs(path)) == wanted | {"notebooks/it.ipynb"}


@pytest.mark.parametrize(
    "cell, alike",
    [
        ("experiments.begin(profile, out)", True), ('results.save(out, "x", {"profile": profile})', True),
        ("n = experiments.of(profile, digits=1, imagenette=2)", False), ('if profile == "digits":\n    pass', False),
        ('path = f"../recipes/{profile}/x.yaml"', False), ('{"edition": profile}', False), ("begin(out)", True),
    ],
)  # fmt: skip
def test_alike_is_what_only_writes_its_profile_down(tmp_path, cell, alike):
    (tmp_path / "notebooks").mkdir()
    assert needs.is_alike(notebook(tmp_path, "it", cell, parameters='profile: str = "digits"')) is alike


@pytest.fixture
def made(tmp_path):
    """A checkout in which the books are up to date, as far as make can see, and Python says what it is asked."""
    shutil.copy(TOP / "Makefile", tmp_path)
    shutil.copytree(TOP / "tpbook", tmp_path / "tpbook", ignore=shutil.ignore_patterns("__pycache__"))
    sources = ("book", "pyproject.toml", "requirements.txt", "constraints.txt", "_config.yml", "_toc.yml")
    for name in sources:
        (tmp_path / name).symlink_to(TOP / name)
    environment = (".venv/.ready", ".venv/.kernels", "_build/javascript/.ready")
    targets = (*environment, "{}/.ran", "{}/site/_build/html/index.html")
    for age, name in enumerate(targets):
        for edition in ("digits", "imagenette"):
            target = tmp_path / name.format(f"_build/{edition}")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
            os.utime(target, (time.time() - 10 + age,) * 2)
    (tmp_path / ".venv/bin").mkdir()
    (tmp_path / ".venv/bin/python").write_text('#!/bin/sh\necho "$@"\ntouch ${WRITES-}\n')
    (tmp_path / ".venv/bin/python").chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    "goal, changed, rendered",
    [
        ("book", "README.md", ""), ("books", "README.md", ""), ("book", "book/evit.md", "digits"),
        ("books", "tpbook/engine.py", "digits imagenette"), ("books", "_build/imagenette/.ran", "imagenette"),
    ],
)  # fmt: skip
def test_make_asks_for_the_notebooks_and_renders_what_is_new(made, goal, changed, rendered):
    how = ["-W", changed] if not changed.startswith("_build") else []
    env = os.environ | {"WRITES": "_build/.none" if how else changed}
    command = ["make", "--silent", "PROFILE=digits", "TPBOOK_DATA=/nowhere", *how, goal]
    ran = subprocess.run(command, cwd=made, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert re.findall(r"editions\.py (.+)", ran.stdout) == ["digits" + " imagenette" * (goal == "books")]
    assert sorted(re.findall(r"render\.py _build/(\w+)", ran.stdout)) == rendered.split()


@pytest.mark.parametrize(
    "cells, clocked",
    [
        (["from tpbook import bench", "x = 1"], [False, False]),
        (["from tpbook import bench", "bench.run(plan)", "print(2)"], [False, True, False]),
        (["def took(f):\n    return bench.run(f)", "x = 1", "%time\ny = [took(n) for n in x]"], [False, False, True]),
        (["def a(f):\n    return Timer(f)", "def b(f):\n    return a(f)\n\n\nb(1)"], [False, True]),
    ],
)  # fmt: skip
def test_which_cells_measure_time(tmp_path, cells, clocked):
    (tmp_path / "notebooks").mkdir()
    path = notebook(tmp_path, "it", *cells)
    assert list(needs.clocked(path).values()) == [False, *clocked]


def test_a_cell_that_measures_time_has_the_cores_alone(tmp_path):
    """Others share; who wants to be alone waits for them, and who comes after waits for it."""
    first, second, alone, late = (turns.Turns(tmp_path) for _ in range(4))
    got = []

    def take(one, name, **how):
        def wait():
            one.take(**how)
            got.append(name)

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        thread.join(0.3)
        return thread

    first.take(alone=False)
    second.take(alone=False)
    waiting = take(alone, "alone", alone=True)
    after = take(late, "late", alone=False)
    os.close(second.lock)  # as its process ends
    assert got == []
    again = take(first, "first", alone=False)  # its next cell
    waiting.join(5)
    assert got == ["alone"]
    alone.take(alone=False)
    for thread in (after, again):
        thread.join(5)
    assert sorted(got) == ["alone", "first", "late"]


def test_cells_that_measure_time_in_a_row_keep_their_turn(tmp_path, monkeypatch):
    """Others get theirs before each cell that does not, and not between two that do."""
    (tmp_path / "notebooks").mkdir()
    path, taken = notebook(tmp_path, "it", "x = 1", "bench.run(1)", "bench.run(2)", "y = 2", "z = 3"), []
    monkeypatch.setattr(editions.Turns, "__init__", lambda self, folder: None)
    monkeypatch.setattr(editions.Turns, "take", lambda self, alone: taken.append(alone))
    begins = editions.taking_turns(path)
    for index, cell in enumerate(nbformat.read(path, as_version=4).cells):
        begins(cell=cell, cell_index=index)
    assert taken == [False, False, False, True, False, False]


def test_what_asks_for_no_profile_runs_once_for_both_editions():
    alike = {path for path in NOTEBOOKS if needs.is_alike(path)}
    runs, copies = editions.due(["imagenette"], modified=lambda path: 0 if "_build" in path.parts else 1)
    assert {path for edition, path in runs if edition == "digits"} == {path for _, path in copies} == alike
    assert {path for edition, path in runs if edition == "imagenette"} == set(NOTEBOOKS) - alike
    newer = lambda path: 2 + ("digits" in path.parts) if "_build" in path.parts else 1  # noqa: E731
    assert editions.due(["digits", "imagenette"], modified=newer) == ([], copies)


SEES = """
import json, os, sys
from pathlib import Path
seen = {"torch": "torch" in sys.modules, "tpbook": "tpbook" in sys.modules, "at": os.getcwd()}
seen |= {"threads": os.environ["OMP_NUM_THREADS"], "pid": os.getpid(), "parent": os.getppid()}
Path(out).mkdir(parents=True)
Path(out, "seen.json").write_text(json.dumps(seen))
"""
FAILS = 'assert Path("../ready").exists(), "not yet"'


def made_up(top, **notebooks):
    """Write a repository of those notebooks, name → cells. → what `subprocess` is told, to run its editions."""
    (top / "notebooks").mkdir()
    for name in ("editions.py", "needs.py", "run.py", "turns.py", "warm.py"):
        shutil.copy(TOP / "notebooks" / name, top / "notebooks")
    for name, cells in notebooks.items():
        path = notebook(top, name, *cells, parameters='profile: str = "digits"\nout: str = ""')
        it = nbformat.read(path, as_version=4)
        it.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(it, path)
    command = [sys.executable, "notebooks/editions.py", "digits", "imagenette"]
    return {"args": command, "cwd": top, "env": os.environ | {"JOBS": "2"}}


def until(holds, seconds=60):
    """Wait until it holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_editions_run_what_is_out_of_date(tmp_path):
    """In a made-up repository: what fails leaves the others whole and runs again, what is alike is copied."""
    begins = made_up(tmp_path, alike=[SEES], own=["x = profile[0]", SEES], fails=[SEES, FAILS])

    def ran():
        ran = subprocess.run(**begins, capture_output=True, text=True)
        return ran.returncode, re.findall(r"^(\w+)\.ipynb \(profile=(\w+)", ran.stderr, re.MULTILINE), ran.stderr

    def seen():
        return {
            path.relative_to(tmp_path / "_build").parts[::2]: json.loads(path.read_text())
            for path in (tmp_path / "_build").glob("*/results/*/seen.json")
        }

    code, names, said = ran()
    assert code == 1 and "not yet" in said and ("fails", "digits") in names
    assert not [*tmp_path.glob("_build/*/.ran")]
    there = {path.name for path in (tmp_path / "_build/digits/notebooks").iterdir()}
    assert {"alike.ipynb", "fails.failed.ipynb"} <= there and "fails.ipynb" not in there
    first = seen()["digits", "alike"]
    assert first["torch"] and not first["tpbook"] and first["at"] == str(tmp_path / "notebooks")
    assert first["threads"] == str(max(1, (os.cpu_count() or 1) // 2))

    (tmp_path / "ready").touch()
    code, names, said = ran()
    assert code == 0, said
    assert ("fails", "digits") in names and ("alike", "digits") not in names and ("alike", "imagenette") not in names
    found = seen()
    assert sorted(found) == sorted((e, n) for e in ("digits", "imagenette") for n in ("alike", "fails", "own"))
    assert found["digits", "alike"] == found["imagenette", "alike"] == first  # ran once, before
    own, other = found["digits", "own"], found["imagenette", "own"]
    assert own["pid"] != other["pid"] and own["parent"] != other["parent"]  # a fork for each, and in it the kernel
    marks = {path: path.stat().st_mtime_ns for path in tmp_path.glob("_build/*/.ran")}
    assert len(marks) == 2
    assert ran()[:2] == (0, [])
    assert marks == {path: path.stat().st_mtime_ns for path in marks}
    with pytest.raises(ProcessLookupError):  # no kernel outlives its notebook
        os.kill(own["pid"], 0)


def test_editions_end_with_what_they_run(tmp_path):
    """A make that is killed leaves no notebook running, and nothing that looks whole."""
    begins = made_up(tmp_path, long=[SEES, "import time\ntime.sleep(600)"])
    seen = tmp_path / "_build/digits/results/long/seen.json"
    process = subprocess.Popen(**begins, stderr=subprocess.DEVNULL)
    until(lambda: seen.exists() and seen.read_text())
    process.terminate()
    assert process.wait(60) != 0
    until(lambda: not Path(f"/proc/{json.loads(seen.read_text())['pid']}").exists())
    assert not [*(tmp_path / "_build/digits/notebooks").glob("*.ipynb")] and not [*tmp_path.glob("_build/*/.ran")]


@pytest.mark.parametrize("folder, variable", [("a b", ""), ("b", "TPBOOK_DATA=/my data"), ("c", "TPBOOK_WEIGHTS=d e")])
def test_a_path_with_a_space_is_refused_in_words(tmp_path, folder, variable):
    (tmp_path / folder).mkdir()
    shutil.copy(TOP / "Makefile", tmp_path / folder)
    command = ["make", "-n", "book", *filter(None, [variable])]
    ran = subprocess.run(command, cwd=tmp_path / folder, capture_output=True, text=True)
    assert ran.returncode != 0 and "a path has a space in it" in ran.stderr and (variable or folder) in ran.stderr
