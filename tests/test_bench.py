"""tpbook.bench: what it times, what it says, what it writes; and that nothing stops a compiler."""

import functools
import json
import time
from itertools import product

import pytest
import timm
import torch
from builders import BUILDERS, COUNTED, answer

import tpbook
from tpbook import bench, plan, train
from tpbook.kernels import allowed, cpu
from tpbook.methods.parts import Method, Score
from tpbook.timing import clock

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


def test_few_rounds_have_no_interval():
    five = torch.arange(1.0, 6.0).double()
    assert bench.times(torch.ones(5).double(), five) == [3, None, None] and bench.said([3.0, None, None]) == "3.00"
    six = bench.times(torch.ones(6).double(), torch.arange(1.0, 7.0).double())
    assert six == [3.5, 1, 6]


@pytest.mark.parametrize("ratio, shown", [
    ([1.5, 1.4, 1.6], "1.50 [1.40, 1.60]"),
    ([0.5, 0.45, 0.6], "0.50 [0.45, 0.60]"),
    ([1.5, 1.01, 1.5], "1.50 [1.01, 1.50]"),  # 0.49 wide, a third of 1.5 is 0.5
    ([0.71, 0.5, 3.85], "not measurable here"),  # holds 1
    ([1.02, 1.0, 1.05], "not measurable here"),
    ([1.5, 1.2, 1.71], "not measurable here"),  # too wide
    ([2.0, None, None], "not measurable here"),  # five rounds
])  # fmt: skip
def test_what_a_page_says_of_a_clock_that_ran_with_it(ratio, shown):
    assert clock.live(ratio) == shown


@pytest.mark.parametrize("device, waited", [("cuda:1", "cuda:1"), ("mps", "mps"), ("cpu", None)])
def test_the_device_that_computes_is_waited_for(monkeypatch, device, waited):
    seen = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device=None: seen.append(device))
    bench.interleaved({"a": lambda: seen.append("a")}, rounds=2, warmup=0, device=device)
    wait = [] if waited is None else [torch.device(waited)]
    assert seen == 2 * [*wait, "a", *wait]


@pytest.mark.parametrize("method", FOUR)
@torch.no_grad()
def test_the_bound_has_the_pruned_models_token_counts(small, images, method, monkeypatch):
    model = tpbook.prune(small(depth=12), method, keep_ratio=0.6)
    seen = []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    x = images(model)
    logits = model(x)
    pruned, seen[:] = list(seen), []
    bound = bench.sliced(model)
    assert bound.head.weight is model.head.weight and bound.pruning.name == model.pruning.name == method
    scored = []
    for predictor in getattr(bound, "score_predictor", ()):
        predictor.register_forward_hook(lambda module, args, out: scored.append(out.shape[1]))
    with monkeypatch.context() as patch:
        patch.setattr(plan, "AttentionMask", None)  # nothing listens to its attention, and nothing is sorted
        for name in ("argsort", "topk", "sort"):
            patch.setattr(torch.Tensor, name, None)
        got = bound(x)
    assert seen == pruned
    learned = model.pruning.method.score.learned
    assert scored == ([count.enter for count in model.pruning.counts(36)] if learned else [])
    assert got.shape == logits.shape and not torch.equal(got, logits)
    model.keep_ratio = 1.0
    torch.testing.assert_close(bench.sliced(model)(x), model(x))


class First(Score):
    """The earlier a token is, the better."""

    name, words = "first", "score: the order"

    def __call__(self, call):
        batch, n = call.x.shape[:2]
        return -torch.arange(n, device=call.x.device).float().expand(batch, -1)


@pytest.mark.parametrize("name", BUILDERS)
@torch.no_grad()
def test_the_bound_is_the_model_that_keeps_the_first_tokens(name, monkeypatch):
    """In every family: as many tokens at the same places, each with its own position."""
    monkeypatch.setitem(tpbook.METHODS, "first", Method(First(), "drop", "before", "ceil", "none"))
    model, x = BUILDERS[name]()
    dense = answer(model, x)
    tpbook.prune(model, "first", keep_ratio=0.6, at=(1, 2))
    got = answer(bench.sliced(model), x)
    torch.testing.assert_close(got, answer(model, x), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got, dense, atol=1e-3)


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
        assert dense or all(row["attention"][which] in ("fused", "explicit") for which in ("pruned", "bound"))
        for key in ("times_explicit",) if dense else ("times_dense", "efficiency"):
            median, low, high = row[key]
            assert low <= median <= high
    counts = (2, 3, 2, 3) if cpu.operators() else (5, 12, 20, 25)
    assert [row.get("operators") for row in rows] == [None, *2 * counts]  # counted whatever ρ is
    assert all(row["bytes"] > 0 and row["times_tokens"] > 0.5 for row in rows[1:])
    assert f"a stage {counts[0]} operators, " in said and said.count(" × tokens") == 8
    assert written["plan"]["rounds"] == 7 and written["run"]["threads"] == torch.get_num_threads()
    assert out.with_suffix(".svg").read_text().startswith("<?xml")


