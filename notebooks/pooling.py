"""DynamicViT's "structural" downsampling, which its ablation compares with choosing: 2 × 2 neighbours become one token.

A method more, of which one reduction is new::

    tpbook.register("pooling", POOLING)
    tpbook.prune(model, "pooling", at=(6,), keep_ratio=0.25)
"""

import torch
import torch.nn.functional as F

from tpbook.methods.parts import Method, Reduce


class Pool(Reduce):
    """Neighbours are averaged, whatever their score; so a quarter is kept, once, of every patch in its place."""

    name, words, gone, ordered = "pool", "2 × 2 neighbours are averaged", "averaged", False

    def __call__(self, tokens, order, kept, call):
        rows, columns = call.grid
        if rows % 2 or columns % 2 or call.x.shape[1] != rows * columns or 4 * kept != rows * columns:
            raise ValueError(
                f"pooling halves an even grid at one block with keep_ratio=0.25, got {rows} × {columns} patches, of "
                f"which {call.x.shape[1]} are there and {kept} to be kept"
            )
        x = F.avg_pool2d(call.x.transpose(1, 2).unflatten(2, (rows, columns)), 2)  # (B, C, rows/2, columns/2)
        x = x.flatten(2).transpose(1, 2)  # (B, N/4, C)
        patch = None if tokens.patch is None else tokens.patch.new_full(x.shape[:2], -1)
        return tokens.replace(x=torch.cat([tokens.x[:, : call.prefix], x], dim=1), patch=patch)


POOLING = Method("static", Pool(), "before", "floor", "Rao et al. 2021, Table 3")
