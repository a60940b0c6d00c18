"""Data: the embedded digits, image folders under `$TPBOOK_DATA`, and what comes of them.

`python -m tpbook.data get NAME` downloads what may be downloaded. What a recipe's `data` may name besides is in
`tpbook.training.sources`.

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
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension, pil_loader
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms import Compose, Grayscale

from .digits import MEAN, STD, Digits, digits
from .families import family_of

__all__ = [
    "MEAN", "STD", "ClassFolder", "Digits", "ImageNetFolder", "attribution", "class_name", "digits", "eval_transform",
    "image_folder", "imagenette", "nips2017_dev", "root",
]  # fmt: skip

IMAGENETTE, IMAGEWOOF, NIPS = "imagenette2-160", "imagewoof2-160", "nips2017-dev"
ARCHIVES = {  # of fast.ai: the file, and its MD5
    IMAGENETTE: ("imagenette2-160.tgz", "e793b78cc4c9e9a4ccc0c1155377a412"),
    IMAGEWOOF: ("imagewoof2-160.tgz", "3d200a7be99704a0d7509be2a9fbfe15"),
}
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
        known, folders = _imagenet()[1], class_folders(directory)
        for folder in folders:
            if folder not in known:
                where = Path(directory) / folder
                raise ValueError(f"folder {where} is no WordNet id of ImageNet-1k (such as n01440764)")
        return folders, {folder: known[folder] for folder in folders}


class ClassFolder(ImageFolder):
    """Images in folders named by their class, any names; the targets count the sorted names from 0.

    Args:
        path: the folder that holds the class folders.
        transform: as in `ImageNetFolder`.
        classes: the names that there are, in order, where another folder has said so; of these some may be missing.

    Attributes:
        classes: list of the names.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: there is no class folder, one of them holds no image or is none of `classes`, or (when it is read)
            an image does not decode; the message names the folder or file.
    """

    def __init__(self, path, *, transform=None, classes=None):
        if not Path(path).is_dir():
            raise FileNotFoundError(f"no image folder at {path}")
        self._expected = classes
        super().__init__(path, transform=transform, loader=load_image, allow_empty=True)
        filled = {self.classes[target] for target in self.targets}
        for folder in class_folders(path):
            if folder not in filled:
                raise ValueError(f"class folder {Path(path) / folder} holds no image ({', '.join(IMG_EXTENSIONS)})")

    def find_classes(self, directory):
        folders = class_folders(directory)
        classes = folders if self._expected is None else list(self._expected)
        for folder in folders:
            if folder not in classes:
                raise ValueError(f"class folder {Path(directory) / folder} has no like among the training images")
        return classes, {name: i for i, name in enumerate(classes)}


def class_folders(path):
    """Sorted names of the folders in an image folder, hidden ones left out; ValueError where there is none."""
    folders = sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise ValueError(f"{path} holds no image folder; one a class is expected")
    return folders


def image_folder(path, *, transform=None, like=None):
    """The images of a folder of class folders, of ImageNet-1k or of any other classes.

    Args:
        path: the folder.
        transform: as in `ImageNetFolder`.
        like: what this function gave for the training images, whose classes count.

    Returns:
        An `ImageNetFolder` where every class folder is named by a WordNet id of ImageNet-1k, else a `ClassFolder`.

    Raises:
        FileNotFoundError, ValueError: as these do; and where some names are WordNet ids and others not.
    """
    if not Path(path).is_dir():
        raise FileNotFoundError(f"no image folder at {path}")
    if isinstance(like, ClassFolder):
        return ClassFolder(path, transform=transform, classes=like.classes)
    if like is None and not any(folder in _imagenet()[1] for folder in class_folders(path)):
        return ClassFolder(path, transform=transform)
    return ImageNetFolder(path, transform=transform)  # which names a folder that is none


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
        hint = f" (`python -m tpbook.data get {name}` helps)" if name in (*ARCHIVES, *BY_HAND) else ""
        raise FileNotFoundError(f"no data set {name!r}: {where}{hint}")
    return path


def nips2017_dev(transform=None):
    """1,000 photographs, 430 ImageNet-1k classes, no ImageNet image among them: the honest 1000-way test set."""
    return ImageNetFolder(root(NIPS), transform=transform)


def attribution():
    """Of every image of `nips2017_dev`: relative file name → its row of attribution.csv (author, licence, link)."""
    with (root(NIPS) / "attribution.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:  # the file has each byte of UTF-8 beyond ASCII as \ooo
        row["author"] = row["author"].encode("latin-1").decode("unicode_escape").encode("latin-1").decode("utf-8")
    return {row["file"]: row for row in rows}


def imagenette(split, transform=None, name=IMAGENETTE):
    """Imagenette or Imagewoof, ten ImageNet classes each, split by what ImageNet models have seen.

    Args:
        split: "test", the 500 images of ImageNet's validation set, which no ImageNet model has trained on (they lie in
            both of the archive's folders); "train" and "val", those folders without them.
        transform: as in `ImageNetFolder`.
        name: of the folder: "imagenette2-160", or "imagewoof2-160", ten breeds of dogs.

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
    """Download a data set to `$TPBOOK_DATA`, whole or not at all. → its folder.

    Args:
        name: "imagenette2-160", "imagewoof2-160", or "torchvision:NAME[?option=value]", as in a recipe.

    Raises:
        ValueError: a name that is not known, or that cannot be downloaded by a program; it says what to do.
        FileNotFoundError: TPBOOK_DATA is not set.
        RuntimeError: the download failed.
    """
    if name in BY_HAND:
        raise ValueError(f"{name} cannot be downloaded for you: {BY_HAND[name]}, under $TPBOOK_DATA/{name}")
    of_torchvision = name.startswith("torchvision:")
    if name not in ARCHIVES and not of_torchvision:
        raise ValueError(f"NAME must be one of {', '.join([*ARCHIVES, *BY_HAND])} or torchvision:…, got {name!r}")
    if not os.environ.get("TPBOOK_DATA"):
        raise FileNotFoundError("TPBOOK_DATA is not set: set it to the folder that shall hold the data")
    base = Path(os.environ["TPBOOK_DATA"])
    base.mkdir(parents=True, exist_ok=True)
    if of_torchvision:  # which checks what is there itself
        from .training.sources import torchvision_sets

        torchvision_sets(name, download=True)
        return base
    if (base / name).is_dir():
        return base / name
    part = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=base))
    file, md5 = ARCHIVES[name]
    try:
        download_and_extract_archive(f"https://s3.amazonaws.com/fast-ai-imageclas/{file}", part, md5=md5)
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
    command.add_argument("name", metavar="NAME", help=", ".join([*ARCHIVES, "torchvision:NAME[?option=value]"]))
    try:
        print(get(parser.parse_args(arguments).name))
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"tpbook.data: {error}")


if __name__ == "__main__":
    main()
