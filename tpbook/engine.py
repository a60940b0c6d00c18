"""Prunes a vision transformer at its blocks: no method's name and no library's attribute occurs here.

`prune` gives each block from the first pruned one on the class `PrunedBlock`, ahead of its own. The model's own forward
does the rest: embedding, loop, norm, head. From block to block go `Tokens`; a `Plan`, which all blocks share, says what
to do with them, and nothing of a forward is kept on either. So a pruned model may be called from several threads, an
exception leaves it as it was, and hooks, adapters, checkpointing, FSDP and compilers find the modules that they know.

Chapter: :doc:`/book/a-tour-of-keep-ratios`
"""

from dataclasses import replace

from .checks import check_at, check_flag, check_keep, check_keep_ratio, check_name, check_seed
from .families import family_of
from .methods import METHODS, SCORES
from .methods.parts import Place
from .methods.schedule import check_r
from .mixing import enter, leave
from .plan import Pruning
from .pruned import PrunedModel


class Default(float):
    """What an argument is unless somebody gives it, which can be told from the same number given."""


DEFAULT = Default(0.7)


def prune(model, method, *, keep_ratio=DEFAULT, at=None, keep=None, r=None, **options):
    """Prune a vision transformer in place, as its library made it.

    Args:
        model: a model of a known family (`tpbook.families`): timm's ViTs, Eva, BEiT and NaFlexVit, Hugging Face's ViT,
            DeiT, DINOv2, DINOv3, CLIP and SigLIP vision models, torchvision's ViT, open_clip's towers; this package's
            LV-ViT, T2T-ViT and PS-ViT; PVT v2 of timm, PVT and CvT of Hugging Face, whose maps are whole again at the
            end of each; timm's Swin and ConvNeXt, where positions that are not kept take a fast path in the third
            stage. Its mode, device and dtype stay.
        method: a name of `tpbook.METHODS`.
        keep_ratio: ρ ∈ (0, 1], relative to the tokens entering a stage; one for all stages, or a sequence of one a
            stage. A float stands for the decimal that it prints as, a `Fraction` for itself. Of Swin and ConvNeXt one
            stands for ρ, ρ − 0.2, ρ − 0.4 of all places. `model.keep_ratio = …` changes it later.
        at: 0-based indices of the pruned blocks, strictly increasing. Default (d//4, d//2, 3·d//4) for d blocks,
            duplicates dropped: (3, 6, 9) for 12. Of PVT and CvT the first block of each map. Of Swin and ConvNeXt the
            official ones; there the blocks of the third stage are counted.
        keep: how many patch tokens to keep instead of a share of them: an int for every stage, or a sequence of one a
            stage; `keep_ratio` is then not looked at. `model.keep = …` changes it later.
        r: how many patch tokens to remove at each of all blocks (or at those of `at`) instead, ToMe's way: an int, a
            pair (int, inflection from −1 to 1) for a number that falls or rises from block to block, or a list of
            ints, one a block. Given with `keep_ratio` or `keep` it is an error. `model.r = …` changes it later.
        **options: `score`, one of `tpbook.methods.SCORES`: "predictor", "class_attention", "attention_received" (for
            models without a class token), "random", "static", "keys", "attention_value", "density",
            "lasting_attention" … (default: the method's own; before a block the attention is that of the block
            before); `invert`, keep the worst tokens instead of the best; `seed`, an int that makes random scores the
            same in every forward of the same shape (None draws from torch's global generator); `fuse` (EViT), False
            drops what would be fused; `fuse_weights` (EViT), "score" for sums by the score that are never removed;
            `similarity` (TPS), "cosine", "euclidean" or a function (B, p, C), (B, k, C) → (B, p, k) that is at most 1;
            `proportional` (ToMe), False for attention that does not count sizes; `rejoin_last` (Evo-ViT), False
            leaves those that wait out of what the model hands to its head; `gate_scale`, `gate_center` (A-ViT), γ and
            β of its halting; `rejoin` (PVT, CvT), what a place whose token is gone holds at the end of its map:
            "zero", "host" (methods that squeeze) or "last_seen".

    Returns:
        The same object. It gives plain logits in train and eval mode, and has `keep_ratio` and `pruning`. Learned
        scores add `score_predictor` to it, randomly initialised.

    Raises:
        TypeError, ValueError: an argument or a model that cannot be used. The model is as it was.
    """
    family = family_of(model)
    inside = family.inside(model)
    if inside is not model:
        prune(inside, method, keep_ratio=keep_ratio, at=at, keep=keep, r=r, **options)
        enter(model, family.mixin, _plan=inside._plan)
        return model
    if hasattr(model, "_plan"):
        raise ValueError(f"model is pruned already, by {model.pruning.name!r}: tpbook.unprune it first")
    if "_plan" in family.norm(model).__dict__:
        raise ValueError("model must not be inside tpbook.trace while it is pruned")
    if hasattr(model, "mask_ratio"):
        raise ValueError(f"model is masked, at ratio {model.mask_ratio}: tpbook.unmask it first")
    blocks = family.blocks(model)
    pruning = _check(family, model, blocks, method, keep_ratio, at, keep, r, options)
    family.install(model, pruning)
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
    if inside is not model:
        leave(model, "_plan")
        unprune(inside)
        return model
    family.remove(model)
    return model


