"""Timings on pages are those of the committed benchmark."""

import json

import pytest

from tpbook.book import clocks


def row(method, ratio, times, **more):
    base = {"model": "deit_tiny_patch16_224", "image_size": 224, "batch": 32, "mode": "training", "dtype": "float32"}
    return {
        **base,
        "method": method,
        "keep_ratio": ratio,
        "rounds": 31,
        **({"times_dense": times} if times else {}),
        **more,
    }


@pytest.fixture
def folder(tmp_path):
    run = {"device": "CPU", "threads": 2, "torch": "2.15.0", "date": "2026-11-22", "commit": "abc"}
    files = {
        "a": [
            row("dense", 1.0, None),
            row("evit", 0.7, [1.444, 1.43, 1.45]),
            row("evit", 0.5, [1.9, 1.8, 2.0], mode="eager"),
        ],
        "b": [
            row("evit", 0.7, [9, 9, 9], rounds=11),
            row("evit", 0.7, [8, 8, 8], batch=1),
            row("etps", 0.7, [0.99, 0.98, 1]),
        ],
    }
    for name, rows in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": rows, "run": run}))
    return tmp_path


def test_the_row_of_most_rounds_counts(folder):
    times = clocks.read(folder)
    assert times["training", "float32", "evit", 0.7] == [1.444, 1.43, 1.45]
    assert set(times) == {
        ("training", "float32", "evit", 0.7), ("eager", "float32", "evit", 0.5), ("training", "float32", "etps", 0.7)
    }  # fmt: skip
    with pytest.raises(ValueError, match="batch 7"):
        clocks.read(folder, batch=7)


def test_for_a_page(folder):
    assert clocks.made(folder) == "CPU, 2 threads, PyTorch 2.15.0, 2026-11-22, commit abc"
    assert clocks.table(clocks.read(folder), {"evit": "EViT"}) == {
        "EViT, ρ = 0.7": {"training, float32": "1.44 × [1.43, 1.45]"},
        "EViT, ρ = 0.5": {"eager, float32": "1.90 × [1.80, 2.00]"},
    }
    later = json.loads((folder / "b.json").read_text())
    later["run"]["commit"] = "def"
    (folder / "b.json").write_text(json.dumps(later))
    assert clocks.made(folder) == "CPU, 2 threads, PyTorch 2.15.0, 2026-11-22, commits abc and def"