def test_each_takes_the_attention_that_is_faster_for_it(monkeypatch):
    def clock(calls, rounds, warmup=0, device="cpu"):  # the explicit one is faster, of the first method's bound alone
        tried.append(sorted(map(str, calls)))
        fast = {"fused": 3.0, "explicit": 1.0 if len(tried) == 2 else 4.0}
        taken = {key: fast.get(key, 2.0 if key[-1] == "bound" else 4.0) for key in calls}
        return {key: torch.full((rounds,), seconds, dtype=torch.float64) for key, seconds in taken.items()}

    def at_once(mode, model, images):  # as one is that is captured
        model(images)
        return lambda: model(images)

    tried = []
    monkeypatch.setattr("tpbook.timing.rows.interleaved", clock)
    monkeypatch.setattr("tpbook.timing.rows._call", at_once)
    rows = bench.run(bench.Plan(model=TINY, method=("evit", "tome"), keep_ratio=0.5, batch=1))
    both = ["explicit", "fused"]
    assert tried[:4] == [both, both, ["fused"], both]  # explicit attention tells ToMe no keys
    assert rows[1]["attention"] == {"pruned": "fused", "bound": "explicit"}
    assert rows[2]["attention"] == {"pruned": "fused", "bound": "fused"}
    assert all(row["efficiency"][0] == 1 / 2 and row["times_dense"][0] == 1 for row in rows[1:])
    turns = tried[-1]
    assert len(turns) == 6 and not any("pruned" in key for key in turns)  # what is fused is timed once
    assert sum("bound" in key for key in turns) == 2 and "('eager', 'dense', 'explicit')" in turns


def test_what_compiling_takes(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    plan = bench.Plan(model=TINY, method="evit", mode=("eager", "compiled"), batch=2, keep_ratio=0.5, rounds=2)
    rows = bench.run(plan)
    assert [(row["mode"], row["method"]) for row in rows] == list(product(("eager", "compiled"), ("dense", "evit")))
    assert ["compile_seconds" in row for row in rows] == [False, False, True, True]
    assert all(1e3 * row["compile_seconds"] > row["ms"] and "times_eager" in row for row in rows[2:])


def test_rows_of_training(capsys):
    rows = bench.run(bench.Plan(model=TINY, mode="training", batch=2, keep_ratio=0.5, rounds=7, warmup=1))
    assert [row["method"] for row in rows] == ["dense", *FOUR]
    assert ["times_parts" in row for row in rows] == [False, True, False, True, True]
    assert all(row["mode"] == "training" and row["ms"] > 0 for row in rows)
    assert "× parts" in capsys.readouterr().out


def test_steps_of_masked_fine_tuning(monkeypatch):
    """What is timed as "masked" is the recipe's step on a masked model, and the dense step is none."""
    taught, terms_of = set(), train.terms_of

    def told(recipe, accelerator, wrapped, model, *given):
        taught.add((recipe.mask_ratio, getattr(model, "mask_ratio", None)))
        return terms_of(recipe, accelerator, wrapped, model, *given)

    monkeypatch.setattr(train, "terms_of", told)
    plan = bench.Plan(model=TINY, mode="training", method="masked", batch=2, keep_ratio=0.3, rounds=2, warmup=0)
    dense, masked = bench.run(plan)
    assert taught == {(0, None), (0.7, 0.7)}
    assert masked["method"] == "masked" and masked["keep_ratio"] == 0.3
    assert masked["times_dense"][0] > 0 and "times_parts" not in masked


def test_another_family_at_another_size_with_a_ratio_a_stage(tmp_path, capsys):
    out, name = tmp_path / "bench.json", "eva02_tiny_patch14_224"
    words = [f"model={name}", "image_size=56", "batch=1", "method=[dynamicvit,random]", "warmup=0", "rounds=2"]
    bench.main([*words, "keep_ratio=[[0.9,0.5,0.5],0.5]", f"out={out}"])
    said, rows = capsys.readouterr().out, json.loads(out.read_text())["rows"]
    assert [row["keep_ratio"] for row in rows] == [1.0, [0.9, 0.5, 0.5], [0.9, 0.5, 0.5], 0.5, 0.5]
    assert all(row["image_size"] == 56 and row["ms"] > 0 for row in rows) and "ρ 0.9, 0.5, 0.5 " in said
    assert all(row["efficiency"][0] > 0 and row["efficiency"][1:] == [None, None] for row in rows[1:])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "bench.svg"]


def test_all_of_a_plan_is_checked_before_anything_is_timed(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "forwards", None)
    out = tmp_path / "bench.json"
    for word, message in (
        ("keep_ratio=[0.5,1.5]", r"keep_ratio must lie in \(0, 1\], got 1.5"),
        ("keep_ratio=[0.5,[0.5,0.7]]", r"one for each of 3 stages, got \(0.5, 0.7\)"),
        ("method=[evit,tomb]", "method must be one of dynamicvit.*got 'tomb'"),
        (f"model=[{TINY},vit_base_patch16_siglip_224]", "cls_token is None"),
    ):
        with pytest.raises(SystemExit, match=message):
            bench.main([*([] if word.startswith("model") else [f"model={TINY}"]), word, f"out={out}"])
    assert not list(tmp_path.iterdir())


