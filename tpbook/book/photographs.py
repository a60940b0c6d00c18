"""The photographs that every edition shows, and what DeiT-Ti makes of them at many keep ratios, by every method that
needs no training. `book/photographs` holds them; this makes it, from `nips2017-dev` and DeiT-Ti's weights::

    python -m tpbook.book.photographs out=book/photographs       # `make photographs`, a minute or two

and the front page's picture of one of them, `book/images/hero.svg`.

Chapter: :doc:`/book/explorer`
"""

import base64
import csv
import json
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .. import data
from ..training.recipes import parse
from ..weights import load_backbone
from . import panels, results
from .pictures import input_of, picture_of
from .states import decode, describe, states_of
from .widgets import MISSING

MODEL = "deit_tiny_patch16_224"
LICENCE = "https://creativecommons.org/licenses/by/2.0/"
RATIOS = [round(0.2 + 0.05 * i, 2) for i in range(17)]
HERO = 1  # which of them is on the front page
CHANGES = "resized, cropped, drawn over"
# name → file of nips2017-dev: DeiT-Ti is right about them, methods differ on them, and one sees which patch shows what
CHOSEN = {
    "wallaby": "n01877812/6de6432b0f23ae75.jpg", "bald-eagle": "n01614925/5ec826683757ffae.jpg",
    "bee": "n02206856/611f453c4bb616b9.jpg", "snail": "n01944390/513b3032ed1f388c.jpg",
    "siamese-cat": "n02123597/ecd3a969dd466349.jpg", "school-bus": "n04146614/380053c506e32105.jpg",
    "fox-squirrel": "n02356798/444109f3ccfacc7b.jpg", "traffic-light": "n06874185/3bd1ba0432603b28.jpg",
    "otter": "n02444819/296033c3a5910845.jpg", "badger": "n02447366/fd26c4733822dfcc.jpg",
    "oystercatcher": "n02037110/446b24f903b488fc.jpg", "schooner": "n04147183/eae13c52554a7783.jpg",
}  # fmt: skip


@dataclass(frozen=True)
class Photograph:
    """One of them.

    Attributes:
        row: of attribution.csv: photograph, label, author, author_profile, license, landing_url, file, changes.
        src: the JPEG as a data URI, as large as the model sees it.
        states: method → a list of `states.state`, one a ratio of `seen`.
        seen: by which model: `states.describe`, and "ratios", "costs", "run".
    """

    row: dict
    src: str
    states: dict
    seen: dict

    @property
    def label(self):
        """What it shows, in words: a class of ImageNet-1k."""
        return self.row["label"]

    @cached_property
    def credit(self):
        """Author and licence with their links, in Markdown."""
        row = self.row
        return (
            f"[photograph]({row['landing_url']}) by [{row['author']}]({row['author_profile']}), "
            f"[CC BY 2.0]({row['license']})"
        )

    def state(self, method, ratio):
        """What a method leaves of it.

        Args:
            method: a name in `looks.CHOICES` that needs no training.
            ratio: one of `seen["ratios"]`.

        Returns:
            dict as `states.decode` gives it, and `says`, the name of the best class.

        Raises:
            ValueError: nothing was computed of such a method or ratio; the message names what was.
        """
        ratios = self.seen["ratios"]
        if method not in self.states:
            raise ValueError(f"method must be one of {', '.join(self.states)}, got {method!r}")
        if ratio not in ratios or (found := self.states[method][ratios.index(ratio)]) is None:
            known = [r for r, state in zip(ratios, self.states[method]) if state is not None]
            raise ValueError(f"ratio must be one of {', '.join(map(str, known))} for {method}, got {ratio!r}")
        rows, columns = self.seen["grid"]
        return decode(found, rows * columns) | {"says": self.seen["classes"][found["top"][0][0]]}


