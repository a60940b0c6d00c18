"""`export`: a model, pruned or not, as one ONNX file that runs outside PyTorch, its keep ratio still a knob.

One graph serves every ρ: ONNX Runtime gets ρ as an input, the graph computes the token counts from it and gathers that
many tokens. Inputs and outputs, for B images, S stages and N patches (K classes, n_s tokens after stage s)::

    images      (B, C, H, W) float32   normalised by the mean and std of the metadata
    keep_ratio  float32                one ρ or one for each of S stages, of up to four decimals; a pruned model only
    random      (B, S, N) float32      score="random" only: stage s (from 0) scores its n tokens by random[:, s, :n]

    logits      (B, K) float32
    kept_1 …    (B, n_s) int64         as `Trace.kept`, one a stage
    host_1 …    (B, N) int64           as `Trace.host`, one a stage; TPS only

Counts are those of `token_counts` exactly, in integers: with ρ = r / 10⁴::

    kept = ⌊N·r₁⋯r_s / 10⁴ˢ⌋ or ⌈n·r_s / 10⁴⌉, at least 1

Of tokens with the same score the earlier one goes first, where PyTorch's order among them is the machine's choice; that
and rounding are the only differences.

Chapter: :doc:`/book/explorer`
"""

import copy
import io
import json
import os
import warnings
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from timm.models import VisionTransformer

from .engine import PrunedViT, Pruning, Stage, mixed
from .methods import StageCount
from .tps import SIMILARITIES, fuse_guests
from .tracing import trace

WEIGHTS = ("float32", "float16")
OPSET = 17
BASE = 10_000  # a ratio is read as so many ten-thousandths
LARGE = 1024  # bytes from which a tensor counts as weights in `split`; float16 stores those as halves


def export(model, path, *, weights="float32"):
    """Write a model as an ONNX file (opset 17) that holds everything it needs; inputs and outputs are those above.

    The file's metadata has a key "tpbook": JSON with method, score, reduce, at, image_size, patch_size, mean, std (null
    where the model has no `pretrained_cfg`) and the version that wrote it. What `seed` and `keep_ratio` are set to does
    not matter, since random draws and ratios are inputs. H and W are the model's own.

    Args:
        model: a timm `VisionTransformer`, pruned by any method or not; it stays as it is, the file is of its eval mode
            in float32.
        path: where to write, `….onnx`. An older file there is replaced.
        weights: "float16" stores large tensors as halves, which the graph casts to float32 before use: half the size.

    Returns:
        Path: the file.

    Raises:
        TypeError: `model` is no timm VisionTransformer.
        ValueError: another argument that cannot be used; a model masked with when="always", or inside `tpbook.trace`;
            something in the model (a similarity function, say) that ONNX has no words for.
        FileNotFoundError: the folder of `path` is not there.
        ImportError: onnx is not installed.
        OSError: the file could not be written. In every case nothing half-written is left.
    """
    if not isinstance(model, VisionTransformer):
        raise TypeError(f"model must be a timm VisionTransformer, got {type(model).__name__}")
    if getattr(model.patch_drop, "when", None) == "always":
        raise ValueError('model is masked with when="always", which draws at random: tpbook.unmask it first')
    if "_trace" in model.__dict__:
        raise ValueError("model must not be inside tpbook.trace")
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    path = Path(path)
    if path.suffix != ".onnx":
        raise ValueError(f"path must end in .onnx, got {str(path)!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path must lie in a folder that is there, got {str(path)!r}")
    onnx = _onnx()

    proto = onnx.load_from_string(_traced(model))
    for given in proto.graph.input:
        if given.name == "keep_ratio":
            given.type.tensor_type.ClearField("shape")  # any that broadcasts to (S,)
    if weights == "float16":
        _halve(proto.graph, onnx)
    proto.metadata_props.add(key="tpbook", value=json.dumps(_metadata(model)))
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(proto.SerializeToString())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written ({error})") from error
    return path


