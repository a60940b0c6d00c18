"""What an explorer shows, as JSON: a model, its methods, and what it does with one image at one keep ratio.

Chapter: :doc:`/book/explorer`
"""

import base64
import json
import math

import numpy as np
import torch

from .. import data, flops
from ..checks import default_at
from ..engine import is_pruned, prune, unprune
from ..families import family_of
from ..tracing import trace
from .looks import CHOICES, EDGE, GONE, LOOKS, method_of


def describe(model):
    """What an explorer's JavaScript has to know of a model: grid, blocks, class names, cost of the dense model.

    Args:
        model: of a known family, not pruned, in eval mode.

    Returns:
        dict for JSON.

    Raises:
        ValueError: the model gives no logits.
    """
    family = family_of(model)
    depth, grid = len(family.blocks(model)), family.grid(model)
    tokens = math.prod(grid) + family.prefix(model)
    classes = len(_logits(model, torch.zeros(1, family.channels(model), *family.image_size(model))))
    return {
        "grid": list(grid), "at": list(default_at(depth)),
        "classes": [data.class_name(i) if classes == 1000 else str(i) for i in range(classes)],
        "dense": {"tokens": [tokens] * depth, **_cost(model)},
    }  # fmt: skip


@torch.inference_mode()
def _logits(model, x):
    """(1, C, H, W) → (classes,), whatever the library calls them."""
    out = model(x)
    logits = out if isinstance(out, torch.Tensor) else getattr(out, "logits", None)
    if logits is None or logits.dim() != 2 or not logits.shape[1]:
        raise ValueError(f"model must classify, but {type(model).__name__} gives no logits")
    return logits[0]


@torch.inference_mode()
def cost_of(model, x=None):
    """Tokens that leave each block (prefix tokens included) and MACs of each block of a pruned model: dict for JSON.

    Args:
        model: a pruned model in eval mode.
        x: (1, C, H, W), looked at where the image decides how many tokens are kept.

    Raises:
        ValueError: `x` is needed, and not given.
    """
    family, varies = family_of(model), model.pruning.method.chooses.varies
    n, prefix, tokens = math.prod(family.grid(model)), family.prefix(model), []
    if varies and x is not None:
        with trace(model) as t:
            model(x)
        leave = [kept.shape[1] for kept in t.kept]
    else:
        leave = [] if varies else [count.leave for count in model.pruning.counts(n)]
    cost = _cost(model, x if varies else None)  # refuses before the counts are used
    left = dict(zip(model.pruning.at, leave))
    for i in range(len(family.blocks(model))):
        n = left.get(i, n)
        tokens.append(n + prefix)
    return {"tokens": tokens, **cost}


def _cost(model, x=None):
    try:
        cost = flops.closed_form(model) if x is None else flops.closed_form(model, x)[0]
    except TypeError:  # a patch embedding or blocks that the closed form does not know
        return {"macs": None, "total": None}
    return {"macs": list(cost.by_block), "total": cost.total}


@torch.inference_mode()
def state(model, x):
    """What a pruned model does with one image, small enough to be embedded in a page by the hundred.

    Args:
        model: a pruned model in eval mode, which classifies.
        x: (1, C, H, W), the image as the model wants it.

    Returns:
        dict for JSON: `kept`, for each stage a hexadecimal bit mask of the N patches, the first patch first (fused
        tokens have no patch and no bit); `host`, for each stage base64 of the N hosts, a byte each where N ≤ 256, else
        two, little-endian (methods whose tokens carry others; else empty); `top`, the five best classes and their
        probabilities.

    Raises:
        ValueError: the model is not pruned, or `x` is not one image.
    """
    if not is_pruned(model):
        raise ValueError(f"model must be pruned by tpbook.prune, got a plain {type(model).__name__}")
    if x.dim() != 4 or len(x) != 1:
        raise ValueError(f"x must be one image, (1, C, H, W), got {tuple(x.shape)}")
    with trace(model) as t:
        p = _logits(model, x).float().softmax(dim=0)  # (classes,)
    best = p.topk(min(5, len(p)))
    patches = math.prod(family_of(model).grid(model))
    return {
        "kept": [_mask(kept[0], patches) for kept in t.kept],
        "host": [_bytes(host[0]) for host in t.host],
        "top": [[int(c), round(float(q), 4)] for c, q in zip(best.indices, best.values)],
    }


