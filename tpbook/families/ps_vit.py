"""This package's `PSViT`: timm's blocks behind a stem that samples."""

import math

from torch import nn

from .. import backbones
from .costs import linear_macs
from .timm_vit import TimmViT


class PSViT(TimmViT):
    """As many points for every image size. Blocks in the iterations of the stem are not pruned."""

    name = "PS-ViT"

    def fits(self, model):
        return isinstance(model, backbones.PSViT)

    def segments(self, model, size=None):
        return super().segments(model)

    # ---- cost

    def embeddings(self, model):
        return [model.stem, model.pos_layer, model.ps_layers]

    def embed_macs(self, model, size):
        first, *others = (layer for layer in model.stem.modules() if isinstance(layer, nn.Conv2d))
        cells = size[0] // 4 * (size[1] // 4)
        stem = cells * (4 * first.weight.numel() + sum(layer.weight.numel() for layer in others))
        n = math.prod(self.grid(model))
        linear = sum(linear_macs(layer) for layer in model.ps_layers)
        return stem + n * linear + len(model.ps_layers) * 2 * n * n * self.width(model)