def split(path):
    """An exported file as two byte strings, so that pages with several models load shared weights once.

    Either order of concatenation is the model again, as protobuf merges messages: ``graph + weights``. `weights` holds
    the tensors of at least 1,024 bytes, by name, and nothing else, so it is the same for every method without
    predictors on the same backbone.

    Args:
        path: a file that `export` wrote.

    Returns:
        (graph, weights): bytes, a `ModelProto` each.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no ONNX model.
        ImportError: onnx is not installed.
    """
    onnx = _onnx()
    try:
        proto = onnx.load(path)
    except FileNotFoundError:
        raise
    except Exception as error:  # protobuf's DecodeError
        raise ValueError(f"{path} is damaged or no ONNX model: {error}") from error
    large = sorted((t for t in proto.graph.initializer if len(t.raw_data) >= LARGE), key=lambda t: t.name)
    small = [t for t in proto.graph.initializer if len(t.raw_data) < LARGE]
    weights = onnx.ModelProto(graph=onnx.GraphProto(initializer=large)).SerializeToString()
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(small)
    return proto.SerializeToString(), weights


def _onnx():
    try:
        import onnx
    except ImportError as error:
        raise ImportError("exporting needs onnx: pip install tpbook[export]") from error
    return onnx


class ExportedViT:
    """Mixed into the class of the copy that is traced, ahead of `PrunedViT` or its timm class."""

    def forward(self, images, keep_ratio=None, random=None):
        """Images (B, C, H, W), keep_ratio (S,) and random (B, S, N) → logits, S tensors kept, S or no tensors host."""
        if keep_ratio is not None:
            ratios = keep_ratio * torch.ones(len(self.stages))  # (S,)
            given = {f.name: getattr(self._pruning, f.name) for f in fields(Pruning) if f.init}
            self._pruning = _Pruning(**{**given, "keep_ratio": ratios})
            for s, stage in enumerate(self.stages):
                stage.draws = None if random is None else random[:, s]  # (B, N)
        with trace(self) as t:
            logits = super().forward(images)
        return logits, *t.kept, *t.host


@dataclass(frozen=True)
class _Pruning(Pruning):
    """A `Pruning` whose keep_ratio is a tensor (S,)."""

    def counts(self, patches):
        return _counts(patches, self.keep_ratio, self.method)


class _Stage(Stage):
    """A `Stage` whose `kept` is a tensor: what is traced must hold for every ratio, so it never takes a short cut."""

    def draw(self, batch, n, device, generator):
        return self.draws[:, :n]

    def keeps_all(self, kept, n):
        return False

    def choose(self, scores, kept):
        order = scores.argsort(dim=1, descending=not self.invert)  # (B, n); ONNX too puts the earlier token first
        return torch.where(kept < scores.shape[1], order, torch.arange(scores.shape[1]))

    def squeeze(self, kept, pruned):
        guests = torch.cat([pruned, kept[:, :1]], dim=1)  # one too many: ONNX Runtime's ReduceMax wants one at least
        c, host = (best[:, :-1] for best in self.similarity(guests, kept).max(dim=-1))  # (B, p) each
        return fuse_guests(kept, pruned, c.float().exp(), host), host


def _counts(patches, ratios, method):
    """`token_counts` in integer tensors: N = `patches` and ratios (S,), or (S, R) for R knobs at once.

    ⌊N·ρ₁⋯ρ_s⌋ needs more digits than an int64 has, so N·ρ₁⋯ρ_s is a list of digits in base 10⁴, the whole part first.
    """
    parts = (ratios * BASE).round().clamp(0, BASE).long()  # r, ten-thousandths
    counts, n, share = [], patches, [patches]
    for s in range(len(ratios)):
        if method.count == "floor":
            carry, digits = 0, []
            for digit in reversed(share):
                carry = carry + digit * parts[s]
                whole = carry.div(BASE, rounding_mode="trunc")
                digits.append(carry - whole * BASE)
                carry = whole
            share = [carry, *reversed(digits)]
            kept = carry.clamp(min=1)
        else:
            kept = (n * parts[s] + (BASE - 1)).div(BASE, rounding_mode="trunc").clamp(min=1)
        leave = kept + (kept < n).long() if method.reduce == "fuse" else kept
        counts.append(StageCount(n, kept, leave))
        n = leave
    return counts


