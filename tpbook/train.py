"""Trains what a recipe says: `python -m tpbook.train RECIPE.yaml [key=value …] [out=FOLDER]`.

The same command under `accelerate launch` runs on many GPUs and machines; Accelerate takes care of devices, processes,
precision and accumulation, timm of augmentation, optimisers and schedules. What is written to the folder:

    metrics.jsonl        a line every few steps and each epoch
    epoch-NNNN/          the last finished epoch: weights, optimiser, average, and what run they belong to
    model.safetensors    the trained weights, in the end; ema.safetensors beside it where the recipe keeps an average
    result.json          accuracy on the test set, the recipe, and where and how long it ran

Stopped anywhere and started again with the same command a run goes on from its last finished epoch. Every random
choice of an epoch (order, augmentation, mixup, masks, Gumbel noise) comes from the seed, the epoch and the process
alone, so on a CPU in float32 with the same threads the resumed run ends with the same weights as an unbroken one.

Chapter: :doc:`/book/reproduction`
"""

import copy
import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import timm
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from timm.data import Mixup, create_transform, resolve_model_data_config
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.mixup import mixup_target
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch.utils.data import DataLoader, DistributedSampler, Subset
from tqdm import tqdm

from . import checkpoints, data, losses, results
from .backbones import DIGITS, build_digits_vit, load_backbone, load_checkpoint
from .baselines import pool
from .digits import FRAGMENTS
from .engine import fast_attention, prune
from .evit import keep_rate
from .masking import mask
from .recipes import PRECISIONS, Recipe, as_dict, make, read
from .tracing import trace

EVAL_BATCH = 100


# ---------------------------------------------------------------------------------------------------- what to train


def build(recipe, classes):
    """The model before training, unpruned, in eval mode.

    Args:
        recipe: a `Recipe`.
        classes: tuple of the label indices that the data has, out of all there are.

    Raises:
        ValueError: the model's classes or channels do not fit the data, or a checkpoint does not fit the model.
    """
    of = labels_of(recipe)
    n = len(classes) if recipe.head == "data" else of
    if recipe.start == "pretrained":
        model = load_backbone(recipe.model, drop_path_rate=recipe.drop_path)
    else:
        model = new_model(recipe.model, n, drop_path_rate=recipe.drop_path).eval()
    if recipe.start not in ("pretrained", "random"):
        path = Path(recipe.start)
        load_checkpoint(model, path / "model.safetensors" if path.is_dir() else path)
    if recipe.head == "data" and model.num_classes == of != n:
        _take_rows(model, classes)
    if model.num_classes != n:
        raise ValueError(f"model {recipe.model!r} has {model.num_classes} classes and data {recipe.data!r} has {n}")
    channels = 1 if recipe.data == "digits" else 3
    if model.in_chans != channels:
        raise ValueError(
            f"model {recipe.model!r} takes images of {model.in_chans} channels and data {recipe.data!r} has {channels}"
        )
    return model


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
    if name == DIGITS:
        return build_digits_vit(num_classes=classes, **extra)
    if not timm.is_model(name):
        raise ValueError(f"model must be {DIGITS!r} or a timm model (timm.list_models()), got {name!r}")
    return timm.create_model(name, num_classes=classes, **extra)


def teacher_of(recipe, classes, model):
    """The frozen dense model that the recipe distils from, or None."""
    if not recipe.teacher:
        return None
    same = recipe.teacher == "start"
    teacher = copy.deepcopy(model) if same else build(make({**vars(recipe), "start": recipe.teacher}), classes)
    return teacher.eval().requires_grad_(False)


def _take_rows(model, classes):
    """Narrow a linear head to the given rows of it."""
    old, rows = model.head, torch.tensor(classes)
    model.reset_classifier(len(classes))
    with torch.no_grad():
        model.head.weight.copy_(old.weight[rows])
        model.head.bias.copy_(old.bias[rows])


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


def adapt(recipe, model):
    """Prune, mask or pool the model as the recipe says, in place."""
    if recipe.method:
        prune(model, recipe.method, keep_ratio=recipe.keep_ratio, at=recipe.at or None, **recipe.options)
    elif recipe.mask_ratio != 0:
        mask(model, recipe.mask_ratio)
    if recipe.pool_at >= 0:
        pool(model, recipe.pool_at)
    return model


