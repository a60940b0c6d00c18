"""PS-ViT (Yue et al. 2021): a ViT whose tokens are sampled from a convolutional map, at places that move four times.

    map        F = stem(image), (B, C, H/4, W/4)
    start      p₁ a grid of points, 14 × 14 in PS-ViT-B/14: 2, 6, … 54 of 56 cells;  x₀ = 0
    iteration  x_t = T_t(F[p_t] + W p_t / size + x_{t−1}),     p_{t+1} = p_t + V_t x_t          t = 1 … 4
    then       the class token joins, and blocks of a plain ViT follow

F[p] is bilinear, 0 outside the map. T_t is a block of the ViT, so "14 deep" is 4 iterations and 10 plain blocks. No q,
k, v biases, ε = 10⁻⁵. p_t is (row, column) in cells of F. Through F[p_t] alone V learns: W p_t and p_{t+1} take p_t as
given.

After ``models/ps_vit.py`` and ``layers/`` of yuexy/PS-ViT, whose state dicts fit as they are. Its sampler is a CUDA
kernel; `grid_sample` gives the same values everywhere, and other gradients at points beyond the centres of the border's
cells, where the kernel takes those of the nearest place inside. Its points go column by column; tokens leave the stem
here row by row, which no logit can tell.

`qk_scale`. One file of weights is two models there: ``ps_vit_b_14()`` attends by head_dim^-½, and this is how
``main.py`` trains and tests it unless told otherwise; ``ps_vit_b_14(pretrained=True)`` sets embed_dim^-½. The logits
differ. The default here is the first, None; the other is ``qk_scale=384**-0.5`` for PS-ViT-B/14. Iterations and plain
blocks have the same.

Pruned are the plain blocks alone, our inference: in an iteration a token is the state of the next one. Block i here is
layer i + 4 of the 14. TPS prints 3.7 G for dTPS on PS-ViT-B/14 and neither blocks nor ρ; ``at=(0, 2, 5)`` at ρ = 0.7
costs that, 3.69, and so do others: ``at=(2, 5, 8)`` at ρ = 0.5, 3.67.

Chapter: :doc:`/book/lv-vit`
"""

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple, trunc_normal_
from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model, resnet
from timm.models.vision_transformer import init_weights_vit_timm
from torch import nn

from ..tokens import in_float32
from .parts import Stem, prepared, set_scale

CELL = 4  # pixels of the image in a cell of the map


class Bottleneck(resnet.Bottleneck):
    """ResNet's, from any width to any: 1×1 → 3×3 → 1×1 with 64 channels inside, and a shortcut."""

    def __init__(self, channels, out_channels, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        shortcut = None
        if channels != out_channels:
            shortcut = nn.Sequential(
                nn.Conv2d(channels, out_channels, 1, bias=False, **dd), nn.BatchNorm2d(out_channels, **dd)
            )
        self.expansion = out_channels // 64
        super().__init__(channels, 64, downsample=shortcut, **dd)


def make_stem(in_chans, width, embed_dim, **dd):
    """(B, in_chans, H, W) → (B, embed_dim, H/4, W/4), by way of `width` channels."""
    return nn.Sequential(
        nn.Conv2d(in_chans, 64, 7, stride=2, padding=3, bias=False, **dd), nn.BatchNorm2d(64, **dd),
        nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2, padding=1),
        Bottleneck(64, width, **dd), Bottleneck(width, embed_dim, **dd),
    )  # fmt: skip


class Points(Stem):
    """The sides of images, and how many points are on the map whatever they are. Images pass unchanged."""

    def __init__(self, *, points, patch_size, **kwargs):
        self.points = points  # (rows, columns)
        super().__init__(patch_size=CELL, **kwargs)

    def _init_img_size(self, img_size):
        size, self.map_size, _ = super()._init_img_size(img_size)
        return size, self.points, self.points[0] * self.points[1]

    def dynamic_feat_size(self, img_size):
        """timm asks for (rows, columns) of the tokens."""
        return self.points

    def first(self):
        """(1, n, 2), p₁ column by column: (i + ½) · cells / points, from the first cell's centre, as officially."""
        places = [(torch.arange(n) + 0.5) * (side / n) for n, side in zip(self.points, self.map_size)]
        return torch.cartesian_prod(*reversed(places)).flip(1).unsqueeze(0)

    def forward(self, images):
        self.check(images)
        return images


