"""Models that neither timm nor transformers have, in timm's registry: one file each, imported here to be registered.

Chapter: :doc:`/book/lv-vit`
"""

from timm import create_model

from . import digits_models
from .deit import deit_256_patch16_224
from .lvvit import LVViT
from .ps_vit import PSViT
from .t2t_vit import T2TViT

__all__ = ["LVViT", "PSViT", "T2TViT", "create_model", "deit_256_patch16_224", "digits_models"]
