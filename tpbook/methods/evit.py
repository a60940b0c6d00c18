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
import torch.nn.functional as F

from ..attention import heard
from ..checks import check_flag, check_name
from ..kernels import stage_kernels
from ..tokens import drop, in_float32
from .dynamicvit import Drop
from .parts import Reduce, Score


def class_attention(q, k, scale, keep=None):
    """One row of the attention matrix: how much the class token, the first, looks at each token.

    Args:
        q, k: (B, H, T, D), queries and keys of an attention.
        scale: usually 1 / √D.
        keep: (B, T) mask of the tokens that count, or None for all.

    Returns:
        (B, T) float32, the mean over heads; prefix tokens included.
    """
    return heard(q[:, :, :1], k, scale, keep=keep)


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
    if kept < order.shape[1] and (kernels := stage_kernels(x, weights)):
        return kernels.collect(x, order, kept, first, weights)
    ordered, others = drop(x, order, first), order[:, kept:]  # (B, n, C), (B, n − k)
    fused = weighted_sum(ordered[:, kept:], drop(weights, others))[:, : others.shape[1]]
    return torch.cat([x[:, :first], ordered[:, :kept], fused], dim=1)


@in_float32
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


class ClassAttention(Score):
    """The class token's row of the attention that has just run."""

    name, words, queries = "class_attention", "score: the class token's attention", "class"

    def __call__(self, call):
        return call.heard


class Fuse(Reduce):
    """The others are summed into one token, weighed by the class token's attention; `fuse=False` drops them.

    Args:
        weights: "attention", or "score": then what is weighed is the score, of a predictor the keep probability p, and
            the sum Σ p_i x_i stays in the sequence as it is to the end, one more at every stage. It is the package
            token of SPViT (Kong et al. 2022), which has another predictor besides.
    """

    name, words, gone = "fuse", "the others are summed into one new token", "fused"
    adds, options = 1, ("fuse", "fuse_weights")

    def __init__(self, weights="attention"):
        check_name("fuse_weights", weights, ("attention", "score"))
        self.queries, self.protects = ("class", False) if weights == "attention" else (None, True)

    def configure(self, fuse=True, fuse_weights="attention"):
        check_flag("fuse", fuse)
        own = Fuse(fuse_weights)
        if not (fuse or own.queries):
            raise ValueError(f"fuse_weights must be left unset where fuse=False, got {fuse_weights!r}")
        return own if fuse else Drop()

    def weights(self, call):
        """(B, n), what weighs a token in the sum."""
        return call.heard if self.queries else call.score.weights(call.scores)

    def __call__(self, tokens, order, kept, call):
        x = fuse(tokens.x, order, kept, self.weights(call), call.prefix)
        patch = tokens.patch
        if patch is not None:  # −1 is the fused token's, if there is one
            patch = drop(patch, order[:, :kept])
            patch = F.pad(patch, (0, x.shape[1] - call.prefix - patch.shape[1]), value=-1)
        return tokens.replace(x=x, patch=patch)

    def masked(self, tokens, keep, call):
        alive = torch.ones_like(keep) if tokens.keep is None else tokens.keep
        fused = weighted_sum(call.x, self.weights(call) * alive * (1 - keep))  # (B, 1, C)
        return tokens.replace(
            x=torch.cat([tokens.x, fused], dim=1), patch=F.pad(tokens.patch, (0, 1), value=-1),
            keep=F.pad(keep, (0, 1), value=1.0),
        )  # fmt: skip

    def macs(self, enter, kept, dim):
        return (enter - kept) * dim
