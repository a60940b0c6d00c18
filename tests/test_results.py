import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from tpbook import results
from tpbook.baselines import pool


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
    folder = Path(__file__).parent.parent / "notebooks" / "results" / "digits"
    matrix, ablations = (json.loads((folder / f"{name}.json").read_text())["rows"] for name in ("matrix", "ablations"))
    starts = ("untouched", "plain", "masked 0.25", "masked 0.5", "masked 0.75")
    for start, method, ratio in product(starts, ("dynamicvit", "evit", "dtps", "etps"), (0.7, 0.5, 0.3)):
        cell = {"start": start, "method": method, "keep_ratio": ratio, "select": "own", "trained": True}
        assert results.correct(matrix, **cell).shape == (3, 797)
    for row in matrix + ablations:
        assert results.correct([row]).sum() == row["right"]
    assert len({row["start"] for row in ablations}) == 10 and len(ablations) == 30