def optimizer_of(recipe, model):
    """timm's optimiser, with groups for score predictors and the rest, decayed or not.

    timm's schedules multiply the learning rate of a group by its "lr_scale"; "learned" marks the predictors.
    """
    groups = {}
    for name, p in model.named_parameters():
        p.requires_grad_(not (recipe.frozen and name.startswith(recipe.frozen)))
        if p.requires_grad:
            decayed = recipe.decay_all or (p.ndim > 1 and name not in model.no_weight_decay())
            groups.setdefault((name.startswith("score_predictor."), decayed), []).append(p)
    parameters = [
        {"params": ps, "weight_decay": recipe.weight_decay * decayed, "learned": learned}
        for (learned, decayed), ps in groups.items()
    ]
    return create_optimizer_v2(parameters, opt=recipe.opt, lr=recipe.lr, weight_decay=0.0)


def loader_of(recipe, accelerator, dataset, epoch):
    """This process's share of an epoch, in the order that seed and epoch give.

    Step for step the processes and their accumulated parts see together what one process would see.
    """
    replicas, rank = accelerator.num_processes, accelerator.process_index
    if recipe.repeats > 1:
        sampler = RepeatAugSampler(dataset, replicas, rank, num_repeats=recipe.repeats)
        sampler.set_epoch(_mix(recipe.seed, epoch))
    else:
        sampler = DistributedSampler(dataset, replicas, rank, seed=recipe.seed)
        sampler.set_epoch(epoch)
    return DataLoader(
        dataset, recipe.batch // (replicas * recipe.accumulate), sampler=sampler, drop_last=True,
        num_workers=recipe.workers, pin_memory=accelerator.device.type == "cuda",
        generator=torch.Generator().manual_seed(_mix(recipe.seed, epoch, rank)),
    )  # fmt: skip


def _mix(*numbers):
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def terms_of(recipe, accelerator, wrapped, model, teacher, images, labels):
    """One forward of model and teacher, and the method's loss terms (`tpbook.losses`)."""
    theirs, features = (None, None) if teacher is None else taught(accelerator, teacher, images)
    with accelerator.autocast(), fast_attention(model, images), trace(model) as traced:
        logits = wrapped(images)
    if recipe.method and model.pruning.method.score == "predictor":
        return losses.dynamicvit(
            logits, traced, labels, teacher_logits=theirs, teacher_features=features,
            keep_ratios=np.cumprod(model.pruning.ratios).tolist(), token=recipe.token_loss,
            ratio_weight=recipe.ratio_weight, logit_weight=recipe.logit_weight, token_weight=recipe.token_weight,
        )  # fmt: skip
    return losses.classification(logits, labels, teacher_logits=theirs, logit_weight=recipe.logit_weight)


def taught(accelerator, teacher, images):
    """What there is to distil: the frozen teacher's logits (B, classes) and final patch tokens (B, N, C)."""
    with torch.no_grad(), accelerator.autocast(), fast_attention(teacher, images), trace(teacher) as t:
        return teacher(images), t.features


# --------------------------------------------------------------------------------------------------------- the loop


