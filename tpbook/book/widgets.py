"""The keep-ratio explorer, live in Jupyter::

    from tpbook.widgets import explorer
    explorer()                                                       # the digits
    explorer("deit_tiny_patch16_224", ["cat.jpg"], method="etps")    # any ViT of a known family, any picture

Every move of a slider runs the model once. `state` is what one such run shows (`states.py`); the book's page carries
states that a notebook computed by it, drawn by the same JavaScript (`explorer.js`) with no kernel. Needs
`pip install tpbook[book]`.

Chapter: :doc:`/book/explorer`
"""

import time
from collections.abc import Iterable
from copy import deepcopy
from importlib.resources import files
from pathlib import Path

import anywidget
import torch
import traitlets
from torch import nn

from .. import data
from ..checks import check_at, check_keep_ratio, check_name, decimals
from ..engine import is_pruned, prune, unprune
from ..families import family_of
from ..methods.parts import Place
from ..weights import DIGITS, load_backbone, load_trained_digits
from .looks import CHOICES, LOOKS, method_of
from .pictures import input_of, picture_of, read_picture
from .states import cost_of, describe, front, page, state

__all__ = [
    "CHOICES", "MISSING", "RATIOS", "Explorer", "cost_of", "describe", "explorer", "front", "input_of", "page",
    "picture_of", "read_picture", "state",
]  # fmt: skip

RATIOS = [round(0.05 + 0.01 * i, 2) for i in range(96)]  # of the live slider
MISSING = "Methods in grey need trained predictors or a class token, which this model does not have."


_CODE = files("tpbook.book") / "javascript"


class Explorer(anywidget.AnyWidget):
    """The widget that `explorer` makes. Its JavaScript asks by message, one question at a time; `answer` answers."""

    _esm = (_CODE / "explorer.js").read_text() + (_CODE / "jupyter.js").read_text()
    _css = (_CODE / "explorer.css").read_text()
    data = traitlets.Dict().tag(sync=True)

    def __init__(self, model, models, images, method, keep_ratio, at):
        self.model = model  # what is pruned anew for each method that needs no training
        self.models = models  # name in CHOICES → that model, or one of its own that was trained
        self.transform, self.inputs = data.eval_transform(model), []
        described = describe(model)
        described |= {"name": "Pictures", "images": [self.add(source) for source in images]}
        described |= {"methods": {name: {} for name in models}, "missing": MISSING, "at": list(at)}
        super().__init__(data={**front(method, keep_ratio), "ratios": RATIOS, "sets": [described]})
        self.on_msg(self.answer)

    def add(self, source, name=None):
        """Take a picture in: a path, bytes, a PIL image, or an input tensor (C, H, W). → what JavaScript is told."""
        if isinstance(source, torch.Tensor):
            family = family_of(self.model)
            wanted = (family.channels(self.model), *family.image_size(self.model))
            if source.shape != wanted:
                raise ValueError(f"a picture that is a tensor must be {wanted}, got {tuple(source.shape)}")
            x = source[None].cpu().float()  # (1, C, H, W)
        else:
            x = self.transform(read_picture(source, name))[None]
        self.inputs.append(x)
        if isinstance(source, (str, Path)):
            name = Path(source).stem
        number = len(self.inputs) - 1
        return {"src": picture_of(x, self.model), "alt": name or f"picture {number + 1}", "label": "", "number": number}

    def compute(self, image, method, ratio, at):
        """The state of one picture, a dict: `state` and `cost_of`, and how long the forward took."""
        model, (name, options) = self.models[method], CHOICES[method]
        if model is self.model:
            if is_pruned(model):
                unprune(model)
            prune(model, name, keep_ratio=ratio, at=at, **options)
        elif tuple(at) != model.pruning.at:
            where = "before" if model.pruning.method.place is Place.BEFORE else "in"
            title = LOOKS[method].title
            raise ValueError(f"{title} was trained to prune {where} blocks {model.pruning.at}; choose those")
        model.keep_ratio = ratio
        begun = time.perf_counter()
        shown = state(model, self.inputs[image])
        speed = f"{1000 * (time.perf_counter() - begun):.0f} ms for this forward."
        return {**shown, **cost_of(model, self.inputs[image]), "speed": speed}

    def answer(self, _, question, buffers):
        """A message of the front end → a message back, with the question's id; mistakes are answered in words."""
        try:
            if question["kind"] == "picture":
                reply = self.add(bytes(buffers[0]), question["name"])
                [shown] = self.data["sets"]  # for displays to come
                self.data = {**self.data, "sets": [{**shown, "images": [*shown["images"], reply]}]}
            else:
                reply = self.compute(*(question[key] for key in ("image", "method", "ratio", "at")))
        except (ValueError, TypeError, OSError) as error:
            reply = {"error": str(error)}
        except Exception as error:  # unforeseen; without an answer the front end would wait for ever
            reply = {"error": f"{type(error).__name__}: {error}"}
        self.send({**reply, "id": question["id"]})


