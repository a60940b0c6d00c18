"""Numbers that a run printed, written down with where they come from.

Chapter: :doc:`/book/ledger`
"""

import datetime
import functools
import json
import os
import platform
import subprocess
import tomllib
from pathlib import Path

import numpy as np
import timm
import torch
from scipy.stats import binomtest, t, ttest_1samp


def save(folder, name, numbers):
    """Write `folder/name.json`, whole or not at all, with the provenance of the run under "run".

    Args:
        folder: where to; made if it is not there.
        name: the file's stem; book pages read `{{ name.… }}` with `-` as `_`.
        numbers: a dict of what json can hold.

    Returns:
        Path of the file.
    """
    path = Path(folder) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({**numbers, "run": provenance()}, indent=1, allow_nan=False) + "\n")
    os.replace(part, path)
    return path


def provenance():
    """dict: date, commit (None outside a Git checkout of tpbook), versions and hardware of this process."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
        "timm": timm.__version__,
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "threads": torch.get_num_threads(),
    }


@functools.cache
def _commit():
    """The commit of tpbook's own checkout, ending in "-dirty" where files differ from it; of no other repository."""
    top = Path(__file__).resolve().parents[2]
    try:
        project = tomllib.loads((top / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"]
    except (OSError, ValueError, KeyError, TypeError):  # not there, or something else
        return None
    if project != "tpbook" or Path(_git(top, "rev-parse", "--show-toplevel") or "/").resolve() != top:
        return None
    return _git(top, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def _git(folder, *command):
    """What Git says there, or None."""
    try:
        ran = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:  # no Git here
        return None
    return ran.stdout.strip() or None


def accuracy(right, n):
    """dict of `right` correct answers out of n: the share and its binomial 95 % interval (Wilson), in percent."""
    low, high = binomtest(right, n).proportion_ci(method="wilson")
    return {"right": right, "n": n, "percent": 100 * right / n, "low": 100 * low, "high": 100 * high}


def paired(ours, theirs):
    """Compare two ways on the same images and seeds.

    Args:
        ours, theirs: (seeds, n) arrays, 1 where an image is classified right; row by row the same seed.

    Returns:
        dict in percentage points: "difference" of the mean accuracies, "spread", its standard deviation over seeds
        (None of one seed), and "low", "high", "p", the 95 % interval and p-value of a t-test over images on their mean
        over seeds; and "side", 1 where ours is ahead and −1 where it is behind: the interval excludes zero and every
        seed agrees. Else 0.
    """
    gain = 100 * (np.asarray(ours, float) - np.asarray(theirs, float))  # (seeds, n)
    by_seed, by_image = gain.mean(axis=1), gain.mean(axis=0)
    low = high = by_image.mean()
    p = 1.0
    if by_image.std() > 0:
        test = ttest_1samp(by_image, 0)
        (low, high), p = test.confidence_interval(0.95), test.pvalue
    spread = by_seed.std(ddof=1) if len(by_seed) > 1 else None
    side = int(low > 0 and (by_seed > 0).all()) - int(high < 0 and (by_seed < 0).all())
    return {"difference": by_image.mean(), "spread": spread, "low": low, "high": high, "p": p, "side": side}


def power(ours, theirs):
    """The smallest true difference, in percentage points, that the t-test of `paired` would find four times of five.

    With the standard error s of the n images' mean difference, at the 5 % level, two-sided, and 80 % power:

        δ = s (t₀.₉₇₅ + t₀.₈₀), quantiles of the t distribution with n − 1 degrees of freedom

    the usual formula, which leaves the far tail out: within 0.03 % of the noncentral t from n = 30 on. That every seed
    agrees, which "side" asks for too, takes more still.

    Args:
        ours, theirs: (seeds, n) arrays as for `paired`.

    Returns:
        float; nan where all images differ alike, so that nothing says how far they scatter.
    """
    by_image = 100 * (np.asarray(ours, float) - np.asarray(theirs, float)).mean(axis=0)  # (n,)
    n, scatter = len(by_image), by_image.std(ddof=1)
    return scatter / n**0.5 * t.ppf((0.975, 0.80), n - 1).sum() if scatter > 0 else np.nan


def sides(pairs, ahead="ahead", behind="behind"):
    """{a keep ratio: what `paired` found} → at which ratios one is ahead, in words."""
    at = {ahead: [], behind: [], "undecided": []}
    for rho, pair in pairs.items():
        at[{1: ahead, -1: behind, 0: "undecided"}[pair["side"]]].append(str(rho))
    return "; ".join(f"{word} at ρ = {', '.join(which)}" for word, which in at.items() if which)


def about_zero(named):
    """{a name: what `paired` found} → in words: whose interval lies above zero, below it, or on both sides."""
    said = {
        "above zero": [name for name, pair in named.items() if pair["low"] > 0],
        "below zero": [name for name, pair in named.items() if pair["high"] < 0],
        "undecided": [name for name, pair in named.items() if pair["low"] <= 0 <= pair["high"]],
    }

    def shown(names):
        if len(names) == len(named):
            return "all"
        return f"{len(names)} of {len(named)}" if len(names) > 5 else ", ".join(names) or "none"

    return "; ".join(f"{side}: {shown(names)}" for side, names in said.items()) + "."


def markdown(table):
    """A data frame for a page, its index as columns."""
    return table.reset_index().to_markdown(index=False, disable_numparse=True)


def percent(correct):
    """Accuracy over an array of 0 and 1, for a table: 97.2 [95.3, 98.3], its 95 % interval."""
    said = accuracy(int(correct.sum()), correct.size)
    return f"{said['percent']:.1f} [{said['low']:.1f}, {said['high']:.1f}]"


def points(comparison, interval=True):
    """What `paired` found, for a table: difference ± spread over seeds, if several, [95 % interval over images]."""
    said = "{difference:+.1f}" + " ± {spread:.1f}" * (comparison["spread"] is not None)
    return (said + " [{low:+.1f}, {high:+.1f}]" * interval).format(**comparison)


def interval(comparison):
    """What `paired` found, for a table: difference [95 % interval over images], in points."""
    return "{difference:+.1f} [{low:+.1f}, {high:+.1f}]".format(**comparison)


def seen(comparison):
    """What `paired` found, for a sentence: "+3.2 [+1.1, +5.3] points", and that it may be chance where it may."""
    said = "{difference:+.1f} [{low:+.1f}, {high:+.1f}] points".format(**comparison)
    return said if comparison["low"] > 0 or comparison["high"] < 0 else f"{said}, not seen here"


def gain(ours, theirs):
    """What `paired` finds, for a table: difference in points, [95 % interval over images], p-value."""
    said = paired(ours, theirs)
    return f"{said['difference']:+.1f} [{said['low']:+.1f}, {said['high']:+.1f}], {probability(said['p'])}"


def probability(p):
    """A p-value as it is printed."""
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.4f}" if p < 0.001 else f"p = {p:.3f}"


def pack(bits):
    """The hexadecimal digits of a string of 0 and 1, one a test image; `correct` reads them."""
    return f"{int(bits, 2):0{-(-len(bits) // 4)}x}"


def rows(folder):
    """The rows of every result file of a folder, in the order of the files' names."""
    return [row for path in sorted(Path(folder).glob("*.json")) for row in json.loads(path.read_text())["rows"]]


def trainings(folder):
    """What `train.run` said of each training behind the result files of a folder, in the order of the files' names."""
    read = [json.loads(path.read_text())["training"] for path in sorted(Path(folder).glob("*.json"))]
    return [training for training in read if training]


def made(folder):
    """Under what the result files of a folder were trained; text for each, "a, b" where they differ.

    Args:
        folder: of result files whose "training" is None, or holds the "recipe", "seconds" and "run" of `train.run`.

    Returns:
        dict: "runs", how many trainings; "minutes" of them together; "images", "epochs", "seeds", "precision";
        "device", "machine", "threads", "torch", "timm", "commit", "date".
    """
    ran = trainings(folder)

    def all_of(part, key):
        return ", ".join(sorted({str(training[part][key]) for training in ran}))

    return {
        "runs": len(ran), "minutes": round(sum(training["seconds"] for training in ran) / 60),
        "images": all_of("recipe", "train_images"), "epochs": all_of("recipe", "epochs"),
        "seeds": all_of("recipe", "seed"), "precision": all_of("recipe", "precision"),
        **{key: all_of("run", key) for key in ("device", "machine", "threads", "torch", "timm", "commit", "date")},
    }  # fmt: skip


def correct(rows, **want):
    """Which test images were right, by the rows of a committed result file that have these values.

    Args:
        rows: list of dicts with "seed", "n" and "correct", n bits as `pack` writes them.
        **want: for example method="evit", keep_ratio=0.5.

    Returns:
        (rows, n) int array of 0 and 1, in the order of the seeds.

    Raises:
        ValueError: no row has them.
    """
    mine = [row for row in rows if all(row[key] == value for key, value in want.items())]
    if not mine:
        raise ValueError(f"no row has {want}")
    mine.sort(key=lambda row: (row["seed"] is not None, row["seed"]))
    return np.array([[int(bit) for bit in f"{int(row['correct'], 16):0{row['n']}b}"] for row in mine])
