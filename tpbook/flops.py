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
from .families.family import linear_macs
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
        flops.set_op_handle("aten::scaled_dot_product_attention", sdpa_macs, "aten::layer_norm", lambda *_: 0)
        flops.set_op_handle("aten::_native_multi_head_attention", multihead_macs, "aten::_convolution_mode", patch_macs)
        with torch.no_grad():
            macs = flops.by_module()
    finally:
        for module, mode in modes.items():
            module.training = mode
    names = {module: name for name, module in wrapped.named_modules()}
    by_block = [_under(macs, names[block]) for block in family.blocks(model)]
    inside = family.inside(model)
    if is_pruned(inside) and hasattr(inside, "score_predictor"):
        for i, predictor in zip(inside.pruning.at, inside.score_predictor):
            by_block[i] += _under(macs, names[predictor])
    total, embed = int(macs[""]), _under(macs, names[family.embedding(model)])
    return Cost(total, tuple(by_block), embed, total - embed - sum(by_block))


def closed_form(model, image_size=None):
    """The same by arithmetic on token counts and layer widths, without running anything.

    A linear layer costs its weights once a token; attention over T tokens costs 2·T²·C.

    Args, Returns, Raises: as `count`; also TypeError for parts whose cost is no such sum, and ValueError for a model
    that is masked in eval mode at a ratio drawn from a range.
    """
    family = family_of(model)
    model, size = family.at_size(model, image_size)
    rows, columns = (side // patch for side, patch in zip(size, family.patch_size(model)))
    n, prefix = rows * columns, family.prefix(model)
    embed = n * family.patch_macs(model)
    inside = family.inside(model)
    if isinstance(inside, MaskedViT) and inside.patch_drop.when == "always":
        if isinstance(inside.mask_ratio, tuple):
            raise ValueError(f"model.mask_ratio must be one number, got the range {inside.mask_ratio}: its cost varies")
        n = inside.patch_drop.visible(n, inside.mask_ratio)

    stages, queries, before = {}, {}, False
    if is_pruned(model):
        method, counts = model.pruning.method, model.pruning.counts(n)
        stages, before = dict(zip(model.pruning.at, counts)), method.place is Place.BEFORE
        queries = {i: method.queries for i, s in model.pruning.listeners.items() if counts[s].kept < counts[s].enter}
    by_block = []
    own = family_of(inside)
    for i, block in enumerate(family.blocks(model)):
        attention, width = own.attention(block)
        left = stages[i].leave if i in stages else n
        seen = prefix + (left if before else n)  # tokens that the attention sees
        linear = linear_macs(attention), linear_macs(own.mlp(block))
        macs = sum(block_macs(seen, prefix + left, queries.get(i), linear[0], width, linear[1]))
        by_block.append(macs + (method.macs(stages[i], family.width(model)) if i in stages else 0))
        n = left
    head = family.head_macs(model, n)
    return Cost(embed + sum(by_block) + head, tuple(by_block), embed, head)


def block_macs(seen, left, queries, attention, width, mlp):
    """MACs of a block, by kind. Plain arithmetic: `tpbook.book.cost` hands it symbols.

    Args:
        seen, left: tokens that its attention sees and that its MLP gets, prefix tokens among them.
        queries: whose rows of QKᵀ a method reads besides: "class", "all" or None.
        attention, mlp: MACs of one token through the linear layers of each.
        width: of all heads together.

    Returns:
        Linear layers; QKᵀ and AV; the rows.
    """
    rows = {"class": 1, "all": seen, None: 0}[queries]
    return seen * attention + left * mlp, 2 * seen * seen * width, rows * seen * width


def _under(macs, name):
    """fvcore gives a module it saw no call of no count of its own; its children have theirs."""
    if macs.get(name):
        return int(macs[name])
    return int(sum(v for k, v in macs.items() if k.startswith(f"{name}.") and k.count(".") == name.count(".") + 1))
