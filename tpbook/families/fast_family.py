"""What the families with a fast path share: `fast_path.py` is what their blocks do.

`at` counts the blocks of the third stage. Unless others are named, Swin-T (6 blocks) and ConvNeXt-T (9) decide at
1, 2, 3, Swin-S and B (18) at 2, 4, 6, ConvNeXt-S and B (27) at 3, 6, 9, as in the official code; that is d // 9 blocks
apart, at least one, and so it is for other depths, which is our choice.

Chapter: :doc:`/book/hybrid-vits`
"""

import math

import torch.nn.functional as F
from timm.layers import get_device_dtype
from torch import nn

from ..methods import METHODS
from ..methods.dynamicvit import KEEP
from ..methods.parts import Place
from ..mixing import enter, leave
from ..pruned import PrunedModel
from .family import Family, Segment
from .fast_path import FastBlock, FastPlan, FastPruning, TracedMap

STAGE = 2  # the third


class FastPath(Family):
    """Base of the families: what of a block is the spatial operator, the MLP and the fast path."""

    mixin, traced = PrunedModel, TracedMap
    residual_inside: bool  # whether the branches add to what the spatial operator gives, which has its own residual
    added: tuple  # of these the first is the predictors', the second the fast path's

    def refusal(self, model):
        if len(self.stages(model)) <= STAGE:
            return f"has {len(self.stages(model))} stages, and it is the third that gets a fast path"
        return None

    # ---- the model

    def stages(self, model):
        """The stages, each with a `downsample` and a list `blocks`."""
        raise NotImplementedError

    def holder(self, model):
        """The module that the official code registers its predictors with."""
        raise NotImplementedError

    def blocks(self, model):
        return list(self.stages(model)[STAGE].blocks)

    def segments(self, model, size=None):
        stages, side, found = self.stages(model), self.embedded(model, *(size or self.image_size(model))), []
        first = -sum(len(stage.blocks) for stage in stages[:STAGE])  # so that the third stage's blocks count from 0
        for stage in stages:
            side, blocks = self.shrunk(stage, *side), list(stage.blocks)
            found.append(Segment(first, blocks, self.norm(model), 0, side, self.width(model)))
            first += len(blocks)
        return found

    def prefix(self, model):
        return 0

    def has_class_token(self, model):
        return False

    def grid(self, model):
        return self.segments(model)[STAGE].grid

    # ---- how it is pruned

    def default_at(self, model, method):
        depth = len(self.blocks(model))  # Swin 6, 18, 18; ConvNeXt 9, 27, 27
        step = max(1, depth // 9)
        return tuple(i for i in (step, 2 * step, 3 * step) if i < depth) or (0,)

    def check(self, model, pruning):
        if not _fits(pruning.method):
            there = ", ".join(name for name, method in METHODS.items() if _fits(method))
            return (
                f"method must be one of {there}, with its own score, on a {self.name}: the fast path takes a learned "
                f"score and moves no token, got {pruning.name!r} with score={pruning.method.score.name!r}"
            )
        if pruning.r is not None:
            return f"r must be left unset on a {self.name}, whose positions stay: use keep_ratio, got {pruning.r!r}"
        try:
            FastPruning(**vars(pruning))
        except ValueError as why:
            return str(why)
        return self.misfit(self.blocks(model)[0], *self.grid(model))

    def install(self, model, pruning):
        plan = FastPlan(FastPruning(**vars(pruning)), self, self.segments(model)[STAGE])  # warns where K would be 0
        blocks, at, dd = self.blocks(model), pruning.at, get_device_dtype(model)
        predictors = nn.ModuleList(self.predictor(pruning.method.score, self.width(model), **dd) for _ in at)
        self.holder(model).score_predictor = predictors.apply(_start).train(model.training)
        stages = dict(zip(at, enumerate(predictors)))
        for i in range(at[0], len(blocks)):
            self.add_path(blocks[i], **dd)
            s, predictor = stages.get(i, (None, None))
            enter(blocks[i], FastBlock, _plan=plan, _stage=s, _predictor=predictor, _last=i == len(blocks) - 1)
        enter(self.norm(model), self.traced, _plan=plan)
        enter(model, self.mixin, _plan=plan)

    def remove(self, model):
        leave(model, "_plan")
        leave(self.norm(model), "_plan")
        for block in self.blocks(model):
            if "_plan" in block.__dict__:
                leave(block, "_plan", "_stage", "_predictor", "_last")
                for name in self.added[1:]:
                    delattr(block, name)
        del self.holder(model).score_predictor

    def predictors(self, model):
        return list(getattr(self.holder(model), "score_predictor", ()))

    def predictor(self, score, width, **dd):
        """The network of one decision, (B, N, C) → (B, N, 2)."""
        return score.build(width, **dd)

    def add_path(self, block, **dd):
        """Give a block its fast path, in the block's mode."""
        raise NotImplementedError

    # ---- a block

    def last(self, x):
        """The library's map → (B, H, W, C)."""
        return x

    def back(self, x):
        """(B, H, W, C) → the library's map."""
        return x

    def spatial(self, block, x):
        """u: (B, H, W, C) → (B, H, W, C)."""
        raise NotImplementedError

    def slow(self, block, u):
        """What the MLP adds to positions (B, …, C)."""
        raise NotImplementedError

    def fast(self, block, u):
        """What the fast path adds to positions (B, …, C)."""
        raise NotImplementedError

    def sample(self, log_probs):
        """The official code's Gumbel sample: (B, N, 2), index 0 = keep → (B, N) zeros and ones, with gradient."""
        return F.gumbel_softmax(log_probs, hard=True)[..., KEEP]

    def misfit(self, block, rows, columns):
        """Why the spatial operator does not fit a map, a sentence; or None."""
        return None

    # ---- cost

    def channels(self, model):
        return model.in_chans

    def embedded(self, model, rows, columns):
        """The map that the embedding makes of an image."""
        raise NotImplementedError

    def shrunk(self, stage, rows, columns):
        """The map of a stage, of that which enters it."""
        raise NotImplementedError

    def spatial_macs(self, block, rows, columns):
        """MACs of the spatial operator on a map: of its weights, and of products of queries, keys and values."""
        raise NotImplementedError

    def embeddings(self, model):
        return [self.embedding(model), *(stage.downsample for stage in self.stages(model))]

    def embed_macs(self, model, size):
        stem = math.prod(self.embedded(model, *size)) * weights(self.embedding(model))
        maps = (segment.grid for segment in self.segments(model, size))
        return stem + sum(math.prod(grid) * weights(stage.downsample) for grid, stage in zip(maps, self.stages(model)))

    def block_macs(self, block, seen, left, queries, grid):
        n = math.prod(grid)
        fast = weights(getattr(block, self.added[1])) if left < n else 0
        linear, products = self.spatial_macs(block, *grid)
        return linear + left * weights(block.mlp) + (n - left) * fast, products, 0

    def head_macs(self, model, n):
        return weights(model.head)


def weights(module):
    """MACs of one position through every linear layer and convolution in a module."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))


def _fits(method):
    """Whether a method only says which positions count: it learns a score, and drops."""
    reduce = method.reduce
    counted = method.chooses.counted
    return counted and method.score.learned and method.place is Place.BEFORE and not (reduce.hosts or reduce.adds)


def _start(module):
    """The official start of what is new."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
