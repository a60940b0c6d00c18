"""ONNX Runtime gives PyTorch's logits, kept patches and hosts, from one file for every keep ratio, or one for one."""

import copy
import ctypes
import io
import json
import math
import random
import subprocess
import sys
import warnings
from dataclasses import replace
from fractions import Fraction
from itertools import product

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from builders import BUILDERS
from timm.layers import RmsNorm

import tpbook
from tpbook.exporting import split
from tpbook.families import family_of
from tpbook.methods import METHODS, token_counts
from tpbook.onnx_plan import knob_counts

DIGITS = "vit_digits_patch4_56"
RATIOS = (1, 0.9, 0.7, 0.5, 0.3, (1, 0.5, 1), (0.8, 0.9, 0.4), 0.001)
VARIANTS = {
    "dynamicvit": {},
    "evit": {},
    "dtps": {},
    "etps": {},
    "random": {},
    "tome": {},
    "dpcknn": {},
    "evovit": {},
    "tome random": {"score": "random", "proportional": False},
    "dpcknn random": {"score": "random"},
    "evit package": {"fuse_weights": "score", "score": "predictor"},
    "evit unfused": {"fuse": False},
    "evit inverted": {"invert": True},
    "evit static": {"score": "static"},
    "evit predictor": {"score": "predictor"},
    "etps euclidean": {"similarity": "euclidean"},
    "etps random": {"score": "random"},
    "random static": {"score": "static", "invert": True},
}


def pruned(model, method, **options):
    """Pruned, any predictors far from their start, where every token scores nearly the same."""
    tpbook.prune(model, method, **options)
    for name, p in model.named_parameters():
        if name.startswith("score_predictor") and p.dim() == 2:
            torch.nn.init.normal_(p, std=0.3)
    return model


def session(model):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model if isinstance(model, bytes) else str(model), options)


def run(runtime, images, ratio=None, trace=None):
    """Outputs by name; random draws are those of the PyTorch trace."""
    feed = {"images": images.numpy()}
    if ratio is not None:
        feed["keep_ratio"] = np.asarray(ratio, np.float32)
    for given in runtime.get_inputs():
        if given.name == "random":
            feed["random"] = np.zeros((len(images), *given.shape[1:]), np.float32)
            for s, scores in enumerate(trace.scores):
                feed["random"][:, s, : scores.shape[1]] = scores
    return dict(zip([o.name for o in runtime.get_outputs()], runtime.run(None, feed), strict=True))


def assert_kept(got, s, t, patches):
    """The patches of PyTorch's trace at stage s, in order; tokens whose scores are equal but for rounding may swap."""
    want = t.kept[s].numpy()
    assert got.dtype == np.int64 and got.shape == want.shape
    if np.array_equal(got, want):
        return
    every = torch.arange(patches).expand(len(want), -1)
    entering = t.kept[s - 1] % (patches + 1) if s else every  # fused ones last
    score = torch.zeros(len(want), patches + 1).scatter(1, entering, t.scores[s])
    for row in np.flatnonzero((got != want).any(axis=1)):
        places = got[row] != want[row]
        ours, theirs = got[row][places], want[row][places]
        assert (ours >= 0).all() and (theirs >= 0).all()
        np.testing.assert_allclose(score[row, ours], score[row, theirs], rtol=1e-5)


def within(model, ratios):
    """Those of the ratios that the method can go to."""
    least = model.pruning.method.reduce.least_ratio
    return [ratio for ratio in ratios if np.min(ratio) >= least]


@torch.no_grad()
def assert_same(runtime, model, images, ratios, knob=True):
    for ratio in within(model, ratios):
        model.keep_ratio = ratio
        with tpbook.trace(model) as t:
            want = model(images)
        got = run(runtime, images, ratio if knob else None, t)
        np.testing.assert_allclose(got["logits"], want, atol=1e-4, rtol=0)
        assert list(got)[1:] == [f"{what}_{s + 1}" for what in ("kept", "host") for s in range(len(getattr(t, what)))]
        for s in range(len(t.kept)):
            assert_kept(got[f"kept_{s + 1}"], s, t, math.prod(family_of(model).grid(model)))
        for s, host in enumerate(t.host):
            assert np.array_equal(got[f"host_{s + 1}"], host)