def explorer(model=DIGITS, images=None, *, method="evit", keep_ratio=0.7, at=None, trained=()):
    """Choose a picture, a method, a keep ratio and blocks, and see what is left of the picture.

    Args:
        model: a name for `tpbook.load_backbone`, or a model of a known family that classifies and is not pruned; it is
            copied.
        images: pictures to begin with: paths, bytes, PIL images or input tensors (C, H, W). None: six digits for the
            digits ViT, else none; more are uploaded in the widget. They are prepared as the model's `pretrained_cfg`
            says, with ImageNet's mean and deviation where it says none; tensors are taken as they are.
        method: a name of `tpbook.METHODS`, or "evit, no fusion", to begin with.
        keep_ratio, at: where to begin; `keep_ratio` is one number, and the slider goes in hundredths.
        trained: pruned models with trained predictors and the same input, one a method. Each is shown in the place of
            its method, at the blocks that it prunes; without one, a method that needs predictors is not offered. The
            digits ViT brings its own.

    Returns:
        Explorer, a widget that Jupyter displays.

    Raises:
        ValueError, TypeError: an argument that cannot be used, named as `tpbook.prune` and `read_picture` do.
        FileNotFoundError: no such picture.
    """
    trained = _listed("trained", trained, "pruned models")
    if isinstance(model, str):
        if model == DIGITS:
            trained = trained or [load_trained_digits(m) for m in ("dynamicvit", "dtps")]
        if images is None and model == DIGITS:
            test = data.digits("test")
            images = [test.images[int((test.labels == label).nonzero()[3])] for label in (5, 8, 2, 0, 7, 3)]
        model = load_backbone(model)
    images = _listed("images", () if images is None else images, "pictures")
    family = family_of(model)
    if is_pruned(model):
        raise ValueError(f"model must not be pruned, got one pruned by {model.pruning.name!r}: pass it in `trained`")
    if len(family.segments(model)) > 1:
        raise ValueError(f"model must work on one map of patches, got a {family.name}, which has several")
    model = deepcopy(model).cpu().float().eval()
    own = _own(trained, family, model)
    models = {name: own.get(name, model) for name in CHOICES if name in own or _fits(model, name)}
    check_name("method", method, CHOICES)
    if method not in models:
        raise ValueError(f"method must be one of {', '.join(models)} for this model, got {method!r}")
    if at is None:
        at = own[method].pruning.at if method in own else family.default_at(model, method_of(method))
    at = check_at(at, len(family.blocks(model)))
    if isinstance(decimals("keep_ratio", keep_ratio), tuple):
        raise TypeError(f"keep_ratio must be one number, got {keep_ratio!r}")
    keep_ratio = float(check_keep_ratio(keep_ratio, len(at)))
    if method not in own:
        unprune(prune(model, CHOICES[method][0], keep_ratio=keep_ratio, at=at))  # raises where these cannot be
    return Explorer(model, models, images, method, keep_ratio, at)


def _listed(name, value, of):
    if isinstance(value, (str, bytes, Path, nn.Module)) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a list of {of}, got {type(value).__name__}")
    return list(value)


def _own(trained, family, model):
    """Name in CHOICES → a copy of the trained model that is shown for it."""
    own, wanted = {}, (family.channels(model), *family.image_size(model))
    for one in trained:
        if not (is_pruned(one) and one.pruning.method.score.learned):
            raise ValueError("trained must hold models pruned by a method with predictors")
        theirs = family_of(one)
        if (theirs.channels(one), *theirs.image_size(one)) != wanted:
            raise ValueError(f"trained must take what model takes, {wanted}")
        name = next((name for name in CHOICES if _shows(name, one.pruning)), None)
        if name is None or name in own:
            said = f"two of {name!r}" if name else f"one pruned by {one.pruning.name!r}, which explorers do not show"
            raise ValueError(f"trained must hold one model a method, got {said}")
        own[name] = deepcopy(one).cpu().float().eval()
    return own


def _shows(choice, pruning):
    """Whether a model pruned so is one of that choice."""
    return CHOICES[choice][0] == pruning.name and type(method_of(choice).reduce) is type(pruning.method.reduce)


def _fits(model, choice):
    """Whether a model can be pruned so without training."""
    name, options = CHOICES[choice]
    if method_of(choice).score.learned:
        return False
    try:
        unprune(prune(model, name, keep_ratio=1.0, **options))
    except ValueError:
        return False
    return True
