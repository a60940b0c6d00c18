"""The ledger: every claim of the papers beside what this book measured. `make ledger` writes book/ledger.csv.

`book/claims.csv` holds the claims and how each can be tested, `notebooks/results/` what was measured. The status of a
claim follows from the two by these rules, and from nothing else:

- MACs and parameters: `equal` where the closed form is within half a printed digit (0.03 G for a digitised MACs figure),
  else `not seen`, and the claim must carry a cause.
- Speed, as the ratio to the dense row of the same table: where the 95 % interval of ours lies above 1, `equal` within 10 % of
  the published ratio and `same trend` beyond; `contradicted` where it lies below 1, `not seen` where it holds 1. So too for two
  other rows that a claim compares. A figure without a dense row is read as ratios to the slowest row of the same model in it:
  our choice.
- Direction, "`ours` is better than `against`": on the same test images `same trend` where the 95 % interval of the mean
  difference excludes zero on the claimed side and every seed agrees, `contradicted` likewise on the other side, else
  `not seen`. A claim of no difference is `contradicted` where the interval excludes zero, `same trend` where it holds zero
  and stays within one point of it, else `not seen`.
- Any other accuracy: read from an ImageNet run where `notebooks/results/imagenet/` holds one of that model, method, blocks,
  ratio, start and epochs: `equal` where the published value lies in its 95 % interval, else `not seen`. Without one
  `needs ImageNet`.
- `not covered`: a method that this book does not have, a speed with nothing beside it, or a finding that it has no test for.
  The row says why.

The `power` of a row that is `not seen` is what it could have shown. Of a direction: the smallest true difference, in points,
that the same t-test on as many images finds four times of five; that all seeds agree takes more still, and where ours is larger
it is they that disagree. Of a speed: the ratio from which on an interval as wide as ours lies above 1. A cost is exact and has
none.
"""

import csv
import itertools
import json
import re
import sys
from collections import Counter
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import timm
import torch

import tpbook
from tpbook.book import plots, results

TOP = Path(__file__).resolve().parent.parent
CLAIMS, LEDGER, RESULTS = TOP / "book" / "claims.csv", TOP / "book" / "ledger.csv", TOP / "notebooks" / "results"
STATUSES = ("equal", "same trend", "not seen", "contradicted", "needs ImageNet", "not covered")
WOOF = "make row ROW={row} OF=imagewoof-gpu"
SETTINGS = {  # (result file or folder of them, test images): what a reader sees, and how a row is made again
    ("digits/matrix", "test"): ("digits, {seeds}", "make matrix"),
    ("digits/ablations", "test"): ("digits, {seeds}", "make ablations"),
    ("digits/backbones", "test"): ("digits, {seeds}", "make backbones"),
    ("imagewoof-gpu", "test"): ("Imagewoof test (never seen), DeiT-Ti, H100, {seeds}", WOOF),
    ("imagewoof-gpu", "val"): ("Imagewoof val (seen in pretraining alone), DeiT-Ti, H100, {seeds}", WOOF),
    ("imagenette", "test"): ("Imagenette, DeiT-Ti, {seeds}", "make row ROW={row}"),
    ("imagenette", "nips"): ("nips2017-dev, DeiT-Ti", "make row ROW={row}"),
}  # fmt: skip
MODELS = {  # timm's name → what a reader sees; "DeiT": which, the paper does not say
    "deit_tiny_patch16_224": "DeiT-Ti", "deit_small_patch16_224": "DeiT-S", "deit_base_patch16_224": "DeiT-B", "DeiT": "DeiT",
    "deit_256_patch16_224": "DeiT-256", "lvvit_t": "LV-ViT-T", "lvvit_s": "LV-ViT-S", "lvvit_m": "LV-ViT-M",
    "t2t_vit_7": "T2T-ViT-7", "t2t_vit_10": "T2T-ViT-10", "t2t_vit_12": "T2T-ViT-12", "t2t_vit_14": "T2T-ViT-14",
    "t2t_vit_19": "T2T-ViT-19", "t2t_vit_24": "T2T-ViT-24", "t2t_vit_t_14": "T2T-ViTt-14", "t2t_vit_t_19": "T2T-ViTt-19",
    "t2t_vit_t_24": "T2T-ViTt-24", "ps_vit_ti_14": "PS-ViT-Ti/14", "ps_vit_b_10": "PS-ViT-B/10", "ps_vit_b_14": "PS-ViT-B/14",
    "ps_vit_b_18": "PS-ViT-B/18", "convnext_tiny": "ConvNeXt-T", "convnext_small": "ConvNeXt-S", "convnext_base": "ConvNeXt-B",
    "swin_tiny_patch4_window7_224": "Swin-T", "swin_small_patch4_window7_224": "Swin-S", "swin_base_patch4_window7_224": "Swin-B",
}  # fmt: skip
PAGE = {  # what book/imagenet.md trains: model → methods
    **{f"deit_{size}_patch16_224": ("dense", "dynamicvit", "evit", "dtps", "etps") for size in ("tiny", "small", "base")},
    "lvvit_s": ("dynamicvit",), "lvvit_m": ("dynamicvit",),
}  # fmt: skip
UNITS = {"MACs": "G", "params": "M", "top-1": "%", "top-5": "%", "images/s": "images/s", "finding": ""}
CONFIG = ("model", "image_size", "method", "fuse", "at", "keep_ratio")


