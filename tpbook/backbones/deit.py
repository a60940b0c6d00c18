"""DeiT-256 of DynamicViT (Rao et al. 2021): between DeiT-Ti and DeiT-S, 256 wide, 12 blocks, 4 heads.

``main_dynamic_vit.py`` of raoyongming/DynamicViT calls it deit-256. timm has all the other DeiT.

Chapter: :doc:`/book/dynamicvit`
"""

from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model

default_cfgs = generate_default_cfgs({
    "deit_256_patch16_224": {
        "num_classes": 1000, "input_size": (3, 224, 224), "fixed_input_size": True, "crop_pct": 0.9,
        "interpolation": "bicubic", "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj", "classifier": "head",
    },
})  # fmt: skip


@register_model
def deit_256_patch16_224(pretrained=False, **kwargs):
    """A plain timm `VisionTransformer`."""
    size = {"embed_dim": 256, "depth": 12, "num_heads": 4}
    return build_model_with_cfg(VisionTransformer, "deit_256_patch16_224", pretrained, **{**size, **kwargs})
