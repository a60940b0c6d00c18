"""`export`: a model, pruned or not, as one ONNX file that runs outside PyTorch, its keep ratio still a knob.

One graph serves every ρ: ONNX Runtime gets ρ as an input, the graph computes the token counts from it and gathers that
many tokens. Inputs and outputs, for B images, S stages and N patches (K classes, n_s tokens after stage s)::

    images      (B, C, H, W) float32   normalised by the mean and std of the metadata
    keep_ratio  float32                one ρ or one for each of S stages, of up to four decimals; a pruned model only
    random      (B, S, N) float32      score="random" only: stage s (from 0) scores its n tokens by random[:, s, :n]

    logits      (B, K) float32
    kept_1 …    (B, n_s) int64         as `Trace.kept`, one a stage
    host_1 …    (B, N) int64           as `Trace.host`, one a stage; of methods whose tokens carry others

Counts are those of `token_counts` exactly, in integers: with ρ = r / 10⁴::

    kept = ⌊N·r₁⋯r_s / 10⁴ˢ⌋, ⌈n·r_s / 10⁴⌉ or ⌊n·r_s / 10⁴⌋, at least 1, or half of n where a method cannot go lower

A file for one ρ, one number of tokens to keep, or r to remove, has no input `keep_ratio`, and its counts are constants,
as TensorRT before 8.6 wants those of TopK.

Of tokens with the same score the earlier one goes first, where PyTorch's order among them is the machine's choice; that
and rounding are the only differences.

Chapter: :doc:`/book/explorer`
"""

import copy
import io
import json
import numbers
import os
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from .checks import check_keep, check_keep_ratio, check_name
from .engine import is_pruned
from .families import family_of
from .families.registry import known
from .masking import PatchMask
from .methods.schedule import check_r, schedule
from .mixing import mixed
from .onnx_graph import halve, load_onnx, settle, split
from .onnx_ops import Plain, quiet
from .onnx_plan import Constant, Drawn, Knob, one_more
from .tracing import trace

__all__ = ["export", "split"]

WEIGHTS = ("float32", "float16")
OPSETS = range(16, 21)  # rows are added at equal indices from 16 on, and 20 is the last that torch's exporter takes