@pytest.mark.parametrize("patches", [49, 196, 256, 576])
@pytest.mark.filterwarnings("ignore:keep_ratio")
def test_counts_equal_the_exact_ones(patches):
    knobs = torch.arange(1, 10_001) / 10_000  # every ratio of four decimals
    package = replace(METHODS["evit"], reduce=METHODS["evit"].reduce.configure(fuse_weights="score"))
    for method in (METHODS["random"], METHODS["etps"], METHODS["evit"], METHODS["evovit"], package):
        got = knob_counts(patches, knobs.expand(3, -1), method)
        want = [token_counts(patches, [p / 10_000] * 3, method) for p in range(1, 10_001)]
        for s in range(3):
            assert got[s].kept.tolist() == [c[s].kept for c in want]
            assert got[s].leave.tolist() == [c[s].leave for c in want]


@pytest.mark.filterwarnings("ignore:keep_ratio")
def test_counts_of_many_stages():
    draw = random.Random(0)
    for _ in range(300):
        ratios = [draw.randint(1, 10_000) / 10_000 for _ in range(draw.choice([1, 2, 6, 12]))]
        for method in [*METHODS.values(), replace(METHODS["random"], reduce="fuse")]:
            patches = draw.randint(1, 4096)
            ratios = [max(ratio, method.reduce.least_ratio) for ratio in ratios]
            got = knob_counts(patches, torch.tensor(ratios), method)
            assert [(c.kept, c.leave) for c in got] == [
                (c.kept, c.leave) for c in token_counts(patches, ratios, method)
            ]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.filterwarnings("ignore:keep_ratio")
def test_digits(name, tmp_path):
    model = pruned(tpbook.load_backbone(DIGITS), name.split()[0], **VARIANTS[name])
    runtime = session(tpbook.export(model, tmp_path / "m.onnx"))
    images = tpbook.data.digits("test").images[10:13]
    assert_same(runtime, model, images, RATIOS)
    assert_same(runtime, model, images[:1], RATIOS)


def test_every_form_of_a_ratio(small, images, tmp_path):
    model = tpbook.prune(small(), "evit")
    runtime, x = session(tpbook.export(model, tmp_path / "m.onnx")), images(model)
    want = run(runtime, x, 0.5)
    for ratio in ([0.5], [0.5, 0.5, 0.5]):
        assert all(np.array_equal(a, b) for a, b in zip(run(runtime, x, ratio).values(), want.values(), strict=True))
    assert [run(runtime, x, 1.5)[f"kept_{s}"].shape for s in (1, 2, 3)] == [(2, 36)] * 3  # nothing over 1
    assert run(runtime, x, 1)["kept_3"].tolist() == [list(range(36))] * 2


# ---- one ratio


def constants(proto):
    """Names of what does not depend on any input."""
    named = {node.output[0] for node in proto.graph.node if node.op_type == "Constant"}
    return named | {tensor.name for tensor in proto.graph.initializer}


WISHES = [{"keep_ratio": 0.7}, {"keep_ratio": (1, 0.5, 0.31)}, {"keep": (20, 20, 7)}]
CONSTANT = [
    *product(("dynamicvit", "evit", "etps", "random"), WISHES), ("evit", {"r": 6}), ("tome", {"keep_ratio": 0.7}),
    ("dpcknn", {"keep": (20, 20, 7)}), ("evovit", {"keep_ratio": (1, 0.5, 0.31)}),
]  # fmt: skip


@pytest.mark.parametrize("method, wish", CONSTANT)
@torch.no_grad()
def test_one_ratio_makes_every_count_a_constant(small, images, tmp_path, recwarn, method, wish):
    model = pruned(small(), method, keep_ratio=0.6)
    path, x = tpbook.export(model, tmp_path / "m.onnx", **wish), images(model, batch=3)
    assert model.keep_ratio == 0.6 and not recwarn.list
    proto = onnx.load(path)
    assert [i.name for i in proto.graph.input] == ["images"] + ["random"] * model.pruning.method.score.drawn
    counted = [node.input[1] for node in proto.graph.node if node.op_type == "TopK"]
    assert counted and set(counted) <= constants(proto)
    onnx.checker.check_model(proto, full_check=True)
    setattr(model, *next(iter(wish.items())))
    with tpbook.trace(model) as t:
        want = model(x)
    runtime = session(path)
    got = run(runtime, x, None, t)
    np.testing.assert_allclose(got["logits"], want, atol=1e-4, rtol=0)
    shapes = {o.name: o.shape for o in runtime.get_outputs()}
    for s, kept in enumerate(t.kept, 1):
        assert_kept(got[f"kept_{s}"], s - 1, t, 36)
        assert shapes[f"kept_{s}"] == ["batch", kept.shape[1]]
    for s, host in enumerate(t.host, 1):
        assert np.array_equal(got[f"host_{s}"], host)


