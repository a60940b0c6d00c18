import json
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from tpbook import results
from tpbook.baselines import pool

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


def test_pool(small, images):
    model = small("deit")
    x, dense = images(model), None
    with torch.no_grad():
        dense = model(x)
        handle = pool(model, 2)
        assert model.forward_features(x).shape[1] == 1 + 36 // 4
        handle.remove()
        assert torch.equal(model(x), dense)
    with pytest.raises(ValueError, match="at must be a block from 0 to 5, got 6"):
        pool(model, 6)
    with pytest.raises(ValueError, match="even grid.*7 × 7"):
        pool(small("deit", img_size=112), 2)


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
