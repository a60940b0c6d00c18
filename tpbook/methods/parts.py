"""What a method is made of. No other file compares the name of a part: whoever has to know something asks the part.

    score    how much a token matters                        `Score`
    reduce   what becomes of the tokens that are not kept     `Reduce`
    place    where in a block                                 `Place`
    count    how many tokens a stage keeps                    `tpbook.methods.counts`

A new method is a file with the parts that are new, and a line in `METHODS`.

Chapter: :doc:`/book/notation`
"""

import enum
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from ..tokens import Tokens
from .counts import COUNTS, CountRule


class Place(enum.StrEnum):
    """Where in block i a stage stands."""

    BEFORE = "before"
    BETWEEN = "between"  # its attention and its MLP


class Call(NamedTuple):
    """What a part is given of the stage that calls it."""

    tokens: Tokens
    x: Tensor  # (B, n, C), the patch tokens of `tokens.x`
    prefix: int  # P
    stage: int  # s, from 0
    predictor: nn.Module | None
    grid: tuple | None  # (rows, columns) of the N patches
    seed: int | None
    skip: int  # how many tokens of an image entered the stages before this one

    @property
    def heard(self):
        """(B, n), what the attention let hear of the patch tokens."""
        return self.tokens.heard[:, self.prefix :]


class Score:
    """How much each token matters: `score(call) -> (B, n)`, higher stays."""

    name: str
    words: str  # of a diagram: "score: …"
    queries = None  # whose rows of the attention it reads: "class", "all", or None for none
    placed = False  # whether it needs to know which patch a token is, and the grid
    drawn = False  # whether it is drawn at random
    settled = False  # whether of equal scores, which are many, the earlier token must go first
    learned = False  # whether it has a predictor: then `build(dim)` makes it and `decide` trains it
    distils = False  # whether its paper trains with a teacher

    def __call__(self, call):
        """(B, n) scores, in float32 unless the model's dtype is all there is."""
        raise NotImplementedError

    def macs(self, enter, dim):
        """MACs of scoring `enter` tokens of `dim` channels; what the attention costs is counted beside it."""
        return 0


class Reduce:
    """What becomes of the tokens that are not kept."""

    name: str
    words: str  # of a diagram: "the others are …"
    gone: str  # what the explorer calls such a token
    queries = None  # as of `Score`, where it weighs by the attention
    adds = 0  # how many tokens more than are kept leave a stage
    hosts = False  # whether patches go on being carried by other tokens
    ordered = True  # whether it needs the tokens that are not kept, after those that are
    options = ()  # what `configure` takes
    distils = False  # as of `Score`
    token_loss = "mse"  # of `losses.TOKEN`: how its paper distils tokens, where the score is learned

    def configure(self, **options):
        """The reduction with other options of `tpbook.prune`; ValueError or TypeError that names a wrong one."""
        return self

    def __call__(self, tokens, order, kept, call):
        """Remove rows.

        Args:
            tokens: `Tokens` entering the stage.
            order: (B, n) int64, positions of the patch tokens, those to keep first; (B, k) unless `ordered`.
            kept: k.
            call: `Call`.

        Returns:
            `Tokens`, of k + `adds` patch tokens.
        """
        raise NotImplementedError

    def masked(self, tokens, keep, call):
        """While a learned method trains: no row goes, a mask says which count.

        Args:
            tokens: `Tokens` entering the stage.
            keep: (B, n), D after this stage, with gradient.
            call: `Call`.

        Returns:
            `Tokens`, of at least n patch tokens, with the mask.
        """
        raise NotImplementedError

    def macs(self, enter, kept, dim):
        """MACs of reducing `enter` tokens of `dim` channels to `kept`."""
        return 0


@dataclass(frozen=True)
class Method:
    """A point on the axes, with the count rule of its official code. Parts are given as objects, or by their names.

    Raises:
        ValueError: a part that is none, when the method is made.
    """

    score: Score
    reduce: Reduce
    place: Place
    count: CountRule
    paper: str

    def __post_init__(self):
        from . import REDUCTIONS, SCORES  # made of parts

        tables = {"score": (SCORES, Score), "reduce": (REDUCTIONS, Reduce), "count": (COUNTS, CountRule)}
        for axis, (table, kind) in tables.items():
            part = getattr(self, axis)
            if not isinstance(part, kind):
                object.__setattr__(self, axis, part_of(axis, part, table))
        if self.place not in list(Place):
            raise ValueError(f"place must be one of {', '.join(Place)}, got {self.place!r}")
        object.__setattr__(self, "place", Place(self.place))

    @property
    def queries(self):
        """Whose rows of the attention a stage reads, to score or to weigh: "class", "all" or None."""
        wanted = {self.score.queries, self.reduce.queries} - {None}
        if len(wanted) > 1:
            raise ValueError(f"score {self.score.name!r} and reduce {self.reduce.name!r} read different attention")
        return next(iter(wanted), None)

    @property
    def distils(self):
        """Whether its paper trains with a teacher."""
        return self.score.distils or self.reduce.distils

    def macs(self, count, dim):
        """MACs of scoring and reducing at a stage of that `StageCount`, without the rows of attention it reads."""
        if count.kept == count.enter:
            return 0
        return self.score.macs(count.enter, dim) + self.reduce.macs(count.enter, count.kept, dim)


def part_of(axis, name, table):
    """The part of that name; ValueError that names the axis and what there is."""
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"{axis} must be one of {', '.join(table)}, got {name!r}")
    return table[name]
