"""What a training run is: one flat YAML file, checked against this list before anything is loaded.

Chapter: :doc:`/book/imagenet`
"""

import difflib
import types
import typing
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import yaml

from ..losses import TOKEN
from ..methods import METHODS

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}  # ours → Accelerate's
GONE = {"pool_at": -1}  # keys that older runs wrote down, with the value that said nothing


@dataclass(frozen=True)
class Recipe:
    """Every key of a recipe, with what it means when left out. Epochs may be fractions unless they are counted."""

    # the model
    model: str = "vit_digits_patch4_56"  # that, or a timm name
    start: str = "pretrained"  # "pretrained", "random", a checkpoint file, or the folder of an earlier run
    drop_added: bool = False  # of a start that was pruned by another method, leave behind what that method learned
    teacher: str = ""  # "" for none, "start" for the model before training, as `start`, or another timm model
    head: str = "all"  # "data" keeps, of a 1000-way head, the rows of the classes that the data has
    drop_path: float = 0.0  # stochastic depth, growing linearly to this

    # what it sees
    data: str = "digits"  # "digits", "imagewoof2-160", a folder, "torchvision:NAME": see `tpbook.training.sources`
    held_out: float = 0.0  # share of each class's images that is the test set, where the data has none
    split_seed: int = 0  # draws them
    train_images: int = 0  # a random subset of that many; 0 takes all
    test_images: int = 0  # likewise, of the test set
    per_digit: int = 1  # digits: fresh canvases of each train digit an epoch
    clutter: tuple[float, float] = (-1, 0)  # digits: epochs over which the distractors grow from none to all
    hflip: float = 0.0
    min_scale: float = 0.08  # of random resized crops, as a share of the area; 1 crops like the evaluation
    color_jitter: float = 0.0
    auto_augment: str = ""  # timm's name of it
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.0
    repeats: int = 1  # repeated augmentation: copies of an image an epoch sees, of correspondingly fewer images

    # the method; none fine-tunes the dense model
    method: str = ""
    keep_ratio: float | tuple[float, ...] = 0.7
    at: tuple[int, ...] = ()  # pruned blocks; () is the method's default
    options: dict = field(default_factory=dict)  # further ones of tpbook.prune; with r or keep, keep_ratio is not read
    keep_warmup: tuple[float, float] = (0, 0)  # epochs (start, length) over which the keep rate falls from 1, as EViT
    mask_ratio: float | tuple[float, float] = 0.0
    token_loss: str = "mse"
    ratio_weight: float = 2.0
    logit_weight: float = 0.5
    token_weight: float = 0.5
    loss: dict = field(default_factory=dict)  # what `tpbook.losses` of A-ViT, AdaViT and IA-RED² take besides
    aux_weight: float = 0.0  # LV-ViT, dense: of the auxiliary head's cross-entropy, each token with its image's label

    # optimisation
    epochs: int = 1
    batch: int = 50  # images an optimiser step, over all processes and accumulation
    accumulate: int = 1  # forwards and backwards a step
    opt: str = "adamw"
    lr: float = 1e-3  # at this batch; nothing scales it
    min_lr: float = 1e-6
    warmup_epochs: float = 0
    warmup_lr: float = 1e-6
    weight_decay: float = 0.05
    decay_all: bool = False  # weight decay on biases, norms and position embedding too
    backbone_lr_scale: float = 1.0  # learning rate of all but the score predictors, relative to lr
    freeze_epochs: float = 0  # whole epochs at first in which only the score predictors learn
    frozen: tuple[str, ...] = ()  # parameters that never learn, by the start of their name
    clip_grad: float = 0.0  # gradient norm; 0 leaves it
    ema: float = 0.0  # decay of an average of the weights, evaluated beside them; 0 keeps none
    precision: str = "fp32"  # "fp32", "bf16" or, not on a CPU, "fp16"; the latter two by autocast
    seed: int = 0
    workers: int = 0  # data loading processes
    eval_every: int = 0  # test every so many epochs; 0 at the end only
    log_every: int = 50  # steps between metric lines
    max_steps: int = 0  # stop after so many steps, to try a recipe out; 0 runs them all

    def __post_init__(self):
        for one in fields(self):
            object.__setattr__(self, one.name, _fit(one.name, getattr(self, one.name), one.type))
        for name, allowed in (
            ("method", ("", *METHODS)), ("token_loss", TOKEN), ("head", ("all", "data")),
            ("precision", tuple(PRECISIONS)),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                said = ", ".join(repr(a) for a in allowed)
                raise ValueError(f"{name} must be one of {said}, got {getattr(self, name)!r}")
        for name in ("epochs", "batch", "accumulate", "per_digit", "repeats", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        for name in (
            "train_images", "test_images", "lr", "min_lr", "warmup_epochs", "warmup_lr", "weight_decay",
            "freeze_epochs", "clip_grad", "workers", "eval_every", "max_steps", "mixup", "cutmix", "drop_path", "seed",
            "split_seed", "aux_weight",
        ):  # fmt: skip
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)!r}")
        for name in ("smoothing", "random_erasing", "hflip", "ema", "min_scale", "held_out"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)!r}")
        if self.method and self.mask_ratio != 0:
            raise ValueError(f"mask_ratio must be 0 where a method prunes, got {self.mask_ratio!r} and {self.method!r}")
        if self.method and self.aux_weight:
            raise ValueError(f"aux_weight must be 0 where a method prunes, got {self.aux_weight!r} and {self.method!r}")
        if self.data == "digits" and self.repeats > 1:
            raise ValueError(f"repeats must be 1 for digits, whose canvases are new each epoch; got {self.repeats!r}")


