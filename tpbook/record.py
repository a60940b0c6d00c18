"""What a forward writes down for whoever traces it.

Chapter: :doc:`/book/a-tour-of-keep-ratios`
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from .tokens import Tokens


class Seen(NamedTuple):
    """What one stage adds to a record: those of the lists below that apply to it."""

    scores: Tensor
    kept: Tensor | None
    host: Tensor | None
    decisions: Tensor | None
    entered: Tensor
    sizes: Tensor | None = None


@dataclass
class Trace:
    """What the last forward inside `tpbook.trace` did. Lists that do not apply are empty.

    B images, N patches at the input, n tokens entering a stage, n_s patch tokens leaving stage s.
    """

    kept: list[Tensor] = field(default_factory=list)
    """One (B, n_s) int64 a stage, the original patch of each surviving token, in token order; −1 for a fused token, −2
    where an image keeps fewer than others of its batch."""
    host: list[Tensor] = field(default_factory=list)
    """Where tokens are squeezed, merged or clustered, one (B, N) int64 a stage, the original patch whose token now
    carries each patch; itself for kept ones."""
    sizes: list[Tensor] = field(default_factory=list)
    """Where tokens merge, one (B, n_s) float32 a stage, how many patches each surviving token stands for."""
    scores: list[Tensor] = field(default_factory=list)
    """One (B, n) a stage, what the choice was made on, in the token order entering the stage."""
    decisions: list[Tensor] = field(default_factory=list)
    """Training a learned method, one (B, N) a stage, straight-through keep masks, cumulative, with gradient."""
    visible: Tensor | None = None
    """(B, n) int64, the patches that a masked model saw, in token order; None where it saw all."""
    features: Tensor | None = None
    """(B, n, C), the final patch tokens after the last norm, for distillation."""
    whole: bool = False
    """Whether no stage decided on the map that `features` are of, so that all of them count."""
    entered: list[Tensor] = field(default_factory=list)
    """One (B, n, C) a stage, the patch tokens that entered it, before any norm."""
    state: tuple | None = None
    """What a part of the method remembered at the end of the last map, with gradient: a NamedTuple that its file
    describes, as `methods.avit.Halted`; None where none remembers anything."""
    grid: tuple = ()
    """(rows, columns) of the N patches of an image of the model's own size."""
    norm: object = field(default=None, repr=False)
    """What brings the tokens of `entered` to the scale of `features`: the last norm."""

    def fill(self, record, first=0, state=None):
        """Write down one `Seen` a stage, from stage `first` on, and what a part remembered at the end.

        Stage 0 replaces what an earlier forward left.
        """
        self.state = state
        if not first:
            self.scores, self.kept, self.host, self.decisions, self.entered = [], [], [], [], []
            self.sizes = []
        self.scores = self.scores + [seen.scores for seen in record]  # spelt out: the compiler follows no `getattr`
        self.kept = self.kept + [seen.kept for seen in record if seen.kept is not None]
        self.host = self.host + [seen.host for seen in record if seen.host is not None]
        self.decisions = self.decisions + [seen.decisions for seen in record if seen.decisions is not None]
        self.entered = self.entered + [seen.entered for seen in record]
        self.sizes = self.sizes + [seen.sizes for seen in record if seen.sizes is not None]


class Traced:
    """Mixed into the class of the last norm, ahead of its own class."""

    def forward(self, x, *args, **kwargs):
        """What the norm gives, or hands on of `Tokens`."""
        if isinstance(x, Tokens):
            gone = None if x.gone is None else super().forward(x.gone, *args, **kwargs)
            return close(self._plan, x.replace(x=super().forward(x.x, *args, **kwargs), gone=gone))
        return close(self._plan, super().forward(x, *args, **kwargs))


def close(plan, y):
    """The final sequence (B, P + n, C), or `Tokens` of it: noted, and handed on to what comes after it."""
    if plan.trace is not None:
        plan.trace.features = (y.x if isinstance(y, Tokens) else y)[:, plan.prefix :]
        plan.trace.whole = not plan.decides
    return plan.family.hand_on(y, plan) if isinstance(y, Tokens) else y


class Listening:
    """In the place of a `Plan` while a model that is not pruned is traced."""

    decides = False

    def __init__(self, prefix):
        self.prefix, self.trace = prefix, None

    def __getstate__(self):
        return {**self.__dict__, "trace": None}  # a copy of the model is not looked at
