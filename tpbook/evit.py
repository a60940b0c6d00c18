"""EViT (Liang et al. 2022): the class token's attention scores the tokens; the inattentive ones are fused into one.

Between the attention and the MLP of each pruned block::

    a = mean over heads of softmax(q_cls Kᵀ / √d), in float32                     `class_attention`
    the ⌈ρ·n⌉ tokens of the highest a stay, and x_f = Σ_{i dropped} a_i x_i       `fuse`

a comes from a softmax over every token, the class token among them, so the weights of x_f sum to less than one:
it is a sum, not an average. Afterwards x_f is a token like any other: counted, scored, perhaps fused again.

In training the keep rate comes down slowly: κ(t) = ρ + (1 − ρ)·(1 + cos(π·t/T))/2                     `keep_rate`

Chapter: :doc:`/book/evit`
"""

import math

import torch

from .dynamicvit import HIDDEN, drop


def class_attention(attn, qkv, keep=None):
    """One row of the attention matrix: how much the class token, the first, looks at each token.

    Args:
        attn: the timm `Attention` that made `qkv`.
        qkv: (B, T, 3·H·D), the output of `attn.qkv`.
        keep: (B, T) mask of the tokens that count, or None for all.

    Returns:
        (B, T) float32, the mean over heads; prefix tokens included.
    """
    q, k, _ = qkv.reshape(*qkv.shape[:2], 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
    q, k = attn.q_norm(q[:, :, :1]).float() * attn.scale, attn.k_norm(k).float()
    row = q.flatten(0, 1).bmm(k.flatten(0, 1).transpose(1, 2)).view(*k.shape[:3])  # (B, H, T)
    if keep is not None:
        row = row + (keep + HIDDEN).log().unsqueeze(1)
    return row.float().softmax(dim=-1).mean(dim=1)


def fuse(x, order, kept, weights, first=0):
    """Keep the chosen tokens and append one that sums the others by their weight.

    Args:
        x: (B, P + n, C) tokens.
        order: (B, n) int64, positions among the n, those to keep before the others.
        kept: k, how many are kept.
        weights: (B, n), a.
        first: P, tokens that stay in any case.

    Returns:
        (B, P + k + 1, C): the first P, the kept tokens in their order, the fused one; without that where k = n.
    """
    ordered, others = drop(x, order, first), order[:, kept:]  # (B, n, C), (B, n − k)
    fused = weighted_sum(ordered[:, kept:], drop(weights, others))[:, : others.shape[1]]
    return torch.cat([x[:, :first], ordered[:, :kept], fused], dim=1)


def weighted_sum(x, weights):
    """x_f = Σ_i a_i x_i, in float32: (B, p, C) tokens and (B, p) weights to (B, 1, C)."""
    return weights.unsqueeze(1).bmm(x.float()).to(x.dtype)


def keep_rate(epoch, ratio, start, length):
    """The keep rate while it is warmed up (`adjust_keep_rate` of the official code); eTPS takes it over.

    Args:
        epoch: where training is, in epochs; fractions count steps.
        ratio: ρ to arrive at, a float or a tuple of one a stage.
        start, length: epochs; every token stays until `start`, ρ is reached at `start + length`.

    Returns:
        What to set `model.keep_ratio` to.
    """
    if isinstance(ratio, tuple):
        return tuple(keep_rate(epoch, r, start, length) for r in ratio)
    if epoch < start:
        return 1.0
    if epoch >= start + length:
        return ratio
    return ratio + (1 - ratio) * (1 + math.cos(math.pi * (epoch - start) / length)) / 2
