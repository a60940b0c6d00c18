"""What a model costs, counted twice: traced by fvcore, and by arithmetic alone.

The unit is the multiply-accumulate (MAC), which the papers print as "GFLOPs". Matrix products and convolutions
count; norms, softmax, activations, sums and sorting do not (fvcore counts LayerNorm too, 0.2 % of DeiT-S).
Both functions answer for eval mode, where the tokens are really gone, and leave the model's mode as it is.

Chapter: :doc:`/book/where-the-cost-is`
"""

import math
from dataclasses import dataclass

import torch
from fvcore.nn import FlopCountAnalysis
from timm.layers import get_device_dtype
from torch import nn

from .engine import is_pruned
from .families import family_of
from .families.costs import block_macs  # noqa: F401, which `tpbook.book.cost` takes from here
from .masking import MaskedViT
from .methods.parts import Place


@dataclass(frozen=True)
class Cost:
    """MACs of one image: `total` = `embed` + sum(`by_block`) + `head`. A score predictor counts in its block."""

    total: int
    by_block: tuple[int, ...]
    embed: int
    head: int


def sdpa_macs(inputs, outputs):
    """fvcore handle for fused attention: QKᵀ and AV, each B·H·n·m·d; fvcore has none and counts zero."""
    (b, h, n, d), (_, _, m, _), (*_, dv) = (v.type().sizes() for v in inputs[:3])
    return b * h * n * m * (d + dv)


def multihead_macs(inputs, outputs):
    """fvcore handle for `nn.MultiheadAttention`'s own kernel: q, k, v and the projection, QKᵀ and AV."""
    b, n, c = inputs[0].type().sizes()
    return b * n * c * (4 * c + 2 * n)


def patch_macs(inputs, outputs):
    """fvcore handle for a convolution that names its padding: every weight, at every place of the output."""
    weight, (b, _, *sides) = inputs[1].type().sizes(), outputs[0].type().sizes()
    return b * math.prod(weight) * math.prod(sides)


def einsum_macs(inputs, outputs):
    """fvcore handle for a product of two, every index once; fvcore's own reads NumPy's estimate of four digits."""
    terms = inputs[0].toIValue().replace(" ", "").split("->")[0].split(",")
    shapes = [value.type().sizes() for value in inputs[1].node().inputs()]
    return math.prod({index: n for term, shape in zip(terms, shapes) for index, n in zip(term, shape)}.values())


class _Logits(nn.Module):
    """What fvcore traces: images to one tensor, whatever the library calls its outputs."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        out = self.model(images)
        if isinstance(out, torch.Tensor):
            return out
        return [value for value in (out.values() if hasattr(out, "values") else out) if isinstance(value, torch.Tensor)]


def count(model, image_size=None):
    """MACs by fvcore's trace of one eval-mode forward, fused attention counted.

    Args:
        model: a vision transformer of a known family, pruned or not.
        image_size: pixels, an int or (height, width); None is the model's own size.

    Returns:
        Cost: MACs as ints.

    Raises:
        TypeError: the model is of no known family.
        ValueError: the image does not cut into whole patches, or the family has one size.
    """
    family = family_of(model)
    model, (height, width) = family.at_size(model, image_size)
    wrapped = _Logits(model)
    modes = {module: module.training for module in wrapped.modules()}
    wrapped.eval()
    try:
        image = torch.zeros(1, family.channels(model), height, width, **get_device_dtype(model))
        flops = FlopCountAnalysis(wrapped, image).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        flops.tracer_warnings("none")
        flops.set_op_handle("aten::scaled_dot_product_attention", sdpa_macs, "aten::einsum", einsum_macs)
        for free in ("layer_norm", "batch_norm", "grid_sampler", "adaptive_avg_pool2d", "upsample_bilinear2d"):
            flops.set_op_handle(f"aten::{free}", lambda *_: 0)
        flops.set_op_handle("aten::_native_multi_head_attention", multihead_macs, "aten::_convolution_mode", patch_macs)
        with torch.no_grad():
            macs = flops.by_module()
    finally:
        for module, mode in modes.items():
            module.training = mode
    names = {module: name for name, module in wrapped.named_modules()}
    inside = family.inside(model)
    segments = family_of(inside).segments(inside)
    by_block = {i: _under(macs, names[b]) for segment in segments for i, b in zip(segment.indices, segment.blocks)}
    if is_pruned(inside):
        for i, predictor in zip(inside.pruning.at, family_of(inside).predictors(inside)):
            by_block[i] += _under(macs, names[predictor])
    by_block = tuple(by_block.values())
    total, embed = int(macs[""]), sum(_under(macs, names[module]) for module in family.embeddings(model))
    return Cost(total, by_block, embed, total - embed - sum(by_block))


def closed_form(model, image_size=None):
    """The same by arithmetic on token counts and layer widths, without running anything.

    A linear layer costs its weights once a token; attention over T tokens costs 2·T²·C.

    Args, Returns, Raises: as `count`; also TypeError for parts whose cost is no such sum, and ValueError for a model
    that is masked in eval mode at a ratio drawn from a range.
    """
    family = family_of(model)
    model, size = family.at_size(model, image_size)
    inside, visible = family.inside(model), None
    if isinstance(inside, MaskedViT) and inside.patch_drop.when == "always":
        if isinstance(inside.mask_ratio, tuple):
            raise ValueError(f"model.mask_ratio must be one number, got the range {inside.mask_ratio}: its cost varies")
        visible = inside.patch_drop
    embed, own = family.embed_macs(model, size), family_of(inside)
    by_block = []
    for segment in own.segments(inside, size):
        n, prefix = math.prod(segment.grid), segment.prefix
        n = n if visible is None else visible.visible(n, inside.mask_ratio)
        stages, queries, before = {}, {}, False
        if is_pruned(inside) and (pruning := inside.pruning.within(segment.indices)).at:
            method, counts = pruning.method, pruning.counts(n)
            stages, before = dict(zip(pruning.at, counts)), method.place is Place.BEFORE
            queries = {i: method.queries for i, s in pruning.listeners.items() if counts[s].kept < counts[s].enter}
        for i, block in zip(segment.indices, segment.blocks):
            left = stages[i].leave if i in stages else n
            seen = prefix + (left if before else n)  # tokens that the attention sees
            macs = sum(own.block_macs(block, seen, prefix + left, queries.get(i), segment.grid))
            by_block.append(macs + (method.macs(stages[i], segment.width) if i in stages else 0))
            n = left
    head = family.head_macs(model, n)
    return Cost(embed + sum(by_block) + head, tuple(by_block), embed, head)


def _under(macs, name):
    """fvcore gives a module it saw no call of no count of its own; its children have theirs."""
    if macs.get(name):
        return int(macs[name])
    return int(sum(v for k, v in macs.items() if k.startswith(f"{name}.") and k.count(".") == name.count(".") + 1))