def read(folder):
    """The photographs of a folder that `make` wrote: path → list of `Photograph`, in the order of attribution.csv.

    Raises:
        FileNotFoundError: there is none; the message names the file.
    """
    folder = Path(folder)
    seen = json.loads((folder / f"{MODEL}.json").read_text(encoding="utf-8"))
    with (folder / "attribution.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [_read(folder, row, seen) for row in rows]


def _read(folder, row, seen):
    name = row["photograph"]
    picture = base64.b64encode((folder / f"{name}.jpg").read_bytes()).decode()
    states = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return Photograph(row, f"data:image/jpeg;base64,{picture}", states, seen)


def explorer_set(photographs):
    """What an explorer's page carries of them: one entry of its "sets", without models that could run there."""
    [seen] = {id(one.seen): one.seen for one in photographs}.values()
    shown = {key: value for key, value in seen.items() if key not in ("ratios", "run")}
    return {
        **shown, "name": "Photographs, DeiT-Ti", "missing": MISSING, "methods": {name: {} for name in seen["costs"]},
        "images": [
            {"src": one.src, "label": one.label, "alt": f"photograph: {one.label}", "credit": _html(one.row)}
            for one in photographs
        ],
        "states": [one.states for one in photographs],
    }  # fmt: skip


def _html(row):
    return (
        f'<a href="{row["landing_url"]}">Photograph</a> by <a href="{row["author_profile"]}">{row["author"]}</a>, '
        f'<a href="{row["license"]}">CC BY 2.0</a>; {row["changes"]} by us.'
    )  # fmt: skip


def credits(photographs):
    """Of several, in Markdown, as a figure wants it below."""
    return "; ".join(f"{one.label}: {one.credit}" for one in photographs) + f". {CHANGES.capitalize()} by us."


def make(folder):
    """Write the folder: pictures, attribution.csv, the states of each, and what they have in common.

    Args:
        folder: where to; made where it is not there.

    Raises:
        FileNotFoundError, RuntimeError: data or weights are missing, as `data.root` and `load_backbone` say.
        ValueError: a photograph's licence is another one.
    """
    folder = Path(folder)
    model, rows = load_backbone(MODEL), data.attribution()
    transform, wnids = data.eval_transform(model), data.root(data.NIPS)
    chosen = {name: rows[file] for name, file in CHOSEN.items()}
    for name, row in chosen.items():
        if row["license"] != LICENCE:
            raise ValueError(f"{name} must be under {LICENCE}, but attribution.csv says {row['license']}")
    inputs = {name: transform(data.load_image(wnids / row["file"])) for name, row in chosen.items()}
    pictures = {name: picture_of(x, model) for name, x in inputs.items()}
    costs, states = states_of(model, [input_of(src, model) for src in pictures.values()], RATIOS)
    folder.mkdir(parents=True, exist_ok=True)
    for (name, src), own in zip(pictures.items(), states):
        (folder / f"{name}.jpg").write_bytes(base64.b64decode(src.split(",")[1]))
        _write(folder / f"{name}.json", own)
    said = {**describe(model), "ratios": RATIOS, "costs": costs, "run": results.provenance()}
    _write(folder / f"{MODEL}.json", said)
    with (folder / "attribution.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        kept = ("author_profile", "license", "landing_url", "file")
        writer.writerow(("photograph", "label", "author", *kept, "changes"))
        for name, row in chosen.items():
            label, author = data.class_name(int(row["imagenet_index"])), " ".join(row["author"].split())
            writer.writerow((name, label, author, *(row[key] for key in kept), CHANGES))


def _write(path, value):
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    path.write_text(text + "\n", encoding="utf-8")


def main(arguments=None):
    """The command."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return
    try:
        keys = {"out": "book/photographs", "hero": "book/images/hero.svg"} | parse(words, {"out": str, "hero": str})
        make(keys["out"])
        Path(keys["hero"]).write_text(panels.hero(read(keys["out"])[HERO], "evit", 0.7), encoding="utf-8")
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        sys.exit(f"tpbook.book.photographs: {error}")


if __name__ == "__main__":
    main()
