import json
import re
import runpy
import shutil
import subprocess
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import t

import tpbook
from notebooks.pooling import POOLING
from tpbook.book import family, results
from tpbook.book.looks import LOOKS

RESULTS = Path(__file__).parent.parent / "notebooks" / "results"


def test_paired():
    rng = np.random.default_rng(0)
    theirs = (rng.random((3, 1000)) < 0.8).astype(int)
    ours = theirs.copy()
    ours[:, :50] = 1  # better on fifty images
    got = results.paired(ours, theirs)
    assert got["difference"] == pytest.approx(100 * (ours.mean() - theirs.mean()))
    assert got["low"] < got["difference"] < got["high"] and got["low"] > 0 and got["p"] < 0.01
    assert got["spread"] == pytest.approx(100 * (ours.mean(1) - theirs.mean(1)).std(ddof=1))
    same = results.paired(theirs, theirs)
    assert same["side"] == 0
    assert (same["difference"], same["low"], same["high"], same["p"]) == (0, 0, 0, 1)
    back = results.paired(theirs, ours)
    assert back["difference"] == -got["difference"] and back["p"] == got["p"]


def test_correct():
    bits = np.random.default_rng(0).integers(0, 2, (3, 797))
    rows = [
        {"seed": seed, "n": 797, "method": "evit", "correct": f"{int(''.join(map(str, bits[seed])), 2):0200x}"}
        for seed in (2, 0, 1)
    ]
    assert np.array_equal(results.correct(rows, method="evit"), bits)
    assert np.array_equal(results.correct(rows, seed=1), bits[1:2])
    with pytest.raises(ValueError, match="no row has {'method': 'etps'}"):
        results.correct(rows, method="etps")


def test_points():
    comparison = {"difference": 1.25, "spread": 0.5, "low": -0.31, "high": 2.8, "p": 0.1}
    assert results.points(comparison) == "+1.2 ± 0.5 [-0.3, +2.8]"
    assert results.points(comparison, interval=False) == "+1.2 ± 0.5"
    alone = results.paired([[1, 1, 1, 0, 1]], [[0, 1, 0, 0, 1]])
    assert alone["spread"] is None and results.points(alone, interval=False) == "+40.0"
    assert results.seen(comparison) == "+1.2 [-0.3, +2.8] points, not seen here"
    assert results.seen({**comparison, "low": 0.1}) == "+1.2 [+0.1, +2.8] points"


def test_pooling(small, images, monkeypatch):
    """Before block 2 the means of 2 × 2 neighbours take the patches' places, and the model runs on."""
    monkeypatch.setitem(tpbook.METHODS, "pooling", POOLING)
    model = small("deit")
    x, seen = images(model), []
    hook = model.blocks[1].register_forward_hook(lambda block, args, y: seen.append(y))
    with torch.no_grad():
        dense = model(x)
        hook.remove()
        grid = seen[0][:, 1:].unflatten(1, (6, 6))
        means = grid.unflatten(1, (3, 2)).unflatten(3, (3, 2)).mean((2, 4)).flatten(1, 2)  # (B, 9, C)
        y = torch.cat([seen[0][:, :1], means], dim=1)
        for block in model.blocks[2:]:
            y = block(y)
        tpbook.prune(model, "pooling", at=(2,), keep_ratio=0.25)
        assert torch.allclose(model(x), model.forward_head(model.norm(y)), atol=1e-6)
        assert torch.equal(tpbook.unprune(model)(x), dense)
        for wrong in ({"img_size": 112}, {}):
            with pytest.raises(ValueError, match="7 × 7|4 to be kept"):
                odd = small("deit", **wrong)
                tpbook.prune(odd, "pooling", at=(2,), keep_ratio=0.25 if wrong else 0.125)(images(odd))


def test_the_committed_matrix_is_whole():
    """Each cell that the chapters speak of has all seeds of the file, and each row counts what it lists."""
    said = {name: json.loads((RESULTS / "digits" / f"{name}.json").read_text()) for name in ("matrix", "ablations")}
    matrix, ablations, seeds = said["matrix"]["rows"], said["ablations"]["rows"], said["matrix"]["seeds"]
    assert len(seeds) >= 3
    starts = ("untouched", "plain", "masked 0.25", "masked 0.5", "masked 0.75")
    for start, method, ratio in product(starts, ("dynamicvit", "evit", "dtps", "etps"), (0.7, 0.5, 0.3)):
        cell = {"start": start, "method": method, "keep_ratio": ratio, "select": "own", "trained": True}
        assert results.correct(matrix, **cell).shape == (len(seeds), 797)
    for row in matrix + ablations:
        assert results.correct([row]).sum() == row["right"]
    assert len({row["start"] for row in ablations}) == 10 and len(ablations) == 30


