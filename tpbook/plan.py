"""How a model is pruned, and what its blocks do with the tokens that pass: all of it said by the method's parts.

Chapter: :doc:`/book/a-tour-of-keep-ratios`
"""

from dataclasses import dataclass, field, replace

import torch

from .attention import AttentionMask
from .methods.counts import StageCount, Wish, quiet_counts, token_counts
from .methods.parts import Call, Method, Place
from .record import Seen
from .tokens import Tokens


@dataclass(frozen=True)
class Pruning:
    """How a model is pruned: what `prune` was given, defaults filled in. `model.pruning` returns it."""

    name: str
    method: Method
    at: tuple[int, ...]
    keep_ratio: float | tuple[float, ...] | None  # None where `keep` is given
    keep: int | tuple[int, ...] | None
    invert: bool
    seed: int | None
    options: dict = field(default_factory=dict)  # of the model's family

    @property
    def ratios(self):
        """One a stage: ρ, or a `Wish`, how many tokens it keeps."""
        several = self.keep_ratio if self.keep is None else self.keep
        several = several if isinstance(several, tuple) else (several,) * len(self.at)
        return several if self.keep is None else tuple(map(Wish, several))

    def counts(self, patches):
        """list of `StageCount`, one a stage, for N = `patches`."""
        return token_counts(patches, self.ratios, self.method)

    def within(self, blocks):
        """What of it concerns a range of blocks."""
        stages = [s for s, i in enumerate(self.at) if i in blocks]
        several = {"at": self.at, "keep_ratio": self.keep_ratio, "keep": self.keep}
        several = {name: tuple(value[s] for s in stages) for name, value in several.items() if isinstance(value, tuple)}
        return replace(self, **several)

    @property
    def listeners(self):
        """Block → the stage that reads its attention: its own block's, or before a block that of the block before."""
        if self.method.queries is None:
            return {}
        return {i - (self.method.place is Place.BEFORE): s for s, i in enumerate(self.at)}

    def shares(self, patches):
        """What a learned method trains towards: the share of the N = `patches` tokens after each stage, ρ₁⋯ρ_s."""
        share, shares = 1.0, []
        for ratio in self.ratios:
            share = ratio / patches if isinstance(ratio, Wish) else share * float(ratio)
            shares.append(share)
        return shares


class Sized:
    """A `StageCount` whose numbers are sizes of tensors, since those are what a compiler takes for variable."""

    def __init__(self, count):
        self.sizes = [torch.empty(number + 1, 0) for number in count]  # one more, since it takes a size of 1 for fixed
        for size in self.sizes:
            torch._dynamo.maybe_mark_dynamic(size, 0)

    def count(self):
        """The numbers."""
        return StageCount(*(size.shape[0] - 1 for size in self.sizes))