def test_what_was_measured_stays_when_a_run_is_stopped(monkeypatch, tmp_path, capsys):
    out, lines = tmp_path / "bench.json", tmp_path / "bench.part.jsonl"
    words = [f"model={TINY}", "batch=[1,2]", "method=evit", "keep_ratio=0.5", "rounds=1", "warmup=0", f"out={out}"]
    forwards = bench.forwards

    def fails(plan, dense, images, ratio, shared):
        if len(images) == 2:
            raise RuntimeError("out of memory")
        return forwards(plan, dense, images, ratio, shared)

    monkeypatch.setattr(bench, "forwards", fails)
    with pytest.raises(SystemExit, match="out of memory.*bench.part.jsonl"):
        bench.main(words)
    assert [path.name for path in tmp_path.iterdir()] == [lines.name]
    first, *rows = map(json.loads, lines.read_text().splitlines())
    assert first["plan"]["batch"] == [1, 2] and first["run"]["torch"]
    assert [(row["batch"], row["method"]) for row in rows] == [(1, "dense"), (1, "evit")]

    with pytest.raises(
        SystemExit, match=r"got 2\.0 \(a number of tokens is `keep`\)$"
    ):  # a plan that is refused takes nothing away
        bench.main([*words, "keep_ratio=2.0"])
    assert len(lines.read_text().splitlines()) == 3
    monkeypatch.setattr(bench, "forwards", forwards)
    bench.main(words)
    assert len(json.loads(out.read_text())["rows"]) == 4 and not lines.exists()


def test_help(capsys):
    bench.main(["--help"])
    assert "python -m tpbook.bench mode=training" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["batch=0"], "batch must be an int of at least 1, got 0"),
        (["dtype=float8"], "dtype must be one of float32, bfloat16, float16, got 'float8'"),
        (["mode=[eager,jit]"], "mode must be one of eager, compiled, captured, graphs, training, got 'jit'"),
        (["model=deit"], "model must be a timm model"),
        (["rho=0.5"], "key 'rho' is not known"),
        (["out=bench.csv"], "out must end in .json, got 'bench.csv'"),
        ([f"model={TINY}", "method=evt"], "method must be one of dynamicvit"),
        ([f"model={TINY}", "keep_ratio=1.5"], r"keep_ratio must lie in \(0, 1\], got 1.5"),
        ([f"model={TINY}", "method=ats"], "model must be one whose token counts are known, got one pruned by 'ats'"),
        ([f"model={TINY}", "mode=graphs"], "mode 'graphs' needs device=cuda"),
        ([f"model={TINY}", "mode=captured"], "mode 'captured' needs device=cuda"),
        (
            [f"model={TINY}", "mode=training", "dtype=float16"],
            "dtype must be float32 or bfloat16 for training on a CPU",
        ),
        ([f"model={TINY}", "method=masked"], "method 'masked' needs mode=training, got eager"),
        ([f"model={TINY}", "method=masked", "mode=training", "keep_ratio=1.5"], r"keep_ratio must lie .* got 1.5"),
        (
            [f"model={TINY}", "method=masked", "mode=training", "keep_ratio=[[0.7,0.5,0.3]]"],
            r"keep_ratio must be one number for method 'masked', got \[0.7, 0.5, 0.3\]",
        ),
        (["device=gpu"], "device must be one of PyTorch's, such as cpu or cuda:1, got 'gpu'"),
        (["device=cuda:99"], "device must be one that is there, got 'cuda:99'"),
        (["keep_ratio=["], r"keep_ratio must be a value in YAML, got '\['"),
        (["batch"], "key=value must follow, got 'batch'"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(SystemExit, match=message):
        bench.main(arguments)


@pytest.mark.parametrize("method", COUNTED)
@torch.no_grad()
def test_one_graph_for_every_ratio_and_batch(small, images, method):
    """`fullgraph=True` raises at a graph break; what is computed stays the same to the last bit."""
    torch._dynamo.reset()
    model = tpbook.prune(small(depth=3), method, at=(1, 2))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for ratio in (0.7, (0.9, 0.6), 0.7):
        model.keep_ratio = ratio
        for batch in (2, 1, 3):
            x = images(model)[:1].repeat(batch, 1, 1, 1)
            torch.manual_seed(0)
            with allowed(False):  # a compiled model is of PyTorch's operators
                want = model(x)
            torch.manual_seed(0)
            if model.pruning.method.chooses.varies:  # compiled, padding is that of the longest that there may be
                torch.testing.assert_close(compiled(x), want, atol=1e-5, rtol=1e-5)
            else:
                assert torch.equal(compiled(x), want)
    torch._dynamo.reset()


@pytest.mark.slow
@torch.inference_mode()
def test_compiled_computes_the_same():
    torch._dynamo.reset()
    model = tpbook.prune(timm.create_model(TINY, depth=3).eval(), "etps", keep_ratio=0.5, at=(1, 2))
    x = torch.randn(2, 3, 160, 160)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()
