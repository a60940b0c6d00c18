"""A-ViT (Yin et al. 2022): each token halts by itself, and what the model reads is the sum of what it was.

Adaptive computation time (Graves 2016), a token at a time, class token included. After each block, of all P + N tokens,
with c = 0, R = 1, m = 1, o = 0 to begin with and ε = 0.01::

    h = σ(γ x_{·,0} − β)                          from the first channel alone: nothing is added to the model
    c ← c + h;   done = m·[c ≥ 1 − ε],   go = m·[c < 1 − ε]
    o ← o + x·(R·done + h·go);   ρ ← ρ + m + R·done;   R ← R − h·go;   m ← go          `Halting.look`

After the last block h = 1, so that every token is done; the norm and the head get o. A stage before block i looks at
what block i − 1 gave, and there is one before each block but the first.

The official code hides tokens that have halted and goes on computing them: it gets no faster, they gain biases, and
what they hold then enters the mean of h that is regularised. Here they are removed, in training too, which is the same
to the others: batches are padded to the longest image. Of a token that has halted h is 0. A class token that has halted
stays in its row, and no other token looks at it.

Chapter: :doc:`/book/a-count-for-each-image`
"""

import numbers
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tokens import in_float32
from .choosing import Above
from .parts import Score

EPSILON = 0.01


class Halted(NamedTuple):
    """What was seen so far of all P + N tokens. Float32, except `alive`."""

    out: Tensor  # (B, P + N, C), o
    total: Tensor  # (B, P + N), c
    rest: Tensor  # (B, P + N), R
    alive: Tensor  # (B, P + N) bool, m
    ponder: Tensor  # (B, P + N), ρ: blocks that a token was in, and what was left of it; with gradient
    halting: tuple = ()  # of (B, P + N), σ(…) after each block that was looked at, 0 where m = 0; with gradient


class Halting(Score):
    """How far each token is from halting, 1 − ε − c.

    Args:
        scale: γ.
        center: β.
    """

    name, words, objective = "halting", "score: what is left until it halts", "avit"
    options, every, restores, remembers = ("gate_scale", "gate_center"), 1, True, Halted

    def __init__(self, scale=10.0, center=30.0):
        for name, number in (("gate_scale", scale), ("gate_center", center)):
            if isinstance(number, bool) or not isinstance(number, numbers.Real):
                raise TypeError(f"{name} must be a number, got {number!r}")
        self.scale, self.center, self.choose = float(scale), float(center), Above()

    def configure(self, gate_scale=10.0, gate_center=30.0):
        return Halting(gate_scale, gate_center)

    def look(self, tokens, prefix, last=False):
        patch, n = tokens.patch, tokens.host.shape[1]
        x, there = tokens.x, F.pad(patch >= 0, (prefix, 0), value=True)  # (B, T, C), (B, T)
        place = F.pad(patch.clamp(min=0) + prefix, (prefix, 0))
        place[:, :prefix] = torch.arange(prefix, device=place.device)  # (B, T), among the P + N
        state = tokens.state or _start(x, prefix + n)
        m = state.alive.float()
        score = torch.zeros_like(m).scatter_add(1, place, halt(x[..., 0], self.scale, self.center) * there) * m
        h = m if last else score
        total = state.total + h
        go = state.alive & (total < 1 - EPSILON)
        done = state.alive & ~go
        weight = state.rest * done + h * go  # (B, P + N), of x in o
        here = weight.gather(1, place) * there  # (B, T)
        out = state.out.scatter_add(1, place.unsqueeze(-1).expand_as(x), x.float() * here.unsqueeze(-1))
        ponder = state.ponder + m + state.rest * done
        state = Halted(out, total, state.rest - h * go, go, ponder, (*state.halting, score))
        if not last:
            return tokens.replace(state=state)
        every = tokens.host.new_zeros(tokens.host.shape) + torch.arange(n, device=x.device)
        return tokens.replace(x=out.to(x.dtype), patch=every, host=every, keep=None, state=state)

    def looked_at(self, tokens, prefix):
        return tokens.state.alive[:, :prefix] if tokens.state is not None else None

    def __call__(self, call):
        c = call.tokens.state.total[:, call.prefix :]  # (B, N)
        c = c.gather(1, call.tokens.patch.clamp(min=0))  # (B, n)
        return (1 - EPSILON - c).masked_fill(call.tokens.patch < 0, float("-inf"))


@in_float32
def halt(first, scale, center):
    """h: first channels of tokens (B, T) → (B, T) float32."""
    return torch.sigmoid(scale * first.float() - center)


def _start(x, every):
    """`Halted` before anything was seen: tokens (B, T, C) of which there are so many in all."""
    one = x.new_ones(x.shape[0], every, dtype=torch.float32)
    zero = torch.zeros_like(one)
    return Halted(x.new_zeros(x.shape[0], every, x.shape[2], dtype=torch.float32), zero, one, one > 0, zero)
