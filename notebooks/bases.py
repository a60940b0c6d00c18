"""Puts trained bases of the digits into the package: `python notebooks/bases.py _build/backbones/pvt_digits_56 …`.

Each is the folder of a finished run of `recipes/digits/base.yaml` with another `model`. Its weights are stored in half
precision, since nothing above 1 MB is committed, and what is said of them is measured as they are stored: in
`tpbook/pretrained/MODEL.json` the commands that trained them, one after another, and their accuracy.
"""

import json
import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from tpbook import data, load_backbone  # noqa: E402
from tpbook.book import results  # noqa: E402
from tpbook.training.recipes import as_dict, read  # noqa: E402

TOP = Path(__file__).parent.parent
BASE = "recipes/digits/base.yaml"
FREE = ("eval_every", "log_every", "workers")  # they change nothing that is trained


def runs(folder):
    """What the runs were, the first one first, where a run started from another: the `result.json` of each."""
    result = json.loads((folder / "result.json").read_text())
    start = Path(result["recipe"]["start"])
    return [*(runs(start) if start.is_dir() else ()), result]


def command(recipe):
    """What trains it."""
    plain = as_dict(read(TOP / BASE))
    said = {key: value for key, value in recipe.items() if key not in FREE and value != plain[key]}
    words = [f"{key}={','.join(map(str, value)) if isinstance(value, list) else value}" for key, value in said.items()]
    return " ".join(["python -m tpbook.train", BASE, *words])


@torch.inference_mode()
def pack(run):
    """A run's folder → the two files of its model in `tpbook/pretrained`."""
    made = runs(run)
    result = made[-1]
    name, folder = result["recipe"]["model"], TOP / "tpbook" / "pretrained"
    state = {key: value.half() if value.is_floating_point() else value for key, value in load_file(run / "model.safetensors").items()}
    save_file(state, folder / f"{name}.safetensors")
    model, test = load_backbone(name), data.digits("test")
    right = sum((model(x).argmax(1) == y).sum().item() for x, y in zip(test.images.split(100), test.labels.split(100)))
    results.save(folder, name, {
        "model": name, "commands": [command(one["recipe"]) for one in made],
        "images_seen": sum(one["images_seen"] for one in made), "seconds": sum(one["seconds"] for one in made), "parameters": sum(p.numel() for p in model.parameters()), "stored": "float16",
        "accuracy": results.accuracy(right, len(test)), "right_before_rounding": result["accuracy"]["right"],
    })  # fmt: skip
    print(name, right, (folder / f"{name}.safetensors").stat().st_size)


if __name__ == "__main__":
    for word in sys.argv[1:] or sys.exit(__doc__):
        pack(Path(word))
