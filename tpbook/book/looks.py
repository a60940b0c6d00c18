"""How the book calls, colours and marks each method, once for figures, explorers and JavaScript.

Chapter: :doc:`/book/notation`
"""

from dataclasses import replace
from itertools import cycle
from typing import NamedTuple

from ..methods import METHODS

GONE = "#8c919a"  # a patch whose token is gone: flat, apart from light and dark pages and from most photographs
EDGE = "#ffffff"  # the outline of those that are kept


class Look(NamedTuple):
    """Of one method, everywhere."""

    title: str
    colour: str
    mark: str  # of matplotlib


# Okabe and Ito's palette, and others as far from it and from one another as colour-blind readers need; the marks tell
# them apart in grey
_OWN = {
    "dense": Look("dense", "#000000", "D"), "random": Look("random", "#666666", "o"),
    "dynamicvit": Look("DynamicViT", "#0072B2", "s"), "evit": Look("EViT", "#D55E00", "^"),
    "evit, no fusion": Look("EViT, no fusion", "#E69F00", "v"), "dtps": Look("dTPS", "#56B4E9", "P"),
    "etps": Look("eTPS", "#009E73", "X"), "topk": Look("Top-K", "#CC79A7", "*"),
    "tome": Look("ToMe", "#7A33FF", "<"), "ats": Look("ATS", "#C3003C", ">"),
    "dpcknn": Look("DPC-KNN", "#7A3B00", "d"), "evovit": Look("Evo-ViT", "#1A2C80", "8"),
    "avit": Look("A-ViT", "#77EEFF", "p"), "adavit": Look("AdaViT", "#AAEE77", "h"),
    "ia_red2": Look("IA-RED²", "#441100", "H"),
}  # fmt: skip
_OTHERS = (("#F0E442", "P"), ("#DDDDCC", "D"))  # for methods that are added, under their own name
_VARIANTS = {"evit": {"evit, no fusion": {"fuse": False}}}  # method → what is shown beside it, by options of `prune`


def _choices():
    for name, method in METHODS.items():
        if not method.chooses.counted:  # a keep ratio says nothing to it
            continue
        yield name, (name, {"seed": 0} if method.score.drawn else {})
        for variant, options in _VARIANTS.get(name, {}).items():
            yield variant, (name, options)


def _looks():
    others = cycle(_OTHERS)
    for name in dict.fromkeys(("dense", *CHOICES, *METHODS)):
        yield name, _OWN[name] if name in _OWN else Look(name, *next(others))


CHOICES = dict(_choices())
"""How an explorer calls a method → the method, and options of `tpbook.prune`."""
LOOKS = dict(_looks())
"""The same names, those of the other methods, and "dense" → `Look`."""


def method_of(choice):
    """The `Method` behind a name of `CHOICES`, its reduction with those options."""
    name, options = CHOICES[choice]
    reduce = METHODS[name].reduce
    own = {option: options[option] for option in reduce.options if option in options}
    return replace(METHODS[name], reduce=reduce.configure(**own))
