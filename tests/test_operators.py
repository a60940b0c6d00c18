"""What a stage starts and moves: the counter, by hand; and the counts of every method, which may only fall."""

import json
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from builders import BUILDERS, answer

import tpbook
from tpbook.kernels import cpu
from tpbook.methods import Method
from tpbook.methods.evit import Fuse
from tpbook.methods.evovit import Bypass
from tpbook.methods.parts import Score
from tpbook.timing import operators
from tpbook.timing.bound import sliced

COMMITTED = Path(__file__).parent.parent / "notebooks/results/operators.json"

# Of DeiT-Ti at ρ = 0.7, batch 2: operators that a stage starts, and bytes that it moves, as multiples of its tokens;
# both for float32 and bfloat16, by PyTorch's operators and by the kernels of a CPU. They are upper limits: who makes a
# stage cheaper takes them down, nobody takes them up.
LIMITS = {
    "dynamicvit": {False: ((5, 2.85), (5, 2.88)), True: ((2, 1.44), (2, 1.45))},
    "evit": {False: ((12, 6.91), (14, 10.28)), True: ((3, 2.78), (3, 2.82))},
    "topk": {False: ((10, 5.96), (10, 8.1)), True: ((3, 2.46), (3, 2.48))},
    "dtps": {False: ((20, 10.52), (22, 22.7)), True: ((2, 1.75), (2, 1.77))},
    "etps": {False: ((25, 13.63), (27, 27.92)), True: ((3, 2.77), (3, 2.8))},
    "tome": {False: ((66.67, 9.98), (74.34, 22.59)), True: ((66.67, 9.98), (74.34, 22.59))},
    "dpcknn": {False: ((48, 29.34), (51, 53.36)), True: ((48, 29.34), (51, 53.36))},
    "evovit": {False: ((44.67, 14.5), (44.67, 18.5)), True: ((30.34, 6.79), (30.34, 7.14))},
    "ats": {False: ((81.34, 9.57), (88.34, 18.39)), True: ((77, 7.21), (84, 15.05))},  # as many as images keep
}
KERNELS = [False, pytest.param(True, marks=pytest.mark.skipif(cpu.operators() is None, reason="nobody has built them"))]


def count(function):
    """Operators and bytes of a call."""
    with operators.Work() as counted:
        function()
    return dict(counted.operators), counted.bytes


@torch.no_grad()
def test_operators_and_bytes_of_a_module_by_hand():
    class Hand(torch.nn.Module):
        def forward(self, x):  # (4, 3) float32: 48 bytes
            y = x + torch.ones(3).expand(4, 3)  # ones: 12 written. add: 48 and 12 read, 48 written
            y.mul_(2)  # 48 read, 48 written
            y = F.embedding(torch.tensor([2, 0]), y)  # 16 of positions, 24 of 48 read, 24 written
            return y.bfloat16().t()  # 24 read, 12 written

    x, hand = torch.randn(4, 3), Hand()
    counted = operators.work(hand, x)
    assert dict(counted.operators) == {
        "aten.ones": 1, "aten.add": 1, "aten.mul_": 1, "aten.embedding": 1, "aten._to_copy": 1
    }  # fmt: skip
    assert counted.bytes == 12 + 108 + 96 + 64 + 36


def test_views_and_empty_memory_are_no_operators():
    x = torch.randn(4, 6)
    views = (
        lambda: x.view(2, 12), lambda: x.expand(3, 4, 6), lambda: x.transpose(0, 1), lambda: x.select(0, 1),
        lambda: x[1:3], lambda: x.as_strided((2, 2), (1, 2)), lambda: x.t(), lambda: x.unsqueeze(0),
        lambda: x.detach(), lambda: x.chunk(2, dim=1), lambda: x.unbind(0), lambda: x.reshape(24), lambda: x.float(),
        lambda: x.flatten(), lambda: torch.ops.aten.alias(x), lambda: torch.empty(3), lambda: torch.empty_like(x),
        lambda: x.new_empty(2), lambda: torch.ops.aten._unsafe_view(x, (24,)),
    )  # fmt: skip
    for view in views:
        assert count(view) == ({}, 0)
    assert count(lambda: x.t().reshape(24)) == ({"aten.clone": 1}, 192)  # which has to copy


