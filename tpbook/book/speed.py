"""What `tpbook.bench` measured, for the pages: the rows of many files in one table, and what they say.

Chapter: :doc:`/book/speed`
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from ..timing.clock import said
from .looks import LOOKS

RATIOS = ("times_dense", "efficiency", "times_eager", "times_explicit", "times_parts")
MODES = {"eager": "eager", "captured": "eager, in a CUDA graph", "compiled": "compiled"}
MODES |= {"graphs": "compiled, in a CUDA graph"}
WIDTHS = {"tiny": "Ti", "small": "S", "base": "B", "large": "L", "huge": "H"}
FAMILIES = {"dinov2": "DINOv2", "dinov3": "DINOv3", "deit3": "DeiT-III", "deit": "DeiT", "vit": "ViT"}
BEFORE = "859bd366e4a1"
"""The last commit whose engine pruned in timm's forward: its rows stand beside today's, and in their place alone where
nothing else was measured."""
SETTING = ["device", "name", "image_size", "dtype", "batch", "mode"]
"""What two rows have in common that may be compared; with method and keep ratio they are the same measurement."""


def read(*folders):
    """The rows of all files of some folders.

    Args:
        folders: of files that `python -m tpbook.bench` wrote.

    Returns:
        DataFrame of the files' columns; of each ratio, such as "times_dense", the median, and "times_dense_low",
        "_high" (its 95 % interval) and "_said" (in words), nan and "" where there is none; "name", timm's, "model", the
        book's name for it, and "width"; "file", and of the run "device", "commit", "date", "torch" and "threads".

    Raises:
        ValueError: no folder holds such a file.
    """
    rows = []
    for path in (path for folder in folders for path in sorted(Path(folder).glob("*.json"))):
        made = json.loads(path.read_text())
        run = {key: made["run"][key] for key in ("device", "machine", "commit", "date", "torch", "threads")}
        run["commit"] = run["commit"] or "not named"  # measured outside a checkout
        rows += [{"file": path.stem, **run, **row} for row in made["rows"]]
    if not rows:
        raise ValueError(f"folders must hold files of tpbook.bench, got {', '.join(map(str, folders))}")
    table = pd.DataFrame(rows)
    for column in RATIOS:
        ratios = [one if isinstance(one, list) else [np.nan] * 3 for one in table.get(column, [None] * len(table))]
        for i, part in enumerate(("", "_low", "_high")):
            table[column + part] = [np.nan if one[i] is None else one[i] for one in ratios]
        table[f"{column}_said"] = ["" if one[0] != one[0] else said(one) for one in ratios]
    table["keep_ratio"] = [tuple(one) if isinstance(one, list) else one for one in table.keep_ratio]
    table["name"] = table.model
    table["width"] = [next((short for word, short in WIDTHS.items() if word in name), name) for name in table.name]
    family = [next((short for word, short in FAMILIES.items() if word in name), name) for name in table.name]
    table["model"] = [name if name == width else f"{name}-{width}" for name, width in zip(family, table.width)]
    return table


def latest(rows, before=BEFORE):
    """Of each measurement the last row; of a mode, those of an older engine only where no other measured that mode.

    Args:
        rows: of `read`.
        before: how the commit of the older engine begins; "" is none.
    """
    old = rows.commit.str.startswith(before) if before else pd.Series(False, rows.index)
    renewed = set(zip(rows.device[~old], rows["mode"][~old]))
    stays = [not past or (device, mode) not in renewed for past, device, mode in zip(old, rows.device, rows["mode"])]
    rows = rows[stays].sort_values(["date", "rounds"], kind="stable")
    return rows.drop_duplicates([*SETTING, "method", "keep_ratio"], keep="last").sort_index()


def changed(rows, before=BEFORE):
    """What two engines did in the same setting on the same device.

    Args:
        rows: of `read`.
        before: how the commit of the older engine begins.

    Returns:
        DataFrame, a row a measurement of both: the setting, "method", "keep_ratio", and of "ms", "times_dense" and
        "efficiency" each "…_before" and "…_now"; empty where nothing was measured by both.
    """
    old = rows.commit.str.startswith(before)
    by = [*SETTING, "model", "method", "keep_ratio"]
    values = ["ms", "times_dense", "efficiency"]
    sides = [part.drop_duplicates(by, keep="last")[[*by, *values]] for part in (rows[old], rows[~old])]
    return sides[0].merge(sides[1], on=by, suffixes=("_before", "_now"))


def pays(rows, by):
    """In how many rows pruning pays: the whole 95 % interval of × dense is above 1.

    Args:
        rows: of `read`; dense ones are left out.
        by: columns to group by.

    Returns:
        DataFrame by these: "rows", "faster" and "slower" (whole intervals above and below 1), "least" and "most"
        (medians).
    """
    rows = rows[rows.method != "dense"]
    rows = rows.assign(faster=rows.times_dense_low > 1, slower=rows.times_dense_high < 1)
    return rows.groupby(by).agg(
        rows=("times_dense", "size"), faster=("faster", "sum"), slower=("slower", "sum"),
        least=("times_dense", "min"), most=("times_dense", "max"),
    )  # fmt: skip


def from_to(values, digits=2):
    """The range of some numbers: "0.52 to 0.69", "0.84" where both ends are printed alike."""
    low, high = (f"{end:.{digits}f}" for end in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def ranges(rows, by, column):
    """The range of a column in each group, in words: "CPU, compiled 1.10 to 1.62; …"; `by` is one column or several."""
    return "; ".join(
        f"{key if isinstance(key, str) else ', '.join(key)} {from_to(part)}"
        for key, part in rows[rows[column].notna()].groupby(by)[column]
    )


def how_many(found):
    """A row of `pays` in words: "none of 12", "all 4", "3 of 8"."""
    faster, rows = int(found.faster), int(found.rows)
    return f"none of {rows}" if not faster else f"all {rows}" if faster == rows else f"{faster} of {rows}"


def reading(rows):
    """Where pruning pays, mode by mode, from the smallest batch to the largest, in words. → str"""
    said_of = []
    for mode, title in MODES.items():
        of_mode = pays(rows[rows["mode"] == mode], "batch")
        batches = [
            f"{how_many(found)} at batch {batch} ({from_to((found.least, found.most))} ×)"
            for batch, found in of_mode.iterrows()
        ]
        said_of += [f"{title}, {', '.join(batches)}"] if batches else []
    return "; ".join(said_of)


def one_ratio(rows):
    """The keep ratio that most settings were measured at, of several the largest."""
    counts = rows[rows.method != "dense"].drop_duplicates([*SETTING, "keep_ratio"]).keep_ratio.value_counts()
    return max(counts[counts == counts.max()].index)


def grid(rows):
    """The fastest and the slowest method of each setting of one mode.

    Args:
        rows: of `read`, of one keep ratio and one mode.

    Returns:
        DataFrame of × dense: a row a width and "fastest" or "slowest", a column an image size and batch; nan where
        nothing was measured.
    """
    found = rows[rows.method != "dense"].groupby(["width", "image_size", "batch"]).times_dense.agg(["max", "min"])
    found = found.rename(columns={"max": "fastest", "min": "slowest"}).stack().unstack(["image_size", "batch"])
    widths = [width for width in WIDTHS.values() if width in found.index.get_level_values(0)]
    return found.reindex([(width, which) for width in widths for which in ("fastest", "slowest")])


def threshold(rows):
    """Between which costs of a forward pruning begins to pay, mode by mode, in words.

    Args:
        rows: of `read`, with "gmacs", those of the dense model's whole batch.

    Returns:
        str: up to which cost no row of `pays` is faster, and from which on all are; a mode that has neither is left
        out.
    """
    said_of = []
    for mode, title in MODES.items():
        found = pays(rows[rows["mode"] == mode], "gmacs").sort_index()
        never = found.index[(found.faster == 0).cummin()]
        always = found.index[(found.faster == found.rows)[::-1].cummin()[::-1]]
        words = [f"none is faster up to {_amount(never.max())} GMACs"] if len(never) else []
        words += [f"all are from {_amount(always.min())} on"] if len(always) else []
        said_of += [f"{title}, {', '.join(words)}"] if words else []
    return "; ".join(said_of)


def _amount(value):
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def table(rows, column, by):
    """A ratio with its interval, a column a method in the book's order, a row a setting and keep ratio.

    Args:
        rows: of `latest`.
        column: of `RATIOS`.
        by: columns that tell the settings apart.
    """
    rows = rows[rows.method != "dense"]
    wide = rows.pivot_table(index=[*by, "keep_ratio"], columns="method", values=f"{column}_said", aggfunc="first")
    return _named(wide.sort_index(ascending=[True] * len(by) + [False])).reset_index()


def short(rows, column, by):
    """The same in short: medians at all keep ratios from the largest on, 0.69/0.95/–. Arguments as for `table`."""
    ratios = sorted(rows.keep_ratio[rows.method != "dense"].unique(), reverse=True)
    lines = {}
    for (method, *setting), part in rows[rows.method != "dense"].groupby(["method", *by]):
        at = part.groupby("keep_ratio")[column].first()
        lines.setdefault(tuple(setting), {})[method] = "/".join(f"{at[r]:.2f}" if r in at else "–" for r in ratios)
    wide = pd.DataFrame(lines.values(), index=pd.MultiIndex.from_tuples(list(lines), names=by)).sort_index()
    return _named(wide).reset_index()


def page(table):
    """A table for the chapter, in Markdown; short names of the types fit a phone."""
    return table.replace({"float32": "fp32", "bfloat16": "bf16"}).to_markdown(index=False, disable_numparse=True)


def _named(wide):
    return (
        wide[[m for m in LOOKS if m in wide]].rename(columns={m: look.title for m, look in LOOKS.items()}).fillna("–")
    )
