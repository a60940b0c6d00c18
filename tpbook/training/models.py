"""The model that a recipe trains, and its teacher: where they start from, and which classes their heads are of.

Chapter: :doc:`/book/your-own`
"""

import copy
import inspect
import json
import warnings
from dataclasses import replace
from pathlib import Path

import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn

from .. import losses
from ..engine import prune
from ..families import family_of, is_known
from ..masking import mask
from ..methods import METHODS, SCORES
from ..weights import DIGITS, load_backbone, load_checkpoint, read_state, told
from .recipes import make


def build(recipe, classes):
    """The model before training, unpruned, in eval mode.

    Its head is the start's where that knows the data's classes, else a new one with random weights: on classes of one's
    own, and from a checkpoint of other classes (which warns).

    Args:
        recipe: a `Recipe`.
        classes: the data's `sources.Classes`.

    Raises:
        FileNotFoundError: there is no such start.
        ValueError: the model's classes or channels do not fit the data, or a checkpoint does not fit the model.
    """
    model = _begun(recipe, classes)
    channels, own = 1 if recipe.data == "digits" else 3, family_of(model).channels(model)
    if own != channels:
        raise ValueError(
            f"model {recipe.model!r} takes images of {own} channels and data {recipe.data!r} has {channels}"
        )
    if recipe.aux_weight and not hasattr(model, "aux_head"):
        raise ValueError(f"aux_weight must be 0 for model {recipe.model!r}, which has no auxiliary head")
    return model


def _begun(recipe, classes):
    """As `build`, of any timm model and any number of channels."""
    checkpoint, n = checkpoint_of("start", recipe.start), len(names_of(recipe, classes))
    if checkpoint is not None:
        rows = _rows(recipe.model, checkpoint) or n
        model = new_model(recipe.model, rows, drop_path_rate=recipe.drop_path).eval()
        load_checkpoint(model, checkpoint, without=family_of(model).added if is_known(model) else ())
    elif recipe.start == "pretrained":
        model = load_backbone(recipe.model, drop_path_rate=recipe.drop_path)
    else:
        model = new_model(recipe.model, n, drop_path_rate=recipe.drop_path).eval()
    if recipe.start != "random" and new_head(recipe, classes):
        if checkpoint is not None:
            warnings.warn(
                f"start {checkpoint} is of other classes than data {recipe.data!r}: the head begins anew", stacklevel=2
            )
        model.reset_classifier(n)
    elif recipe.head == "data" and model.num_classes == len(classes.names) != n:
        _take_rows(model, classes.found)
    if model.num_classes != n:
        raise ValueError(f"model {recipe.model!r} has {model.num_classes} classes and data {recipe.data!r} has {n}")
    return model


def names_of(recipe, classes):
    """The names of the model's classes: tuple of texts."""
    return tuple(classes.names[label] for label in classes.found) if recipe.head == "data" else classes.names


def new_head(recipe, classes):
    """Whether the start has no head for the data's classes, so that one begins with random weights."""
    checkpoint, names = checkpoint_of("start", recipe.start), names_of(recipe, classes)
    if checkpoint is None:
        return recipe.start == "random" or classes.own
    may = {names} if classes.own else {names, classes.names}  # of ImageNet's head the rows that the data has
    theirs = told(checkpoint).get("classes")
    if theirs is not None:
        return tuple(theirs) not in may
    rows = _rows(recipe.model, checkpoint)
    return bool(rows) and rows not in {len(one) for one in may}


def _rows(name, checkpoint):
    """How many classes the head in a file has; 0 where it has none that is called as the model's."""
    classifier = new_model(name, 2).pretrained_cfg.get("classifier") or ""
    first = classifier if isinstance(classifier, str) else classifier[0]
    state = read_state(checkpoint)
    return len(state.get(f"{first}.weight", ()))


def checkpoint_of(key, named):
    """The file that a recipe's `start` or `teacher` names; None where it names none, or is no place.

    Raises:
        FileNotFoundError: nothing is there; the message says what the key may be.
    """
    words = {"start": ("pretrained", "random"), "teacher": ("", "start", "pretrained", "random")}[key]
    if named in words or (key == "teacher" and not Path(named).exists() and timm.is_model(named)):
        return None
    path = Path(named)
    if not named or not path.exists():
        may = ", ".join([*map(repr, words), *["a timm model"] * (key == "teacher")])
        raise FileNotFoundError(
            f"{key} must be {may}, a checkpoint file or the folder of a finished run, got {named!r}"
        )
    return path / "model.safetensors" if path.is_dir() else path


def lookup_of(recipe, classes):
    """(labels,) int64: the model's class of each label; -1 for a label that the data does not have."""
    lookup = torch.arange(len(classes.names))
    if recipe.head == "data":
        lookup = torch.full_like(lookup, -1)
        lookup[list(classes.found)] = torch.arange(len(classes.found))
    return lookup


def new_model(name, classes, **extra):
    """The architecture with random weights."""
    if not timm.is_model(name):
        raise ValueError(f"model must be {DIGITS!r} or a timm model (timm.list_models()), got {name!r}")
    return timm.create_model(name, num_classes=classes, **extra)


def _take_rows(model, classes):
    """Narrow the linear heads to the given rows of them; a distilled model has two."""
    heads, rows = _heads(model), torch.tensor(classes)
    model.reset_classifier(len(classes))
    with torch.no_grad():
        for new, old in zip(_heads(model), heads):
            new.weight.copy_(old.weight[rows])
            if old.bias is not None:
                new.bias.copy_(old.bias[rows])


def _heads(model):
    head = model.get_classifier()
    return head if isinstance(head, tuple) else (head,)


