"""Folders of images for a chapter whose readers bring their own, and what to look at first in any of them.

Chapter: :doc:`/book/your-own`
"""

import hashlib
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from .. import data
from ..training.sources import labels_of

BY = "[CC BY 2.0](https://creativecommons.org/licenses/by/2.0/)"
PIECES = {  # class → whose photograph it is a piece of
    "flower": f"[vultilion](https://www.flickr.com/photos/vultilion/6056698931/), {BY}",
    "it's a portrait!": "U.S. Navy, public domain",
    "temple": f"[danielbuechele](https://www.flickr.com/photos/danielbuechele/6061409035/), {BY}",
}
KINDS = {  # class → its ImageNet-1k indices
    "bird": (*range(7, 25), *range(80, 101), *range(127, 147)), "it's an insect!": range(300, 327),
    "mammal": range(330, 389),
}  # fmt: skip


def sample(profile, folder):
    """A folder to begin with, three classes of any names; made where it is not there.

    Args:
        profile: "digits": pieces of three photographs that come with scikit-learn and matplotlib, train/ from their
            left and val/ from their right. Else birds, insects and mammals of `nips2017_dev`, linked, without a split.
        folder: where to.

    Returns:
        Path of it.
    """
    folder = Path(folder)
    if folder.is_dir():
        return folder
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    if profile == "digits":
        _pieces(part)
    else:
        for path, label in data.nips2017_dev().samples:
            for kind in (kind for kind, indices in KINDS.items() if label in indices):
                (part / kind).mkdir(parents=True, exist_ok=True)
                (part / kind / Path(path).name).symlink_to(Path(path).resolve())
    return part.rename(folder)


def _pieces(folder, numbers=(("train", 80, 0.0, 0.6), ("val", 30, 0.6, 1.0))):
    from matplotlib import cbook
    from sklearn.datasets import load_sample_images

    temple, flower = load_sample_images().images
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        portrait = np.asarray(Image.open(file).convert("RGB"))
    drawn = np.random.default_rng(0)
    for name, pixels in zip(PIECES, (flower, portrait, temple)):
        high, wide = pixels.shape[:2]
        for split, n, left, right in numbers:
            (folder / split / name).mkdir(parents=True)
            for i in range(n):
                side = drawn.integers(96, min(200, int(right * wide) - int(left * wide), high))
                x, y = (
                    drawn.integers(int(left * wide), int(right * wide) - side + 1),
                    drawn.integers(0, high - side + 1),
                )
                Image.fromarray(pixels[y : y + side, x : x + side]).save(folder / split / name / f"{i:03}.jpg")


def credits(folder, profile):
    """Who made the photographs of a sample, in Markdown."""
    if profile == "digits":
        return "Pieces of photographs by " + "; ".join(PIECES.values()) + "."
    rows = data.attribution()
    names = sorted({rows[f"{path.resolve().parent.name}/{path.name}"]["author"] for path in Path(folder).glob("*/*")})
    return f"Photographs of the NIPS 2017 development set, {BY}, by {', '.join(names)}."


def counts(classes, **images):
    """How many images of each class: a frame of classes by names, such as train=, test=, of `sources.Images`."""
    found = {}
    for name, some in images.items():
        labels = labels_of(some.dataset)
        count = Counter(labels[i] for i in some.which)
        found[name] = [count[label] for label in range(len(classes.names))]
    return pd.DataFrame(found, index=pd.Index(classes.names, name="class"))


def in_both(train, test):
    """How many test images are among the training images too, byte for byte; of image folders."""

    def digests(images):
        files = (Path(images.dataset.samples[i][0]) for i in images.which)
        return Counter(hashlib.sha256(file.read_bytes()).digest() for file in files)

    seen = digests(train)
    return sum(n for digest, n in digests(test).items() if digest in seen)