class Plan:
    """What the blocks of a pruned model share: read by every forward, written by none.

    `onnx_plan.py` overrides `counts`, `keeps_all` and `order`. A model whose map changes between its blocks has a
    plan for each map, and `Plans` of them.
    """

    decides = True  # on the tokens that come out

    def __init__(self, pruning, family, segment, first=0, skip=0):
        self.family, self.prefix, self.grid, self.blocks = family, segment.prefix, segment.grid, segment.indices
        self.first, self.skip = first, skip  # stages, and patches, of the plans before it
        self.patches, self.pooled = segment.grid[0] * segment.grid[1], segment.pooled
        self.trace = None  # a Trace, while somebody looks
        self.adopt(pruning)

    @property
    def plans(self):
        """As `Plans.plans`: itself."""
        return (self,)

    def __getstate__(self):
        return {**self.__dict__, "trace": None}  # whoever looks at this model does not look at its copy

    def adopt(self, pruning):
        """Take another keep ratio; warns where a stage would keep no token."""
        counts = pruning.counts(self.patches)
        self.own = tuple(Sized(count) for count in counts)
        self.scarce = min(count.kept for count in counts) == 1  # else no stage wished to keep none
        self.pruning = pruning

    def counts(self, patches):
        """One `StageCount` a stage."""
        if patches == self.patches:
            if self.scarce and not torch.compiler.is_compiling():
                self.pruning.counts(patches)  # warns
            return tuple(sized.count() for sized in self.own)
        return quiet_counts(patches, self.pruning.ratios, self.pruning.method)

    def keeps_all(self, kept, n):
        """Whether all n tokens stay, so that a stage has nothing to do."""
        return kept >= n

    def order(self, scores, kept):
        """(B, n) positions, those to keep first; or of the `kept` best ones alone where the others are not used."""
        method, invert = self.pruning.method, self.pruning.invert
        if not (method.reduce.ordered or method.score.settled):
            return scores.topk(kept, largest=not invert).indices
        return scores.argsort(dim=1, descending=not invert, stable=method.score.settled)

    def shares(self, decisions):
        """What a learned method trains towards, one a stage: of decisions (B, N), those of this plan first."""
        return self.pruning.shares(decisions[0].shape[1])

    # ---- one forward

    def begin(self, x, training):
        """(B, P + N, C) → `Tokens`. Who is who is followed only where somebody asks."""
        score, patches = self.pruning.method.score, int(x.shape[1]) - self.prefix
        if score.placed and patches != self.patches:
            raise ValueError(
                f"score={score.name!r} needs images of the model's own size, {self.grid[0]} × {self.grid[1]} patches; "
                f"got {patches} patches"
            )
        every = None
        if self.trace is not None or score.placed or (training and score.learned):
            every = _every(x, patches)
        return Tokens(x, self.counts(patches), every, every, record=None if self.trace is None else ())

    def mask(self, tokens, stage, training):
        """What the attention of a block is handed: an `AttentionMask`, or None where it neither hides nor hears."""
        queries, graph = None, True
        if stage is not None and self.pruning.method.queries is not None:
            count = tokens.counts[stage]
            graph = not self.keeps_all(count.kept, count.enter) or (training and self.pruning.method.score.learned)
            if graph or tokens.record is not None:
                queries = self.pruning.method.queries
        if queries is None and tokens.keep is None:
            return None
        keep = tokens.keep
        if keep is not None:
            keep = torch.cat([torch.ones_like(keep[:, :1]).expand(-1, self.prefix), keep], dim=1)  # (B, T)
        return AttentionMask(tokens.x.dtype, keep, queries, graph=graph)

    def stage(self, s, tokens, predictor, training):
        """Stage s: score the patch tokens, choose, reduce; or, while a learned method trains, sample who stays."""
        method, count = self.pruning.method, tokens.counts[s]
        x = tokens.x[:, self.prefix :]  # (B, n, C)
        sampling, record = training and method.score.learned, tokens.record is not None
        reducing = not self.keeps_all(count.kept, x.shape[1])
        if not (sampling or reducing or record or method.score.drawn):
            return tokens
        if reducing and self.family.positioned and tokens.patch is None:  # from here on who is who matters
            every = _every(x, x.shape[1])
            tokens = tokens.replace(patch=every, host=every)
        if sampling or reducing:
            tokens = self.family.leaving(tokens, self)
        skip = self.skip + sum(earlier.enter for earlier in tokens.counts[:s])
        call = Call(tokens, x, self.prefix, self.first + s, predictor, self.grid, self.pruning.seed, skip)
        if sampling:
            scores, keep = method.score.decide(call, self.pruning.invert)
            left = method.reduce.masked(tokens, keep, call)
        elif reducing:
            scores = method.score(call)
            left = method.reduce(tokens, self.order(scores, count.kept), count.kept, call)
        else:  # drawn whether needed or not, so that later draws do not depend on the ratio
            with torch.no_grad():
                scores, left = method.score(call), tokens
        if not record:
            return left
        alive = left.keep[:, : left.host.shape[1]] if sampling else None  # a fused token decides nothing
        host = left.host if method.reduce.hosts else None
        return left.replace(record=(*left.record, Seen(scores, None if sampling else left.patch, host, alive, x)))

    def end(self, tokens):
        """What the last block hands on: the tensor, or `Tokens` where what comes has to know which there are."""
        if tokens.record is not None and self.trace is not None:
            self.trace.fill(tokens.record, self.first)
        return tokens if self.family.keeps_tokens(tokens) else tokens.x


class Plans:
    """In the place of a `Plan` where a model has several maps: the plans of those with a stage, and their one knob."""

    def __init__(self, pruning, plans):
        self.pruning, self.plans = pruning, plans

    @property
    def family(self):
        """That of the model."""
        return self.plans[0].family

    @property
    def trace(self):
        """The `Trace` of whoever looks, or None."""
        return self.plans[0].trace

    @trace.setter
    def trace(self, trace):
        for plan in self.plans:
            plan.trace = trace

    def adopt(self, pruning):
        """Take another keep ratio."""
        for plan in self.plans:
            plan.adopt(pruning.within(plan.blocks))
        self.pruning = pruning

    def shares(self, decisions):
        """As `Plan.shares`."""
        return [share for plan in self.plans for share in plan.shares(decisions[plan.first :])]


def _every(x, patches):
    """(B, N) int64, each patch's own number."""
    return torch.arange(patches, device=x.device).expand(x.shape[0], -1)
