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

    number = int  # a size that is traced → a constant

    def rank(self, scores, k, others=False):
        """ONNX's TopK, unlike PyTorch's, puts the earlier of equal tokens first."""
        k = self.number(scores.shape[1] if others else k)
        return scores.topk(k, largest=not self.pruning.invert).indices  # (B, n) or (B, k)


class Knob(Constant):
    """A `Plan` whose ratio is an input: what is traced must hold for every ρ, so it never takes a short cut."""

    def counts(self, patches):
        return knob_counts(patches, self.keep_ratio * torch.ones(len(self.pruning.at)), self.pruning.method)

    def keeps_all(self, kept, n):
        return False

    def number(self, n):
        return n

    def choose(self, call, kept):
        choice, n = super().choose(call, kept), call.scores.shape[1]
        order = torch.where(kept < n, choice.order, torch.arange(n)[: choice.order.shape[1]])
        return choice._replace(order=order)


class Drawn(Score):
    """A `Score` whose draws are an input, `plan.random` (B, S, N)."""

    drawn = True

    def __init__(self, plan):
        self.plan = plan

    def __call__(self, call):
        return self.plan.random[:, call.stage, : call.x.shape[1]]


def knob_counts(patches, ratios, method):
    """`token_counts` in int64 tensors: N = `patches` and ratios (S,), or (S, R) for R knobs at once."""
    rule, reduce, n, added, counts = method.count, method.reduce, patches, 0, []
    state = rule.start(patches)
    for part in (ratios * BASE).round().clamp(0, BASE).long():  # r, ten-thousandths
        state, kept = rule.step(state, n - added, part, BASE)
        if reduce.least_ratio:  # else the rule says so itself
            kept = torch.where(part < BASE, kept, torch.as_tensor(n - added))
        kept = torch.maximum(kept, torch.as_tensor(reduce.least(n - added))) + added
        leave = kept + (kept < n).long() * reduce.adds
        counts.append(StageCount(n, kept, leave))
        added = added + (leave - kept) * int(reduce.protects)
        n = n if reduce.rejoins else leave
    return counts


def one_more(similarity):
    """For p = 0 too, where ONNX Runtime's reductions give another shape: the function never sees less than one."""
    return lambda pruned, kept: similarity(torch.cat([pruned, kept[:, :1]], dim=1), kept)[:, :-1]
