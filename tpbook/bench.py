"""How fast a pruned model is: beside the dense model, and beside what its tokens cost if choosing them were free::

    python -m tpbook.bench                                            # DeiT-Ti: four methods, three ρ, batch 1 and 8
    python -m tpbook.bench model=deit_small_patch16_224 batch=[8,32] dtype=[float32,bfloat16] out=bench.json
    python -m tpbook.bench method=[evit] keep_ratio=[0.7] image_size=[224,384,512] mode=[eager,compiled]
    python -m tpbook.bench mode=training batch=32 dtype=bfloat16      # training steps; half precision by autocast
    python -m tpbook.bench mode=training batch=32 method=masked       # of masked fine-tuning; ρ of the patches visible

Every key takes one value or a list, and every combination is measured; `Plan` has them all. A ratio a stage is a list
in the list, `keep_ratio=[[0.7,0.5,0.3]]`. With `out=NAME.json` the rows are written there, with where and when they
were measured, and drawn beside it as NAME.svg. Until the last is measured they are lines of NAME.part.jsonl, which
stays where a run is stopped.

What is compared runs in one process, in turn, in a new order each round. Of the rounds' quotients, medians with their
95 % intervals (by order statistics)::

    × dense       t(dense) / t(pruned)    dense: timm's model as it comes, with fused attention, in the same mode
    efficiency    t(bound) / t(pruned)    bound: the same backbone slices off as many tokens at the same places
                                          (`sliced`). Each with fused or explicit attention, whichever a few
                                          rounds before found faster for it; in eager mode, and captured: there
                                          a graph of kernels is played, and no Python runs
    × eager       t(eager) / t(pruned)    of a compiled model
    × parts       t(pruned) / t(parts)    of a training step that distils: a dense step, and the teacher's forward

And counted, eager, what a stage starts and moves beyond the bound: operators, and the bytes that they read and write,
as a multiple of the stage's tokens (`tpbook.timing.operators`).

Weights are random: no time here depends on them.

Chapter: :doc:`/book/speed`
"""

import json
import sys
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path

import timm
import torch

from .book import results
from .checks import check_keep_ratio
from .engine import prune, unprune
from .families import family_of
from .masking import mask, unmask
from .timing.bound import sliced
from .timing.clock import interleaved, peak_memory, said, times
from .timing.operators import said as counted
from .timing.rows import forwards, training_steps
from .training.recipes import parse

__all__ = ["Plan", "interleaved", "main", "peak_memory", "plot", "run", "said", "sliced", "times"]

DTYPES = ("float32", "bfloat16", "float16")
NAMES = {"times_dense": "× dense", "efficiency": "efficiency", "times_eager": "× eager", "times_parts": "× parts"}
MODES = ("eager", "compiled", "captured", "graphs", "training")


