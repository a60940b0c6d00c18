"""Small models of the embedded digits, 56 × 56 pixels in grey, one of each kind that the papers prune.

`timm.create_model` knows them all: names and sizes are this project's, the architectures timm's, transformers' and
`lvvit.py`'s. `tpbook.load_backbone(name)` gives them with the weights that come with the package.

Chapter: :doc:`/book/hybrid-vits`
"""


from timm.models import (
    PyramidVisionTransformerV2,
    SwinTransformer,
    VisionTransformer,
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
)

from ..digits import MEAN, PATCH, SIZE, STD
from .lvvit import LVViT

DIGITS = "vit_digits_patch4_56"


def _prepared(first_conv, classifier):
    """What timm keeps of a model: how to prepare a picture, and its first and last layers."""
    return {
        "num_classes": 10, "input_size": (1, SIZE, SIZE), "fixed_input_size": True, "mean": (MEAN,), "std": (STD,),
        "crop_pct": 1.0, "interpolation": "bicubic", "first_conv": first_conv, "classifier": classifier,
    }  # fmt: skip


default_cfgs = generate_default_cfgs({
    DIGITS: _prepared("patch_embed.proj", "head"),
    "pvt_digits_56": _prepared("patch_embed.proj", "head") | {"fixed_input_size": False},
    "cvt_digits_56": _prepared("cvt.encoder.stages.0.embedding.convolution_embeddings.projection", "classifier")
    | {"fixed_input_size": False},
    "swin_digits_56": _prepared("patch_embed.proj", "head.fc"),
    "lvvit_digits_56": _prepared("patch_embed.conv1", ("head", "aux_head")),
})  # fmt: skip


def build_digits_vit(**kwargs):
    """The flat ViT with random weights: 12 blocks, 196 patches.

    Args:
        **kwargs: passed on to timm's `VisionTransformer`, over the defaults.
    """
    return vit_digits_patch4_56(**kwargs)


@register_model
def vit_digits_patch4_56(pretrained=False, **kwargs):
    """A flat ViT: 14 × 14 patches, 12 blocks of width 64."""
    width = {"patch_size": PATCH, "embed_dim": 64, "depth": 12, "num_heads": 2, "mlp_ratio": 2, "weight_init": "jax"}
    return _build(VisionTransformer, DIGITS, pretrained, width, kwargs)


@register_model
def pvt_digits_56(pretrained=False, **kwargs):
    """A PVT v2 of two stages: 2 blocks on 14 × 14 places, whose keys are reduced to 7 × 7, and 4 on 7 × 7."""
    width = {"depths": (2, 4), "embed_dims": (32, 64), "num_heads": (1, 2), "sr_ratios": (2, 1), "mlp_ratios": 4}
    return _build(PyramidVisionTransformerV2, "pvt_digits_56", pretrained, width, kwargs)


@register_model
def cvt_digits_56(pretrained=False, **kwargs):
    """A CvT of two stages: 2 blocks on 14 × 14 places and 4 on 7 × 7, with a class token in the latter.

    Raises:
        ImportError: transformers is not there.
    """
    try:
        from .digits_cvt import DigitsCvT
    except ImportError as error:
        raise ImportError(
            f"cvt_digits_56 is a model of transformers ({error}): pip install tpbook[huggingface]"
        ) from error
    width = {"depth": (2, 4), "embed_dim": (32, 64), "num_heads": (1, 2)}
    return _build(DigitsCvT, "cvt_digits_56", pretrained, width, kwargs)


@register_model
def swin_digits_56(pretrained=False, **kwargs):
    """A Swin of three stages in windows of 7 × 7: 1 block on 28 × 28 places, 1 on 14 × 14 and 6 on 7 × 7."""
    width = {
        "patch_size": 2, "embed_dim": 16, "depths": (1, 1, 6), "num_heads": (1, 2, 4), "window_size": 7,
        "drop_path_rate": 0.0,
    }  # fmt: skip
    return _build(SwinTransformer, "swin_digits_56", pretrained, width, kwargs)


@register_model
def lvvit_digits_56(pretrained=False, **kwargs):
    """An LV-ViT: 14 × 14 patches by its stem, 8 blocks of width 48, λ = 2."""
    width = {"patch_size": PATCH, "embed_dim": 48, "depth": 8, "num_heads": 1, "stem_width": 16}
    return _build(LVViT, "lvvit_digits_56", pretrained, width, kwargs)


def _build(model, name, pretrained, width, kwargs):
    return build_model_with_cfg(model, name, pretrained, **{**width, **kwargs})
