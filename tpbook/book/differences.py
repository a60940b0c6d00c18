"""What differences between a paper and its code are measured with, and the list of them all.

Chapter: :doc:`/book/paper-and-code`
"""

import math
from collections import Counter

import torch

KINDS = ("published", "exact", "measured", "not_measured")


@torch.inference_mode()
def drawn(model, images, seed=0, batch=30):
    """Logits of images (n, C, H, W), the same draws at each call: (n, classes)."""
    torch.manual_seed(seed)
    return torch.cat([model(x) for x in images.split(batch)])


def apart(ours, theirs):
    """How far two sets of logits (n, classes) are apart: dict of the largest change, and how many answers change."""
    return {
        "largest change of a logit": (ours - theirs).abs().max().item(),
        "answers that change, %": 100 * (ours.argmax(1) != theirs.argmax(1)).float().mean().item(),
    }


@torch.no_grad()
def even_odds(model):
    """Give every token the same odds of being kept, the model's ρ: nothing learned, the right share.

    Args:
        model: pruned by a method with learned predictors, which are changed.

    Returns:
        The same model.
    """
    for predictor, ratio in zip(model.score_predictor, model.pruning.ratios):
        predictor.out_conv[-2].weight.zero_()
        predictor.out_conv[-2].bias.copy_(torch.tensor([math.log(ratio), math.log(1 - ratio)]))
    return model


def ten(value):
    """A number as m·10ᵉ, one digit; as two plain digits above 0.01."""
    digits, exponent = f"{value:.0e}".split("e")
    raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{value:.2g}" if value > 0.01 or value == 0 else f"{digits}·10{raised}"


def span(values, form):
    """The least and the most of some numbers, in a format: "0.3 to 1.2"."""
    return f"{min(values):{form}} to {max(values):{form}}".replace("-", "−")


def listed(parts):
    """The list of the chapter, from what its notebooks found.

    Args:
        parts: of each notebook a dict {number of the chapter's section: (what, effect, what tpbook does, kind)}, the
            kind one of `KINDS`; a number may be text, as JSON has it.

    Returns:
        dict: "table" in Markdown, each row leading to its section; "listed", how many; "kinds", how many of each.

    Raises:
        ValueError: a number that is missing or there twice, or an unknown kind.
    """
    rows = sorted(((int(number), *row) for part in parts for number, row in part.items()), key=lambda row: row[0])
    if [row[0] for row in rows] != list(range(1, len(rows) + 1)):
        raise ValueError(f"numbers must be 1, 2, 3, … once each, got {[row[0] for row in rows]}")
    if unknown := {row[-1] for row in rows} - set(KINDS):
        raise ValueError(f"a kind must be one of {', '.join(KINDS)}, got {', '.join(sorted(unknown))}")
    lines = ["| what | effect | tpbook |", "|:--|:--|:--|"]
    lines += [f"| [{number} {what}](#pc-{number}) | {effect} | {ours} |" for number, what, effect, ours, _ in rows]
    counts = Counter(row[-1] for row in rows)
    return {"table": "\n".join(lines), "listed": len(rows), "kinds": {kind: counts[kind] for kind in KINDS}}
