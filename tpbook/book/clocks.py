"""What the committed benchmark found, for pages: no page times anything itself.

Chapter: :doc:`/book/speed`
"""

import json
from pathlib import Path

from . import results


def read(folder, *, model="deit_tiny_patch16_224", image_size=224, batch=32):
    """How many times as fast as the dense model, by the files that `make speed` wrote.

    Args:
        folder: of result files of `tpbook.bench`.
        model, image_size, batch: which rows.

    Returns:
        {(mode, dtype, method, keep ratio): [median, low, high]}, a 95 % interval over rounds; mode is "training" (a
        whole step), "eager" or "compiled". Where several files have a setting, the one of most rounds counts.

    Raises:
        ValueError: no such row.
    """
    mine = [
        row for row in results.rows(folder)
        if (row["model"], row["image_size"], row["batch"]) == (model, image_size, batch) and "times_dense" in row
    ]  # fmt: skip
    if not mine:
        raise ValueError(f"folder {folder} has no row of model {model!r}, image_size {image_size}, batch {batch}")
    mine.sort(key=lambda row: row["rounds"])
    return {(row["mode"], row["dtype"], row["method"], row["keep_ratio"]): row["times_dense"] for row in mine}


def made(folder):
    """Where and when, for a caption: "CPU, 2 threads, PyTorch 2.15.0, 2026-11-22, commit f152fd8d5027"."""
    commits = {}  # of each place and day
    for path in sorted(Path(folder).glob("*.json")):
        run = json.loads(path.read_text())["run"]
        where = "{device}, {threads} threads, PyTorch {torch}, {date}".format(**run)
        commits.setdefault(where, {})[run["commit"]] = None
    return "; ".join(f"{where}, commit{'s' * (len(of) > 1)} {' and '.join(of)}" for where, of in commits.items())


def said(ratio):
    """[median, low, high] in words: "1.44 × [1.43, 1.44]"."""
    return "{:.2f} × [{:.2f}, {:.2f}]".format(*ratio)


def table(times, methods):
    """What `read` gave as rows for a page: {"EViT, ρ = 0.7": {"training, float32": …}}.

    Args:
        times: of `read`.
        methods: {name of a method: how it is called}.
    """
    lines = {}
    for (mode, dtype, method, ratio), found in sorted(times.items(), key=lambda item: -item[0][3]):
        if method in methods:
            lines.setdefault(f"{methods[method]}, ρ = {ratio}", {})[f"{mode}, {dtype}"] = said(found)
    return lines
