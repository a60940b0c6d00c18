"""Pictures: read as people have them, and embedded in a page as a model sees them.

Chapter: :doc:`/book/explorer`
"""

import base64
import io
import os
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import resolve_model_data_config
from torchvision.transforms.functional import normalize, to_tensor

from ..families import family_of
from .plots import image_of

LONG = 100  # times as long as wide; a longer picture would grow huge when its short side is enlarged


def read_picture(source, name=None):
    """A picture as people have them, upright and opaque: EXIF orientation applied, transparency laid on white.

    Args:
        source: a path, bytes, or a PIL image.
        name: what an error calls it; None takes the path.

    Returns:
        PIL image in RGB.

    Raises:
        TypeError: the source is nothing of these.
        FileNotFoundError: no such file.
        ValueError: it does not decode, has more pixels than Pillow takes for safe, or is a mere strip; the message
            names it.
    """
    if not isinstance(source, (str, os.PathLike, bytes, Image.Image)):
        raise TypeError(f"a picture must be a path, bytes or a PIL image, got {type(source).__name__}")
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
    picture = picture.convert("L" if family_of(model).channels(model) == 1 else "RGB")
    return normalize(to_tensor(picture), config["mean"], config["std"])[None]
