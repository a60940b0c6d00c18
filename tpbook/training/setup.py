"""What a recipe trains on: the data, which images a step sees, and the optimiser.

Chapter: :doc:`/book/reproduction`
"""

import contextlib

import numpy as np
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from timm.optim import create_optimizer_v2
from torch.utils.data import DataLoader, DistributedSampler, Subset

from .. import data
from ..digits import FRAGMENTS
from ..engine import is_pruned
from ..families import family_of
from ..methods.parts import Place
from .loading import augmented
from .sources import DIGITS, source_of

# ----------------------------------------------------------------------------------------------------------- the data


def load_data(recipe):
    """The data that a recipe names.

    Returns:
        its `sources.Classes`; (model, epoch) → the training Dataset of that epoch, whose batches `loading.finisher`
        finishes; model → the test Dataset.

    Raises:
        FileNotFoundError: it is not there; the message says how to get it.
        ValueError: `train_images` or `test_images` is more than there are, with head="data" the test set has classes
            that the training set lacks, or what `sources.source_of` refuses.
    """
    if recipe.data == "digits":

        def canvases(model, epoch):
            begin, end = recipe.clutter
            grown = min(1, max(0, (epoch - begin) / max(1, end - begin)))
            return _some("train_images", recipe, data.digits(
                "train", seed=1000 * (recipe.seed + 1) + epoch, per_digit=recipe.per_digit,
                fragments=round(FRAGMENTS * grown),
            ))  # fmt: skip

        return DIGITS, canvases, lambda model: _some("test_images", recipe, data.digits("test"))

    classes, train, test = source_of(recipe)

    def cropped(model, epoch):
        return _some("train_images", recipe, train.seen_by(augmented(recipe, model)))

    def centred(model):
        return _some("test_images", recipe, test.seen_by(data.eval_transform(model)))

    return classes, cropped, centred


def _some(key, recipe, dataset):
    """As many random images as the recipe's `key` says, the same for every seed; all for 0."""
    n = getattr(recipe, key)
    if n > len(dataset):
        raise ValueError(f"{key} must be at most {len(dataset)}, got {n}")
    if not n:
        return dataset
    return Subset(dataset, torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:n].tolist())


def loader_of(recipe, accelerator, dataset, epoch):
    """This process's share of an epoch, in the order that seed and epoch give.

    Step for step the processes and their accumulated parts see together what one process would see.
    """
    replicas, rank = accelerator.num_processes, accelerator.process_index
    if recipe.repeats > 1:
        sampler = RepeatAugSampler(dataset, replicas, rank, num_repeats=recipe.repeats)
        sampler.set_epoch(seed_of(recipe.seed, epoch))
    else:
        sampler = DistributedSampler(dataset, replicas, rank, seed=recipe.seed)
        sampler.set_epoch(epoch)
    return DataLoader(
        dataset, recipe.batch // (replicas * recipe.accumulate), sampler=sampler, drop_last=True,
        num_workers=recipe.workers, pin_memory=accelerator.device.type == "cuda",
        generator=torch.Generator().manual_seed(seed_of(recipe.seed, epoch, rank)),
    )  # fmt: skip


def seed_of(*numbers):
    """One seed of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


# ------------------------------------------------------------------------------------------------------------ the step


def optimizer_of(recipe, model):
    """timm's optimiser, with groups for what pruning added and the rest, decayed or not.

    timm's schedules multiply the learning rate of a group by its "lr_scale"; "learned" marks what was added: score
    predictors, and fast paths.
    """
    groups, added = {}, set(family_of(model).added)
    never = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    for name, p in model.named_parameters():
        p.requires_grad_(not (recipe.frozen and name.startswith(recipe.frozen)))
        if p.requires_grad:
            decayed = recipe.decay_all or (p.ndim > 1 and name not in never)
            groups.setdefault((not added.isdisjoint(name.split(".")), decayed), []).append(p)
    parameters = [
        {"params": ps, "weight_decay": recipe.weight_decay * decayed, "learned": learned}
        for (learned, decayed), ps in groups.items()
    ]
    return create_optimizer_v2(parameters, opt=recipe.opt, lr=recipe.lr, weight_decay=0.0)


@contextlib.contextmanager
def fast_attention(model, images):
    """A context in which attention is explicit where that trains faster: on a CPU in bfloat16, or autocast to it.

    The backward of timm's default there, the fused kernel, hardly gets cheaper with fewer tokens. Blocks that are
    checkpointed keep theirs, since their recomputation comes later; and so do those that hide tokens by a mask, whose
    attention is another, and those whose keys or values a method reads.
    """
    blocks = family_of(model).blocks(model)
    if is_pruned(model):
        pruning, first = model.pruning, len(blocks)
        if model.training and pruning.method.score.learned:
            first = pruning.at[0] + (pruning.method.place is Place.BETWEEN)
        if pruning.method.reads:
            first = min(first, *pruning.listeners)
        blocks = blocks[:first]
    slow = _half_on_cpu(images) is torch.bfloat16 and not getattr(model, "grad_checkpointing", False)
    fused = [attn for block in blocks if slow and getattr(attn := getattr(block, "attn", None), "fused_attn", False)]
    for attn in fused:
        attn.fused_attn = False
    try:
        yield
    finally:
        for attn in fused:
            attn.fused_attn = True


@contextlib.contextmanager
def half(model, images):
    """A context in which a model computes as it does under a recipe with `precision: bf16`.

    That is autocast to bfloat16, with `fast_attention`. For a test of a model that no recipe trained.

    Args:
        model: pruned or not.
        images: what it is to take, (B, C, H, W), or tokens; their device counts.
    """
    with torch.autocast(images.device.type, torch.bfloat16), fast_attention(model, images):
        yield


def _half_on_cpu(images):
    """The half precision that attention will compute in, or None: on a GPU, or in float32."""
    if not images.is_cpu:
        return None
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else images.dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else None
