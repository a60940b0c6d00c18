"""What takes turns, and the rows that come of it.

Chapter: :doc:`/book/speed`
"""

import copy
import functools
import os
from dataclasses import replace
from itertools import product

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from .. import train
from ..engine import prune
from ..methods import METHODS
from ..training.recipes import PRECISIONS, Recipe
from .bound import copy_of, sliced
from .clock import interleaved, peak_memory, times
from .operators import a_stage


@torch.inference_mode()
def forwards(plan, dense, images, ratio, shared):
    """Rows of what takes turns: the dense model and every method at one ρ, in every mode but training."""
    modes = [mode for mode in plan.mode if mode != "training"]
    bounded = [mode for mode in modes if mode in ("eager", "captured")]
    pruned = {method: prune(copy_of(dense), method, keep_ratio=ratio) for method in plan.method}
    every = {"dense": dense, **pruned}
    calls = {(mode, method): _call(mode, model, images) for mode in modes for method, model in every.items()}
    attention = {}  # (mode, method, "pruned" or "bound") → the one that is faster for it
    for mode, (method, model) in product(bounded, every.items()):
        if method == "dense":
            calls[mode, method, "explicit"] = _with(("explicit",), mode, model, images)["explicit"]
            continue
        parts = model.pruning.method
        others = () if parts.reads or parts.score.switches else ("explicit",)  # which hands on its logits alone
        ways = {
            "pruned": {"fused": calls[mode, method], **_with(others, mode, model, images)},
            "bound": _with(("fused", "explicit"), mode, sliced(model), images),
        }
        for what, found in ways.items():
            attention[mode, method, what] = how = _fastest(found, plan.device)
            if found[how] is not calls[mode, method]:
                calls[mode, method, what] = found[how]

    compiling = {key: call for key, call in calls.items() if key[0] in ("compiled", "graphs")}
    first = interleaved(compiling, rounds=1, warmup=0, device=plan.device)
    load = os.getloadavg()[0]
    seconds = interleaved(calls, plan.rounds, plan.warmup, plan.device)
    rows = []
    for mode, method in product(modes, ("dense", *pruned)):
        own = seconds[mode, method]
        row = _row(plan, shared, mode, method, ratio, own, load)
        if (mode, method) in first:
            row["compile_seconds"] = first[mode, method].item()
        if method != "dense":
            row["times_dense"] = times(own, seconds[mode, "dense"])
        elif mode in bounded:
            row["times_explicit"] = times(own, seconds[mode, "dense", "explicit"])
        if mode in bounded and method != "dense":
            row["attention"] = {what: attention[mode, method, what] for what in ("pruned", "bound")}
            row["efficiency"] = times(seconds.get((mode, method, "pruned"), own), seconds[mode, method, "bound"])
        if mode == "eager":
            row["memory_mb"] = peak_memory(calls[mode, method], plan.device) / 1e6
            if method != "dense":
                row |= a_stage(pruned[method], images)
        elif "eager" in modes:
            row["times_eager"] = times(own, seconds["eager", method])
        rows.append(row)
    return rows


def _fastest(calls, device):
    """The name of the call that takes least time, by a few rounds in turn."""
    seconds = interleaved(calls, rounds=5, warmup=1, device=device)
    return min(calls, key=lambda name: seconds[name].median())


def _row(plan, shared, mode, method, ratio, seconds, load):
    """What every row says."""
    return {
        **shared, "mode": mode, "method": method, "keep_ratio": 1.0 if method == "dense" else ratio,
        "ms": 1e3 * seconds.median().item(), "images_per_second": shared["batch"] / seconds.median().item(),
        "rounds": plan.rounds, "load": round(load, 2),
    }  # fmt: skip


def training_steps(plan, dense, images, ratio, shared):
    """Rows of training steps, as `tpbook.train` takes them: loss terms, backward, optimiser. Weights are float32."""
    precision = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[shared["dtype"]]
    AcceleratorState._reset_state()  # an earlier group may have had another precision
    on_cpu = torch.device(plan.device).type == "cpu"  # models stay where they are: Accelerate knows no "cuda:1"
    accelerator = Accelerator(mixed_precision=PRECISIONS[precision], cpu=on_cpu, device_placement=False)
    images, labels = images.float(), torch.randint(dense.num_classes, (len(images),), device=images.device)
    teacher = copy.deepcopy(dense).float().requires_grad_(False)
    calls = {"teacher": functools.partial(train.taught, accelerator, teacher, images)}
    recipes = {method: _recipe(method, ratio, shared["model"], precision) for method in ("dense", *plan.method)}
    for method, recipe in recipes.items():
        model = train.adapt(recipe, copy.deepcopy(dense).float()).to(images.device).train()
        wrapped, optimizer = accelerator.prepare(model, train.optimizer_of(recipe, model))
        given = (recipe, accelerator, wrapped, model, teacher if recipe.teacher else None, images, labels)
        calls[method] = functools.partial(_step, given, accelerator, optimizer)

    load = os.getloadavg()[0]
    seconds = interleaved(calls, plan.rounds, plan.warmup, plan.device)
    rows = []
    for method, recipe in recipes.items():
        own = seconds[method]
        row = _row(plan, shared, "training", method, ratio, own, load)
        if method != "dense":
            row["times_dense"] = times(own, seconds["dense"])
        if recipe.teacher:
            row["times_parts"] = times(seconds["dense"] + seconds["teacher"], own)
        rows.append(row)
    return rows


def _recipe(method, ratio, model, precision):
    """What trains the dense model, a method at ρ, or by the name "masked" a model of whose patches ρ are visible."""
    recipe = Recipe(model=model, precision=precision)
    if method == "dense":
        return recipe
    if method == "masked":
        return replace(recipe, mask_ratio=round(1 - ratio, 6))
    parts = METHODS[method]
    return replace(
        recipe, method=method, keep_ratio=ratio, teacher="start" if parts.distils else "",
        token_loss=parts.reduce.token_loss,
    )  # fmt: skip


def _step(given, accelerator, optimizer):
    accelerator.backward(train.terms_of(*given)["total"])
    optimizer.step()
    optimizer.zero_grad()


def _with(attentions, mode, model, images):
    """"fused" or "explicit", timm's attention → a forward in one of the modes of a copy of the model that has it."""
    calls = {}
    for attention in attentions:
        variant = copy_of(model)
        for module in variant.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = attention == "fused"
        calls[attention] = _call(mode, variant, images)
    return calls


def _call(mode, model, images):
    """A forward in one of the modes, a function without arguments."""
    if mode == "captured":
        return _captured(model, images)
    if mode != "eager":
        kind = "reduce-overhead" if mode == "graphs" else None
        model = torch.compile(model, fullgraph=True, dynamic=False, mode=kind)
    return lambda: model(images)


def _captured(model, images):
    """The kernels of an eager forward, recorded once in a CUDA graph; played, no Python and no dispatcher runs."""
    aside = torch.cuda.Stream(images.device)
    aside.wait_stream(torch.cuda.current_stream(images.device))
    with torch.cuda.stream(aside):  # what is made at a first call may not be made in a recording
        for _ in range(3):
            model(images)
    torch.cuda.current_stream(images.device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graph.out = model(images)  # stays, as long as the graph is played
    return graph.replay
