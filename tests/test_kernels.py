"""The kernels give what PyTorch's operators give: C++ on a CPU, and Triton on a GPU or in its interpreter.

Whether it interprets Triton settles when it is imported, so without a GPU these tests run again in a process of their
own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import tpbook
from tpbook import kernels
from tpbook.attention import heard
from tpbook.keep_mask import masked_product
from tpbook.kernels import cpu
from tpbook.methods.evit import fuse
from tpbook.methods.tps import euclidean, squeeze_at
from tpbook.timing import operators
from tpbook.tokens import retain

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = kernels.INTERPRETED or DEVICE == "cuda"
DTYPES = (torch.float32, torch.float16) if kernels.INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
SIZES = ((3, 8), (70, 24))  # n, C: less than a tile, and not a multiple of one
HERE = pytest.mark.skipif(not TRITON and cpu.operators() is None, reason="nobody has built them (no C++ compiler?)")
BY_TRITON = pytest.mark.skipif(not TRITON, reason="runs in the interpreter, above")


@pytest.mark.skipif(TRITON, reason="runs in this process")
def test_in_the_interpreter():
    pytest.importorskip("triton")
    words = ["-q", "-x", "-n", "0", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0 and " passed, 4 skipped" in done.stdout, done.stdout[-4000:]


@pytest.fixture
def both(monkeypatch):
    """What a function gives by the kernels and without, and that these are two ways."""

    def run(function):
        monkeypatch.setattr(kernels, "enabled", True)
        with operators.Work() as work:
            ours = function()
        assert any(name.startswith("tpbook.") for name in work.operators), "no kernel ran"
        monkeypatch.setattr(kernels, "enabled", False)
        return ours, function()

    return run


def tokens(n, dim, dtype, batch=2):
    torch.manual_seed(n)
    return torch.randn(batch, n + 1, dim, device=DEVICE).to(dtype), torch.rand(batch, n, device=DEVICE)


@HERE
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, dim", [*SIZES, (300, 72)])
@torch.no_grad()
def test_row(both, dtype, n, dim):
    qkv = torch.randn(2, n, 3, 3, dim, device=DEVICE).to(dtype)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D), as timm has it
    ours, theirs = both(lambda: heard(q[:, :, :1], k, dim**-0.5))
    assert ours.dtype is torch.float32
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours.sum(dim=1), torch.ones(2, device=DEVICE))


@HERE
@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize("n", [1, 5, 40, 300])
def test_rank(n, invert):
    scores = torch.rand(2, 2 * n, device=DEVICE)[:, ::2]  # which is not contiguous
    scores[:, n // 2 :] = scores[:, n // 2].unsqueeze(1)  # of equal ones the earlier first
    want, stage = scores.argsort(dim=1, descending=not invert, stable=True), kernels.stage_kernels(scores)
    assert torch.equal(stage.rank(scores, n, invert), want)
    assert torch.equal(stage.rank(scores, (n + 1) // 2, invert), want[:, : (n + 1) // 2])


@HERE
def test_rank_is_a_permutation_whatever_the_scores():
    nan, inf = float("nan"), float("inf")
    scores = torch.tensor([[nan, 1, -inf, nan, inf, 1], [nan] * 6], device=DEVICE)
    stage = kernels.stage_kernels(scores)
    assert stage.rank(scores, 6).tolist() == [[0, 3, 4, 1, 5, 2], [0, 1, 2, 3, 4, 5]]
    assert stage.rank(scores, 6, invert=True).sort(dim=1).values.tolist() == [[0, 1, 2, 3, 4, 5]] * 2


@HERE
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, dim", SIZES)
@pytest.mark.parametrize("first", [0, 1])
@torch.no_grad()
def test_stage(both, dtype, n, dim, first):
    x, scores = tokens(n, dim, dtype)
    x = x.transpose(1, 2).contiguous().transpose(1, 2) if n == 3 else x  # channels that do not lie side by side
    order, k = scores.argsort(dim=1, descending=True), max(1, n // 3)
    near = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    near = {"atol": near, "rtol": near}
    if first == 0:
        x = x[:, 1:]
    assert torch.equal(*both(lambda: retain(x, order[:, :k], first)))
    torch.testing.assert_close(*both(lambda: fuse(x, order, k, scores, first)), **near)
    (ours, host), (theirs, want) = both(lambda: squeeze_at(x, order, k, first))
    assert torch.equal(host, want)
    torch.testing.assert_close(ours, theirs, **near)


@HERE
@torch.no_grad()
def test_a_guest_that_is_not_finite_spoils_its_own_image_alone(both):
    x, scores = tokens(9, 16, torch.float32)
    x[0, 5] = float("inf")
    ours, theirs = both(lambda: squeeze_at(x, scores.argsort(dim=1), 4, 1)[0])
    torch.testing.assert_close(ours[1], theirs[1])


@BY_TRITON
@pytest.mark.parametrize("dtype", [torch.float16])
@pytest.mark.parametrize("n, dim", [(5, 16), (70, 24)])
def test_masked_attention_and_its_gradients(monkeypatch, dtype, n, dim):
    torch.manual_seed(0)
    qkv = torch.randn(2, n, 3, 2, dim, device=DEVICE).to(dtype).requires_grad_()
    keep = (torch.rand(2, n, device=DEVICE) < 0.5).float()
    keep[:, 0] = 1
    keep.requires_grad_()
    weight = torch.randn(2, 2, n, dim, device=DEVICE).to(dtype)
    found = []
    for on in (True, False):
        monkeypatch.setattr(kernels, "enabled", on)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = masked_product(q, k, v, keep, dim**-0.5)
        assert ("MaskedProduct" in type(y.grad_fn).__name__) is on
        found.append((y, *torch.autograd.grad(y, (qkv, keep), weight)))
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, atol=4e-3 * theirs.abs().max().item(), rtol=4e-3)


@HERE
@pytest.mark.parametrize("method", ["dynamicvit", "evit", "dtps", "etps"])
@torch.no_grad()
def test_a_model(monkeypatch, method):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=64, depth=3).eval().to(DEVICE)
    tpbook.prune(model, method, keep_ratio=0.5, at=(1, 2))
    x = torch.randn(2, 3, 64, 64, device=DEVICE)
    monkeypatch.setattr(kernels, "enabled", True)
    counted = operators.a_stage(model, x)
    with tpbook.trace(model) as ours:
        logits = model(x)
    assert torch.equal(logits, model(x))  # from run to run
    monkeypatch.setattr(kernels, "enabled", False)
    with tpbook.trace(model) as theirs:
        want = model(x)
    torch.testing.assert_close(logits, want, atol=1e-5, rtol=1e-4)
    for mine, other in zip(ours.kept, theirs.kept):
        assert torch.equal(mine, other)
    most = {"dynamicvit": (2, 2), "evit": (3, 4), "dtps": (2, 3), "etps": (3, 5)}[method][TRITON]
    assert counted["operators"] == most and counted["times_tokens"] < 3.1  # EViT reads all that it sums up


@HERE
def test_what_they_are_not_for(monkeypatch):
    monkeypatch.setattr(kernels, "enabled", True)
    x = torch.randn(2, 5, 16, device=DEVICE)
    assert kernels.stage_kernels(x) and not kernels.masked_kernels(x)
    assert bool(kernels.masked_kernels(x.half())) is TRITON
    assert not kernels.stage_kernels(x.double()) and not kernels.stage_kernels(x.requires_grad_())
    with torch.no_grad():
        assert kernels.stage_kernels(x)
        with operators.Work() as work:  # only the cosine has a kernel
            squeeze_at(x, torch.rand(2, 4, device=DEVICE).argsort(dim=1), 2, 1, euclidean)
        assert "tpbook.squeeze" not in work.operators
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    monkeypatch.setattr(cpu, "operators", lambda: None)
    assert not kernels.stage_kernels(torch.randn(2, 5, 16))
    monkeypatch.setattr(kernels, "enabled", False)
    assert not kernels.stage_kernels(x.detach())


ON_CPU = pytest.mark.skipif(TRITON or cpu.operators() is None, reason="of the kernels of C++")


@ON_CPU
def test_on_a_cpu_what_is_not_there_is_not_read():
    x, order = torch.randn(2, 5, 8), torch.tensor([[0, 1, 4, 2], [0, 1, 2, 3]])
    assert not kernels.stage_kernels(x.to("meta")) and kernels.stage_kernels(x)
    own = cpu.operators()
    for call in (lambda: own.collect(x, order, 2, 1), lambda: own.squeeze(x, order, 2, 1)):
        with pytest.raises(IndexError, match="order must hold positions from 0 to 3, got 4"):
            call()
    with pytest.raises(RuntimeError, match="order must list at least 4 of 4 tokens of which 2 are kept"):
        own.squeeze(x, order[:, :3] % 4, 2, 1)
    with pytest.raises(RuntimeError, match="k must be from 0 to 5, the number of scores, got 6"):
        own.rank(x[:, :, 0], 6)
    with pytest.raises(RuntimeError, match="queries and keys must be .* of one dtype"):
        own.row(x[None], x[None].half(), 1.0)


@ON_CPU
@pytest.mark.parametrize("threads", [1, 2])
@torch.no_grad()
def test_on_a_cpu_threads_and_batches_change_nothing(threads):
    x, scores = tokens(40, 24, torch.float32, batch=5)
    before, own = torch.get_num_threads(), cpu.operators()
    order = own.rank(scores, 40)
    whole = own.squeeze(x, order, 15, 1), own.collect(x, order, 15, 1, scores)
    torch.set_num_threads(threads)
    try:
        for b in range(5):
            left, host = own.squeeze(x[b : b + 1], order[b : b + 1], 15, 1)
            assert torch.equal(left[0], whole[0][0][b]) and torch.equal(host[0], whole[0][1][b])
            assert torch.equal(own.collect(x[b : b + 1], order[b : b + 1], 15, 1, scores[b : b + 1])[0], whole[1][b])
        assert torch.equal(own.squeeze(x, order, 15, 1)[0], whole[0][0])
    finally:
        torch.set_num_threads(before)


def test_on_a_cpu_they_are_built_once_and_whole(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "new"))
    cpu.library.cache_clear(), cpu.operators.cache_clear()
    try:
        assert cpu.operators() is None and not kernels.stage_kernels(torch.randn(2, 5, 16)) or TRITON
        monkeypatch.setenv("CXX", "no-such-compiler")
        with pytest.raises(SystemExit, match="CXX must be .* that is installed, got 'no-such-compiler'"):
            cpu.main()
        monkeypatch.setenv("CXX", "false")
        with pytest.raises(RuntimeError, match="false could not compile stage.cpp"):
            cpu.build()
        assert not list((tmp_path / "new").iterdir())
        monkeypatch.setenv("CXX", str(Path(__file__).parent / "none"))
        cpu.library().touch()  # as if it had been built
        cpu.main()
        assert capsys.readouterr().out.strip() == str(cpu.library())
        monkeypatch.setattr(torch, "__version__", "2.0.0")
        cpu.library.cache_clear()
        assert not cpu.library().exists()  # another PyTorch has its own
        monkeypatch.setattr(sys, "platform", "win32")
        with pytest.raises(RuntimeError, match="on Linux only, got 'win32'"):
            cpu.build()
    finally:
        cpu.library.cache_clear(), cpu.operators.cache_clear()
