"""T2T-ViT (Yuan et al. 2021): a ViT whose patches overlap, made in three steps with an attention after the first two.

    soft split    each place of the map gets the k×k places around it: (B, c, h, w) → (B, hw/s², c·k²)
    tokens        split 7/4 → attention → split 3/2 → attention → split 3/2 → linear, N = HW/16²
    attention     x ← v + W_o(A v),   x ← x + MLP(LN x),   k, q, v = W LN(x), one head, 64 wide
    performer     A v = φ(q)(φ(k)ᵀ v) / (φ(q) Σ_j φ(k_j) + 10⁻⁸),   φ(x) = exp(w x − |x|²/2) / √m        linear in N
    transformer   A v = softmax(q kᵀ / √d) v, d the channels of the *split* token (147, then 576), not of q

Then a plain ViT: class token, sinusoids for positions, which do not learn, no q, k, v biases, ε = 10⁻⁵. After
``models/t2t_vit.py``, ``token_performer.py`` and ``token_transformer.py`` of yitu-opensource/T2T-ViT, whose state dicts
fit as they are.

`qk_scale`. One file of weights is two models there: ``t2t_vit_14()`` attends by head_dim^-½, and this is how the
README's commands train, test and use it; ``t2t_vit_14(pretrained=True)`` sets embed_dim^-½. The logits differ. The
default here is the first, None; the other is ``qk_scale=384**-0.5`` for T2T-ViT-14. It is a matter of the blocks alone.

No paper prints T2T-ViT pruned by the methods of this package: which blocks are pruned is the package's default.

Chapter: :doc:`/book/lv-vit`
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import Mlp, trunc_normal_
from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn

from ..tokens import in_float32
from .parts import Stem, prepared, set_scale

PATCH = 16  # 4 · 2 · 2
DROPOUT = 0.1  # in training; the official performer takes no other


class Performer(nn.Module):
    """Attention by random features: (B, n, dim) → (B, n, width), for any n at a cost that grows as n."""

    def __init__(self, dim, width, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.w = nn.Parameter(torch.empty(width // 2, width, **dd), requires_grad=False)  # (m, width)
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.kqv = nn.Linear(dim, 3 * width, **dd)
        self.dp = nn.Dropout(DROPOUT)
        self.proj = nn.Linear(width, width, **dd)
        self.norm2 = nn.LayerNorm(width, **dd)
        self.mlp = nn.Sequential(
            nn.Linear(width, width, **dd), nn.GELU(), nn.Linear(width, width, **dd), nn.Dropout(DROPOUT)
        )
        self.reset_parameters()

    def reset_parameters(self):
        """Draw the random features: m orthogonal directions, √m long."""
        nn.init.orthogonal_(self.w)
        with torch.no_grad():
            self.w.mul_(math.sqrt(len(self.w)))

    def forward(self, x):
        k, q, v = self.kqv(self.norm1(x)).chunk(3, dim=-1)  # (B, n, width) each
        x = v + self.dp(self.proj(random_attention(q, k, v, self.w).to(v.dtype)))
        return x + self.mlp(self.norm2(x))


@in_float32
def random_attention(q, k, v, w):
    """Softmax attention of scale 1, estimated: (B, n, c) each and directions (m, c) → (B, n, c) float32."""
    q, k = (_features(x.float(), w.float()) for x in (q, k))  # (B, n, m)
    seen = k.transpose(1, 2) @ v.float()  # (B, m, c)
    total = q @ k.sum(dim=1).unsqueeze(2)  # (B, n, 1)
    return q @ seen / (total + 1e-8)


def _features(x, w):
    """φ(x)."""
    return (F.linear(x, w) - x.square().sum(dim=-1, keepdim=True) / 2).exp() / math.sqrt(len(w))


class SplitAttention(nn.Module):
    """Softmax attention of one head; what it adds to is v, since x is wider."""

    def __init__(self, dim, width, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.scale = dim**-0.5
        self.qkv = nn.Linear(dim, 3 * width, bias=False, **dd)
        self.proj = nn.Linear(width, width, **dd)

    def forward(self, x):
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)  # (B, 1, n, width) each
        return (v + self.proj(F.scaled_dot_product_attention(q, k, v, scale=self.scale))).squeeze(1)


class Transformer(nn.Module):
    """The same by softmax: (B, n, dim) → (B, n, width), at a cost that grows as n²."""

    def __init__(self, dim, width, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = SplitAttention(dim, width, **dd)
        self.norm2 = nn.LayerNorm(width, **dd)
        self.mlp = Mlp(width, width, **dd)

    def forward(self, x):
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


MIXERS = {"performer": Performer, "transformer": Transformer}


def soft_split(x, kernel, stride):
    """(B, c, h, w) → (B, h/s · w/s, c·k²): each token is a window, c outermost, and windows overlap."""
    return F.unfold(x, kernel, padding=(kernel - stride + 1) // 2, stride=stride).transpose(1, 2)


class TokensToToken(Stem):
    """The stem: (B, in_chans, H, W) → (B, N, C), or (B, H/16, W/16, C) for images of any size."""

    def __init__(self, *, tokens_type, width, patch_size, in_chans, embed_dim, device=None, dtype=None, **kwargs):
        if patch_size not in (PATCH, (PATCH, PATCH)):
            raise ValueError(f"patch_size must be {PATCH}, the product of the strides 4, 2 and 2; got {patch_size!r}")
        if tokens_type not in MIXERS:
            raise ValueError(f"tokens_type must be one of {', '.join(MIXERS)}, got {tokens_type!r}")
        super().__init__(patch_size=PATCH, **kwargs)
        dd = {"device": device, "dtype": dtype}
        self.attention1 = MIXERS[tokens_type](in_chans * 7 * 7, width, **dd)
        self.attention2 = MIXERS[tokens_type](width * 3 * 3, width, **dd)
        self.project = nn.Linear(width * 3 * 3, embed_dim, **dd)

    def forward(self, images):
        self.check(images)
        h, w = images.shape[-2:]
        x = self.attention1(soft_split(images, 7, 4))  # (B, HW/16, width)
        x = self.attention2(soft_split(_map(x, h // 4, w // 4), 3, 2))  # (B, HW/64, width)
        x = self.project(soft_split(_map(x, h // 8, w // 8), 3, 2))  # (B, N, C)
        return x if self.flatten else x.reshape(x.shape[0], h // PATCH, w // PATCH, x.shape[2])


def _map(x, rows, columns):
    """(B, rows · columns, c) → (B, c, rows, columns)."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], rows, columns)


