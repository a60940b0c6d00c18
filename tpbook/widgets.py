"""The keep-ratio explorer, live in Jupyter::

    from tpbook.widgets import explorer
    explorer()                                                       # the digits
    explorer("deit_tiny_patch16_224", ["cat.jpg"], method="etps")    # any timm ViT, any picture

Every move of a slider runs the model once. `state` is what one such run shows; the book's page carries states that a
notebook computed by it, drawn by the same JavaScript (`explorer.js`) with no kernel. Needs `pip install tpbook[book]`.

Chapter: :doc:`/book/explorer`
"""

import base64
import io
import json
import numbers
import time
from copy import deepcopy
from importlib.resources import files
from pathlib import Path

import anywidget
import numpy as np
import torch
import traitlets
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import resolve_model_data_config
from timm.models import VisionTransformer
from torchvision.transforms.functional import normalize, to_tensor

from . import data, flops
from .backbones import DIGITS, load_backbone, load_trained_digits
from .engine import PrunedViT, default_at, prune, unprune
from .methods import METHODS
from .plots import COLOURS, NAMES, image_of
from .tracing import trace

# how an explorer calls a method → the method, and options of `prune`
CHOICES = {
    "dynamicvit": ("dynamicvit", {}), "evit": ("evit", {}), "evit, no fusion": ("evit", {"fuse": False}),
    "dtps": ("dtps", {}), "etps": ("etps", {}), "random": ("random", {"seed": 0}),
}  # fmt: skip
RATIOS = [round(0.05 + 0.01 * i, 2) for i in range(96)]  # of the live slider
LONG = 100  # times as long as wide; a longer picture would grow huge when its short side is enlarged


def read_picture(source, name=None):
    """A picture as people have them, upright and opaque: EXIF orientation applied, transparency laid on white.

    Args:
        source: a path, bytes, or a PIL image.
        name: what an error calls it; None takes the path.

    Returns:
        PIL image in RGB.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it does not decode, has more pixels than Pillow takes for safe, or is a mere strip; the message
            names it.
    """
    name = name or ("the picture" if isinstance(source, (bytes, Image.Image)) else str(source))
    try:
        picture = source
        if not isinstance(source, Image.Image):
            picture = Image.open(io.BytesIO(source) if isinstance(source, bytes) else Path(source))
            if max(picture.size) > LONG * min(picture.size):
                shape = f"{picture.width} × {picture.height} px"
                raise ValueError(f"{shape}, and at most {LONG} times as long as wide is allowed")
            picture.draft("RGB", (2048, 2048))  # a huge JPEG is decoded smaller
        picture = ImageOps.exif_transpose(picture).convert("RGBA")
    except FileNotFoundError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is no picture that Pillow can read") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow raises them all
        raise ValueError(f"{name} cannot be used as a picture: {error}") from error
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def describe(model):
    """What an explorer's JavaScript has to know of a model: grid, blocks, class names, cost of the dense model.

    Args:
        model: a timm `VisionTransformer`, not pruned.

    Returns:
        dict for JSON.
    """
    depth, tokens = len(model.blocks), model.patch_embed.num_patches + model.num_prefix_tokens
    cost = _cost(model)
    classes = [data.class_name(i) if model.num_classes == 1000 else str(i) for i in range(model.num_classes)]
    return {
        "grid": list(model.patch_embed.grid_size), "at": list(default_at(depth)),
        "classes": classes, "dense": {"tokens": [tokens] * depth, **cost},
    }  # fmt: skip


def cost_of(model):
    """Tokens that leave each block (prefix tokens included) and MACs of each block of a pruned model: dict for JSON."""
    n, tokens = model.patch_embed.num_patches, []
    stages = dict(zip(model.pruning.at, model.pruning.counts(n)))
    for i in range(len(model.blocks)):
        n = stages[i].leave if i in stages else n
        tokens.append(n + model.num_prefix_tokens)
    return {"tokens": tokens, **_cost(model)}


def _cost(model):
    try:
        cost = flops.closed_form(model)
    except TypeError:  # a patch embedding or blocks that the closed form does not know
        return {"macs": None, "total": None}
    return {"macs": list(cost.by_block), "total": cost.total}


