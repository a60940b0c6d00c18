"""Who stays, by the scores: the part `choose` of a method (`parts.py`), and the two ways that several papers share.

Chapter: :doc:`/book/a-count-for-each-image`
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Choice(NamedTuple):
    """Who stays."""

    order: Tensor | None  # (B, n) int64, positions of the patch tokens, those to keep first; (B, k) where that will do
    kept: int  # k; where images keep different numbers, the most
    alive: Tensor | None = None  # (B, k) bool, where they do: which of the first k are kept, the others are padding


class Choose:
    """Who stays, by the scores."""

    name: str
    words = ""  # of a diagram, after how many are kept, where those are not the best
    varies = False  # whether an image decides how many it keeps, so that they cannot be counted without it
    inverts = True  # whether `invert` has a meaning
    counted = True  # whether it keeps as many as it is told, so that a keep ratio has a meaning

    def __call__(self, call, kept, rank, others):
        """Choose.

        Args:
            call: `Call`, with the scores.
            kept: how many tokens, by the count rule.
            rank: (B, n) scores, k, whether all are wanted → (B, k) or (B, n) int64, the positions of the best first.
            others: whether the positions of those that go are wanted too.

        Returns:
            `Choice`.
        """
        raise NotImplementedError


class TopK(Choose):
    """The best ones."""

    name = "topk"

    def __call__(self, call, kept, rank, others):
        return Choice(rank(call.scores, kept, others), kept)


class Above(Choose):
    """Those whose score is above the score's `threshold`, in their order.

    Args:
        least: how many an image keeps in any case, its best ones.
    """

    name, words = "above", "keep those above a threshold"
    varies, inverts, counted = True, False, False

    def __init__(self, least=0):
        self.least = least

    @torch.no_grad()
    def __call__(self, call, kept, rank, others):
        scores, keep = call.scores, call.tokens.keep
        if keep is not None:
            scores = scores.masked_fill(keep < 0.5, float("-inf"))
        alive = scores > call.score.threshold  # (B, n)
        if self.least:
            best = scores.topk(self.least, dim=1).indices
            alive = alive.scatter(1, best, torch.ones_like(best, dtype=torch.bool))
        number = alive.sum(dim=1)  # (B,)
        longest = max(1, int(number.max()))  # a sequence of none is none
        order = (~alive).to(torch.uint8).argsort(dim=1, stable=True)
        alive = torch.arange(longest, device=order.device) < number.unsqueeze(1)  # (B, k)
        return Choice(order if others else order[:, :longest], longest, None if alive.all() else alive)
