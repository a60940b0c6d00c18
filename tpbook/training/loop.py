"""Trains what a recipe says; `tpbook.train` is its command.

Every random choice of an epoch (order, augmentation, mixup, masks, Gumbel noise) comes from the seed, the epoch and the
process alone, so on a CPU in float32 with the same threads a resumed run ends with the same weights as an unbroken one.

Chapter: :doc:`/book/reproduction`
"""

import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch.utils.data import DataLoader
from tqdm import tqdm

from .. import losses
from ..book import results
from ..families import family_of
from ..methods.evit import keep_rate
from ..tracing import trace
from ..weights import load_checkpoint
from . import checkpoints
from .loading import finisher
from .models import (
    LogitTeacher,
    adapt,
    build,
    described,
    labelled,
    lookup_of,
    names_of,
    new_model,
    take_along,
    teacher_of,
)  # fmt: skip
from .recipes import PRECISIONS, Recipe, as_dict, make, read, written
from .setup import fast_attention, load_data, loader_of, optimizer_of, seed_of

EVAL_BATCH = 100
CONFUSED = 200  # classes of which a confusion matrix is written down


def terms_of(recipe, accelerator, wrapped, model, teacher, images, labels):
    """One forward of model and teacher, and the method's loss terms (`tpbook.losses`)."""
    theirs, features = (None, None) if teacher is None else taught(accelerator, teacher, images)
    learned = recipe.method and model.pruning.method.score.learned
    with accelerator.autocast(), fast_attention(model, images), trace(model) as traced:
        logits = wrapped(images)
        if learned or recipe.aux_weight:
            traced.features = family_of(model).distilled(model, traced.features)
    if own := recipe.method and model.pruning.method.score.objective:
        return getattr(losses, own)(
            logits, traced, labels, teacher_logits=theirs, logit_weight=recipe.logit_weight, **recipe.loss
        )
    if learned:
        return losses.dynamicvit(
            logits, traced, labels, teacher_logits=theirs, teacher_features=features,
            keep_ratios=model.shares(traced.decisions), token=recipe.token_loss,
            ratio_weight=recipe.ratio_weight, logit_weight=recipe.logit_weight, token_weight=recipe.token_weight,
        )  # fmt: skip
    return losses.classification(
        logits, labels, teacher_logits=theirs, logit_weight=recipe.logit_weight,
        token_logits=traced.features if recipe.aux_weight else None, aux_weight=recipe.aux_weight,
    )  # fmt: skip


def taught(accelerator, teacher, images):
    """What there is to distil: the frozen teacher's logits (B, classes), and (B, N, …) of its final patch tokens.

    None for the tokens of a teacher of another architecture.
    """
    if isinstance(teacher, LogitTeacher):
        with torch.no_grad(), accelerator.autocast():
            return teacher(images), None
    family = family_of(teacher)
    with torch.no_grad(), accelerator.autocast(), fast_attention(teacher, images), trace(teacher) as t:
        logits = family.class_logits(teacher, images)
        return logits, family.distilled(teacher, t.features)


