"""Data: the embedded digits, and ImageNet-style folders named by WordNet id under `$TPBOOK_DATA`.

`python -m tpbook.data get NAME` downloads what may be downloaded.

Chapter: :doc:`/book/a-tour-of-keep-ratios`
"""

import argparse
import csv
import functools
import os
import shutil
import sys
import tempfile
from fnmatch import fnmatch
from pathlib import Path

from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from torch.utils.data import ConcatDataset
from torchvision.datasets import ImageFolder, Imagenette
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension, pil_loader
from torchvision.transforms import Compose, Grayscale

from .digits import MEAN, STD, Digits, digits
from .families import family_of

__all__ = [
    "MEAN", "STD", "Digits", "ImageNetFolder", "attribution", "class_name", "digits", "eval_transform", "imagenette",
    "nips2017_dev", "root",
]  # fmt: skip

IMAGENETTE, NIPS = "imagenette2-160", "nips2017-dev"
BY_HAND = {
    NIPS: "the 1,000 images of the NIPS 2017 adversarial competition's development set (CC-BY 2.0): lay them out as "
    "<WordNet id>/<image>.jpg with an attribution.csv",
    "imagenet": "ImageNet has to be asked for at image-net.org (non-commercial research): lay its train and val "
    "images out as <WordNet id>/<image>.JPEG",
}


@functools.cache
def _imagenet():
    info = ImageNetInfo()
    return info, {info.index_to_label_name(i): i for i in range(info.num_classes())}


def class_name(index):
    """The first English name of an ImageNet-1k class, by its index (0 to 999)."""
    return _imagenet()[0].index_to_description(index).split(",")[0]


class ImageNetFolder(ImageFolder):
    """Images in folders named by WordNet id; the targets are ImageNet-1k indices (0 to 999), whichever are there.

    Args:
        path: the folder that holds the class folders.
        transform: from a PIL RGB image; `eval_transform(model)` is what a model wants.
        pattern: which file names to take (`fnmatch`), for example "ILSVRC2012_val_*".
        exclude: which of them to leave out.

    Attributes:
        class_indices: sorted tuple of the ImageNet-1k indices that occur.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a class folder is no WordNet id of ImageNet-1k, no file matches, or (when it is read) an image
            does not decode; the message names the folder or file.
    """

    def __init__(self, path, *, transform=None, pattern="*", exclude=None):
        path = Path(path)
        if not path.is_dir():
            raise FileNotFoundError(f"no image folder at {path}")

        def wanted(file):
            name = os.path.basename(file)
            left_out = exclude is not None and fnmatch(name, exclude)
            return has_file_allowed_extension(name, IMG_EXTENSIONS) and fnmatch(name, pattern) and not left_out

        super().__init__(path, transform=transform, loader=load_image, is_valid_file=wanted, allow_empty=True)
        if not self.samples:
            left_out = f", {exclude!r} left out" if exclude else ""
            raise ValueError(f"{path} holds no image file matching {pattern!r}{left_out}")
        self.class_indices = tuple(sorted(set(self.targets)))

    def find_classes(self, directory):
        known = _imagenet()[1]
        folders = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir())
        if not folders:
            raise ValueError(f"{directory} holds no image folder; one a class is expected, named by WordNet id")
        for folder in folders:
            if folder not in known:
                where = Path(directory) / folder
                raise ValueError(f"folder {where} is no WordNet id of ImageNet-1k (such as n01440764)")
        return folders, {folder: known[folder] for folder in folders}


def load_image(path):
    """A PIL image in RGB; ValueError naming the file where it does not decode."""
    try:
        return pil_loader(path)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow raises them all
        raise ValueError(f"{path} does not decode as an image: {error}") from error


def root(name):
    """The folder `$TPBOOK_DATA/<name>`.

    Raises:
        FileNotFoundError: the variable is not set, or the folder is not there; the message says how to get it.
    """
    base = os.environ.get("TPBOOK_DATA")
    path = Path(base or "") / name
    if not base or not path.is_dir():
        where = f"{path} is not there" if base else "TPBOOK_DATA is not set"
        raise FileNotFoundError(f"no data set {name!r}: {where} (`python -m tpbook.data get {name}` helps)")
    return path


def nips2017_dev(transform=None):
    """1,000 photographs, 430 ImageNet-1k classes, no ImageNet image among them: the honest 1000-way test set."""
    return ImageNetFolder(root(NIPS), transform=transform)


def attribution():
    """Of every image of `nips2017_dev`: relative file name → its row of attribution.csv (author, licence, link)."""
    with (root(NIPS) / "attribution.csv").open(newline="") as file:
        return {row["file"]: row for row in csv.DictReader(file)}


def imagenette(split, transform=None, name=IMAGENETTE):
    """Imagenette, ten ImageNet classes, split by what ImageNet models have seen.

    Args:
        split: "test", the 500 images of ImageNet's validation set, which no ImageNet model has trained on (they lie in
            both of the archive's folders); "train" and "val", those folders without them.
        transform: as in `ImageNetFolder`.
        name: of the folder; "imagewoof2-160", ten breeds of dogs, is split alike.

    Returns:
        A Dataset of (image, ImageNet-1k index).

    Raises:
        ValueError: an unknown split.
    """
    held_out, path = "ILSVRC2012_val_*", root(name)
    if split == "test":
        folders = [path / "train", path / "val"]
        return ConcatDataset([ImageNetFolder(f, transform=transform, pattern=held_out) for f in folders])
    if split not in ("train", "val"):
        raise ValueError(f"split must be one of train, val, test, got {split!r}")
    return ImageNetFolder(path / split, transform=transform, exclude=held_out)


def eval_transform(model):
    """timm's own evaluation transform at the ViT's image size, PIL → (C, H, W): resize, centre crop, normalise."""
    family = family_of(model)
    channels = family.channels(model)
    config = resolve_model_data_config(model) | {"input_size": (channels, *family.image_size(model))}
    transform = create_transform(**config, is_training=False)
    return transform if channels > 1 else Compose([Grayscale(), transform])


def get(name):
    """Download a data set to `$TPBOOK_DATA/<name>`, whole or not at all. → its folder.

    Raises:
        ValueError: a name that is not known, or that cannot be downloaded by a program; it says what to do.
        FileNotFoundError: TPBOOK_DATA is not set.
        RuntimeError: the download failed.
    """
    if name in BY_HAND:
        raise ValueError(f"{name} cannot be downloaded for you: {BY_HAND[name]}, under $TPBOOK_DATA/{name}")
    if name != IMAGENETTE:
        raise ValueError(f"NAME must be one of {', '.join([IMAGENETTE, *BY_HAND])}, got {name!r}")
    if not os.environ.get("TPBOOK_DATA"):
        raise FileNotFoundError("TPBOOK_DATA is not set: set it to the folder that shall hold the data")
    base = Path(os.environ["TPBOOK_DATA"])
    if (base / name).is_dir():
        return base / name
    base.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=base))
    try:
        Imagenette(part, size="160px", download=True)
        (part / name).rename(base / name)
    except Exception as error:  # urllib, tarfile and torchvision each have their own
        raise RuntimeError(f"{name} could not be downloaded: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return base / name


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tpbook.data", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("get", help="download a data set to $TPBOOK_DATA")
    command.add_argument("name", metavar="NAME", help=", ".join([IMAGENETTE, *BY_HAND]))
    try:
        print(get(parser.parse_args(arguments).name))
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"tpbook.data: {error}")


if __name__ == "__main__":
    main()
