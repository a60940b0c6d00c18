"""How many tokens a stage keeps: two rules, in exact decimal arithmetic.

`floor` (DynamicViT, dTPS, random) keeps ⌊ρ₁⋯ρ_s·N⌋ of the N patches at the input, `ceil` (EViT, eTPS) ⌈ρ_s·n⌉ of the n
tokens that enter the stage. ρ_s = r_s / b is a quotient of whole numbers, so 100 · 0.7² keeps 49 and ⌈0.55 · 100⌉ keeps
55, though in floats both come out wrong. The rules take Python's ints, and int64 tensors where a graph is exported.

Chapter: :doc:`/book/where-the-cost-is`
"""

import math
import warnings
from fractions import Fraction
from typing import NamedTuple


class CountRule:
    """A rule: `start(patches)` gives its state, `step(state, n, part, base)` the next state and how many are kept."""


class Floor(CountRule):
    """⌊ρ₁⋯ρ_s·N⌋. Its state is N·ρ₁⋯ρ_s as digits in base b, the whole part first: more than an int64 can hold."""

    name, of, up = "floor", "input", False  # a share of the tokens at the input, rounded down

    def start(self, patches):
        """The state before the first stage."""
        return [patches]

    def step(self, state, n, part, base):
        """State and ρ_s = part / base → the next state, and how many are kept."""
        carry, digits = 0, []
        for digit in reversed(state):
            carry = carry + digit * part
            whole = carry // base
            digits.append(carry - whole * base)
            carry = whole
        return [carry, *reversed(digits)], carry


class Ceil(CountRule):
    """⌈ρ_s·n⌉."""

    name, of, up = "ceil", "current", True  # a share of those that enter the stage, rounded up

    def start(self, patches):
        """The rule has no state."""
        return None

    def step(self, state, n, part, base):
        """n tokens and ρ_s = part / base → the next state, and how many are kept."""
        return state, (n * part + (base - 1)) // base


COUNTS = {rule.name: rule for rule in (Floor(), Ceil())}


class StageCount(NamedTuple):
    """Patch tokens at one stage: `enter` it, are `kept` by it, `leave` it (one more than kept after fusing)."""

    enter: int
    kept: int
    leave: int


class Wish(int):
    """A number of tokens to keep, in the place of a keep ratio."""


def token_counts(patches, keep_ratios, method):
    """How many patch tokens enter, are kept by and leave each stage.

    Args:
        patches: N, patch tokens at the input (196 for 224/16); prefix tokens are never counted.
        keep_ratios: one a stage: ρ ≤ 1 relative to the tokens entering that stage (a float stands for the decimal that
            it prints as, a `Fraction` for itself), or a `Wish`, how many to keep.
        method: a `Method`.

    Returns:
        list of `StageCount`, one a stage.

    Warns:
        UserWarning: a ratio is so small that its stage would keep no token; it keeps one.
    """
    counts = []
    for ratio, exact, count in zip(keep_ratios, *_stages(patches, keep_ratios, method)):
        if exact < 1:
            warnings.warn(f"keep_ratio={ratio} would keep none of {count.enter} tokens; one is kept", stacklevel=2)
        counts.append(count)
    return counts


def quiet_counts(patches, keep_ratios, method):
    """The same without a warning, as a tuple."""
    return tuple(_stages(patches, keep_ratios, method)[1])


def _stages(patches, keep_ratios, method):
    """What the rule says to keep, which may be none, and the counts, with one kept at least: a list each."""
    ratios = [Fraction(1) if isinstance(ratio, Wish) else Fraction(str(ratio)) for ratio in keep_ratios]
    base = math.lcm(*(ratio.denominator for ratio in ratios))
    rule, n = method.count, patches
    state, said, counts = rule.start(patches), [], []
    for ratio, wished in zip(ratios, keep_ratios):
        state, exact = rule.step(state, n, ratio.numerator * (base // ratio.denominator), base)
        if isinstance(wished, Wish):
            exact = min(int(wished), n)
            state = rule.start(exact)
        kept = max(1, exact)
        leave = kept + method.reduce.adds if kept < n else kept
        said.append(exact)
        counts.append(StageCount(n, kept, leave))
        n = leave
    return said, counts
