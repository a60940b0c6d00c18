"""Hugging Face's vision models, transformers ≥ 5: ViT, DeiT, DINOv2 (registers or none), DINOv3, CLIP, SigLIP.

    x ← x + scale1(attention(norm1(x)))
    x ← x + scale2(mlp(norm2(x)))

A layer sends its mask to `scaled_dot_product_attention` (attn_implementation="sdpa"), or adds it ("eager");
the flash and flex kernels take none like ours. Classes are known by name, so this file imports nothing of the library.
"""

import inspect
import sys
from typing import NamedTuple

import torch
from torch import nn

from ..pruned import PrunedModel
from .costs import linear_macs
from .family import Family, mean_as_weighed


class Layer(NamedTuple):
    """What a layer calls its parts, and what is applied to each half's output."""

    norm1: str
    attention: str
    scale1: tuple
    norm2: str
    scale2: tuple


class Tower(NamedTuple):
    """Where a model without a head has its parts; `norm` None is the last layer, where nothing norms all tokens."""

    layers: str
    norm: str | None
    patches: str
    prefix: int  # besides registers


_VIT = Layer("layernorm_before", "attention", ("dropout",), "layernorm_after", ("dropout",))
_DINO = Layer("norm1", "attention", ("layer_scale1", "drop_path"), "norm2", ("layer_scale2", "drop_path"))
_CLIP = Layer("layer_norm1", "self_attn", (), "layer_norm2", ())
LAYERS = {
    "ViTLayer": _VIT, "DeiTLayer": _VIT, "Dinov2Layer": _DINO, "Dinov2WithRegistersLayer": _DINO,
    "DINOv3ViTLayer": _DINO, "CLIPEncoderLayer": _CLIP, "SiglipEncoderLayer": _CLIP,
}  # fmt: skip

ROTATED = {"DINOv3ViTModel": Tower("model.layer", "norm", "embeddings.patch_embeddings", 1)}
TOWERS = {
    "ViTModel": Tower("layers", "layernorm", "embeddings.patch_embeddings", 1),
    "DeiTModel": Tower("layers", "layernorm", "embeddings.patch_embeddings", 2),
    "Dinov2Model": Tower("encoder.layer", "layernorm", "embeddings.patch_embeddings", 1),
    "Dinov2WithRegistersModel": Tower("encoder.layer", "layernorm", "embeddings.patch_embeddings", 1),
    "CLIPVisionModel": Tower("encoder.layers", None, "embeddings.patch_embedding", 1),
    "SiglipVisionModel": Tower("encoder.layers", "post_layernorm", "embeddings.patch_embedding", 0),
}
ANY_SIZE = {"Dinov2Model": True, "Dinov2WithRegistersModel": True, "DINOv3ViTModel": True}  # without being told
HEADS = ("ForImageClassification", "ForImageClassificationWithTeacher", "WithProjection")
AFTER = ("pooler", "classifier", "cls_classifier", "distillation_classifier", "visual_projection")  # the last norm
MAPS = ("Backbone", "ForMaskedImageModeling")
TAKE_MASKS = ("sdpa", "eager")  # attention implementations
NEEDED = 5  # major version


class PrunedHuggingFace(PrunedModel):
    """Mixed into the class of a pruned model of transformers."""

    def forward(self, *args, **kwargs):
        """The library's forward, with tokens removed.

        Raises:
            ValueError: `output_hidden_states` or `output_attentions`, by argument or configuration, whose items would
                be of different lengths; or an `attention_mask`.
        """
        for name in ("output_hidden_states", "output_attentions"):
            asked = kwargs.get(name)
            if asked is None:
                asked = any(getattr(getattr(part, "config", None), name, False) for part in (self, *self.children()))
            if asked is not False:
                raise ValueError(
                    f"{name} must be False on a pruned model, got {asked!r}: its layers have different numbers of "
                    f"tokens (use tpbook.trace, or tpbook.unprune it first)"
                )
        return super().forward(*args, **kwargs)