def run(recipe, out, *, progress=True, **changes):
    """Train, or go on training, and return what `result.json` says.

    Args:
        recipe: a `Recipe`, or the path of a recipe file.
        out: the folder of this run.
        progress: draw a progress bar on stderr.
        **changes: recipe keys that differ.

    Returns:
        dict: "accuracy" on the test set with its interval (and "ema_accuracy"), "correct" with 1 or 0 a test image,
        "recipe", "images_seen", "seconds", "last" with the last loss terms, and "run", where and when.

    Raises:
        ValueError: the folder holds another run or a damaged checkpoint, or recipe, model and data do not fit.
        FileNotFoundError: no such recipe or data.
        RuntimeError: the loss is no number any more.
        OSError: a checkpoint could not be written; the epochs finished before stay.
    """
    recipe = make({**vars(recipe), **changes}) if isinstance(recipe, Recipe) else read(recipe, **changes)
    out = Path(out)
    if (out / "result.json").exists():
        return checkpoints.finished(out, recipe)

    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    precision = PRECISIONS[recipe.precision]
    accelerator = Accelerator(mixed_precision=precision, gradient_accumulation_steps=recipe.accumulate)
    parts = accelerator.num_processes * recipe.accumulate
    if recipe.batch % parts:
        raise ValueError(f"batch must be a multiple of processes × accumulate = {parts}, got {recipe.batch}")

    set_seed(recipe.seed)
    classes, train_set, test_set = load_data(recipe)
    model = build(recipe, classes)
    teacher = teacher_of(recipe, classes, model)
    if teacher is not None:
        teacher.to(accelerator.device)
    adapt(recipe, model).to(accelerator.device)
    lookup, test = lookup_of(recipe, classes), test_set(model)

    steps = len(loader_of(recipe, accelerator, train_set(model, 0), 0)) // recipe.accumulate
    if not steps:
        raise ValueError(f"batch must be at most the number of training images, got {recipe.batch}")
    mixup = None  # timm's wants one of the two; smoothing alone is `mixup_target`
    if recipe.mixup or recipe.cutmix:
        if recipe.batch // parts % 2:
            raise ValueError(f"batch / (processes × accumulate) must be even for mixup, got {recipe.batch} / {parts}")
        mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=model.num_classes)
    optimizer = optimizer_of(recipe, model)
    schedule = CosineLRScheduler(
        optimizer, t_initial=recipe.epochs * steps, lr_min=recipe.min_lr, t_in_epochs=False,
        warmup_t=round(recipe.warmup_epochs * steps), warmup_lr_init=recipe.warmup_lr,
    )  # fmt: skip
    average = ModelEmaV3(model, decay=recipe.ema) if recipe.ema else None
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    if average is not None:
        accelerator.register_for_checkpointing(average)

    first, seconds = checkpoints.resume(accelerator, recipe, out)
    step = first * steps
    log = checkpoints.Log(out / "metrics.jsonl", first, accelerator.is_main_process)
    bar = tqdm(
        total=recipe.epochs * steps, initial=step, unit="step", disable=not (progress and accelerator.is_main_process),
        mininterval=0.1 if sys.stderr.isatty() else 10,
    )  # fmt: skip
    for epoch in range(first, recipe.epochs):
        begun, seen, totals = time.perf_counter(), 0, {}
        set_seed(_mix(recipe.seed, epoch, accelerator.process_index))
        batches = iter(loader_of(recipe, accelerator, train_set(model, epoch), epoch))
        wrapped.train()
        for group in optimizer.param_groups:
            if not group["learned"]:
                group["lr_scale"] = 0.0 if epoch < recipe.freeze_epochs else recipe.backbone_lr_scale
        for i in range(1, steps + 1):
            schedule.step_update(step)
            if recipe.method:
                model.keep_ratio = keep_rate(step / steps, recipe.keep_ratio, *recipe.keep_warmup)
            for _ in range(recipe.accumulate):
                images, labels = next(batches)
                images, labels = images.to(accelerator.device), lookup[labels].to(accelerator.device)
                if mixup is not None:
                    images, labels = mixup(images, labels)
                elif recipe.smoothing:
                    labels = mixup_target(labels, model.num_classes, smoothing=recipe.smoothing)
                with accelerator.accumulate(wrapped):
                    terms = terms_of(recipe, accelerator, wrapped, model, teacher, images, labels)
                    accelerator.backward(terms["total"])
                    if recipe.clip_grad and accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(wrapped.parameters(), recipe.clip_grad)
                    optimizer.step()
                    optimizer.zero_grad()
                seen += len(images) * accelerator.num_processes
                for name, term in terms.items():
                    totals[name] = totals.get(name, 0) + term.detach()
            step += 1
            bar.update()
            if average is not None:
                average.update(model, step=step)
            stop = step == recipe.max_steps
            if i % recipe.log_every == 0 or i == steps or stop:
                means = {name: total.item() / (i * recipe.accumulate) for name, total in totals.items()}
                if not np.isfinite(means["total"]):
                    raise RuntimeError(f"the loss is {means['total']} in epoch {epoch}, before step {step}")
                rate = seen / (time.perf_counter() - begun)
                kept = {"keep_ratio": model.keep_ratio} if recipe.method else {}
                log.write({"epoch": epoch, "step": step, "lr": max(g["lr"] for g in optimizer.param_groups),
                           "images_per_second": round(rate, 1), **kept, **means})  # fmt: skip
                bar.set_postfix(epoch=epoch, loss=f"{means['total']:.3f}")
            if stop:
                break
        seconds += time.perf_counter() - begun
        if stop:
            break
        checkpoints.save(accelerator, recipe, out, epoch + 1, seconds)
        if recipe.eval_every and (epoch + 1) % recipe.eval_every == 0 and epoch + 1 < recipe.epochs:
            correct = evaluate(recipe, accelerator, model, test, lookup)
            log.write({"epoch": epoch, "step": step, "test": results.accuracy(int(correct.sum()), len(correct))})
    bar.close()

    if recipe.method:
        model.keep_ratio = recipe.keep_ratio
    result = {
        "recipe": as_dict(recipe), "num_classes": model.num_classes, "images_seen": step * recipe.batch,
        "seconds": round(seconds, 1), "processes": accelerator.num_processes, "last": log.last,
    }  # fmt: skip
    for name, trained in (("", model), ("ema_", average and average.module)):
        if trained is not None:
            correct = evaluate(recipe, accelerator, trained, test, lookup)
            result[f"{name}accuracy"] = results.accuracy(int(correct.sum()), len(correct))
            result[f"{name}correct"] = "".join("01"[right] for right in correct.tolist())
            if accelerator.is_main_process:
                checkpoints.save_weights(trained, out / ("ema.safetensors" if name else "model.safetensors"))
    if accelerator.is_main_process:
        results.save(out, "result", result)
        for folder in out.glob("epoch-*"):
            shutil.rmtree(folder)
    accelerator.wait_for_everyone()
    return checkpoints.finished(out, recipe)


