"""What other counters make of a model: fvcore as it comes, and torch's own.

Chapter: :doc:`/book/where-the-cost-is`
"""

import torch
from fvcore.nn import FlopCountAnalysis
from torch.utils.flop_counter import FlopCounterMode


def set_fused(model, on):
    """Switch timm's fused attention on or off in every block of a model. → the same model"""
    for block in model.blocks:
        block.attn.fused_attn = on
    return model


def by_fvcore(model):
    """Multiply-accumulates of one image by fvcore without a handle of ours: it does not see fused attention. → int"""
    image = torch.zeros(1, 3, *model.patch_embed.img_size)
    counted = FlopCountAnalysis(model, image).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return counted.tracer_warnings("none").total()


@torch.no_grad()
def by_torch(model):
    """Floating-point operations of one image by torch, two a multiply-accumulate. → int"""
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, *model.patch_embed.img_size))
    return counter.get_total_flops()
