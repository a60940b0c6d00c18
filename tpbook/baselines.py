"""What knows nothing of the image: random and static scores, and pooling; a learned choice has to beat them.

Chapter: :doc:`/book/a-tour-of-keep-ratios`
"""

import torch
import torch.nn.functional as F


def random_scores(batch, n, *, device, generator=None):
    """(B, n) float32, uniform in [0, 1): every set of tokens is equally likely to be kept."""
    chance = {} if generator is None else {"generator": generator}  # torch.compile cannot trace generator=None
    return torch.rand(batch, n, device=device, **chance)


def static_scores(grid, device=None):
    """The same choice for every image: patches nearer to the image centre score higher.

    Photographers put their subject in the middle, so this is the strongest choice that needs neither the image nor
    training. (DynamicViT's "static" row learns its positions; this one has nothing to learn.)

    Args:
        grid: (rows, columns) of patches.

    Returns:
        (N,) float32, minus the distance to the centre in patches.
    """
    rows, columns = (torch.arange(n, device=device) - (n - 1) / 2 for n in grid)
    return -(rows[:, None] ** 2 + columns[None, :] ** 2).sqrt().flatten()


def pool(model, at):
    """Average 2 × 2 neighbouring patch tokens into one before block `at`: DynamicViT's "structural" downsampling.

    Args:
        model: a timm `VisionTransformer`, not pruned or masked, whose patches form an even grid.
        at: block index.

    Returns:
        A handle whose `remove()` undoes it.

    Raises:
        ValueError: `at` is no block, or the grid does not halve.
    """
    rows, columns = model.patch_embed.grid_size
    if not 0 <= at < len(model.blocks):
        raise ValueError(f"at must be a block from 0 to {len(model.blocks) - 1}, got {at}")
    if rows % 2 or columns % 2:
        raise ValueError(f"model must have an even grid of patches to pool, got {rows} × {columns}")

    def halve(block, args):  # args[0] (B, P + N, C)
        before, x = args[0].split([model.num_prefix_tokens, rows * columns], dim=1)
        x = F.avg_pool2d(x.transpose(1, 2).unflatten(2, (rows, columns)), 2)  # (B, C, rows/2, columns/2)
        return torch.cat([before, x.flatten(2).transpose(1, 2)], dim=1), *args[1:]

    return model.blocks[at].register_forward_pre_hook(halve)
