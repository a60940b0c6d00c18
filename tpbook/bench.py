"""How fast a pruned model is: beside the dense model, and beside what its tokens cost if choosing them were free::

    python -m tpbook.bench                                            # DeiT-Ti: four methods, three ρ, batch 1 and 8
    python -m tpbook.bench model=deit_small_patch16_224 batch=[8,32] dtype=[float32,bfloat16] out=bench.json
    python -m tpbook.bench method=[evit] keep_ratio=[0.7] image_size=[224,384,512] mode=[eager,compiled]
    python -m tpbook.bench mode=training batch=32 dtype=bfloat16      # whole training steps; half precision by autocast

Every key takes one value or a list, and every combination is measured; `Plan` has them all. With `out=NAME.json` the
rows are written there, with where and when they were measured, and drawn beside it as NAME.svg.

What is compared runs in one process, in turn, in a new order each round. Of the rounds' quotients, medians with their
95 % intervals (by order statistics)::

    × dense       t(dense) / t(pruned)    dense: timm's model as it comes, with fused attention, in the same mode
    efficiency    t(bound) / t(pruned)    bound: the same backbone slices off as many tokens at the same places
                                          (`Sliced`), with fused or explicit attention, whichever is faster; in
                                          eager mode
    × eager       t(eager) / t(pruned)    of a compiled model
    × parts       t(pruned) / t(parts)    of a training step that distils: a dense step, and the teacher's forward

Weights are random: no time here depends on them.

Chapter: :doc:`/book/speed`
"""

import copy
import functools
import os
import sys
import time
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path

import timm
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from scipy.stats import quantile_test
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker

from . import results, train
from .engine import prune, unprune
from .recipes import PRECISIONS, Recipe

DISTILLING = ("dynamicvit", "dtps", "etps")  # whose recipes have a teacher
DTYPES = ("float32", "bfloat16", "float16")
NAMES = {"times_dense": "× dense", "efficiency": "efficiency", "times_eager": "× eager", "times_parts": "× parts"}
MODES = ("eager", "compiled", "graphs", "training")


@dataclass(frozen=True)
class Plan:
    """What `run` measures: every combination of the tuples. One value stands for a tuple of one."""

    model: tuple = ("deit_tiny_patch16_224",)  # timm models
    method: tuple = ("dynamicvit", "evit", "dtps", "etps")  # () measures the dense model alone
    keep_ratio: tuple = (0.7, 0.5, 0.3)
    batch: tuple = (1, 8)
    dtype: tuple = ("float32",)  # of DTYPES: weights, input and arithmetic
    image_size: tuple = (0,)  # pixels; 0 is the model's own
    mode: tuple = ("eager",)  # of MODES: "compiled" by torch.compile, "graphs" as CUDA graphs too, "training" steps
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
        if "graphs" in self.mode and torch.device(self.device).type != "cuda":
            raise ValueError(f"mode 'graphs' needs device=cuda, got {self.device!r}")
        for name in self.model:
            if not timm.is_model(name):
                raise ValueError(f"model must be a timm model (timm.list_models()), got {name!r}")
        for key in ("batch", "image_size", "rounds", "warmup", "threads"):
            for value in getattr(self, key) if isinstance(getattr(self, key), tuple) else (getattr(self, key),):
                least = 1 if key in ("batch", "rounds") else 0
                if not isinstance(value, int) or value < least:
                    raise ValueError(f"{key} must be an int of at least {least}, got {value!r}")


def interleaved(calls, rounds=30, warmup=3, device="cpu"):
    """Seconds that each call takes: all of them in turn, round after round, in a new order each round.

    Args:
        calls: dict: name → function without arguments.
        rounds: how often each is called.
        warmup: how often each is called before that.
        device: where they compute; a GPU is waited for.

    Returns:
        dict: name → (rounds,) float64 seconds, in the order of the rounds.
    """
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    names, taken = list(calls), {name: [] for name in calls}
    order = torch.Generator().manual_seed(0)
    for r in range(warmup + rounds):
        for i in torch.randperm(len(names), generator=order).tolist():
            wait()
            begun = time.perf_counter()
            calls[names[i]]()
            wait()
            if r >= warmup:
                taken[names[i]].append(time.perf_counter() - begun)
    return {name: torch.tensor(seconds, dtype=torch.float64) for name, seconds in taken.items()}


def times(seconds, of):
    """How many times as fast: the quotients of two calls, round by round.

    Args:
        seconds: (rounds,) of a call.
        of: (rounds,) of the call that it is compared to.

    Returns:
        list: median of `of` / `seconds`, and the lower and upper end of its 95 % interval.
    """
    quotients = of / seconds
    interval = quantile_test(quotients.numpy(), p=0.5).confidence_interval(0.95)
    return [quotients.quantile(0.5).item(), float(interval.low), float(interval.high)]


def said(ratio):
    """What `times` found, for a table: 1.52 [1.49, 1.55]."""
    return "{:.2f} [{:.2f}, {:.2f}]".format(*ratio)