def test_gain_and_percent():
    theirs = np.zeros((1, 500), int)
    theirs[:, :400] = 1
    ours = theirs.copy()
    ours[:, 400:430] = 1
    assert results.gain(ours, theirs).startswith("+6.0 [+3.9, +8.1], p < 0.0001")
    assert results.gain(ours, ours) == "+0.0 [+0.0, +0.0], p = 1.000"
    assert results.percent(theirs) == "80.0 [76.3, 83.3]"
    assert [results.probability(p) for p in (2e-5, 4e-4, 0.04)] == ["p < 0.0001", "p = 0.0004", "p = 0.040"]


def test_rows_and_what_made_them(tmp_path):
    bits = "0110" * 25
    row = {"seed": 0, "method": "evit", "n": 100, "right": 50, "correct": results.pack(bits)}
    run = results.provenance()
    recipe = {"train_images": 20, "epochs": 2, "seed": 0, "precision": "bf16"}
    trained = {"recipe": recipe, "seconds": 90.0, "run": run}
    for name, training in (("a", trained), ("b", trained | {"seconds": 30.0}), ("c", None)):
        results.save(tmp_path, name, {"rows": [row], "training": training})
    assert len(results.rows(tmp_path)) == 3
    assert "".join(map(str, results.correct(results.rows(tmp_path)[:1], method="evit")[0])) == bits
    made = results.made(tmp_path)
    assert (made["runs"], made["minutes"], made["images"], made["seeds"]) == (2, 2, "20", "0")
    assert made["commit"] == str(run["commit"]) and made["torch"] == torch.__version__.split("+")[0]


def test_the_commit_is_named():
    commit = results.provenance()["commit"]  # None outside a Git checkout
    assert commit is None or re.fullmatch(r"[0-9a-f]{12,40}(-dirty)?", commit)


@pytest.mark.parametrize("where, named, ours", [
    ("tpbook", "tpbook", True), ("tpbook", "reader", False), ("tpbook", None, False), ("lib/tpbook", "tpbook", False),
])  # fmt: skip
def test_the_commit_is_that_of_tpbook(tmp_path, where, named, ours):
    """And not of a reader's repository that the package was installed in."""
    module = tmp_path / where / "book/results.py"
    module.parent.mkdir(parents=True)
    shutil.copy(results.__file__, module)
    if named:
        (tmp_path / "pyproject.toml").write_text(f'[project]\nname = "{named}"\n')
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", tmp_path]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "reader's"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout[:12]
    commit = runpy.run_path(str(module))["provenance"]()["commit"]
    assert commit == (head if ours else None)
    module.write_text(module.read_text() + "\n")
    assert runpy.run_path(str(module))["provenance"]()["commit"] == (f"{head}-dirty" if ours else None)


def test_the_commit_of_a_copy_without_git(tmp_path):
    (tmp_path / "tpbook/book").mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "tpbook"\n')
    shutil.copy(results.__file__, tmp_path / "tpbook/book/results.py")
    assert runpy.run_path(str(tmp_path / "tpbook/book/results.py"))["provenance"]()["commit"] is None


def test_the_committed_reproduction_is_whole():
    """Four methods × five ratios × two starts, on all 500 test images, each row with what trained it."""
    rows = results.rows(RESULTS / "imagenette")
    methods, ratios = ("dynamicvit", "evit", "dtps", "etps", "random"), (0.8, 0.7, 0.5, 0.3, 0.2)
    for start, method, ratio in product(("plain", "masked"), methods, ratios):
        cell = {"start": start, "method": method, "keep_ratio": ratio, "select": "own", "trained": True}
        assert results.correct(rows, data="test", **cell).shape == (1, 500)
        assert results.correct(rows, data="val", **cell).shape == (1, 3791)
    assert results.correct(rows, start="untouched", method="dense", data="nips", trained=False).shape == (1, 1000)
    for row in rows:
        assert results.correct([row]).sum() == row["right"]
    for path in (RESULTS / "imagenette").glob("*.json"):
        result = json.loads(path.read_text())
        for part in (result, result["training"] or result):
            run = part["run"]
            assert {"commit", "date", "torch", "timm", "machine", "device", "threads"} <= set(run)


WOOF = RESULTS / "imagewoof-gpu"
STARTED = ("plain", "masked"), ("dynamicvit", "evit", "dtps", "etps"), (0.7, 0.5, 0.3, 0.2)


