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

import tpbook
from notebooks.pooling import POOLING
from tpbook.book import family, results

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
    """Each cell that the chapters speak of has its three seeds, and each row counts what it lists."""
    names = ("matrix", "ablations")
    matrix, ablations = (json.loads((RESULTS / "digits" / f"{name}.json").read_text())["rows"] for name in names)
    starts = ("untouched", "plain", "masked 0.25", "masked 0.5", "masked 0.75")
    for start, method, ratio in product(starts, ("dynamicvit", "evit", "dtps", "etps"), (0.7, 0.5, 0.3)):
        cell = {"start": start, "method": method, "keep_ratio": ratio, "select": "own", "trained": True}
        assert results.correct(matrix, **cell).shape == (3, 797)
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
    [line] = family.table(rows, ("tome",))
    assert (line["method"], line["setting"], line["trained"], line["MACs, 10⁶"]) == ("ToMe", "r = 13", "yes", "78")
    assert line["top-1, %"].startswith("68.8 [") and "data" not in line
    assert line["− Top-K"].startswith("+18.8 ± 8.8 [") and line["− Top-K"].endswith("(at 80)")
    assert [line.get("− Top-K") for line in family.table(rows, ("topk",))] == [None] * 3
    assert family.setting({"keep_ratio": 0.7, "options": {"proportional": False}}) == "ρ = 0.7, proportional = False"
