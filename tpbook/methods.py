"""What the methods are: points on three axes, and how many tokens each keeps::

    score    what says how much a token matters: `predictor` (a small learned network), `class_attention`
             (the class token's attention row), `random`, `static` (the patch's place in the image alone)
    reduce   what becomes of the others: `drop` them, `fuse` them into one token, `squeeze` each into its most
             similar kept token
    place    where in block i: `before` it, or `between` its attention and its MLP

One paper, one file: `dynamicvit.py`, `evit.py` and `tps.py` hold the scores and reductions; `engine.py` drives them.

Chapter: :doc:`/book/where-the-cost-is`
"""

import math
import warnings
from dataclasses import dataclass
from fractions import Fraction

SCORES = ("predictor", "class_attention", "random", "static")


@dataclass(frozen=True)
class Method:
    """A point on the three axes, with the token-count rule of its official code.

    `count` is `"floor"` (⌊ρ₁⋯ρ_s·N⌋ of the N patches at the input) or `"ceil"` (⌈ρ_s·n⌉ of the n tokens
    entering the stage).
    """

    score: str
    reduce: str
    place: str
    count: str
    paper: str


METHODS = {
    "dynamicvit": Method("predictor", "drop", "before", "floor", "Rao et al. 2021"),
    "evit": Method("class_attention", "fuse", "between", "ceil", "Liang et al. 2022"),
    "dtps": Method("predictor", "squeeze", "before", "floor", "Wei et al. 2023"),
    "etps": Method("class_attention", "squeeze", "between", "ceil", "Wei et al. 2023"),
    "random": Method("random", "drop", "before", "floor", "the baseline"),
}


@dataclass(frozen=True)
class StageCount:
    """Patch tokens at one stage: `enter` it, are `kept` by it, `leave` it (one more than kept after fusing)."""

    enter: int
    kept: int
    leave: int


def token_counts(patches, keep_ratios, method):
    """How many patch tokens enter, are kept by and leave each stage.

    Counts follow the official rule of the method in exact decimal arithmetic: a float stands for the decimal it
    prints as, so 100 · 0.7² keeps 49 and ⌈0.55 · 100⌉ keeps 55.

    Args:
        patches: N, patch tokens at the input (196 for 224/16); prefix tokens are never counted.
        keep_ratios: one ρ a stage, each relative to the tokens entering that stage.
        method: a `Method`.

    Returns:
        list of `StageCount`, one a stage.

    Warns:
        UserWarning: a ratio is so small that its stage would keep no token; it keeps one.
    """
    counts, n, share = [], patches, Fraction(1)
    for ratio in keep_ratios:
        exact = Fraction(str(ratio))
        share *= exact
        kept = math.floor(patches * share) if method.count == "floor" else math.ceil(n * exact)
        if kept < 1:
            warnings.warn(f"keep_ratio={ratio} would keep none of {n} tokens; one is kept", stacklevel=2)
            kept = 1
        leave = kept + 1 if method.reduce == "fuse" and kept < n else kept
        counts.append(StageCount(n, kept, leave))
        n = leave
    return counts