class Iteration(nn.Module):
    """Sample, and say where to sample next.

    Args:
        block: T, a timm block.
        position_layer: W, which all iterations share.
        moves: whether the points move afterwards.
    """

    def __init__(self, block, position_layer, moves, device=None, dtype=None):
        super().__init__()
        dim = position_layer.out_features
        self.transformer_layer, self.position_layer = block, position_layer
        self.offset_layer = nn.Linear(dim, 2, device=device, dtype=dtype) if moves else None
        self.init_weights()

    def init_weights(self):
        """At first no point moves."""
        if self.offset_layer is not None:
            nn.init.zeros_(self.offset_layer.weight)
            nn.init.zeros_(self.offset_layer.bias)

    def forward(self, feature_map, place, before):
        """F (B, C, h, w), p_t (B, n, 2) float32 and x_{t−1} (B, n, C) or 0 → x_t, p_{t+1} or None."""
        x = sample(feature_map, place)  # (B, n, C)
        place = place.detach()
        size = place.new_tensor(feature_map.shape[-2:])
        x = self.transformer_layer(x + self.position_layer((place / size).to(x.dtype)) + before)
        return x, None if self.offset_layer is None else place + self.offset_layer(x).float()


@in_float32
def sample(feature_map, place):
    """(B, C, h, w) at (B, n, 2) places (row, column), in cells from the centre of the first → (B, n, C)."""
    size = place.new_tensor(feature_map.shape[-2:])
    grid = ((2 * place + 1) / size - 1).flip(-1).unsqueeze(1)  # (B, 1, n, 2): x, y from −1 to 1
    x = F.grid_sample(feature_map.float(), grid, align_corners=False)  # (B, C, 1, n)
    return x.squeeze(2).transpose(1, 2).to(feature_map.dtype)


