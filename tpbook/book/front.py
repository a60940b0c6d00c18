"""What the first page says and draws: what pruning saves a model that nobody trains for it, from the committed rows.

Chapter: :doc:`/book/every-method`
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import timm

from .. import flops
from ..engine import prune
from .plots import COLOURS, MARKS, NAMES
from .results import accuracy, correct, markdown, paired

DATA = "nips2017-dev"
TITLES = NAMES | {"tome": "ToMe, three blocks", "tome, every block": "ToMe, every block"}
SHOWN = ("tome, every block", "tome", "dpcknn", "evit", "etps", "random")  # on the figure; the table has all


def photographs(path):
    """The rows of `results/deit-ti/family.json` that are of photographs of a thousand classes: list of dicts."""
    rows = json.loads(Path(path).read_text())["rows"]
    return [row for row in rows if row["data"] == DATA]


def numbers(rows):
    """What the page says.

    Args:
        rows: of `photographs`: the dense model and every method at three levels of cost, named after Top-K's ρ.

    Returns:
        dict: `n` images; `dense`, `best` and `random` at the first level, each with `title`, `right`,
        `percent` [`low`, `high`], `gmacs` and `saved`, in percent of the dense model's MACs; `others`, how many methods
        were compared there; `levels`, Top-K's ρ → `of_level`; `table`, all rows in Markdown.
    """
    [dense] = [row for row in rows if row["method"] == "dense"]
    level = max(row["level"] for row in rows if row is not dense)
    there = [row for row in rows if row["level"] == level and row is not dense]
    methods = [row for row in there if row["method"] != "random"]
    chosen = {"dense": dense, "best": max(methods, key=lambda row: row["right"])}
    chosen |= {"random": next(row for row in there if row["method"] == "random")}
    said = {
        name: {
            "title": TITLES[row["name"]], "gmacs": row["macs"] / 1e9, "saved": 100 - 100 * row["macs"] / dense["macs"],
            **{key: float(value) for key, value in accuracy(row["right"], row["n"]).items()}, "right": row["right"],
        } for name, row in chosen.items()
    }  # fmt: skip
    levels = {str(one): of_level(rows, one) for one in {row["level"] for row in rows} - {1.0}}
    lines = [{
        "method": TITLES[row["name"]], "GMACs": f"{row['macs'] / 1e9:.2f}",
        "top-1, % [95 % interval]": "{percent:.1f} [{low:.1f}, {high:.1f}]".format(**accuracy(row["right"], row["n"])),
    } for row in rows]  # fmt: skip
    said |= {"n": dense["n"], "others": len({row["method"] for row in methods}), "levels": levels}
    return said | {"table": markdown(pd.DataFrame(lines).set_index("method"))}


def of_level(rows, level):
    """Who is best at one level of cost, and that beside eTPS, in points [95 % interval]: dict."""
    there = {row["name"]: row for row in rows if row["level"] == level}
    best = max(there.values(), key=lambda row: row["right"])
    pair = paired(correct([best]), correct([there["etps"]]))
    over = "{difference:+.1f} [{low:+.1f}, {high:+.1f}]".format(**pair)
    return {"best": TITLES[best["name"]], "right": best["right"], "etps": there["etps"]["right"], "over": over}


def ten():
    """GMACs that *Prune in ten minutes* prints: dict of `dense` and `pruned`."""
    model = timm.create_model("deit_tiny_patch16_224")
    dense = flops.closed_form(model).total
    return {"dense": dense / 1e9, "pruned": flops.closed_form(prune(model, "etps", keep_ratio=0.7)).total / 1e9}


def figure(rows):
    """Accuracy against GMACs: a line a method from the dense model down. → matplotlib Figure"""
    fig, ax = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
    [dense] = [row for row in rows if row["method"] == "dense"]
    for name in SHOWN:
        own = [dense, *(row for row in rows if row["name"] == name)]
        x, y = [row["macs"] / 1e9 for row in own], [100 * row["right"] / row["n"] for row in own]
        method, dashed = name.split(",")[0], name == "tome"
        look = {"color": COLOURS[method], "marker": MARKS[method], "mfc": "white" if dashed else COLOURS[method]}
        ax.plot(x, y, "--" if dashed else "-", label=TITLES[name], **look)
    ax.plot(dense["macs"] / 1e9, 100 * dense["right"] / dense["n"], "D", color=COLOURS["dense"], label="dense", ms=9)
    ax.set(xlabel="GMACs of an image", ylabel="top-1, %")
    ax.legend(loc="lower right")
    return fig
