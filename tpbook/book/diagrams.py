"""One pruning stage as a picture: score, choose, and what becomes of the others. Needs matplotlib.

Eight tokens whose three channels are their colour go through the method's own reduction, so the colours below the line
are what it makes of those above it.

Chapter: :doc:`/book/notation`
"""

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import FancyBboxPatch, Rectangle

from ..methods import METHODS, token_counts
from ..methods.choosing import TopK
from ..methods.parts import Call, Place
from ..tokens import Heard, Tokens
from .plots import COLOURS

# (8, 3): sky, sky, bird, bird, sky, grass, grass, sky
TOKENS = torch.tensor(
    [[0.55, 0.78, 0.95], [0.60, 0.80, 0.95], [0.85, 0.45, 0.15], [0.80, 0.40, 0.20],
     [0.55, 0.78, 0.95], [0.35, 0.65, 0.30], [0.40, 0.70, 0.35], [0.50, 0.75, 0.92]]
)  # fmt: skip
SCORES = torch.tensor([0.10, 0.05, 0.24, 0.30, 0.04, 0.12, 0.06, 0.03])  # of attention; the class token has the rest
TALL = 1.32  # of the bar of the highest score
MASKED = "no score: chance, anew for each image", "4 of 8 are visible", "the others are hidden: not there"


def stage(method):
    """Draw one stage at ρ = 0.5; at 0.7 where a method cannot go so low, at 1 where the image decides how many stay.

    Args:
        method: a name in `METHODS`, or "masked" for masked fine-tuning, which hides before block 0 as `random` drops.

    Returns:
        A matplotlib figure, as wide as a phone.
    """
    masked = method == "masked"
    how, colour = METHODS["random" if masked else method], COLOURS.get(method, COLOURS["random"])
    counted = how.chooses.counted
    ratio = 1 if how.chooses.varies and counted else 0.7 if how.reduce.least_ratio else 0.5
    call, kept, others = choice(how, ratio)
    after, host = reduced(how, torch.cat([kept, others]), len(kept), call)
    known = f": {how.chooses.words}" if how.chooses.words else ""
    line = f"keep {len(kept)} of 8, ρ = {ratio}{known}" if counted else f"{how.chooses.words}, here {len(kept)} of 8"
    say = MASKED if masked else (how.score.words, line, how.reduce.words)

    figure, ax = plt.subplots(figsize=(5.2, 4.6), layout="constrained")
    ax.set(xlim=(-0.7, 9.7), ylim=(-0.9, 8.5), aspect="equal")
    ax.axis("off")
    _place(ax, how.place is Place.BEFORE, colour, "in training only, before block 0" if masked else "here")
    _row(ax, 5.6, range(8), TOKENS)
    ax.text(-0.45, 4.9, say[0], fontsize=10)
    for i, tall in enumerate(_heights(call.scores[0])):
        if tall is None:
            ax.text(i + 1.1, 3.45, "∞", ha="center", fontsize=11, color=colour)
        else:
            ax.add_patch(Rectangle((i + 0.85, 3.35), 0.5, tall, color=colour, alpha=1 if i in kept else 0.35))
    ax.text(-0.45, 2.75, say[1], fontsize=10)
    _row(ax, 1.9, range(8), TOKENS, faint=others.tolist(), outline=(kept.tolist(), colour))
    ax.text(-0.45, -0.75, say[2], fontsize=10)
    places = kept.tolist() + [8] * how.reduce.adds
    _row(ax, 0.2, places, after, outline=(places, colour), names=[*(kept + 1).tolist(), "Σ"])
    if how.reduce.rejoins:
        for i in others.tolist():
            ax.text(i + 1.1, 0.54, how.reduce.gone, ha="center", va="center", fontsize=7, color=colour)
        return figure
    ends = host[others].tolist() if how.reduce.hosts else [8] * len(others) * how.reduce.adds
    for i, end in zip(others.tolist(), ends):
        ax.annotate("", (end + 1.1, 0.95), (i + 1.1, 1.8), arrowprops={"arrowstyle": "->", "color": colour, "lw": 1.3})
    if not ends:
        for i in others.tolist():
            ax.text(i + 1.1, 0.5, "×", ha="center", va="center", fontsize=15, color=colour)
    return figure


def choice(method, ratio):
    """Which of `TOKENS` a method keeps where the attention to them is `SCORES`, and keys and values are their colours.

    Returns:
        The `Call` of the stage with its scores, and the tokens that are kept and the others, each in their order: (k,),
        (8 − k,). Of what is drawn or learned the scores are made up.
    """
    x = torch.cat([torch.zeros(1, 3), TOKENS]).unsqueeze(0)  # (1, 9, 3), the class token first
    every = torch.arange(8).unsqueeze(0)
    row = torch.cat([1 - SCORES.sum(dim=0, keepdim=True), SCORES]).unsqueeze(0)
    tokens = Tokens(x, (), every, every, heard=Heard(row, x, x.norm(dim=2)))
    score = method.score
    if score.lasting:
        tokens = score.follow(tokens, 1)
    call = Call(tokens, x[:, 1:], prefix=1, stage=0, predictor=None, grid=(1, 8), seed=None, skip=0, score=score)
    learned = score.learned or not method.chooses.counted
    call = call if learned else call._replace(found=score.find(call))
    [(_, keep, _)] = token_counts(8, [ratio], method)
    if score.drawn:
        return call._replace(scores=torch.full((1, 8), 1 / 8)), torch.tensor([1, 3, 4, 6]), torch.tensor([0, 2, 5, 7])
    call = call._replace(scores=SCORES.unsqueeze(0) if learned else score(call))
    chooses = method.chooses if method.chooses.counted else TopK()  # a threshold between those of SCORES
    chosen = chooses(call, keep, lambda scores, k, others=False: scores.topk(8 if others else k).indices, True)
    kept = chosen.order[0, : chosen.kept].sort().values
    return call, kept, torch.tensor([i for i in range(8) if i not in kept])


def reduced(method, order, kept, call):
    """What a method makes of `TOKENS`, those to keep first in `order` (8,).

    Returns:
        (kept + `adds`, 3) tokens, and (8,) the token that carries each.
    """
    left = method.reduce(call.tokens, order.unsqueeze(0), kept, call)
    return left.x[0, 1:], left.host[0]


def _heights(scores):
    """Of bars for scores (8,), list of float, the highest `TALL`; None for a score that is infinite."""
    finite = scores[scores.isfinite()]
    low = finite.min().clamp(max=0)
    return [TALL * float((s - low) / (finite.max() - low)) if s.isfinite() else None for s in scores]


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
