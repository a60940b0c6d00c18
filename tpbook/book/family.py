"""The table of all methods that the package has, of which each chapter shows its own part.

Chapter: :doc:`/book/all-together`
"""

import numpy as np

from .looks import LOOKS
from .results import correct, paired, percent, points


def compared(rows, methods, beside="topk"):
    """Some methods out of a `family.json`, each against one other method at the cost nearest to its own.

    Args:
        rows: dicts with "method", "macs", "n" and "correct"; and with "keep_ratio", "options" of `prune`, "trained",
            "start", "data", "seed", and "name" and "level", which tell cells apart, where they say anything.
        methods: names, in the order of the table.
        beside: the other's name. Only rows of the same data, start and training are set beside each other.

    Returns:
        list of pairs, one for every method, setting, start and data: a dict with MACs, top-1 with its 95 % interval,
        and the difference to the other, with the other's MACs; and what `results.paired` found, None without another.
    """
    cells = {}
    for row in sorted(rows, key=lambda row: str(row.get("seed"))):
        where = (row.get("data"), row.get("start"), row.get("trained", False))
        cells.setdefault((row["method"], setting(row), where, row.get("name"), row.get("level")), []).append(row)
    lines = []
    for method in methods:
        for (_, how, where, name, _), mine in [(cell, mine) for cell, mine in cells.items() if cell[0] == method]:
            data, start, trained = where
            title = LOOKS[name].title if name in LOOKS else LOOKS[method].title
            line = {"method": title, "setting": how, "data": data, "start": start}
            line |= {"trained": "yes" if trained else "no", "MACs, 10⁶": f"{_macs(mine):.0f}"}
            line["top-1, %"], pair = percent(_right(mine)), None
            others = [other for cell, other in cells.items() if cell[0] == beside and cell[2] == where]
            if others and method != beside:
                other = min(others, key=lambda other: abs(_macs(other) - _macs(mine)))
                ours, theirs = _right(mine), _right(other)
                pair = paired(ours, theirs if len(theirs) == len(ours) else theirs[:1])
                line[f"− {LOOKS[beside].title}"] = f"{points(pair)} (at {_macs(other):.0f})"
            lines.append(({key: value for key, value in line.items() if value is not None}, pair))
    return lines


def groups(lines):
    """The differences of `compared`, for `plots.forest`.

    Args:
        lines: as `compared` gives them; those without a difference are left out.

    Returns:
        dict: "ATS, trained", or "ATS, nips2017-dev" where the data is named → its colour, and setting → what
        `results.paired` found.
    """
    colours = {look.title: look.colour for look in LOOKS.values()}
    found = {}
    for line, pair in lines:
        about = line.get("data") or {"yes": "trained", "no": "not trained"}[line["trained"]]
        if pair:
            heading = f"{line['method']}, {about}"
            found.setdefault(heading, (colours[line["method"]], {}))[1][line["setting"]] = pair
    return found


def tally(found):
    """What `groups` gave, in words: "*ATS, trained*: 1 of 3 ahead, none behind"."""
    lines = []
    for heading, (_, pairs) in found.items():
        ahead, behind = (sum(pair["side"] == side for pair in pairs.values()) or "none" for side in (1, -1))
        lines.append(f"*{heading}*: {ahead} of {len(pairs)} ahead, {behind} behind")
    return "; ".join(lines)


def setting(row):
    """What a row was pruned by, in words: "r = 8", "ρ = 0.7, proportional = False"."""
    options, ratio = row.get("options") or {}, row.get("keep_ratio")
    said = [f"ρ = {ratio}"] if ratio is not None and "r" not in options else []
    return ", ".join(said + [f"{key} = {value}" for key, value in options.items()]) or "–"


def _macs(rows):
    return np.mean([row["macs"] for row in rows]) / 1e6


def _right(rows):
    return np.concatenate([correct([{"seed": None, **row}]) for row in rows])  # (seeds, n)
