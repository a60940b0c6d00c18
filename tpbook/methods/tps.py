"""TPS, Token Pruning & Squeezing (Wei et al. 2023): pruned tokens live on in their most similar kept token.

After the choice, with reserved tokens S^r and pruned tokens S^p (``TPSModule`` of the official code)::

    c_ij = x_i·x_j / (‖x_i‖ ‖x_j‖),    host(i) = argmax_{j ∈ S^r} c_ij                       matching
    Z_j = e + Σ_{i: host(i)=j} exp(c_ij)
    y_j = (e / Z_j) x_j + Σ_{i: host(i)=j} (exp(c_ij) / Z_j) x_i                             fusing

A host weighs itself as if c_jj = 1, so never less than any guest. Every pruned token has one host, so the sums add rows
to rows; the (n, n) mask of the paper is never built. What is computed is divided by e above and below: then a host
weighs 1, and is not multiplied. All of it is float32, whatever the model's dtype.

Chapter: :doc:`/book/tps`
"""

import torch
from torch.linalg import vector_norm

from ..kernels import stage_kernels
from ..tokens import drop, in_float32, move, rows
from .parts import Reduce


def cosine(x, y):
    """(B, p, C), (B, k, C) → (B, p, k) cosine of every pair, in [−1, 1]."""
    x = x / (vector_norm(x, dim=-1, keepdim=True) + 1e-6)  # before the product, which half precision could not hold
    return x @ y.transpose(-2, -1) / (vector_norm(y, dim=-1) + 1e-6).unsqueeze(-2)


def euclidean(x, y):
    """(B, p, C), (B, k, C) → (B, p, k): 1 − ‖x − y‖ / (‖x‖ + ‖y‖), in [0, 1]; 1 for equal tokens."""
    scale = vector_norm(x, dim=-1).unsqueeze(2) + vector_norm(y, dim=-1).unsqueeze(1) + 1e-6
    return 1 - torch.cdist(x, y) / scale


NONE = -100.0  # similarity to a token that cannot be a host; finite, since a lone token that stays has no other
SIMILARITIES = {"cosine": cosine, "euclidean": euclidean}


@in_float32
def squeeze(kept, pruned, similarity=cosine):
    """Squeeze pruned tokens into their hosts.

    Args:
        kept: (B, k, C) reserved tokens.
        pruned: (B, p, C) pruned tokens.
        similarity: (B, p, C), (B, k, C) → (B, p, k), at most 1.

    Returns:
        (B, k, C) squeezed tokens and (B, p) int64 hosts, positions in `kept`.
    """
    return squeeze_others(torch.cat([kept, pruned], dim=1), kept.shape[1], similarity)


@in_float32
def squeeze_others(x, kept, similarity=cosine):
    """`squeeze` of tokens (B, k + p, C) in one piece, of which the first k = `kept` are reserved."""
    dtype, x = x.dtype, x.float()
    c, host = closest(x, kept, similarity)  # (B, p) each
    return fuse_guests(x, kept, x[:, kept:], (c - 1).exp(), host).to(dtype), host


def squeeze_at(x, order, kept, first=0, similarity=cosine):
    """`squeeze` of x (B, P + n, C) by order (B, n) int64 of the n, hosts first: (B, P + k, C) and hosts (B, p)."""
    if similarity is cosine and (kernels := stage_kernels(x)):
        return kernels.squeeze(x, order, kept, first)
    left, host = squeeze_others(drop(x, order, first), kept, similarity)
    return torch.cat([x[:, :first], left], dim=1), host


def closest(x, kept, similarity):
    """The similarity c of each other token to its host, one of the first `kept` in float32 x (B, n, C): (B, p) each."""
    if similarity is not cosine:
        c, host = similarity(x[:, kept:], x[:, :kept]).max(dim=-1)
        return c.float(), host
    length = vector_norm(x, dim=-1) + 1e-6  # (B, n); its own is the same for every host
    c, host = (x[:, kept:] @ x[:, :kept].transpose(1, 2) / length[:, None, :kept]).max(dim=-1)
    return c / length[:, kept:], host


