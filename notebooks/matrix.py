"""Every start × method × keep ratio × seed on the digits: `python notebooks/matrix.py`, or `make matrix`.

`python notebooks/matrix.py ablations` (`make ablations`) trains DynamicViT's ablations likewise, `backbones` (`make
backbones`) the small models of other kinds, pruned by their methods, and `family` (part of `make matrix`) every method
of the package at equal MACs. `scratch` (`make scratch`) trains the dense model from random weights, masked and not.
`pretrained` (`make pretrained`) runs those that need no training on DeiT-Ti, on photographs of `$TPBOOK_DATA`.

Each training is a run of `tpbook.train` in `_build/matrix`, one thread each, as many at once as there are cores. What is
finished is skipped, what was stopped goes on. In the end `notebooks/results/digits/matrix.json` (`ablations.json` and so
on) holds a row for each model and way of evaluating it: which of the 797 test canvases it got right.
"""

import itertools
import json
import multiprocessing
import os
import sys
import time
from bisect import bisect
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded, here and in the workers

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from pooling import POOLING  # noqa: E402
from tpbook import METHODS as KNOWN  # noqa: E402
from tpbook import data, flops, load_backbone, prune, register, train, unmask  # noqa: E402
from tpbook.book import results  # noqa: E402
from tpbook.methods import Method  # noqa: E402
from tpbook.methods.evit import Fuse  # noqa: E402
from tpbook.timing.clock import interleaved, times  # noqa: E402

register("pooling", POOLING)
register("package", Method("predictor", Fuse("score"), "before", "floor", "Kong et al. 2022, its package token alone"))
TOP = Path(__file__).parent.parent
RECIPES = TOP / "recipes" / "digits"
SEEDS, RATIOS = (0, 1, 2), (0.7, 0.5, 0.3)
MORE_SEEDS = (*SEEDS, 3, 4)  # of the matrix, whose three left much open
METHODS = ("dynamicvit", "evit", "dtps", "etps")
FULL = ("untouched", "plain", "masked 0.25", "masked 0.5", "masked 0.75")
# how a start is made: a recipe and what differs from it
STARTS = {
    "plain": ("masked", {"mask_ratio": 0}),
    "masked 0.25": ("masked", {"mask_ratio": 0.25}),
    "masked 0.5": ("masked", {"mask_ratio": 0.5}),
    "masked 0.75": ("masked", {"mask_ratio": 0.75}),
    "plain, half": ("masked", {"mask_ratio": 0, "epochs": 3}),  # about what masked 0.5 computes
}


def jobs(folder, seed):
    """Two waves of trainings, each (key, recipe, changes), longest first; the second starts from the first."""
    first = [((seed, start), recipe, {"seed": seed, **changes}) for start, (recipe, changes) in STARTS.items()]
    wanted = [*itertools.product(FULL, METHODS, RATIOS), *itertools.product(("plain",), ("random",), RATIOS)]
    wanted += itertools.product(("plain, half",), METHODS, (0.3,))
    second = []
    for start, method, ratio in wanted:
        changes = {"seed": seed, "keep_ratio": ratio}
        if start != "untouched":
            changes["start"] = os.path.relpath(place(folder, (seed, start)))
        second.append(((seed, start, method, ratio), method, changes))
    first.sort(key=lambda job: -job[2].get("epochs", 6) * (1 - job[2].get("mask_ratio", 0)))
    second.sort(key=lambda job: job[1] not in ("dynamicvit", "dtps"))
    return first, second


def place(folder, key):
    return folder / "-".join(str(part).replace(",", "").replace(":", "").replace(" ", "-") for part in key)


def fit(folder, key, recipe, changes):
    """One training → its row."""
    result = train.run(RECIPES / f"{recipe}.yaml", place(folder, key), progress=False, **changes)
    seed, start, method, ratio = (*key, "dense", 1.0)[:4]
    return [row(seed, start, method, ratio, result["correct"], trained=True, seconds=result["seconds"],
                images_per_second=result["last"]["images_per_second"])]  # fmt: skip