class HuggingFace(Family):
    """Vision models of transformers, alone or with a head that makes one vector of them."""

    name, mixin = "Hugging Face vision model", PrunedHuggingFace
    pools_tokens, call = True, ("attention_mask", "position_embeddings")
    towers = TOWERS

    # ---- which model

    def fits(self, model):
        return _row(_maps(self.towers), model) is not None or self._find(model) is not None

    def refusal(self, model):
        version = sys.modules["transformers"].__version__
        if int(version.split(".")[0]) < NEEDED:
            return f"is of transformers {version}, and tpbook needs transformers >= {NEEDED}"
        kind = library_class(model)
        if kind.endswith(MAPS):
            return "lays its tokens on a map, and those that get removed would leave holes: prune the model without it"
        name, _ = self._find(model)
        if name and ("." in name or not kind.endswith(HEADS)):
            return f"is more than a vision model: prune the one inside it, model.{name}"
        return None

    def _find(self, model):
        """(name, tower) of the first model inside, or the model itself, that is in the table; or None."""
        return next(((name, part) for name, part in model.named_modules() if _row(self.towers, part)), None)

    def tower(self, model):
        """The model without its head."""
        return self._find(model)[1]

    def _part(self, model, what):
        tower = self.tower(model)
        return tower.get_submodule(getattr(_row(self.towers, tower), what))

    # ---- the model

    def blocks(self, model):
        return list(self._part(model, "layers"))

    def norm(self, model):
        return self._part(model, "norm") if _row(self.towers, self.tower(model)).norm else self.blocks(model)[-1]

    def prefix(self, model):
        tower = self.tower(model)
        return _row(self.towers, tower).prefix + getattr(tower.config, "num_register_tokens", 0)

    def grid(self, model):
        return tuple(side // patch for side, patch in zip(self.image_size(model), self.patch_size(model)))

    def width(self, model):
        return self.tower(model).config.hidden_size

    def has_class_token(self, model):
        return self.prefix(model) > 0

    def pools_unmasked(self, model):
        if getattr(model, "use_head", False):  # SigLIP's own; a classifier does not read it
            return f"{type(model).__name__}, whose attention pool takes no mask"
        return None

    def segments(self, model, size=None):
        averages = not self.pools_unmasked(model)  # an attention pool counts each token once
        return [segment._replace(pooled=averages) for segment in super().segments(model, size)]

    def hand_on(self, tokens, plan):
        return mean_as_weighed(tokens, plan.prefix) if plan.pooled else tokens.x

    # ---- a layer

    def check_block(self, block):
        known = _own_class(LAYERS, block)
        if known is None or inspect.unwrap(type(block).forward) is not inspect.unwrap(known.forward):
            return f"must be one of {', '.join(LAYERS)} of transformers, as it is, got {type(block).__name__}"
        return None

    def check_attention(self, block):
        attention = getattr(block, _row(LAYERS, block).attention)
        given = attention.config._attn_implementation
        if given not in TAKE_MASKS:
            return f"needs attn_implementation={' or '.join(map(repr, TAKE_MASKS))}, got {given!r}"
        return None

    def first(self, block, x, mask, arguments):
        layer = _row(LAYERS, block)
        if arguments.get("attention_mask") is not None:
            raise ValueError(
                "attention_mask must be left unset on a pruned model, whose tokens get removed, and "
                f"attn_implementation be one that makes none, as {' and '.join(map(repr, TAKE_MASKS))} do"
            )
        if mask is not None and (why := self.check_attention(block)):
            raise ValueError(f"the model {why}")
        y, _ = getattr(block, layer.attention)(getattr(block, layer.norm1)(x), **{**arguments, "attention_mask": mask})
        for name in layer.scale1:
            y = getattr(block, name)(y)
        return x + y

    def second(self, block, x):
        layer = _row(LAYERS, block)
        y = block.mlp(getattr(block, layer.norm2)(x))
        for name in layer.scale2:
            y = getattr(block, name)(y)
        return x + y

    # ---- cost

    def channels(self, model):
        return self.tower(model).config.num_channels

    def image_size(self, model):
        return _pair(self.tower(model).config.image_size)

    def patch_size(self, model):
        return _pair(self.tower(model).config.patch_size)

    def resized(self, model, size):
        if _row(ANY_SIZE, self.tower(model)):
            return model
        return super().resized(model, size)

    def embedding(self, model):
        return self._part(model, "patches")

    def attention(self, block):
        attention = getattr(block, _row(LAYERS, block).attention)
        return attention, attention.q_proj.out_features

    def head_dim(self, block):
        return self.attention(block)[0].head_dim

    def head_macs(self, model, n):
        tower = self.tower(model)
        found = [getattr(part, name, None) for part in {tower, model} for name in AFTER]
        macs = sum(linear_macs(part) for part in found if part is not None)
        return macs + (_pool_macs(model.head, n) if getattr(model, "use_head", False) else 0)


class DINOv3(HuggingFace):
    """Models whose patches are rotated in each attention, and take their rotation along. A fused token has none."""

    name, positioned, towers = "Hugging Face DINOv3 ViT", True, ROTATED

    def positions(self, arguments, patch, prefix):
        if patch is None:
            return arguments
        cos, sin = arguments["position_embeddings"]  # (N, d) each
        return {**arguments, "position_embeddings": (_gather(cos, patch, 1.0), _gather(sin, patch, 0.0))}


def _gather(table, patch, still):
    """Rows of (N, d) at (B, n), or `still` at −1: (B, 1, n, d)."""
    table = torch.cat([table, table.new_full((1, table.shape[1]), still)])
    return nn.functional.embedding(torch.where(patch < 0, table.shape[0] - 1, patch), table).unsqueeze(1)


def _pool_macs(pool, n):
    """MACs of SigLIP's pool: one query, n tokens."""
    attention, dim = pool.attention, pool.attention.embed_dim
    return 2 * dim * dim + 2 * n * dim * dim + 2 * n * attention.num_heads * attention.head_dim + linear_macs(pool.mlp)


def _maps(towers):
    return {name.removesuffix("Model") + end: True for name in towers for end in MAPS}


def _own_class(table, module):
    """The first class of transformers' that the module is an instance of and the table has; or None."""
    for cls in type(module).__mro__:
        if cls.__name__ in table and cls.__module__.startswith("transformers."):
            return cls
    return None


def _row(table, module):
    cls = _own_class(table, module)
    return None if cls is None else table[cls.__name__]


def library_class(module):
    """The name of the first class of transformers' that it is of; or None."""
    return next((c.__name__ for c in type(module).__mro__ if c.__module__.startswith("transformers.")), None)


def _pair(size):
    return tuple(size) if isinstance(size, (tuple, list)) else (size, size)
