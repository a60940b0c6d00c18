"""timm's `ConvNeXt`, with a fast path in its third stage.

    u = conv_dw(x)                                                      7 × 7, each channel by itself
    y = x + drop_path(γ mlp(norm(u))), or x + drop_path(γ_f fast_path(u))

The new parameters have the names and shapes of the official `dyconvnext.py`: `stages.2.blocks.i.fast_path.{0,1}`,
`stages.2.blocks.i.fast_path_gamma` (from 1e-6) and `score_predictor.s.*`, whose layers are 1 × 1 convolutions. An
official state dict is Meta's otherwise; `tpbook.load_checkpoint` loads it strictly, by the names in `NAMES`: there a
block is `stages.2.i`, without timm's `blocks`.
"""

import re

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.models import convnext
from torch import nn

from ..methods.dynamicvit import KEEP
from ..record import Traced
from .costs import convolved, prepared_size
from .fast_family import FastPath, weights

NAMES = (  # Meta's → timm's
    (r"^downsample_layers\.0\.", "stem."), (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."), (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv(\d)\.", r".mlp.fc\1."), (r"^norm\.", "head.norm."), (r"^head\.(weight|bias)$", r"head.fc.\1"),
)  # fmt: skip


class ConvScorePredictor(nn.Module):
    """`ScorePredictor` as the official code lays it out for a map.

    Args:
        dim: C.
    """

    def __init__(self, dim, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.in_conv = nn.Sequential(LayerNorm2d(dim, **dd), nn.Conv2d(dim, dim, 1, **dd), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Conv2d(dim, dim // 2, 1, **dd), nn.GELU(),
            nn.Conv2d(dim // 2, dim // 4, 1, **dd), nn.GELU(),
            nn.Conv2d(dim // 4, 2, 1, **dd), nn.LogSoftmax(dim=1),
        )  # fmt: skip

    def forward(self, x):
        """(B, N, C) → (B, N, 2) log-probabilities, index 0 = keep."""
        u = self.in_conv(x.transpose(1, 2).unsqueeze(-1))  # (B, C, N, 1)
        local, glob = u.chunk(2, dim=1)  # (B, C/2, N, 1) each
        glob = glob.mean(dim=2, keepdim=True).expand_as(local)
        return self.out_conv(torch.cat([local, glob], dim=1)).squeeze(-1).transpose(1, 2)


class TracedHead(Traced):
    """Mixed into the class of the head, whose norm sees the pooled map alone: traced is the norm of the whole one."""

    def forward(self, x, *args, **kwargs):
        """What the head gives of a map (B, C, H, W)."""
        if self._plan.trace is not None:
            features = self.norm(x).flatten(2).transpose(1, 2)  # (B, N, C)
            self._plan.trace.features, self._plan.trace.whole = features, True
        return super(Traced, self).forward(x, *args, **kwargs)


class FastConvNeXt(FastPath):
    """ConvNeXt-T, S, B, L, XL."""

    name, residual_inside, traced = "timm ConvNeXt", False, TracedHead
    added = ("score_predictor", "fast_path", "fast_path_gamma")

    def fits(self, model):
        return isinstance(model, convnext.ConvNeXt)

    def refusal(self, model):
        if not hasattr(model.head, "norm"):
            return "must norm after it pools, as Meta's do: build it with head_norm_first=False"
        return super().refusal(model)

    def stages(self, model):
        return list(model.stages)

    def holder(self, model):
        return model

    def norm(self, model):
        return model.head

    def width(self, model):
        return self.blocks(model)[0].conv_dw.out_channels

    def check_block(self, block):
        if type(block).forward is not convnext.ConvNeXtBlock.forward:
            return f"must be a timm ConvNeXtBlock, got {type(block).__name__}"
        if block.use_conv_mlp or type(block.mlp).__name__ != "Mlp" or not isinstance(block.shortcut, nn.Identity):
            return "must have an MLP that takes each position by itself: build it with conv_mlp=False, use_grn=False"
        return None

    def predictor(self, score, width, **dd):
        return ConvScorePredictor(width, **dd)

    def sample(self, log_probs):
        return F.gumbel_softmax(log_probs.transpose(1, 2), hard=True, dim=1)[:, KEEP]  # drawn in the official order

    def add_path(self, block, **dd):
        dim = block.conv_dw.out_channels
        path = nn.Sequential(nn.LayerNorm(dim, eps=1e-6, **dd), nn.Linear(dim, dim, **dd))
        block.fast_path = path.train(block.training)
        block.fast_path_gamma = None if block.gamma is None else nn.Parameter(torch.full((dim,), 1e-6, **dd))

    def last(self, x):
        return x.permute(0, 2, 3, 1)

    def back(self, x):
        return x.permute(0, 3, 1, 2)

    def spatial(self, block, x):
        return self.last(block.conv_dw(self.back(x)))

    def slow(self, block, u):
        return _scaled(block, block.mlp(block.norm(u)), block.gamma)

    def fast(self, block, u):
        return _scaled(block, block.fast_path(u), block.fast_path_gamma)

    def official(self, state):
        if "downsample_layers.0.0.weight" not in state:  # timm's own
            return state
        named = {}
        for name, value in state.items():
            for theirs, ours in NAMES:
                name = re.sub(theirs, ours, name)
            named[name] = value
        return named

    # ---- cost

    def image_size(self, model):
        return prepared_size(model)

    def patch_size(self, model):
        return tuple(model.stem[0].stride)

    def resized(self, model, size):
        return model

    def embedding(self, model):
        return model.stem

    def embedded(self, model, rows, columns):
        return _shrunk(model.stem, rows, columns)

    def shrunk(self, stage, rows, columns):
        return _shrunk(stage.downsample, rows, columns)

    def spatial_macs(self, block, rows, columns):
        return rows * columns * weights(block.conv_dw), 0


def _scaled(block, y, gamma):
    return block.drop_path(y if gamma is None else y * gamma)


def _shrunk(module, *side):
    """The map that the convolutions of a module make of one."""
    for conv in (m for m in module.modules() if isinstance(m, nn.Conv2d)):
        side = convolved(conv, side)
    return side
