"""This package's `LVViT`: timm's blocks with a divisor for LayerScale; two heads, and a stem of four convolutions.

    x ← x + drop_path1(ls1(attn(norm1(x))))
    x ← x + drop_path2(ls2(mlp(norm2(x))))
"""

from timm.models import VisionTransformer

from .. import backbones
from .costs import linear_macs
from .timm_vit import TimmViT


class LVViT(TimmViT):
    """What a learned method distils are the classes of its auxiliary head, token by token, after ``losses.py`` of
    raoyongming/DynamicViT."""

    name = "LV-ViT"

    def fits(self, model):
        return isinstance(model, backbones.LVViT)

    def class_logits(self, model, images):
        return VisionTransformer.forward_head(model, model.forward_features(images))

    def distilled(self, model, features):
        return model.aux_head(features)

    # ---- cost

    def patch_macs(self, model):
        stem = model.patch_embed
        places = stem.patch_size[0] // 2 * (stem.patch_size[1] // 2)  # of a patch on the halved map
        halved = sum(conv.weight.numel() for conv in (stem.conv1, stem.conv2, stem.conv3))
        return places * halved + stem.proj.weight.numel()

    def head_macs(self, model, n):
        return super().head_macs(model, n) + n * linear_macs(model.aux_head)
