"""How many tokens a stage keeps: three rules, in exact decimal arithmetic.

`floor` (DynamicViT, dTPS, random) keeps ⌊ρ₁⋯ρ_s·N⌋ of the N patches at the input, `ceil` (EViT, eTPS) ⌈ρ_s·n⌉ of the n
tokens that enter the stage, `floor_entering` (Evo-ViT) ⌊ρ_s·n⌋ of them. ρ_s = r_s / b is a quotient of whole numbers,
so 100 · 0.7² keeps 49 and ⌈0.55 · 100⌉ keeps 55, though in floats both come out wrong. The rules take Python's ints,
and int64 tensors where a graph is exported.

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


class FloorEntering(Ceil):
    """⌊ρ_s·n⌋."""

    name, up = "floor_entering", False

    def step(self, state, n, part, base):
        """n tokens and ρ_s = part / base → the next state, and how many are kept."""
        return state, n * part // base


COUNTS = {rule.name: rule for rule in (Floor(), Ceil(), FloorEntering())}


class StageCount(NamedTuple):
    """Patch tokens at one stage: `enter` it, are `kept` by it, `leave` it (one more than kept after fusing)."""

    enter: int
    kept: int
    leave: int


class Wish(int):
    """A number of tokens to keep, in the place of a keep ratio."""


class Fewer(int):
    """A number of tokens to remove, in the place of a keep ratio."""


def token_counts(patches, keep_ratios, method):
    """How many patch tokens enter, are kept by and leave each stage.

    Args:
        patches: N, patch tokens at the input (196 for 224/16); prefix tokens are never counted.
        keep_ratios: one a stage: ρ ≤ 1 relative to the tokens entering that stage (a float stands for the decimal that
            it prints as, a `Fraction` for itself), or a `Wish`, how many to keep, or `Fewer`, how many to remove.
        method: a `Method`.

    Returns:
        list of `StageCount`, one a stage.

    Raises:
        ValueError: a stage would have to leave fewer tokens than the method can.

    Warns:
        UserWarning: a ratio is so small that its stage would keep no token, and keeps one; or a stage removes fewer
            tokens than a `Fewer` says, since that is all the method can.
    """
    counts, reduce = [], method.reduce
    for s, (ratio, exact, count) in enumerate(zip(keep_ratios, *_stages(patches, keep_ratios, method))):
        n, least = count.enter, reduce.least(count.enter)
        if isinstance(ratio, Fewer):
            if exact < least:
                warnings.warn(f"r={int(ratio)} at stage {s}: at most {n - least} of {n} tokens can go", stacklevel=2)
        elif isinstance(ratio, Wish) and exact < least or not isinstance(ratio, Wish) and ratio < reduce.least_ratio:
            name = "keep" if isinstance(ratio, Wish) else "keep_ratio"
            raise ValueError(
                f"{name} must leave half of the tokens at every stage, since only those of one half {reduce.gone} "
                f"others; stage {s} gets {n}, so at least {least} stay, got {name}={ratio!r}"
            )
        elif exact < 1:
            warnings.warn(f"keep_ratio={ratio} would keep none of {n} tokens; one is kept", stacklevel=2)
        counts.append(count)
    return counts


def quiet_counts(patches, keep_ratios, method):
    """The same without a warning, as a tuple."""
    return tuple(_stages(patches, keep_ratios, method)[1])


def _stages(patches, keep_ratios, method):
    """What the rule says to keep, which may be too few, and the counts, with those that have to stay: a list each."""
    exactly = [Fraction(1) if isinstance(ratio, (Wish, Fewer)) else Fraction(str(ratio)) for ratio in keep_ratios]
    base = math.lcm(*(ratio.denominator for ratio in exactly))
    rule, reduce, n, added = method.count, method.reduce, patches, 0
    state, said, counts = rule.start(patches), [], []
    for ratio, wished in zip(exactly, keep_ratios):
        state, exact = rule.step(state, n - added, ratio.numerator * (base // ratio.denominator), base)
        exact = n - added if ratio == 1 else exact  # more than the rule says, where a stage before had to leave more
        if isinstance(wished, (Wish, Fewer)):
            exact = min(int(wished), n - added) if isinstance(wished, Wish) else n - added - int(wished)
            state = rule.start(exact)
        kept = max(reduce.least(n - added), exact) + added
        leave = kept + reduce.adds if kept < n else kept
        said.append(exact)
        counts.append(StageCount(n, kept, leave))
        added += (leave - kept) * reduce.protects
        n = n if reduce.rejoins else leave
    return said, counts
