"""What a pruned block and a pruned model are: a class mixed in ahead of their own.

From block to block go `Tokens`; a `Plan`, which all blocks share, says what to do with them, and nothing of a forward
is kept on either.

Chapter: :doc:`/book/a-tour-of-keep-ratios`
"""

import functools
from dataclasses import replace

from .checks import check_keep, check_keep_ratio
from .methods.parts import Place
from .methods.schedule import check_r
from .record import close
from .tokens import Tokens, check_intact


class PrunedBlock:
    """Mixed into the class of each block from the first pruned one on, ahead of its own class."""

    def forward(self, x, *args, **kwargs):
        """(B, T, C) or `Tokens` → `Tokens`, or from the last block (B, P + n, C)."""
        plan, family, score = self._plan, self._plan.family, self._plan.pruning.method.score
        check_intact(x, Tokens)
        tokens = x if isinstance(x, Tokens) else plan.begin(x, self.training)
        if self._place is Place.BEFORE:
            tokens = plan.stage(self._stage, tokens, self._predictor, self.training)
        arguments = family.arguments(args, kwargs)
        if family.positioned:
            moved = tokens.patch is not tokens.host  # the same object until something is removed
            arguments = family.positions(arguments, tokens.patch if moved else None, plan.prefix)
        mask = plan.mask(tokens, self._hears, self.training)
        x = score.gate(tokens, family.attend(self, tokens, mask, arguments), "attention")
        tokens = tokens.replace(x=x, heard=None)
        if mask is not None:
            tokens = plan.listen(tokens, mask)
        if self._place is Place.BETWEEN:
            tokens = plan.stage(self._stage, tokens, self._predictor, self.training)
        tokens = tokens.replace(x=score.gate(tokens, family.transform(self, tokens, arguments), "mlp"))
        if not self._last:
            return family.wrap(tokens)
        out = plan.end(tokens)
        return family.wrap(close(plan, out) if self._closes else out)


class PrunedModel:
    """Mixed into the class of a pruned model, ahead of its own class. A family's mixin adds what its calls need."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        library = getattr(super(), "forward", None)
        if library is None:  # a family's mixin, not mixed in yet
            return
        pruned = cls.forward

        @functools.wraps(library)  # trainers read from the signature which arguments a model takes
        def forward(self, *args, **kwargs):
            return pruned(self, *args, **kwargs)

        cls.forward = forward

    def forward(self, *args, **kwargs):
        """What the model's own forward gives, with tokens removed."""
        if getattr(self, "_is_replica", False):  # of nn.DataParallel, which copies what is registered alone
            for block in self._plan.family.blocks(self):
                if block.__dict__.get("_predictor") is not None:
                    block.__dict__["_predictor"] = self._plan.family.predictors(self)[block._plan.first + block._stage]
        return super().forward(*args, **kwargs)

    @property
    def pruning(self):
        """The `Pruning` in force."""
        return self._plan.pruning

    @property
    def keep_ratio(self):
        """The keep ratio ρ, a float for every stage or a tuple of one a stage. Setting it checks it as `prune` does.

        None while `keep` or `r` is in force, or where tokens decide for themselves.
        """
        return self._plan.pruning.keep_ratio

    @keep_ratio.setter
    def keep_ratio(self, ratio):
        self._turn("keep_ratio", ratio, check_keep_ratio, len(self.pruning.at))

    def shares(self, decisions):
        """What a learned method trains towards: the share of the tokens to keep after each stage, of its decisions."""
        return self._plan.shares(decisions)

    @property
    def keep(self):
        """The number of patch tokens to keep, an int for every stage or a tuple of one a stage; None where ρ is set."""
        return self._plan.pruning.keep

    @keep.setter
    def keep(self, number):
        self._turn("keep", number, check_keep, [plan.patches for plan in self._plan.plans for _ in plan.pruning.at])

    @property
    def r(self):
        """How many patch tokens each stage removes, as `prune` takes it; None where something else says it."""
        return self._plan.pruning.r

    @r.setter
    def r(self, number):
        self._turn("r", number, check_r, len(self.pruning.at))

    def _turn(self, knob, value, check, stages):
        """Let `knob` alone say how many tokens stay: `check(value, stages)` of it; raises if it cannot be."""
        pruning = self.pruning
        if not pruning.method.chooses.counted:
            raise ValueError(
                f"{knob} must be left unset for {pruning.name}, whose tokens decide how many stay, got {value!r}"
            )
        if value is None:
            raise TypeError(f"{knob} must be numbers, got None: set another of keep_ratio, keep and r instead")
        self._plan.adopt(replace(pruning, **{"keep_ratio": None, "keep": None, "r": None, knob: check(value, stages)}))
