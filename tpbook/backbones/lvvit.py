"""LV-ViT (Jiang et al. 2021): a ViT with a convolutional stem, damped residuals, and a second head on every token.

    stem    conv 7×7 /2 → BN → ReLU, twice (conv 3×3 → BN → ReLU), then the patches: conv p/2×p/2 /(p/2)
    block   x ← x + attn(norm1(x)) / λ,   x ← x + mlp(norm2(x)) / λ          no q, k, v biases
    head    y = W x_cls + ½ max over the patch tokens i of A x_i             in training W x_cls alone

After ``tlt/models/lvvit.py`` of zihangJiang/TokenLabeling, whose state dicts fit as they are; once it is pruned by
DynamicViT, so do those of ``models/dylvvit.py`` of raoyongming/DynamicViT. The maximum is over what is left, as there.
MixToken and dense labels, with which LV-ViT itself was trained, are not here.

Chapter: :doc:`/book/lv-vit`
"""

from functools import partial

import torch.nn.functional as F
from timm.layers import get_device_dtype, nchw_to, resample_abs_pos_embed
from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import init_weights_vit_timm
from torch import nn

from . import parts


class Stem(parts.Stem):
    """The convolutions that make patches: (B, in_chans, H, W) → (B, N, C), or (B, h, w, C) for images of any size.

    Args:
        width: channels of the first three.
        **kwargs: those of timm's `PatchEmbed`.

    Raises:
        ValueError: `patch_size` is no even int, or as `parts.Stem`.
    """

    def __init__(self, *, width, patch_size, in_chans, embed_dim, bias=True, device=None, dtype=None, **kwargs):
        if not isinstance(patch_size, int) or patch_size < 2 or patch_size % 2:
            raise ValueError(f"patch_size must be an even int, since the stem halves the image; got {patch_size!r}")
        dd = {"device": device, "dtype": dtype}
        super().__init__(patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, **kwargs, **dd)
        self.conv1 = nn.Conv2d(in_chans, width, 7, stride=2, padding=3, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(width, **dd)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(width, **dd)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False, **dd)
        self.bn3 = nn.BatchNorm2d(width, **dd)
        self.proj = nn.Conv2d(width, embed_dim, patch_size // 2, stride=patch_size // 2, bias=bias, **dd)

    def forward(self, x):
        self.check(x)
        x = F.relu(self.bn1(self.conv1(x)))  # (B, width, H/2, W/2)
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        x = self.proj(x)  # (B, C, H/p, W/p)
        return x.flatten(2).transpose(1, 2) if self.flatten else nchw_to(x, self.output_fmt)


class Divide(nn.Module):
    """x / λ, in the place of timm's `LayerScale`."""

    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, x):
        return x / self.by

    def extra_repr(self):
        return f"by={self.by}"