def _traced(model):
    """The graph of the model's float32 copy in eval mode, as a serialised ModelProto."""
    model = copy.deepcopy(model).float().cpu().eval()
    model.grad_checkpointing = False
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # the same arithmetic in plain operations
    names, given = ["images"], [torch.zeros(2, model.in_chans, *model.patch_embed.img_size)]
    results, axes = ["logits"], {"images": {0: "batch"}, "logits": {0: "batch"}}
    similarity = ""
    if isinstance(model, PrunedViT):
        method, stages = model.pruning.method, range(1, len(model.stages) + 1)
        for stage in model.stages:
            stage.__class__ = _Stage
        names.append("keep_ratio")
        given.append(torch.full((len(stages),), 0.5))
        if method.score == "random":
            names.append("random")
            given.append(torch.rand(2, len(stages), model.patch_embed.num_patches))
            axes["random"] = {0: "batch"}
        results += [f"kept_{s}" for s in stages]
        axes |= {f"kept_{s}": {0: "batch", 1: f"n_{s}"} for s in stages}
        if method.reduce == "squeeze":
            results += [f"host_{s}" for s in stages]
            axes |= {f"host_{s}": {0: "batch"} for s in stages}
            function = model.stages[0].similarity
            if function not in SIMILARITIES.values():
                similarity = f", perhaps its similarity function {getattr(function, '__name__', function)!r}"
    model.__class__ = mixed(ExportedViT, type(model))
    file = io.BytesIO()
    try:
        with warnings.catch_warnings():
            for category in (torch.jit.TracerWarning, DeprecationWarning):  # those of a user's similarity function stay
                warnings.filterwarnings("ignore", category=category, module=r"(timm|torch|tpbook)\b")
            torch.onnx.register_custom_op_symbolic("aten::index_add", _index_add, OPSET)
            torch.onnx.export(
                model, tuple(given), file, input_names=names, output_names=results, dynamic_axes=axes,
                do_constant_folding=False,  # so tensors keep the names of the state dict; runtimes fold as they load
                opset_version=OPSET, dynamo=False,
            )  # fmt: skip
    except Exception as error:  # the exporter's, and whatever the tracing of a user's function raises
        raise ValueError(f"model cannot be exported{similarity}: {error}") from error
    return file.getvalue()


def _index_add(graph, x, dim, index, source, alpha):
    """`x.index_add(0, index, source)` in ONNX; PyTorch's own translation forgets all but one of equal indices."""
    one = graph.op("Constant", value_t=torch.tensor([1]))
    return graph.op("ScatterND", x, graph.op("Unsqueeze", index, one), source, reduction_s="add")


def _halve(graph, onnx):
    """Store the large float32 tensors of a graph as float16, a Cast behind each."""
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or len(tensor.raw_data) < LARGE:
            continue
        with np.errstate(over="ignore"):
            half = onnx.numpy_helper.to_array(tensor).astype(np.float16)
        if not np.isfinite(half).all():
            raise ValueError(f"weights='float16' cannot hold {tensor.name}, which has values beyond 65504")
        tensor.CopyFrom(onnx.numpy_helper.from_array(half, tensor.name))
        casts.append(onnx.helper.make_node("Cast", [tensor.name], [f"{tensor.name}.float"], to=onnx.TensorProto.FLOAT))
    single = {cast.input[0]: cast.output[0] for cast in casts}
    for node in graph.node:
        node.input[:] = [single.get(name, name) for name in node.input]
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _metadata(model):
    from . import __version__

    pruning, config = getattr(model, "pruning", None), getattr(model, "pretrained_cfg", None) or {}
    method = pruning.method if pruning else None
    mean, std = (config.get(key) for key in ("mean", "std"))
    return {
        "method": pruning.name if pruning else None,
        "score": method.score if method else None,
        "reduce": method.reduce if method else None,
        "at": list(pruning.at) if pruning else [],
        "image_size": list(model.patch_embed.img_size),
        "patch_size": list(model.patch_embed.patch_size),
        "mean": list(mean) if mean else None,
        "std": list(std) if std else None,
        "tpbook": __version__,
    }
