"""What the engine asks of a backbone.

A family knows one library's models: where the blocks are, how the two halves of a block run, and which positions must
follow the tokens. The engine knows nothing of any library; a library's names occur in its family's file alone.

A model must hold a list of blocks that its own forward calls one after another, on a sequence (B, P + N, C) whose first
P tokens are never pruned.
"""

import math
from typing import NamedTuple

import torch
from timm.layers import get_device_dtype
from timm.models.vision_transformer import init_weights_vit_timm
from torch import nn

from ..checks import default_at
from ..methods.parts import Place
from ..mixing import enter, leave
from ..plan import Plan, Plans
from ..pruned import PrunedBlock
from ..record import Traced
from .costs import Costed


class Segment(NamedTuple):
    """Blocks that work on one map."""

    first: int  # the index of the first of them among all blocks
    blocks: list
    norm: nn.Module  # that gives their final sequence: the norm after the last block, or that block
    prefix: int  # P
    grid: tuple  # (rows, columns)
    width: int  # C
    pooled: bool = False  # whether the model averages the map that comes out, and asks nobody which tokens count

    @property
    def indices(self):
        """Their numbers among all blocks, a range."""
        return range(self.first, self.first + len(self.blocks))


class Family(Costed):
    """Base of all families; the docstring of each method says what it answers."""

    name: str  # as errors list it
    mixin: type  # mixed into the class of a pruned model: what of its public calls needs to know
    traced = Traced  # mixed into the class of `norm`: what notes the final tokens
    exported = False  # whether `tpbook.export` writes it: (B, C, H, W) images to a tensor of logits

    def fits(self, model):
        """Whether this family can take the model."""
        raise NotImplementedError

    def refusal(self, model):
        """Why this model, though of the family, cannot be pruned: a sentence; or None."""
        return None

    def inside(self, model):
        """The model that gets pruned: this one, or the one that it holds, which is of another family."""
        return model

    # ---- how it is pruned

    options = ()  # of `tpbook.prune`, which models of this family take beside the method's

    def segments(self, model, size=None):
        """The stretches of blocks that work on one map each, in order: a flat ViT has one.

        Args:
            model: of this family.
            size: (height, width) of the image in pixels; None is the model's own.

        Returns:
            list of `Segment`.
        """
        grid = self.grid(model)
        if size is not None:
            grid = tuple(side // patch for side, patch in zip(size, self.patch_size(model)))
        return [Segment(0, self.blocks(model), self.norm(model), self.prefix(model), grid, self.width(model))]

    def default_at(self, model, method):
        """The blocks that a `Method` prunes unless others are named."""
        first = method.hears and method.place is Place.BEFORE  # which hears the block before
        return tuple(i for i in default_at(len(self.blocks(model))) if i >= first)

    def patches(self, model, at):
        """How many patch tokens there are before each stage if none before it removed any: N, one a stage."""
        return [math.prod(segment.grid) for i in at for segment in self.segments(model) if i in segment.indices]

    def check(self, model, pruning):
        """Why this family cannot be pruned so, a sentence; or None."""
        return None

    def install(self, model, pruning):
        """Make it a pruned model, by a `Pruning` that was checked."""
        segments, plans, skip = self.segments(model), [], 0
        pruned = [segment for segment in segments if set(pruning.at) & set(segment.indices)]
        for segment in pruned:  # warns where a stage would keep no token
            first = sum(i < segment.first for i in pruning.at)
            plans.append(Plan(pruning.within(segment.indices), self, segment, first, skip))
            skip += plans[-1].patches
        predictors = [None] * len(pruning.at)
        if pruning.method.score.learned:
            dd, widths = get_device_dtype(model), [s.width for i in pruning.at for s in pruned if i in s.indices]
            score, blocks = pruning.method.score, self.blocks(model)
            more = [{"heads": self.heads(blocks[i])} if score.counts_heads else {} for i in pruning.at]
            predictors = nn.ModuleList(score.build(width, **also, **dd) for width, also in zip(widths, more))
            predictors.apply(init_weights_vit_timm)
            model.score_predictor = predictors.train(model.training)
        for segment, plan in zip(pruned, plans):
            _prune(segment, plan, predictors[plan.first :])
        enter(model, self.mixin, _plan=plans[0] if len(segments) == 1 else Plans(pruning, plans))

    def remove(self, model):
        """Undo `install`."""
        leave(model, "_plan")
        for segment in self.segments(model):
            for block in segment.blocks:
                if "_stage" in block.__dict__:
                    leave(block, "_plan", "_stage", "_place", "_predictor", "_hears", "_last", "_closes")
            if "_plan" in segment.norm.__dict__:
                leave(segment.norm, "_plan")
        if hasattr(model, "score_predictor"):
            del model.score_predictor

    def predictors(self, model):
        """The score predictors of a pruned model, one a stage; none where nothing is learned."""
        return list(getattr(model, "score_predictor", ()))

    # ---- the model

    def blocks(self, model):
        """The blocks, in order."""
        raise NotImplementedError

    def norm(self, model):
        """The module that gives the final sequence (B, P + n, C): the last norm, or the last block."""
        raise NotImplementedError

    def prefix(self, model):
        """P, the tokens before the patches: class, distillation, registers."""
        raise NotImplementedError

    def grid(self, model):
        """(rows, columns) of the N patches of an image of the model's own size."""
        raise NotImplementedError

    def width(self, model):
        """C."""
        raise NotImplementedError

    def has_class_token(self, model):
        """Whether the first token is a class token."""
        raise NotImplementedError

    def pools_unmasked(self, model):
        """What this model is, where its pool cannot leave tokens out that are there; or None."""
        return None

    def places(self, model):
        """Why a score that depends on the place in the image cannot be had, a sentence; or None."""
        return None

    # ---- a block

    call = ()  # names of what a block's forward takes after the tokens, in order

    def arguments(self, args, kwargs):
        """What a block was called with besides the tokens, by name."""
        return {**dict(zip(self.call, args)), **kwargs} if args else kwargs

    def check_block(self, block):
        """Why a block has no two halves that are known, what it is and what is wanted; or None."""
        return None

    def check_attention(self, block):
        """Why a block's attention cannot be listened to; or None."""
        return None

    def positions(self, arguments, patch, prefix):
        """The arguments of a block's call, with positions gathered: `patch` (B, n) says which tokens are left.

        Args:
            arguments: dict of what the model's forward gives a block besides the tokens.
            patch: (B, n) int64, or None where every token is there still.
            prefix: P.
        """
        return arguments

    positioned = False  # whether `positions` needs `patch`
    pools_tokens = False  # whether the last block hands `Tokens` on to the model's pool where they have weights

    def leaving(self, tokens, plan):
        """`Tokens` that enter a stage which will remove some: what has to be remembered of those."""
        return tokens

    def keeps_tokens(self, tokens):
        """Whether what comes after the last block has to know which tokens there are: then it gets `Tokens`."""
        return self.pools_tokens and tokens.weight is not None

    def wrap(self, y):
        """What the library's loop expects of a block."""
        return y

    def attend(self, block, tokens, mask, arguments):
        """The tokens after the attention half: `Tokens` and an `AttentionMask` or None → (B, T, C)."""
        return self.first(block, tokens.x, mask, arguments)

    def transform(self, block, tokens, arguments):
        """The tokens after the MLP half: `Tokens` → (B, T, C)."""
        return self.second(block, tokens.x)

    def first(self, block, x, mask, arguments):
        """x plus the attention half: (B, T, C) and an `AttentionMask` or None → (B, T, C)."""
        raise NotImplementedError

    def second(self, block, x):
        """x plus the MLP half: (B, T, C) → (B, T, C)."""
        raise NotImplementedError

    def hand_on(self, tokens, plan):
        """What the last norm hands on where `keeps_tokens`: `Tokens`, or (B, P + n, C)."""
        return tokens

    def official(self, state):
        """A state dict under the library's names, of one that may be under those of the model's authors."""
        return state

    # ---- training

    def class_logits(self, model, images):
        """What a teacher says of images, as the loss of its student wants it: (B, in_chans, H, W) → (B, classes)."""
        return model(images)

    added = ("score_predictor",)  # names of the modules and parameters that pruning adds, somewhere in the model

    def distilled(self, model, features):
        """What the token loss compares: the final patch tokens (B, n, C) → (B, n, …)."""
        return features


def _prune(segment, plan, predictors):
    """Give the blocks of a `Segment`, and its norm, the classes that its `Plan` serves; its `predictors` come first."""
    pruning, blocks = plan.pruning, segment.blocks
    stages, hears = dict(zip(pruning.at, enumerate(predictors))), pruning.listeners
    closes = segment.norm is blocks[-1]
    for i, block in enumerate(blocks, segment.first):
        if i < min((pruning.at[0], *hears)):
            continue
        s, predictor = stages.get(i, (None, None))
        place = None if s is None else pruning.method.place
        enter(block, PrunedBlock, _plan=plan, _stage=s, _place=place, _predictor=predictor, _hears=hears.get(i),
              _last=block is blocks[-1], _closes=closes)  # fmt: skip
    if not closes:
        enter(segment.norm, Traced, _plan=plan)


def mean_as_weighed(tokens, prefix):
    """`Tokens` → (B, P + n, C), whose rows have the mean that those of `tokens` have by their weight.

    For models that average their patches and ask nobody how much each counts. Where tokens only count or not, those
    that count stay as they are; where they have merged, all are shifted alike.
    """
    x, keep = tokens.x[:, prefix:], tokens.keep
    if tokens.size is not None:
        weight = tokens.weight.unsqueeze(-1)  # (B, n, 1)
        wanted = (x.float() * weight).sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True)
        x = x + (wanted - x.float().mean(dim=1, keepdim=True)).to(x.dtype)
    else:
        x = mean_elsewhere(x, keep)
    return torch.cat([tokens.x[:, :prefix], x], dim=1)


def mean_elsewhere(x, keep):
    """Rows of dropped tokens become the mean of the others: then the mean of all is that of the others too, exactly.

    For models that average their patches and ask nobody which ones count.

    Args:
        x: (B, n, C).
        keep: (B, n), D.

    Returns:
        (B, n, C).
    """
    keep = keep.unsqueeze(-1).to(x.dtype)  # (B, n, 1)
    mean = (x * keep).sum(dim=1, keepdim=True) / keep.sum(dim=1, keepdim=True)  # (B, 1, C)
    return x * keep + mean * (1 - keep)
