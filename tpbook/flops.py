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
from fvcore.nn.jit_handles import bmm_flop_jit
from timm.layers import get_device_dtype
from torch import nn

from .engine import is_pruned
from .families import family_of
from .families.costs import block_macs  # noqa: F401, which `tpbook.book.cost` takes from here
from .masking import MaskedViT
from .methods.counts import StageCount
from .methods.parts import Place
from .tokens import PADDING
from .tracing import trace


@dataclass(frozen=True)
class Cost:
    """MACs of one image: `total` = `embed` + sum(`by_block`) + `head`. A score predictor counts in its block.

    Not in the total, as in nobody's: `matching`, of comparing the keys of tokens with one another (ToMe).
    """

    total: int
    by_block: tuple[int, ...]
    embed: int
    head: int
    matching: int = 0


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
        image_size: pixels, an int or (height, width); None is the model's own size. Or images (B, C, H, W), prepared as
            the model wants them: each is traced by itself.

    Returns:
        Cost: MACs as ints; of images a list of one each.

    Raises:
        TypeError: the model is of no known family.
        ValueError: the image does not cut into whole patches, or the family has one size; or no images are given, and
            how many tokens are kept depends on them.
    """
    if isinstance(image_size, torch.Tensor):
        model, size = family_of(model).at_size(model, tuple(image_size.shape[-2:]))
        return [_count(model, size, image) for image in image_size.split(1)]
    _check_countable(model)
    return _count(*family_of(model).at_size(model, image_size))


def _count(model, size, image=None):
    family = family_of(model)
    wrapped = _Logits(model)
    modes = {module: module.training for module in wrapped.modules()}
    wrapped.eval()
    try:
        if image is None:
            image = torch.zeros(1, family.channels(model), *size, **get_device_dtype(model))
        flops = FlopCountAnalysis(wrapped, image).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        flops.tracer_warnings("none")
        flops.set_op_handle("aten::scaled_dot_product_attention", sdpa_macs, "aten::einsum", einsum_macs)
        for free in ("layer_norm", "batch_norm", "grid_sampler", "adaptive_avg_pool2d", "upsample_bilinear2d"):
            flops.set_op_handle(f"aten::{free}", lambda *_: 0)
        flops.set_op_handle("aten::baddbmm", lambda inputs, outputs: bmm_flop_jit(inputs[1:3], outputs))
        flops.set_op_handle("aten::_native_multi_head_attention", multihead_macs, "aten::_convolution_mode", patch_macs)
        with torch.no_grad():
            macs = flops.by_module()
    finally:
        for module, mode in modes.items():
            module.training = mode
    names = {module: name for name, module in wrapped.named_modules()}
    inside = family.inside(model)
    segments = family_of(inside).segments(inside, size)
    by_block = {i: _under(macs, names[b]) for segment in segments for i, b in zip(segment.indices, segment.blocks)}
    total, compared = int(macs[""]), 0
    if is_pruned(inside):
        for i, predictor in zip(inside.pruning.at, family_of(inside).predictors(inside)):
            by_block[i] += _under(macs, names[predictor])
        for i, matching in _matching(family_of(inside), inside, segments):
            by_block[i], compared = by_block[i] - matching, compared + matching
    by_block, total = tuple(by_block.values()), total - compared
    embed = sum(_under(macs, names[module]) for module in family.embeddings(model))
    return Cost(total, by_block, embed, total - embed - sum(by_block), compared)


def closed_form(model, image_size=None):
    """The same by arithmetic on token counts and layer widths, without running anything.

    A linear layer costs its weights once a token; attention over T tokens costs 2·T²·C. Of images it runs the model, if
    how many tokens it keeps depends on them.

    Args, Returns, Raises: as `count`; also TypeError for parts whose cost is no such sum, and ValueError for a model
    that is masked in eval mode at a ratio drawn from a range.
    """
    if not isinstance(image_size, torch.Tensor):
        _check_countable(model)
        return _closed_form(*family_of(model).at_size(model, image_size))
    model, size = family_of(model).at_size(model, tuple(image_size.shape[-2:]))
    if not (is_pruned(model) and model.pruning.method.chooses.varies):
        return [_closed_form(model, size)] * len(image_size)
    with torch.no_grad(), trace(model) as t:
        model(image_size)
    kept = torch.stack([(patch != PADDING).sum(dim=1) for patch in t.kept], dim=1).tolist()  # (B, S)
    first = math.prod(t.grid)
    again = model.pruning.method.reduce.rejoins
    entered = ([first] * len(row) if again else [first, *row] for row in kept)
    return [_closed_form(model, size, [StageCount(*c) for c in zip(n, row, row)]) for n, row in zip(entered, kept)]


def _closed_form(model, size, counts=None):
    """`counts`, one `StageCount` a stage, are those of an image; None for those that the model has by itself."""
    family = family_of(model)
    inside, visible = family.inside(model), None
    if isinstance(inside, MaskedViT) and inside.patch_drop.when == "always":
        if isinstance(inside.mask_ratio, tuple):
            raise ValueError(f"model.mask_ratio must be one number, got the range {inside.mask_ratio}: its cost varies")
        visible = inside.patch_drop
    embed, own = family.embed_macs(model, size), family_of(inside)
    segments, by_block = own.segments(inside, size), []
    for segment in segments:
        n, prefix = math.prod(segment.grid), segment.prefix
        n = n if visible is None else visible.visible(n, inside.mask_ratio)
        stages, queries, once, before, rejoins = {}, {}, {}, False, False
        if is_pruned(inside) and (pruning := inside.pruning.within(segment.indices)).at:
            method, here = pruning.method, counts or pruning.counts(n)
            stages, before = dict(zip(pruning.at, here)), method.place is Place.BEFORE
            rejoins = method.reduce.rejoins or method.score.restores
            once = {i: method.score.once(predictor) for i, predictor in zip(inside.pruning.at, own.predictors(inside))}
            heard = {i: here[s:] if method.score.lasting else [here[s]] for i, s in pruning.listeners.items()}
            queries = {i: method.queries for i, several in heard.items() if any(c.kept < c.enter for c in several)}
        for i, block in zip(segment.indices, segment.blocks):
            left = stages[i].leave if i in stages else n
            seen = prefix + (left if before else n)  # tokens that the attention sees
            macs = sum(own.block_macs(block, seen, prefix + left, queries.get(i), segment.grid))
            by_block.append(macs + (method.macs(stages[i], segment.width) if i in stages else 0) + once.get(i, 0))
            n = left
        n = math.prod(segment.grid) if rejoins and stages else n
    head = family.head_macs(model, n)
    compared = sum(matching for _, matching in _matching(own, inside, segments)) if is_pruned(inside) else 0
    return Cost(embed + sum(by_block) + head, tuple(by_block), embed, head, compared)


def _matching(family, model, segments):
    """(block, MACs of comparing its tokens) of each stage of a pruned model that removes any."""
    method = model.pruning.method
    for segment in segments:
        pruning = model.pruning.within(segment.indices)
        for i, count in zip(pruning.at, pruning.counts(math.prod(segment.grid)) if "keys" in method.reads else ()):
            yield i, method.matching(count, segment.prefix, family.head_dim(segment.blocks[i - segment.first]))


def _check_countable(model):
    if is_pruned(model) and model.pruning.method.chooses.varies:
        raise ValueError(
            f"image_size must be images, since how many tokens {model.pruning.name} keeps depends on them: "
            "count(model, images)"
        )


def _under(macs, name):
    """fvcore gives a module it saw no call of no count of its own; its children have theirs."""
    if macs.get(name):
        return int(macs[name])
    return int(sum(v for k, v in macs.items() if k.startswith(f"{name}.") and k.count(".") == name.count(".") + 1))
