"""ONNX Runtime gives PyTorch's logits, kept patches and hosts, from one file for every keep ratio."""

import copy
import json
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

import tpbook
from tpbook.exporting import _counts, split
from tpbook.methods import METHODS, token_counts

DIGITS = "vit_digits_patch4_56"
RATIOS = (1, 0.9, 0.7, 0.5, 0.3, (1, 0.5, 1), (0.8, 0.9, 0.4), 0.001)
VARIANTS = {
    "dynamicvit": {},
    "evit": {},
    "dtps": {},
    "etps": {},
    "random": {},
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
    entering = t.kept[s - 1] % (patches + 1) if s else torch.arange(patches).expand(len(want), -1)  # fused ones last
    score = torch.zeros(len(want), patches + 1).scatter(1, entering, t.scores[s])
    for row in np.flatnonzero((got != want).any(axis=1)):
        places = got[row] != want[row]
        ours, theirs = got[row][places], want[row][places]
        assert (ours >= 0).all() and (theirs >= 0).all()
        np.testing.assert_allclose(score[row, ours], score[row, theirs], rtol=1e-5)


@torch.no_grad()
def assert_same(runtime, model, images, ratios):
    for ratio in ratios:
        model.keep_ratio = ratio
        with tpbook.trace(model) as t:
            want = model(images)
        got = run(runtime, images, ratio, t)
        np.testing.assert_allclose(got["logits"], want, atol=1e-4, rtol=0)
        assert list(got)[1:] == [f"{what}_{s + 1}" for what in ("kept", "host") for s in range(len(getattr(t, what)))]
        for s in range(len(t.kept)):
            assert_kept(got[f"kept_{s + 1}"], s, t, model.patch_embed.num_patches)
        for s, host in enumerate(t.host):
            assert np.array_equal(got[f"host_{s + 1}"], host)


@pytest.mark.parametrize("patches", [49, 196, 256, 576])
@pytest.mark.filterwarnings("ignore:keep_ratio")
def test_counts_equal_the_exact_ones(patches):
    knobs = torch.arange(1, 10_001) / 10_000  # every ratio of four decimals
    for method in (METHODS["random"], METHODS["etps"], METHODS["evit"]):
        got = _counts(patches, knobs.expand(3, -1), method)
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
            got = _counts(patches, torch.tensor(ratios), method)
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


CASES = [
    ("deit3", "etps"), ("dinov2_reg", "evit"), ("clip", "dtps"), ("distilled", "evit"), ("average", "evit"),
    ("siglip", "dynamicvit"), ("siglip", "random"), ("qk_norm", "etps"), ("large_image", "etps"),
]  # fmt: skip


@pytest.mark.parametrize("family, method", CASES)
def test_families(small, images, tmp_path, family, method):
    model = pruned(small(family), method)
    runtime = session(tpbook.export(model, tmp_path / "m.onnx"))
    assert_same(runtime, model, images(model, batch=3), (1, 0.7, (0.9, 0.5, 0.6)))


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
    kind, kinds, fused = type(model), [type(s) for s in model.stages], model.blocks[0].attn.fused_attn
    model.train()
    path = tpbook.export(model, tmp_path / "m.onnx")
    assert model.training and all(m.training for m in model.modules())
    assert type(model) is kind and [type(s) for s in model.stages] == kinds and model.keep_ratio == 0.6
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert all(b.attn.fused_attn == fused for b in model.blocks)
    state = model.state_dict()
    assert list(state) == list(before) and all(torch.equal(state[k], v) and v.dtype == dtype for k, v in before.items())
    assert torch.equal(model.eval()(x), want)
    if dtype is torch.bfloat16:
        assert_same(session(path), model.float(), images(model), (0.5,))


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
    model, path = small(), tmp_path / "m.onnx"
    cases = [
        (TypeError, "VisionTransformer, got Linear", torch.nn.Linear(1, 1), path, {}),
        (ValueError, "when=.always.", tpbook.mask(small(), when="always"), path, {}),
        (ValueError, "weights must be one of float32, float16, got 'int8'", model, path, {"weights": "int8"}),
        (ValueError, r"end in \.onnx, got '.*m\.pt'", model, tmp_path / "m.pt", {}),
        (FileNotFoundError, "gone", model, tmp_path / "gone" / "m.onnx", {}),
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
    images = torch.stack([photographs[i][0] for i in range(0, 1000, 10)])  # over all 1,000 it is 99 % and more
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