def _mask(kept, patches):
    bits = np.zeros(-(-patches // 8) * 8, bool)
    bits[kept[kept >= 0].numpy()] = True
    return np.packbits(bits).tobytes().hex()


def _bytes(host):
    return base64.b64encode(host.numpy().astype("u1" if len(host) <= 256 else "<u2").tobytes()).decode()


def decode(state, patches):
    """What `state` packed, unpacked.

    Args:
        state: of `state`.
        patches: N.

    Returns:
        The same dict, `kept` a list of (n_s,) arrays of patches in ascending order, `host` one of (N,) arrays.
    """
    masks = [np.unpackbits(np.frombuffer(bytes.fromhex(mask), "u1"))[:patches] for mask in state["kept"]]
    kind = "u1" if patches <= 256 else "<u2"
    hosts = [np.frombuffer(base64.b64decode(host), kind).astype(int) for host in state["host"]]
    return {**state, "kept": [mask.nonzero()[0] for mask in masks], "host": hosts}


def models_of(model, trained=()):
    """Every name in `CHOICES` that a model can be pruned by, and the model pruned so, at ρ = 1.

    Args:
        model: not pruned, and not pruned after; it is yielded again and again, so one comes after the other.
        trained: name → a pruned model of its own, for methods with predictors; without one a method is left out.
    """
    for name, (method, options) in CHOICES.items():
        if name in trained:
            yield name, trained[name]
        elif not method_of(name).score.learned:
            prune(model, method, keep_ratio=1.0, **options)
            try:
                yield name, model
            finally:
                unprune(model)


def states_of(model, images, ratios, trained=()):
    """What every method makes of every image at every keep ratio, and what that costs.

    Args:
        model, trained: as in `models_of`.
        images: list of (1, C, H, W).
        ratios: keep ratios; those that a method cannot go down to give None.

    Returns:
        dict: method → a list of `cost_of`, one a ratio, empty where the image decides; a dict for each image: method
        → a list of `state`, one a ratio, with `cost_of` where the image decides.
    """
    costs, states = {}, [{} for _ in images]
    for name, pruned in models_of(model, trained):
        method, costs[name] = pruned.pruning.method, []
        for own in states:
            own[name] = []
        for ratio in ratios:
            if ratio < method.reduce.least_ratio:
                costs[name].append(None)
                for own in states:
                    own[name].append(None)
                continue
            pruned.keep_ratio = ratio
            costs[name].append({} if method.chooses.varies else cost_of(pruned))
            for x, own in zip(images, states):
                own[name].append(state(pruned, x) | (cost_of(pruned, x) if method.chooses.varies else {}))
    return costs, states


def page(data):
    """HTML of an explorer that needs no kernel, for a page that loads explorer.js and here.js: data → str."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="explorer-data">{text}</script>\n'


def front(method="evit", keep_ratio=0.7):
    """The part of an explorer's data that does not depend on model and image: methods, where to start, colours."""
    methods = {}
    for name in CHOICES:
        reduce, look = method_of(name).reduce, LOOKS[name]
        methods[name] = {
            "title": look.title, "colour": look.colour, "gone": reduce.gone, "hosts": reduce.hosts,
            "rejoins": reduce.rejoins, "least_ratio": reduce.least_ratio,
        }  # fmt: skip
    return {
        "methods": methods, "start": {"method": method, "ratio": keep_ratio}, "paint": {"gone": GONE, "edge": EDGE},
    }  # fmt: skip