@torch.inference_mode()
def look(folder, seed, start):
    """Evaluations without training: the start pruned as it is, and models trained from it with their choice replaced."""
    rows, path = [], place(folder, (seed, start))
    for method, ratio in itertools.product(("evit", "etps", "random"), RATIOS):
        model = load_backbone("vit_digits_patch4_56") if start == "untouched" else train.load(path)
        if hasattr(model, "mask_ratio"):
            model = unmask(model)
        prune(model, method, keep_ratio=ratio, **({"seed": seed} if method == "random" else {}))
        rows.append(row(seed, start, method, ratio, right(model), trained=False))
    if start == "untouched" and seed == SEEDS[0]:
        rows.append(row(None, start, "dense", 1.0, right(load_backbone("vit_digits_patch4_56")), trained=False))
    if start == "plain":
        for method, ratio in itertools.product(METHODS, RATIOS):
            trained = train.load(place(folder, (seed, start, method, ratio)))
            model = load_backbone("vit_digits_patch4_56")
            own = trained.state_dict()
            model.load_state_dict({name: own[name] for name in model.state_dict()})
            prune(model, method, keep_ratio=ratio, score="random", seed=seed)
            rows.append(row(seed, start, method, ratio, right(model), trained=True, select="random"))
    return rows


def right(model):
    """Which test canvases a model gets right, as "0" and "1"."""
    torch.set_num_threads(1)
    test = data.digits("test")
    logits = torch.cat([model(x) for x in test.images.split(100)])
    return "".join("01"[r] for r in (logits.argmax(1) == test.labels).tolist())


def row(seed, start, method, ratio, correct, **more):
    return {
        "seed": seed, "start": start, "method": method, "keep_ratio": ratio, "select": "own", **more,
        "right": correct.count("1"), "n": len(correct), "correct": results.pack(correct),
    }  # fmt: skip


def run(waves):
    """Waves of (function, arguments), one wave after the other, the tasks of a wave side by side → all their rows."""
    rows = []
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        for wave in waves:
            done = as_completed([pool.submit(*task) for task in wave])
            try:
                for future in tqdm(done, total=len(wave), mininterval=10):
                    rows += future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return ordered(rows)


def ordered(rows):
    return sorted(rows, key=lambda r: json.dumps([r[k] for k in ("start", "method", "keep_ratio", "select", "seed")]))


def save(name, rows, begun):
    results.save(TOP / "notebooks" / "results" / FOLDERS.get(name, "digits"), "family" if name == "pretrained" else name, {
        "seeds": sorted({r["seed"] for r in rows} - {None}), "cores": os.cpu_count(),
        "last_call_minutes": round((time.perf_counter() - begun) / 60, 1),
        "training_minutes": round(sum(r.get("seconds", 0) for r in rows) / 60, 1), **MORE.get(name, {}), "rows": rows,
    })  # fmt: skip


MORE = {}  # what a file says besides its rows
FOLDERS = {"pretrained": "deit-ti"}


def matrix(folder):
    """Seed by seed, written after each, so that a stopped call leaves whole comparisons."""
    rows, begun = [], time.perf_counter()
    for seed in MORE_SEEDS:
        waves = [[(fit, folder, *job) for job in wave] for wave in jobs(folder, seed)]
        rows += run([*waves, [(look, folder, seed, start) for start in ("untouched", *STARTS)]])
        save("matrix", rows, begun)
    return ordered(rows)


# From random weights, the base recipe of the digits on whole canvases and on half of the patches, the same images seen.
SCRATCH = {"scratch, plain": {}, "scratch, masked 0.5": {"mask_ratio": 0.5}}


def scratch(folder):
    rows, begun = [], time.perf_counter()
    for seed in SEEDS:
        rows += run([
            [(fit, folder, (seed, start), "base", {"seed": seed, **changes}) for start, changes in SCRATCH.items()],
            [(look, folder, seed, start) for start in SCRATCH],
        ])  # fmt: skip
        save("scratch", rows, begun)
    return ordered(rows)


# what differs from recipes/digits/dynamicvit.yaml
ABLATIONS = {
    "full": {},
    "select: random": {"options": {"score": "random"}},
    "select: static": {"options": {"score": "static"}},
    "select: class attention": {"options": {"score": "class_attention"}},
    "select: pooling": {"method": "pooling", "at": [6], "keep_ratio": 0.25},
    "stages: 1": {"at": [3], "keep_ratio": 0.25},
    "stages: 2": {"at": [3, 6], "keep_ratio": 0.6},
    "loss: no logits": {"logit_weight": 0.0},
    "loss: no tokens": {"token_weight": 0.0},
    "loss: neither": {"teacher": ""},
}


