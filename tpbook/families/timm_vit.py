"""timm's `VisionTransformer`: DeiT, DeiT-III, AugReg, CLIP, MAE, DINO, DINOv2, SigLIP and 200 more with plain blocks.

    x ← x + drop_path1(ls1(attn(norm1(x))))
    x ← x + drop_path2(ls2(mlp(norm2(x))))
"""

from copy import deepcopy

import torch.nn.functional as F
from timm.layers import Attention, AttentionPoolLatent, PatchEmbed
from timm.models import VisionTransformer
from timm.models.vision_transformer import Block
from torch import nn

from ..keep_mask import HIDDEN
from ..pruned import PrunedModel
from ..tokens import Tokens
from .costs import linear_macs
from .family import Family


class PrunedTimm(PrunedModel):
    """Mixed into the class of a pruned timm model: what of timm's calls has to know of removed tokens."""

    def forward_features(self, images, attn_mask=None, is_causal=False, **kwargs):
        """timm's `forward_features` with tokens removed: (B, in_chans, H, W) → (B, P + n, C).

        Of a model that pools its patches `Tokens`, while a learned method trains, where tokens merged, and where images
        keep different numbers: `forward_head` reads from them how much each counts.

        Raises:
            ValueError: `attn_mask` or `is_causal` is given (a mask over tokens that get removed has no meaning), or
                timm's patch dropout is on (it does not say which patches are left).
        """
        if attn_mask is not None or is_causal:
            raise ValueError("attn_mask and is_causal must be left unset on a pruned model: its tokens get removed")
        dropout = getattr(self, "patch_drop", None)
        if self.training and getattr(dropout, "prob", 0) > 0:
            raise ValueError(
                f"patch_drop_rate must be 0 while a pruned model trains, got {dropout.prob}: use tpbook.mask"
            )
        x = super().forward_features(images, **kwargs)
        return x.x if isinstance(x, Tokens) and self.global_pool in ("token", "") else x

    def forward_intermediates(self, *args, **kwargs):
        """Refused: tokens that were removed leave no feature map.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("a pruned model has no feature maps: use tpbook.trace, or tpbook.unprune it first")


class PrunedViT(PrunedTimm):
    """The same of a `VisionTransformer`, which has a method that pools."""

    def pool(self, x, pool_type=None):
        """timm's `pool`; tokens enter it by their weight (`pool_kept`)."""
        if not isinstance(x, Tokens):
            return super().pool(x, pool_type)
        pool_type = self.global_pool if pool_type is None else pool_type
        return pool_kept(x, pool_type, self.pool_include_prefix, self.attn_pool)


def pool_kept(tokens, pool_type, include_prefix=False, attn_pool=None):
    """A pool that tokens enter by their weight: not at all where D = 0, as often as the patches they stand for.

    Args:
        tokens: `Tokens`, x (B, P + n, C), with weights (B, n).
        pool_type: "token", "avg", "max", "avgmax", or "" for none.
        include_prefix: whether the first P tokens enter it.
        attn_pool: a module that pools by attention and takes an `attn_mask`, whatever the `pool_type`; or None.

    Returns:
        (B, C).
    """
    x, keep = tokens.x, tokens.weight
    prefix = x.shape[1] - keep.shape[1]
    if attn_pool is None and pool_type in ("token", ""):
        return x[:, 0] if pool_type else x
    if include_prefix:
        keep = F.pad(keep, (prefix, 0), value=1.0)  # (B, P + n)
    else:
        x = x[:, prefix:]
    if attn_pool is not None:
        return attn_pool(x, attn_mask=(keep.float() + HIDDEN).log().to(x.dtype)[:, None, None, :])
    keep = keep.unsqueeze(-1).to(x.dtype)
    mean = (x * keep).sum(dim=1) / keep.sum(dim=1)
    peak = x.masked_fill(keep < 0.5, float("-inf")).amax(dim=1)
    return {"avg": mean, "max": peak, "avgmax": 0.5 * (mean + peak)}[pool_type]


class TimmViT(Family):
    """Models of attention → MLP blocks, whose own `Block.forward` is what is above."""

    name, mixin, exported = "timm VisionTransformer", PrunedViT, True
    pools_tokens, call = True, ("attn_mask", "is_causal")

    def fits(self, model):
        return isinstance(model, VisionTransformer)

    def blocks(self, model):
        return list(model.blocks)

    def norm(self, model):
        return model.norm

    def prefix(self, model):
        return model.num_prefix_tokens

    def grid(self, model):
        return tuple(model.patch_embed.grid_size)

    def width(self, model):
        return model.embed_dim

    def has_class_token(self, model):
        return model.cls_token is not None

    def places(self, model):
        patch_drop = getattr(model, "patch_drop", None)
        if not (patch_drop is None or isinstance(patch_drop, nn.Identity)):
            return "score='static' needs every patch in its place: build the model with patch_drop_rate=0"
        return None

    def pools_unmasked(self, model):
        if model.global_pool == "prr":
            return "a model with global_pool='prr', whose pool takes no mask"
        return None

    def check_block(self, block):
        if type(block).forward is not Block.forward:
            return f"must be a timm Block (attention → MLP), got {type(block).__name__}"
        return None

    def check_attention(self, block):
        if type(block.attn).forward is not Attention.forward:
            return f"needs timm's Attention, got {type(block.attn).__name__}"
        return None

    def first(self, block, x, mask, arguments):
        return x + block.drop_path1(block.ls1(block.attn(block.norm1(x), attn_mask=mask)))

    def second(self, block, x):
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

    # ---- cost

    def channels(self, model):
        return model.in_chans

    def image_size(self, model):
        return tuple(model.patch_embed.img_size)

    def patch_size(self, model):
        return tuple(model.patch_embed.patch_size)

    def resized(self, model, size):
        if not getattr(model, "dynamic_img_size", False):
            model = deepcopy(model)
            model.set_input_size(size)
        return model

    def embedding(self, model):
        return model.patch_embed

    def patch_macs(self, model):
        if type(model.patch_embed) is not PatchEmbed:
            raise TypeError(f"model must have timm's PatchEmbed, got {type(model.patch_embed).__name__}")
        return super().patch_macs(model)

    def head_macs(self, model, n):
        macs = sum(linear_macs(getattr(model, name)) for name in ("head", "head_dist") if hasattr(model, name))
        if getattr(model, "attn_pool", None) is not None:
            macs += pool_macs(model.attn_pool, n + model.num_prefix_tokens * self.pools_prefix(model))
        return macs

    def pools_prefix(self, model):
        """Whether an attention pool reads the prefix tokens too."""
        return model.pool_include_prefix


def pool_macs(pool, n):
    """MACs of an attention pool over n tokens."""
    if not isinstance(pool, AttentionPoolLatent):
        raise TypeError(f"attn_pool must be timm's AttentionPoolLatent, got {type(pool).__name__}")
    once = sum(linear_macs(layer) for layer in (pool.q, pool.proj, pool.mlp) if layer is not None)
    return pool.latent_len * (once + 2 * n * pool.num_heads * pool.head_dim) + n * linear_macs(pool.kv)
