"""The state of one forward: it travels from block to block with the tokens, so nothing of it is kept on a module.

The first pruned block wraps the tensor that it receives, the last one gives a tensor back; what is between hands on
`Tokens`. A forward hook on an inner pruned block therefore sees `Tokens`, which have the `shape`, `dtype` and `device`
of their tensor, can be detached, and take a hook on its gradient.

Shapes, here and in all methods: B images, P prefix tokens, N patch tokens at the input, n ≤ N of them left, C channels,
T = P + n.

Chapter: :doc:`/book/a-tour-of-keep-ratios`
"""

import functools
from operator import attrgetter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .kernels import stage_kernels


def travels(cls):
    """Give a NamedTuple whose `x` is a tensor what hooks, checkpointing and feature extractors touch of that tensor."""

    def replace(self, **changes):
        """The same with other items; unlike `_replace` the compiler of torch 2.11 can follow it."""
        return cls(*map(changes.get, cls._fields, self))

    def detach(self):
        """The same, without gradient: what hooks of feature extractors do."""
        return tree_map_only(Tensor, Tensor.detach, self)

    def register_hook(self, hook):
        """On the gradient of `x`."""
        return self.x.register_hook(hook)

    cls.replace, cls.detach, cls.register_hook = replace, detach, register_hook
    for name in ("shape", "dtype", "device", "requires_grad"):
        setattr(cls, name, property(attrgetter(f"x.{name}"), doc="That of `x`."))
    return cls


def check_intact(x, kind):
    """RuntimeError where something has taken what travels from block to block apart, into a plain tuple."""
    if isinstance(x, tuple) and not isinstance(x, kind):
        raise RuntimeError(
            f"a block got a plain tuple in the place of {kind.__name__}: nothing may change what goes from block to "
            "block of a pruned model. If it is reentrant checkpointing, which takes it apart, use the other kind "
            "(use_reentrant=False; in timm, leave TIMM_REENTRANT_CKPT unset)"
        )


PADDING = -2  # the patch of a token that fills up an image which keeps fewer than others


class Heard(NamedTuple):
    """What an attention lets a method hear; None where nobody asks."""

    row: Tensor | None = None
    """(B, T) float32, how much the queries that are listened to look at each token."""
    keys: Tensor | None = None
    """(B, T, D), the mean over heads of the keys that enter the product."""
    norms: Tensor | None = None
    """(B, T) float32, ‖[v¹; …; v^H]‖ of the values of all heads together."""


@travels
class Tokens(NamedTuple):
    """The tokens of one forward, and what must be known of them further on."""

    x: Tensor
    """(B, P + n, C)."""
    counts: tuple
    """One `StageCount` a stage. They travel too, so that a knob that is turned meanwhile changes nothing."""
    patch: Tensor | None = None
    """(B, n) int64, the original patch of each patch token, −1 fused, −2 padding; None if nobody asks."""
    host: Tensor | None = None
    """(B, N) int64, the original patch whose token carries each patch; None with `patch`."""
    keep: Tensor | None = None
    """(B, n), which tokens count: D while a learned method trains; 0 for padding, where images keep different
    numbers."""
    size: Tensor | None = None
    """(B, n) float32, how many patches each token stands for, where tokens merge; None while each stands for one."""
    state: tuple | None = None
    """What a part of the method remembers from block to block: a NamedTuple of its own, of tensors."""
    heard: Heard | None = None
    """What the last attention let the method hear; None if nobody asks."""
    gone: Tensor | None = None
    """(B, N, C), each patch as it was when it was removed, zero while it stays; None unless it comes back so."""
    record: tuple | None = None
    """One `tpbook.record.Seen` a stage so far; None if nobody traces."""

    @property
    def weight(self):
        """(B, n), how much each token counts in a mean: `size`, 0 for one that does not count; None if all count 1."""
        if self.size is None or self.keep is None:
            return self.keep if self.size is None else self.size
        return self.size * self.keep


def drop(x, kept, first=0):
    """Keep the chosen tokens and drop the others.

    Args:
        x: (B, n, C) or (B, n).
        kept: (B, k) int64, positions in x.
        first: the position in x, (B, n, C), from which `kept` counts; what is before it is dropped.

    Returns:
        (B, k, C) or (B, k), in the order of `kept`.
    """
    if x.dim() == 2:
        return x.gather(1, kept)
    table = x.flatten(0, 1)[first:]  # (B·n − first, C)
    return F.embedding(rows(kept, x.shape[1]), table)  # a lookup copies whole tokens, a gather numbers


def retain(x, kept, first):
    """Keep the first tokens and the chosen ones.

    Args:
        x: (B, P + n, C).
        kept: (B, k) int64, positions among the n.
        first: P.

    Returns:
        (B, P + k, C), the chosen ones in the order of `kept`.
    """
    if kernels := stage_kernels(x):
        return kernels.collect(x, kept, kept.shape[1], first)
    return torch.cat([x[:, :first], drop(x, kept, first)], dim=1)


def rows(index, n, first=0):
    """Where tokens first + (B, k) of (B, n, …) are in the flattened (B·n, …): (B, k)."""
    if index.shape[0] == 1:
        return index + first if first else index
    return index + torch.arange(first, first + index.shape[0] * n, n, device=index.device).unsqueeze(1)


def move(host, patch, guests, hosts):
    """Follow one squeezing: whatever patch the token at `guests` carried is now carried by `hosts`.

    host (B, N), patch (B, n), guests (B, p) positions in patch, hosts (B, p) original patches → (B, N).
    """
    carrier = torch.arange(host.shape[1], device=host.device).expand_as(host)
    return carrier.scatter(1, drop(patch, guests), hosts).gather(1, host)


def in_float32(function):
    """Computes without autocast, which would take products back to half precision.

    The device is that of the first argument; the function casts what it needs in float32.
    """

    @functools.wraps(function)
    def without_autocast(x, *args, **kwargs):
        kind = x.device.type
        if not torch.is_autocast_enabled(kind):
            return function(x, *args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(x, *args, **kwargs)

    return without_autocast
