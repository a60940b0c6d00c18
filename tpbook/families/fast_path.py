"""The fast path: positions of a map that are not chosen stay, and get a linear layer in the place of the MLP.

Dynamic spatial sparsification (Rao et al. 2022, DynamicViT's journal paper), ``dyswin.py`` and ``dyconvnext.py`` of the
official code. Only the third stage is sparse. Its spatial operator S, window attention or depthwise convolution, always
sees the whole map; at the blocks `at` a predictor scores all N positions anew, and the ⌊r_s·N⌋ best ones get the MLP::

    u = S(x),    y_i = b_i + MLP(u_i) of those chosen,    y_j = b_j + F(u_j) of the others

with F the fast path, a norm and one linear layer. b is u in Swin, whose S has its own residual, and x in ConvNeXt. One
ρ stands for r = (ρ, ρ − 0.2, ρ − 0.4), each of all N and exact: at ρ = 0.7 the official `int(N * (0.7 - 0.2))`, in
floats, keeps 97 of 196 where we keep 98. A position that a decision leaves out the next one may take in again.

While it trains there are two maps, x¹ for those chosen by the Gumbel sample m, which is not multiplied by the one
before it, and x² for the others; both branches are computed everywhere (`pair`)::

    x = x¹⊙m + x²⊙(1 − m),    u = S(x)
    x¹ ← b¹ + MLP(u⊙m + x¹⊙(1 − m)),    x² ← b² + F(u⊙(1 − m) + x²⊙m)        b¹ = b² = u, or b¹ = x¹, b² = x²

So where a decision flips, a position goes on with the other branch's own map, which the forward of eval mode does not
have: the two differ there, in the official code as here, and agree where all decisions are one. The official Swin takes
a batch of two images in eval mode for the pair of maps, and fails; here the pair is a `Maps`.

Chapter: :doc:`/book/hybrid-vits`
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from ..methods.counts import Wish, quiet_counts, token_counts
from ..methods.dynamicvit import KEEP
from ..plan import Plan, Pruning
from ..record import Seen, Traced
from ..tokens import check_intact, drop, rows, travels

STEP = Fraction(1, 5)  # by how much the ratio falls from decision to decision


@travels
class Maps(NamedTuple):
    """What goes from block to block of the third stage."""

    x: Tensor
    """(B, H, W, C); while it trains x¹."""
    counts: tuple
    """One `StageCount` a decision."""
    kept: int | None = None
    """How many positions of `order` are chosen; None where all are."""
    order: Tensor | None = None
    """(B, N) int64, the chosen positions first."""
    other: Tensor | None = None
    """(B, H, W, C), x², while it trains."""
    keep: Tensor | None = None
    """(B, N), m, while it trains."""
    record: tuple | None = None
    """One `tpbook.record.Seen` a decision so far; None if nobody traces."""

    def whole(self):
        """(B, H, W, C), one map."""
        if self.keep is None:
            return self.x
        m = on_map(self.keep, self.x)
        return self.x * m + self.other * (1 - m)


def on_map(keep, x):
    """(B, N) beside a map (B, H, W, C) → (B, H, W, 1), in its dtype."""
    return keep.view(*x.shape[:3], 1).to(x.dtype)


def sparse(family, block, x, order, kept):
    """A block in eval mode.

    Args:
        family: a `FastPath`.
        block: a block with a fast path.
        x: (B, H, W, C).
        order: (B, N) int64, every position once, those that get the MLP first.
        kept: how many do.

    Returns:
        (B, H, W, C).
    """
    u = family.spatial(block, x)
    base = u if family.residual_inside else x
    flat = u.flatten(1, 2)  # (B, N, C)
    slow = family.slow(block, drop(flat, order[:, :kept]))  # (B, K, C)
    fast = family.fast(block, drop(flat, order[:, kept:]))  # (B, N − K, C)
    added = torch.cat([slow, fast], dim=1).flatten(0, 1).to(base.dtype)  # (B·N, C)
    return base.flatten(0, 2).index_add(0, rows(order, flat.shape[1]).flatten(), added).view(base.shape)


def pair(family, block, x1, x2, m):
    """A block while it trains: maps x¹, x² (B, H, W, C) and the sample m (B, H, W, 1) → x¹, x²."""
    u = family.spatial(block, x1 * m + x2 * (1 - m))
    b1, b2 = (u, u) if family.residual_inside else (x1, x2)
    slow = family.slow(block, u * m + x1 * (1 - m))
    fast = family.fast(block, u * (1 - m) + x2 * m)
    return b1 + slow, b2 + fast


class FastBlock:
    """Mixed into the class of each block of the third stage from the first that decides on."""

    def forward(self, x):
        """A map in the library's layout, or `Maps` → `Maps`, or from the last block of the stage a map."""
        plan, family = self._plan, self._plan.family
        check_intact(x, Maps)
        maps = x if isinstance(x, Maps) else plan.begin(self, family.last(x))
        if self._stage is not None:
            maps = plan.decide(self._stage, maps, self._predictor, self.training)
        if maps.keep is not None:
            x1, x2 = pair(family, self, maps.x, maps.other, on_map(maps.keep, maps.x))
            maps = maps.replace(x=x1, other=x2)
        elif maps.kept is not None:
            maps = maps.replace(x=sparse(family, self, maps.x, maps.order, maps.kept))
        else:
            maps = maps.replace(x=family.last(super().forward(family.back(maps.x))))
        return plan.end(maps) if self._last else maps


