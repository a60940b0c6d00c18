"""What the `data` of a recipe names, and the classes that it has.

- `digits`: the embedded ones.
- `imagenette2-160`, `imagewoof2-160`: under `$TPBOOK_DATA`; `python -m tpbook.data get` downloads both.
- A folder of `$TPBOOK_DATA`, or a path: train/ and val/ that hold a folder for each class, or these class folders
  alone, of which `held_out` says what share is the test set.
- `torchvision:NAME`: a classification set of torchvision under `$TPBOOK_DATA`, with `?key=value&…` for its options.
- A folder that Hugging Face's `save_to_disk` wrote; `?image=…&label=…` names its columns where it has several.

Class folders named by WordNet ids of ImageNet-1k keep their place in a head of 1,000 classes. Other classes are counted
by themselves, and a pretrained model gets a new head for them.

Chapter: :doc:`/book/your-own`
"""

import difflib
import inspect
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl

import torch
import torchvision.datasets
import yaml
from torch.utils.data import Dataset

from .. import data

TESTS = ("val", "valid", "validation", "test")  # what a test set is called, the first that is there
TRAINS = ("trainval", "train", "train-standard")  # likewise, of torchvision
NOT_ASKED = ("root", "download", "transform", "target", "loader")  # of torchvision; other targets have other names


@dataclass(frozen=True)
class Classes:
    """The classes of a data set.

    Attributes:
        names: tuple of texts, one for each label that the data counts, in the labels' order.
        found: sorted tuple of the labels that occur among the training images.
        own: whether no pretrained model knows them, being neither ImageNet-1k's nor the digits'.
    """

    names: tuple[str, ...]
    found: tuple[int, ...]
    own: bool


DIGITS = Classes(tuple("0123456789"), tuple(range(10)), own=False)


def imagenet(found=range(1000)):
    """The Classes of ImageNet-1k, of which the labels `found` occur."""
    return Classes(tuple(map(data.class_name, range(1000))), tuple(found), own=False)


class Images(Dataset):
    """Images of another data set, in RGB, each with its label.

    Attributes:
        transform: what an image goes through, from PIL; None leaves it.
    """

    def __init__(self, dataset, which=None, transform=None):
        self.dataset, self.transform = dataset, transform
        self.which = range(len(dataset)) if which is None else which

    def __len__(self):
        return len(self.which)

    def __getitem__(self, i):
        image, label = self.dataset[self.which[i]]
        if image.mode != "RGB":
            image = image.convert("RGB")
        return image if self.transform is None else self.transform(image), label

    def seen_by(self, transform):
        """The same images, going through a transform."""
        return Images(self.dataset, self.which, transform)


def source_of(recipe):
    """The images that a recipe names; not for the digits, which are drawn.

    Returns:
        Classes, the training `Images` and the test `Images`.

    Raises:
        FileNotFoundError: they are not there; the message says how to get them.
        ValueError: a folder, option or share that cannot be; the message names it.
    """
    name, _, query = recipe.data.partition("?")
    if name in data.ARCHIVES:
        sets, classes = [data.imagenette(split, name=name) for split in ("train", "test")], None
        known = sets[0].class_indices
    elif name.startswith("torchvision:"):
        sets, classes = torchvision_sets(recipe.data)
    else:
        folder = _folder(name)
        if any((folder / file).is_file() for file in ("dataset_dict.json", "state.json")):
            sets, classes = _hugging_face(folder, dict(parse_qsl(query)))
        else:
            sets, classes = _tree(folder)
        known = None if classes else sets[0].class_indices
    train, test = _parted(recipe, sets, classes or imagenet().names)
    if classes:
        return Classes(tuple(classes), tuple(range(len(classes))), own=True), train, test
    if recipe.head == "data" and len(sets) > 1 and name not in data.ARCHIVES:
        if unseen := set(sets[1].class_indices) - set(known):
            raise ValueError(f"{sets[1].root} has {len(unseen)} classes that {sets[0].root} lacks, and head='data'")
    return imagenet(known), train, test


def _folder(name):
    """The folder of `$TPBOOK_DATA`, else the path."""
    try:
        return data.root(name)
    except FileNotFoundError as error:
        if Path(name).is_dir():
            return Path(name)
        hint = f"; did you mean 'torchvision:{near}'?" if (near := _nearest(name)) else ""
        raise FileNotFoundError(f"{error}, and there is no such folder here{hint}") from None


def _nearest(name):
    """The set of torchvision that is called nearly so, or None."""
    known = {one.lower(): one for one in torchvision.datasets.__all__}
    return next((known[near] for near in difflib.get_close_matches(name.lower(), known, n=1)), None)


def _tree(folder):
    """A folder with train/ and a test folder, or of class folders → its sets; and the class names, but ImageNet's."""
    whole = not (folder / "train").is_dir()
    train = data.image_folder(folder if whole else folder / "train")
    tests = [] if whole else [folder / name for name in TESTS if (folder / name).is_dir()]
    sets = [train, *(data.image_folder(test, like=train) for test in tests[:1])]
    return sets, train.classes if isinstance(train, data.ClassFolder) else None