class Sliced(nn.Module):
    """The slicing bound: what a pruned model's token counts cost if choosing were free.

    At each stage the first n_s patch tokens stay, which is a slice; a learned score is computed and ignored.

    Args:
        model: a model pruned by `tpbook.prune`, in eval mode. It stays as it is; its parameters are shared.
    """

    def __init__(self, model):
        super().__init__()
        model = _copy(model)
        self.pruning, self.score_predictor = model.pruning, getattr(model, "score_predictor", None)
        self.model = unprune(model)  # nothing listens to its attention

    def forward(self, images):
        """(B, in_chans, H, W) → (B, classes)."""
        model, pruning = self.model, self.pruning
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))  # (B, P + N, C)
        prefix = model.num_prefix_tokens
        counts = pruning.counts(x.shape[1] - prefix)
        for i, block in enumerate(model.blocks):
            if i not in pruning.at:
                x = block(x)
                continue
            s = pruning.at.index(i)
            stay = prefix + counts[s].leave
            if pruning.method.score == "predictor":
                self.score_predictor[s](x[:, prefix:])
            if pruning.method.place == "before":
                x = block(x[:, :stay])
            else:
                x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
                x = x[:, :stay]
                x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return model.forward_head(model.norm(x))


def peak_memory(call, device="cpu"):
    """The most bytes that a call holds at once, beyond what was held before it; of tensors, in eager mode."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with MemTracker() as tracker:
        call()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    return sum(held for kind, held in peak.items() if getattr(kind, "value", "") in ("Activation", "Temp", "Other"))


def run(plan, say=print):
    """Measure a plan.

    Args:
        plan: a `Plan`.
        say: takes a line of text for each row.

    Returns:
        list of dicts, one for each model, image size, dtype, batch, mode and method ("dense", then the plan's for each
        ρ): "ms" (median), "images_per_second", "memory_mb" (eager), and as `times` gives them "times_dense",
        "efficiency", "times_eager", and of the dense model "times_explicit", fused against explicit attention;
        "attention", the bound's; "times_parts" of training steps that distil; "load", the machine's load average
        before.

    Raises:
        ValueError, TypeError: a method, ρ or image size that the model cannot have.
    """
    if plan.threads:
        torch.set_num_threads(plan.threads)
    rows = []
    for name, size, dtype in product(plan.model, plan.image_size, plan.dtype):
        dense = timm.create_model(name, **({"img_size": size} if size else {}))
        dense = dense.eval().to(plan.device, getattr(torch, dtype))
        for batch in plan.batch:
            height, width = dense.patch_embed.img_size
            images = torch.randn(batch, dense.in_chans, height, width).to(plan.device, getattr(torch, dtype))
            shared = {"model": name, "image_size": height, "dtype": dtype, "batch": batch}
            for i, ratio in enumerate(plan.keep_ratio if plan.method else (1.0,)):
                for measure, modes in ((_forwards, set(plan.mode) - {"training"}), (_training, {"training"})):
                    if modes & set(plan.mode):
                        measured = measure(plan, dense, images, ratio, shared)
                        for row in measured:
                            say(_line(row))
                        rows += [row for row in measured if i == 0 or row["method"] != "dense"]  # the dense rows once
    return rows


@torch.inference_mode()
def _forwards(plan, dense, images, ratio, shared):
    """Rows of what takes turns: the dense model and every method at one ρ, in every mode but training."""
    modes = [mode for mode in plan.mode if mode != "training"]
    pruned = {method: prune(_copy(dense), method, keep_ratio=ratio) for method in plan.method}
    every = {"dense": dense, **pruned}
    models = {(mode, method): _in_mode(mode, model) for mode in modes for method, model in every.items()}
    if "eager" in modes:
        models["eager", "dense", "explicit"] = _with_attention(dense, "explicit")
        for method, attention in product(pruned, ("fused", "explicit")):
            models["eager", method, attention] = _with_attention(Sliced(pruned[method]), attention)
    calls = {key: lambda model=model: model(images) for key, model in models.items()}

    load = os.getloadavg()[0]
    seconds = interleaved(calls, plan.rounds, plan.warmup, plan.device)
    rows = []
    for mode, method in product(modes, ("dense", *pruned)):
        own = seconds[mode, method]
        row = _row(plan, shared, mode, method, ratio, own, load)
        if method != "dense":
            row["times_dense"] = times(own, seconds[mode, "dense"])
        elif mode == "eager":
            row["times_explicit"] = times(own, seconds["eager", "dense", "explicit"])
        if mode == "eager":
            row["memory_mb"] = peak_memory(calls[mode, method], plan.device) / 1e6
            if method != "dense":
                bounds = {attention: seconds["eager", method, attention] for attention in ("fused", "explicit")}
                row["attention"] = min(bounds, key=lambda attention: bounds[attention].median())
                row["efficiency"] = times(own, bounds[row["attention"]])
        elif "eager" in modes:
            row["times_eager"] = times(own, seconds["eager", method])
        rows.append(row)
    return rows


def _row(plan, shared, mode, method, ratio, seconds, load):
    """What every row says."""
    return {
        **shared, "mode": mode, "method": method, "keep_ratio": 1.0 if method == "dense" else ratio,
        "ms": 1e3 * seconds.median().item(), "images_per_second": shared["batch"] / seconds.median().item(),
        "rounds": plan.rounds, "load": round(load, 2),
    }  # fmt: skip


def _training(plan, dense, images, ratio, shared):
    """Rows of training steps, as `tpbook.train` takes them: loss terms, backward, optimiser. Weights are float32."""
    precision = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[shared["dtype"]]
    AcceleratorState._reset_state()  # an earlier group may have had another precision
    accelerator = Accelerator(mixed_precision=PRECISIONS[precision], cpu=torch.device(plan.device).type == "cpu")
    images, labels = images.float(), torch.randint(dense.num_classes, (len(images),), device=images.device)
    teacher = copy.deepcopy(dense).float().requires_grad_(False)
    calls = {"teacher": functools.partial(train.taught, accelerator, teacher, images)}
    for method in ("dense", *plan.method):
        distils = method in DISTILLING
        recipe = Recipe(
            model=shared["model"], method="" if method == "dense" else method, keep_ratio=ratio, precision=precision,
            teacher="start" if distils else "", token_loss="kl" if method == "dtps" else "mse",
        )  # fmt: skip
        model = train.adapt(recipe, copy.deepcopy(dense).float()).to(images.device).train()
        wrapped, optimizer = accelerator.prepare(model, train.optimizer_of(recipe, model))
        given = (recipe, accelerator, wrapped, model, teacher if distils else None, images, labels)
        calls[method] = functools.partial(_step, given, accelerator, optimizer)

    load = os.getloadavg()[0]
    seconds = interleaved(calls, plan.rounds, plan.warmup, plan.device)
    rows = []
    for method in ("dense", *plan.method):
        own = seconds[method]
        row = _row(plan, shared, "training", method, ratio, own, load)
        if method != "dense":
            row["times_dense"] = times(own, seconds["dense"])
        if method in DISTILLING:
            row["times_parts"] = times(seconds["dense"] + seconds["teacher"], own)
        rows.append(row)
    return rows


def _step(given, accelerator, optimizer):
    accelerator.backward(train.terms_of(*given)["total"])
    optimizer.step()
    optimizer.zero_grad()


def _copy(model):
    """A copy with the same parameters, so that no variant finds its weights colder than another."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def _with_attention(model, attention):
    """A copy whose attention is timm's "fused" or "explicit"."""
    model = _copy(model)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = attention == "fused"
    return model


