"""Pictures of what methods leave of the book's photographs, as HTML: it follows the page's width and colours.

A figure has a row of panels for each photograph, four or five beside each other, fewer on a phone. Kept patches are in
colour with an outline, gone ones flat (`looks.GONE`, `looks.EDGE`), as in the explorer.

Chapter: :doc:`/book/a-tour-of-keep-ratios`
"""

import base64
import html
import io
from pathlib import Path

import numpy as np
from IPython.display import HTML, display
from PIL import Image

from .looks import EDGE, GONE, LOOKS

SIDE = 224  # units of a panel
STYLE = (
    "<style>.panels{display:grid;gap:.5rem;margin:0 0 .75rem}.panels>div{min-width:0}"
    ".panels svg{display:block;width:100%;height:auto}.panels p{font-size:.85rem;line-height:1.25;margin:.2rem 0 0}"
    "@media(max-width:600px){.panels{grid-template-columns:repeat(var(--few),1fr)!important}}</style>"
)


def stages(photographs, method, ratio):
    """Each photograph, and what is left of it after each stage: list of `Photograph`, name, ρ → HTML."""
    rows = []
    for one in photographs:
        kept = one.state(method, ratio)["kept"]
        left = [_panel(one, "stages", f"stage {s + 1}: {len(k)} patches", _gone(one, k)) for s, k in enumerate(kept)]
        rows.append([_panel(one, "stages", one.label), *left])
    return _figure(rows)


def methods(photographs, names, ratio):
    """Each photograph, and what several methods leave of it in the end, with the model's answer → HTML."""
    rows = []
    for one in photographs:
        states = {name: one.state(name, ratio) for name in names}
        rows.append([_panel(one, "methods", one.label)])
        for name, state in states.items():
            caption = f"{LOOKS[name].title}: {state['says']}" + ("" if state["says"] == one.label else " (wrong)")
            rows[-1].append(_panel(one, "methods", caption, _gone(one, state["kept"][-1])))
    return _figure(rows)


def hosts(photographs, method, ratio, kept=False):
    """Each photograph, and after each stage which token carries which patch → HTML.

    Args:
        photographs, method, ratio: as in `stages`.
        kept: show first what is left in the end.
    """
    rows = []
    for one in photographs:
        state = one.state(method, ratio)
        rows.append([_panel(one, "hosts", one.label)])
        if kept:
            last = state["kept"][-1]
            rows[-1].append(_panel(one, "hosts", f"kept: {len(last)} patches", _gone(one, last)))
        for s, host in enumerate(state["host"]):
            caption = f"stage {s + 1}: {len(np.unique(host))} tokens"
            rows[-1].append(_panel(one, "hosts", caption, _carried(one, host)))
    return _figure(rows)


def hero(photograph, method, ratio):
    """An SVG for a front page: a photograph, and what is left of it after the first and after the last stage → str."""
    kept = photograph.state(method, ratio)["kept"]
    image = f'<image id="photograph" href="{photograph.src}" width="{SIDE}" height="{SIDE}"/>'
    again = '<use href="#photograph"/>'
    shown = [image, again + _gone(photograph, kept[0]), again + _gone(photograph, kept[-1])]
    panels = [f'<g transform="translate({i * (SIDE + 12)})">{panel}</g>' for i, panel in enumerate(shown)]
    wide = len(shown) * (SIDE + 12) - 12
    title = f"<title>{html.escape(photograph.label)}, and what is left of it after the first and the last stage</title>"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {SIDE}">{title}{"".join(panels)}</svg>\n'


def show(figure, folder, name):
    """Write a figure for the pages as `folder/name`, which ends in .html, and show it in a notebook."""
    Path(folder, name).write_text(figure, encoding="utf-8")
    display(HTML(figure))


def _figure(rows):
    """Rows of panels, of one length each, as HTML."""
    wide = len(rows[0])
    grid = f'<div class="panels" style="--few:{2 if wide == 4 else 3};grid-template-columns:repeat({wide},1fr)">'
    return STYLE + "".join(f"{grid}{''.join(row)}</div>" for row in rows) + "\n"


def _panel(photograph, figure, caption, over=""):
    """One square with words below it, which it is called by as well.

    Args:
        photograph: whose picture stands in the first panel of a row, and is used again by the others.
        figure: a name that no other figure of a page has.
        caption: the words.
        over: SVG that lies on the picture; none in the first panel.
    """
    name, words = f"{figure}-{photograph.row['photograph']}", html.escape(caption)
    image = f'<image id="{name}" href="{photograph.src}" width="{SIDE}" height="{SIDE}"/>'
    if over:
        image, words_for_all = f'<use href="#{name}"/>', f"{photograph.label}, {caption}"
    else:
        words_for_all = f"photograph: {caption}"
    svg = f'<svg viewBox="0 0 {SIDE} {SIDE}" role="img" aria-label="{html.escape(words_for_all)}">{image}{over}</svg>'
    return f"<div>{svg}<p>{words}</p></div>"


def _gone(photograph, kept):
    """Patches that are not kept, flat, and the outline of those that are."""
    rows, columns = photograph.seen["grid"]
    alive = np.zeros((rows, columns), bool)
    alive.flat[kept] = True
    return _squares(~alive, GONE) + _edges(alive, EDGE, 2)


def _squares(of, colour):
    """Patches of a mask (rows, columns) in one colour, runs of a row in one stroke."""
    tall, wide = SIDE / of.shape[0], SIDE / of.shape[1]
    path = []
    for r, row in enumerate(of):
        ends = np.flatnonzero(np.diff(np.pad(row, 1).astype(int)))
        for a, b in ends.reshape(-1, 2):
            path.append(f"M{a * wide:g} {r * tall:g}h{(b - a) * wide:g}v{tall:g}h{(a - b) * wide:g}z")
    return f'<path fill="{colour}" shape-rendering="crispEdges" d="{"".join(path)}"/>' if path else ""


def _edges(of, colour, width):
    """Lines wherever neighbours in a grid (rows, columns) differ."""
    tall, wide = SIDE / of.shape[0], SIDE / of.shape[1]
    across = [f"M{(c + 1) * wide:g} {r * tall:g}v{tall:g}" for r, c in np.argwhere(of[:, 1:] != of[:, :-1])]
    down = [f"M{c * wide:g} {(r + 1) * tall:g}h{wide:g}" for r, c in np.argwhere(of[1:] != of[:-1])]
    look = f'fill="none" stroke="{colour}" stroke-width="{width}" stroke-linecap="square"'
    return f'<path {look} d="{"".join(across + down)}"/>'


def _carried(photograph, host):
    """Each group of patches in the mean colour of its pixels, outlined, with a dot where its token stood."""
    rows, columns = photograph.seen["grid"]
    picture = Image.open(io.BytesIO(base64.b64decode(photograph.src.split(",")[1]))).convert("RGB")
    patches = np.asarray(picture.resize((columns, rows), Image.Resampling.BOX)).reshape(-1, 3)  # (N, 3), their means
    painted, dots = [], []
    for token in np.unique(host):
        group = host == token
        red, green, blue = patches[group].mean(axis=0).round().astype(int)
        painted.append(_squares(group.reshape(rows, columns), f"#{red:02x}{green:02x}{blue:02x}"))
        x, y = (token % columns + 0.5) * SIDE / columns, (token // columns + 0.5) * SIDE / rows
        dots.append(f"M{x:g} {y:g}h0")
    dot = f'<path stroke="#E69F00" stroke-width="5" stroke-linecap="round" d="{"".join(dots)}"/>'
    return "".join(painted) + _edges(host.reshape(rows, columns), EDGE, 1) + dot
