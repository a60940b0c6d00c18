"""tpbook.bench: what it times, what it says, what it writes; and that nothing stops a compiler."""

import json
import time

import pytest
import timm
import torch

import tpbook
from tpbook import bench

TINY = "test_vit"  # timm's smallest, 160 px
FOUR = ("dynamicvit", "evit", "dtps", "etps")


def test_interleaved_takes_turns():
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: (order.append("b"), time.sleep(0.002))}
    seconds = bench.interleaved(calls, rounds=20, warmup=2)
    assert seconds["b"].min() > 0.002 > seconds["a"].median()
    assert [sorted(order[i : i + 2]) for i in range(0, 44, 2)] == 22 * [["a", "b"]]
    assert {tuple(order[i : i + 2]) for i in range(0, 44, 2)} == {("a", "b"), ("b", "a")}
    assert all(taken.shape == (20,) and taken.dtype is torch.float64 for taken in seconds.values())


def test_times_is_a_median_of_pairs_with_its_interval():
    own, other = torch.arange(1.0, 42.0).double(), 2 * torch.arange(1.0, 42.0).double()
    assert bench.times(own, other) == [2, 2, 2]
    median, low, high = bench.times(torch.ones(41).double(), own)
    assert median == 21 and 12 <= low < 21 < high <= 30
    assert bench.said([1.5, 1.25, 1.755]) == "1.50 [1.25, 1.75]"


@pytest.mark.parametrize("method", FOUR)
@torch.no_grad()
def test_the_bound_has_the_pruned_models_token_counts(small, images, method):
    model = tpbook.prune(small(depth=12), method, keep_ratio=0.6)
    seen = []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    x = images(model)
    logits = model(x)
    pruned, seen[:] = list(seen), []
    bound = bench.Sliced(model)
    assert not any(m._forward_hooks for m in bound.model.blocks[3].attn.modules())
    assert bound.model.head.weight is model.head.weight and model.pruning.name == method
    got = bound(x)
    assert seen == pruned
    assert got.shape == logits.shape and not torch.equal(got, logits)
    model.keep_ratio = 1.0
    torch.testing.assert_close(bench.Sliced(model)(x), model(x))


def test_memory_counts_what_is_held_at_once():
    def call():
        a = torch.ones(1000, 1000)  # 4 MB
        b = a + 1  # 8
        del a
        return (b * 2).sum()  # 8 again

    assert 8.0e6 <= bench.peak_memory(call) < 8.1e6


def test_rows_of_a_run(tmp_path, capsys):
    out = tmp_path / "bench.json"
    bench.main([f"model={TINY}", "batch=2", "keep_ratio=[0.7,0.4]", "rounds=7", "warmup=1", f"out={out}"])
    said, written = capsys.readouterr().out, json.loads(out.read_text())
    rows = written["rows"]
    assert [(row["method"], row["keep_ratio"]) for row in rows] == [
        ("dense", 1.0), *((m, 0.7) for m in FOUR), *((m, 0.4) for m in FOUR)
    ]  # fmt: skip
    assert len(said.splitlines()) == len(rows) + 1  # the dense model is timed with each ρ, and written once
    for row in rows:
        assert row["ms"] > 0 and row["memory_mb"] > 0 and row["rounds"] == 7
        assert row["images_per_second"] == pytest.approx(2000 / row["ms"])
        dense = row["method"] == "dense"
        assert dense or row["attention"] in ("fused", "explicit")
        for key in ("times_explicit",) if dense else ("times_dense", "efficiency"):
            median, low, high = row[key]
            assert low <= median <= high
    assert written["plan"]["rounds"] == 7 and written["run"]["threads"] == torch.get_num_threads()
    assert out.with_suffix(".svg").read_text().startswith("<?xml")


def test_rows_of_training(capsys):
    rows = bench.run(bench.Plan(model=TINY, mode="training", batch=2, keep_ratio=0.5, rounds=7, warmup=1))
    assert [row["method"] for row in rows] == ["dense", *FOUR]
    assert ["times_parts" in row for row in rows] == [False, True, False, True, True]
    assert all(row["mode"] == "training" and row["ms"] > 0 for row in rows)
    assert "× parts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["batch=0"], "batch must be an int of at least 1, got 0"),
        (["dtype=float8"], "dtype must be one of float32, bfloat16, float16, got 'float8'"),
        (["mode=[eager,jit]"], "mode must be one of eager, compiled, graphs, training, got 'jit'"),
        (["model=deit"], "model must be a timm model"),
        (["rho=0.5"], "key 'rho' is not known"),
        (["out=bench.csv"], "out must end in .json, got 'bench.csv'"),
        ([f"model={TINY}", "method=topk"], "method must be one of dynamicvit"),
        ([f"model={TINY}", "keep_ratio=1.5"], r"keep_ratio must lie in \(0, 1\], got 1.5"),
        ([f"model={TINY}", "mode=graphs"], "mode 'graphs' needs device=cuda"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(SystemExit, match=message):
        bench.main(arguments)


@pytest.mark.parametrize("method", tpbook.METHODS)
@torch.no_grad()
def test_one_graph_for_every_ratio_and_batch(small, images, method):
    """`fullgraph=True` raises at a graph break; what is computed stays the same to the last bit."""
    torch._dynamo.reset()
    model = tpbook.prune(small(), method)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for ratio in (0.7, (0.9, 0.6, 0.5), 0.7):
        model.keep_ratio = ratio
        for batch in (2, 1, 3):
            x = images(model)[:1].repeat(batch, 1, 1, 1)
            torch.manual_seed(0)
            want = model(x)
            torch.manual_seed(0)
            assert torch.equal(compiled(x), want)
    torch._dynamo.reset()


@pytest.mark.slow
@torch.inference_mode()
def test_compiled_computes_the_same():
    torch._dynamo.reset()
    model = tpbook.prune(timm.create_model(TINY).eval(), "etps", keep_ratio=0.5)
    x = torch.randn(2, 3, 160, 160)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()
