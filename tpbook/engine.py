"""Prunes a vision transformer at its blocks: no method's name and no library's attribute occurs here.

`prune` gives each block from the first pruned one on the class `PrunedBlock`, ahead of its own. The model's own forward
does the rest: embedding, loop, norm, head. From block to block go `Tokens`; a `Plan`, which all blocks share, says what
to do with them, and nothing of a forward is kept on either. So a pruned model may be called from several threads, an
exception leaves it as it was, and hooks, adapters, checkpointing, FSDP and compilers find the modules that they know.

Chapter: :doc:`/book/a-tour-of-keep-ratios`
"""

import functools
import math
from dataclasses import replace

from timm.layers import get_device_dtype
from timm.models.vision_transformer import init_weights_vit_timm
from torch import nn

from .checks import check_at, check_flag, check_keep, check_keep_ratio, check_name, check_seed
from .families import family_of
from .methods import METHODS, SCORES
from .methods.parts import Place
from .mixing import enter, leave
from .plan import Plan, Pruning
from .tokens import Tokens
from .tracing import Traced


class PrunedBlock:
    """Mixed into the class of each block from the first pruned one on, ahead of its own class."""

    def forward(self, x, *args, **kwargs):
        """(B, T, C) or `Tokens` → `Tokens`, or from the last block (B, P + n, C)."""
        plan, family = self._plan, self._plan.family
        if isinstance(x, tuple) and not isinstance(x, Tokens):
            raise RuntimeError(
                "a block got a plain tuple in the place of Tokens: nothing may change what goes from block to block of "
                "a pruned model. If it is reentrant checkpointing, which takes the tokens apart, use the other kind "
                "(use_reentrant=False; in timm, leave TIMM_REENTRANT_CKPT unset)"
            )
        tokens = x if isinstance(x, Tokens) else plan.begin(x, self.training)
        if self._place is Place.BEFORE:
            tokens = plan.stage(self._stage, tokens, self._predictor, self.training)
        arguments = family.arguments(args, kwargs)
        if family.positioned:
            moved = tokens.patch is not tokens.host  # the same object until something is removed
            arguments = family.positions(arguments, tokens.patch if moved else None, plan.prefix)
        mask = plan.mask(tokens, self._hears, self.training)
        x = family.first(self, tokens.x, mask, arguments)
        tokens = tokens.replace(x=x, heard=None if mask is None else mask.heard)
        if self._place is Place.BETWEEN:
            tokens = plan.stage(self._stage, tokens, self._predictor, self.training)
        tokens = tokens.replace(x=family.second(self, tokens.x))
        return plan.end(tokens) if self._last else tokens


class PrunedModel:
    """Mixed into the class of a pruned model, ahead of its own class. A family's mixin adds what its calls need."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        library = getattr(super(), "forward", None)
        if library is None:  # a family's mixin, not mixed in yet
            return
        pruned = cls.forward

        @functools.wraps(library)  # trainers read from the signature which arguments a model takes
        def forward(self, *args, **kwargs):
            return pruned(self, *args, **kwargs)

        cls.forward = forward

    def forward(self, *args, **kwargs):
        """What the model's own forward gives, with tokens removed."""
        if getattr(self, "_is_replica", False):  # of nn.DataParallel, which copies what is registered alone
            for block in self._plan.family.blocks(self):
                if block.__dict__.get("_predictor") is not None:
                    block.__dict__["_predictor"] = self.score_predictor[block._stage]
        return super().forward(*args, **kwargs)

    @property
    def pruning(self):
        """The `Pruning` in force."""
        return self._plan.pruning

    @property
    def keep_ratio(self):
        """The keep ratio ρ, a float for every stage or a tuple of one a stage. Setting it checks it as `prune` does.

        None while `keep` is in force.
        """
        return self._plan.pruning.keep_ratio

    @keep_ratio.setter
    def keep_ratio(self, ratio):
        pruning = self._plan.pruning
        self._plan.adopt(replace(pruning, keep_ratio=check_keep_ratio(ratio, len(pruning.at)), keep=None))

    @property
    def keep(self):
        """The number of patch tokens to keep, an int for every stage or a tuple of one a stage; None where ρ is set."""
        return self._plan.pruning.keep

    @keep.setter
    def keep(self, number):
        pruning = self._plan.pruning
        if number is None:
            raise TypeError("keep must be an int or a sequence of ints, got None: set keep_ratio instead")
        number = check_keep(number, len(pruning.at), self._plan.patches)
        self._plan.adopt(replace(pruning, keep_ratio=None, keep=number))


