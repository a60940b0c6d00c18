"""The methods: points on four axes, and the one table of them::

    score    what says how much a token matters
    reduce   what becomes of the tokens that are not kept: they are dropped, fused into one, squeezed into kept ones …
    place    `before` block i, or `between` its attention and its MLP
    count    how many are kept: `floor` or `ceil`

One paper, one file: its equations, and the parts that are new in it. `parts.py` says what a part is, and `engine.py`
asks the parts; adding a method touches its own file and the table below.

Chapter: :doc:`/book/where-the-cost-is`
"""

from .baselines import AttentionReceived, Random, Static
from .counts import StageCount, token_counts
from .dynamicvit import Drop, Predictor
from .evit import ClassAttention, Fuse
from .parts import Method, Place, Reduce, Score
from .tps import Squeeze

SCORES = {part.name: part for part in (Predictor(), ClassAttention(), AttentionReceived(), Random(), Static())}
REDUCTIONS = {part.name: part for part in (Drop(), Fuse(), Squeeze())}

__all__ = [
    "METHODS", "Method", "Place", "REDUCTIONS", "Reduce", "SCORES", "Score", "StageCount", "register", "token_counts"
]  # fmt: skip

METHODS = {
    "dynamicvit": Method("predictor", "drop", "before", "floor", "Rao et al. 2021"),
    "evit": Method("class_attention", "fuse", "between", "ceil", "Liang et al. 2022"),
    "topk": Method("class_attention", "drop", "between", "floor", "Haurum et al. 2023"),
    "dtps": Method("predictor", "squeeze", "before", "floor", "Wei et al. 2023"),
    "etps": Method("class_attention", "squeeze", "between", "ceil", "Wei et al. 2023"),
    "random": Method("random", "drop", "before", "floor", "the baseline"),
}


def register(name, method):
    """Add a method to `METHODS`, for `tpbook.prune(model, name)`.

    Args:
        name: a new name.
        method: a `Method`.

    Raises:
        ValueError: the name is taken.
        TypeError: the name is no text, or the method is no `Method`.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a text, got {name!r}")
    if not isinstance(method, Method):
        raise TypeError(f"method must be a Method, got {method!r}")
    if name in METHODS:
        raise ValueError(f"name must be new, and there is a method {name!r} already")
    METHODS[name] = method