@pytest.mark.parametrize("step, expected", [
    (lambda x, at: x.gather(1, at), 16 + 8 + 8),  # at: (2, 1) int64
    (lambda x, at: x.index_select(0, at[:, 0]), 16 + 24 + 24),
    (lambda x, at: x[at[:, 0]], 16 + 24 + 24),
    (lambda x, at: x[torch.arange(2).repeat(20)], None),
])  # fmt: skip
def test_a_lookup_reads_what_it_gives_and_never_more_than_there_is(step, expected):
    x, at = torch.randn(2, 3), torch.tensor([[1], [0]])
    if expected is None:
        names, moved = count(lambda: step(x, at))
        assert moved == 16 + (16 + 320) + (320 + 24 + 480)  # arange, repeat, index
    else:
        assert count(lambda: step(x, at))[1] == expected


@pytest.fixture(scope="module")
def tiny():
    """method, dtype → a pruned DeiT-Ti of random weights, and two images."""

    def make(method, dtype="float32", **kwargs):
        torch.manual_seed(0)
        model = tpbook.prune(timm.create_model("deit_tiny_patch16_224").eval(), method, **kwargs)
        return model.to(getattr(torch, dtype)), torch.randn(2, 3, 224, 224).to(getattr(torch, dtype))

    return make


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", LIMITS)
@pytest.mark.parametrize("kernels", KERNELS)
def test_counts_only_fall(method, dtype, kernels):
    [row] = operators.measure(method=method, dtype=dtype, batch=2, kernels=kernels)
    started, moved = LIMITS[method][kernels][dtype == "bfloat16"]
    assert row["operators"] <= started and row["times_tokens"] <= moved
    [committed] = [
        row for row in json.loads(COMMITTED.read_text())["rows"]
        if (row["method"], row["dtype"], row["kernels"]) == (method, dtype, kernels)
    ]  # fmt: skip  # the chapter's, of batch 8: `make operators` where it is behind
    assert committed["operators"] == row["operators"]
    assert committed["times_tokens"] == pytest.approx(row["times_tokens"], rel=0.03)


def test_what_is_counted_with_kernels_where_there_are_none(monkeypatch):
    monkeypatch.setattr(cpu, "operators", lambda: None)
    rows = operators.measure(model="test_vit", method="evit", dtype="float32")
    assert [row["kernels"] for row in rows] == [False]
    with pytest.raises(ValueError, match="kernels must be False where they are not built"):
        operators.measure(kernels=True)
    with pytest.raises(TypeError, match="kernels must be True or False, got 1"):
        operators.measure(kernels=(1,))


def test_a_copy_of_the_tokens_shows(small, images, monkeypatch):
    model = tpbook.prune(small(depth=12), "evit", keep_ratio=0.6)
    x = images(model)
    before, stage = operators.a_stage(model, x), Fuse.__call__

    def copies(self, tokens, order, kept, call):
        return stage(self, tokens.replace(x=tokens.x.double().float()), order, kept, call)

    monkeypatch.setattr(Fuse, "__call__", copies)
    after, entering = operators.a_stage(model, x), [count.enter for count in model.pruning.counts(36)]
    copied = 2 * sum(1 + n for n in entering) * 48 * (4 + 8 + 8 + 4)
    assert after["operators"] == before["operators"] + 2
    assert 3 * (after["bytes"] - before["bytes"]) == pytest.approx(copied)
    times = copied / (2 * sum(entering) * 48 * 4)
    assert after["times_tokens"] - before["times_tokens"] == pytest.approx(times)


@pytest.mark.parametrize("method", LIMITS)
def test_a_bound_is_its_own_and_has_the_dense_models_operators(small, images, method):
    model = small(depth=12)
    x, dense = images(model), operators.work(model, images(model)).operators
    tpbook.prune(model, method, keep_ratio=0.6)
    blocks = [block.mlp for block in model.blocks]
    seen = []
    handles = [mlp.register_forward_hook(lambda module, args, out: seen.append(out.shape[1])) for mlp in blocks]
    with torch.no_grad(), tpbook.trace(model) as t:
        model(x)
    pruned, seen[:] = list(seen), []
    varies = model.pruning.method.chooses.varies
    bound = sliced(model, [patch.shape[1] for patch in t.kept] if varies else None)
    started = operators.work(bound, x).operators
    assert seen == pruned and pruned[0] > pruned[-1]
    for handle in handles:
        handle.remove()
    assert operators.a_stage(bound, x) == {"operators": 0, "bytes": 0, "times_tokens": 0}
    if model.pruning.method.reduce.rejoins:  # arange: who is who; cat: those that waited are put back
        assert started - dense == {"aten.arange": 1, "aten.cat": 6}
    elif not model.pruning.method.score.learned:
        assert started == dense
    assert operators.a_stage(model, x)["operators"] > 0


