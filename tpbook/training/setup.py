"""What a recipe trains: the model, its teacher, the data, the optimiser, and which images a step sees.

Chapter: :doc:`/book/reproduction`
"""

import contextlib
import copy
import inspect
from dataclasses import replace
from pathlib import Path

import numpy as np
import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from timm.data.distributed_sampler import RepeatAugSampler
from timm.optim import create_optimizer_v2
from torch.utils.data import DataLoader, DistributedSampler, Subset

from .. import data, losses
from ..digits import FRAGMENTS
from ..engine import is_pruned, prune
from ..families import family_of
from ..masking import mask
from ..methods import METHODS, SCORES
from ..methods.parts import Place
from ..weights import DIGITS, load_backbone, load_checkpoint
from .recipes import make

# ---------------------------------------------------------------------------------------------------------- the model


def build(recipe, classes):
    """The model before training, unpruned, in eval mode.

    Args:
        recipe: a `Recipe`.
        classes: tuple of the label indices that the data has, out of all there are.

    Raises:
        FileNotFoundError: there is no such start.
        ValueError: the model's classes or channels do not fit the data, or a checkpoint does not fit the model.
    """
    checkpoint = checkpoint_of("start", recipe.start)
    of = labels_of(recipe)
    n = len(classes) if recipe.head == "data" else of
    if recipe.start == "pretrained":
        model = load_backbone(recipe.model, drop_path_rate=recipe.drop_path)
    else:
        model = new_model(recipe.model, n, drop_path_rate=recipe.drop_path).eval()
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    if recipe.head == "data" and model.num_classes == of != n:
        _take_rows(model, classes)
    if model.num_classes != n:
        raise ValueError(f"model {recipe.model!r} has {model.num_classes} classes and data {recipe.data!r} has {n}")
    if recipe.aux_weight and not hasattr(model, "aux_head"):
        raise ValueError(f"aux_weight must be 0 for model {recipe.model!r}, which has no auxiliary head")
    channels, own = 1 if recipe.data == "digits" else 3, family_of(model).channels(model)
    if own != channels:
        raise ValueError(
            f"model {recipe.model!r} takes images of {own} channels and data {recipe.data!r} has {channels}"
        )
    return model


def checkpoint_of(key, named):
    """The file that a recipe's `start` or `teacher` names; None where it names none, or is no place.

    Raises:
        FileNotFoundError: nothing is there; the message says what the key may be.
    """
    words = {"start": ("pretrained", "random"), "teacher": ("", "start", "pretrained", "random")}[key]
    if named in words:
        return None
    path = Path(named)
    if not named or not path.exists():
        may = ", ".join(repr(word) for word in words)
        raise FileNotFoundError(
            f"{key} must be {may}, a checkpoint file or the folder of a finished run, got {named!r}"
        )
    return path / "model.safetensors" if path.is_dir() else path


def labels_of(recipe):
    """How many labels the data counts, whether or not all of them occur."""
    return 10 if recipe.data == "digits" else 1000


def lookup_of(recipe, classes):
    """(labels,) int64: the model's class of each label; -1 for a label that the data does not have."""
    lookup = torch.arange(labels_of(recipe))
    if recipe.head == "data":
        lookup = torch.full_like(lookup, -1)
        lookup[list(classes)] = torch.arange(len(classes))
    return lookup


def new_model(name, classes, **extra):
    """The architecture with random weights."""
    if not timm.is_model(name):
        raise ValueError(f"model must be {DIGITS!r} or a timm model (timm.list_models()), got {name!r}")
    return timm.create_model(name, num_classes=classes, **extra)


def teacher_of(recipe, classes, model):
    """The frozen dense model that the recipe distils from, or None; raises as `build`."""
    checkpoint_of("teacher", recipe.teacher)
    if not recipe.teacher:
        return None
    same = recipe.teacher == "start"
    teacher = copy.deepcopy(model) if same else build(make({**vars(recipe), "start": recipe.teacher}), classes)
    return teacher.eval().requires_grad_(False)