def export(model, path, *, keep_ratio=None, keep=None, r=None, opset=17, weights="float32"):
    """Write a model as an ONNX file that holds everything it needs; inputs and outputs are those above.

    The file's metadata has a key "tpbook": JSON with method, score, reduce, at, image_size, patch_size, mean, std (null
    where the model has no `pretrained_cfg`) and the version that wrote it; "classes", where `pretrained_cfg` has their
    names, as that of a model of `tpbook.train.load` has; of a file for one ratio `keep_ratio`, `keep` or `r` too. What
    `seed`, `keep_ratio` and `keep` of the model are set to does not matter, since random draws and ratios are inputs; a
    model whose `r` is set gives a file for it. H and W are the model's own.

    Args:
        model: a timm `VisionTransformer`, `Eva`, `Beit` or `NaFlexVit`, pruned or not, by any method that keeps as many
            tokens of every image (not ATS); it stays as it is, the file is of its eval mode in float32.
        path: where to write, `….onnx`. An older file there is replaced.
        keep_ratio: ρ of a file for it alone, one for all stages or a sequence of one a stage. None makes it an input.
        keep, r: the same by numbers of patch tokens to keep or to remove, as `prune` takes them.
        opset: of ONNX, from 16 to 20.
        weights: "float16" stores large tensors as halves, which the graph casts to float32 before use: half the size.

    Returns:
        Path: the file.

    Raises:
        TypeError: `model` is none of those, or an argument is of a wrong type.
        ValueError: another argument that cannot be used; a model masked with when="always", or inside `tpbook.trace`,
            or of which each image keeps another number; something in the model (a similarity function, say) that ONNX
            has no words for.
        FileNotFoundError: the folder of `path` is not there.
        ImportError: onnx is not installed.
        OSError: the file could not be written. In every case nothing half-written is left.

    Warns:
        UserWarning: `keep_ratio` is so small that a stage would keep no token; it keeps one. Or r is too large.
    """
    family = _check_model(model)
    fixed = _check_ratio(model, {"keep_ratio": keep_ratio, "keep": keep, "r": r})
    if isinstance(opset, bool) or not isinstance(opset, numbers.Integral):
        raise TypeError(f"opset must be an int, got {opset!r}")
    if opset not in OPSETS:
        raise ValueError(f"opset must lie from {OPSETS[0]} to {OPSETS[-1]}, got {opset}")
    check_name("weights", weights, WEIGHTS)
    path = Path(path)
    if path.suffix != ".onnx":
        raise ValueError(f"path must end in .onnx, got {str(path)!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path must lie in a folder that is there, got {str(path)!r}")
    onnx = load_onnx()

    counts = fixed.counts(model._plan.patches) if fixed else []  # warns
    proto = onnx.load_from_string(_traced(model, family, fixed, int(opset)))
    for output, count in zip(proto.graph.output[1:], counts):
        output.type.tensor_type.shape.dim[1].dim_value = count.leave
    for given in proto.graph.input:
        if given.name == "keep_ratio":
            given.type.tensor_type.ClearField("shape")  # any that broadcasts to (S,)
    settle(proto.graph)
    if weights == "float16":
        halve(proto.graph)
    proto.metadata_props.add(key="tpbook", value=json.dumps(_metadata(model, family, fixed), default=float))
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(proto.SerializeToString())
        os.replace(part, path)
    except OSError as error:
        raise OSError(f"{path} could not be written ({error})") from error
    finally:
        part.unlink(missing_ok=True)
    return path


def _check_model(model):
    """Its family."""
    family = next((family for family in known() if family.fits(model)), None)
    if family is None or not family.exported:
        there = ", ".join(sorted(family.name for family in known() if family.exported))
        raise TypeError(f"model must be a {there}, got {type(model).__name__}")
    family = family_of(model)
    if any(isinstance(module, PatchMask) and module.when == "always" for module in model.modules()):
        raise ValueError('model is masked with when="always", which draws at random: tpbook.unmask it first')
    if is_pruned(model) and model.pruning.method.chooses.varies:
        raise ValueError(
            f"model must keep as many tokens of every image, and {model.pruning.name} keeps another number of each:"
            " ONNX has no words for that"
        )
    looked_at = family.norm(model).__dict__.get("_plan")
    if looked_at is not None and looked_at.trace is not None:
        raise ValueError("model must not be inside tpbook.trace")
    return family


def _check_ratio(model, given):
    """The `Pruning` of a file for one ratio, of which `given` says one name and value; None for one with a knob."""
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1:
        (first, one), (second, other), *_ = given.items()
        raise ValueError(f"{first} and {second} must not both be given, got {one!r} and {other!r}")
    if not is_pruned(model):
        for name, value in given.items():
            raise ValueError(f"{name} must be left unset for a model that is not pruned, got {value!r}")
        return None
    if not given:
        return model.pruning if model.pruning.r is not None else None
    stages, ratio = len(model.pruning.at), given.get("keep_ratio")
    return replace(
        model.pruning,
        keep_ratio=None if ratio is None else check_keep_ratio(ratio, stages),
        keep=check_keep(given.get("keep"), family_of(model).patches(model, model.pruning.at)),
        r=check_r(given["r"], stages) if "r" in given else None,
    )


class Exported:
    """Mixed into the class of the copy that is traced, ahead of its own class."""

    def forward(self, images, *given):
        """(B, C, H, W) and the other inputs → logits, S tensors kept, S or no tensors host."""
        with Plain():
            if not is_pruned(self):
                return super().forward(images)
            vars(self._plan).update(zip(self._given, given))
            with trace(self) as t:
                logits = super().forward(images)
        return logits, *t.kept, *t.host


