"""What the book's notebooks begin with: a look, the model and images of a profile, a recipe of the size of a page.

Chapter: :doc:`/book/notation`
"""

import copy
import shutil
from pathlib import Path

import numpy as np
import torch

from .. import data, flops
from ..checks import default_at
from ..engine import prune, unprune
from ..masking import mask, unmask
from ..pruned import PrunedBlock
from ..tracing import trace
from ..training import recipes
from ..weights import DIGITS, load_backbone
from . import plots


def begin(profile, out):
    """Set the look of every figure, and make the folder that the results go to.

    Args:
        profile: "digits" (embedded), or "imagenette" or "imagewoof" (DeiT-Ti on photographs).
        out: the folder.

    Raises:
        ValueError: an unknown profile.
    """
    of(profile, digits=None, imagenette=None)
    plots.style()
    Path(out).mkdir(parents=True, exist_ok=True)


def of(profile, **choices):
    """What a profile takes: `of(profile, digits=500, imagenette=250)`; "imagewoof" what "imagenette" takes.

    Raises:
        ValueError: an unknown profile.
    """
    kind = "imagenette" if profile == "imagewoof" else profile
    if kind not in choices:
        raise ValueError(f"profile must be {' or '.join(choices)}, got {profile!r}")
    return choices[kind]


def backbone(profile):
    """The dense model of a profile, and images that it has not been trained on.

    Returns:
        The digits ViT and its 797 test canvases, or DeiT-Ti and the 1,000 photographs of nips2017-dev: a model in eval
        mode and a data set.
    """
    model = load_backbone(of(profile, digits=DIGITS, imagenette="deit_tiny_patch16_224"))
    return model, data.digits("test") if profile == "digits" else data.nips2017_dev(data.eval_transform(model))


def size(profile, budget, *, epochs, train_images, test_images, digits, imagenette):
    """Keys of a recipe that make it no larger than what is asked for, to be passed to `recipes.read`.

    Args:
        profile: "digits", "imagenette" or "imagewoof".
        budget: as of `tpbook.training.recipes.budget`; "slice" takes what follows.
        epochs: of photographs one at most.
        train_images, test_images: 0 takes what follows.
        digits, imagenette: a pair each, training and test images; 0 are all.

    Returns:
        dict.
    """
    train, test = of(profile, digits=digits, imagenette=imagenette)
    epochs = of(profile, digits=epochs, imagenette=min(epochs, 1))
    return recipes.budget(budget, epochs=epochs, train_images=train_images or train, test_images=test_images or test)


def runs(out):
    """An empty folder beside the results, for what is trained: each call of a notebook trains anew."""
    folder = Path(out) / "runs"
    shutil.rmtree(folder, ignore_errors=True)
    return folder


@torch.inference_mode()
def right(model, images, labels, batch=100):
    """Which images a model classifies right.

    Args:
        model: gives logits (B, classes).
        images: (n, C, H, W).
        labels: (n,) int64.
        batch: images a forward.

    Returns:
        (n,) bool.
    """
    return torch.cat([model(x).argmax(1) == y for x, y in zip(images.split(batch), labels.split(batch))])


@torch.inference_mode()
def confidence(model, images, labels, batch=100):
    """Which images a model classifies right, and the probability it gives the right class; arguments as for `right`.

    Returns:
        (n,) bool and (n,) float.
    """
    p = torch.cat([model(x).float().softmax(1) for x in images.split(batch)])  # (n, classes)
    return p.argmax(1) == labels, p.gather(1, labels[:, None])[:, 0]


def bits_in(result):
    """Which test images a training's model got right, (1, n) of 0 and 1; `result` as `tpbook.train.run` returns it."""
    return np.array([[int(bit) for bit in result["correct"]]])


@torch.inference_mode()
def class_tokens(model, images, batch=100):
    """The class token after each block.

    Args:
        model: a timm ViT with a class token in front.
        images: (n, C, H, W).
        batch: images a forward.

    Returns:
        (blocks, n, C).
    """
    seen = []  # (B, C) after each block, image batch by image batch
    hooks = [block.register_forward_hook(lambda block, args, x: seen.append(x[:, 0].clone())) for block in model.blocks]
    try:
        for x in images.split(batch):
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    depth = len(model.blocks)
    return torch.stack([torch.cat(seen[i::depth]) for i in range(depth)])


def pruned(model, method, keep_ratio=0.7, **options):
    """A pruned copy of a model that is not pruned; arguments as for `tpbook.prune`."""
    return prune(copy.deepcopy(model), method, keep_ratio=keep_ratio, **options)


