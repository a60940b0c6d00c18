"""TPS, Token Pruning & Squeezing (Wei et al. 2023): pruned tokens live on in their most similar kept token.

After the choice, with reserved tokens S^r and pruned tokens S^p (``TPSModule`` of the official code)::

    c_ij = x_i·x_j / (‖x_i‖ ‖x_j‖),    host(i) = argmax_{j ∈ S^r} c_ij                       matching
    Z_j = e + Σ_{i: host(i)=j} exp(c_ij)
    y_j = (e / Z_j) x_j + Σ_{i: host(i)=j} (exp(c_ij) / Z_j) x_i                             fusing

A host weighs itself as if c_jj = 1, so never less than any guest. Every pruned token has one host, so the sums add rows
to rows; the (n, n) mask of the paper is never built. All of it is float32, whatever the model's dtype.

Chapter: :doc:`/book/tps`
"""

import math

import torch
from torch.linalg import vector_norm

from .dynamicvit import rows


def cosine(x, y):
    """(B, p, C), (B, k, C) → (B, p, k) cosine of every pair, in [−1, 1]."""
    x = x / (vector_norm(x, dim=-1, keepdim=True) + 1e-6)  # before the product, which half precision could not hold
    return x @ y.transpose(-2, -1) / (vector_norm(y, dim=-1) + 1e-6).unsqueeze(-2)


def euclidean(x, y):
    """(B, p, C), (B, k, C) → (B, p, k): 1 − ‖x − y‖ / (‖x‖ + ‖y‖), in [0, 1]; 1 for equal tokens."""
    scale = vector_norm(x, dim=-1).unsqueeze(2) + vector_norm(y, dim=-1).unsqueeze(1) + 1e-6
    return 1 - torch.cdist(x, y) / scale


SIMILARITIES = {"cosine": cosine, "euclidean": euclidean}


def squeeze(kept, pruned, similarity=cosine):
    """Squeeze pruned tokens into their hosts.

    Args:
        kept: (B, k, C) reserved tokens.
        pruned: (B, p, C) pruned tokens.
        similarity: (B, p, C), (B, k, C) → (B, p, k), at most 1.

    Returns:
        (B, k, C) squeezed tokens and (B, p) int64 hosts, positions in `kept`.
    """
    dtype, kept, pruned = kept.dtype, kept.float(), pruned.float()
    c, host = similarity(pruned, kept).max(dim=-1)  # (B, p) each
    return fuse_guests(kept, pruned, c.float().exp(), host).to(dtype), host


def squeeze_masked(x, before, after, similarity=cosine):
    """Squeeze without removing rows, for training: the decisions weigh what the gather would remove.

    The tokens pruned at this stage, `before · (1 − after)`, are squeezed into those that stay; every other row
    passes through unchanged. With zeros and ones it equals `squeeze`, and gradient reaches the decisions.

    Args:
        x: (B, n, C) tokens.
        before: (B, n) keep mask before this stage.
        after: (B, n) keep mask after it.
        similarity: as in `squeeze`.

    Returns:
        (B, n, C) tokens and (B, n) int64 hosts, positions in x (itself for tokens not pruned at this stage).
    """
    dtype, x = x.dtype, x.float()
    c = similarity(x, x).masked_fill((after < 0.5).unsqueeze(1), float("-inf"))  # (B, n, n): columns that stay
    c, host = c.max(dim=-1)  # (B, n) each
    pruned = before * (1 - after)  # (B, n)
    squeezed = fuse_guests(x, x, c.float().exp() * pruned, host).to(dtype)
    itself = torch.arange(x.shape[1], device=x.device).expand_as(host)
    return squeezed, torch.where(pruned > 0.5, host, itself)


def fuse_guests(kept, pruned, weight, host):
    """y_j of the equation above: float32 kept (B, k, C), pruned (B, p, C), weight and host (B, p) → (B, k, C)."""
    total = torch.full_like(kept[:, :, 0], math.e).scatter_add(1, host, weight)  # Z (B, k)
    guests = (weight.unsqueeze(-1) * pruned).flatten(0, 1)  # (B·p, C)
    y = (math.e * kept).flatten(0, 1).index_add_(0, rows(host, kept.shape[1]).flatten(), guests).view_as(kept)
    return y / total.unsqueeze(-1)