def read(path, **changes):
    """The `Recipe` of a YAML file, with some keys changed.

    Args:
        path: a .yaml file.
        **changes: values for keys, as in the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError, TypeError: an unknown key, or a value that does not fit it; named with the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no recipe at {path}")
    try:
        written = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(written, dict):
        raise ValueError(f"{path} must hold `key: value` lines, got a {type(written).__name__}")
    try:
        return make({**written, **changes})
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path}: {error}") from None


def make(values):
    """A `Recipe` of a dict; ValueError for a key that is none, with the nearest that is one."""
    known = [one.name for one in fields(Recipe)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; keys are {', '.join(known)}"
            raise ValueError(f"unknown recipe key {key!r}{hint}")
    return Recipe(**values)


def written(values):
    """The `Recipe` that a run wrote down, perhaps one of an older version; ValueError or TypeError as `make`."""
    return make({key: value for key, value in values.items() if key not in GONE or value != GONE[key]})


def parse(words, kinds):
    """The `key=value` words of a command line: YAML; texts as they stand or quoted, lists with or without brackets.

    Args:
        words: list of texts.
        kinds: {key: the type that its value has}, of the keys that are known.

    Returns:
        {key: value}, not checked further; the text of a key that is not known is YAML too.

    Raises:
        ValueError: a word without "=", or a value that is no YAML; the message has it.
    """
    values = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"key=value must follow, got {word!r}")
        kind = kinds.get(key)
        bare = _takes_several(kind) and "," in text and not text.strip().startswith("[")
        try:
            quoted = text.startswith(('"', "'"))
            values[key] = text if kind is str and not quoted else yaml.safe_load(f"[{text}]" if bare else text)
        except yaml.YAMLError as error:
            raise ValueError(f"{key} must be a value in YAML, got {text!r}") from error
    return values


def _takes_several(kind):
    return any(one is tuple or typing.get_origin(one) is tuple for one in _one_of(kind))


def _one_of(kind):
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def budget(name, **small):
    """What the budget of a notebook changes in a recipe.

    Args:
        name: "slice", the keys of `small`; "recipe", nothing; "gpu", all images and 10 epochs.
        **small: recipe keys of a run of minutes.

    Raises:
        ValueError: another name.
    """
    budgets = {"slice": small, "recipe": {}, "gpu": {"train_images": 0, "epochs": 10}}
    if name not in budgets:
        raise ValueError(f"budget must be one of {', '.join(budgets)}, got {name!r}")
    return budgets[name]


def as_dict(recipe):
    """What JSON can hold: tuples as lists."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(recipe).items()}


def _fit(name, value, kind):
    """`value` as the annotated `kind`: ints become floats, lists tuples, and "1e-3", text to YAML, 0.001."""
    for one in _one_of(kind):
        if typing.get_origin(one) is tuple:
            if isinstance(value, (list, tuple)):
                inner = typing.get_args(one)
                inner = inner[:1] * len(value) if inner[-1] is ... else inner
                if len(inner) == len(value):
                    return tuple(_fit(name, v, k) for v, k in zip(value, inner))
        elif one is float:
            try:
                if not isinstance(value, (bool, list, tuple, dict, type(None))):
                    return float(value)
            except ValueError:
                pass
        elif type(value) is one:
            return value
    raise TypeError(f"{name} must be {getattr(kind, '__name__', None) or str(kind)}, got {value!r}")