def run(recipe, out, *, progress=True, **changes):
    """Train, or go on training, and return what `result.json` says.

    Args:
        recipe: a `Recipe`, or the path of a recipe file.
        out: the folder of this run.
        progress: draw a progress bar on stderr.
        **changes: recipe keys that differ.

    Returns:
        dict: "accuracy" on the test set with its interval (and "ema_accuracy"), "correct" with 1 or 0 a test image,
        "classes", the names, of up to 200 classes "confusion", how many test images of each class (row) were taken for
        each (column), "recipe", "images_seen", "seconds", "last" with the last loss terms, and "run", where and when.

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
    if recipe.precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("precision must be fp32 or bf16 on a CPU, which has no autocast to float16, got 'fp16'")
    parts = accelerator.num_processes * recipe.accumulate
    if recipe.batch % parts:
        raise ValueError(f"batch must be a multiple of processes × accumulate = {parts}, got {recipe.batch}")

    set_seed(recipe.seed)
    classes, train_set, test_set = load_data(recipe)
    model = build(recipe, classes)
    teacher = teacher_of(recipe, classes, model)
    if teacher is not None:
        teacher.to(accelerator.device)
    take_along(recipe, adapt(recipe, model)).to(accelerator.device)
    lookup, test = lookup_of(recipe, classes), test_set(model)
    finish = finisher(recipe, model, accelerator.device)

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
        set_seed(seed_of(recipe.seed, epoch, accelerator.process_index))
        batches = iter(loader_of(recipe, accelerator, train_set(model, epoch), epoch))
        wrapped.train()
        for group in optimizer.param_groups:
            if not group["learned"]:
                group["lr_scale"] = 0.0 if epoch < recipe.freeze_epochs else recipe.backbone_lr_scale
        for i in range(1, steps + 1):
            schedule.step_update(step)
            if recipe.method and model.keep_ratio is not None:
                model.keep_ratio = keep_rate(step / steps, recipe.keep_ratio, *recipe.keep_warmup)
            for _ in range(recipe.accumulate):
                images, labels = next(batches)
                images, labels = finish(images), lookup[labels].to(accelerator.device)
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

    if recipe.method and model.keep_ratio is not None:
        model.keep_ratio = recipe.keep_ratio
    result = {
        "recipe": as_dict(recipe), "num_classes": model.num_classes, "classes": names_of(recipe, classes),
        "images_seen": step * recipe.batch,
        "seconds": round(seconds, 1), "processes": accelerator.num_processes, "last": log.last,
    }  # fmt: skip
    for name, trained in (("", model), ("ema_", average and average.module)):
        if trained is not None:
            labels, predicted = predict(recipe, accelerator, trained, test, lookup)
            correct = labels == predicted
            result[f"{name}accuracy"] = results.accuracy(int(correct.sum()), len(correct))
            result[f"{name}correct"] = "".join("01"[right] for right in correct.tolist())
            if model.num_classes <= CONFUSED:
                k, known = model.num_classes, labels >= 0
                cells = torch.bincount((k * labels + predicted)[known], minlength=k * k)
                result[f"{name}confusion"] = cells.view(k, k).tolist()
            if accelerator.is_main_process:
                file = out / ("ema.safetensors" if name else "model.safetensors")
                checkpoints.save_weights(trained, file, described(recipe, classes))
    if accelerator.is_main_process:
        results.save(out, "result", result)
        for folder in out.glob("epoch-*"):
            shutil.rmtree(folder)
    accelerator.wait_for_everyone()
    return checkpoints.finished(out, recipe)


@torch.inference_mode()
def predict(recipe, accelerator, model, test, lookup):
    """(2, n) int64: of each test image the class that it is of, −1 where the model has none for it, and the one it is
    taken for, in float32, on every process."""
    mine = range(accelerator.process_index, len(test), accelerator.num_processes)
    was, said, i = model.training, torch.zeros(2, len(test), dtype=torch.int64), 0
    model.eval()
    for images, labels in DataLoader(test, EVAL_BATCH, sampler=mine, num_workers=recipe.workers):
        logits = type(model).forward(model, images.to(accelerator.device))  # past Accelerate's autocast
        said[:, list(mine[i : i + len(labels)])] = torch.stack([lookup[labels], logits.argmax(1).cpu()])
        i += len(labels)
    model.train(was)
    return accelerator.reduce(said.to(accelerator.device), "sum").cpu()


def evaluate(recipe, accelerator, model, test, lookup):
    """(n,) int64: 1 for each test image that the model gets right, as `predict` finds it."""
    labels, predicted = predict(recipe, accelerator, model, test, lookup)
    return (labels == predicted).long()


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
    return images, lookup_of(recipe, classes)[labels]


def load(out):
    """The trained model of a finished run, pruned or masked as it was trained, in eval mode.

    Its classes' names are `model.pretrained_cfg["label_names"]`.

    Args:
        out: the run's folder.

    Raises:
        FileNotFoundError: no finished run is there.
    """
    out = Path(out)
    if not (out / "result.json").exists():
        raise FileNotFoundError(f"no finished run at {out}: its result.json is missing")
    result = json.loads((out / "result.json").read_text())
    recipe = written(result["recipe"])
    model = labelled(new_model(recipe.model, result["num_classes"]), result.get("classes", ()))
    return load_checkpoint(adapt(recipe, model), out / "model.safetensors").eval()