@dataclass(frozen=True)
class Plan:
    """What `run` measures: every combination of the tuples. One value stands for a tuple of one."""

    model: tuple = ("deit_tiny_patch16_224",)  # timm models
    method: tuple = ("dynamicvit", "evit", "dtps", "etps")  # () measures the dense model alone
    keep_ratio: tuple = (0.7, 0.5, 0.3)  # each a number, or a tuple of one a stage
    batch: tuple = (1, 8)
    dtype: tuple = ("float32",)  # of DTYPES: weights, input and arithmetic; of training steps, that of autocast
    image_size: tuple = (0,)  # pixels; 0 is the model's own
    mode: tuple = ("eager",)  # of MODES: "compiled" by torch.compile, "captured" as a CUDA graph, "graphs" both,
    # "training" steps, which alone know the method "masked", masked fine-tuning
    device: str = "cpu"
    threads: int = 0  # 0 leaves PyTorch's
    rounds: int = 30
    warmup: int = 3  # rounds before these

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is tuple and not isinstance(value, (tuple, list)):
                value = (value,)
            if field.type is tuple:
                object.__setattr__(self, field.name, tuple(value))
        for key, allowed in (("dtype", DTYPES), ("mode", MODES)):
            for value in getattr(self, key):
                if value not in allowed:
                    raise ValueError(f"{key} must be one of {', '.join(allowed)}, got {value!r}")
        ratios = (tuple(ratio) if isinstance(ratio, list) else ratio for ratio in self.keep_ratio)
        object.__setattr__(self, "keep_ratio", tuple(ratios))
        try:
            kind = torch.device(self.device).type
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"device must be one of PyTorch's, such as cpu or cuda:1, got {self.device!r}") from error
        for mode in {"captured", "graphs"} & set(self.mode):
            if kind != "cuda":
                raise ValueError(f"mode {mode!r} needs device=cuda, got {self.device!r}")
        if "training" in self.mode and "float16" in self.dtype and kind == "cpu":
            raise ValueError(
                "dtype must be float32 or bfloat16 for training on a CPU, got 'float16': it has no autocast to it"
            )
        if "masked" in self.method and set(self.mode) != {"training"}:
            raise ValueError(f"method 'masked' needs mode=training, got {', '.join(self.mode)}")
        for name in self.model:
            if not timm.is_model(name):
                raise ValueError(f"model must be a timm model (timm.list_models()), got {name!r}")
        for key in ("batch", "image_size", "rounds", "warmup", "threads"):
            for value in getattr(self, key) if isinstance(getattr(self, key), tuple) else (getattr(self, key),):
                least = 1 if key in ("batch", "rounds") else 0
                if not isinstance(value, int) or value < least:
                    raise ValueError(f"{key} must be an int of at least {least}, got {value!r}")

    def check(self):
        """Make every model and prune it in every way, so that what cannot be is known before anything is timed.

        Raises:
            ValueError, TypeError: a method, ρ, image size or slicing bound that a model cannot have, or a device that
                is not there.
        """
        try:
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as error:  # the latter where PyTorch is built without it
            raise ValueError(f"device must be one that is there, got {self.device!r}: {error}") from error
        for name, size in product(self.model, self.image_size):
            dense = _dense(name, size)
            family_of(dense)
            for method, ratio in product(self.method, self.keep_ratio):
                if method == "masked":
                    if isinstance(ratio, tuple):
                        raise ValueError(f"keep_ratio must be one number for method 'masked', got {list(ratio)}")
                    unmask(mask(dense, 1 - check_keep_ratio(ratio, 1)))
                    continue
                sliced(prune(dense, method, keep_ratio=ratio))
                unprune(dense)


def run(plan, say=print, keep=None):
    """Measure a plan.

    Args:
        plan: a `Plan`; all of it is checked before anything is timed.
        say: takes a line of text for each row.
        keep: takes each row as soon as it is measured.

    Returns:
        list of dicts, one for each model, image size, dtype, batch, mode and method ("dense", then the plan's for each
        ρ): "ms" (median), "images_per_second", "memory_mb" (eager), and as `times` gives them "times_dense",
        "efficiency", "times_eager", and of the dense model "times_explicit", fused against explicit attention;
        "attention", which of both "efficiency" took of the "pruned" model and of its "bound"; "operators", "bytes" and
        "times_tokens" of a stage, as `a_stage` gives them (eager); "times_parts" of training steps that distil;
        "compile_seconds", those of a compiled model's first call; "load", the machine's load average before.

    Raises:
        ValueError, TypeError: a method, ρ or image size that the model cannot have.
    """
    if plan.threads:
        torch.set_num_threads(plan.threads)
    plan.check()
    rows = []
    for name, size, dtype in product(plan.model, plan.image_size, plan.dtype):
        dense = _dense(name, size).to(plan.device, getattr(torch, dtype))
        family = family_of(dense)
        height, width = family.image_size(dense)
        for batch in plan.batch:
            images = torch.randn(batch, family.channels(dense), height, width).to(plan.device, getattr(torch, dtype))
            shared = {"model": name, "image_size": height, "dtype": dtype, "batch": batch}
            for i, ratio in enumerate(plan.keep_ratio if plan.method else (1.0,)):
                for measure, modes in ((forwards, set(plan.mode) - {"training"}), (training_steps, {"training"})):
                    if not modes & set(plan.mode):
                        continue
                    for row in measure(plan, dense, images, ratio, shared):
                        say(_line(row))
                        if i == 0 or row["method"] != "dense":  # the dense rows once
                            rows.append(row)
                            if keep is not None:
                                keep(row)
    return rows