def claims():
    """The rows of book/claims.csv as dicts of text."""
    with CLAIMS.open(newline="") as file:
        return list(csv.DictReader(file))


@cache
def measured(name):
    """The rows of a result file, or of a folder of them, each with the file it stands in."""
    paths = [RESULTS / f"{name}.json"] if (RESULTS / f"{name}.json").exists() else sorted((RESULTS / name).glob("*.json"))
    return [{"data": "test", **row, "file": path} for path in paths for row in json.loads(path.read_text())["rows"]]


def parts(text):
    """`FILE; key=value; …` → the file and a dict of what is asked of its rows, as text; for each side of a ` minus `."""
    for selector in text.split(" minus "):
        name, *pairs = (part.strip() for part in selector.split(";"))
        yield name, {"select": "own", "trained": "true", "data": "test"} | dict(pair.split("=", 1) for pair in pairs)


def select(text):
    """`FILE; key=value; …` → (seeds, n) array of 0 and 1, and the files; `a|b` averages, ` minus ` subtracts."""
    total, files = 0.0, []
    for sign, (name, want) in zip(itertools.chain([1], itertools.repeat(-1)), parts(text)):
        want = {key: [_value(v) for v in value.split("|")] for key, value in want.items()}
        cells = [dict(zip(want, one)) for one in itertools.product(*want.values())]
        total = total + sign * np.mean([results.correct(measured(name), **cell) for cell in cells], axis=0)
        files += [r["file"] for r in measured(name) if any(all(r[k] == v for k, v in cell.items()) for cell in cells)]
    return total, sorted(set(files))


def _value(text):
    if text in ("true", "false"):
        return text == "true"
    try:
        return float(text)
    except ValueError:
        return text


def direction(claim):
    """Status of a claim that one way is better than another, ours in words, the files, its power, and the setting."""
    (ours, files), (theirs, more) = select(claim["ours"]), select(claim["against"])
    p = results.paired(ours, theirs)
    by_seed = (ours - theirs).mean(axis=1)
    if claim["relation"] == "=":
        near = "same trend" if -1 <= p["low"] and p["high"] <= 1 else "not seen"
        status = near if p["low"] <= 0 <= p["high"] else "contradicted"
    else:
        status = {1: "same trend", -1: "contradicted", 0: "not seen"}[p["side"]]
    seeds = f", {(by_seed > 0).sum()} of {len(by_seed)} seeds ahead" if len(by_seed) > 1 else ""
    said = (
        f"{p['difference']:+.1f} points [{p['low']:+.1f}, {p['high']:+.1f}], {results.probability(p['p'])}, "
        f"n = {ours.shape[1]}{seeds}"
    )
    power = f"{results.power(ours, theirs):.1f} points" if status == "not seen" else ""
    return status, said, sorted({*files, *more}), power, tested_on(claim, len(by_seed))


