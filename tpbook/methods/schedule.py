"""How many tokens each block removes, where r says it and not a keep ratio: ToMe's schedules (Bolya et al. 2023).

An int removes as many everywhere. A pair (r, f) changes from block to block along a line, f from −1 to 1, with about
the same sum: the first of L blocks removes a = ⌊r·(1 − f)⌋, the last one b = 2r − a, block i ⌊a + i·(b − a)/(L − 1)⌋,
so (16, −1) begins with 32 and ends with 0. The floors make a falling schedule remove fewer in all. A list says it block
by block, and those after its end remove none. (``parse_r`` of the official code.)

Chapter: :doc:`/book/merging`
"""

import numbers


def check_r(r, stages):
    """What `prune` takes as `r`, made of plain numbers: an int, a pair (int, float), or a list of ints.

    Raises:
        TypeError, ValueError: it is none of those, below 0, longer than the stages, or its inflection is not in
            [−1, 1].
    """
    if isinstance(r, list):
        if len(r) > stages:
            raise ValueError(f"r must hold at most one number for each of {stages} blocks, got {len(r)}: {r!r}")
        return [_number(one, r) for one in r]
    if not isinstance(r, tuple):
        return _number(r, r)
    if len(r) != 2 or isinstance(r[1], bool) or not isinstance(r[1], numbers.Real):
        raise TypeError(f"r must be an int, a pair (int, inflection) or a list of ints, got {r!r}")
    if not -1 <= r[1] <= 1:
        raise ValueError(f"r must have an inflection from -1 to 1, got {r[1]!r} in {r!r}")
    return _number(r[0], r), float(r[1])


def schedule(r, stages):
    """How many tokens each of so many stages removes: list of int, for an r as `check_r` gives it."""
    if isinstance(r, list):
        return r + [0] * (stages - len(r))
    number, inflection = r if isinstance(r, tuple) else (r, 0.0)
    first = int(number * (1 - inflection))
    step = 2 * (number - first) / max(1, stages - 1)
    return [int(first + i * step) for i in range(stages)]


def _number(number, given):
    if isinstance(number, bool) or not isinstance(number, numbers.Integral):
        raise TypeError(f"r must be an int, a pair (int, inflection) or a list of ints, got {given!r}")
    if number < 0:
        raise ValueError(f"r must be 0 or more tokens to remove, got {given!r}")
    return int(number)