def sinusoids(patches, dim):
    """(1, n, dim): sin of p / 10000^(2i/dim) in the even channel 2i of position p, cos in the odd one after it."""
    place = torch.arange(patches, dtype=torch.float64).unsqueeze(1)
    angle = place / 10000 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)  # (n, dim / 2)
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)[:, :dim].float().unsqueeze(0)


class T2TViT(VisionTransformer):
    """T2T-ViT of any size; the defaults are those of T2T-ViT-14.

    Args:
        img_size: pixels, an int or (height, width); multiples of 16.
        embed_dim, depth, num_heads, num_classes, mlp_ratio: as timm's.
        tokens_type: the attention in the stem, "performer" or "transformer".
        token_dim: its channels.
        qk_scale: of the blocks' attention; None is head_dim^-½.
        **kwargs: others of timm's `VisionTransformer` (`in_chans`, `drop_path_rate`, `dynamic_img_size` …).

    Raises:
        ValueError: `img_size` is no multiple of 16, `patch_size` is given and another than 16, or an unknown
            `tokens_type`.
    """

    def __init__(
        self, img_size=224, embed_dim=384, depth=14, num_heads=6, num_classes=1000, *, mlp_ratio=3.0,
        tokens_type="performer", token_dim=64, qk_scale=None, **kwargs,
    ):  # fmt: skip
        super().__init__(
            img_size=img_size, embed_dim=embed_dim, depth=depth, num_heads=num_heads, num_classes=num_classes,
            mlp_ratio=mlp_ratio, qkv_bias=False, norm_layer=nn.LayerNorm,  # its ε is 1e-5
            embed_layer=partial(TokensToToken, tokens_type=tokens_type, width=token_dim), **kwargs,
        )  # fmt: skip
        if self.pos_embed is not None:
            self.pos_embed.requires_grad_(False)
        set_scale(self.blocks, qk_scale)

    def __setattr__(self, name, value):
        super().__setattr__("tokens_to_token" if name == "patch_embed" else name, value)

    @property
    def patch_embed(self):
        """The stem, registered by its official name."""
        return self.tokens_to_token

    def init_weights(self, mode="", needs_reset=True):
        """timm's; then the class token and the positions as the official code has them."""
        super().init_weights(mode, needs_reset)
        trunc_normal_(self.cls_token, std=0.02)
        if self.pos_embed is not None:
            with torch.no_grad():
                self.pos_embed.copy_(sinusoids(*self.pos_embed.shape[1:]))

    def group_matcher(self, coarse=False):
        """timm's, with the stem's official name."""
        return {**super().group_matcher(coarse), "stem": r"^cls_token|reg_token|pos_embed|tokens_to_token|norm_pre"}