def configuration(claim):
    """What a row of cost-and-speed.json is found by."""
    return tuple(claim[key] for key in CONFIG)


def dense(config):
    """The configuration of the same model unpruned."""
    return (*config[:2], "dense", "", "", "1.0")


@cache
def counted():
    """Configuration → its row of results/cost-and-speed.json, timed beside its own dense model."""
    counts = json.loads((RESULTS / "cost-and-speed.json").read_text())
    return {configuration(row): row for row in counts["rows"]}


@cache
def compared():
    """(Configuration, that of what it was timed beside) → the row of times, of those that were not timed beside dense."""
    counts = json.loads((RESULTS / "cost-and-speed.json").read_text())
    return {(configuration(row), configuration(row["beside"])): row for row in counts["compared"]}


def ours(claim):
    """Whether this book has the claim's model and method."""
    return claim["model"] in MODELS and claim["method"] in ("dense", *tpbook.METHODS)


@cache
def backbone(model, image_size, device="meta"):
    """The model of a claim for that size, dense; with random weights on a device, else to be counted alone."""
    with torch.device(device):
        return timm.create_model(model, **({} if image_size == "224" else {"img_size": int(image_size)})).eval()


@contextmanager
def pruned(claim, device="meta"):
    """The model of a claim, as `backbone` gives it, pruned as the claim says while somebody looks at it."""
    model = backbone(claim["model"], claim["image_size"], device)
    if claim["method"] == "dense":
        yield model
        return
    options = {"fuse": claim["fuse"] == "True"} if claim["fuse"] else {}
    if claim["at"]:
        options["at"] = tuple(map(int, claim["at"].split()))
    tpbook.prune(model, claim["method"], keep_ratio=float(claim["keep_ratio"]), **options)
    try:
        yield model
    finally:
        tpbook.unprune(model)


def cost(claim):
    row = counted()[configuration(claim)]
    value, unit = (row["gmacs"], "G") if claim["quantity"] == "MACs" else (row["params"], "M")
    digitised = claim["quantity"] == "MACs" and claim["tag"] == "D"
    slack = 0.03 if digitised else 0.5 * 10 ** -int(claim["decimals"]) + 1e-9
    status = "equal" if abs(value - float(claim["value"])) <= slack else "not seen"
    return status, f"{value:.3f} {unit}", [RESULTS / "cost-and-speed.json"]


def reference(claim, rows):
    """The row that a row of images a second is compared with: the one that `against` names, else the dense one; or None."""
    if claim["quantity"] != "images/s" or claim["method"] == "dense":
        return None
    want = {key: claim[key] for key in ("paper", "table", "model", "image_size", "quantity", "source")} | {"method": "dense"}
    want |= dict(pair.split("=", 1) for pair in claim["against"].split("; ") if pair)
    found = [row for row in rows if want.items() <= row.items() and row != claim]
    return found[0] if found else None


def timed(claim, other=None):
    """The row of times of a claim, beside its own dense model or beside another row."""
    return compared()[configuration(claim), configuration(other)] if other else counted()[configuration(claim)]


def speed(claim, published, other=None):
    """As `cost`, and its power; `other` is the row that the claim compares with, where that is not its own dense model."""
    row = timed(claim, other)
    if row["low"] > 1:
        status = "equal" if abs(row["times"] / published - 1) <= 0.1 else "same trend"
    else:
        status = "contradicted" if row["high"] < 1 else "not seen"
    said = f"{row['times']:.2f} × {beside(other)} [{row['low']:.2f}, {row['high']:.2f}]"
    power = f"{row['times'] / row['low']:.2f} ×" if status == "not seen" else ""
    return status, said, [RESULTS / "cost-and-speed.json"], power