def _dense(name, size):
    return timm.create_model(name, **({"img_size": size} if size else {})).eval()


def _line(row):
    """A row as it is printed."""
    shown = {**row, "keep_ratio": _ratio(row["keep_ratio"])}
    line = "{model} {image_size} {dtype} batch {batch} {mode} {method:10} ρ {keep_ratio:<4} {ms:8.2f} ms".format(
        **shown
    )
    for key, name in NAMES.items():
        if key in row:
            line += f"   {name} {said(row[key])}"
    return line + (f"   {counted(row)}" if "operators" in row else "")


def _ratio(ratio):
    return ", ".join(map(str, ratio)) if isinstance(ratio, tuple) else str(ratio)


def plot(rows):
    """Speed over keep ratio, one line a method and batch, one panel a dtype and model. → matplotlib Figure."""
    import pandas as pd
    import seaborn as sns

    from .book import plots

    plots.style()
    table = pd.DataFrame([row for row in rows if "times_dense" in row])
    table["× dense"] = [ratio[0] for ratio in table.pop("times_dense")]
    table["what"] = table.model.str.cat([table.image_size.astype(str), table.dtype, table["mode"]], sep=" ")
    if any(isinstance(ratio, tuple) for ratio in table.keep_ratio):
        table["keep_ratio"] = table.keep_ratio.map(_ratio)
    table = table.rename(columns={"keep_ratio": "keep ratio ρ"})
    grid = sns.relplot(
        table, x="keep ratio ρ", y="× dense", hue="method", style="batch", markers=True, kind="line", col="what",
        col_wrap=2, height=3.2, palette=plots.COLOURS if set(table.method) <= set(plots.COLOURS) else None,
    )  # fmt: skip
    grid.set_titles("{col_name}").refline(y=1, color="black", lw=1)
    return grid.figure


class Lines:
    """A file of what was measured until now: the plan, and where and when, then a line for each row as it comes.

    An older one is replaced by the first row.
    """

    def __init__(self, path, plan):
        self.path, self.plan, self.begun = path, plan, False

    def keep(self, row):
        """Write one row."""
        with self.path.open("a" if self.begun else "w") as file:
            if not self.begun:
                file.write(json.dumps({"plan": asdict(self.plan), "run": results.provenance()}) + "\n")
            file.write(json.dumps(row) + "\n")
        self.begun = True


def main(arguments=None):
    """The command."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return
    lines = None
    try:
        kinds = {field.name: field.type for field in fields(Plan)} | {"out": str}
        keys = parse(words, kinds)
        out = keys.pop("out", None)
        for key in keys:
            if key not in kinds:
                raise ValueError(f"key {key!r} is not known; there are {', '.join(kinds)}")
        if out is not None and Path(out).suffix != ".json":
            raise ValueError(f"out must end in .json, got {out!r}")
        plan = Plan(**keys)
        if out is None:
            run(plan)
            return
        out = Path(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        lines = Lines(out.with_suffix(".part.jsonl"), plan)
        rows = run(plan, keep=lines.keep)
        results.save(out.parent, out.stem, {"plan": asdict(plan), "rows": rows})
        lines.path.unlink()
        if plan.method:
            plot(rows).savefig(out.with_suffix(".svg"))
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        left = f" (what was measured is in {lines.path})" if lines and lines.begun and lines.path.exists() else ""
        sys.exit(f"tpbook.bench: {error}{left}")


if __name__ == "__main__":
    main()
