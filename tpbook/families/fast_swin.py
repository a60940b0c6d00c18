"""timm's `SwinTransformer`, with a fast path in its third stage.

    u = x + drop_path1(attn(norm1(x)))                                  windows, shifted in every other block
    y = u + drop_path2(mlp(norm2(u))), or u + drop_path2(fastmlp(u))

The new parameters have the names and shapes of the official `dyswin.py`: `layers.2.blocks.i.fastmlp.fc1.{0,1}` and
`layers.2.score_predictor.s.*`. An official state dict is Microsoft's otherwise, where a stage ends with its
downsampling and the head is `head.weight`; `tpbook.load_checkpoint` loads it strictly, with `layers.n.downsample` as
timm's `layers.n+1.downsample`, `head` as `head.fc`, and without the buffers `attn_mask` and `relative_position_index`,
which timm computes.
"""

import re
from copy import deepcopy

from timm.models import swin_transformer
from torch import nn

from .fast_family import FastPath, weights


class FastMLP(nn.Module):
    """Swin's fast path: norm and linear layer; no activation, no layer scale."""

    def __init__(self, dim, drop=0.0, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = nn.Sequential(nn.LayerNorm(dim, **dd), nn.Linear(dim, dim, **dd))
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        """(B, …, C) → (B, …, C)."""
        return self.drop(self.fc1(x))


class FastSwin(FastPath):
    """Swin-T, S, B, L; Swin v2 is another model."""

    name, residual_inside, added = "timm SwinTransformer", True, ("score_predictor", "fastmlp")

    def fits(self, model):
        return isinstance(model, swin_transformer.SwinTransformer)

    def stages(self, model):
        return list(model.layers)

    def holder(self, model):
        return self.stages(model)[2]

    def norm(self, model):
        return model.norm

    def width(self, model):
        return self.blocks(model)[0].dim

    def check_block(self, block):
        if type(block).forward is not swin_transformer.SwinTransformerBlock.forward:
            return f"must be a timm SwinTransformerBlock, got {type(block).__name__}"
        return None

    def misfit(self, block, rows, columns):
        height, width = block.window_size
        if rows % height or columns % width:
            return (
                f"the image size must give the third stage a map that its windows of {height} × {width} fit, got one "
                f"of {rows} × {columns} positions"
            )
        return None

    def add_path(self, block, **dd):
        block.fastmlp = FastMLP(block.dim, block.mlp.drop2.p, **dd).train(block.training)

    def spatial(self, block, x):
        return x + block.drop_path1(block._attn(block.norm1(x)))

    def slow(self, block, u):
        return block.drop_path2(block.mlp(block.norm2(u)))

    def fast(self, block, u):
        return block.drop_path2(block.fastmlp(u))

    def official(self, state):
        if "layers.0.downsample.reduction.weight" not in state:  # timm's own
            return state
        named = {}
        for name, value in state.items():
            if name.endswith(("attn_mask", "relative_position_index")):
                continue
            name = re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) + 1}.downsample.", name)
            named[re.sub(r"^head\.", "head.fc.", name)] = value
        return named

    # ---- cost

    def image_size(self, model):
        return tuple(model.patch_embed.img_size)

    def patch_size(self, model):
        return tuple(model.patch_embed.patch_size)

    def resized(self, model, size):
        if not model.dynamic_img_size:
            model = deepcopy(model)
            model.set_input_size(size)
        return model

    def embedding(self, model):
        return model.patch_embed

    def embedded(self, model, rows, columns):
        height, width = self.patch_size(model)
        return rows // height, columns // width

    def shrunk(self, stage, rows, columns):
        return (rows, columns) if isinstance(stage.downsample, nn.Identity) else (-(-rows // 2), -(-columns // 2))

    def spatial_macs(self, block, rows, columns):
        height, width = block.window_size
        seen = -(-rows // height) * -(-columns // width) * height * width  # timm fills up windows that do not fit
        return seen * weights(block.attn), seen * 2 * height * width * block.attn.qkv.out_features // 3