def torchvision_sets(named, download=False):
    """A `torchvision:NAME[?key=value]` → its training and test sets, or the one it has, and the class names.

    The training set is "trainval" where there is one, else "train"; the test set "test", else "val".

    Args:
        named: as in a recipe.
        download: fetch what is missing to `$TPBOOK_DATA`.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: torchvision has no such set or option, or it is no classification.
        RuntimeError: the download failed.
    """
    name, _, query = named.removeprefix("torchvision:").partition("?")
    make = getattr(torchvision.datasets, name, None)
    takes = inspect.signature(make).parameters if name in torchvision.datasets.__all__ else ()
    if "root" not in takes:
        hint = f"; did you mean {near!r}?" if (near := _nearest(name)) else ""
        raise ValueError(f"data must name a set of torchvision.datasets after 'torchvision:', got {name!r}{hint}")
    options = dict(parse_qsl(query))
    may = [key for key in takes if not key.startswith(NOT_ASKED)]
    for key, text in options.items():
        if key not in may:
            raise ValueError(f"data has no option {key!r} for torchvision:{name}; it takes {', '.join(may) or 'none'}")
        if not isinstance(takes[key].default, str):  # a year is a text where the default is one
            options[key] = yaml.safe_load(text)
    if "train" in takes and "train" not in options:
        parts = [[{"train": True}], [{"train": False}]]
    elif "split" in takes and "split" not in options:
        parts = [[{"split": split} for split in several] for several in (TRAINS, ("test", *TESTS[:-1]))]
    else:
        parts = [[{}]]
    if download and "download" in takes:
        options["download"] = True
    sets = [_made(named, make, several, options) for several in parts]
    told = [getattr(sets[0], key, None) for key in ("classes", "categories", "all_categories")]
    if not isinstance(sets[0][0][1], int):
        raise ValueError(f"data must be a classification; the first label of {named} is {sets[0][0][1]!r}")
    names = next((list(map(str, names)) for names in told if names), None)
    return sets, names or [str(label) for label in range(1 + max(max(labels_of(one)) for one in sets))]


def _made(named, make, several, options):
    """The first of several splits that a set of torchvision has."""
    root = data.root("")
    for split in several:
        try:
            return make(root, **split, **options)
        except (RuntimeError, FileNotFoundError) as error:
            if options.get("download"):
                raise RuntimeError(f"{named} could not be downloaded: {error}") from error
            raise FileNotFoundError(
                f"no {named} under {root}: {error} (`python -m tpbook.data get '{named}'` downloads it)"
            ) from error
        except ValueError as error:
            if split is several[-1]:
                raise ValueError(f"data {named} does not take this: {error}") from error


class _Rows(Dataset):
    """Rows of a Hugging Face data set as pairs."""

    def __init__(self, rows, image, label):
        self.rows, self.image, self.label = rows, image, label
        self.targets = list(rows[label])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        try:
            row = self.rows[int(i)]
            return row[self.image], row[self.label]
        except OSError as error:
            raise ValueError(f"row {i} of {self.rows.cache_files} does not decode as an image: {error}") from error


def _hugging_face(folder, options):
    """The folder of a saved data set → its sets, and the names of its classes."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError("data of Hugging Face needs the package datasets: pip install tpbook[datasets]") from error
    found = datasets.load_from_disk(str(folder))
    if isinstance(found, datasets.Dataset):
        parts = [found]
    else:
        names = ["train", *[test for test in ("validation", "test", *TESTS) if test in found][:1]]
        if "train" not in found:
            raise ValueError(f"{folder} has no split 'train', but {', '.join(found)}")
        parts = [found[name] for name in names]
    columns = {}
    for key, kind in (("image", datasets.Image), ("label", datasets.ClassLabel)):
        may = [name for name, feature in parts[0].features.items() if isinstance(feature, kind)]
        columns[key] = options.get(key, may[0] if len(may) == 1 else None)
        if columns[key] not in may:
            said = f"'?{key}=…' must name one of its columns of {kind.__name__}: {', '.join(may) or 'it has none'}"
            raise ValueError(f"data {folder}: {said}; got {columns[key]!r}")
    return [_Rows(part, **columns) for part in parts], parts[0].features[columns["label"]].names


def labels_of(dataset):
    """The labels of all images: a list of int, read image by image where the set does not tell."""
    for name in ("targets", "_labels", "labels"):
        told = getattr(dataset, name, None)
        if told is not None and len(told) == len(dataset):
            return [int(label) for label in told]
    return [int(dataset[i][1]) for i in range(len(dataset))]


def _parted(recipe, sets, names):
    """Training and test `Images`: the two sets, or parts of the one, class by class, by `split_seed`."""
    if len(sets) > 1:
        if recipe.held_out:
            raise ValueError(f"held_out must be 0 where data has a test set, as {recipe.data!r}; got {recipe.held_out}")
        return Images(sets[0]), Images(sets[1])
    if not recipe.held_out:
        raise ValueError(
            f"data {recipe.data!r} has no test set ({', '.join(TESTS)} beside train): held_out must say what share of "
            "it is one, such as held_out=0.2"
        )
    labels, drawn = torch.tensor(labels_of(sets[0])), torch.Generator().manual_seed(recipe.split_seed)
    train, test = [], []
    for label in labels.unique().tolist():
        mine = (labels == label).nonzero().flatten()
        if len(mine) < 2:
            raise ValueError(
                f"held_out needs two images of a class; {names[label]!r} of {recipe.data!r} has {len(mine)}"
            )
        mine = mine[torch.randperm(len(mine), generator=drawn)].tolist()
        n = min(max(1, round(recipe.held_out * len(mine))), len(mine) - 1)
        test, train = test + mine[:n], train + mine[n:]
    return Images(sets[0], sorted(train)), Images(sets[0], sorted(test))