def test_one_ratio_is_noted(small, tmp_path):
    model = tpbook.prune(small(), "evit")
    noted = metadata(tpbook.export(model, tmp_path / "m.onnx", keep_ratio=(Fraction(1, 2), 0.7, 1)))
    assert noted["keep_ratio"] == [0.5, 0.7, 1] and "keep" not in noted
    noted = metadata(tpbook.export(model, tmp_path / "m.onnx", keep=5))
    assert noted["keep"] == 5 and "keep_ratio" not in noted
    noted = metadata(tpbook.export(model, tmp_path / "m.onnx", r=[3, 2]))
    assert noted["r"] == [3, 2, 0] and not {"keep", "keep_ratio"} & set(noted)
    with pytest.warns(UserWarning, match="keep_ratio=0.001 would keep none"):
        tpbook.export(tpbook.prune(small(), "random"), tmp_path / "m.onnx", keep_ratio=0.001)


@torch.no_grad()
def test_a_model_that_says_how_many_it_removes_is_a_file_for_that(small, images, tmp_path):
    """ToMe's own way: all blocks, each of its r; a ratio that is given all the same makes a file for it."""
    model = tpbook.prune(small(), "tome", r=(5, -1.0))
    path, x = tpbook.export(model, tmp_path / "m.onnx"), images(model, batch=3)
    assert [given.name for given in onnx.load(path).graph.input] == ["images"]
    noted = metadata(path)
    assert noted["r"] == [10, 8, 6, 4, 2, 0] and noted["at"] == [0, 1, 2, 3, 4, 5] and noted["method"] == "tome"
    with tpbook.trace(model) as t:
        want = model(x)
    got = run(session(path), x)
    np.testing.assert_allclose(got["logits"], want, atol=1e-4, rtol=0)
    assert [kept.shape[1] for kept in t.kept] == [26, 18, 12, 8, 6, 6]
    for s in range(6):
        assert np.array_equal(got[f"kept_{s + 1}"], t.kept[s]) and np.array_equal(got[f"host_{s + 1}"], t.host[s])
    assert "r" not in metadata(tpbook.export(model, tmp_path / "m.onnx", keep_ratio=0.9))


# ---- models


CASES = [
    ("deit3", "etps"), ("dinov2_reg", "evit"), ("clip", "dtps"), ("distilled", "evit"), ("average", "evit"),
    ("distilled", "tome"), ("siglip", "tome"), ("average", "evovit"),
    ("siglip", "dynamicvit"), ("siglip", "random"), ("qk_norm", "etps"), ("large_image", "etps"),
]  # fmt: skip


@pytest.mark.parametrize("family, method", CASES)
def test_families(small, images, tmp_path, family, method):
    model = pruned(small(family), method)
    runtime = session(tpbook.export(model, tmp_path / "m.onnx"))
    assert_same(runtime, model, images(model, batch=3), (1, 0.7, (0.9, 0.5, 0.6)))


NORMAL = [name for name in BUILDERS if name.split("_")[0] in ("vit", "lvvit", "t2t", "ps", "eva", "beit", "naflex")]


@pytest.mark.parametrize("name", NORMAL)
@torch.no_grad()
def test_timm_families(tmp_path, name):
    model, x = BUILDERS[name]()
    x = torch.cat([x, -x[:1]])  # traced with two
    dense = run(session(tpbook.export(model, tmp_path / "m.onnx")), x)["logits"]
    np.testing.assert_allclose(dense, model(x), atol=1e-4, rtol=1e-4)
    method, options = "evit", {}
    if not family_of(model).has_class_token(model):
        method, options = "etps", {"score": "attention_received"}
    tpbook.prune(model, method, at=(1, 2), **options)
    assert_same(session(tpbook.export(model, tmp_path / "m.onnx")), model, x, (1, 0.6))
    runtime = session(tpbook.export(model, tmp_path / "m.onnx", keep_ratio=0.4))
    assert_same(runtime, model, x, (0.4,), knob=False)


