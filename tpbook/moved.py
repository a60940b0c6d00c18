"""Imports of places where things were before they moved: they work for this version, with a `DeprecationWarning`.

Chapter: :doc:`/book/api`
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings

# module of `tpbook` as it was called → as it is called
MOVED = {
    "dynamicvit": "methods.dynamicvit", "evit": "methods.evit", "tps": "methods.tps", "baselines": "methods.baselines",
    "backbones": "weights", "recipes": "training.recipes", "checkpoints": "training.checkpoints",
    "plots": "book.plots", "diagrams": "book.diagrams", "results": "book.results",
}  # fmt: skip
KEPT = {"widgets": "book.widgets"}  # that stay as names, without a warning


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname, path=None, target=None):
        package, _, name = fullname.rpartition(".")
        if package == __package__ and name in MOVED | KEPT:
            return importlib.machinery.ModuleSpec(fullname, self)
        return None

    def create_module(self, spec):
        name = spec.name.rpartition(".")[2]
        now = f"{__package__}.{(MOVED | KEPT)[name]}"
        if name in MOVED:
            warnings.warn(f"{spec.name} is now {now}; this name goes with the next version", DeprecationWarning, 2)
        return importlib.import_module(now)

    def exec_module(self, module):
        pass  # it is loaded already


def install():
    """Make the old names importable."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