def beside(other):
    """What a speed is compared with, in words."""
    return "dense" if other is None else "dense " * (other["method"] == "dense") + subject(other)


@cache
def imagenet_runs():
    """The ImageNet results that somebody has copied to results/imagenet/."""
    return [(path, json.loads(path.read_text())) for path in sorted((RESULTS / "imagenet").glob("*.json"))]


def trainable(claim):
    """Whether a run of the kind that book/imagenet.md has measures it: not top-5, other image sizes or ablations."""
    plain = claim["claim"] in ("", "ρ by its cost", "ρ and blocks by its cost") or re.search(r"\d+ epochs", claim["claim"])
    return claim["quantity"] == "top-1" and claim["image_size"] == "224" and bool(plain)


def on_imagenet(claim):
    """The ImageNet run of this configuration, start and number of epochs, or None."""
    if not trainable(claim):
        return None
    epochs = re.search(r"(\d+) epochs", claim["claim"])
    start = "random" if "from scratch" in claim["claim"] else "pretrained"
    for path, result in imagenet_runs():
        r = result["recipe"]
        blocks = " ".join(map(str, r["at"] or (3, 6, 9))) if r["method"] and claim["at"] else ""
        fuse = str(r["options"].get("fuse", True)) if r["method"] == "evit" else ""
        ratio = f"{r['keep_ratio'] if r['method'] else 1.0}"
        if (r["model"], r["method"] or "dense", fuse, blocks, ratio, r["start"], r["epochs"]) == (
            claim["model"], claim["method"], claim["fuse"], claim["at"], claim["keep_ratio"], start, int(epochs[1]) if epochs else 30,
        ):  # fmt: skip
            return path, result["accuracy"]
    return None


def accuracy(claim):
    run = on_imagenet(claim)
    if run is None:
        return "needs ImageNet", "", []
    path, a = run
    rounding = 0.5 * 10 ** -int(claim["decimals"])
    inside = a["low"] - rounding <= float(claim["value"]) <= a["high"] + rounding
    return ("equal" if inside else "not seen"), f"{a['percent']:.1f} % [{a['low']:.1f}, {a['high']:.1f}]", [path]


def subject(claim):
    """What a claim is of: model, size, method and ratio."""
    where = [MODELS.get(claim["model"], claim["model"]) + (f" at {claim['image_size']} px" if claim["image_size"] not in ("", "224") else "")]
    if claim["method"] not in ("", "dense"):
        where.append(plots.NAMES.get(claim["method"], claim["method"]) + (", no fusion" if claim["fuse"] == "False" else ""))
    if claim["keep_ratio"] not in ("", "1.0"):
        where.append(f"ρ = {claim['keep_ratio']}" + (f" at {claim['at'].replace(' ', ', ')}" if claim["at"] not in ("", "3 6 9") else ""))
    return ", ".join(w for w in where if w)


def words(claim):
    """A claim as the ledger says it."""
    if claim["quantity"] == "finding":
        return claim["claim"]
    return f"{claim['quantity']}: {subject(claim)}" + (f"; {claim['claim']}" if claim["claim"] else "")


def entry(claim, rows):
    """One row of the ledger."""
    published = f"{float(claim['value']):.{claim['decimals'] or 0}f} {UNITS[claim['quantity']]}".strip() if claim["value"] else ""
    setting, status, said, files, power = "", None, "", [], ""
    if claim["ours"]:
        status, said, files, power, setting = direction(claim)
    elif not ours(claim) or claim["quantity"] == "finding":
        status = "not covered"
    elif claim["quantity"] in ("MACs", "params"):
        status, said, files = cost(claim)
        setting = "closed form"
    elif claim["quantity"] == "images/s":
        other, status = reference(claim, rows), "not covered"
        if other:
            ratio, other = float(claim["value"]) / float(other["value"]), None if configuration(other) == dense(configuration(claim)) else other
            published += f" ({ratio:.2f} × {beside(other)})"
            status, said, files, power = speed(claim, ratio, other)
            setting = f"CPU, {timed(claim, other)['threads']} threads, float32"
    else:
        status, said, files = accuracy(claim)
        setting = "ImageNet"
    return {
        "paper": claim["paper"], "table": claim["table"], "claim": words(claim), "published": published, "tag": claim["tag"],
        "source": claim["source"], "ours": said, "setting": setting, "status": status, "power": power,
        "results": " ".join(str(path.relative_to(TOP)) for path in files), "command": command(claim, files), "why": why(claim, status),
    }  # fmt: skip