@torch.inference_mode()
def evaluate(recipe, accelerator, model, test, lookup):
    """(n,) int64: 1 for each test image that the model gets right, in float32, on every process."""
    mine = range(accelerator.process_index, len(test), accelerator.num_processes)
    was, right, i = model.training, torch.zeros(len(test), dtype=torch.int64), 0
    model.eval()
    for images, labels in DataLoader(test, EVAL_BATCH, sampler=mine, num_workers=recipe.workers):
        logits = type(model).forward(model, images.to(accelerator.device))  # past Accelerate's autocast
        right[list(mine[i : i + len(labels)])] = (logits.argmax(1).cpu() == lookup[labels]).long()
        i += len(labels)
    model.train(was)
    return accelerator.reduce(right.to(accelerator.device), "sum").cpu()


def test_tensors(recipe, model):
    """The recipe's test set in memory, to measure other things on.

    Args:
        recipe: a `Recipe`.
        model: as `build` gives it, or as `load` does.

    Returns:
        (n, C, H, W) images and (n,) labels, counted as the model's classes are.
    """
    classes, _, test_set = load_data(recipe)
    images, labels = (torch.cat(part) for part in zip(*DataLoader(test_set(model), EVAL_BATCH)))
    return images, torch.searchsorted(torch.tensor(classes), labels) if recipe.head == "data" else labels


def load(out):
    """The trained model of a finished run, pruned or masked as it was trained, in eval mode.

    Args:
        out: the run's folder.

    Raises:
        FileNotFoundError: no finished run is there.
    """
    out = Path(out)
    if not (out / "result.json").exists():
        raise FileNotFoundError(f"no finished run at {out}: its result.json is missing")
    result = json.loads((out / "result.json").read_text())
    recipe = make(result["recipe"])
    model = adapt(recipe, new_model(recipe.model, result["num_classes"]))
    return load_checkpoint(model, out / "model.safetensors").eval()


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help") or any("=" not in pair for pair in arguments[1:]):
        sys.exit(__doc__)
    recipe = Path(arguments[0])
    changes = {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in arguments[1:])}
    out = changes.pop("out", Path("_build/runs") / recipe.parent.name / recipe.stem)
    try:
        result = run(recipe, out, **changes)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        sys.exit(f"tpbook.train: {error}")
    said = result["accuracy"]
    print(f"{out}: {said['right']} of {said['n']} test images right ({said['percent']:.1f} %)")


if __name__ == "__main__":
    main()
