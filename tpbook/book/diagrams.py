"""One pruning stage as a picture: score, choose, and what becomes of the others. Needs matplotlib.

The eight tokens of `tpbook.book.example`, of which three channels are their colour, go through the method's own
reduction, so the colours and numbers below are what it makes of those above.

Chapter: :doc:`/book/notation`
"""

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import to_rgb
from matplotlib.patches import FancyBboxPatch, Rectangle

from ..methods import METHODS, token_counts
from ..methods.choosing import TopK
from ..methods.dynamicvit import Predictor
from ..methods.parts import Call, Place
from ..tokens import Heard, Tokens
from . import example
from .plots import COLOURS

TOKENS = example.X  # (8, 4)
ROW = example.evit(TOKENS, example.QUERY)[0]  # (8,), the attention of the class token, which has the rest
VISIBLE = example.masked(TOKENS, example.SEED)[0].sort().values  # (5,)
TALL = 0.9  # of the bar of the highest score
SIZE = 10.5  # of words and numbers; on a phone, where a column has 342 pixels, 1 point is 0.88
MASKED = "no score: chance, anew for each image", "5 of 8 are visible", "the others are hidden: not there"


def stage(method, dark=False):
    """Draw one stage at ρ = 0.5; at 0.7 where a method cannot go so low, at 1 where the image decides how many stay.

    Args:
        method: a name in `METHODS`, or "masked" for masked fine-tuning, which hides before block 0 as `random` drops.
        dark: whether for a dark page.

    Returns:
        A matplotlib figure, as wide as a phone, without a ground.
    """
    masked = method == "masked"
    how, colour = METHODS["random" if masked else method], COLOURS.get(method, COLOURS["random"])
    ink, colour = ("#e8e8e8", [0.6 * c + 0.4 for c in to_rgb(colour)]) if dark else ("#222222", to_rgb(colour))
    counted = how.chooses.counted
    ratio = 1 if how.chooses.varies and counted else 0.7 if how.reduce.least_ratio else 0.5
    call, kept, others = choice(how, ratio)
    if masked:
        kept, others = VISIBLE, torch.tensor([i for i in range(8) if i not in VISIBLE])
    after, host = reduced(how, torch.cat([kept, others]), len(kept), call)
    known = f": {how.chooses.words}" if how.chooses.words else ""
    line = f"keep {len(kept)} of 8, ρ = {ratio}{known}" if counted else f"{how.chooses.words}, here {len(kept)} of 8"
    say = MASKED if masked else (how.score.words, line, how.reduce.words)

    with plt.rc_context({"text.color": ink, "font.size": SIZE}):
        figure = plt.figure(figsize=(5.2, 6.1))
        figure.patch.set_alpha(0)
        ax = figure.add_axes((0, 0, 1, 1), xlim=(-0.8, 9.6), ylim=(1.0, 13.2), aspect="equal")
        ax.axis("off")
        _place(ax, how.place is Place.BEFORE, colour, ink, "in training only, before block 0" if masked else "here")
        _row(ax, 10.45, range(8), TOKENS, ink)
        _numbers(ax, 10.2, range(8), TOKENS, example.CHANNELS)
        ax.text(-0.6, 8.3, say[0])
        shown = call.scores[0].exp() if isinstance(how.score, Predictor) else call.scores[0]
        for i, (score, tall) in enumerate(zip(shown.tolist(), _heights(shown))):
            if tall is None:
                ax.text(i + 1.1, 7.0, "∞", ha="center", size=14, color=colour)
            else:
                ax.add_patch(Rectangle((i + 0.85, 7.1), 0.5, tall, color=colour, alpha=1 if i in kept else 0.35))
                word = "?" if how.score.drawn else f"{score:.2f}".replace("-", "−")
                ax.text(i + 1.1, 6.65, word, ha="center")
        ax.text(-0.6, 6.0, say[1])
        _row(ax, 5.05, range(8), TOKENS, ink, faint=others.tolist(), outline=(kept.tolist(), colour))
        places = kept.tolist() + [8] * how.reduce.adds
        _row(ax, 3.2, places, after, ink, outline=(places, colour), names=[*kept.tolist(), "Σ"])
        _numbers(ax, 2.95, places, after, example.CHANNELS)
        ax.text(-0.6, 1.1, say[2])
        if how.reduce.rejoins:
            for i in others.tolist():
                ax.text(i + 1.1, 3.55, how.reduce.gone, ha="center", va="center", rotation=90, color=colour)
            return figure
        ends = host[others].tolist() if how.reduce.hosts else [8] * len(others) * how.reduce.adds
        for i, end in zip(others.tolist(), ends):
            look = {"arrowstyle": "->", "color": colour, "lw": 1.5}
            ax.annotate("", (end + 1.1, 3.95), (i + 1.1, 5.0), arrowprops=look)
        if not ends:
            for i in others.tolist():
                ax.text(i + 1.1, 3.5, "×", ha="center", va="center", size=16, color=colour)
    return figure


