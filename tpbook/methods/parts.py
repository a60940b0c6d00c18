"""What a method is made of. No other file compares the name of a part: whoever has to know something asks the part.

    score    how much a token matters                        `Score`
    choose   who stays, by the scores                         `Choose`
    reduce   what becomes of the tokens that are not kept     `Reduce`
    place    where in a block                                 `Place`
    count    how many tokens a stage keeps                    `tpbook.methods.counts`

A new method is a file with the parts that are new, and a line in `METHODS`.

Chapter: :doc:`/book/notation`
"""

import enum
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..tokens import Tokens
from .choosing import Choice, Choose, TopK  # noqa: F401, which methods take from here
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

    score: Any = None  # the `Score` in force
    found: Any = None  # what it found
    scores: Tensor | None = None  # (B, n), once they are there

    @property
    def heard(self):
        """(B, n), how much the patch tokens are looked at."""
        return self.tokens.heard.row[:, self.prefix :]


class Score:
    """How much each token matters: `score(call) -> (B, n)`, higher stays."""

    name: str
    words: str  # of a diagram: "score: …"
    queries = None  # whose rows of the attention it reads: "class", "all", or None for none
    reads = ()  # what else of the attention: "keys", "norms" of the values
    lasting = False  # whether it hears every block from the one before the first stage on, not those of stages alone
    choose = None  # the `Choose` that goes with it, where that is not the best ones
    placed = False  # whether it needs to know which patch a token is, and the grid
    drawn = False  # whether it is drawn at random
    settled = False  # whether of equal scores, which are many, the earlier token must go first
    learned = False  # whether it has a predictor: then `build(dim)` makes it and `decide` trains it
    distils = False  # whether its paper trains with a teacher
    objective = None  # the function of `tpbook.losses` that trains it, where that is not DynamicViT's or cross-entropy
    every = None  # the block from which on each has a stage unless some are named; None where the family says which
    threshold = 0.0  # above which a token stays, where that is what chooses
    restores = False  # whether after the last block all N tokens are there again
    remembers = None  # the kind of `Tokens.state` that it keeps
    switches = False  # whether it turns heads and halves of blocks off
    counts_heads = False  # whether its predictor has to know how many heads the block has: `build(dim, heads=H)`
    options = ()  # what `configure` takes

    def configure(self, **options):
        """The score with other options of `tpbook.prune`; ValueError or TypeError that names a wrong one."""
        return self

    def look(self, tokens, prefix, last=False):
        """`Tokens` as they come to each stage, and after the last block: what the score remembers of them."""
        return tokens

    def looked_at(self, tokens, prefix):
        """(B, P) bool, which prefix tokens the others look at; None for all."""
        return None

    def find(self, call):
        """What score and reduction both need, as `call.found`."""
        return None

    def note(self, tokens, call, training):
        """`Tokens` with what it found that the block needs."""
        return tokens

    def heads(self, tokens):
        """(B, H), by which the output of each head is multiplied in the attention; None for all by 1."""
        return None

    def gate(self, tokens, x, half):
        """What leaves a half of a block, "attention" or "mlp": of `Tokens` that entered it and x (B, T, C) it gave."""
        return x

    def __call__(self, call):
        """(B, n) scores, in float32 unless the model's dtype is all there is."""
        raise NotImplementedError

    def follow(self, tokens, prefix):
        """`Tokens` after an attention that was heard: what a `lasting` score remembers of it."""
        return tokens

    def weights(self, scores):
        """(B, n) scores → (B, n), how much each token weighs in a sum by the score."""
        return scores

    def macs(self, enter, dim):
        """MACs of scoring `enter` tokens of `dim` channels; what the attention costs is counted beside it."""
        return 0

    def once(self, predictor):
        """MACs of its predictor for an image, whatever its tokens."""
        return 0

    def matching(self, enter, prefix, keys):
        """MACs of comparing `enter` tokens, by keys of that many numbers, which nobody counts and a profiler sees."""
        return 0


