"""The slicing bound: as many tokens as a method keeps, at the same places, and nobody chooses.

Chapter: :doc:`/book/speed`
"""

import copy
from dataclasses import replace

from ..methods.choosing import Choice
from ..methods.parts import Reduce, Score
from ..plan import Plan


def sliced(model):
    """The slicing bound: what a pruned model's token counts cost if choosing were free.

    The engine runs it as it runs the model, with the method's places, counts and predictors. But at each stage the
    first n_s patch tokens stay, which is a slice, and a learned score is computed and ignored; no other is.

    Args:
        model: a model pruned by `tpbook.prune`, in eval mode. It stays as it is; its parameters are shared.

    Returns:
        The bound, a pruned model too.

    Raises:
        ValueError: the model removes no tokens, but has a fast path for them; or they come back, or each image has
            another number of them.
    """
    bound = copy_of(model)
    plan, pruning = bound._plan, bound.pruning
    if pruning.method.chooses.varies or pruning.method.reduce.rejoins:
        raise ValueError(f"model must be one whose token counts are known and fall, got one pruned by {pruning.name!r}")
    method = replace(pruning.method, score=Ignored(pruning.method.score), reduce=Slice(pruning.method.reduce))
    if not all(type(part) is Plan for part in plan.plans):
        raise ValueError(f"model must be one that removes tokens to have a slicing bound, got {type(model).__name__}")
    plan.adopt(replace(pruning, method=method))
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
    """The first tokens stay, as many as `reduce` would leave."""

    name, words, gone = "slice", "the last ones are cut off", "cut off"

    def __init__(self, reduce):
        self.adds, self.protects, self.least = reduce.adds, reduce.protects, reduce.least

    def __call__(self, tokens, order, kept, call):
        stay = kept + self.adds
        patch = None if tokens.patch is None else tokens.patch[:, :stay]
        return tokens.replace(x=tokens.x[:, : call.prefix + stay], patch=patch)


class Unranked(Plan):
    """The plan of a model that takes tokens as they come."""

    def choose(self, call, kept):
        return Choice(None, kept)


def copy_of(model):
    """A copy with the same parameters, so that no variant finds its weights colder than another."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})
