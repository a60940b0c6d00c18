"""What pages are told of methods and costs is what the package computes. The JavaScript is in test_cost_explorer.py."""

import functools
import json
import math
import operator
import re
import warnings
from fractions import Fraction
from itertools import product
from pathlib import Path

import pytest
import sympy

import tpbook
from tpbook import flops
from tpbook.book import cost, looks
from tpbook.methods import REDUCTIONS, SCORES, token_counts

TOP = Path(__file__).parent.parent
COUNTED = [name for name in looks.CHOICES if not looks.method_of(name).chooses.varies]
OPERATORS = {"+": operator.add, "*": operator.mul, "**": operator.pow, "//": operator.floordiv}


def value(tree, numbers):
    """Of a tree, where its names stand for these numbers."""
    if isinstance(tree, list):
        return functools.reduce(OPERATORS[tree[0]], (value(part, numbers) for part in tree[1:]))
    return numbers[tree] if isinstance(tree, str) else tree


@pytest.fixture(scope="module")
def rules():
    text = cost.script()
    start = "(window.tpbook ??= {}).rules = "
    assert text.startswith(start) and text.endswith(";\n")
    return json.loads(text[len(start) : -2])


@pytest.mark.parametrize("name", COUNTED)
def test_methods(rules, name):
    assert list(rules["methods"]) == COUNTED
    told, method = rules["methods"][name], looks.method_of(name)
    assert told["title"] == looks.LOOKS[name].title and told["colour"] == looks.LOOKS[name].colour
    assert (told["gone"], told["hosts"]) == (method.reduce.gone, method.reduce.hosts)
    for enter, kept, width in product((7, 36, 196), (1, 5), (48, 150, 767)):
        macs = value(told["macs"], {"enter": enter, "kept": kept, "width": width})
        assert macs == method.macs(tpbook.methods.StageCount(enter, kept, kept), width)


@pytest.mark.parametrize("name", COUNTED)
def test_counts(rules, name):
    told, method = rules["methods"][name], looks.method_of(name)
    for patches, ratios in product((7, 100, 196), ((0.7,) * 3, (0.55, 1.0, 0.9), (0.01, 0.3))):
        n, share, said = patches, Fraction(1), []
        if min(ratios) < told["least_ratio"]:
            with pytest.raises(ValueError, match="half of the tokens"):
                token_counts(patches, ratios, method)
            continue
        for ratio in ratios:
            ratio = Fraction(str(ratio))
            share *= ratio
            exact = patches * share if told["count"]["of"] == "input" else n * ratio
            exact = n if ratio == 1 else exact
            least = value(told["least"], {"enter": n})
            kept = max(least, math.ceil(exact) if told["count"]["up"] else math.floor(exact))
            said.append((n, kept, kept + told["adds"] if kept < n else kept))
            n = n if told["rejoins"] else said[-1][2]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert said == token_counts(patches, ratios, method)


@pytest.mark.parametrize("name", COUNTED)
def test_closed_form(rules, small, name):
    model, told, (of, options) = small(), rules["methods"][name], looks.CHOICES[name]
    tpbook.prune(model, of, keep_ratio=0.5, at=(2,), **options)
    [count], shape = model.pruning.counts(36), {"width": 48, "hidden": 192, "channels": 3, "patch": 16, "classes": 10}
    seen = [37, 37, 1 + (count.leave if told["before"] else 36), *[1 + count.leave] * 3]
    left, blocks = [37, 37, *[1 + count.leave] * 4], []
    for tokens in zip(seen, left):
        numbers = shape | dict(zip(("seen", "left"), tokens))
        blocks.append(value(rules["linear"], numbers) + value(rules["products"], numbers))
    blocks[2] += value(told["macs"], shape | count._asdict())
    blocks[2 - told["before"]] += value(told["heard"], shape | {"seen": seen[2 - told["before"]]})
    form = flops.closed_form(model)
    assert tuple(blocks) == form.by_block
    assert 36 * value(rules["embed"], shape) == form.embed and value(rules["head"], shape) == form.head


def test_what_a_page_cannot_compute_is_refused():
    n = sympy.symbols("n", integer=True, nonnegative=True)
    assert cost.tree(3 * n**2 - n // 2) == ["+", ["*", -1, ["//", "n", 2]], ["*", 3, ["**", "n", 2]]]
    for wrong in (n / 2, sympy.sqrt(n), 1 / n, sympy.Max(n, 3), 0.5 * n):
        with pytest.raises(TypeError, match="the pages cannot compute"):
            cost.tree(wrong)


def test_pages_load_the_rules_first():
    for page in (TOP / "book").glob("*.md"):
        scripts = re.findall(r'src="../_static/([\w-]+)\.js"', page.read_text())
        if "cost" in scripts:
            assert scripts.index("rules") < scripts.index("cost")
            assert "explorer" not in scripts or scripts.index("explorer") < scripts.index("here")
    assert "rules.js" in (TOP / "book/explorer.md").read_text()


def test_no_method_is_named_in_javascript():
    """Titles, names and colours are in rules.js alone. `random`, `drop` and `static` are words of JavaScript too."""
    names = {*looks.CHOICES, *SCORES, *REDUCTIONS, *(look.title for look in looks.LOOKS.values())}
    names |= {look.colour for look in looks.LOOKS.values()} - {"#D55E00", "#E69F00"}  # a patch that is followed, a host
    names -= {"random", "drop", "static", "dense"}
    assert len(names) > 15
    scripts = [*(TOP / "book/static").glob("*.js"), *(TOP / "tpbook/book/javascript").glob("*.js")]
    assert len(scripts) == 9
    for script in scripts:
        text = script.read_text()
        assert not [name for name in names if f'"{name}"' in text or f"{name}:" in text], script.name
