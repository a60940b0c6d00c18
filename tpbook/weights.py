"""Backbones with weights, and checkpoints read safely and strictly.

Chapter: :doc:`/book/a-tour-of-keep-ratios`
"""

import argparse
import json
import os
import textwrap
from importlib.resources import as_file, files
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import nn

from .backbones.digits_models import DIGITS, build_digits_vit
from .engine import prune
from .families import family_of, is_known
from .methods import METHODS

PACKAGED = files("tpbook") / "pretrained"


def load_backbone(name, **kwargs):
    """A timm model with trained weights, in eval mode.

    Args:
        name: any name that timm knows, those of `tpbook.backbones` among them.
        **kwargs: passed on to `timm.create_model`. As timm does, wherever the weights are from: another `num_classes`
            than theirs gives a new head with random weights (0 gives none), `img_size` resamples the position
            embedding, `in_chans` adapts the first layer.

    Weights are those that come with the package, of the models of the digits; else `$TPBOOK_WEIGHTS/<name>.safetensors`
    where that file is there, else those of timm's hub.

    Returns:
        The model. Nothing but such a new head has random weights.

    Raises:
        TypeError: an argument that the model does not take.
        ValueError: timm knows no such model, or the file does not fit it.
        ImportError: the model is of an optional library that is not there; the message says what to install.
        RuntimeError: no file, and timm's hub gave no weights either.
    """
    classes = kwargs.pop("num_classes", None)
    if classes is not None and (isinstance(classes, bool) or not isinstance(classes, int) or classes < 0):
        raise TypeError(f"num_classes must be an int of at least 0, got {classes!r}")
    if not timm.is_model(name):
        raise ValueError(f"name must be {DIGITS!r} or a timm model (timm.list_models()), got {name!r}")
    packaged = PACKAGED / f"{name}.safetensors"
    if packaged.is_file():
        with as_file(packaged) as path:
            model = load_checkpoint(_made(name, timm.create_model, name, **kwargs), path)
    else:
        folder = os.environ.get("TPBOOK_WEIGHTS")
        path = Path(folder) / f"{name}.safetensors" if folder else None
        if path is not None and path.exists():
            model = _from_file(name, path, classes, **kwargs)
        else:
            model = _from_hub(name, path, **kwargs)
        _check_channels(name, model, kwargs.get("in_chans"))
    if classes not in (None, model.num_classes):
        own = next(model.parameters())
        model.reset_classifier(classes)
        model.to(own.device, own.dtype)
    return model.eval()


def _from_file(name, path, classes, **kwargs):
    """The model with as many classes as the file has where `classes` are asked for, so that nothing may be missing."""
    overlay = {"file": str(path), "custom_load": False}
    if classes is not None:
        kwargs["num_classes"] = overlay["num_classes"] = _classes(name, path)
    try:
        return _made(name, timm.create_model, name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    except (RuntimeError, SafetensorError, OSError) as error:
        said = textwrap.shorten(str(error), 600)
        raise ValueError(f"{path} does not fit {name}: {said}") from error


def _classes(name, path):
    """How many rows the classifier in a file has; 0 for none."""
    classifier = timm.get_pretrained_cfg(name).classifier
    first = classifier if isinstance(classifier, str) or not classifier else classifier[0]
    try:
        with safe_open(path, "pt") as file:
            shapes = clean_state_dict({key: file.get_slice(key).get_shape() for key in file.keys()})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no checkpoint: {error}") from error
    return shapes.get(f"{first}.weight", (0,))[0]


def _from_hub(name, path, **kwargs):
    try:
        return _made(name, timm.create_model, name, pretrained=True, **kwargs)
    except TypeError:
        raise
    except Exception as error:  # the hub's own errors are many: no network, no such repository, no weights
        tried = f"no {path}" if path else "TPBOOK_WEIGHTS is not set"
        raise RuntimeError(f"no weights for {name!r}: {tried}, and timm's hub failed ({error})") from error


def _made(name, make, *args, **kwargs):
    """What `make` makes; TypeError that names the model where it does not take what it is given."""
    try:
        return make(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{name!r} does not take these arguments: {error}") from error


def _check_channels(name, model, given):
    """ValueError where timm has left the first layer random, since it adapts convolutions alone."""
    config = model.pretrained_cfg
    own, first = config["input_size"][0], config.get("first_conv")
    if given not in (None, own) and first and not isinstance(model.get_submodule(first), nn.Conv2d):
        raise ValueError(f"in_chans must be {own} for {name!r}, got {given!r}")


def load_trained_digits(method, *, keep_ratio=0.5):
    """The digits ViT pruned by a method with predictors, trained at ρ = 0.5; its weights come with the package.

    `tpbook/pretrained/vit_digits_patch4_56_METHOD.json` has the commands that trained it and its accuracy at every ρ.

    Args:
        method: "dynamicvit" or "dtps".
        keep_ratio: ρ to begin with.

    Returns:
        The pruned model, in eval mode.

    Raises:
        ValueError: another method; those need no training.
    """
    trained = {name: file for name in METHODS if (file := PACKAGED / f"{DIGITS}_{name}.safetensors").is_file()}
    if method not in trained:
        raise ValueError(f"method must be {' or '.join(trained)}, got {method!r}")
    model = prune(build_digits_vit(), method, keep_ratio=keep_ratio)
    with as_file(trained[method]) as path:
        return load_checkpoint(model, path).eval()


def load_checkpoint(model, path, *, without=()):
    """Load a state dict strictly: official `.pth` files and safetensors.

    A `.pth` file holds it bare or, the first that is there, as "model", "state_dict" or "state_dict_ema".

    The prefixes "module." and "_orig_mod.", of data-parallel and compiled models, are taken off. Where timm gave a
    model other names than its authors, theirs fit too. Pickles are read with `weights_only=True`; the training
    arguments that DeiT-style files carry are allowed.

    Args:
        model: any module, pruned or not: an official DynamicViT or dTPS file fits a model pruned by that method.
        path: the file.
        without: names of modules or parameters whose part of the file is left out, such as "score_predictor".

    Returns:
        The same model. It is untouched where an error is raised.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read, or its keys or shapes are not the model's; the message names them.
    """
    state = {key: tensor for key, tensor in read_state(path).items() if set(without).isdisjoint(key.split("."))}
    if is_known(model):
        state = family_of(model).official(state)
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


def told(path):
    """What a file of `tpbook.train` says of itself: dict of its "model", "method" and "classes"; of any other {}."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get("tpbook", "{}"))
    except (SafetensorError, OSError):  # no safetensors
        return {}


def read_state(path):
    """The state dict of a checkpoint file: {name: tensor}; raises as `load_checkpoint`."""
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
    for key in ("model", "state_dict", "state_dict_ema"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in state.items()):
        raise ValueError(f"{path} holds no state dict")
    return clean_state_dict(state)


def _shapes(key, state, own):
    return f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