# --------------------------------------------------------------------------------------------------------- the teacher


class LogitTeacher(nn.Module):
    """A teacher of another architecture: it takes the student's images and gives its logits.

    Attributes:
        model: the teacher itself.
    """

    def __init__(self, model, student):
        super().__init__()
        self.model = model
        ours, theirs = resolve_model_data_config(student), resolve_model_data_config(model)
        ours, theirs = (
            [torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std")] for config in (ours, theirs)
        )
        self.register_buffer("scale", ours[1] / theirs[1], persistent=False)  # from one normalisation to the other
        self.register_buffer("shift", (ours[0] - theirs[0]) / theirs[1], persistent=False)

    def forward(self, images):
        return self.model(images * self.scale + self.shift)


def teacher_of(recipe, classes, model):
    """The frozen model that the recipe distils from, or None.

    It is dense and of the model's architecture, or a `LogitTeacher`: any other timm model, or the trained model of a
    run of another architecture.

    Raises:
        FileNotFoundError: there is no such teacher.
        ValueError: it does not know the data's classes, takes other images, or `token_weight` asks for its tokens; or
            as `build`.
    """
    checkpoint, name = checkpoint_of("teacher", recipe.teacher), recipe.model
    if not recipe.teacher:
        return None
    start = recipe.start if recipe.teacher == "start" else recipe.teacher
    if checkpoint is None and start not in ("pretrained", "random") and recipe.teacher != "start":
        name, start = recipe.teacher, "pretrained"
    elif checkpoint is not None:
        name = told(checkpoint).get("model", name)
    begun = make({**vars(recipe), "model": name, "start": start})
    if start != "random" and new_head(begun, classes):
        raise ValueError(
            f"teacher must know the classes of data {recipe.data!r}, and the head of {recipe.teacher!r} would be new: "
            "train a dense model on it first, and name its folder as start and teacher"
        )
    if name != recipe.model:
        teacher = _stranger(recipe, _begun(begun, classes), model)
    else:
        teacher = copy.deepcopy(model) if recipe.teacher == "start" else build(begun, classes)
    return teacher.eval().requires_grad_(False)


def _stranger(recipe, teacher, model):
    """The teacher of another architecture, where it can be one."""
    if recipe.method and METHODS[recipe.method].score.learned and recipe.token_weight:
        raise ValueError(
            f"token_weight must be 0 where teacher {recipe.teacher!r} is no {recipe.model!r}, whose tokens are others; "
            f"got {recipe.token_weight}"
        )
    ours, theirs = (resolve_model_data_config(one)["input_size"] for one in (model, teacher))
    if ours[0] != theirs[0] or (teacher.pretrained_cfg.get("fixed_input_size") and ours != theirs):
        raise ValueError(f"teacher {recipe.teacher!r} takes images of {theirs} and model {recipe.model!r} of {ours}")
    return LogitTeacher(teacher, model)


# ------------------------------------------------------------------------------------------------ what is done to them


def adapt(recipe, model):
    """Prune or mask the model as the recipe says, in place."""
    if recipe.method:
        score = SCORES.get(recipe.options.get("score"), METHODS[recipe.method].score)
        counted = replace(METHODS[recipe.method], score=score).chooses.counted
        said = {} if {"r", "keep"} & set(recipe.options) or not counted else {"keep_ratio": recipe.keep_ratio}
        prune(model, recipe.method, at=recipe.at or None, **said, **recipe.options)
        _check_loss(recipe.loss, model.pruning.method.score.objective)
    elif recipe.mask_ratio != 0:
        mask(model, recipe.mask_ratio)
    return model


def take_along(recipe, model):
    """Load what the start's method learned besides (its score predictors) into the adapted model, in place.

    Raises:
        ValueError: the start is pruned by another method, and `drop_added` does not say to leave that behind.
    """
    checkpoint = checkpoint_of("start", recipe.start)
    if checkpoint is None:
        return model

    def added(state):
        return {
            key: value for key, value in state.items() if not set(family_of(model).added).isdisjoint(key.split("."))
        }

    theirs, own, method = added(read_state(checkpoint)), added(model.state_dict()), told(checkpoint).get("method")
    if not theirs or recipe.drop_added:
        return model
    shapes = {key: value.shape for key, value in theirs.items()}
    if method not in (None, recipe.method) or shapes != {key: value.shape for key, value in own.items()}:
        of = "another method or other stages" if method in (None, recipe.method) else f"method {method!r}"
        raise ValueError(
            f"start {checkpoint} has {len(theirs)} tensors that {of} learned ({next(iter(theirs))}, …), which method "
            f"{recipe.method!r} has no place for: drop_added=true leaves them behind"
        )
    model.load_state_dict(theirs, strict=False)
    return model


def _check_loss(loss, objective):
    """ValueError where a recipe's `loss` has a key that the loss of the method does not take."""
    known = () if objective is None else inspect.getfullargspec(getattr(losses, objective)).kwonlyargs
    known = [name for name in known if name not in ("teacher_logits", "logit_weight")]
    for key in loss:
        if key not in known:
            may = ", ".join(known) or "none, for this method"
            raise ValueError(f"loss must have keys of {may}, got {key!r}")


def described(recipe, classes):
    """What a trained model's file says of itself: {"tpbook": JSON of its model, method and class names}."""
    said = {"model": recipe.model, "method": recipe.method, "classes": names_of(recipe, classes)}
    return {"tpbook": json.dumps(said)}


def labelled(model, names):
    """The model, its `pretrained_cfg` saying the names of its classes, as timm's own says them."""
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": tuple(names)}
    return model
