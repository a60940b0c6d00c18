"""Token pruning in vision transformers: four methods, one engine, any timm ViT::

import timm, tpbook

model = timm.create_model("deit_small_patch16_224", pretrained=True).eval()
tpbook.prune(model, "etps", keep_ratio=0.7)   # in place; `model(images)` still gives logits
model.keep_ratio = 0.5                        # turn the one knob at run time
with tpbook.trace(model) as t:                # look inside: t.kept, t.host, t.scores
    model(images)
tpbook.unprune(model)                         # exactly the model it was
"""

from . import data, flops, losses
from .backbones import load_backbone, load_checkpoint
from .engine import prune, unprune
from .exporting import export
from .masking import mask, unmask
from .methods import METHODS, Method
from .tracing import Trace, trace

__version__ = "0.1.0"
__all__ = [
    "METHODS",
    "Method",
    "Trace",
    "data",
    "export",
    "flops",
    "load_backbone",
    "load_checkpoint",
    "losses",
    "mask",
    "prune",
    "trace",
    "unmask",
    "unprune",
]