@in_float32
def squeeze_masked(x, before, after, similarity=cosine):
    """Squeeze without removing rows, for training: the decisions weigh what the gather would remove.

    The tokens pruned at this stage, p_i = `before · (1 − after)`, are squeezed into those that stay; every other row
    passes through unchanged. With zeros and ones it equals `squeeze`. The decisions get the gradient that the official
    code gives them, whose guests weigh::

        w_i = p_i exp(p_i c_i),   c_i = max over the j ≠ i that stay of c_ij,   ∂w_i/∂p_i = (1 + p_i c_i) exp(p_i c_i)

    so a token that stays is asked what would be if it joined its best *other* host, with weight 1.

    Args:
        x: (B, n, C) tokens.
        before: (B, n) keep mask before this stage.
        after: (B, n) keep mask after it.
        similarity: as in `squeeze`.

    Returns:
        (B, n, C) tokens and (B, n) int64 hosts, positions in x (itself for tokens not pruned at this stage).
    """
    dtype, x = x.dtype, x.float()
    itself = torch.arange(x.shape[1], device=x.device)
    barred = torch.eye(x.shape[1], dtype=torch.bool, device=x.device) | (after < 0.5).unsqueeze(1)  # (B, n, n)
    c, host = similarity(x, x).masked_fill(barred, NONE).max(dim=-1)  # (B, n) each
    pruned = before * (1 - after)  # (B, n)
    squeezed = fuse_guests(x, x.shape[1], x, pruned * (pruned * c.float() - 1).exp(), host).to(dtype)
    return squeezed, torch.where(pruned > 0.5, host, itself)


def fuse_guests(x, kept, pruned, weight, host):
    """y_j of the equation above.

    Args:
        x: (B, n, C) float32, whose first k = `kept` are the hosts.
        pruned: (B, p, C) float32, the guests.
        weight: (B, p), exp(c) / e.
        host: (B, p) int64, positions in x.

    Returns:
        (B, k, C).
    """
    total = torch.ones_like(x[:, :kept, 0]).scatter_add(1, host, weight)  # Z / e (B, k)
    guests = (weight.unsqueeze(-1) * pruned).flatten(0, 1)  # (B·p, C)
    y = x.flatten(0, 1).index_add(0, rows(host, x.shape[1]).flatten(), guests).view_as(x)
    return y[:, :kept] / total.unsqueeze(-1)


class Squeeze(Reduce):
    """Each of the others joins the kept token most similar to it.

    Args:
        similarity: a name in `SIMILARITIES`, or a function (B, p, C), (B, k, C) → (B, p, k) that is at most 1.
    """

    name, words, gone = "squeeze", "each of the others goes to the most similar", "squeezed into"
    hosts, options = True, ("similarity",)
    distils, token_loss = True, "kl"

    def __init__(self, similarity="cosine"):
        if not callable(similarity):
            if not isinstance(similarity, str) or similarity not in SIMILARITIES:
                there = ", ".join(SIMILARITIES)
                raise ValueError(f"similarity must be one of {there} or a function, got {similarity!r}")
            similarity = SIMILARITIES[similarity]
        self.similarity = similarity

    def configure(self, similarity="cosine"):
        return Squeeze(similarity)

    def __call__(self, tokens, order, kept, call):
        x, patch, host = tokens.x, tokens.patch, tokens.host
        left, guest_of = squeeze_at(x, order, kept, call.prefix, self.similarity)
        if patch is not None:
            ids = drop(patch, order[:, :kept])
            host = move(host, patch, order[:, kept:], drop(ids, guest_of))
            patch = ids
        return tokens.replace(x=left, patch=patch, host=host)

    def masked(self, tokens, keep, call):
        alive = torch.ones_like(keep) if tokens.keep is None else tokens.keep
        x, to = squeeze_masked(call.x, alive, keep, self.similarity)
        everyone = torch.arange(x.shape[1], device=x.device).expand_as(to)
        return tokens.replace(
            x=torch.cat([tokens.x[:, : call.prefix], x], dim=1), keep=keep,
            host=move(tokens.host, tokens.patch, everyone, drop(tokens.patch, to)),
        )  # fmt: skip

    def macs(self, enter, kept, dim):
        return (enter - kept) * kept * dim  # the similarity of every pair
