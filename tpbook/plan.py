"""How a model is pruned, and what its blocks do with the tokens that pass: all of it said by the method's parts.

Chapter: :doc:`/book/a-tour-of-keep-ratios`
"""

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from .attention import AttentionMask
from .kernels import stage_kernels
from .methods.counts import Fewer, StageCount, Wish, quiet_counts, token_counts
from .methods.parts import Call, Method, Place
from .methods.schedule import schedule
from .record import Seen
from .tokens import PADDING, Tokens


@dataclass(frozen=True)
class Pruning:
    """How a model is pruned: what `prune` was given, defaults filled in. `model.pruning` returns it."""

    name: str
    method: Method
    at: tuple[int, ...]
    keep_ratio: float | tuple[float, ...] | None  # None where `keep` or `r` is given
    keep: int | tuple[int, ...] | None
    invert: bool
    seed: int | None
    options: dict = field(default_factory=dict)  # of the model's family
    r: int | tuple | None = None  # as `schedule` takes it

    @property
    def ratios(self):
        """One a stage: ρ, or a `Wish`, how many tokens it keeps, or `Fewer`, how many it removes."""
        if self.r is not None:
            return tuple(map(Fewer, schedule(self.r, len(self.at))))
        several = self.keep_ratio if self.keep is None else self.keep
        several = several if self.method.chooses.counted else 1.0  # as many as there are
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
        if self.r is not None and len(stages) < len(self.at):
            several["r"] = [schedule(self.r, len(self.at))[s] for s in stages]
        return replace(self, **several)

    @property
    def listeners(self):
        """Block → the stage that reads its attention: its own block's, or before a block that of the block before.

        A lasting score hears the blocks between its stages too.
        """
        if not self.method.hears:
            return {}
        heard = {i - (self.method.place is Place.BEFORE): s for s, i in enumerate(self.at)}
        if not self.method.score.lasting:
            return heard
        return {i: min(s for j, s in heard.items() if j >= i) for i in range(min(heard), max(heard) + 1)}

    def shares(self, patches):
        """What a learned method trains towards: the share of the N = `patches` tokens after each stage, ρ₁⋯ρ_s."""
        share, shares = 1.0, []
        for ratio in self.ratios:
            if isinstance(ratio, Fewer):
                share -= ratio / patches
            else:
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

    `onnx_plan.py` overrides `counts`, `keeps_all`, `rank` and `choose`. A model whose map changes between its blocks
    has a plan for each map, and `Plans` of them.
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
        return kept >= n and not self.pruning.method.chooses.varies

    def choose(self, call, kept):
        """Who stays: `Choice`, of the `kept` best ones or as the method says."""
        method = self.pruning.method
        return method.chooses(call, kept, self.rank, method.reduce.ordered)

    def rank(self, scores, k, others=False):
        """Positions of scores (B, n), the best first: (B, k), or (B, n) where the others are wanted too."""
        invert, settled = self.pruning.invert, self.pruning.method.score.settled
        if kernels := stage_kernels(scores):
            return kernels.rank(scores, scores.shape[1] if others else k, invert)
        if not (others or settled):
            return scores.topk(k, largest=not invert).indices
        return scores.argsort(dim=1, descending=not invert, stable=settled)

    def shares(self, decisions):
        """What a learned method trains towards, one a stage: of decisions (B, N), those of this plan first."""
        return self.pruning.shares(decisions[0].shape[1])

    # ---- one forward

    def begin(self, x, training):
        """(B, P + N, C) → `Tokens`. Who is who is followed only where somebody asks."""
        method, patches = self.pruning.method, int(x.shape[1]) - self.prefix
        score = method.score
        if score.placed and patches != self.patches:
            raise ValueError(
                f"score={score.name!r} needs images of the model's own size, {self.grid[0]} × {self.grid[1]} patches; "
                f"got {patches} patches"
            )
        every = None
        if self.trace is not None or method.follows or (training and score.learned):
            every = _every(x, patches)
        return Tokens(x, self.counts(patches), every, every, record=None if self.trace is None else ())

    def mask(self, tokens, stage, training):
        """What the attention of a block is handed: an `AttentionMask`, or None where it neither hides nor hears."""
        method, hears, graph = self.pruning.method, False, True
        if stage is not None and method.hears:
            counts = tokens.counts[stage:] if method.score.lasting else tokens.counts[stage : stage + 1]
            graph = not all(self.keeps_all(count.kept, count.enter) for count in counts)
            graph = graph or (training and method.score.learned)
            hears = graph or tokens.record is not None
        keep = bias = None
        if training and method.score.learned and tokens.keep is not None:
            keep = F.pad(tokens.keep, (self.prefix, 0), value=1.0)  # (B, T)
        elif method.reduce.proportional and tokens.weight is not None:
            bias = F.pad(tokens.weight.float().log(), (self.prefix, 0))  # (B, T): log s, −∞ for padding
        elif tokens.keep is not None:
            bias = F.pad(tokens.keep.float().log(), (self.prefix, 0))
        if (front := method.score.looked_at(tokens, self.prefix)) is not None:
            bias = tokens.x.new_zeros(tokens.x.shape[:2], dtype=torch.float32) if bias is None else bias
            bias = torch.cat([bias[:, : self.prefix] + front.float().log(), bias[:, self.prefix :]], dim=1)
        if bias is not None and method.chooses.varies:  # where no token is left it looks at all, and nobody reads it
            bias = bias.masked_fill((bias == float("-inf")).all(dim=1, keepdim=True), 0)
        heads = method.score.heads(tokens)
        if not hears and keep is None and bias is None and heads is None:
            return None
        queries, reads = (method.queries, method.reads) if hears else (None, ())
        return AttentionMask(tokens.x.dtype, keep, queries, reads, bias, graph, heads)

    def listen(self, tokens, mask):
        """`Tokens` after an attention that was handed a mask: with what it let hear, where it did."""
        mask.check()
        heard = tokens.replace(heard=mask.heard)
        return self.pruning.method.score.follow(heard, self.prefix) if mask.hears else tokens

    def stage(self, s, tokens, predictor, training):
        """Stage s: score the patch tokens, choose, reduce; or, while a learned method trains, sample who stays."""
        method, count = self.pruning.method, tokens.counts[s]
        tokens = method.score.look(method.reduce.rejoin(tokens, self.prefix), self.prefix)
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
        call = Call(
            tokens, x, self.prefix, self.first + s, predictor, self.grid, self.pruning.seed, skip, method.score
        )  # fmt: skip
        if sampling or reducing:
            call = call._replace(found=method.score.find(call))
            tokens = method.score.note(tokens, call, training)
            call = call._replace(tokens=tokens)
        if sampling:
            scores, keep = method.score.decide(call, self.pruning.invert)
            if method.reduce.protects and s:  # what an earlier stage added stays
                keep = torch.where(tokens.patch < 0, 1.0, keep)
            left = method.reduce.masked(tokens, keep, call._replace(scores=scores))
        elif reducing:
            scores = method.score(call)
            if method.reduce.protects and s:  # what an earlier stage added stays
                added = tokens.patch < 0
                scores = scores.masked_fill(added, float("-inf") if self.pruning.invert else float("inf"))
            choice = self.choose(call._replace(scores=scores), count.kept)
            left = method.reduce(tokens, choice.order, choice.kept, call._replace(scores=scores))
            if method.chooses.varies:
                left = pad(left, choice.alive)
        else:  # drawn whether needed or not, so that later draws do not depend on the ratio
            with torch.no_grad():
                scores, left = method.score(call._replace(found=method.score.find(call))), tokens
        if not record:
            return left
        alive = left.keep[:, : left.host.shape[1]] if sampling else None  # a fused token decides nothing
        host = left.host if method.reduce.hosts else None
        patch = None if sampling else left.patch
        return left.replace(record=(*left.record, Seen(scores, patch, host, alive, x, left.size)))

    def end(self, tokens):
        """What the last block hands on: the tensor, or `Tokens` where what comes has to know which there are."""
        method = self.pruning.method
        tokens = method.score.look(method.reduce.rejoin(tokens, self.prefix, last=True), self.prefix, last=True)
        if tokens.record is not None and self.trace is not None:
            self.trace.fill(tokens.record, self.first, tokens.state)
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


def pad(tokens, alive):
    """`Tokens` of which alive (B, n) says which are padding; None: none is."""
    if alive is None:
        return tokens.replace(keep=None)
    return tokens.replace(keep=alive.to(tokens.x.dtype), patch=tokens.patch.masked_fill(~alive, PADDING))


def _every(x, patches):
    """(B, N) int64, each patch's own number."""
    return torch.arange(patches, device=x.device).expand(x.shape[0], -1)
