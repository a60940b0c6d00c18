"""Scores that know nothing of the image: what a learned or attention-based choice has to beat."""

import torch


def random_scores(batch, n, *, device, generator=None):
    """(B, n) float32, uniform in [0, 1): every set of tokens is equally likely to be kept."""
    return torch.rand(batch, n, device=device, generator=generator)


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