def _in_mode(mode, model):
    if mode == "eager":
        return model
    return torch.compile(model, fullgraph=True, dynamic=False, mode="reduce-overhead" if mode == "graphs" else None)


def _line(row):
    """A row as it is printed."""
    line = "{model} {image_size} {dtype} batch {batch} {mode} {method:10} ρ {keep_ratio:<4} {ms:8.2f} ms".format(**row)
    for key, name in NAMES.items():
        if key in row:
            line += f"   {name} {said(row[key])}"
    return line


def plot(rows):
    """Speed over keep ratio, one line a method and batch, one panel a dtype and model. → matplotlib Figure."""
    import pandas as pd
    import seaborn as sns

    from . import plots

    plots.style()
    table = pd.DataFrame([row for row in rows if "times_dense" in row])
    table["× dense"] = [ratio[0] for ratio in table.pop("times_dense")]
    table["what"] = table.model.str.cat([table.image_size.astype(str), table.dtype, table["mode"]], sep=" ")
    table = table.rename(columns={"keep_ratio": "keep ratio ρ"})
    grid = sns.relplot(
        table, x="keep ratio ρ", y="× dense", hue="method", palette=plots.COLOURS, style="batch", markers=True,
        kind="line", col="what", col_wrap=2, height=3.2,
    )  # fmt: skip
    grid.set_titles("{col_name}").refline(y=1, color="black", lw=1)
    return grid.figure


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    if any("=" not in pair for pair in arguments):
        sys.exit(__doc__)
    keys = {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in arguments)}
    out = keys.pop("out", None)
    try:
        known = [field.name for field in fields(Plan)]
        for key in keys:
            if key not in known:
                raise ValueError(f"key {key!r} is not known; there are out, {', '.join(known)}")
        if out is not None and Path(out).suffix != ".json":
            raise ValueError(f"out must end in .json, got {out!r}")
        plan = Plan(**keys)
        rows = run(plan)
        if out is not None:
            out = Path(out)
            results.save(out.parent, out.stem, {"plan": asdict(plan), "rows": rows})
            if plan.method:
                plot(rows).savefig(out.with_suffix(".svg"))
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        sys.exit(f"tpbook.bench: {error}")


if __name__ == "__main__":
    main()
