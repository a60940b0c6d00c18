"""The book's pictures: one colour and mark a method everywhere, and token maps on images. Needs matplotlib, seaborn.

Chapter: :doc:`/book/notation`
"""

import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
from IPython.display import Image, display
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from .. import data
from .looks import EDGE, GONE, LOOKS

COLOURS = {name: look.colour for name, look in LOOKS.items()}
MARKS = {name: look.mark for name, look in LOOKS.items()}
NAMES = {name: look.title for name, look in LOOKS.items()}
WIDE, SIZE = 5.2, 10
"""A figure's inches and its text's points, at most and at least: 9 px where a phone's column has 342."""
DARK, LIGHT = "#121212", "#ced6dd"  # ground and text of the theme's dark pages


def style():
    """Set the book's look for every figure that follows."""
    sizes = dict.fromkeys((
        "font.size", "axes.titlesize", "axes.labelsize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize",
        "legend.title_fontsize", "figure.titlesize", "figure.labelsize",
    ), SIZE)  # fmt: skip
    sns.set_theme(context="notebook", style="ticks", rc={
        "figure.dpi": 100, "figure.figsize": (WIDE, 3.2), "savefig.dpi": 150, "savefig.bbox": "tight",
        "savefig.pad_inches": 0.05, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "axes.facecolor": "none", "grid.alpha": 0.3, "legend.frameon": False, "svg.hashsalt": "tpbook", **sizes,
    })  # fmt: skip


def save(figure, folder, name):
    """Write a figure for the pages as `folder/name`, ending .svg (lines) or .jpg (photographs).

    The book's pages read it from there, with a text alternative of their own. A notebook shows the JPEG itself, which
    weighs less than the figure would. No figure is wider than `WIDE`, no text smaller than `SIZE`, so that both can be
    read on a phone. Lines have no ground, and dark pages invert them (`book/static/book.css`); photographs lie on the
    ground of a dark page.
    """
    for text in figure.findobj(Text):
        text.set_fontsize(max(text.get_fontsize(), SIZE))
    for _ in range(10):  # a narrower one is laid out anew
        figure.draw_without_rendering()
        over = figure.get_tightbbox().width + 2 * plt.rcParams["savefig.pad_inches"] - WIDE
        if over < 0.01:
            break
        figure.set_figwidth(max(figure.get_figwidth() - over, WIDE / 2))
    if name.endswith(".svg"):
        figure.savefig(f"{folder}/{name}", metadata={"Date": None}, facecolor="none")
    else:
        for text in figure.findobj(Text):
            text.set_color(LIGHT)
        look = {"quality": 80, "optimize": True, "progressive": True}
        figure.savefig(f"{folder}/{name}", pil_kwargs=look, facecolor=DARK)
        plt.close(figure)
        display(Image(f"{folder}/{name}"))


def image_of(x, mean, std):
    """A normalised (C, H, W) tensor back as an (H, W, 3) array in [0, 1]."""
    x = x.permute(1, 2, 0).numpy() * np.array(std) + np.array(mean)
    return np.broadcast_to(x, (*x.shape[:2], 3)).clip(0, 1)


def examples(model, profile, chosen=None):
    """A few images to draw: digits, or photographs whose licence lets them be shown.

    Args:
        model: a timm model, for its input size and normalisation.
        profile: "digits" or "imagenette".
        chosen: which, by their numbers in the profile's test images; None takes four that are always the same.

    Returns:
        (n, C, H, W) tensor for the model, list of (H, W, 3) arrays to draw, list of captions, credits in Markdown.
    """
    if profile == "digits":
        test = data.digits("test")
        chosen = chosen or [int((test.labels == label).nonzero()[3]) for label in (3, 5, 8, 2)]
        x, (mean, std) = test.images[chosen], ([data.MEAN], [data.STD])
        captions = [f"a {int(test.labels[i])}" for i in chosen]
        credits = "Digits of scikit-learn's digits set, on this book's own canvases."
    else:
        pictures = data.nips2017_dev(data.eval_transform(model))
        chosen = chosen or [7, 175, 283, 883]
        mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
        x, captions = torch.stack([pictures[i][0] for i in chosen]), [data.class_name(pictures[i][1]) for i in chosen]
        rows, files = data.attribution(), [Path(pictures.samples[i][0]) for i in chosen]
        rows = [rows[f"{file.parent.name}/{file.name}"] for file in files]
        credits = "; ".join(
            f"{caption}: [photograph]({row['landing_url']}) by [{row['author']}]({row['author_profile']}), "
            f"[CC BY 2.0]({row['license']})" for caption, row in zip(captions, rows)
        )  # fmt: skip
        credits = f"From top to bottom: {credits}. Cropped, and drawn over, by us."
    return x, [image_of(image, mean, std) for image in x], captions, credits