def _take_rows(model, classes):
    """Narrow the linear heads to the given rows of them; a distilled model has two."""
    heads, rows = _heads(model), torch.tensor(classes)
    model.reset_classifier(len(classes))
    with torch.no_grad():
        for new, old in zip(_heads(model), heads):
            new.weight.copy_(old.weight[rows])
            if old.bias is not None:
                new.bias.copy_(old.bias[rows])


def _heads(model):
    head = model.get_classifier()
    return head if isinstance(head, tuple) else (head,)


def adapt(recipe, model):
    """Prune or mask the model as the recipe says, in place."""
    if recipe.method:
        score = SCORES.get(recipe.options.get("score"), METHODS[recipe.method].score)
        counted = replace(METHODS[recipe.method], score=score).chooses.counted
        said = {} if {"r", "keep"} & set(recipe.options) or not counted else {"keep_ratio": recipe.keep_ratio}
        prune(model, recipe.method, at=recipe.at or None, **said, **recipe.options)
        _check_loss(recipe.loss, model.pruning.method.score.objective)
    elif recipe.mask_ratio != 0:
        mask(model, recipe.mask_ratio)
    return model


def _check_loss(loss, objective):
    """ValueError where a recipe's `loss` has a key that the loss of the method does not take."""
    known = () if objective is None else inspect.getfullargspec(getattr(losses, objective)).kwonlyargs
    known = [name for name in known if name not in ("teacher_logits", "logit_weight")]
    for key in loss:
        if key not in known:
            may = ", ".join(known) or "none, for this method"
            raise ValueError(f"loss must have keys of {may}, got {key!r}")


# ----------------------------------------------------------------------------------------------------------- the data


def load_data(recipe):
    """The data that a recipe names.

    Returns:
        classes, the sorted label indices that occur; (model, epoch) → the training Dataset of that epoch;
        model → the test Dataset.

    Raises:
        FileNotFoundError: it is not there; the message says how to get it.
        ValueError: `train_images` or `test_images` is more than there are, or with head="data" the test set has classes
            that the training set lacks.
    """
    if recipe.data == "digits":

        def canvases(model, epoch):
            begin, end = recipe.clutter
            grown = min(1, max(0, (epoch - begin) / max(1, end - begin)))
            return _some("train_images", recipe, data.digits(
                "train", seed=1000 * (recipe.seed + 1) + epoch, per_digit=recipe.per_digit,
                fragments=round(FRAGMENTS * grown),
            ))  # fmt: skip

        return tuple(range(10)), canvases, lambda model: _some("test_images", recipe, data.digits("test"))

    if recipe.data == data.IMAGENETTE:
        load, train, test = data.imagenette, "train", "test"
    else:
        folder, train, test = data.root(recipe.data), "train", "val"

        def load(split, transform=None):
            return data.ImageNetFolder(folder / split, transform=transform)

    photographs = load(train)
    if recipe.head == "data" and recipe.data != data.IMAGENETTE:
        unseen = set(load(test).class_indices) - set(photographs.class_indices)
        if unseen:
            raise ValueError(f"{folder / test} has {len(unseen)} classes that {folder / train} lacks, and head='data'")

    def augmented(model, epoch):
        config = resolve_model_data_config(model)
        photographs.transform = create_transform(
            config["input_size"], is_training=True, scale=(recipe.min_scale, 1), hflip=recipe.hflip,
            color_jitter=recipe.color_jitter, auto_augment=recipe.auto_augment or None, re_prob=recipe.random_erasing,
            re_mode="pixel", interpolation=config["interpolation"], mean=config["mean"], std=config["std"],
        )  # fmt: skip
        return _some("train_images", recipe, photographs)

    def centred(model):
        return _some("test_images", recipe, load(test, data.eval_transform(model)))

    return photographs.class_indices, augmented, centred


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


def _half_on_cpu(images):
    """The half precision that attention will compute in, or None: on a GPU, or in float32."""
    if not images.is_cpu:
        return None
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else images.dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else None