class Reduce:
    """What becomes of the tokens that are not kept."""

    name: str
    words: str  # of a diagram: "the others are …"
    gone: str  # what the explorer calls such a token
    queries, reads = None, ()  # as of `Score`, where it weighs by the attention, or compares its keys
    adds = 0  # how many tokens more than are kept leave a stage
    hosts = False  # whether patches go on being carried by other tokens
    ordered = True  # whether it needs the tokens that are not kept, after those that are
    padded = False  # whether images may keep different numbers
    rejoins = False  # whether what is not kept is there again at the next stage, and at the end
    proportional = False  # whether attention weighs a token by how many patches it stands for
    protects = False  # whether what it adds is never removed
    remembers = None  # as of `Score`
    least_ratio = 0  # below which keep ratio it cannot go; see `least`
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

    def least(self, n):
        """How many of n tokens, an int or an int64 tensor, it has to leave."""
        return 1

    def matching(self, enter, kept, keys):
        """As of `Score`, of reducing `enter` tokens to `kept`."""
        return 0

    def rejoin(self, tokens, prefix, last=False):
        """`Tokens` with those back that stood aside: before each stage, and after the last block."""
        return tokens

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
    choose: Choose | None = None  # None: that of the score, or the best ones

    def __post_init__(self):
        from . import CHOICES, REDUCTIONS, SCORES  # made of parts

        tables = {
            "score": (SCORES, Score), "reduce": (REDUCTIONS, Reduce), "count": (COUNTS, CountRule),
            "choose": (CHOICES, Choose),
        }  # fmt: skip
        for axis, (table, kind) in tables.items():
            part = getattr(self, axis)
            if not isinstance(part, (kind, type(None) if axis == "choose" else kind)):
                object.__setattr__(self, axis, part_of(axis, part, table))
        if self.chooses.varies and not self.reduce.padded:
            raise ValueError(
                f"choose {self.chooses.name!r} keeps another number of each image, which reduce {self.reduce.name!r} "
                "cannot"
            )
        if None not in (kinds := (self.score.remembers, self.reduce.remembers)) and kinds[0] is not kinds[1]:
            raise ValueError(f"score {self.score.name!r} and reduce {self.reduce.name!r} remember different things")
        if self.place not in list(Place):
            raise ValueError(f"place must be one of {', '.join(Place)}, got {self.place!r}")
        object.__setattr__(self, "place", Place(self.place))

    @property
    def chooses(self):
        """The `Choose` in force."""
        return self.choose or self.score.choose or TopK()

    @property
    def reads(self):
        """What else of the attention a stage reads, a tuple."""
        return tuple(sorted({*self.score.reads, *self.reduce.reads}))

    @property
    def hears(self):
        """Whether a stage reads anything of the attention."""
        return self.queries is not None or bool(self.reads)

    @property
    def queries(self):
        """Whose rows of the attention a stage reads, to score or to weigh: "class", "all" or None."""
        wanted = {self.score.queries, self.reduce.queries} - {None}
        if len(wanted) > 1:
            raise ValueError(f"score {self.score.name!r} and reduce {self.reduce.name!r} read different attention")
        return next(iter(wanted), None)

    @property
    def follows(self):
        """Whether a stage has to know which patch a token is."""
        return self.score.placed or self.score.lasting or self.reduce.padded and self.chooses.varies or (
            self.reduce.protects or self.reduce.rejoins
        )  # fmt: skip

    @property
    def distils(self):
        """Whether its paper trains with a teacher."""
        return self.score.distils or self.reduce.distils

    def macs(self, count, dim):
        """MACs of scoring and reducing at a stage of that `StageCount`, without the rows of attention it reads."""
        if count.kept == count.enter and not self.chooses.varies:
            return 0
        return self.score.macs(count.enter, dim) + self.reduce.macs(count.enter, count.kept, dim)

    def matching(self, count, prefix, keys):
        """MACs of comparing the keys, of that many numbers each, of the tokens of a `StageCount`."""
        if count.kept == count.enter:
            return 0
        return self.score.matching(count.enter, prefix, keys) or self.reduce.matching(count.enter, count.kept, keys)


def part_of(axis, name, table):
    """The part of that name; ValueError that names the axis and what there is."""
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"{axis} must be one of {', '.join(table)}, got {name!r}")
    return table[name]
