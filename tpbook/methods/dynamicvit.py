"""DynamicViT (Rao et al. 2021): a small network scores the tokens and learns to, end to end.

Before each pruned block (``PredictorLG`` and ``softmax_with_policy`` of the official code)::

    z = [MLP_loc(x) ; mean over living tokens of MLP_glob(x)],   π = LogSoftmax(MLP(z))       `ScorePredictor`
    training:   D ← D ⊙ GumbelSoftmax(π)_keep, straight through                                `sample`
                Ã_ij = exp(P_ij) G_ij / Σ_k exp(P_ik) G_ik,  G_ij = 1 if i = j else D_j        `keep_mask`
    inference:  the ⌊ρ₁⋯ρ_s·N⌋ tokens of the highest keep score stay, the others are dropped   `drop`

The paper calls "keep" index 1 of π; its code, and this file, index 0.

Chapter: :doc:`/book/dynamicvit`
"""

import torch
import torch.nn.functional as F
from torch import nn

from ..tokens import drop, retain
from .parts import Reduce, Score

KEEP = 0


class ScorePredictor(nn.Module):
    """Log-probabilities of keeping and dropping each token, laid out as the official `PredictorLG`.

    Args:
        dim: C, channels of a token.
    """

    def __init__(self, dim, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.in_conv = nn.Sequential(nn.LayerNorm(dim, **dd), nn.Linear(dim, dim, **dd), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(dim, dim // 2, **dd), nn.GELU(),
            nn.Linear(dim // 2, dim // 4, **dd), nn.GELU(),
            nn.Linear(dim // 4, 2, **dd), nn.LogSoftmax(dim=-1),
        )  # fmt: skip

    def forward(self, x, alive=None):
        """Score patch tokens.

        Args:
            x: (B, n, C) patch tokens.
            alive: (B, n) mask of the tokens that still count in the global half; None counts all.

        Returns:
            (B, n, 2) log-probabilities, index 0 = keep.
        """
        u = self.in_conv(x)  # (B, n, C)
        local, glob = u.chunk(2, dim=-1)  # (B, n, C/2) each
        if alive is None:
            glob = glob.mean(dim=1, keepdim=True)  # (B, 1, C/2)
        else:
            alive = alive.unsqueeze(-1)  # (B, n, 1)
            glob = (glob * alive).sum(dim=1, keepdim=True) / alive.sum(dim=1, keepdim=True)
        return self.out_conv(torch.cat([local, glob.expand_as(local)], dim=-1))


def sample(log_probs, alive):
    """Draw the running keep mask D by the straight-through Gumbel-softmax.

    An image that would be left without a token keeps its best living one.

    Args:
        log_probs: (B, n, 2), index 0 = keep.
        alive: (B, n), D before this stage.

    Returns:
        (B, n): D after this stage, zeros and ones with the gradient of the soft sample.
    """
    keep = F.gumbel_softmax(log_probs, hard=True)[..., KEEP] * alive  # (B, n)
    empty = keep.sum(dim=1, keepdim=True) < 0.5  # (B, 1)
    best = log_probs[..., KEEP].masked_fill(alive < 0.5, float("-inf")).argmax(dim=1)  # (B,)
    return keep + empty * F.one_hot(best, keep.shape[1])


class Predictor(Score):
    """`ScorePredictor`: the log-probability of keeping."""

    name, words, learned, distils = "predictor", "score: a small network", True, True

    def build(self, dim, **dd):
        """The network of one stage."""
        return ScorePredictor(dim, **dd)

    def __call__(self, call):
        return call.predictor(call.x, call.tokens.keep)[..., KEEP]

    def weights(self, scores):
        """The keep probability."""
        return scores.exp()

    def decide(self, call, invert):
        """In training: (B, n) scores, and D after this stage."""
        log_probs = call.predictor(call.x, call.tokens.keep)  # (B, n, 2)
        alive = call.tokens.keep if call.tokens.keep is not None else torch.ones_like(log_probs[..., KEEP])
        return log_probs[..., KEEP], sample(log_probs.flip(-1) if invert else log_probs, alive)

    def macs(self, enter, dim):
        half, quarter = dim // 2, dim // 4
        return enter * (dim * dim + dim * half + half * quarter + quarter * 2)


class Drop(Reduce):
    """The others are gone."""

    name, words, gone, ordered, padded = "drop", "the others are dropped", "dropped", False, True

    def __call__(self, tokens, order, kept, call):
        chosen = order[:, :kept]
        patch = None if tokens.patch is None else drop(tokens.patch, chosen)
        return tokens.replace(x=retain(tokens.x, chosen, call.prefix), patch=patch)

    def masked(self, tokens, keep, call):
        return tokens.replace(keep=keep)
