"""Models that hold another library's model and call it as it is: that one is what gets pruned.

The wrapper shares its plan, so `keep_ratio`, `keep` and `pruning` of either are the same.
"""

from copy import deepcopy

from ..pruned import PrunedModel
from .family import Family
from .registry import family_of


class PrunedWrapper(PrunedModel):
    """Mixed into the class of a wrapper whose model is pruned."""

    def forward(self, *args, **kwargs):
        """The wrapper's own; what has to know of removed tokens is the model inside."""
        return super(PrunedModel, self).forward(*args, **kwargs)


class Wrapper(Family):
    """Base of families of wrappers. What is asked of the model is asked of the one inside."""

    mixin = PrunedWrapper
    held: str  # the attribute that holds the model

    def inside(self, model):
        return getattr(model, self.held)

    def refusal(self, model):
        try:
            family_of(self.inside(model))
        except TypeError as why:
            return f"holds a model in its {self.held} that cannot be pruned: {why}"
        return None

    def resized(self, model, size):
        inside = self.inside(model)
        resized = family_of(inside).resized(inside, size)
        if resized is inside:
            return model
        model = deepcopy(model)
        setattr(model, self.held, resized)
        return model


def _asked_inside(name):
    def ask(self, model, *args):
        inside = self.inside(model)
        return getattr(family_of(inside), name)(inside, *args)

    return ask


for _name in ("blocks", "norm", "prefix", "grid", "width", "segments", "patches", "has_class_token", "class_logits",
              "distilled", "channels", "image_size", "patch_size", "embedding", "embeddings", "embed_macs",
              "patch_macs", "head_macs"):  # fmt: skip
    setattr(Wrapper, _name, _asked_inside(_name))