def gmacs(model, method, keep_ratio, **options):
    """What a model costs when pruned, by the closed form, in GMACs.

    Args:
        model: not pruned, and not pruned after.
        method, keep_ratio, **options: as for `tpbook.prune`.
    """
    prune(model, method, keep_ratio=keep_ratio, **options)
    try:
        return flops.closed_form(model).total / 1e9
    finally:
        unprune(model)


@torch.inference_mode()
def traced(model, images, method, **options):
    """The trace of images (n, C, H, W) that went through a model pruned for it; options as for `tpbook.prune`."""
    prune(model, method, **options)
    try:
        with trace(model) as t:
            model(images)
    finally:
        unprune(model)
    return t


@torch.inference_mode()
def resumed(model, images, batch=100, first=None):
    """A copy of a model that begins where pruning does, and what it takes for images.

    What the blocks before that make of the images is then computed once, however many ways to prune follow: at ρ = ½
    half of the work. The copy's answers are the model's, pruned or not.

    Args:
        model: a timm ViT in eval mode, not pruned.
        images: (n, C, H, W).
        batch: images a forward.
        first: the block that the copy begins with; None is the first that is pruned unless others are named. Scores of
            methods that prune before a block may hear the one before.

    Returns:
        The copy, whose forward raises ValueError where pruning touches an earlier block; and the tokens before that
        block, (n, P + N, C).
    """
    late, entered = copy.deepcopy(model), []
    first = default_at(len(late.blocks))[0] if first is None else first

    def stop(block, args):
        entered.append(args[0])
        raise StopIteration

    with late.blocks[first].register_forward_pre_hook(stop):
        for x in images.split(batch):
            try:
                late(x)
            except StopIteration:
                pass

    def passes(block):
        def forward(x, *args, **kwargs):
            if isinstance(block, PrunedBlock):
                raise ValueError(f"pruning must begin at block {first}, whose tokens are given, or later")
            return x

        return forward

    for part in (late.patch_embed, late.patch_drop, late.norm_pre, *late.blocks[:first]):
        part.forward = passes(part)
    late._pos_embed = passes(None)
    return late, torch.cat(entered)


@torch.inference_mode()
def answers(model, images, batch=100):
    """What a pruned model says, and which patches it has left after its last stage; fused tokens are none.

    Args:
        model: pruned.
        images: (n, C, H, W).
        batch: images a forward.

    Returns:
        (n,) int64, the class it takes each image for, and (n, N) bool.
    """
    said, alive = [], []
    for x in images.split(batch):
        with trace(model) as t:
            said.append(model(x).argmax(1))
        seen = torch.zeros(len(x), t.grid[0] * t.grid[1] + 1, dtype=torch.bool)
        alive.append(seen.scatter_(1, t.kept[-1].clamp(min=-1) + 1, True)[:, 1:])
    return torch.cat(said), torch.cat(alive)


def right_when_pruned(model, images, labels, method, keep_ratio, seeds, **options):
    """Which images a model gets right that is pruned without training, by chance anew for each seed.

    Args:
        model, images, labels: as for `right`; the model is not pruned, and is not after.
        method, keep_ratio, **options: as for `tpbook.prune`.
        seeds: of the random score.

    Returns:
        (seeds, n) array of 0 and 1, and the share of MACs left, in percent.
    """
    found, whole = [], flops.closed_form(model).total
    for seed in seeds:
        prune(model, method, keep_ratio=keep_ratio, seed=seed, **options)
        found.append(right(model, images, labels).numpy())
        left = 100 * flops.closed_form(model).total / whole
        unprune(model)
    return np.array(found), left


def at_cost(model, method, macs, **options):
    """The keep ratio at which a method costs as nearly so many MACs as whole hundredths allow.

    Args:
        model: not pruned, and not pruned after.
        method, **options: as for `tpbook.prune`; how many tokens it keeps must not depend on the image.
        macs: of one image.

    Returns:
        ρ, from 0.05 on, or from the least that the method can.
    """
    prune(model, method, keep_ratio=1.0, **options)
    least, found = max(0.05, model.pruning.method.reduce.least_ratio), {}
    for ratio in (hundredth / 100 for hundredth in range(round(100 * least), 101)):
        model.keep_ratio = ratio
        found[ratio] = flops.closed_form(model).total
    unprune(model)
    return min(found, key=lambda ratio: abs(found[ratio] - macs))


def whole_and_half(model, measure, seed):
    """What `measure(model)` gives with all patches, and with the same random half of them hidden."""
    whole = measure(model)
    mask(model, 0.5, when="always", seed=seed)
    try:
        return whole, measure(model)
    finally:
        unmask(model)
