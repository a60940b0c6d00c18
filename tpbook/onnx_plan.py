"""What the blocks of a pruned model do while its graph is traced: counts are constants, or come from an input.

Chapter: :doc:`/book/explorer`
"""

import torch

from .methods.counts import StageCount, quiet_counts
from .methods.parts import Score
from .plan import Plan

BASE = 10_000  # a ratio is read as so many ten-thousandths


class Constant(Plan):
    """A `Plan` of one ratio: every count is a constant of the graph."""

    def counts(self, patches):
        return quiet_counts(patches, self.pruning.ratios, self.pruning.method)

    def entering(self, scores):
        """n of scores (B, n)."""
        return int(scores.shape[1])

    def order(self, scores, kept):
        """ONNX's TopK, unlike PyTorch's, puts the earlier of equal tokens first."""
        k = self.entering(scores) if self.pruning.method.reduce.ordered else kept
        return scores.topk(k, largest=not self.pruning.invert).indices  # (B, n) or (B, k)


class Knob(Constant):
    """A `Plan` whose ratio is an input: what is traced must hold for every ρ, so it never takes a short cut."""

    def counts(self, patches):
        return knob_counts(patches, self.keep_ratio * torch.ones(len(self.pruning.at)), self.pruning.method)

    def keeps_all(self, kept, n):
        return False

    def entering(self, scores):
        return scores.shape[1]

    def order(self, scores, kept):
        order, n = super().order(scores, kept), self.entering(scores)
        return torch.where(kept < n, order, torch.arange(n)[: order.shape[1]])


class Drawn(Score):
    """A `Score` whose draws are an input, `plan.random` (B, S, N)."""

    drawn = True

    def __init__(self, plan):
        self.plan = plan

    def __call__(self, call):
        return self.plan.random[:, call.stage, : call.x.shape[1]]


def knob_counts(patches, ratios, method):
    """`token_counts` in int64 tensors: N = `patches` and ratios (S,), or (S, R) for R knobs at once."""
    rule, n, counts = method.count, patches, []
    state = rule.start(patches)
    for part in (ratios * BASE).round().clamp(0, BASE).long():  # r, ten-thousandths
        state, kept = rule.step(state, n, part, BASE)
        kept = kept.clamp(min=1)
        leave = kept + (kept < n).long() * method.reduce.adds
        counts.append(StageCount(n, kept, leave))
        n = leave
    return counts


def one_more(similarity):
    """For p = 0 too, where ONNX Runtime's reductions give another shape: the function never sees less than one."""
    return lambda pruned, kept: similarity(torch.cat([pruned, kept[:, :1]], dim=1), kept)[:, :-1]