def setting_of(claim):
    """The row of SETTINGS of a claim of direction."""
    name, want = next(parts(claim["ours"]))
    return SETTINGS[name, want["data"]]


def tested_on(claim, seeds):
    """Data, how many seeds, starts, and whether anything was trained, of a claim of direction."""
    sides = [*parts(claim["ours"]), *parts(claim["against"])]
    starts = dict.fromkeys(want["start"] for name, want in sides if "start" in want and name != "digits/ablations")
    started = f", {' and '.join(starts)} start" if starts else ""
    said = setting_of(claim)[0].format(seeds=f"{seeds} seed{'s' * (seeds > 1)}")
    return said + started + (", not trained" if all(want["trained"] == "false" for _, want in sides) else "")


def command(claim, files):
    """What makes the result files again."""
    if claim["ours"]:
        return "; ".join(dict.fromkeys(setting_of(claim)[1].format(row=path.stem) for path in files))
    if trainable(claim) and claim["method"] in PAGE.get(claim["model"], ()):
        return "as in book/imagenet.md"
    return "make cost" if files else ""


def why(claim, status):
    """What explains a status that is not plain from the numbers."""
    if claim["cause"] or status != "not covered":
        return claim["cause"]
    return "the row that the others are compared with" if claim["quantity"] == "images/s" else "no test of it here"


def ledger():
    """Every claim with its status, in the order of book/claims.csv: a list of dicts of text."""
    rows = claims()
    return [entry(claim, rows) for claim in rows]


def write():
    entries = ledger()
    with LEDGER.open("w", newline="") as file:
        writer = csv.DictWriter(file, entries[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(entries)
    print(", ".join(f"{n} {status}" for status, n in Counter(e["status"] for e in entries).most_common()))


def compare(path, folder):
    """Print how far a row that was run again is from the one in that folder of notebooks/results.

    A figure has to lie in the committed interval even where it was trained on fewer images, or tested on others, since only a
    part of the data was there: the line says so. → whether every figure does.
    """
    again, before = (json.loads(file.read_text()) for file in (Path(path), RESULTS / folder / Path(path).name))
    keys = ("method", "keep_ratio", "select", "trained", "data")
    committed, whole = {tuple(row[key] for key in keys): row for row in before["rows"]}, True
    if again["training"]:
        now, was = again["training"]["images_seen"], before["training"]["images_seen"]
        print(f"images seen in training: {now}" + f"; the committed row {was}, so a part of the data is missing here" * (now < was))
    for row in again["rows"]:
        was, now = (results.accuracy(r["right"], r["n"]) for r in (committed[tuple(row[key] for key in keys)], row))
        inside = was["low"] <= now["percent"] <= was["high"]
        whole &= inside
        print(f"{row['method']} ρ = {row['keep_ratio']} {row['select']}, {row['data']}: {now['percent']:.1f} %, "
              f"{'inside' if inside else 'OUTSIDE'} the committed {was['percent']:.1f} [{was['low']:.1f}, {was['high']:.1f}]"
              + f"; n = {now['n']}, the committed n = {was['n']}" * (now["n"] != was["n"]))  # fmt: skip
    return whole


if __name__ == "__main__":
    if sys.argv[1:2] == ["compare"]:
        sys.exit(not compare(*sys.argv[2:]))
    write()
