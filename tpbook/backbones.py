"""Backbones with weights, and checkpoints read safely and strictly.

Chapter: :doc:`/book/a-tour-of-keep-ratios`
"""

import argparse
import os
from importlib.resources import as_file, files
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import VisionTransformer

from .digits import MEAN, PATCH, SIZE, STD
from .engine import prune

DIGITS = "vit_digits_patch4_56"


def build_digits_vit(**kwargs):
    """The small ViT of the embedded digits, with random weights: 12 blocks, 196 patches, one grey channel.

    Args:
        **kwargs: passed on to timm's `VisionTransformer`, over the defaults.
    """
    images = {"img_size": SIZE, "patch_size": PATCH, "in_chans": 1, "num_classes": 10}
    width = {"embed_dim": 64, "depth": 12, "num_heads": 2, "mlp_ratio": 2, "weight_init": "jax"}
    model = VisionTransformer(**{**images, **width, **kwargs})
    model.pretrained_cfg = {  # what timm keeps of its own models: how to prepare a picture
        "input_size": (1, SIZE, SIZE), "mean": (MEAN,), "std": (STD,), "crop_pct": 1.0, "interpolation": "bicubic",
    }  # fmt: skip
    return model


def load_backbone(name, **kwargs):
    """A timm model with trained weights, in eval mode.

    Args:
        name: "vit_digits_patch4_56" (comes with the package) or any timm model name.
        **kwargs: passed on to `timm.create_model`.

    Weights are `$TPBOOK_WEIGHTS/<name>.safetensors` where that file is there, else those of timm's hub.

    Returns:
        The model. Never one with random weights.

    Raises:
        ValueError: timm knows no such model, or the file does not fit it.
        RuntimeError: no file, and timm's hub gave no weights either.
    """
    if name == DIGITS:
        with as_file(files("tpbook") / "weights" / f"{DIGITS}.safetensors") as path:
            return load_checkpoint(build_digits_vit(**kwargs), path).eval()
    if not timm.is_model(name):
        raise ValueError(f"name must be {DIGITS!r} or a timm model (timm.list_models()), got {name!r}")
    folder = os.environ.get("TPBOOK_WEIGHTS")
    path = Path(folder) / f"{name}.safetensors" if folder else None
    if path is not None and path.exists():
        return load_checkpoint(timm.create_model(name, **kwargs), path).eval()
    try:
        return timm.create_model(name, pretrained=True, **kwargs).eval()
    except Exception as error:  # the hub's own errors are many: no network, no such repository, no weights
        tried = f"no {path}" if path else "TPBOOK_WEIGHTS is not set"
        raise RuntimeError(f"no weights for {name!r}: {tried}, and timm's hub failed ({error})") from error


def load_trained_digits(method, *, keep_ratio=0.5):
    """The digits ViT pruned by a method with predictors, trained at ρ = 0.5; its weights come with the package.

    `tpbook/weights/vit_digits_patch4_56_METHOD.json` has the commands that trained it and its accuracy at every ρ.

    Args:
        method: "dynamicvit" or "dtps".
        keep_ratio: ρ to begin with.

    Returns:
        The pruned model, in eval mode.

    Raises:
        ValueError: another method; those need no training.
    """
    if method not in ("dynamicvit", "dtps"):
        raise ValueError(f"method must be dynamicvit or dtps, got {method!r}")
    model = prune(build_digits_vit(), method, keep_ratio=keep_ratio)
    with as_file(files("tpbook") / "weights" / f"{DIGITS}_{method}.safetensors") as path:
        return load_checkpoint(model, path).eval()


def load_checkpoint(model, path):
    """Load a state dict strictly: official `.pth` files (`{"model": …}` or bare) and safetensors.

    Pickles are read with `weights_only=True`; the training arguments that DeiT-style files carry are allowed.

    Args:
        model: any module, pruned or not: an official DynamicViT or dTPS file fits a model pruned by that method.
        path: the file.

    Returns:
        The same model. It is untouched where an error is raised.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read, or its keys or shapes are not the model's; the message names them.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):
                state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no checkpoint: {error}") from error
    except Exception as error:  # pickle.UnpicklingError and its kin: something other than tensors
        raise ValueError(f"{path} holds more than tensors, so it is not loaded: {error}") from error
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no state dict")

    own = model.state_dict()
    wrong = [
        ("misses", [k for k in own if k not in state]),
        ("has unexpected", [k for k in state if k not in own]),
        ("has other shapes in", [_shapes(k, state, own) for k in own if k in state and state[k].shape != own[k].shape]),
    ]
    said = [f"{what} {len(keys)} keys: {', '.join(keys[:5])}{', …' * (len(keys) > 5)}" for what, keys in wrong if keys]
    if said:
        raise ValueError(f"{path} does not fit the model: it {'; '.join(said)}")
    model.load_state_dict(state, strict=True)
    return model


def _shapes(key, state, own):
    return f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