def ablations(folder):
    wave = []
    for seed, (name, changes) in itertools.product(SEEDS, ABLATIONS.items()):
        if changes.get("options") or "method" in changes:  # nothing learns at the predictors' rate
            changes = {**changes, "lr": 1e-4, "backbone_lr_scale": 1.0}
        wave.append((fit, folder / "ablations", (seed, name, "dynamicvit", 0.7), "dynamicvit", {"seed": seed, **changes}))
    return run([wave])


FINE = (0.9, 0.7, 0.5, 0.3)
# The recipes are the flat ViT's. A map's first block decides on bare patches, and zeros and fast paths are new to the
# whole model, so all of it learns faster, and for three times as long. With the recipes' ratio weight of 2 it learns to
# keep more than it will be left; 10 is what DynamicSwin and DynamicConvNeXt take. Chosen at ρ = 0.5.
MAPS = {"epochs": 6, "lr": 2e-3, "backbone_lr_scale": 0.15, "ratio_weight": 10.0}
# model → its methods, its keep ratios, and what differs from the methods' recipes
BACKBONES = {
    "pvt_digits_56": (("dynamicvit", "dtps", "random"), FINE, MAPS),
    "cvt_digits_56": (("dynamicvit", "dtps", "random"), FINE, {**MAPS, "precision": "fp32"}),  # the faster one
    "vit_digits_patch4_56": (("dynamicvit", "dtps", "etps", "random"), FINE, {}),
    "swin_digits_56": (("dynamicvit",), FINE[:3], MAPS),  # its decisions keep ρ, ρ − 0.2 and ρ − 0.4
    # the token term is over the classes of its auxiliary head
    "lvvit_digits_56": (("dynamicvit", "dtps", "etps", "random"), FINE, {"token_loss": "kl"}),
}


# a place whose token is gone holds its host's token at the end of its map, not zero
ALTERNATIVES = [(name, "dtps", 0.5, {"rejoin": "host"}) for name in ("pvt_digits_56", "cvt_digits_56")]


MORE["backbones"] = {"differs": {name: changes for name, (_, _, changes) in BACKBONES.items()}}  # from the recipes


def fit_backbone(folder, name, seed, method, ratio, **options):
    """One training of a backbone that is pruned → its row, with its MACs."""
    path = place(folder, (name, seed, method, ratio, *options.values()))
    changes = {"model": name, "seed": seed, "keep_ratio": ratio, "options": options, **BACKBONES[name][2]}
    result = train.run(RECIPES / f"{method}.yaml", path, progress=False, **changes)
    model = train.load(path)
    missed = result["last"].get("ratio_sum")  # Σ over stages of (share kept in training − ρ)², mean over the last epoch
    missed = None if missed is None else (missed / len(model.pruning.at)) ** 0.5
    return [row(seed, "untouched", method, ratio, result["correct"], trained=True, model=name, options=options,
                macs=flops.closed_form(model).total, missed=missed, seconds=result["seconds"])]  # fmt: skip


@torch.inference_mode()
def look_backbone(name, seed):
    """A backbone as it is, dense and pruned by what needs no training."""
    methods, ratios, _ = BACKBONES[name]
    rows = []
    for method, ratio in itertools.product([method for method in methods if not KNOWN[method].score.learned], ratios):
        if seed == SEEDS[0] or KNOWN[method].score.drawn:
            drawn = {"seed": seed} if KNOWN[method].score.drawn else {}
            model = prune(load_backbone(name), method, keep_ratio=ratio, **drawn)
            rows.append(row(seed if drawn else None, "untouched", method, ratio, right(model), trained=False, model=name,
                            macs=flops.closed_form(model).total))  # fmt: skip
    if seed == SEEDS[0]:
        model = load_backbone(name)
        rows.append(row(None, "untouched", "dense", 1.0, right(model), trained=False, model=name,
                        macs=flops.closed_form(model).total))  # fmt: skip
    return rows


def backbones(folder):
    """Seed by seed, written after each, so that a stopped call leaves whole comparisons; alternatives last."""
    rows, begun = [], time.perf_counter()
    for seed in SEEDS:
        wave = [(fit_backbone, folder / "backbones", name, seed, method, ratio)
                for name, (methods, ratios, _) in BACKBONES.items() for method in methods for ratio in ratios]  # fmt: skip
        rows += run([wave + [(look_backbone, name, seed) for name in BACKBONES]])
        save("backbones", rows, begun)
    rows += run([[(partial(fit_backbone, **options), folder / "backbones", name, seed, method, ratio)
                  for seed in SEEDS for name, method, ratio, options in ALTERNATIVES]])  # fmt: skip
    return sorted(rows, key=lambda r: list(BACKBONES).index(r["model"]))


