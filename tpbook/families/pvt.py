"""timm's `PyramidVisionTransformerV2` (PVT v2, Wang et al. 2022): four maps, no class token, the mean of the last one.

    x ← x + drop_path1(attn(norm1(x)))      queries W_q LN x, keys and values of LN(conv_{sr × sr, stride sr}(M))
    x ← x + drop_path2(mlp(norm2(x)))       fc2(GELU(conv_{3 × 3, a channel each}(M(fc1 x))))
"""

import torch.nn.functional as F
from timm.models.pvt_v2 import Attention, Block, PyramidVisionTransformerV2

from ..pruned import PrunedModel
from .costs import convolved, linear_macs, prepared_size
from .family import Segment
from .grid import Grid, check_divides, from_map, heads, is_whole, run, to_map


class PVTv2(Grid):
    """PVT v2 b0 to b5, and its linear variant, whose pooling takes any map."""

    name, mixin, call = "timm PyramidVisionTransformerV2", PrunedModel, ("feat_size",)

    def fits(self, model):
        return isinstance(model, PyramidVisionTransformerV2)

    def segments(self, model, size=None):
        grid, segments, first = self.image_size(model) if size is None else size, [], 0
        for i, (stage, conv) in enumerate(zip(model.stages, self.projections(model))):
            grid = convolved(conv, grid)
            pooled, blocks = i == len(model.stages) - 1 and model.global_pool == "avg", list(stage.blocks)
            segments.append(Segment(first, blocks, stage.norm, 0, grid, blocks[0].attn.dim, pooled))
            first += len(blocks)
        return segments

    # ---- a block

    def check_block(self, block):
        if type(block).forward is not Block.forward or type(block.attn).forward is not Attention.forward:
            return f"must be a Block of timm's pvt_v2, got {type(block).__name__}"
        return None

    def check_attention(self, block):
        if block.attn.sr is not None:
            return "needs keys that are the tokens, and a reduced map has others,"
        return None

    def attend(self, block, tokens, mask, arguments):
        grid, y, attn = tuple(arguments["feat_size"]), block.norm1(tokens.x), block.attn
        y = run(tokens, mask, grid, 0, lambda: attn(y, grid), lambda: self.ours(attn, y, tokens, mask, grid))
        return tokens.x + block.drop_path1(y)

    def ours(self, attn, y, tokens, mask, grid):
        """The attention of what is left: (B, n, C), normed → (B, n, C)."""
        source, mask = (y, mask) if attn.sr is None else (reduced(attn, to_map(y, tokens, grid)), None)
        q = heads(attn.q(y), attn.num_heads)  # (B, H, n, d)
        k, v = (heads(part, attn.num_heads) for part in attn.kv(source).chunk(2, dim=-1))  # (B, H, M, d) each
        dropout = attn.attn_drop.p if attn.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return attn.proj_drop(attn.proj(y.transpose(1, 2).flatten(2)))

    def transform(self, block, tokens, arguments):
        x, grid, mlp = tokens.x, tuple(arguments["feat_size"]), block.mlp
        if is_whole(tokens, grid[0] * grid[1], 0):
            return x + block.drop_path2(mlp(block.norm2(x), grid))
        y = mlp.relu(to_map(mlp.fc1(block.norm2(x)), tokens, grid))  # (B, C', rows, columns)
        y = mlp.drop(mlp.fc2(mlp.drop(mlp.act(from_map(mlp.dwconv(y), tokens)))))
        return x + block.drop_path2(y)

    # ---- cost

    def channels(self, model):
        return model.in_chans

    def image_size(self, model):
        return prepared_size(model)

    def patch_size(self, model):
        return (4 * 2 ** (len(model.stages) - 1),) * 2

    def resized(self, model, size):
        return model

    def embeddings(self, model):
        return [model.patch_embed, *(stage.downsample for stage in list(model.stages)[1:])]

    def projections(self, model):
        return [embedding.proj for embedding in self.embeddings(model)]

    def block_macs(self, block, seen, left, queries, grid):
        attn, count, dim, hidden = block.attn, grid[0] * grid[1], block.attn.dim, block.mlp.fc1.out_features
        keys, reducing = seen, 0
        if attn.pool is not None:
            keys = 7 * 7
            reducing = keys * dim * dim
        elif attn.sr is not None:
            check_divides(grid, attn.sr.stride[0])
            keys, reducing = count // attn.sr.stride[0] ** 2, count * dim * dim
        linear = 2 * seen * dim * dim + keys * 2 * dim * dim + reducing
        return linear + left * linear_macs(block.mlp) + 9 * count * hidden, 2 * seen * keys * dim, 0

    def head_macs(self, model, n):
        return linear_macs(model.head)


def reduced(attn, x):
    """The map (B, C, rows, columns) that keys and values are made of → (B, M, C)."""
    if attn.pool is not None:
        return attn.act(attn.norm(attn.sr(attn.pool(x)).flatten(2).transpose(1, 2)))
    check_divides(x.shape[-2:], attn.sr.stride[0])
    return attn.norm(attn.sr(x).flatten(2).transpose(1, 2))
