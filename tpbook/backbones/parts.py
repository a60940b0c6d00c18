"""What the backbones that timm does not have share: the sides of their images, their scale, how a picture is prepared.

Chapter: :doc:`/book/lv-vit`
"""

from timm.layers import PatchEmbed
from timm.layers.trace_utils import _assert
from torch import nn


class Stem(PatchEmbed):
    """What timm asks of a patch embedding, without its convolution.

    Args:
        **kwargs: those of timm's `PatchEmbed`.

    Raises:
        ValueError: `img_size` is no multiple of `patch_size`; padding or a norm is asked for.
    """

    def __init__(self, *, patch_size, norm_layer=None, dynamic_img_pad=False, **kwargs):
        if dynamic_img_pad or norm_layer is not None:
            raise ValueError("dynamic_img_pad must be False and embed_norm_layer None: the stem has neither")
        super().__init__(patch_size=patch_size, **kwargs)
        del self.proj

    def _init_img_size(self, img_size):
        size, grid, patches = super()._init_img_size(img_size)
        if min(grid) < 1 or any(side % patch for side, patch in zip(size, self.patch_size)):
            raise ValueError(f"img_size must be one or two multiples of {self.patch_size[0]}, got {img_size!r}")
        return size, grid, patches

    def set_input_size(self, img_size=None, patch_size=None):
        """timm's; ValueError for another `patch_size`."""
        if patch_size not in (None, self.patch_size, self.patch_size[0]):
            raise ValueError(f"patch_size must stay {self.patch_size[0]}, got {patch_size!r}")
        super().set_input_size(img_size=img_size)

    def check(self, images):
        """AssertionError unless images (B, in_chans, H, W) have the model's size or, where that is dynamic, fit it."""
        for side, patch, own in zip(images.shape[-2:], self.patch_size, self.img_size):
            fits = side == own if self.strict_img_size else side % patch == 0
            wanted = own if self.strict_img_size else f"a multiple of {patch}"
            _assert(fits, f"a side of the images must be {wanted} pixels, got {side}")


class Times(nn.Module):
    """x · factor, in the place of a norm of the queries."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor

    def extra_repr(self):
        return f"factor={self.factor:g}"


def set_scale(blocks, qk_scale):
    """Let timm's blocks attend by softmax(q Kᵀ · qk_scale); None leaves 1/√d, d channels a head.

    Their attention, fused or not, divides by √d, so the queries are multiplied by qk_scale · √d ahead of it.

    Raises:
        ValueError: `qk_scale` is not above 0, or the queries have a norm.
    """
    if qk_scale is None:
        return
    if not qk_scale > 0:
        raise ValueError(f"qk_scale must be above 0 or None, got {qk_scale!r}")
    for block in blocks:
        if not isinstance(block.attn.q_norm, nn.Identity):
            raise ValueError(f"qk_scale must be None where qk_norm is on, got {qk_scale!r}")
        block.attn.q_norm = Times(qk_scale * block.attn.head_dim**0.5)


def prepared(first):
    """How to prepare a picture for the models of T2T-ViT and PS-ViT, which say the same. `first` names the layer that
    sees it. Their files are releases and a drive, on no hub."""
    return {
        "num_classes": 1000, "input_size": (3, 224, 224), "fixed_input_size": True, "crop_pct": 0.9,
        "interpolation": "bicubic", "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
        "first_conv": first, "classifier": "head",
    }  # fmt: skip
