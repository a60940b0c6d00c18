"""What a model costs, counted twice: traced by fvcore, and by arithmetic alone.

The unit is the multiply-accumulate (MAC), which the papers print as "GFLOPs". Matrix products and convolutions
count; norms, softmax, activations, sums and sorting do not (fvcore counts LayerNorm too, 0.2 % of DeiT-S).
Both functions answer for eval mode, where the tokens are really gone, and leave the model's mode as it is.

Chapter: :doc:`/book/where-the-cost-is`
"""

from copy import deepcopy
from dataclasses import dataclass

import torch
from fvcore.nn import FlopCountAnalysis
from timm.layers import AttentionPoolLatent, PatchEmbed, get_device_dtype
from timm.models import VisionTransformer
from timm.models.vision_transformer import Block
from torch import nn

from .engine import PrunedViT
from .masking import MaskedViT


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


def count(model, image_size=None):
    """MACs by fvcore's trace of one eval-mode forward, fused attention counted.

    Args:
        model: a timm `VisionTransformer`, pruned or not.
        image_size: pixels, an int or (height, width); None is the model's own size.

    Returns:
        Cost: MACs as ints.

    Raises:
        TypeError: the model is no timm VisionTransformer.
        ValueError: the image does not cut into whole patches.
    """
    model, (height, width) = _at_size(model, image_size)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        image = torch.zeros(1, model.in_chans, height, width, **get_device_dtype(model))
        flops = FlopCountAnalysis(model, image).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        flops.tracer_warnings("none")
        flops.set_op_handle("aten::scaled_dot_product_attention", sdpa_macs, "aten::layer_norm", lambda *_: 0)
        with torch.no_grad():
            macs = flops.by_module()
    finally:
        for module, mode in modes.items():
            module.training = mode
    by_block = [_under(macs, f"blocks.{i}") for i in range(len(model.blocks))]
    if isinstance(model, PrunedViT):
        for s, i in enumerate(model.pruning.at):
            by_block[i] += _under(macs, f"stages.{s}") + _under(macs, f"score_predictor.{s}")
    total, embed = int(macs[""]), int(macs["patch_embed"])
    return Cost(total, tuple(by_block), embed, total - embed - sum(by_block))


def closed_form(model, image_size=None):
    """The same by arithmetic on token counts and layer widths, without running anything.

    A linear layer costs its weights once a token; attention over T tokens costs 2·T²·C.

    Args, Returns, Raises: as `count`; also TypeError for blocks or a patch embedding other than timm's plain ones, and
    ValueError for a model that is masked in eval mode at a ratio drawn from a range.
    """
    model, (height, width) = _at_size(model, image_size)
    if type(model.patch_embed) is not PatchEmbed or any(not isinstance(block, Block) for block in model.blocks):
        raise TypeError(f"model must have timm's PatchEmbed and Blocks, got {type(model.patch_embed).__name__}")
    rows, columns = model.patch_embed.dynamic_feat_size((height, width))
    n, prefix = rows * columns, model.num_prefix_tokens
    embed = n * model.patch_embed.proj.weight.numel()
    if isinstance(model, MaskedViT) and model.patch_drop.when == "always":
        if isinstance(model.mask_ratio, tuple):
            raise ValueError(f"model.mask_ratio must be one number, got the range {model.mask_ratio}: its cost varies")
        n = model.patch_drop.visible(n, model.mask_ratio)

    stages = {}
    if isinstance(model, PrunedViT):
        stages = dict(zip(model.pruning.at, model.pruning.counts(n)))
    by_block = []
    for i, block in enumerate(model.blocks):
        tokens, macs = prefix + n, 0  # tokens that the attention sees, and that the MLP sees
        if i in stages:
            macs = _stage(model, i, stages[i], prefix)
            n = stages[i].leave
            if model.pruning.method.place == "before":
                tokens = prefix + n
        attention = tokens * _linear(block.attn) + 2 * tokens**2 * block.attn.num_heads * block.attn.head_dim
        by_block.append(macs + attention + (prefix + n) * _linear(block.mlp))

    head = sum(_linear(getattr(model, name)) for name in ("head", "head_dist") if hasattr(model, name))
    if model.attn_pool is not None:
        head += _pool(model.attn_pool, n + prefix * model.pool_include_prefix)
    return Cost(embed + sum(by_block) + head, tuple(by_block), embed, head)


def _stage(model, block, count, prefix):
    """Scoring and reducing at one stage."""
    method, dim, macs = model.pruning.method, model.embed_dim, 0
    pruned = count.enter - count.kept
    if not pruned:
        return 0
    if method.score == "predictor":
        macs += count.enter * _linear(model.score_predictor[model.pruning.at.index(block)])
    if model.pruning.attends:  # one row of q·Kᵀ
        attn = model.blocks[block].attn
        macs += (prefix + count.enter) * attn.num_heads * attn.head_dim
    if method.reduce == "fuse":
        macs += pruned * dim
    if method.reduce == "squeeze":  # the similarity of every pair
        macs += pruned * count.kept * dim
    return macs


def _pool(pool, n):
    if not isinstance(pool, AttentionPoolLatent):
        raise TypeError(f"attn_pool must be timm's AttentionPoolLatent, got {type(pool).__name__}")
    once = sum(_linear(layer) for layer in (pool.q, pool.proj, pool.mlp) if layer is not None)
    return pool.latent_len * (once + 2 * n * pool.num_heads * pool.head_dim) + n * _linear(pool.kv)


def _linear(module):
    """MACs of one token through every linear layer in a module."""
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


def _under(macs, name):
    """fvcore gives a module it saw no call of no count of its own; its children have theirs."""
    if macs.get(name):
        return int(macs[name])
    return int(sum(v for k, v in macs.items() if k.startswith(f"{name}.") and k.count(".") == name.count(".") + 1))


def _at_size(model, image_size):
    """The model at that input size (a resized copy where the model cannot take it as it is), and the size."""
    if not isinstance(model, VisionTransformer):
        raise TypeError(f"model must be a timm VisionTransformer, got {type(model).__name__}")
    own = tuple(model.patch_embed.img_size)
    if image_size is None:
        return model, own
    size = tuple(image_size) if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    patch = model.patch_embed.patch_size
    if len(size) != 2 or any(not isinstance(s, int) or s <= 0 or s % p for s, p in zip(size, patch)):
        raise ValueError(f"image_size must be one or two multiples of the patch size {patch}, got {image_size!r}")
    if size != own and not model.dynamic_img_size:
        model = deepcopy(model)
        model.set_input_size(size)
    return model, size
