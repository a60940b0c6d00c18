"""The slicing bound: as many tokens as a method keeps, at the same places, and nobody chooses.

Chapter: :doc:`/book/speed`
"""

import copy
from dataclasses import replace

import torch

from ..methods.choosing import Choice, TopK
from ..methods.parts import Reduce, Score
from ..plan import Plan


def sliced(model, keep=None):
    """The slicing bound: what a pruned model's token counts cost if choosing were free.

    The engine runs it as it runs the model, with the method's places, counts and predictors. But at each stage the
    first n_s patch tokens stay, which is a slice, and a learned score is computed and ignored; no other is. Where
    tokens come back, those that were cut off are put behind the others.

    Args:
        model: a model pruned by `tpbook.prune`, in eval mode. It stays as it is; its parameters are shared.
        keep: how many patch tokens stay at each stage, where no keep ratio says it, but each image.

    Returns:
        The bound, a pruned model too.

    Raises:
        ValueError: the model removes no tokens, but has a fast path for them; or each image has another number of
            them, and `keep` is not given.
    """
    bound = copy_of(model)
    plan, pruning = bound._plan, bound.pruning
    if pruning.method.chooses.varies and keep is None:
        raise ValueError(f"model must be one whose token counts are known, got one pruned by {pruning.name!r}")
    if not all(type(part) in (Plan, Unranked) for part in plan.plans):
        raise ValueError(f"model must be one that removes tokens to have a slicing bound, got {type(model).__name__}")
    score, reduce = Ignored(pruning.method.score), Slice(pruning.method.reduce)
    pruning = replace(pruning, method=replace(pruning.method, score=score, reduce=reduce, choose=TopK()))
    plan.adopt(pruning if keep is None else replace(pruning, keep_ratio=None, r=None, keep=tuple(keep)))
    for part in plan.plans:
        part.__class__ = Unranked
    return bound


class Ignored(Score):
    """A score that is not looked at; computed where it is learned, since the network is part of the model."""

    name, words = "ignored", "score: none"

    def __init__(self, score):
        self.score, self.learned = score, score.learned

    def __call__(self, call):
        return self.score(call) if self.learned else None


class Slice(Reduce):
    """The first tokens stay, as many as `reduce` would leave, and come back where it lets them."""

    name, words, gone = "slice", "the last ones are cut off", "cut off"

    def __init__(self, reduce):
        self.adds, self.protects, self.least, self.rejoins = reduce.adds, reduce.protects, reduce.least, reduce.rejoins
        self.last = getattr(reduce, "rejoin_last", True)

    def __call__(self, tokens, order, kept, call):
        stay = kept + self.adds
        patch = None if tokens.patch is None else tokens.patch[:, :stay]
        state = (tokens.x[:, call.prefix + stay :], tokens.patch[:, stay:]) if self.rejoins else tokens.state
        return tokens.replace(x=tokens.x[:, : call.prefix + stay], patch=patch, state=state)

    def rejoin(self, tokens, prefix, last=False):
        if not self.rejoins or tokens.state is None or (last and not self.last):
            return tokens
        x, patch = tokens.state
        x, patch = torch.cat([tokens.x, x], dim=1), torch.cat([tokens.patch, patch], dim=1)
        return tokens.replace(x=x, patch=patch, state=None)


class Unranked(Plan):
    """The plan of a model that takes tokens as they come."""

    def choose(self, call, kept):
        return Choice(None, kept)


def copy_of(model):
    """A copy with the same parameters, so that no variant finds its weights colder than another."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})