def show_kept(ax, image, kept, grid, title=""):
    """Draw an image, the patches that are gone in a flat grey, those that are kept outlined.

    Args:
        ax: matplotlib axes.
        image: (H, W, 3) in [0, 1].
        kept: (n,) patch indices; negative ones (fused tokens) have no place and are left out.
        grid: (rows, columns) of patches.
        title: above the picture.
    """
    alive = np.zeros(grid[0] * grid[1], bool)
    alive[[int(i) for i in kept if i >= 0]] = True
    ax.imshow(np.where(_enlarge(alive.reshape(grid), image.shape)[..., None], image, to_rgb(GONE)))
    _outline(ax, alive.reshape(grid), image.shape, 0.9)
    _frame(ax, title)


def show_hosts(ax, image, host, grid, title=""):
    """Draw which token carries which patch: each group of patches in the mean colour of its image, outlined.

    Args:
        ax, image, grid, title: as in `show_kept`.
        host: (N,) the patch whose token carries each patch.
    """
    host = np.asarray(host)
    groups = _enlarge(host.reshape(grid), image.shape)
    flat = image.copy()
    for h in np.unique(host):
        flat[groups == h] = image[groups == h].mean(axis=0)
    ax.imshow(flat)
    _outline(ax, host.reshape(grid), image.shape, 0.6)
    rows, columns = grid
    tall, wide = image.shape[0] / rows, image.shape[1] / columns
    for h in np.unique(host):  # a dot where the token itself was
        ax.plot((h % columns + 0.5) * wide - 0.5, (h // columns + 0.5) * tall - 0.5, ".", color="#E69F00", ms=3)
    _frame(ax, title)


def _outline(ax, of, shape, width):
    """Lines wherever neighbours in a grid (rows, columns) differ, on an image of a shape (H, W, 3)."""
    size = np.array([shape[1] / of.shape[1], shape[0] / of.shape[0]])  # of a patch
    across = [((c + 1, r), (c + 1, r + 1)) for r, c in np.argwhere(of[:, 1:] != of[:, :-1])]
    down = [((c, r + 1), (c + 1, r + 1)) for r, c in np.argwhere(of[1:] != of[:-1])]
    ax.add_collection(LineCollection(np.array(across + down).reshape(-1, 2, 2) * size - 0.5, colors=EDGE, lw=width))


def _enlarge(patches, shape):
    rows = np.arange(shape[0]) * patches.shape[0] // shape[0]
    columns = np.arange(shape[1]) * patches.shape[1] // shape[1]
    return patches[rows][:, columns]


def _frame(ax, title):
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(False)
    sns.despine(ax=ax, left=True, bottom=True)
    wide = ax.figure.get_figwidth() / ax.get_subplotspec().get_gridspec().ncols  # inches
    lines = [textwrap.fill(line, int(wide * 72 / (0.55 * SIZE))) for line in title.split("\n")]
    ax.set_title("\n".join(lines))


def intervals(ax, x, said, what, **look):
    """Draw points with their intervals.

    Args:
        ax: matplotlib axes.
        x: (n,) where they are.
        said: n dicts with "low", "high" and `what`, as `results.accuracy` and `results.paired` give them.
        what: "percent" or "difference".
        **look: of `Axes.errorbar`: label, color, marker, ls.
    """
    y = np.array([one[what] for one in said])
    error = [y - [one["low"] for one in said], [one["high"] for one in said] - y]
    ax.errorbar(x, y, error, **{"ms": 5, "lw": 1.2, "capsize": 2, **look})


def forest(groups, label="percentage points"):
    """Draw differences with their intervals, one a line, on either side of none.

    Args:
        groups: heading → line → what `results.paired` found; or heading → (colour, that dict).
        label: of the axis.

    Returns:
        A matplotlib figure, as wide as a phone.
    """
    lines = [(heading, line) for heading in groups for line in (None, *_of(groups[heading])[1])]
    fig, ax = plt.subplots(figsize=(5, 0.6 + 0.25 * len(lines)), layout="constrained")
    for y, (heading, line) in enumerate(lines):
        colour, found = _of(groups[heading])
        if line is None:
            box = {"fc": "white", "ec": "none", "pad": 1}  # over the line at zero
            ax.text(0.01, y, heading, transform=ax.get_yaxis_transform(), va="center", size=10, weight="bold", bbox=box)
        else:
            said = found[line]
            error = [[said["difference"] - said["low"]], [said["high"] - said["difference"]]]
            ax.errorbar(said["difference"], y, xerr=error, color=colour, marker="o", ms=5, lw=1.4, capsize=2)
    ax.axvline(0, color="black", lw=0.8)
    ax.set(ylim=(len(lines) - 0.4, -0.6), xlabel=label, yticks=range(len(lines)))
    ax.set_yticklabels([line or "" for _, line in lines], size=10)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    return fig


def _of(group):
    return group if isinstance(group, tuple) else ("black", group)


def figure(rows, columns, size=2.0):
    """A grid of square axes, `size` inches each or as many as fit. → figure, (rows, columns) array of axes."""
    size = min(size, WIDE / columns)
    tall = size + 0.35  # a title of two lines
    return plt.subplots(rows, columns, figsize=(size * columns, tall * rows), squeeze=False, layout="constrained")