def _traced(model, family, fixed, opset):
    """The graph of the model's float32 copy in eval mode, as a serialised ModelProto."""
    model = copy.deepcopy(model).float().cpu().eval()
    inputs = {"images": torch.zeros(2, family.channels(model), *family.image_size(model))}
    results, axes = ["logits"], {"images": {0: "batch"}, "logits": {0: "batch"}}
    functions = []
    if is_pruned(model):
        plan, method = model._plan, model.pruning.method
        stages, functions = range(1, len(model.pruning.at) + 1), _foreign(method)
        plan.__class__ = Constant if fixed else Knob
        if not fixed:
            inputs["keep_ratio"] = torch.full((len(stages),), 0.5)
        if method.score.drawn:
            inputs["random"], axes["random"] = torch.zeros(2, len(stages), plan.patches), {0: "batch"}
            method = replace(method, score=Drawn(plan))
        if not fixed and hasattr(method.reduce, "similarity"):
            method.reduce.similarity = one_more(method.reduce.similarity)  # of the copy
        plan.pruning = replace(fixed or model.pruning, method=method)
        results += [f"kept_{s}" for s in stages]
        axes |= {f"kept_{s}": {0: "batch"} | ({} if fixed else {1: f"n_{s}"}) for s in stages}
        if method.reduce.hosts:
            results += [f"host_{s}" for s in stages]
            axes |= {f"host_{s}": {0: "batch"} for s in stages}
    model.__dict__["_given"] = list(inputs)[1:]
    model.__class__ = mixed(Exported, type(model))
    file = io.BytesIO()
    try:
        with warnings.catch_warnings(), quiet(), torch.no_grad():
            for category in (torch.jit.TracerWarning, DeprecationWarning):  # those of a user's similarity function stay
                warnings.filterwarnings("ignore", category=category, module=r"(timm|torch|tpbook)\b")
            warnings.filterwarnings("ignore", message="Constant folding")
            torch.onnx.export(
                model, tuple(inputs.values()), file, input_names=list(inputs), output_names=results, dynamic_axes=axes,
                do_constant_folding=False,  # so tensors keep the names of the state dict; runtimes fold as they load
                opset_version=opset, dynamo=False,
            )  # fmt: skip
    except Exception as error:  # the exporter's, and whatever the tracing of a user's function raises
        perhaps = f", perhaps its function {', '.join(functions)}" if functions else ""
        raise ValueError(f"model cannot be exported{perhaps}: {error}") from error
    return file.getvalue()


def _foreign(method):
    """Names of the functions that a user gave to the parts of a method."""
    given = [value for part in (method.score, method.reduce) for value in vars(part).values() if callable(value)]
    ours = f"{__package__}."
    return [repr(getattr(f, "__name__", f)) for f in given if not str(getattr(f, "__module__", "")).startswith(ours)]


def _metadata(model, family, fixed):
    from . import __version__

    pruning, config = getattr(model, "pruning", None), getattr(model, "pretrained_cfg", None) or {}
    method = pruning.method if pruning else None
    mean, std = (config.get(key) for key in ("mean", "std"))
    one = {name: getattr(fixed, name, None) for name in ("keep_ratio", "keep")}
    if names := config.get("label_names"):
        one["classes"] = list(names)
    if fixed and fixed.r is not None:
        one["r"] = schedule(fixed.r, len(fixed.at))  # one a stage
    return {
        "method": pruning.name if pruning else None,
        "score": method.score.name if method else None,
        "reduce": method.reduce.name if method else None,
        "at": list(pruning.at) if pruning else [],
        "image_size": list(family.image_size(model)),
        "patch_size": list(family.patch_size(model)),
        "mean": list(mean) if mean else None,
        "std": list(std) if std else None,
        "tpbook": __version__,
        **{name: value for name, value in one.items() if value is not None},
    }