@pytest.fixture(scope="module")
def woof():
    """(start, method, ratio, trained, data) → (seeds, n) bits of the GPU's rows, read without the package."""
    rows, found = [row for path in WOOF.glob("*.json") for row in json.loads(path.read_text())["rows"]], {}
    for row in sorted((row for row in rows if row["select"] == "own"), key=lambda row: row["seed"]):
        key = tuple(row[k] for k in ("start", "method", "keep_ratio", "trained", "data"))
        bits = [int(row["correct"], 16) >> i & 1 for i in reversed(range(row["n"]))]
        assert sum(bits) == row["right"]
        found.setdefault(key, []).append(bits)
    return {key: np.array(bits) for key, bits in found.items()}


def test_the_gpu_rows_are_whole(woof):
    """Four methods × four ratios × two starts × three seeds on both columns, all made alike."""
    for data, n in (("test", 500), ("val", 3767)):
        for start, method, ratio in product(*STARTED):
            assert woof[start, method, ratio, True, data].shape == (3, n)
        assert woof["plain", "dense", 1.0, True, data].shape == (3, n)
    ran = results.trainings(WOOF)
    assert len(ran) == len(list(WOOF.glob("*.json"))) == 2 * (4 * 4 + 1) * 3
    images = 9025 + 3929 - 500 - 3767  # the archive's two folders, without test images and the second column
    assert images == 8687 and {training["images_seen"] for training in ran} == {5 * (images // 50 * 50)}
    assert {training["recipe"]["data"] for training in ran} == {"imagewoof2-160"}
    assert {training["last"]["step"] for training in ran} == {865}
    made = results.made(WOOF)
    assert (made["runs"], made["seeds"], made["epochs"], made["precision"]) == (102, "0, 1, 2", "5", "bf16")
    assert made["device"] == "NVIDIA H100 80GB HBM3" and made["commit"] == "859bd366e4a1-dirty"
    assert {json.loads(path.read_text())["profile"] for path in WOOF.glob("*.json")} == {"imagenette"}


# what the pages print of them, at ρ = 0.7, 0.5, 0.3 and 0.2: difference in points [95 % interval], as many digits
PRINTED = [
    ("masked dynamicvit − plain dynamicvit", "val", True,
     "+0.05 [-0.29, +0.40], +0.46 [+0.05, +0.87], +1.96 [+1.26, +2.67], +3.97 [+2.96, +4.99]"),
    ("masked dtps − plain dtps", "val", True,
     "+0.26 [-0.08, +0.59], +0.44 [+0.05, +0.84], +1.24 [+0.66, +1.82], +1.88 [+1.14, +2.63]"),
    ("masked evit − plain evit", "val", True,
     "+0.06 [-0.23, +0.35], +0.27 [-0.10, +0.63], +0.64 [+0.16, +1.11], +0.42 [-0.16, +0.99]"),
    ("masked etps − plain etps", "val", True,
     "+0.16 [-0.15, +0.47], +0.30 [-0.05, +0.65], +0.29 [-0.16, +0.74], +0.12 [-0.45, +0.69]"),
    ("masked dynamicvit − plain dynamicvit", "test", True,
     "+0.0 [-0.8, +0.8], +1.0 [-0.2, +2.2], +1.1 [-0.7, +3.0], +2.3 [-0.3, +4.8]"),
    ("masked random − plain random", "test", False,
     "+0.3 [-0.7, +1.2], +1.1 [-0.4, +2.6], +7.7 [+5.8, +9.6], +3.9 [+2.0, +5.7]"),
    ("masked evit − plain evit", "test", False,
     "+0.3 [-0.5, +1.1], +1.6 [+0.1, +3.1], +3.5 [+1.4, +5.6], +2.9 [+0.3, +5.4]"),
    ("masked etps − plain etps", "test", False,
     "+0.9 [+0.1, +1.7], +0.8 [-0.7, +2.3], +1.3 [-0.5, +3.1], +3.2 [+0.9, +5.5]"),
    ("plain dtps − plain dynamicvit", "test", True,
     "+0.1 [-0.7, +0.8], +0.7 [-0.7, +2.0], +6.9 [+4.3, +9.4], +23.8 [+20.3, +27.3]"),
    ("plain etps − plain evit", "test", True,
     "+0.1 [-0.5, +0.6], +0.8 [-0.4, +2.0], +3.1 [+1.4, +4.8], +3.3 [+1.2, +5.3]"),
]  # fmt: skip


@pytest.mark.parametrize("what, data, trained, printed", PRINTED)
def test_what_the_gpu_rows_say(woof, what, data, trained, printed):
    """By the t-test's textbook formula from the rows alone, and by `paired`."""
    ours, theirs = (part.split() for part in what.split(" − "))
    digits = 2 if data == "val" else 1
    by_hand, by_paired = [], []
    for ratio in STARTED[2]:
        a, b = (woof[start, method, ratio, trained, data] for start, method in (ours, theirs))
        gain = 100 * (a - b).mean(axis=0)  # (n,)
        slack = t.ppf(0.975, len(gain) - 1) * gain.std(ddof=1) / len(gain) ** 0.5
        pair = results.paired(a, b)
        for said, numbers in (
            (by_hand, (gain.mean(), gain.mean() - slack, gain.mean() + slack)),
            (by_paired, (pair["difference"], pair["low"], pair["high"])),
        ):
            said.append("{:+.{d}f} [{:+.{d}f}, {:+.{d}f}]".format(*numbers, d=digits))
    assert ", ".join(by_hand) == ", ".join(by_paired) == printed


def test_seeds_of_the_gpu_rows_agree(woof):
    """With DynamicViT at 0.3 and 0.2, and with dTPS at every ratio, each seed gains from the masked start."""
    for method, ratios in (("dynamicvit", (0.3, 0.2)), ("dtps", STARTED[2])):
        for ratio in ratios:
            a, b = (woof[start, method, ratio, True, "val"].mean(axis=1) for start in STARTED[0][::-1])
            assert (a > b).all() and len(a) == 3


def test_one_side_is_ahead_where_the_interval_and_every_seed_say_so():
    ours, theirs = np.ones((2, 100), int), np.zeros((2, 100), int)
    theirs[:, :60] = 1
    assert results.paired(ours, theirs)["side"] == 1 and results.paired(theirs, ours)["side"] == -1
    ours[1, :5], theirs[1] = 0, 1  # the second seed says otherwise, and the interval still excludes zero
    pair = results.paired(ours, theirs)
    assert pair["low"] > 0 and pair["side"] == 0
    pairs = {0.9: {"side": 1}, 0.7: {"side": 0}, 0.5: {"side": -1}, 0.3: {"side": 1}}
    assert results.sides(pairs) == "ahead at ρ = 0.9, 0.3; behind at ρ = 0.5; undecided at ρ = 0.7"


def test_the_family_is_set_beside_one_method_at_the_nearest_cost():
    """Within the same data and training, over the seeds that both have."""

    def row(method, macs, bits, trained=True, **more):
        return {"method": method, "macs": macs, "trained": trained, "n": 8, "correct": results.pack(bits), **more}

    rows = [
        row("topk", 80e6, "11110000", keep_ratio=0.7, seed=0),
        row("topk", 80e6, "11110000", keep_ratio=0.7, seed=1),
        row("topk", 60e6, "00000000", keep_ratio=0.5, seed=0), row("topk", 79e6, "00000000", False, keep_ratio=0.7),
        row("tome", 78e6, "11111100", options={"r": 13}, seed=1),
        row("tome", 78e6, "11111000", options={"r": 13}, seed=0),
    ]  # fmt: skip
    [(line, pair)] = found = family.compared(rows, ("tome",))
    assert (line["method"], line["setting"], line["trained"], line["MACs, 10⁶"]) == ("ToMe", "r = 13", "yes", "78")
    assert line["top-1, %"].startswith("68.8 [") and "data" not in line
    assert line["− Top-K"].startswith("+18.8 ± 8.8 [") and line["− Top-K"].endswith("(at 80)")
    assert pair["difference"] == pytest.approx(18.75)
    alone = family.compared(rows, ("topk",))
    assert [(line.get("− Top-K"), pair) for line, pair in alone] == [(None, None)] * 3
    groups = family.groups([*found, *alone])
    assert groups == {"ToMe, trained": (LOOKS["tome"].colour, {"r = 13": pair})}
    assert family.groups([(line | {"data": "photographs"}, pair)]).keys() == {"ToMe, photographs"}
    cells = {"a": {"side": 1}, "b": {"side": -1}, "c": {"side": -1}}
    assert family.tally({"ToMe, trained": ("red", cells)}) == "*ToMe, trained*: 1 of 3 ahead, 2 behind"
    assert family.tally({"ToMe": ("red", {"a": {"side": 0}})}) == "*ToMe*: none of 1 ahead, none behind"
    assert family.setting({"keep_ratio": 0.7, "options": {"proportional": False}}) == "ρ = 0.7, proportional = False"
