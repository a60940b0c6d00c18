"""torchvision's `VisionTransformer`: vit_b_16, vit_b_32, vit_l_16, vit_l_32, vit_h_14.

The halves of a block::

    x ← x + dropout(self_attention(ln_1(x)))
    x ← x + mlp(ln_2(x))
"""

from torch import nn
from torchvision.models.vision_transformer import EncoderBlock, VisionTransformer

from ..pruned import PrunedModel
from .costs import linear_macs
from .family import Family
from .multihead import attend, unknown


class TorchvisionViT(Family):
    """Models of `EncoderBlock`, whose attention is `nn.MultiheadAttention`."""

    name, mixin = "torchvision VisionTransformer", PrunedModel

    def fits(self, model):
        return isinstance(model, VisionTransformer)

    def blocks(self, model):
        return list(model.encoder.layers)

    def norm(self, model):
        return model.encoder.ln

    def prefix(self, model):
        return 1

    def grid(self, model):
        side = model.image_size // model.patch_size
        return side, side

    def width(self, model):
        return model.hidden_dim

    def has_class_token(self, model):
        return True

    def check_block(self, block):
        if type(block).forward is not EncoderBlock.forward:
            return f"must be a torchvision EncoderBlock, got {type(block).__name__}"
        return None

    def check_attention(self, block):
        return unknown(block.self_attention)

    def first(self, block, x, mask, arguments):
        return block.dropout(attend(block.self_attention, block.ln_1(x), mask)) + x

    def second(self, block, x):
        return x + block.mlp(block.ln_2(x))

    # ---- cost

    def channels(self, model):
        return next(module.in_channels for module in model.conv_proj.modules() if isinstance(module, nn.Conv2d))

    def image_size(self, model):
        return model.image_size, model.image_size

    def patch_size(self, model):
        return model.patch_size, model.patch_size

    def embedding(self, model):
        return model.conv_proj

    def attention(self, block):
        attention = block.self_attention
        return attention, attention.num_heads * attention.head_dim

    def head_macs(self, model, n):
        return linear_macs(model.heads)