class LVViT(VisionTransformer):
    """LV-ViT of any size; the defaults are those of LV-ViT-S.

    In eval mode (B, in_chans, H, W) → (B, num_classes), both heads together; in training mode the class head alone, so
    whoever trains the auxiliary head calls `aux_head` on tokens, as `tpbook.train` does where tokens are distilled.
    Else it does not learn, and a recipe for several processes names it in `frozen`.

    Args:
        img_size: pixels, an int or (height, width); multiples of `patch_size`.
        patch_size: p, even.
        embed_dim, depth, num_heads, num_classes, mlp_ratio: as timm's.
        skip_lam: λ, by which what a block adds is divided.
        stem_width: channels in the stem.
        **kwargs: others of timm's `VisionTransformer` (`in_chans`, `drop_path_rate`, `dynamic_img_size` …).

    Raises:
        ValueError: `img_size` is no multiple of `patch_size`, `patch_size` is odd, or `skip_lam` is not above 0.
    """

    def __init__(
        self, img_size=224, patch_size=16, embed_dim=384, depth=16, num_heads=6, num_classes=1000, *,
        skip_lam=2.0, stem_width=64, mlp_ratio=3.0, **kwargs,
    ):  # fmt: skip
        if not skip_lam > 0:
            raise ValueError(f"skip_lam must be above 0, got {skip_lam!r}")
        super().__init__(
            img_size=img_size, patch_size=patch_size, embed_dim=embed_dim, depth=depth, num_heads=num_heads,
            num_classes=num_classes, mlp_ratio=mlp_ratio, qkv_bias=False, norm_layer=nn.LayerNorm,  # its ε is 1e-5
            embed_layer=partial(Stem, width=stem_width), global_pool="token", **kwargs,
        )  # fmt: skip
        for block in self.blocks:
            block.ls1, block.ls2 = Divide(skip_lam), Divide(skip_lam)
        self.aux_head = self._new_aux_head()
        init_weights_vit_timm(self.aux_head)

    def _new_aux_head(self):
        if not self.num_classes:
            return nn.Identity()
        return nn.Linear(self.embed_dim, self.num_classes, **get_device_dtype(self)).train(self.training)

    def get_classifier(self):
        """Both heads: (of the class token, of every token)."""
        return self.head, self.aux_head

    def reset_classifier(self, num_classes, global_pool=None):
        """Two new heads; none for 0 classes. `global_pool` "" hands on all tokens, and then there must be no classes.

        Raises:
            ValueError: another `global_pool` than "token", or than "" for no classes.
        """
        pool = self.global_pool if global_pool is None else global_pool
        if pool != "token" and (pool or num_classes):
            raise ValueError(f"global_pool must be 'token', or '' for num_classes=0, got {pool!r}")
        super().reset_classifier(num_classes, global_pool)
        self.aux_head = self._new_aux_head()

    def forward_head(self, x, pre_logits=False):
        """(B, P + n, C) after the last norm → (B, num_classes); the class token (B, C) for `pre_logits`."""
        logits = super().forward_head(x, pre_logits)
        if self.training or pre_logits or not self.num_classes:
            return logits
        return logits + 0.5 * self.aux_head(x[:, self.num_prefix_tokens :]).amax(dim=1)


def _fit(state, model):
    """timm's `checkpoint_filter_fn`: the position embedding of another image size is resampled."""
    place = state.get("pos_embed")
    if place is None or place.shape[1] == model.pos_embed.shape[1]:
        return state
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    return {**state, "pos_embed": resample_abs_pos_embed(place, model.patch_embed.grid_size, num_prefix_tokens=prefix)}


def _prepared(crop):
    """How to prepare a picture, after the official `default_cfgs`; the files are releases on GitHub, not on a hub."""
    return {
        "num_classes": 1000, "input_size": (3, 224, 224), "fixed_input_size": True, "crop_pct": crop,
        "interpolation": "bicubic", "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.conv1", "classifier": ("head", "aux_head"), "license": "apache-2.0",
    }  # fmt: skip


default_cfgs = generate_default_cfgs({
    "lvvit_t": _prepared(0.9), "lvvit_s": _prepared(0.9), "lvvit_m": _prepared(1.0), "lvvit_l": _prepared(1.0),
})  # fmt: skip


def _build(name, pretrained, kwargs, **size):
    return build_model_with_cfg(LVViT, name, pretrained, pretrained_filter_fn=_fit, **{**size, **kwargs})


@register_model
def lvvit_t(pretrained=False, **kwargs):
    """LV-ViT-T: 8.53 M parameters; λ = 1."""
    return _build("lvvit_t", pretrained, kwargs, embed_dim=240, depth=12, num_heads=4, skip_lam=1.0)


@register_model
def lvvit_s(pretrained=False, **kwargs):
    """LV-ViT-S: 26.15 M parameters; DynamicViT prunes it before blocks 4, 8 and 12."""
    return _build("lvvit_s", pretrained, kwargs)


@register_model
def lvvit_m(pretrained=False, **kwargs):
    """LV-ViT-M: 55.83 M parameters; DynamicViT prunes it before blocks 5, 10 and 15."""
    return _build("lvvit_m", pretrained, kwargs, embed_dim=512, depth=20, num_heads=8)


@register_model
def lvvit_l(pretrained=False, **kwargs):
    """LV-ViT-L: λ = 3, a stem twice as wide."""
    return _build(
        "lvvit_l", pretrained, kwargs, embed_dim=768, depth=24, num_heads=12, skip_lam=3.0, stem_width=128
    )