@torch.inference_mode()
def state(model, x):
    """What a pruned model does with one image, small enough to be embedded in a page by the hundred.

    Args:
        model: a pruned timm `VisionTransformer` in eval mode.
        x: (1, C, H, W), the image as the model wants it.

    Returns:
        dict for JSON: `kept`, for each stage a hexadecimal bit mask of the N patches, the first patch first (fused
        tokens have no patch and no bit); `host`, for each stage base64 of the N hosts, a byte each where N ≤ 256, else
        two, little-endian (methods that squeeze; else empty); `top`, the five best classes and their probabilities.

    Raises:
        ValueError: the model is not pruned, or `x` is not one image.
    """
    if not isinstance(model, PrunedViT):
        raise ValueError(f"model must be pruned by tpbook.prune, got a plain {type(model).__name__}")
    if x.dim() != 4 or len(x) != 1:
        raise ValueError(f"x must be one image, (1, C, H, W), got {tuple(x.shape)}")
    with trace(model) as t:
        p = model(x)[0].float().softmax(dim=0)
    best = p.topk(min(5, len(p)))
    patches = model.patch_embed.num_patches
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


def picture_of(x, model):
    """The image a model is given, as a data URI for `<img src>`: (1, C, H, W) or (C, H, W) → str."""
    config = resolve_model_data_config(model)
    pixels = image_of(x.reshape(x.shape[-3:]), config["mean"], config["std"])
    image, file = Image.fromarray((255 * pixels).round().astype("uint8")), io.BytesIO()
    kind = "JPEG" if min(image.size) > 100 else "PNG"
    image.save(file, kind, **({"quality": 85} if kind == "JPEG" else {"optimize": True}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def input_of(src, model):
    """The input that a picture of `picture_of` stands for, to the last bit: data URI → (1, C, H, W)."""
    config = resolve_model_data_config(model)
    picture = Image.open(io.BytesIO(base64.b64decode(src.split(",")[1])))
    picture = picture.convert("L" if model.in_chans == 1 else "RGB")
    return normalize(to_tensor(picture), config["mean"], config["std"])[None]


def page(data):
    """HTML of an explorer that needs no kernel, for a page that loads explorer.js and here.js: data → str."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("</", "<\\/")
    return f'<script type="application/json" id="explorer-data">{text}</script>\n'


def front(method="evit", keep_ratio=0.7):
    """The part of an explorer's data that does not depend on model and image: the methods, and where to start."""
    methods = {}
    for name, (of, options) in CHOICES.items():
        reduce = METHODS[of].reduce if options.get("fuse", True) else "drop"
        methods[name] = {"title": NAMES[name], "colour": COLOURS[name], "reduce": reduce}
    return {
        "methods": methods,
        "start": {"method": method, "ratio": keep_ratio},
    }


_CODE = files("tpbook") / "javascript"


class Explorer(anywidget.AnyWidget):
    """The widget that `explorer` makes. Its JavaScript asks by message, one question at a time; `answer` answers."""

    _esm = (_CODE / "explorer.js").read_text() + (_CODE / "jupyter.js").read_text()
    _css = (_CODE / "explorer.css").read_text()
    data = traitlets.Dict().tag(sync=True)

    def __init__(self, models, images, method, keep_ratio, at):
        self.models = models  # name in CHOICES → a model of its own (trained predictors), or the one they share
        self.model = models[next(iter(models))]
        self.transform, self.inputs = data.eval_transform(self.model), []
        described = describe(self.model)
        described |= {"name": "Pictures", "images": [self.add(source) for source in images]}
        described |= {"methods": {name: {} for name in models}, "missing": MISSING, "at": list(at or described["at"])}
        super().__init__(data={**front(method, keep_ratio), "ratios": RATIOS, "sets": [described]})
        self.on_msg(self.answer)

    def add(self, source, name=None):
        """Take a picture in: a path, bytes, a PIL image, or an input tensor (C, H, W). → what JavaScript is told."""
        given = isinstance(source, torch.Tensor)
        x = source[None] if given else self.transform(read_picture(source, name))[None]  # (1, C, H, W)
        self.inputs.append(x)
        if isinstance(source, (str, Path)):
            name = Path(source).stem
        number = len(self.inputs) - 1
        return {"src": picture_of(x, self.model), "alt": name or f"picture {number + 1}", "label": "", "number": number}

    def compute(self, image, method, ratio, at):
        """The state of one picture, a dict: `state` and `cost_of`, and how long the forward took."""
        model, (name, options) = self.models[method], CHOICES[method]
        if not hasattr(model, "score_predictor"):
            if isinstance(model, PrunedViT):
                unprune(model)
            prune(model, name, keep_ratio=ratio, at=at, **options)
        elif tuple(at) != model.pruning.at:
            raise ValueError(f"{NAMES[method]} was trained to prune before blocks {model.pruning.at}; choose those")
        model.keep_ratio = ratio
        begun = time.perf_counter()
        shown = state(model, self.inputs[image])
        speed = f"{1000 * (time.perf_counter() - begun):.0f} ms for this forward."
        return {**shown, **cost_of(model), "speed": speed}

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


MISSING = "Methods in grey need trained predictors or a class token, which this model does not have."


def explorer(model=DIGITS, images=None, *, method="evit", keep_ratio=0.7, at=None, trained=()):
    """Choose a picture, a method, a keep ratio and blocks, and see what is left of the picture.

    Args:
        model: a name for `tpbook.load_backbone`, or a timm `VisionTransformer`, not pruned; it is copied.
        images: pictures to begin with: paths, bytes, PIL images or input tensors (C, H, W). None: six digits for the
            digits ViT, else none; more are uploaded in the widget.
        method: a name of `tpbook.METHODS`, or "evit, no fusion", to begin with.
        keep_ratio, at: where to begin; `keep_ratio` is one number, and the slider goes in hundredths.
        trained: models pruned by DynamicViT or dTPS, with trained predictors and the same input; without one their
            method is not offered. The digits ViT brings its own.

    Returns:
        Explorer, a widget that Jupyter displays.

    Raises:
        ValueError, TypeError: an argument that cannot be used, named as `tpbook.prune` and `read_picture` do.
        FileNotFoundError: no such picture.
    """
    if isinstance(model, str):
        trained = trained or ([load_trained_digits(m) for m in ("dynamicvit", "dtps")] if model == DIGITS else ())
        if images is None and model == DIGITS:
            test = data.digits("test")
            images = [test.images[int((test.labels == label).nonzero()[3])] for label in (5, 8, 2, 0, 7, 3)]
        model = load_backbone(model)
    if not isinstance(model, VisionTransformer):
        raise TypeError(f"model must be a timm VisionTransformer or the name of one, got {type(model).__name__}")
    if isinstance(model, PrunedViT):
        raise ValueError(f"model must not be pruned, got one pruned by {model.pruning.name!r}: pass it in `trained`")
    model = deepcopy(model).cpu().float().eval()
    models = {}
    for own in trained:
        if not (isinstance(own, PrunedViT) and hasattr(own, "score_predictor")):
            raise ValueError("trained must hold models pruned by a method with predictors (dynamicvit, dtps)")
        if own.patch_embed.img_size != model.patch_embed.img_size or own.in_chans != model.in_chans:
            raise ValueError(f"trained must take what model takes, {model.in_chans} × {model.patch_embed.img_size}")
        models[own.pruning.name] = deepcopy(own).cpu().float().eval()
    scores = ("random",) if model.cls_token is None else ("random", "class_attention")
    models |= {name: model for name, (of, _) in CHOICES.items() if METHODS[of].score in scores}
    models = {name: models[name] for name in CHOICES if name in models}
    if method not in models:
        raise ValueError(f"method must be one of {', '.join(models)} for this model, got {method!r}")
    if not isinstance(keep_ratio, numbers.Real):
        raise TypeError(f"keep_ratio must be one number, got {keep_ratio!r}")
    if models[method] is model:
        unprune(prune(model, CHOICES[method][0], keep_ratio=keep_ratio, at=at))  # raises where these cannot be
    else:
        models[method].keep_ratio = keep_ratio
    return Explorer(models, images or [], method, keep_ratio, at)
