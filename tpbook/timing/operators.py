"""What a stage starts and moves: operators, and the bytes that they read and write. Counted, so no clock matters::

    python -m tpbook.timing.operators                                          # nine methods, float32 and bfloat16
    python -m tpbook.timing.operators method=[evit,etps] dtype=float32 batch=1 keep_ratio=0.5 out=operators.json

Counted is a forward in eval mode, eager, of the pruned model, less one of its slicing bound (`tpbook.bench.sliced`)
with the same attention; the difference is divided by the number of stages. So what a stage makes the blocks around it
do is its own: a row of the attention, sizes that later attentions weigh by. A learned score is the bound's too::

    an operator   a call that reaches PyTorch's dispatcher below autograd, such as aten.topk. Views of a tensor and
                  memory that nobody has written to yet are none. Of our own kernels a function is one on a
                  CPU, and on a GPU as many as it starts.
    its bytes     those of every tensor that it is given and of every one that it returns; what is broadcast counts as
                  it is stored, what is written in place twice, and a lookup reads of its table what it returns.
    × tokens      these bytes over those of the (B, n, C) patch tokens that enter the stage, in their own dtype.

By PyTorch's operators a stage of DynamicViT that keeps k of n tokens is five of them: topk; arange and add, which find
the rows of a batch; embedding, which looks k rows up and writes them; cat, which puts them behind the class token. The
last two read and write k rows each, so ρ = 0.7 moves 4 · 0.7 = 2.8 times the stage's tokens, and a little for scores
and positions. By our kernels it is two, and half of that: rank, and collect, which does the rest.

`TorchDispatchMode` counts, and not `torch.profiler`: it is handed the tensors themselves, of which a profile knows the
shapes alone, and each operator once. A profile has what an operator calls inside too, and on a GPU kernels, of which a
sort starts several. So the counts follow our code, and say nothing of how a device runs an operator.

Chapter: :doc:`/book/speed`
"""

import functools
import importlib
import math
import sys
from collections import Counter
from itertools import product
from pathlib import Path

import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from ..book import results
from ..checks import check_flag, check_name
from ..engine import is_pruned, prune
from ..families import family_of
from ..kernels import allowed, cpu, with_triton
from ..tracing import trace
from ..training.recipes import parse
from .bound import sliced

ATEN = torch.ops.aten
FREE = {
    ATEN.empty, ATEN.empty_like, ATEN.empty_strided, ATEN.new_empty, ATEN.new_empty_strided, ATEN._unsafe_view
}  # fmt: skip
COLLECT = "tpbook.collect"
LOOKUPS = {"aten.embedding", "aten.gather", "aten.index", "aten.index_select", COLLECT}
METHODS = ("dynamicvit", "evit", "topk", "dtps", "etps", "tome", "dpcknn", "evovit", "ats")
KERNELS = {"row": 2, "rank": 1, "collect": 1, "squeeze": 2}  # of `tpbook.kernels.stage`: how many each starts
DTYPES = ("float32", "bfloat16", "float16")


class Work(TorchDispatchMode):
    """Counts while it is entered: `operators`, how often each was started, by its name, and `bytes` of all of them."""

    def __init__(self):
        super().__init__()
        self.operators, self.bytes = Counter(), 0
        self.kernels = importlib.import_module("tpbook.kernels.stage") if with_triton else None

    def __enter__(self):
        if self.kernels:  # which no dispatcher sees
            self.own = {name: getattr(self.kernels, name) for name in KERNELS}
            for name, function in self.own.items():
                setattr(self.kernels, name, functools.partial(self._kernel, name, function))
        return super().__enter__()

    def __exit__(self, *error):
        if self.kernels:
            for name, function in self.own.items():
                setattr(self.kernels, name, function)
        return super().__exit__(*error)

    def _kernel(self, name, function, *args, **kwargs):
        with _disable_current_modes():
            returned = function(*args, **kwargs)
        self._count(f"tpbook.{name}", KERNELS[name], args, kwargs, returned)
        return returned

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        returned = operator(*args, **(kwargs or {}))
        packet = operator.overloadpacket
        if not operator.is_view and packet not in FREE:
            self._count(str(packet), 1, args, kwargs, returned)
        return returned

    def _count(self, name, started, args, kwargs, returned):
        given, written = _bytes((args, kwargs)), _bytes(returned)
        if name in LOOKUPS and not (name == COLLECT and torch.is_tensor(args[-1])):  # with weights it reads them all
            given += min(0, written - _bytes(args[0]))
        self.operators[name] += started
        self.bytes += given + written