def is_pruned(model):
    """Whether `prune` was called on it, and `unprune` was not."""
    return isinstance(model, PrunedModel)


def _check(family, model, blocks, name, keep_ratio, at, keep, r, options):
    """The `Pruning` that the arguments of `prune` ask for; raises if it cannot be."""
    check_name("method", name, METHODS)
    if "score" in options:
        check_name("score", options["score"], SCORES)
    method = METHODS[name]
    score, reduce = SCORES.get(options.get("score"), method.score), method.reduce
    allowed = {"score", "invert", "seed", *score.options, *reduce.options, *family.options}
    for option in options:
        if option not in allowed:
            raise TypeError(f"option {option!r} is not known to {name}, which takes {', '.join(sorted(allowed))}")
    score, reduce = (
        part.configure(**given) if (given := {key: options[key] for key in part.options if key in options}) else part
        for part in (score, reduce)
    )
    check_flag("invert", options.get("invert", False))
    check_seed(options.get("seed"))
    method = replace(method, score=score, reduce=reduce)
    if options.get("invert") and not method.chooses.inverts:
        raise ValueError(f"invert must be False for {name}, which has no worst tokens to keep")
    given = {"keep_ratio": None if isinstance(keep_ratio, Default) else keep_ratio, "keep": keep, "r": r}
    given = {argument: value for argument, value in given.items() if value is not None}
    counted = method.chooses.counted
    for argument, value in given.items():
        if not counted:
            raise ValueError(
                f"{argument} must be left unset for {name}, whose tokens decide how many stay, got {value!r}"
            )
        if r is not None and argument != "r":
            raise ValueError(f"r and {argument} must not both be given, got r={r!r} and {argument}={value!r}")
    if at is not None:
        at = check_at(at, len(blocks))
    elif method.score.every is not None:
        at = tuple(range(min(method.score.every, len(blocks) - 1), len(blocks)))
    elif r is None:
        at = family.default_at(model, method)
    else:
        at = tuple(range(method.hears and method.place is Place.BEFORE, len(blocks)))
    share = keep is None and r is None and counted
    pruning = Pruning(
        name, method, at, check_keep_ratio(keep_ratio, len(at)) if share else None,
        check_keep(keep, family.patches(model, at)), options.get("invert", False), options.get("seed"),
        {key: options[key] for key in family.options if key in options}, None if r is None else check_r(r, len(at)),
    )  # fmt: skip
    _check_model(family, model, blocks, pruning)
    return pruning


def _check_model(family, model, blocks, pruning):
    method = pruning.method
    for i, block in enumerate(blocks):
        if why := family.check_block(block):
            raise ValueError(f"blocks[{i}] {why}")
    if why := family.check(model, pruning):
        raise ValueError(why)
    if method.hears:
        what = f"{pruning.name} with score={method.score.name!r}"
        if method.queries == "class" and not family.has_class_token(model):
            raise ValueError(
                f"{what} reads the class token's attention, and this model's cls_token is None: it may score by "
                f"score='attention_received' where it does not fuse"
            )
        if method.reduce.rejoins and len(pruning.at) > 1 and not method.score.lasting:
            raise ValueError(f"{what} must have one stage, since tokens that wait are not heard, got at={pruning.at}")
        if method.place is Place.BEFORE and pruning.at[0] == 0:
            raise ValueError(f"{what} reads the attention of the block before, so at={pruning.at} must start above 0")
        for i in pruning.listeners:
            if why := family.check_attention(blocks[i]):
                raise ValueError(f"{what} {why} in blocks[{i}]")
    for i in pruning.at:
        if method.score.switches and (why := family.check_attention(blocks[i])):
            raise ValueError(f"{pruning.name} turns heads off and {why} in blocks[{i}]")
    if method.score.placed and (why := family.places(model)):
        raise ValueError(why)
    if why := family.pools_unmasked(model):
        if method.score.learned:
            raise ValueError(f"a learned score cannot train on {why}")
        if method.chooses.varies:
            raise ValueError(f"{pruning.name} pads images that keep fewer tokens, and cannot run on {why}")