def prune(model, method, *, keep_ratio=0.7, at=None, keep=None, **options):
    """Prune a vision transformer in place, as its library made it.

    Args:
        model: a model of a known family (`tpbook.families`): timm's ViTs, Eva, BEiT and NaFlexVit, Hugging Face's ViT,
            DeiT, DINOv2, DINOv3, CLIP and SigLIP vision models, torchvision's ViT, open_clip's towers. Its mode, device
            and dtype stay.
        method: a name of `tpbook.METHODS`.
        keep_ratio: ρ ∈ (0, 1], relative to the tokens entering a stage; one for all stages, or a sequence of one a
            stage. A float stands for the decimal that it prints as, a `Fraction` for itself. `model.keep_ratio = …`
            changes it later.
        at: 0-based indices of the pruned blocks, strictly increasing. Default (d//4, d//2, 3·d//4) for d blocks,
            duplicates dropped: (3, 6, 9) for 12.
        keep: how many patch tokens to keep instead of a share of them: an int for every stage, or a sequence of one a
            stage; `keep_ratio` is then not looked at. `model.keep = …` changes it later.
        **options: `score`, one of "predictor", "class_attention", "attention_received" (for models without a class
            token), "random", "static" (default: the method's own; before a block the attention is that of the block
            before); `invert`, keep the worst tokens instead of the best; `seed`, an int that makes random scores the
            same in every forward of the same shape (None draws from torch's global generator); `fuse` (EViT), False
            drops what would be fused; `similarity` (TPS), "cosine", "euclidean" or a function
            (B, p, C), (B, k, C) → (B, p, k) that is at most 1.

    Returns:
        The same object. It gives plain logits in train and eval mode, and has `keep_ratio` and `pruning`. Learned
        scores add `score_predictor` to it, randomly initialised.

    Raises:
        TypeError, ValueError: an argument or a model that cannot be used. The model is as it was.
    """
    family = family_of(model)
    inside = family.inside(model)
    if inside is not model:
        prune(inside, method, keep_ratio=keep_ratio, at=at, keep=keep, **options)
        enter(model, family.mixin, _plan=inside._plan)
        return model
    if hasattr(model, "_plan"):
        raise ValueError(f"model is pruned already, by {model.pruning.name!r}: tpbook.unprune it first")
    if "_plan" in family.norm(model).__dict__:
        raise ValueError("model must not be inside tpbook.trace while it is pruned")
    if hasattr(model, "mask_ratio"):
        raise ValueError(f"model is masked, at ratio {model.mask_ratio}: tpbook.unmask it first")
    blocks = family.blocks(model)
    pruning = _check(family, model, blocks, method, keep_ratio, at, keep, options)
    plan = Plan(pruning, family, model)  # warns where a stage would keep no token

    predictors = [None] * len(pruning.at)
    if pruning.method.score.learned:
        dd = get_device_dtype(model)
        predictors = nn.ModuleList(pruning.method.score.build(family.width(model), **dd) for _ in pruning.at)
        predictors.apply(init_weights_vit_timm)
        model.score_predictor = predictors.train(model.training)
    stages = dict(zip(pruning.at, enumerate(predictors)))
    hears = pruning.listeners
    for i in range(min((pruning.at[0], *hears)), len(blocks)):
        s, predictor = stages.get(i, (None, None))
        place = None if s is None else pruning.method.place
        enter(blocks[i], PrunedBlock, _plan=plan, _stage=s, _place=place, _predictor=predictor,
              _hears=hears.get(i), _last=i == len(blocks) - 1)  # fmt: skip
    enter(family.norm(model), Traced, _plan=plan)
    enter(model, family.mixin, _plan=plan)
    return model


def unprune(model):
    """Undo `prune`: the class, the state dict, the mode and the outputs are what they were.

    Parameters trained meanwhile stay trained; the score predictors are gone.

    Args:
        model: a pruned model.

    Returns:
        The same object.

    Raises:
        ValueError: the model is not pruned.
    """
    if not hasattr(model, "_plan"):
        raise ValueError(f"model must be pruned by tpbook.prune, got a plain {type(model).__name__}")
    family = family_of(model)
    inside = family.inside(model)
    leave(model, "_plan")
    if inside is not model:
        unprune(inside)
        return model
    leave(family.norm(model))
    for block in family.blocks(model):
        if "_plan" in block.__dict__:
            leave(block, "_plan", "_stage", "_place", "_predictor", "_hears", "_last")
    family.norm(model).__dict__.pop("_plan", None)
    if hasattr(model, "score_predictor"):
        del model.score_predictor
    return model


def is_pruned(model):
    """Whether `prune` was called on it, and `unprune` was not."""
    return isinstance(model, PrunedModel)


def _check(family, model, blocks, name, keep_ratio, at, keep, options):
    """The `Pruning` that the arguments of `prune` ask for; raises if it cannot be."""
    check_name("method", name, METHODS)
    method = METHODS[name]
    allowed = {"score", "invert", "seed", *method.reduce.options}
    for option in options:
        if option not in allowed:
            raise TypeError(f"option {option!r} is not known to {name}, which takes {', '.join(sorted(allowed))}")
    reduce = method.reduce.configure(**{key: options[key] for key in method.reduce.options if key in options})
    if "score" in options:
        check_name("score", options["score"], SCORES)
    check_flag("invert", options.get("invert", False))
    check_seed(options.get("seed"))
    at, patches = check_at(at, len(blocks)), math.prod(family.grid(model))
    pruning = Pruning(
        name, replace(method, score=SCORES.get(options.get("score"), method.score), reduce=reduce), at,
        check_keep_ratio(keep_ratio, len(at)) if keep is None else None, check_keep(keep, len(at), patches),
        options.get("invert", False), options.get("seed"),
    )  # fmt: skip
    _check_model(family, model, blocks, pruning)
    return pruning


def _check_model(family, model, blocks, pruning):
    method = pruning.method
    for i, block in enumerate(blocks):
        if why := family.check_block(block):
            raise ValueError(f"blocks[{i}] {why}")
    if method.queries is not None:
        what = f"{pruning.name} with score={method.score.name!r}"
        if method.queries == "class" and not family.has_class_token(model):
            raise ValueError(
                f"{what} reads the class token's attention, and this model's cls_token is None: it may score by "
                f"score='attention_received' where it does not fuse"
            )
        if method.place is Place.BEFORE and pruning.at[0] == 0:
            raise ValueError(f"{what} reads the attention of the block before, so at={pruning.at} must start above 0")
        for i in pruning.listeners:
            if why := family.check_attention(blocks[i]):
                raise ValueError(f"{what} {why} in blocks[{i}]")
    for part in (method.score.placed and family.places(model), method.score.learned and family.trains_learned(model)):
        if part:
            raise ValueError(part)
