"""The methods: points on five axes, and the one table of them::

    score    what says how much a token matters
    choose   who stays, by the scores: the best ones; as many as an image needs …
    reduce   what becomes of the tokens that are not kept: they are dropped, fused into one, squeezed into kept ones …
    place    `before` block i, or `between` its attention and its MLP
    count    how many are kept: `floor` or `ceil`

One paper, one file: its equations, and the parts that are new in it. `parts.py` says what a part is, and `engine.py`
asks the parts; adding a method touches its own file and the table below.

Chapter: :doc:`/book/where-the-cost-is`
"""

from .adavit import Skip, Switch
from .ats import AttentionValue, Sample
from .avit import Halting
from .baselines import AttentionReceived, Random, Static
from .choosing import Above
from .counts import StageCount, token_counts
from .dpcknn import Cluster, Density
from .dynamicvit import Drop, Predictor
from .evit import ClassAttention, Fuse
from .evovit import Bypass, Lasting
from .ia_red2 import Policy
from .parts import Choose, Method, Place, Reduce, Score, TopK
from .tome import Keys, Merge, Pairs
from .tps import Squeeze


def _table(*parts):
    return {part.name: part for part in parts}


SCORES = _table(
    Predictor(), ClassAttention(), AttentionReceived(), Random(), Static(), Keys(), AttentionValue(), Density(),
    Lasting(), Halting(), Switch(), Policy(),
)  # fmt: skip
CHOICES = _table(TopK(), Pairs(), Sample(), Above())
REDUCTIONS = _table(Drop(), Fuse(), Squeeze(), Merge(), Cluster(), Bypass(), Skip())

__all__ = [
    "CHOICES", "Choose", "METHODS", "Method", "Place", "REDUCTIONS", "Reduce", "SCORES", "Score", "StageCount",
    "register", "token_counts",
]  # fmt: skip

METHODS = {
    "dynamicvit": Method("predictor", "drop", "before", "floor", "Rao et al. 2021"),
    "evit": Method("class_attention", "fuse", "between", "ceil", "Liang et al. 2022"),
    "topk": Method("class_attention", "drop", "between", "floor", "Haurum et al. 2023"),
    "dtps": Method("predictor", "squeeze", "before", "floor", "Wei et al. 2023"),
    "etps": Method("class_attention", "squeeze", "between", "ceil", "Wei et al. 2023"),
    "tome": Method("keys", "merge", "between", "floor", "Bolya et al. 2023"),
    "ats": Method("attention_value", "drop", "between", "floor", "Fayyaz et al. 2022", "sample"),
    "dpcknn": Method("density", "cluster", "before", "floor", "Zeng et al. 2022"),
    "evovit": Method("lasting_attention", "bypass", "before", "floor_entering", "Xu et al. 2022"),
    "avit": Method("halting", "drop", "before", "floor", "Yin et al. 2022"),
    "adavit": Method("switch", "skip", "before", "floor", "Meng et al. 2022"),
    "ia_red2": Method("policy", "drop", "before", "floor", "Pan et al. 2021"),
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