# Every method at the MACs of Top-K with these keep ratios, and what is not the method's default: its recipe, its places,
# and whether r says how many go. Recipes differ as their papers do; images, steps and batch are the same.
LEVELS = (0.7, 0.5, 0.3)
FAMILY = {
    "topk": {}, "evit": {}, "etps": {}, "tome": {}, "dpcknn": {}, "random": {}, "dynamicvit": {}, "dtps": {},
    "tome, every block": {"method": "tome", "r": True},
    "ats": {"places": (None, (4, 8), (5, 9), (6, 9))},  # the first that can cost so much: on the digits it keeps few
    "evovit": {"places": ((4, 8),)},
    "package": {"recipe": "dynamicvit"},
    "avit": {}, "adavit": {}, "ia_red2": {},  # which take no ratio: one row each, at the cost that they choose
}  # fmt: skip


@cache
def setting(name, model, level, images=None):
    """What `prune` takes so that a method costs what Top-K costs at ρ = `level`, as near as it comes; None where it cannot.

    Args:
        name: of `FAMILY`.
        model: name of a backbone.
        level: ρ.
        images: those that say what a method costs whose count depends on them.
    """
    how, method = FAMILY[name], method_of(name)
    if level is None:
        return {}
    target = macs(prune(load_backbone(model), "topk", keep_ratio=level))
    if how.get("r"):
        knob, values = "r", range(39, -1, -1)  # dearer and dearer
    else:
        knob, values = "keep_ratio", [v / 100 for v in range(max(5, int(100 * KNOWN[method].reduce.least_ratio)), 101)]
    for at in how.get("places", (None,)):
        backbone = prune(load_backbone(model), method, **{knob: values[-1]}, at=at)

        def costs(value, backbone=backbone):
            setattr(backbone, knob, value)
            return macs(backbone, images)

        place = bisect(values, target, key=costs)
        miss, best = min((abs(costs(value) / target - 1), value) for value in values[max(0, place - 1) : place + 1])
        if miss < 0.06:
            return {knob: best} | ({"at": at} if at else {})
    return None


def macs(model, images=None):
    """MACs of a model; where they depend on the image the mean over images."""
    if not model.__dict__.get("_plan") or not model.pruning.method.chooses.varies:
        return flops.closed_form(model).total
    costs = [cost.total for batch in images.split(100) for cost in flops.closed_form(model.eval(), batch)]
    return sum(costs) / len(costs)


def canvases(number=200):
    return data.digits("test").images[:number]


def family_row(name, said, seed, correct, pruned, **more):
    """A row of a method of `FAMILY`, pruned by what `setting` said."""
    images = data.digits("test").images if "data" not in more else pictures(more["data"])[0]
    return row(seed, more.pop("start", "untouched"), method_of(name), said.get("keep_ratio"), correct, name=name, **more,
               options={key: said[key] for key in ("r", "at") if key in said}, macs=round(macs(pruned, images)))  # fmt: skip


def method_of(name):
    return FAMILY.get(name, {}).get("method", name)


def needs_no_training(name):
    """Whether it runs on a trained model as it is: nothing is learned, and it takes a keep ratio."""
    method = KNOWN[method_of(name)]
    return method.chooses.counted and not method.score.learned


def fit_family(folder, seed, name, level):
    """One training of a method at the MACs of a level → its row."""
    said = setting(name, "vit_digits_patch4_56", level, canvases())
    if said is None:
        return []
    method, changes = method_of(name), {key: said[key] for key in ("keep_ratio", "at") if key in said}
    changes |= {"method": method, "seed": seed, "epochs": 2, **({"options": {"r": said["r"]}} if "r" in said else {})}
    recipe = RECIPES / f"{FAMILY[name].get('recipe', method)}.yaml"
    path = place(folder / "family", (seed, name, level))
    result = train.run(recipe, path, progress=False, **changes)
    return [family_row(name, said, seed, result["correct"], train.load(path).eval(), trained=True, level=level,
                       seconds=result["seconds"])]  # fmt: skip