SIZES = {  # name → embed_dim, depth, num_heads, mlp_ratio
    "7": (256, 7, 4, 2.0), "10": (256, 10, 4, 2.0), "12": (256, 12, 4, 2.0),
    "14": (384, 14, 6, 3.0), "19": (448, 19, 7, 3.0), "24": (512, 24, 8, 3.0),
}  # fmt: skip
PERFORMERS, TRANSFORMERS = [f"t2t_vit_{size}" for size in SIZES], [f"t2t_vit_t_{size}" for size in ("14", "19", "24")]
_FIRST = {"performer": "tokens_to_token.attention1.kqv", "transformer": "tokens_to_token.attention1.attn.qkv"}
default_cfgs = generate_default_cfgs(
    {name: prepared(_FIRST["performer"]) for name in PERFORMERS}
    | {name: prepared(_FIRST["transformer"]) for name in TRANSFORMERS}
)


def _build(name, tokens_type, pretrained, kwargs):
    embed_dim, depth, num_heads, mlp_ratio = SIZES[name.rsplit("_", 1)[1]]
    size = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "mlp_ratio": mlp_ratio}
    kwargs = {**size, "tokens_type": tokens_type, **kwargs}
    return build_model_with_cfg(T2TViT, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def t2t_vit_7(pretrained=False, **kwargs):
    """T2T-ViT-7: 4.3 M parameters, 1.1 G."""
    return _build("t2t_vit_7", "performer", pretrained, kwargs)


@register_model
def t2t_vit_10(pretrained=False, **kwargs):
    """T2T-ViT-10: 5.9 M parameters, 1.5 G."""
    return _build("t2t_vit_10", "performer", pretrained, kwargs)


@register_model
def t2t_vit_12(pretrained=False, **kwargs):
    """T2T-ViT-12: 6.9 M parameters, 1.8 G."""
    return _build("t2t_vit_12", "performer", pretrained, kwargs)


@register_model
def t2t_vit_14(pretrained=False, **kwargs):
    """T2T-ViT-14: 21.5 M parameters, 4.8 G."""
    return _build("t2t_vit_14", "performer", pretrained, kwargs)


@register_model
def t2t_vit_19(pretrained=False, **kwargs):
    """T2T-ViT-19: 39.2 M parameters, 8.5 G."""
    return _build("t2t_vit_19", "performer", pretrained, kwargs)


@register_model
def t2t_vit_24(pretrained=False, **kwargs):
    """T2T-ViT-24: 64.1 M parameters, 13.7 G; its README prints 13.8."""
    return _build("t2t_vit_24", "performer", pretrained, kwargs)


@register_model
def t2t_vit_t_14(pretrained=False, **kwargs):
    """T2T-ViT_t-14, a transformer in the stem: 21.5 M parameters, 6.1 G."""
    return _build("t2t_vit_t_14", "transformer", pretrained, kwargs)


@register_model
def t2t_vit_t_19(pretrained=False, **kwargs):
    """T2T-ViT_t-19: 39.2 M parameters, 9.8 G."""
    return _build("t2t_vit_t_19", "transformer", pretrained, kwargs)


@register_model
def t2t_vit_t_24(pretrained=False, **kwargs):
    """T2T-ViT_t-24: 64.1 M parameters, 15.0 G."""
    return _build("t2t_vit_t_24", "transformer", pretrained, kwargs)