class PSViT(VisionTransformer):
    """PS-ViT of any size; the defaults are those of PS-ViT-B/14.

    Args:
        img_size: pixels, an int or (height, width); multiples of 4. The number of points stays as it is.
        points: on a side, an int or (rows, columns).
        embed_dim, num_heads, num_classes, mlp_ratio: as timm's; `embed_dim` a multiple of 64.
        depth: iterations and plain blocks together.
        iterations: how many of them sample.
        stem_width: channels between the two bottlenecks of the stem, a multiple of 64.
        qk_scale: of all attention; None is head_dim^-½.
        **kwargs: others of timm's `VisionTransformer` (`in_chans`, `drop_path_rate` …).

    Raises:
        ValueError: `img_size` is no multiple of 4, `points` below 1, `iterations` not from 1 to depth − 1, a width no
            multiple of 64, or `dynamic_img_size` is set; later, a state dict of another `img_size` or number of points.
    """

    def __init__(
        self, img_size=224, points=14, embed_dim=384, depth=14, num_heads=6, num_classes=1000, *, iterations=4,
        mlp_ratio=3.0, stem_width=256, qk_scale=None, dynamic_img_size=False, device=None, dtype=None, **kwargs,
    ):  # fmt: skip
        if dynamic_img_size:
            raise ValueError("dynamic_img_size must be False: the points are laid out for one size; use set_input_size")
        if not 1 <= iterations < depth:
            raise ValueError(f"iterations must lie from 1 to depth - 1 = {depth - 1}, got {iterations!r}")
        points = to_2tuple(points)
        if min(points) < 1:
            raise ValueError(f"points must be one or two numbers of at least 1, got {points!r}")
        for name, width in (("embed_dim", embed_dim), ("stem_width", stem_width)):
            if width % 64:
                raise ValueError(f"{name} must be a multiple of 64, the stem's inner width, got {width!r}")
        dd = {"device": device, "dtype": dtype}
        super().__init__(
            img_size=img_size, embed_dim=embed_dim, depth=depth, num_heads=num_heads, num_classes=num_classes,
            mlp_ratio=mlp_ratio, qkv_bias=False, norm_layer=nn.LayerNorm,  # its ε is 1e-5
            embed_layer=partial(Points, points=points), pos_embed="none", **kwargs, **dd,
        )  # fmt: skip
        set_scale(self.blocks, qk_scale)
        self.register_buffer("point_coord", self.patch_embed.first().to(self.cls_token))
        self.register_load_state_dict_pre_hook(_check_points)
        self.stem = make_stem(self.in_chans, stem_width, embed_dim, **dd)
        self.pos_layer = nn.Linear(2, embed_dim, **dd)
        init_weights_vit_timm(self.pos_layer)
        blocks = list(self.blocks)  # with the rates of stochastic depth along all of them
        self.ps_layers = nn.ModuleList(
            Iteration(block, self.pos_layer, t < iterations - 1, **dd) for t, block in enumerate(blocks[:iterations])
        )
        self.blocks = nn.Sequential(*blocks[iterations:])
        self.feature_info = [
            {**info, "module": f"trans_layers.{i}"} for i, info in enumerate(self.feature_info[iterations:])
        ]

    def __setattr__(self, name, value):
        super().__setattr__("trans_layers" if name == "blocks" else name, value)

    @property
    def blocks(self):
        """The plain blocks, registered by their official name."""
        return self.trans_layers

    def init_weights(self, mode="", needs_reset=True):
        """timm's; then the class token as the official code has it."""
        super().init_weights(mode, needs_reset)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)

    def group_matcher(self, coarse=False):
        """timm's, with official names."""
        stem = r"^cls_token|reg_token|stem|pos_layer|ps_layers|norm_pre"
        return {"stem": stem, "blocks": [(r"^trans_layers\.(\d+)", None), (r"^norm", (99999,))]}

    def set_input_size(self, img_size=None, patch_size=None):
        """timm's; as many points as before, spread over the new map."""
        super().set_input_size(img_size, patch_size)
        self.point_coord = self.patch_embed.first().to(self.point_coord)

    def _pos_embed(self, x):
        """Images (B, in_chans, H, W) → (B, P + n, C): the stem and the iterations, and the prefix tokens."""
        feature_map = self.stem(x)  # (B, C, h, w)
        x, place = 0, self.point_coord.float().expand(x.shape[0], -1, -1)  # (B, n, 2)
        for layer in self.ps_layers:
            x, place = layer(feature_map, place, x)
        rows, columns = self.patch_embed.points
        x = x.reshape(x.shape[0], columns, rows, x.shape[2]).transpose(1, 2).flatten(1, 2)  # row by row
        prefix = [token.expand(x.shape[0], -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        return self.pos_drop(torch.cat([*prefix, x], dim=1))


def _check_points(model, state, prefix, *args):
    """Points of a state dict would replace the model's: of another image size, they would cover a part of the map."""
    theirs, own = state.get(f"{prefix}point_coord"), model.point_coord
    if theirs is not None and not (theirs.shape == own.shape and torch.allclose(theirs.to(own), own, rtol=4e-3)):
        raise ValueError(
            f"point_coord must be that of img_size={model.patch_embed.img_size} and {model.patch_embed.points} points, "
            f"ending at {own[0, -1].tolist()}; the state dict is of others, its points end at {theirs[0, -1].tolist()}"
        )


def _fit(state, model):
    """timm's `checkpoint_filter_fn`: the points follow from the model's own size."""
    return {**state, "point_coord": model.point_coord}


default_cfgs = generate_default_cfgs(
    {name: prepared("stem.0") for name in ("ps_vit_ti_14", "ps_vit_b_10", "ps_vit_b_14", "ps_vit_b_16", "ps_vit_b_18")}
)


def _build(name, pretrained, kwargs, **size):
    return build_model_with_cfg(PSViT, name, pretrained, pretrained_filter_fn=_fit, **{**size, **kwargs})


@register_model
def ps_vit_ti_14(pretrained=False, **kwargs):
    """PS-ViT-Ti/14: 4.8 M parameters, 1.6 G."""
    return _build("ps_vit_ti_14", pretrained, kwargs, embed_dim=192, depth=12, num_heads=3, stem_width=192)


@register_model
def ps_vit_b_10(pretrained=False, **kwargs):
    """PS-ViT-B/10: 21.3 M parameters, 3.1 G. The official code has no function of it, its README has."""
    return _build("ps_vit_b_10", pretrained, kwargs, points=10)


@register_model
def ps_vit_b_14(pretrained=False, **kwargs):
    """PS-ViT-B/14: 21.3 M parameters, 5.4 G."""
    return _build("ps_vit_b_14", pretrained, kwargs)


@register_model
def ps_vit_b_16(pretrained=False, **kwargs):
    """PS-ViT-B/16: 16 × 16 points."""
    return _build("ps_vit_b_16", pretrained, kwargs, points=16)


@register_model
def ps_vit_b_18(pretrained=False, **kwargs):
    """PS-ViT-B/18: 21.3 M parameters, 8.7 G; its README prints 8.8, which counts norms too."""
    return _build("ps_vit_b_18", pretrained, kwargs, points=18)