@torch.inference_mode()
def look_family(name, level):
    """A method that needs no training, on the backbone as it is."""
    said = setting(name, "vit_digits_patch4_56", level, canvases())
    if said is None or not needs_no_training(name):
        return []
    rows = []
    for seed in SEEDS if KNOWN[method_of(name)].score.drawn else (None,):
        drawn = {} if seed is None else {"seed": seed}
        model = prune(load_backbone("vit_digits_patch4_56"), method_of(name), **said, **drawn)
        rows.append(family_row(name, said, seed, right(model), model, trained=False, level=level))
    return rows


def family(folder):
    """Seed by seed, written after each, so that a stopped call leaves whole comparisons."""
    every = [(name, level) for name in FAMILY for level in (LEVELS if KNOWN[method_of(name)].chooses.counted else (None,))]
    begun = time.perf_counter()
    rows = run([[(look_family, *one) for one in every]])
    for seed in SEEDS:
        rows += run([[(fit_family, folder, seed, *one) for one in every]])
        save("family", rows, begun)
    return sorted(rows, key=lambda r: (list(FAMILY).index(r["name"]), -(r["level"] or 0)))


PICTURES = {"nips2017-dev": data.nips2017_dev, "imagewoof2-160": partial(data.imagenette, "test", name="imagewoof2-160")}


@cache
def pictures(name, model="deit_tiny_patch16_224"):
    """(images (n, 3, 224, 224), labels (n,)) of a set of photographs, prepared for the model."""
    taken = PICTURES[name](data.eval_transform(load_backbone(model)))
    images, labels = zip(*(taken[i] for i in range(len(taken))))
    return torch.stack(images), torch.tensor(labels)


@torch.inference_mode()
def look_pretrained(name, level, model="deit_tiny_patch16_224"):
    """A method that needs no training on a pretrained model: a row for each set of photographs; "dense" prunes nothing."""
    torch.set_num_threads(1)
    said = {} if name == "dense" else setting(name, model, level, pictures("nips2017-dev")[0][:100])
    if said is None:
        return []
    pruned = load_backbone(model).eval()
    if name != "dense":
        method = method_of(name)
        prune(pruned, method, **said, **({"seed": 0} if KNOWN[method].score.drawn else {}))
    rows = []
    for where in PICTURES:
        images, labels = pictures(where)
        logits = torch.cat([pruned(batch) for batch in images.split(50)])
        correct = "".join("01"[r] for r in (logits.argmax(1) == labels).tolist())
        rows.append(family_row(name, said, None, correct, pruned, start="pretrained", trained=False, level=level,
                               model=model, data=where))  # fmt: skip
    return rows


@torch.inference_mode()
def clock(model="deit_tiny_patch16_224", batch=8, rounds=15):
    """How many times as fast as dense each is, in turns, on all cores: {level: {method: [median, low, high]}}."""
    images, found = pictures("nips2017-dev")[0], {}
    torch.set_num_threads(os.cpu_count())
    for level in LEVELS:
        models = {"dense": load_backbone(model).eval()}
        for name in FAMILY:
            method = method_of(name)
            if not needs_no_training(name) or (said := setting(name, model, level, images[:100])) is None:
                continue
            models[name] = prune(load_backbone(model).eval(), method, **said)
        seconds = interleaved({n: partial(m, images[:batch]) for n, m in models.items()}, rounds)
        found[level] = {name: times(one, seconds["dense"]) for name, one in seconds.items()}
    return found


def pretrained(folder):
    free = [name for name in FAMILY if needs_no_training(name)]
    wave = [(look_pretrained, "dense", 1.0), *((look_pretrained, *one) for one in itertools.product(free, LEVELS))]
    rows = run([wave])
    MORE["pretrained"] = {"times": clock(), "batch": 8}
    return sorted(rows, key=lambda r: (["dense", *FAMILY].index(r["name"]), -r["level"]))


if __name__ == "__main__":
    which = {one.__name__: one for one in (matrix, scratch, ablations, backbones, family, pretrained)}
    names = sys.argv[1:] or ["matrix", "family"]
    if not set(names) <= set(which):
        sys.exit(f"some of {', '.join(which)} are expected, got {' '.join(names)!r}")
    for name in names:
        begun = time.perf_counter()
        save(name, which[name](Path("_build/matrix")), begun)