def _bytes(tree):
    """Those of all tensors in it, each as often as it occurs; a dimension that is broadcast is stored once."""
    return sum(
        math.prod(n for n, step in zip(x.shape, x.stride()) if step) * x.itemsize
        for x in tree_leaves(tree) if torch.is_tensor(x)
    )  # fmt: skip


def work(model, images):
    """`Work` of a forward without gradient, whether or not inference mode is on around it."""
    with torch.inference_mode(False), torch.no_grad(), Work() as counted:
        model(images)
    return counted


def a_stage(model, images):
    """What a stage of a pruned model starts and moves beyond its slicing bound; the mean over its stages.

    Args:
        model: a model pruned by `tpbook.prune`, in eval mode.
        images: (B, 3, H, W) that it takes; where images decide how many tokens they keep, the count depends on them.

    Returns:
        dict: "operators"; "bytes" that they read and write; "times_tokens", these over those of the tokens that enter.

    Raises:
        ValueError: the model is not pruned, trains, or removes no tokens, but has a fast path for them.
    """
    if not is_pruned(model) or model.training:
        raise ValueError(f"model must be a pruned one in eval mode, got {type(model).__name__}")
    with torch.inference_mode(False), torch.no_grad(), trace(model) as seen:
        model(images)
    varies, stages = model.pruning.method.chooses.varies, len(model.pruning.at)
    bound = work(sliced(model, [patch.shape[1] for patch in seen.kept] if varies else None), images)
    whole = work(model, images)
    more = whole.bytes - bound.bytes
    return {
        "operators": (whole.operators.total() - bound.operators.total()) / stages, "bytes": more / stages,
        "times_tokens": more / sum(x.nbytes for x in seen.entered),
    }  # fmt: skip


def measure(model="deit_tiny_patch16_224", method=METHODS, keep_ratio=0.7, dtype=DTYPES[:2], batch=8, kernels=None):
    """`a_stage` of methods and dtypes, each one or several, on random weights and images of seed 0.

    Args:
        kernels: whether `tpbook.kernels` may run, a bool or several; None is both where those of a CPU are built.

    Returns:
        list of dicts, one a choice of kernels, dtype and method.

    Raises:
        ValueError, TypeError: an argument that cannot be.
    """
    if not timm.is_model(model):
        raise ValueError(f"model must be a timm model (timm.list_models()), got {model!r}")
    if not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch must be an int of at least 1, got {batch!r}")
    if kernels is None:
        kernels = (True, False) if cpu.operators() else (False,)
    methods, dtypes = ((some,) if isinstance(some, str) else tuple(some) for some in (method, dtype))
    for kind in dtypes:
        check_name("dtype", kind, DTYPES)
    rows, shared = [], {"model": model, "keep_ratio": keep_ratio, "batch": batch}
    for own, kind, name in product((kernels,) if isinstance(kernels, bool) else kernels, dtypes, methods):
        check_flag("kernels", own)
        if own and not cpu.operators():
            raise ValueError("kernels must be False where they are not built (python -m tpbook.kernels.cpu), got True")
        torch.manual_seed(0)
        pruned = prune(timm.create_model(model).eval(), name, keep_ratio=keep_ratio).to(getattr(torch, kind))
        family = family_of(pruned)
        images = torch.randn(batch, family.channels(pruned), *family.image_size(pruned)).to(getattr(torch, kind))
        with allowed(own):
            rows.append({**shared, "kernels": own, "dtype": kind, "method": name, **a_stage(pruned, images)})
    return rows


def said(counts):
    """What `a_stage` found, for a line of text."""
    return "a stage {operators:.0f} operators, {times_tokens:.1f} × tokens".format(**counts)


def main(arguments=None):
    """The command."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return
    try:
        keys = parse(words, {"model": str, "method": tuple, "dtype": tuple, "out": str})
        out = keys.pop("out", None)
        rows = measure(**keys)
        for row in rows:
            kind = "kernels" if row["kernels"] else "PyTorch"
            print(f"{row['method']:10} {row['dtype']:8} {kind}: {said(row)}")
        if out:
            results.save(Path(out).parent, Path(out).stem, {"rows": rows})
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"tpbook.timing.operators: {error}")


if __name__ == "__main__":
    main()
