"""Maps rebuilt from the tokens that a pruned model ends with, and how well patches are told apart on them.

Chapter: :doc:`/book/spatial-maps`
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import bootstrap

from ..tracing import to_grid, trace


@torch.inference_mode()
def rebuild(model, x):
    """Which patches are left, and a map for each way to fill the others.

    A token's last state before it was pruned is what enters its stage; the mean of the kept tokens is this book's own.

    Args:
        model: pruned.
        x: (B, C, H, W).

    Returns:
        (B, N) bool which patches are kept; (B, N) how many stages each lives through; dict: way → (B, N, C).
    """
    with trace(model) as t:
        model(x)

    def laid(fill):
        return to_grid(t.features, t, fill=fill).flatten(2).transpose(1, 2)  # (B, N, C)

    zero = laid("zero")
    N = zero.shape[1]
    lived = sum(torch.zeros(len(x), N + 1).scatter(1, patch % (N + 1), 1.0)[:, :N] for patch in t.kept)
    kept = lived == len(t.kept)
    mean = zero.sum(1, keepdim=True) / kept.sum(1)[:, None, None]
    ways = {"zero": zero, "mean of kept": torch.where(kept.unsqueeze(-1), zero, mean), "nearest kept": laid("nearest")}
    ways["last seen"] = laid("last_seen")
    if t.host:
        ways["host"] = laid("host")
    return kept, lived, ways


def precision(scores, truth):
    """Average precision of each image, in percent; equal scores share one threshold, as in scikit-learn's.

    Args:
        scores: (B, N) float.
        truth: (B, N) bool, at least one true in each image.

    Returns:
        (B,) array.
    """
    above = (scores.unsqueeze(1) >= scores.unsqueeze(2)).float()  # (B, N, N)
    at = (above @ truth.float().unsqueeze(2)).squeeze(2) / above.sum(2)
    return (100 * (at * truth).sum(1) / truth.sum(1)).numpy()


def spread(values, seed=0):
    """Half of the 95 % bootstrap interval of the mean over images, (n,) → float."""
    drawn = bootstrap((values,), np.mean, n_resamples=2000, method="percentile", random_state=seed)
    low, high = drawn.confidence_interval
    return (high - low) / 2


def recover(kept, ways, target):
    """How well each way recovers the dense model's tokens, at the pruned patches; "kept" at the kept ones.

    Args:
        kept, ways: as `rebuild` gives them.
        target: (B, N, C) final tokens of the dense model.

    Returns:
        dict: way → two (B,) arrays, means over an image's patches of the relative error, and of the cosine after the
        mean token is subtracted.
    """
    centre, found = target.mean((0, 1)), {}
    for way, maps in {"kept": ways["zero"], **ways}.items():
        at = kept if way == "kept" else ~kept
        error = (maps - target).norm(dim=-1) / target.norm(dim=-1)
        cosine = torch.cosine_similarity(maps - centre, target - centre, dim=-1)
        found[way] = [((v * at).sum(1) / at.sum(1)).numpy() for v in (error, cosine)]
    return found


def windows(kept, target, grid):
    """What a 3 × 3 kernel sees at the kept patches of a map whose other patches are zero.

    Args:
        kept: (B, N) bool, at least one an image.
        target: (B, N, C) tokens, of which the pruned ones are zeroed: missing neighbours are the only cause of error.
        grid: (rows, columns).

    Returns:
        dict of (B,) arrays: "kept" patches; of the kept ones "zero, %", neighbours that are zero, "alone, %", with no
        kept neighbour, "whole, %", with no pruned one; "error" of a 3 × 3 mean, relative, and "renormalised", where it
        is divided by the number of kept patches in the window; "cells empty, %", of 2 × 2 patches.
    """

    def laid(tokens):  # (B, N, C) → (B, C, rows, columns)
        return tokens.transpose(1, 2).unflatten(2, grid)

    def mean(x, inside=False):
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=not inside)

    def at_kept(values):
        return ((values * on).sum((1, 2, 3)) / on.sum((1, 2, 3))).numpy()

    def apart(y, z):
        return at_kept((y - z).norm(dim=1, keepdim=True) / z.norm(dim=1, keepdim=True))

    on, dense = laid(kept.float().unsqueeze(-1)), laid(target)
    full = (9 * mean(on)).round()  # kept positions in each window
    whole = full == (9 * mean(torch.ones_like(on))).round()
    zeroed = mean(dense * on)
    return {
        "kept": kept.sum(1).numpy(),
        "zero, %": 100 * at_kept((9 - full) / 8),
        "alone, %": 100 * at_kept((full == 1).float()),
        "whole, %": 100 * at_kept(whole.float()),
        "error": apart(zeroed, mean(dense)),
        "renormalised": apart(zeroed / mean(on).clamp(min=1e-6), mean(dense, inside=True)),
        "cells empty, %": 100 * (F.max_pool2d(on, 2) == 0).float().mean((1, 2, 3)).numpy(),
    }