def choice(method, ratio):
    """Which of `TOKENS` a method keeps where the attention to them is `ROW`, and keys and values are the tokens.

    Returns:
        The `Call` of the stage with its scores, and the tokens that are kept and the others, each in their order: (k,),
        (8 − k,). A score predictor is that of the example; what is drawn or learned otherwise is made up.
    """
    x = torch.cat([torch.zeros(1, 4), TOKENS]).unsqueeze(0)  # (1, 9, 4), the class token first
    every = torch.arange(8).unsqueeze(0)
    row = torch.cat([1 - ROW.sum(dim=0, keepdim=True), ROW]).unsqueeze(0)
    tokens = Tokens(x, (), every, every, heard=Heard(row, x, x.norm(dim=2)))
    score = method.score
    if score.lasting:
        tokens = score.follow(tokens, 1)
    predictor = example.predictor() if isinstance(score, Predictor) else None
    call = Call(tokens, x[:, 1:], prefix=1, stage=0, predictor=predictor, grid=(1, 8), seed=None, skip=0, score=score)
    made_up = score.learned and predictor is None or not method.chooses.counted
    call = call if made_up else call._replace(found=score.find(call))
    [(_, keep, _)] = token_counts(8, [ratio], method)
    if score.drawn:
        return call._replace(scores=torch.full((1, 8), 1 / 8)), torch.tensor([1, 3, 4, 6]), torch.tensor([0, 2, 5, 7])
    call = call._replace(scores=ROW.unsqueeze(0) if made_up else score(call))
    chooses = method.chooses if method.chooses.counted else TopK()  # a threshold between those of ROW
    chosen = chooses(call, keep, lambda scores, k, others=False: scores.topk(8 if others else k).indices, True)
    kept = chosen.order[0, : chosen.kept].sort().values
    return call, kept, torch.tensor([i for i in range(8) if i not in kept])


def reduced(method, order, kept, call):
    """What a method makes of `TOKENS`, those to keep first in `order` (8,).

    Returns:
        (kept + `adds`, 4) tokens, and (8,) the token that carries each.
    """
    left = method.reduce(call.tokens, order.unsqueeze(0), kept, call)
    return left.x[0, 1:], left.host[0]


def _heights(scores):
    """Of bars for scores (8,), list of float, the highest `TALL`; None for a score that is infinite."""
    finite = scores[scores.isfinite()]
    low = finite.min().clamp(max=0)
    return [TALL * float((s - low) / (finite.max() - low)) if s.isfinite() else None for s in scores]


def _place(ax, before, colour, ink, word):
    """The block, and where in it the stage stands."""
    for left, name in ((1.2, "attention"), (5.3, "MLP")):
        ax.add_patch(FancyBboxPatch((left, 11.75), 2.6, 0.7, boxstyle="round,pad=0.05", fc="none", ec=ink))
        ax.text(left + 1.3, 12.08, name, ha="center", va="center")
    at = 0.35 if before else 4.6
    ax.plot([-0.6, 9.0], [12.1, 12.1], color=ink, lw=1, zorder=0, ls=":")
    ax.plot([at, at], [11.6, 12.6], color=colour, lw=4)
    ax.text(at, 12.75, word, ha="center" if word == "here" else "left")


def _row(ax, y, places, tokens, ink, faint=(), outline=((), None), names=None):
    """The class token and patch tokens, 0.7 high, at the places they have in the image."""
    circle = {"boxstyle": "circle,pad=0.2", "fc": "none", "ec": ink}
    ax.text(-0.15, y + 0.33, "cls", ha="center", va="center", bbox=circle)
    for i, rgb, name in zip(places, tokens[:, :3].clamp(0, 1).tolist(), names or range(8)):
        alpha = 0.2 if i in faint else 1
        ax.add_patch(Rectangle((i + 0.75, y), 0.7, 0.7, fc=(*rgb, alpha), ec="none"))
        if i in outline[0]:
            ax.add_patch(Rectangle((i + 0.75, y), 0.7, 0.7, fc="none", ec=outline[1], lw=2.5))
        within = ink if i in faint else "black" if sum(rgb) > 1 else "white"
        ax.text(i + 1.1, y + 0.34, str(name), ha="center", va="center", color=within)


def _numbers(ax, y, places, tokens, channels):
    """A line for each channel, a column for each token."""
    for c, channel in enumerate(channels):
        ax.text(-0.75, y - 0.38 * c, channel, va="center")
        for i, value in zip(places, tokens[:, c].tolist()):
            ax.text(i + 1.1, y - 0.38 * c, f"{value:.2f}", ha="center", va="center")