class First(Score):
    """The earlier a token is, the better."""

    name, words = "first", "score: the order"

    def __call__(self, call):
        batch, n = call.x.shape[:2]
        return -torch.arange(n, device=call.x.device).float().expand(batch, -1)


@pytest.mark.parametrize("name", ["vit", "eva_fused"])
@torch.no_grad()
def test_the_bound_puts_tokens_back(name, monkeypatch):
    for last in (True, False):
        monkeypatch.setitem(tpbook.METHODS, "first", Method(First(), Bypass(), "before", "floor_entering", "none"))
        model, x = BUILDERS[name]()
        dense = answer(model, x)
        tpbook.prune(model, "first", keep_ratio=0.6, at=(1, 2), rejoin_last=last)
        got = answer(sliced(model), x)
        torch.testing.assert_close(got, answer(model, x), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(got, dense, atol=1e-3)


@pytest.mark.parametrize("method", ["dtps", "random"])
def test_inference_mode_changes_nothing(tiny, method):
    model, x = tiny(method, keep_ratio=0.5)
    outside = operators.a_stage(model, x)
    with torch.inference_mode():
        model, _ = tiny(method, keep_ratio=0.5)  # its predictors are inference tensors
        assert operators.a_stage(model, x) == outside


@pytest.mark.parametrize("kernels", KERNELS)
@torch.no_grad()
def test_a_profile_has_every_operator(small, images, monkeypatch, kernels):
    monkeypatch.setattr(tpbook.kernels, "enabled", kernels)
    model = tpbook.prune(small(depth=12), "etps", keep_ratio=0.6)
    x = images(model)
    counted = operators.work(model, x).operators
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(x)
    seen = {event.key: event.count for event in profile.key_averages()}
    names = "sort topk embedding bmm baddbmm scatter_add index_add max cat native_layer_norm"
    for name in names.split():
        assert seen.get(f"aten::{name}", 0) == counted[f"aten.{name}"]
    assert all(seen[name.replace(".", "::")] >= number for name, number in counted.items())


def test_a_model_that_is_not_pruned_or_trains_is_refused(small, images):
    model = small()
    x = images(model)
    with pytest.raises(ValueError, match="model must be a pruned one in eval mode, got VisionTransformer"):
        operators.a_stage(model, x)
    tpbook.prune(model, "evit")
    with pytest.raises(ValueError, match="eval mode"):
        operators.a_stage(model.train(), x)


def test_the_command(tmp_path, capsys):
    out = tmp_path / "operators.json"
    words = ["model=test_vit", "method=dynamicvit,evit", "dtype=bfloat16", "batch=2", "keep_ratio=0.5"]
    operators.main([*words, "kernels=false", f"out={out}"])
    written = json.loads(out.read_text())
    assert [(row["method"], row["dtype"], row["batch"]) for row in written["rows"]] == [
        ("dynamicvit", "bfloat16", 2), ("evit", "bfloat16", 2)
    ]  # fmt: skip
    assert written["run"]["torch"] and all(row["bytes"] > 0 for row in written["rows"])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("dynamicvit bfloat16 PyTorch: a stage 5 operators, ") and second.endswith(" × tokens")
    operators.main(["--help"])
    assert "python -m tpbook.timing.operators" in capsys.readouterr().out


@pytest.mark.parametrize("word, message", [
    ("model=deit", "model must be a timm model"),
    ("method=evt", "method must be one of dynamicvit.*got 'evt'"),
    ("dtype=float8", "dtype must be one of float32, bfloat16, float16, got 'float8'"),
    ("batch=0", "batch must be an int of at least 1, got 0"),
    ("keep_ratio=2.0", "got 2.0"),
    ("rho=0.5", "rho"),
])  # fmt: skip
def test_refusals(word, message):
    with pytest.raises(SystemExit, match=message):
        operators.main([word])