@dataclass(frozen=True)
class FastPruning(Pruning):
    """A `Pruning` whose decisions do not follow one another: each chooses among all N positions."""

    def __post_init__(self):
        if self.ratios and self.ratios[-1] <= 0:
            fall = STEP * (len(self.at) - 1)
            raise ValueError(
                f"keep_ratio must be above {float(fall)} for {len(self.at)} decisions, each of which keeps "
                f"{float(STEP)} less than the one before, got {self.keep_ratio!r}; or one ratio a decision"
            )

    @property
    def ratios(self):
        """One a decision: ρ, ρ − 0.2, ρ − 0.4 of one ρ; or as they were given, or a `Wish`."""
        if self.keep is not None or isinstance(self.keep_ratio, tuple):
            return super().ratios
        return tuple(Fraction(str(self.keep_ratio)) - s * STEP for s in range(len(self.at)))

    def counts(self, patches, count=token_counts):
        """list of `StageCount`, one a decision, for N = `patches`: N enter each, ⌊r·N⌋ get the MLP."""
        return [count(patches, [ratio], self.method)[0] for ratio in self.ratios]

    def shares(self, patches):
        """What it trains towards: the share of each decision, of the N = `patches` positions."""
        return [float(ratio) / (patches if isinstance(ratio, Wish) else 1) for ratio in self.ratios]


class FastPlan(Plan):
    """What the blocks of the third stage share: read by every forward, written by none."""

    def counts(self, patches):
        """One `StageCount` a decision."""
        if patches == self.patches:
            return super().counts(patches)
        return tuple(self.pruning.counts(patches, quiet_counts))

    def begin(self, block, x):
        """(B, H, W, C) → `Maps`; ValueError where a window does not fit the map."""
        if why := self.family.misfit(block, *x.shape[1:3]):
            raise ValueError(why)
        return Maps(x, self.counts(x.shape[1] * x.shape[2]), record=None if self.trace is None else ())

    def decide(self, s, maps, predictor, training):
        """Decision s: score every position of the map, and choose; or while it trains, sample."""
        count, record, invert = maps.counts[s], maps.record is not None, self.pruning.invert
        if not (training or record or count.kept < count.enter):
            return maps.replace(kept=None, order=None)
        x = maps.whole().flatten(1, 2)  # (B, N, C)
        log_probs = predictor(x)  # (B, N, 2)
        scores, order, keep = log_probs[..., KEEP], None, None
        if training:
            keep = self.family.sample(log_probs.flip(-1) if invert else log_probs)  # (B, N)
            other = maps.x if maps.other is None else maps.other
            left = maps.replace(keep=keep, other=other)
        else:
            order = scores.argsort(dim=1, descending=not invert)  # (B, N)
            left = maps.replace(kept=None if count.kept >= count.enter else count.kept, order=order)
        if not record:
            return left
        kept = None if training else order[:, : count.kept]
        return left.replace(record=(*maps.record, Seen(scores, kept, None, keep, x)))

    def end(self, maps):
        """What the last block of the stage hands on: a map in the library's layout."""
        if maps.record is not None and self.trace is not None:
            self.trace.fill(maps.record)
        return self.family.back(maps.whole())


class TracedMap(Traced):
    """Mixed into the class of the last norm: what it gives is a whole map."""

    def forward(self, x, *args, **kwargs):
        """What it gives, (B, H, W, C)."""
        y = super(Traced, self).forward(x, *args, **kwargs)
        if self._plan.trace is not None:
            self._plan.trace.features, self._plan.trace.whole = y.flatten(1, 2), True
        return y
