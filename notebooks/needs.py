"""What each notebook depends on: `python notebooks/needs.py` prints it, `editions.py` asks for it.

A notebook is run again when a file of this repository changed that it imports, at any depth, or that its cells name:
paths in them are literals, from the notebooks' folder, and what an f-string puts in may be anything. Besides:

- `is_alike`, whether a notebook does nothing with `profile` but begin and write it down: it runs once for all editions;
- `LONGEST`, those that begin first, so that in the end no core waits for one of them.
"""

import ast
import json
import re
from functools import cache
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
# what no import statement says: every family that `family_of` may ask, and the source that is compiled
BY_NAME = {"tpbook/families/registry.py": "tpbook/families/*.py", "tpbook/kernels/cpu.py": "tpbook/kernels/*.cpp"}
# what comes with a call or a file: `claims` reads a table, `ledger` all results, and recipes begin with one another
SETS = ("cost-and-speed.json", *(f"{name}/*.json" for name in ("digits", "imagenet", "imagenette", "imagewoof-gpu")))
WITH = {
    r"\bledger\.claims\(": ["book/claims.csv"],
    r"\bledger\.ledger\(": ["book/claims.csv", "book/ledger.csv", *(f"notebooks/results/{name}" for name in SETS)],
    r"/recipes/|/imagenet\.md": ["recipes/*/*.yaml"],
}
LONGEST = (  # half a minute and more; in which order is a matter of time alone
    "a-tour-of-keep-ratios", "masked-fine-tuning", "tps", "spatial-maps", "robustness", "evit", "when-tokens-can-go", "imagenet",
    "dynamicvit", "explorer", "hybrid-vits", "speed", "your-own", "questions-blocks", "paper-and-code-tokens", "questions-speed",
)  # fmt: skip
TIMED = r"\b(Timer|bench|perf_counter|interleaved|step_time)\b"


def cells(notebook):
    """The code cells of a notebook, each with its source: list of (dict, str)."""
    read = json.loads(notebook.read_text("utf-8"))["cells"]
    return [(cell, "".join(cell["source"])) for cell in read if cell["cell_type"] == "code"]


def plain(source):
    """A source without commands of Jupyter."""
    return re.sub(r"^(\s*)[%!].*", r"\1pass", source, flags=re.MULTILINE)


def code(notebook):
    """The source of the code cells of a notebook, and the values of its parameters: str, dict."""
    sources, given = cells(notebook), {}
    for cell, source in sources:
        if "parameters" in cell["metadata"].get("tags", []):
            exec(source, given)
    return plain("\n".join(source for _, source in sources)), given


def parsed(text):
    """The tree of what Jupyter runs, where a cell may await."""
    return compile(text, "cells", "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@cache
def later(top):
    """What `tpbook` loads when first asked for: name in it → module."""
    for node in ast.parse((top / "tpbook/__init__.py").read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_LATER":
            return {name: module.lstrip(".") for name, (module, _) in ast.literal_eval(node.value).items()}
    return {}


def imported(tree, package, top):
    """The names of the modules that code asks for, and of what it takes from them, which may be modules too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
            if base == "tpbook":
                yield from (f"tpbook.{later(top)[a.name]}" for a in node.names if a.name in later(top))
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "tpbook" and node.attr in later(top):
            yield f"tpbook.{later(top)[node.attr]}"


def files(module, top):
    """The files of this repository that importing a module runs: [] where it is a library's."""
    found, parts = [], module.split(".")
    for i in range(1, len(parts) + 1):
        for base in (top, top / "notebooks"):
            path = base.joinpath(*parts[:i])
            found += [file for file in (path / "__init__.py", path.with_name(f"{path.name}.py")) if file.is_file()]
    return found


@cache
def asks(file, top):
    """What a Python file of this repository asks for itself: set of files."""
    tree, relative = ast.parse(file.read_text("utf-8")), file.relative_to(top)
    package = ".".join(relative.parent.parts)
    return {
        *(found for module in imported(tree, package, top) for found in files(module, top)),
        *top.glob(BY_NAME[relative.as_posix()] if relative.as_posix() in BY_NAME else "\0"),
        *data(tree, top),
    }


@cache
def folders(top):
    """Folders of the package that hold no code: name → files."""
    inner = [path for path in (top / "tpbook").rglob("*") if path.is_dir() and path.name != "__pycache__"]
    return {path.name: [*filter(Path.is_file, path.rglob("*"))] for path in inner if not any(path.rglob("*.py"))}


def strings(tree, given=None):
    """The literals of code as patterns: a parameter of `given` in an f-string as its value, anything else as `*`."""
    within = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            within |= {id(part) for part in node.values}
            yield "".join(
                part.value if isinstance(part, ast.Constant) else str((given or {}).get(ast.unparse(part.value), "*"))
                for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in within:
            yield node.value


def data(tree, top):
    """The files of folders of the package that code names."""
    return {file for text in strings(tree) for file in folders(top).get(text.split("/")[0], [])}


def read(tree, text, given, top):
    """The files that the cells of a notebook name."""
    given = {key: value for key, value in given.items() if key != "profile"}
    patterns = [pattern for call, several in WITH.items() if re.search(call, text) for pattern in several]
    for literal in strings(tree, given):
        if re.match(r"results/[\w*]|\.\./(?!_build)[\w*]+/[\w*]", literal) and "\n" not in literal:
            patterns.append(literal[3:] if literal.startswith("../") else f"notebooks/{literal}")
    for pattern in patterns:
        for found in top.glob(pattern.rstrip("/")):
            yield from filter(Path.is_file, found.rglob("*") if found.is_dir() else [found])


@cache
def needs(notebook):
    """The files of its repository that a notebook depends on, itself included: sorted list of relative paths."""
    top = notebook.resolve().parent.parent
    text, given = code(notebook)
    tree = parsed(text)
    found, ahead = {notebook.resolve()}, {file for module in imported(tree, "", top) for file in files(module, top)}
    while ahead:
        found |= ahead
        ahead = {other for file in ahead if file.suffix == ".py" for other in asks(file, top)} - found
    found |= data(tree, top) | set(read(tree, text, given, top))
    return sorted(path.relative_to(top).as_posix() for path in found)


@cache
def is_alike(notebook):
    """Whether a notebook gives the same in every edition."""
    tree, free = parsed(code(notebook)[0]), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "begin":
            free |= {id(argument) for argument in node.args}
        elif isinstance(node, ast.Dict):
            free |= {
                id(v) for k, v in zip(node.keys, node.values) if isinstance(k, ast.Constant) and k.value == "profile"
            }
        elif isinstance(node, ast.AnnAssign):
            free.add(id(node.target))
    return not any(isinstance(n, ast.Name) and n.id == "profile" and id(n) not in free for n in ast.walk(tree))


def clocked(notebook):
    """Which cells measure time, by a function of an earlier cell too: source → bool."""
    pattern, found = TIMED, {}
    for _, source in cells(notebook):
        found[source] = False
        for node in parsed(plain(source)).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)) or not re.search(pattern, ast.unparse(node)):
                continue
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):  # measures when it is called
                pattern += rf"|\b{node.name}\b"
            else:
                found[source] = True
    return found


if __name__ == "__main__":
    for path in sorted((TOP / "notebooks").glob("*.ipynb")):
        print(f"{path.name}{' (alike)' * is_alike(path)}:", *needs(path), sep="\n  ")
