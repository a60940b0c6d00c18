"""Arguments, checked before anything is touched: what cannot be used is named, with its value and what is allowed.

Chapter: :doc:`/book/a-tour-of-keep-ratios`
"""

import numbers
from collections.abc import Iterable, Mapping, Set
from fractions import Fraction

import numpy as np
import torch

LARGEST_SEED = 2**63 - 1  # of torch's generators


def check_at(at, depth):
    """Indices of the pruned blocks as a tuple of ints."""
    at = _sequence("at", at, "block indices")
    for i in at:
        if isinstance(i, bool) or not isinstance(i, numbers.Integral):
            raise TypeError(f"at must hold ints, got {i!r} in {at}")
        if not 0 <= i < depth:
            raise ValueError(f"at must hold indices from 0 to {depth - 1}, got {i} in {at}")
    if not at or any(b <= a for a, b in zip(at, at[1:])):
        raise ValueError(f"at must name at least one block, strictly increasing, got {at}")
    return tuple(int(i) for i in at)


def default_at(depth):
    """The blocks that are pruned unless others are named: (d//4, d//2, 3·d//4) for d blocks, duplicates dropped."""
    return tuple(sorted({depth // 4, depth // 2, 3 * depth // 4}))


def check_seed(seed):
    """TypeError or ValueError unless it is None, or an int that a generator takes."""
    if seed is None:
        return
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise TypeError(f"seed must be an int or None, got {seed!r}")
    if not -LARGEST_SEED - 1 <= seed <= LARGEST_SEED:
        raise ValueError(f"seed must lie from −2⁶³ to 2⁶³ − 1, got {seed!r}")


def check_flag(name, value):
    """TypeError unless it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_name(name, value, allowed):
    """ValueError unless it is one of the allowed names."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def decimals(name, ratio):
    """A ratio, or a sequence of them, as exact as it was written: a float or a `Fraction`, or a tuple of them.

    A float stands for the decimal that it prints as, NumPy's float32 too.

    Raises:
        TypeError: it is no number and no sequence of numbers; `name` says whose it is.
    """
    if not _is_sequence(ratio):
        return _decimal(name, ratio)
    return tuple(_decimal(name, r) for r in _sequence(name, ratio, "numbers"))


def check_keep_ratio(ratio, stages):
    """What `prune` and the knob take, as `decimals` gives it; ValueError where it lies outside (0, 1]."""
    checked = decimals("keep_ratio", ratio)
    several = isinstance(checked, tuple)
    for r in checked if several else (checked,):
        if not 0 < r <= 1:
            raise ValueError(f"keep_ratio must lie in (0, 1], got {r!r} (a number of tokens is `keep`)")
    if several and len(checked) != stages:
        raise ValueError(f"keep_ratio must be one number or one for each of {stages} stages, got {ratio!r}")
    return checked


def check_keep(keep, patches):
    """Numbers of tokens: an int from 1 to N, or a tuple of one a stage; None stays None. `patches` has N a stage."""
    if keep is None:
        return None
    several = _is_sequence(keep)
    wished = _sequence("keep", keep, "ints") if several else (keep,) * len(patches)
    for k in wished:
        if isinstance(k, bool) or not isinstance(k, numbers.Integral):
            raise TypeError(f"keep must be an int or a sequence of ints, got {k!r}")
    if len(wished) != len(patches):
        raise ValueError(f"keep must be one number or one for each of {len(patches)} stages, got {keep!r}")
    for k, most in zip(wished, patches):
        if not 1 <= k <= most:
            raise ValueError(f"keep must lie from 1 to the {most} patch tokens that there are, got {k!r}")
    return tuple(map(int, wished)) if several else int(keep)


def _decimal(name, ratio):
    if isinstance(ratio, np.ndarray) and ratio.ndim == 0:
        ratio = ratio[()]
    if isinstance(ratio, (bool, np.bool_)) or not isinstance(ratio, numbers.Real):
        raise TypeError(f"{name} must be a number or a sequence of numbers, got {ratio!r}")
    return ratio if isinstance(ratio, Fraction) else float(str(ratio))


def _is_sequence(value):
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    unordered = (str, bytes, Set, Mapping, torch.Tensor)
    return isinstance(value, Iterable) and not isinstance(value, unordered)


def _sequence(name, value, of):
    if not _is_sequence(value):
        raise TypeError(f"{name} must be a sequence of {of}, got {value!r}")
    return tuple(value)
