"""Masked fine-tuning (Shi & Wang 2023): a better start for pruning, from random masks and cross-entropy alone.

A base model that has only seen whole images meets three gaps when its tokens get pruned: it computes otherwise, it is
told less, and which tokens it is told is chosen for it. So it is fine-tuned first on images with patches missing::

    V ⊂ {1 … N}, uniform, |V| = ⌊(1 − r)·N⌋            `PatchMask`
    loss = cross-entropy(model([class token; {x_i + pos_i}, i ∈ V]), label)

Only the paper's abstract is public, and it says no more than that image patches are masked and the class label is
predicted from those that are not. These are therefore choices of ours: masked patches are *removed* (not replaced by a
mask token), once, after the position embedding, uniformly, at one ratio for every image of a batch; and nothing is
distilled. Removing makes the step cheaper: at r = 0.5 every block sees half the patches.

Chapter: :doc:`/book/masked-fine-tuning`
"""

import math
from fractions import Fraction

import torch
from timm.layers import PatchDropout
from timm.models import VisionTransformer

from .checks import check_name, check_seed, decimals
from .engine import is_pruned
from .mixing import enter, leave
from .tokens import retain

WHEN = ("train", "always")


class PatchMask(PatchDropout):
    """timm's `PatchDropout`, with exact counts, ratios drawn from a range, a seed, and masks in eval mode too.

    Args:
        ratio: the share r of patches to hide, or a range (lo, hi).
        prefix: P, prefix tokens, never hidden.
        when: "train" or "always".
        seed: int or None.
        replaced: the module that stood here; `unmask` puts it back.
    """

    def __init__(self, ratio, prefix, when, seed, replaced):
        super().__init__(num_prefix_tokens=prefix)
        self.ratio, self.when, self.seed = ratio, when, seed
        self.__dict__["replaced"] = replaced  # behind nn.Module's back: it takes no part while it is replaced
        self.record = None  # a Trace

    def __getstate__(self):
        return {**self.__dict__, "record": None}  # a copy of the model is not looked at

    def visible(self, patches, ratio):
        """How many of N = `patches` patches stay in view: ⌊(1 − r)·N⌋ in exact decimal arithmetic, at least 1."""
        return max(1, math.floor(patches * (1 - Fraction(str(ratio)))))

    def forward(self, x):
        """(B, P + N, C) tokens with their positions → (B, P + n, C)."""
        if self.record is not None:
            self.record.visible = None
        if not (self.training or self.when == "always"):
            return x
        ratio, prefix = self.ratio, self.num_prefix_tokens
        batch, patches = x.shape[0], int(x.shape[1]) - prefix
        for_ratio, for_order = ({}, {}) if self.seed is None else _generators(self.seed, x.device)
        if isinstance(ratio, tuple):
            ratio = ratio[0] + (ratio[1] - ratio[0]) * torch.rand((), **for_ratio).item()
        n = self.visible(patches, ratio)
        if n == patches:
            return x
        visible = torch.randn(batch, patches, device=x.device, **for_order).argsort(dim=1)[:, :n]  # (B, n)
        if self.record is not None:
            self.record.visible = visible
        return retain(x, visible, prefix)


def _generators(seed, device):
    """Where a seed says what to draw from: of the CPU, and of the device; one where they are the same."""
    cpu = torch.Generator().manual_seed(seed)
    own = cpu if device.type == "cpu" else torch.Generator(device).manual_seed(seed)
    return {"generator": cpu}, {"generator": own}


class MaskedViT:
    """Mixed into the class of a masked model, ahead of its timm class."""

    @property
    def mask_ratio(self):
        """The mask ratio r, a float, or a range (lo, hi). Setting it checks it as `mask` does."""
        return self.patch_drop.ratio

    @mask_ratio.setter
    def mask_ratio(self, ratio):
        self.patch_drop.ratio = _check_ratio(ratio)

    def forward_intermediates(self, *args, **kwargs):
        """Refused while patches may be hidden: those that are left make no map.

        Raises:
            RuntimeError: in training mode, and with `when="always"`.
        """
        if self.training or self.patch_drop.when == "always":
            raise RuntimeError("a masked model has no feature maps: tpbook.unmask it first")
        return super().forward_intermediates(*args, **kwargs)


def mask(model, ratio=0.5, *, when="train", seed=None):
    """Hide random patches of every image from a timm VisionTransformer, in place.

    Each forward sees a (1 − ratio) share of the patches, another one for each image; the others are removed after the
    position embedding, so they cost nothing further on. At least one patch stays.

    Args:
        model: a timm `VisionTransformer`, not pruned.
        ratio: r ∈ [0, 1), or a range (lo, hi) from which each forward draws one; with several processes each draws
            its own. `model.mask_ratio = …` changes it.
        when: "train" masks in training mode only, "always" in eval mode too (to measure what occlusion does).
        seed: an int makes the masks the same in every forward of the same shape; None draws from torch's global
            generator.

    Returns:
        The same object. Its state dict is as before.

    Raises:
        TypeError, ValueError: an argument that cannot be used, a pruned model or a masked one. The model is as it was.
    """
    if not isinstance(model, VisionTransformer):
        kind = f"{type(model).__module__}.{type(model).__qualname__}"
        raise TypeError(f"model must be a timm VisionTransformer, whose patch_drop hides patches; got {kind}")
    if is_pruned(model):
        raise ValueError(f"model must not be pruned, and it is by {model.pruning.name!r}: tpbook.unprune it first")
    if isinstance(model, MaskedViT):
        raise ValueError("model is masked already: set model.mask_ratio, or tpbook.unmask it first")
    ratio = _check_ratio(ratio)
    check_name("when", when, WHEN)
    check_seed(seed)
    hide = PatchMask(ratio, model.num_prefix_tokens, when, seed, model.patch_drop)
    model.patch_drop = hide.train(model.training)
    enter(model, MaskedViT)
    return model


def unmask(model):
    """Undo `mask`; parameters trained meanwhile stay trained.

    Args:
        model: a masked model.

    Returns:
        The same object.

    Raises:
        ValueError: the model is not masked.
    """
    if not isinstance(model, MaskedViT):
        raise ValueError(f"model must be masked by tpbook.mask, got a plain {type(model).__name__}")
    model.patch_drop = model.patch_drop.replaced.train(model.training)
    leave(model)
    return model


def _check_ratio(ratio):
    checked = decimals("ratio", ratio)
    several = isinstance(checked, tuple)
    for r in checked if several else (checked,):
        if not 0 <= r < 1:
            raise ValueError(f"ratio must lie in [0, 1), got {r!r}")
    if several and (len(checked) != 2 or checked[0] > checked[1]):
        raise ValueError(f"ratio must be one number or a range (lo, hi) with lo ≤ hi, got {ratio!r}")
    return checked