@pytest.mark.parametrize("name", ["torchvision_vit", "hf_vit", "open_clip_vit"])
def test_other_families_are_refused_in_words(tmp_path, name):
    model, _ = BUILDERS[name]()
    there = "LV-ViT, PS-ViT, T2T-ViT, timm Beit, timm Eva, timm NaFlexVit, timm VisionTransformer"
    with pytest.raises(TypeError, match=f"model must be a {there}, got {type(model).__name__}"):
        tpbook.export(model, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", [None, "dynamicvit", "etps"])
@torch.no_grad()
def test_rms_norm(small, images, tmp_path, method):
    model = small("deit", norm_layer=RmsNorm)
    assert isinstance(model.blocks[0].norm1, RmsNorm)
    if method:
        pruned(model, method)
    path, x = tpbook.export(model, tmp_path / "m.onnx"), images(model)
    if method:
        assert_same(session(path), model, x, (1, 0.7))
    else:
        np.testing.assert_allclose(run(session(path), x)["logits"], model(x), atol=1e-4, rtol=0)


def test_dynamic_image_size_is_fixed(small, tmp_path):
    model = tpbook.prune(small("any_size"), "evit")
    runtime = session(tpbook.export(model, tmp_path / "m.onnx"))
    assert_same(runtime, model, torch.randn(2, 3, 96, 96), (0.7,))
    with pytest.raises(Exception, match="invalid dimensions"):
        run(runtime, torch.randn(2, 3, 64, 128), 0.7)


@pytest.mark.parametrize("at", [(2,), (1, 2, 3, 5), (0, 1, 2, 3, 4, 5)])
@pytest.mark.parametrize("method", ["evit", "etps", "random"])
@pytest.mark.filterwarnings("ignore:keep_ratio")
def test_other_blocks(small, images, tmp_path, method, at):
    model = tpbook.prune(small(), method, at=at)
    runtime = session(tpbook.export(model, tmp_path / "m.onnx"))
    assert_same(runtime, model, images(model), (1, 0.9, 0.4, [0.5 + 0.08 * s for s in range(len(at))]))


@pytest.mark.parametrize("family", ["deit", "siglip", "distilled"])
@torch.no_grad()
def test_dense(small, images, tmp_path, family):
    model = tpbook.mask(small(family), when="train")  # masks in training only
    model.grad_checkpointing = True
    x = images(model, batch=3)
    runtime = session(tpbook.export(model, tmp_path / "m.onnx"))
    assert [i.name for i in runtime.get_inputs()] == ["images"]
    got = run(runtime, x)
    assert list(got) == ["logits"]
    np.testing.assert_allclose(got["logits"], model(x), atol=1e-4, rtol=0)


def rounded(model):
    """Every tensor that a float16 file stores as halves, rounded to one."""
    with torch.no_grad():
        for p in model.parameters():
            if p.nbytes >= 1024:
                p.copy_(p.half().float())
    return model


def test_float16(tmp_path):
    model = tpbook.prune(tpbook.load_backbone(DIGITS), "etps")
    whole, half = tmp_path / "whole.onnx", tmp_path / "half.onnx"
    tpbook.export(model, whole)
    tpbook.export(model, half, weights="float16")
    assert_same(session(half), rounded(model), tpbook.data.digits("test").images[:3], (1, 0.5))
    sizes = [len(split(path)[1]) for path in (half, whole)]
    assert 0.48 < sizes[0] / sizes[1] < 0.51 and half.stat().st_size < 0.65 * whole.stat().st_size
    with torch.no_grad():
        model.pos_embed[0, 0, 0] = 7e4
    with pytest.raises(ValueError, match="pos_embed.*65504"):
        tpbook.export(model, half, weights="float16")


@pytest.mark.parametrize("weights", ["float32", "float16"])
def test_split(small, tmp_path, weights):
    options = {"evit": {}, "evit ": {"fuse": False}, "etps": {}, "random": {}, "random ": {"score": "static"}}
    backbone, parts = small(), {}
    for name in (*options, "dense"):
        model = copy.deepcopy(backbone)
        if name != "dense":
            tpbook.prune(model, name.strip(), **options[name])
        path = tpbook.export(model, tmp_path / "m.onnx", weights=weights)
        parts[name] = split(path)
        if name == "etps":
            whole = session(path)
    assert len({weights for _, weights in parts.values()}) == 1  # the same bytes
    graph, shared = parts["etps"]
    tensors = onnx.load_from_string(shared).graph
    names = [t.name for t in tensors.initializer]
    assert names == sorted(names) and all(len(t.raw_data) >= 1024 for t in tensors.initializer) and not tensors.node
    assert all(len(t.raw_data) < 1024 for t in onnx.load_from_string(graph).graph.initializer)
    assert set(names) < set(backbone.state_dict())  # called as in the model
    x = torch.randn(2, 3, 96, 96)
    want = run(whole, x, 0.6)
    for joined in (graph + shared, shared + graph):
        got = run(session(joined), x, 0.6)
        assert all(np.array_equal(got[name], want[name]) for name in want)


def test_split_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.onnx"):
        split(tmp_path / "gone.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(ValueError, match="bad.onnx is damaged"):
        split(tmp_path / "bad.onnx")


def test_valid_onnx(tmp_path):
    proto = onnx.load(tpbook.export(tpbook.prune(tpbook.load_backbone(DIGITS), "dtps"), tmp_path / "m.onnx"))
    knob = proto.graph.input[1]
    assert knob.name == "keep_ratio" and not knob.type.tensor_type.HasField("shape")  # so any rank is taken
    knob.type.tensor_type.shape.dim.add(dim_param="any")  # the checker wants one
    onnx.checker.check_model(proto, full_check=True)
    assert proto.opset_import[0].version == 17


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_caller_keeps_the_model(small, images, tmp_path, dtype):
    model = tpbook.prune(small(), "evit", keep_ratio=0.6).to(dtype).train()
    x, before = images(model).to(dtype), {k: v.clone() for k, v in model.state_dict().items()}
    want, hooks = model.eval()(x), [len(m._forward_hooks) for m in model.modules()]
    kinds, fused = [type(m) for m in model.modules()], model.blocks[0].attn.fused_attn
    model.train()
    path = tpbook.export(model, tmp_path / "m.onnx")
    assert model.training and all(m.training for m in model.modules())
    assert [type(m) for m in model.modules()] == kinds and model.keep_ratio == 0.6
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert all(b.attn.fused_attn == fused for b in model.blocks)
    state = model.state_dict()
    assert list(state) == list(before) and all(torch.equal(state[k], v) and v.dtype == dtype for k, v in before.items())
    assert torch.equal(model.eval()(x), want)
    if dtype is torch.bfloat16:
        assert_same(session(path), model.float(), images(model), (0.5,))


# ---- what the process exports otherwise, and what it prints


class Adds(torch.nn.Module):
    alpha = 1

    def forward(self, x, y):
        return x.index_add(1, torch.tensor([0, 2, 1]), y, alpha=self.alpha)


def users_own(opset):
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        torch.onnx.export(Adds(), (torch.zeros(2, 4, 3), torch.ones(2, 3, 3)), file, opset_version=opset, dynamo=False)
    return file.getvalue()


def test_a_users_own_export_is_as_before(small, tmp_path, monkeypatch):
    before = users_own(16), users_own(17)
    for opset in (16, 17):
        tpbook.export(tpbook.prune(small(), "etps"), tmp_path / "m.onnx", opset=opset)
    with pytest.raises(ValueError, match="hopeless"):
        tpbook.export(tpbook.prune(small(), "etps", similarity=hopeless), tmp_path / "m.onnx")
    assert (users_own(16), users_own(17)) == before
    x, y = torch.randn(2, 4, 3), torch.randn(2, 3, 3)
    runtime = session(before[1])
    [got] = runtime.run(None, dict(zip([i.name for i in runtime.get_inputs()], (x.numpy(), y.numpy()))))
    np.testing.assert_allclose(got, Adds()(x, y), atol=1e-6)
    monkeypatch.setattr(Adds, "alpha", 0.5)
    with pytest.raises(Exception, match="alpha != 1"):  # torch's own word
        users_own(17)


def adding(x, y):
    """A similarity that adds to some columns, twice to one of them, and along another dimension by another name."""
    c = F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).transpose(1, 2) - 3  # (B, p, k)
    c = c.index_add(2, torch.tensor([0, 1, 0]), torch.ones_like(c[:, :, :3]), alpha=0.3).transpose(1, 2)
    return torch.index_add(c, -2, torch.tensor([1, 1]), torch.full_like(c[:, :2], 0.2)).transpose(1, 2)


@pytest.mark.parametrize("opset", [16, 17, 20])
def test_index_add_minds_dimension_and_factor(small, images, tmp_path, opset):
    model = tpbook.prune(small(), "etps", similarity=adding)
    runtime = session(tpbook.export(model, tmp_path / "m.onnx", opset=opset))
    assert_same(runtime, model, images(model), (1, 0.7, 0.5))


@pytest.mark.parametrize("opset", [16, 20])
def test_opset(small, images, tmp_path, opset):
    model = pruned(small(), "dtps")
    path = tpbook.export(model, tmp_path / "m.onnx", opset=opset)
    assert onnx.load(path).opset_import[0].version == opset
    assert_same(session(path), model, images(model), (1, 0.6))


def unsaid(x, y):
    return (y @ x.mT).mT  # of which the exporter knows no name


def test_an_error_prints_no_graph(small, tmp_path, capfd):
    logs = torch._C._jit_is_onnx_log_enabled()
    with pytest.raises(ValueError, match="'unsaid': .*aten::mT") as error:
        tpbook.export(tpbook.prune(small(), "etps", similarity=unsaid), tmp_path / "m.onnx")
    ctypes.CDLL(None).fflush(None)  # torch prints by C++
    assert len(str(error.value)) < 300 and capfd.readouterr() == ("", "")
    assert torch._C._jit_is_onnx_log_enabled() == logs


def test_metadata(small, tmp_path):
    model = tpbook.prune(tpbook.load_backbone(DIGITS), "evit", at=(2, 5), fuse=False)
    expected = {
        "method": "evit", "score": "class_attention", "reduce": "drop", "at": [2, 5], "image_size": [56, 56],
        "patch_size": [4, 4], "mean": [tpbook.data.MEAN], "std": [tpbook.data.STD], "tpbook": tpbook.__version__,
    }  # fmt: skip
    assert metadata(tpbook.export(model, tmp_path / "m.onnx")) == expected
    dense = metadata(tpbook.export(small("large_image"), tmp_path / "m.onnx"))
    assert dense["method"] is dense["score"] is dense["reduce"] is None and dense["at"] == []
    assert dense["image_size"] == [96, 160] and dense["mean"] == [0.5, 0.5, 0.5]


def metadata(path):
    return json.loads(session(path).get_modelmeta().custom_metadata_map["tpbook"])


def hopeless(x, y):
    return torch.linalg.svd(x @ y.transpose(1, 2))[0] @ (x @ y.transpose(1, 2))


def test_errors_leave_nothing(small, tmp_path, monkeypatch):
    model, evit, path = small(), tpbook.prune(small(), "evit"), tmp_path / "m.onnx"
    cases = [
        (TypeError, "VisionTransformer, got Linear", torch.nn.Linear(1, 1), path, {}),
        (ValueError, "when=.always.", tpbook.mask(small(), when="always"), path, {}),
        (ValueError, "weights must be one of float32, float16, got 'int8'", model, path, {"weights": "int8"}),
        (ValueError, r"end in \.onnx, got '.*m\.pt'", model, tmp_path / "m.pt", {}),
        (FileNotFoundError, "gone", model, tmp_path / "gone" / "m.onnx", {}),
        (ValueError, "opset must lie from 16 to 20, got 15", model, path, {"opset": 15}),
        (ValueError, "opset must lie from 16 to 20, got 21", model, path, {"opset": 21}),
        (TypeError, "opset must be an int, got '17'", model, path, {"opset": "17"}),
        (TypeError, "opset must be an int, got True", model, path, {"opset": True}),
        (ValueError, "keep_ratio must be left unset .* not pruned, got 0.7", model, path, {"keep_ratio": 0.7}),
        (ValueError, "keep must be left unset .* not pruned, got 9", model, path, {"keep": 9}),
        (ValueError, "both be given, got 0.7 and 9", evit, path, {"keep_ratio": 0.7, "keep": 9}),
        (ValueError, "keep and r must not both be given, got 9 and 4", evit, path, {"keep": 9, "r": 4}),
        (ValueError, "r must be 0 or more tokens to remove, got -1", evit, path, {"r": -1}),
        (ValueError, "r must hold at most one number for each of 3 blocks", evit, path, {"r": [1, 2, 3, 4]}),
        (ValueError, "r must be left unset .* not pruned, got 4", model, path, {"r": 4}),
        (ValueError, "half .* got keep_ratio=0.4", tpbook.prune(small(), "tome"), path, {"keep_ratio": 0.4}),
        (ValueError, "every image, and ats keeps another number", tpbook.prune(small(), "ats"), path, {}),
        (ValueError, "every image, and ats keeps", tpbook.prune(small(), "ats"), path, {"keep": 9}),
        (ValueError, r"keep_ratio must lie in \(0, 1\], got 1.2", evit, path, {"keep_ratio": 1.2}),
        (ValueError, "keep_ratio .* 3 stages, got .0.7, 0.5", evit, path, {"keep_ratio": [0.7, 0.5]}),
        (ValueError, "keep must lie from 1 to the 36 patch tokens .* got 37", evit, path, {"keep": 37}),
        (ValueError, "'hopeless'", tpbook.prune(small(), "etps", similarity=hopeless), path, {}),
    ]
    for error, says, given, where, options in cases:
        with pytest.raises(error, match=says):
            tpbook.export(given, where, **options)
    with tpbook.trace(model), pytest.raises(ValueError, match="tpbook.trace"):
        tpbook.export(model, path)
    assert list(tmp_path.iterdir()) == []

    path.write_bytes(b"older")

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="m.onnx could not be written.*disk full"):
        tpbook.export(model, path)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"older"

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        tpbook.export(model, path)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"older"


