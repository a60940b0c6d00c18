"""What pages have to know to count MACs themselves: methods, count rules and closed form, as JSON.

Nothing of it is said twice: SymPy's symbols go through the parts' own `macs` and through `tpbook.flops`, and what comes
out is written down as trees. A tree is an int, a name, or [operator, tree, …], the operators being + * ** and // (for
numbers from 0, rounded down). `book/static/cost.js` puts numbers in.

Chapter: :doc:`/book/where-the-cost-is`
"""

import json

import sympy

from ..flops import block_macs
from ..methods.parts import Place
from .looks import CHOICES, LOOKS, method_of


def rules():
    """What a page has to know: dict for JSON.

    `methods`, the `rule` of each name in `CHOICES` whose tokens can be counted without an image; and what a plain ViT
    costs, trees: `linear` and `products` of a block, in the tokens `seen` by its attention and `left` for its MLP,
    `width` and `hidden`; `embed` of one patch, in `channels`, `patch`, `width`; `head`, in `width`, `classes`.
    """
    width, hidden, channels, patch, classes = _symbols("width hidden channels patch classes")
    seen, left = _symbols("seen left")
    # a plain ViT: q, k, v and the output are C → C each
    linear, products, _ = block_macs(seen, left, None, 4 * width**2, width, 2 * width * hidden)
    return {
        "methods": {name: rule(method_of(name), LOOKS[name]) for name in CHOICES if not method_of(name).chooses.varies},
        "linear": tree(linear), "products": tree(products),
        "embed": tree(channels * patch**2 * width), "head": tree(width * classes),
    }  # fmt: skip


def rule(method, look):
    """What a page has to know of a `Method` and its `Look`: dict for JSON.

    Beside look, names of parts, and `gone`, `hosts`, `adds`, `protects`, `rejoins` and `least_ratio` as in
    `tpbook.methods.parts.Reduce`:

    - `count`: whether the share is `of` the "input" or of the "current" tokens, and is rounded `up`; `least`, how many
      it has to leave of those that enter, a tree in `enter`;
    - `before`: whether the stage stands before its block, so that the block's attention sees what leaves it;
    - `macs`: what scoring and reducing cost, a tree in `enter`, `kept`, `width`;
    - `heard`: what the rows of QKᵀ cost that are read besides, a tree in `seen`, `width`, of the stage's block, or of
      the one before it where the stage stands before; `lasting`, whether also of the blocks from the first of these to
      the last.
    """
    enter, kept, width, seen = _symbols("enter kept width seen")
    score, reduce = method.score, method.reduce
    return {
        "title": look.title, "colour": look.colour, "gone": reduce.gone, "hosts": reduce.hosts,
        "score": score.name, "reduce": reduce.name, "place": str(method.place),
        "count": {"name": method.count.name, "of": method.count.of, "up": method.count.up},
        "adds": reduce.adds, "protects": reduce.protects, "rejoins": reduce.rejoins, "lasting": score.lasting,
        "least": tree(reduce.least(enter)), "least_ratio": reduce.least_ratio,
        "before": method.place is Place.BEFORE,
        "macs": tree(score.macs(enter, width) + reduce.macs(enter, kept, width)),
        "heard": tree(block_macs(seen, seen, method.queries, 0, width, 0)[2]),
    }  # fmt: skip


def _symbols(names):
    return sympy.symbols(names, integer=True, nonnegative=True)


def tree(expression):
    """A SymPy expression, or an int, as a tree.

    Raises:
        TypeError: it holds something else than sums, products, whole powers and quotients that are rounded down.
    """
    expression = sympy.sympify(expression)
    if expression.is_Integer:
        return int(expression)
    if expression.is_Symbol:
        return expression.name
    if isinstance(expression, sympy.floor):
        return ["//", *map(tree, expression.args[0].as_numer_denom())]
    whole = not isinstance(expression, sympy.Pow) or expression.exp.is_Integer and expression.exp > 0
    for kind, operator in ((sympy.Add, "+"), (sympy.Mul, "*"), (sympy.Pow, "**")):
        if isinstance(expression, kind) and whole:
            return [operator, *map(tree, expression.args)]
    raise TypeError(f"the pages cannot compute {expression}: it must be made of +, −, ·, whole powers and //")


def script():
    """The rules as a script, since from disk a browser reads no JSON: text, which sets `tpbook.rules`."""
    return f"(window.tpbook ??= {{}}).rules = {json.dumps(rules(), ensure_ascii=False, indent=1)};\n"
