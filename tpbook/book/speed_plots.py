"""What the chapter on speed draws of the rows that `tpbook.bench` measured. Needs matplotlib, seaborn.

Chapter: :doc:`/book/speed`
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import TwoSlopeNorm

from . import plots, speed

NAMED = {plots.NAMES[name]: colour for name, colour in plots.COLOURS.items()}


def promise(table):
    """Measured speed over promised speed, both × dense, one mark a setting and a colour a method.

    Args:
        table: DataFrame with "name" (of `plots.NAMES`), "promised" and "times".

    Returns:
        matplotlib Figure.
    """
    fig, ax = plt.subplots(figsize=(4.6, 4.2), layout="constrained")
    marks = {plots.NAMES[name]: mark for name, mark in plots.MARKS.items()}
    for name, part in table.groupby("name"):
        ax.plot(part.promised, part.times, marks[name], color=NAMED[name], label=name, alpha=0.8)
    top = 1.05 * max(table.promised.max(), table.times.max())
    ax.plot([1, top], [1, top], ":", color="black", lw=1)
    ax.set(xlabel="MACs of dense ÷ MACs of pruned", ylabel="time of dense ÷ time of pruned")
    ax.legend()
    return fig


def break_even(rows):
    """Where pruning pays: × dense over width, image size and batch, a panel a mode, with a line around what is above 1.

    Args:
        rows: of `speed.read`, of one keep ratio and one device.

    Returns:
        matplotlib Figure; a cell is blank where nothing was measured.
    """
    grids = {mode: speed.grid(rows[rows["mode"] == mode]) for mode in speed.MODES if (rows["mode"] == mode).any()}
    columns = sorted({column for values in grids.values() for column in values})
    grids = {mode: values.reindex(columns=pd.MultiIndex.from_tuples(columns)) for mode, values in grids.items()}
    tall = [len(values) for values in grids.values()]
    fig, axes = plt.subplots(
        len(grids), figsize=(4.9, 0.26 * sum(tall) + 0.35 * len(grids) + 0.5), height_ratios=tall, squeeze=False,
        sharex=True, layout="constrained",
    )  # fmt: skip
    every = np.concatenate([values.to_numpy().ravel() for values in grids.values()])
    farthest = np.nanmax(np.abs(np.log2(every)))
    norm = TwoSlopeNorm(0, -max(farthest, 0.1), max(farthest, 0.1))
    for ax, (mode, values) in zip(axes[:, 0], grids.items()):
        numbers = values.to_numpy()
        ax.imshow(np.log2(numbers), cmap="PuOr_r", norm=norm, aspect="auto")
        ax.set(title=speed.MODES[mode], yticks=range(len(values)), xticks=range(len(columns)))
        ax.set_yticklabels([f"{width}, {which}" if which == "fastest" else which for width, which in values.index])
        edges = [c for c in range(1, len(columns)) if columns[c][0] != columns[c - 1][0]]
        middle = [(first + last - 1) // 2 for first, last in zip([0, *edges], [*edges, len(columns)])]
        ax.set_xticklabels([f"{batch}\n{size} px" if c in middle else batch for c, (size, batch) in enumerate(columns)])
        ax.grid(False)
        sns.despine(ax=ax, left=True, bottom=True)
        for (r, c), value in np.ndenumerate(numbers):
            if value == value:
                light = abs(np.log2(value)) < 0.6 * farthest
                ax.text(c, r, f"{value:.2f}", ha="center", va="center", color="black" if light else "white")
        _line_at_one(ax, numbers)
        for c in edges:
            ax.axvline(c - 0.5, color="white", lw=4)
    axes[-1, 0].set_xlabel("batch; below it the image size")
    return fig


def _line_at_one(ax, numbers):
    """A line between neighbours of which one is above 1 and the other is not."""
    above = np.where(np.isnan(numbers), np.nan, numbers > 1)
    rows, columns = numbers.shape
    for r in range(rows):
        for c in range(columns):
            if c + 1 < columns and abs(above[r, c] - above[r, c + 1]) == 1:
                ax.plot([c + 0.5, c + 0.5], [r - 0.5, r + 0.5], color="black", lw=2.5, solid_capstyle="butt")
            if r + 1 < rows and abs(above[r, c] - above[r + 1, c]) == 1:
                ax.plot([c - 0.5, c + 0.5], [r + 0.5, r + 0.5], color="black", lw=2.5, solid_capstyle="butt")


def over_batches(rows):
    """× dense over the batch, a panel a model and dtype, a line a method.

    Args:
        rows: of `speed.read`, of one keep ratio, mode and device.

    Returns:
        matplotlib Figure.
    """
    table = rows.assign(panel=rows.model + ", " + rows.dtype, method=rows.method.map(plots.NAMES))
    table = table.rename(columns={"times_dense": "× dense"})
    colours = {method: NAMED[method] for method in table.method.unique()}
    grid = sns.relplot(
        table, x="batch", y="× dense", hue="method", style="method", palette=colours,
        markers={plots.NAMES[name]: mark for name, mark in plots.MARKS.items()}, dashes=False, kind="line", col="panel",
        col_order=sorted(table.panel.unique()), col_wrap=2, height=2, aspect=1.15,
    )  # fmt: skip
    batches = sorted(table.batch.unique())
    grid.set(xscale="log", xticks=batches, xticklabels=batches).set_titles("{col_name}").refline(
        y=1, color="black", lw=1
    )
    grid.figure.set_size_inches(4.9, 4.4)
    sns.move_legend(grid, "upper center", bbox_to_anchor=(0.5, 0.02), ncol=4, title=None)
    return grid.figure


def efficiencies(rows):
    """Efficiency, a mark a setting, a line a method, a panel a device; hue is the batch.

    Args:
        rows: of `speed.read`, eager.

    Returns:
        matplotlib Figure.
    """
    table = rows.assign(method=rows.method.map(plots.NAMES))
    devices = list(dict.fromkeys(table.device))
    order = [name for name in NAMED if (table.method == name).any()]
    fig, axes = plt.subplots(
        len(devices), figsize=(4.9, 0.5 + len(devices) * (0.8 + 0.3 * len(order))), squeeze=False, sharex=True,
        layout="constrained",
    )  # fmt: skip
    for ax, device in zip(axes[:, 0], devices):
        part = table[table.device == device]
        hues = sorted(part.batch.unique())
        sns.stripplot(
            part, x="efficiency", y="method", order=order, hue="batch", hue_order=hues, ax=ax, dodge=True, size=4,
            palette=sns.color_palette("cividis", len(hues)), jitter=False,
        )  # fmt: skip
        ax.axvline(1, color="black", lw=1)
        ax.set(title=device, ylabel="", xlabel="bound's time ÷ pruned model's time")
        ax.legend(title="batch", loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


BY = ["PyTorch, fp32", "PyTorch, bf16", "kernels, fp32", "kernels, bf16"]
"""What runs a stage, and in which dtype."""


def stages(counted):
    """What a stage starts and moves, a bar a method and what runs it.

    Args:
        counted: DataFrame with "method", "by" (of `BY`), "operators" and "times_tokens".

    Returns:
        matplotlib Figure.
    """
    order = counted[counted.by == BY[0]].set_index("method").operators.sort_values().index
    fig, axes = plt.subplots(2, figsize=(4.9, 1 + 0.8 * len(order)), layout="constrained")
    for ax, column, title in zip(axes, ("operators", "times_tokens"), ("operators", "bytes, × those of its tokens")):
        sns.barplot(
            counted, x=column, y="method", order=order, hue="by", hue_order=BY, ax=ax, errorbar=None,
            palette=["#444444", "#AAAAAA", "#1F6FB2", "#8FC1E8"],
        )  # fmt: skip
        ax.set(xlabel=title, ylabel="")
        ax.legend(title=None) if column == "operators" else ax.legend().remove()
    return fig


def growth(table):
    """× dense over the number of tokens, a line a model; dotted what the MACs promise.

    Args:
        table: DataFrame with "model", "tokens", "promised", "times_dense", "times_dense_low" and "times_dense_high".

    Returns:
        matplotlib Figure.
    """
    fig, ax = plt.subplots(figsize=(4.8, 3), layout="constrained")
    for (model, part), colour in zip(table.groupby("model"), sns.color_palette("colorblind")):
        part = part.sort_values("tokens")
        error = [part.times_dense - part.times_dense_low, part.times_dense_high - part.times_dense]
        ax.errorbar(part.tokens, part.times_dense, error, color=colour, marker="o", capsize=2, label=model)
        ax.plot(part.tokens, part.promised, ":", color=colour)
    ax.axhline(1, color="black", lw=1)
    ticks = sorted(table.tokens.unique())
    ax.set(xscale="log", xlabel="patch tokens", ylabel="× dense", xticks=ticks)
    ax.set_xticks(ticks, ticks, minor=False)
    ax.set_xticks([], minor=True)
    ax.legend(title="dotted: promised")
    return fig


def steps(rows):
    """Training steps in dense steps, a panel a device, a mark a method, dtype and batch, with intervals.

    A tick stands where the parts of a step that distils are: a dense step and the teacher's forward together.

    Args:
        rows: of `speed.read`, of mode "training".

    Returns:
        matplotlib Figure.
    """
    rows = rows[rows.method != "dense"]
    rows = rows.assign(
        what=rows.dtype.replace({"float32": "fp32", "bfloat16": "bf16"}) + ", batch " + rows.batch.astype(str)
    )
    devices, order = list(dict.fromkeys(rows.device)), [name for name in plots.NAMES if (rows.method == name).any()]
    count = [rows[rows.device == device].what.nunique() for device in devices]
    fig, axes = plt.subplots(
        len(devices), figsize=(4.9, 0.8 * len(devices) + 0.17 * len(order) * sum(count)), squeeze=False, sharex=True,
        height_ratios=count, layout="constrained",
    )  # fmt: skip
    for ax, device in zip(axes[:, 0], devices):
        part = rows[rows.device == device]
        lines = sorted(part.what.unique())
        for k, (what, colour) in enumerate(zip(lines, sns.color_palette("colorblind"))):
            mine = part[part.what == what]
            y = [order.index(method) + (k - (len(lines) - 1) / 2) * 0.8 / len(lines) for method in mine.method]
            x = 1 / mine.times_dense
            ax.errorbar(
                x, y, xerr=[x - 1 / mine.times_dense_high, 1 / mine.times_dense_low - x], fmt="o", ms=4, color=colour,
                label=what,
            )  # fmt: skip
            ax.plot(x / mine.times_parts, y, "|", color=colour, ms=11, mew=2)
        ax.axvline(1, color="black", lw=1)
        ax.set(title=device, xlabel="time of a step ÷ that of a dense step", ylim=(len(order) - 0.5, -0.5))
        ax.set_yticks(range(len(order)), [plots.NAMES[method] for method in order])
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return fig
