"""One pruning stage as a picture: score, choose, and what becomes of the others. Needs matplotlib.

Eight tokens whose three channels are their colour go through the method's own reduction, so the colours below the line
are what it makes of those above it.

Chapter: :doc:`/book/notation`
"""

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import FancyBboxPatch, Rectangle

from ..methods import METHODS
from ..methods.parts import Call, Place
from ..tokens import Tokens
from .plots import COLOURS

# (8, 3): sky, sky, bird, bird, sky, grass, grass, sky
TOKENS = torch.tensor(
    [[0.55, 0.78, 0.95], [0.60, 0.80, 0.95], [0.85, 0.45, 0.15], [0.80, 0.40, 0.20],
     [0.55, 0.78, 0.95], [0.35, 0.65, 0.30], [0.40, 0.70, 0.35], [0.50, 0.75, 0.92]]
)  # fmt: skip
SCORES = torch.tensor([0.10, 0.05, 0.24, 0.30, 0.04, 0.12, 0.06, 0.03])  # of attention; the class token has the rest
KEEP = 4
MASKED = "no score: chance, anew for each image", "4 of 8 are visible", "the others are hidden: not there"


def stage(method):
    """Draw one stage at ρ = 0.5.

    Args:
        method: a name in `METHODS`, or "masked" for masked fine-tuning, which hides before block 0 as `random` drops.

    Returns:
        A matplotlib figure, as wide as a phone.
    """
    masked = method == "masked"
    how, colour = METHODS["random" if masked else method], COLOURS.get(method, COLOURS["random"])
    say = MASKED if masked else (how.score.words, f"keep {KEEP} of 8, ρ = 0.5", how.reduce.words)
    chance = how.score.drawn
    scores = torch.full((8,), 1 / 8) if chance else SCORES
    kept = torch.tensor([1, 3, 4, 6]) if chance else scores.topk(KEEP).indices.sort().values
    others = torch.tensor([i for i in range(8) if i not in kept])
    after, host = reduced(how, torch.cat([kept, others]), scores)

    figure, ax = plt.subplots(figsize=(5.2, 4.6), layout="constrained")
    ax.set(xlim=(-0.7, 9.7), ylim=(-0.9, 8.5), aspect="equal")
    ax.axis("off")
    _place(ax, how.place is Place.BEFORE, colour, "in training only, before block 0" if masked else "here")
    _row(ax, 5.6, range(8), TOKENS)
    ax.text(-0.45, 4.9, say[0], fontsize=10)
    for i, score in enumerate(scores.tolist()):
        ax.add_patch(Rectangle((i + 0.85, 3.35), 0.5, 4.4 * score, color=colour, alpha=1 if i in kept else 0.35))
    ax.text(-0.45, 2.75, say[1], fontsize=10)
    _row(ax, 1.9, range(8), TOKENS, faint=others.tolist(), outline=(kept.tolist(), colour))
    ax.text(-0.45, -0.75, say[2], fontsize=10)
    places = kept.tolist() + [8] * how.reduce.adds
    _row(ax, 0.2, places, after, outline=(places, colour), names=[*(kept + 1).tolist(), "Σ"])
    ends = host[others].tolist() if how.reduce.hosts else [8] * KEEP * how.reduce.adds
    for i, end in zip(others.tolist(), ends):
        ax.annotate("", (end + 1.1, 0.95), (i + 1.1, 1.8), arrowprops={"arrowstyle": "->", "color": colour, "lw": 1.3})
    if not ends:
        for i in others.tolist():
            ax.text(i + 1.1, 0.5, "×", ha="center", va="center", fontsize=15, color=colour)
    return figure


def reduced(method, order, scores):
    """What a method makes of `TOKENS`, those to keep first in `order` (8,), where the attention is `scores` (8,).

    Returns:
        (KEEP + `adds`, 3) tokens, and (8,) the token that carries each.
    """
    every = torch.arange(8).unsqueeze(0)
    tokens = Tokens(TOKENS.unsqueeze(0), (), every, every, heard=scores.unsqueeze(0))
    call = Call(tokens, tokens.x, prefix=0, stage=0, predictor=None, grid=(1, 8), seed=None, skip=0)
    left = method.reduce(tokens, order.unsqueeze(0), KEEP, call)
    return left.x[0], left.host[0]


def _place(ax, before, colour, word):
    """The block, and where in it the stage stands."""
    for left, name in ((1.2, "attention"), (5.3, "MLP")):
        ax.add_patch(FancyBboxPatch((left, 7.1), 2.6, 0.9, boxstyle="round,pad=0.05", fc="none", ec="#777777"))
        ax.text(left + 1.3, 7.55, name, ha="center", va="center", fontsize=10)
    at = 0.35 if before else 4.6
    ax.plot([-0.6, 9.0], [7.55, 7.55], color="#777777", lw=1, zorder=0, ls=":")
    ax.plot([at, at], [6.95, 8.15], color=colour, lw=4)
    ax.text(at, 8.25, word, ha="center" if word == "here" else "left", fontsize=10, color=colour)


def _row(ax, y, places, colours, faint=(), outline=((), None), names=None):
    """The class token and patch tokens, 0.7 high, at the places they have in the image."""
    circle = {"boxstyle": "circle,pad=0.25", "fc": "none", "ec": "#777777"}
    ax.text(-0.05, y + 0.33, "cls", ha="center", va="center", fontsize=9, bbox=circle)
    for i, rgb, name in zip(places, colours.clamp(0, 1).tolist(), names or range(1, 9)):
        alpha = 0.25 if i in faint else 1
        ax.add_patch(Rectangle((i + 0.75, y), 0.7, 0.7, fc=(*rgb, alpha), ec="none"))
        if i in outline[0]:
            ax.add_patch(Rectangle((i + 0.75, y), 0.7, 0.7, fc="none", ec=outline[1], lw=2))
        ink = {"color": "black" if sum(rgb) > 1 else "white", "alpha": 0.5 if i in faint else 1}
        ax.text(i + 1.1, y + 0.34, str(name), ha="center", va="center", fontsize=9, **ink)
