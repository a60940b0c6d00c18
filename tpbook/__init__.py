"""Token pruning in vision transformers: many methods, one engine, the models that people have::

import timm, tpbook

model = timm.create_model("deit_small_patch16_224", pretrained=True).eval()
tpbook.prune(model, "etps", keep_ratio=0.7)   # in place; `model(images)` still gives logits
model.keep_ratio = 0.5                        # turn the one knob at run time
with tpbook.trace(model) as t:                # look inside: t.kept, t.host, t.scores
    model(images)
tpbook.unprune(model)                         # exactly the model it was
"""

import importlib

from . import moved
from .backbones import LVViT, create_model
from .engine import prune, unprune
from .masking import mask, unmask
from .methods import METHODS, Method, register
from .tracing import Trace, to_grid, trace

__version__ = "0.2.0"

# what is heavy is loaded when first asked for: name → (module, name in it, or None for the module)
_LATER = {
    "data": (".data", None), "digits": (".digits", None), "flops": (".flops", None), "losses": (".losses", None),
    "bench": (".bench", None), "train": (".train", None), "widgets": (".book.widgets", None),
    "export": (".exporting", "export"), "load_backbone": (".weights", "load_backbone"),
    "load_checkpoint": (".weights", "load_checkpoint"),
}  # fmt: skip

__all__ = [
    "LVViT",
    "METHODS",
    "Method",
    "Trace",
    "create_model",
    "data",
    "export",
    "flops",
    "load_backbone",
    "load_checkpoint",
    "losses",
    "mask",
    "prune",
    "register",
    "to_grid",
    "trace",
    "unmask",
    "unprune",
]

moved.install()


def __getattr__(name):
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LATER[name]
    loaded = importlib.import_module(module, __name__)
    globals()[name] = getattr(loaded, attribute) if attribute else loaded
    return globals()[name]


def __dir__():
    return sorted({*globals(), *_LATER})
