"""What a training photograph costs a core before the model sees it, by timm's transform and by ours::

    python -m tpbook.timing.loading FOLDER                                     # any tree of images
    python -m tpbook.timing.loading FOLDER rounds=31 images=256 out=loading.json

Both take turns in one process on one core. What is counted is the time that a processor worked for this process, so
that other programs do not count.

Chapter: :doc:`/book/reproduction`
"""

import random
import sys
import time
from pathlib import Path

import PIL
import timm
import torch
import torchvision
from torch.utils.data import DataLoader
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

from ..book import results
from ..data import load_image
from ..training.loading import augmented, finisher, timms
from ..training.recipes import make, parse
from .clock import interleaved, said, times


class Files:
    """A Dataset of image files, each with the label 0."""

    def __init__(self, files, transform):
        self.files, self.transform = files, transform

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        return self.transform(load_image(self.files[i])), 0


def measure(folder, rounds, images, batch=64):
    """Processor time of an image, from the file to the batch, with and without RandAugment.

    Args:
        folder: a tree of images; `images` of them are taken, at random.
        rounds: how often every way takes its turn.
        batch: images that are put together.

    Returns:
        list of dicts, one for each "auto_augment": "ms" of an image, of "timm" and "ours", which are what a worker
        does, of "decode", which is in both, and "finish", which ours leaves to the device; "images_per_second" of both;
        and as `times` gives them "times", how many times as many ours are, and "times_on_one", if the same core
        finishes them too.

    Raises:
        ValueError: the folder holds fewer images, or one does not decode.
    """
    files = sorted(str(f) for f in Path(folder).rglob("*") if has_file_allowed_extension(f.name, IMG_EXTENSIONS))
    if len(files) < images:
        raise ValueError(f"images must be at most {len(files)}, the image files of {folder}, got {images}")
    files, model = random.Random(0).sample(files, images), timm.create_model("deit_tiny_patch16_224")
    return [_row(files, model, policy, rounds, batch) for policy in ("", "rand-m9-mstd0.5-inc1")]


def _row(files, model, policy, rounds, batch):
    recipe = make({"hflip": 0.5, "min_scale": 0.35, "auto_augment": policy})
    theirs, ours = (DataLoader(Files(files, how(recipe, model)), batch) for how in (timms, augmented))
    finish, batches = finisher(recipe, model, "cpu"), [images for images, _ in ours]
    seconds = interleaved({
        "timm": lambda: list(theirs), "ours": lambda: list(ours), "decode": lambda: [load_image(f) for f in files],
        "finish": lambda: [finish(images) for images in batches],
    }, rounds, clock=time.process_time)  # fmt: skip
    an_image = {name: taken.median().item() / len(files) for name, taken in seconds.items()}
    return {
        "auto_augment": policy, "ms": {name: 1e3 * taken for name, taken in an_image.items()},
        "images_per_second": {name: 1 / an_image[name] for name in ("timm", "ours")},
        "times": times(seconds["ours"], of=seconds["timm"]),
        "times_on_one": times(seconds["ours"] + seconds["finish"], of=seconds["timm"]),
    }  # fmt: skip


def main(arguments=None):
    """The command."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if not words or {"-h", "--help"} & set(words):
        print(__doc__)
        return
    torch.set_num_threads(1)
    try:
        keys = {"rounds": 31, "images": 256, **parse(words[1:], {"out": str})}
        out = keys.pop("out", None)
        rows = measure(words[0], **keys)
        for row in rows:
            rates = "{timm:.0f} → {ours:.0f} images a second and core".format(**row["images_per_second"])
            print(f"{row['auto_augment'] or 'crop and flip'}: {rates}, × {said(row['times'])}; "
                  f"× {said(row['times_on_one'])} if the same core finishes them")  # fmt: skip
        if out:
            versions = {"torchvision": torchvision.__version__.split("+")[0], "pillow": PIL.__version__}
            results.save(Path(out).parent, Path(out).stem, {"rows": rows, **versions, **keys})
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"tpbook.timing.loading: {error}")


if __name__ == "__main__":
    main()
