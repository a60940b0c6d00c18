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
from timm.layers.patch_dropout import PatchDropout, patch_dropout_forward
from timm.models import VisionTransformer

from .engine import PrunedViT, check_seed, decimals, fast_attention, mixed

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

    def visible(self, patches, ratio):
        """How many of N = `patches` patches stay in view: ⌊(1 − r)·N⌋ in exact decimal arithmetic, at least 1."""
        return max(1, math.floor(patches * (1 - Fraction(str(ratio)))))

    def forward(self, x):
        """(B, P + N, C) tokens with their positions → (B, P + n, C)."""
        if self.record is not None:
            self.record.clear()
        if not (self.training or self.when == "always"):
            return x
        if self.seed is None:
            return self._hide(x)
        with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            return self._hide(x)

    def _hide(self, x):
        ratio, patches = self.ratio, int(x.shape[1]) - self.num_prefix_tokens
        if isinstance(ratio, tuple):
            ratio = ratio[0] + (ratio[1] - ratio[0]) * torch.rand(()).item()
        n = self.visible(patches, ratio)
        if n == patches:
            return x
        # timm keeps ⌊N·(1 − prob)⌋ in floats; aimed between two whole numbers it keeps n
        x, chosen = patch_dropout_forward(x, 1 - (n + 0.5) / patches, self.num_prefix_tokens, False, True)
        if self.record is not None:
            self.record.visible = chosen
        return x


class MaskedViT:
    """Mixed into the class of a masked model, ahead of its timm class."""

    @property
    def mask_ratio(self):
        """The mask ratio r, a float, or a range (lo, hi). Setting it checks it as `mask` does."""
        return self.patch_drop.ratio

    @mask_ratio.setter
    def mask_ratio(self, ratio):
        self.patch_drop.ratio = _check_ratio(ratio)

    def forward_features(self, images, *args, **kwargs):
        """timm's `forward_features` on the visible patches: (B, in_chans, H, W) → (B, P + n, C)."""
        if not self.training:
            return super().forward_features(images, *args, **kwargs)
        with fast_attention(self, images):
            return super().forward_features(images, *args, **kwargs)


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
        raise TypeError(f"model must be a timm VisionTransformer, got {type(model).__name__}")
    if isinstance(model, PrunedViT):
        raise ValueError(f"model must not be pruned, and it is by {model.pruning.name!r}: tpbook.unprune it first")
    if isinstance(model, MaskedViT):
        raise ValueError("model is masked already: set model.mask_ratio, or tpbook.unmask it first")
    ratio = _check_ratio(ratio)
    if when not in WHEN:
        raise ValueError(f"when must be one of {', '.join(WHEN)}, got {when!r}")
    check_seed(seed)
    hide = PatchMask(ratio, model.num_prefix_tokens, when, seed, model.patch_drop)
    model.patch_drop = hide.train(model.training)
    model.__class__ = mixed(MaskedViT, type(model))
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
    model.__class__ = type(model)._base
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