def test_silent(small, tmp_path, recwarn):
    tpbook.export(tpbook.prune(small(), "etps"), str(tmp_path / "m.onnx"))
    assert not recwarn.list


WITHOUT = """
import sys
for name in ("onnx", "onnxscript", "onnx_ir", "onnxruntime"):
    sys.modules[name] = None  # importing it fails
import tpbook
model = tpbook.prune(tpbook.load_backbone("vit_digits_patch4_56"), "etps")
try:
    tpbook.export(model, sys.argv[1])
except ImportError as error:
    assert "pip install tpbook[export]" in str(error)
else:
    raise SystemExit("no ImportError")
del sys.modules["onnx"]
tpbook.export(model, sys.argv[1])
"""


def test_onnx_alone_is_needed_and_only_to_export(tmp_path):
    subprocess.run([sys.executable, "-c", WITHOUT, str(tmp_path / "m.onnx")], check=True)
    assert (tmp_path / "m.onnx").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method, ratios", [(None, (None,)), ("evit", (0.7, 0.5, 0.3)), ("etps", (0.5,))])
@torch.no_grad()
def test_deit_on_photographs(tmp_path, method, ratios):
    try:
        model = tpbook.load_backbone("deit_tiny_patch16_224")
        photographs = tpbook.data.nips2017_dev(tpbook.data.eval_transform(model))
    except (RuntimeError, FileNotFoundError) as error:
        pytest.skip(str(error))
    images = torch.stack([photographs[i][0] for i in range(0, 1000, 20)])  # over all 1,000 it is 99 % and more
    if method:
        tpbook.prune(model, method)
    path = tpbook.export(model, tmp_path / "m.onnx", weights="float16")
    assert path.stat().st_size < 13e6
    runtime = session(path)
    for ratio in ratios:
        if method:
            model.keep_ratio = ratio
        want = torch.cat([model(x) for x in images.split(20)]).argmax(1)
        got = np.concatenate([run(runtime, x, ratio)["logits"] for x in images.split(20)]).argmax(1)
        assert (got == want.numpy()).mean() >= 0.98
    if method:
        assert_same(runtime, rounded(model), images[:2], ratios)
