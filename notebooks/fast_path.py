"""Two faults of the official DynamicSwin and DynamicConvNeXt, shown by our models of the same equations.

In training and at test they compute different functions wherever a decision flips between the three: `gap` lays the same
decisions into both. And the official Swin asks by `len(x) == 2` whether it has the training's pair of maps, which a batch
of two images is too, and fails; `alone` compares a batch with its images one by one::

    python notebooks/fast_path.py      # → notebooks/results/fast-path.json
"""

from contextlib import contextmanager
from pathlib import Path

import timm
import torch

import tpbook
from tpbook.book import results
from tpbook.families import family_of

FOLDER = Path(__file__).parent / "results"
MODELS = {"dynamicswin_t": "swin_tiny_patch4_window7_224", "dynamicconvnext_t": "convnext_tiny"}
STAGE_3, KEPT = 196, 98  # positions, and how many of them are chosen at each decision


def alive(model, seed=0):
    """The model with random weights that keep a signal's size: norms and biases as they start, layer scales ½."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("gamma"):
                p.fill_(0.5)
            elif p.dim() > 1:
                p.normal_(std=p[0].numel() ** -0.5)
    return model.eval()


@contextmanager
def decided(model, masks):
    """Decision s of a pruned model is `masks[s]`, (B, N) of zeros and ones, in training and at test."""
    hooks = []
    for predictor, mask in zip(family_of(model).predictors(model), masks, strict=True):
        sure = 1e4 * (torch.stack([mask, 1 - mask], dim=-1) - 1)  # log-probabilities beyond any Gumbel noise
        hooks.append(predictor.register_forward_hook(lambda module, args, out, sure=sure: sure))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def gap(model, images, *, flips, seed=0):
    """How far the forwards of training and test are apart where both decide the same.

    Args:
        model: pruned, with one number of positions for every decision; it ends in eval mode.
        images: (B, channels, H, W).
        flips: whether each decision is drawn for itself; else the first one is all of them.
        seed: of the decisions.

    Returns:
        dict: "flips", the share of positions that change from decision to decision; "logits", the largest difference;
        "deviation", of the logits at test.
    """
    with tpbook.trace(model.eval()) as t:
        model(images)
    random, (batch, patches) = torch.Generator().manual_seed(seed), t.scores[0].shape
    masks = []
    for kept in t.kept:
        chosen = torch.rand(batch, patches, generator=random).topk(kept.shape[1]).indices
        masks.append(torch.zeros(batch, patches).scatter(1, chosen, 1.0))
    masks = masks if flips else masks[:1] * len(masks)
    with decided(model, masks):
        test, train = model(images), model.train()(images)
    model.eval()
    return {
        "flips": [(a != b).float().mean().item() for a, b in zip(masks, masks[1:])],
        "logits": (test - train).abs().max().item(), "deviation": test.std().item(),
    }  # fmt: skip


@torch.no_grad()
def alone(model, images):
    """The largest difference of logits between a batch and its images one by one, in eval mode."""
    return (model.eval()(images) - torch.cat([model(image) for image in images.split(1)])).abs().max().item()


def measure(name):
    """The numbers of one model of `MODELS`, for four random images."""
    model = alive(tpbook.prune(timm.create_model(MODELS[name], drop_path_rate=0.0), "dynamicvit", keep=KEPT))
    images = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    numbers = {"flipping": gap(model, images, flips=True), "one_decision": gap(model, images, flips=False)}
    model.keep_ratio = 0.7
    counts = [count.kept for count in model.pruning.counts(STAGE_3)]
    floats = [int(STAGE_3 * ratio) for ratio in (0.7, 0.7 - 0.2, 0.7 - 0.4)]
    return {**numbers, "batch_of_two": alone(model, images[:2]), "kept": counts, "kept_in_floats": floats}


if __name__ == "__main__":
    results.save(FOLDER, "fast-path", {name: measure(name) for name in MODELS})
