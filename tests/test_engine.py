"""prune, unprune and the knob: identity, the model's other calls, refusals."""

import copy
import io
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from builders import COUNTED
from conftest import FAMILIES, held

import tpbook
from tpbook.attention import AttentionMask
from tpbook.keep_mask import masked_attention
from tpbook.methods import METHODS
from tpbook.methods.evit import Fuse
from tpbook.methods.tps import Squeeze, cosine
from tpbook.training.setup import fast_attention

LEARNED = ("dynamicvit", "dtps")


def methods_for(model):
    """Those that a keep ratio drives, and that keep all at ρ = 1."""
    counted = [m for m in COUNTED if not METHODS[m].chooses.varies]
    return [m for m in counted if model.cls_token is not None or METHODS[m].queries != "class"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_identity_and_unprune(small, images, family, dtype):
    model = small(family).to(dtype)
    x = images(model).to(dtype)
    logits, features = model(x), model.forward_features(x)
    cls, keys = type(model), list(model.state_dict())
    for method in methods_for(model):
        assert tpbook.prune(model, method, keep_ratio=1.0) is model
        assert torch.equal(model(x), logits)
        assert torch.equal(model.forward_features(x), features)
        model.keep_ratio = 0.5
        pruned = model(x)
        assert pruned.isfinite().all() and not torch.equal(pruned, logits)
        assert tpbook.unprune(model) is model
        assert type(model) is cls and list(model.state_dict()) == keys and not model.training
        assert not any(m._forward_hooks for m in model.modules())
        assert torch.equal(model(x), logits)


@pytest.mark.parametrize("method", [name for name in COUNTED if not METHODS[name].reads])  # who reads more refuses
@torch.no_grad()
def test_fused_and_explicit_attention_agree(small, images, method):
    model = small(depth=12)
    x = images(model)
    tpbook.prune(model, method, keep_ratio=0.6, seed=3)
    fused = model(x)
    for block in model.blocks:
        block.attn.fused_attn = not block.attn.fused_attn
    torch.testing.assert_close(model(x), fused, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", [name for name in COUNTED if not METHODS[name].reads])  # who reads more refuses
@torch.no_grad()
def test_attention_is_computed_as_its_library_is_set(small, images, method):
    """Fused or explicit is timm's switch alone, in half precision too; and asking which is better draws nothing."""
    model, seen = tpbook.prune(small(), method, keep_ratio=0.5, seed=3), []
    for block in model.blocks:
        block.norm2.register_forward_pre_hook(lambda norm, args, block=block: seen.append(block.attn.fused_attn))
    x, state = images(model), torch.get_rng_state()
    exact = model(x)
    assert seen == 6 * [True]
    for fused in (True, False):
        seen.clear()
        for block in model.blocks:
            block.attn.fused_attn = fused
        with torch.autocast("cpu", torch.bfloat16):
            half = model(x).float()
        torch.testing.assert_close(half, exact, atol=0.1, rtol=0.1)
        assert seen == 6 * [fused] and all(block.attn.fused_attn is fused for block in model.blocks)
    assert torch.equal(torch.get_rng_state(), state)
    seen.clear()
    model, x = model.bfloat16(), x.bfloat16()
    model(x)
    model.keep_ratio = 1.0
    model.train()(x)
    assert seen == 12 * [False]


@pytest.mark.parametrize("method", COUNTED)
@torch.no_grad()
def test_copies_and_files(small, images, method, tmp_path):
    model = tpbook.prune(small(), method, seed=1)
    x = images(model)
    logits = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), logits)
    twin.keep_ratio = max(0.3, METHODS[method].reduce.least_ratio)
    assert model.keep_ratio == 0.7 and torch.equal(model(x), logits)
    assert list(tpbook.unprune(twin).state_dict()) == list(small().state_dict())

    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(x), logits)

    other = tpbook.prune(small(), method, seed=1)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(x), logits)


@torch.no_grad()
def test_timm_calls_go_on_working(small, images):
    model = tpbook.prune(small(), "evit", keep_ratio=0.5)
    x = images(model)
    assert torch.equal(model.forward_head(model.forward_features(x)), model(x))
    assert model.no_weight_decay() == small().no_weight_decay()
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    tpbook.unprune(model)
    assert model(x).shape == (2, 3)
    with pytest.raises(RuntimeError, match="feature maps"):
        tpbook.prune(model, "evit").forward_intermediates(x)
    with pytest.raises(ValueError, match="attn_mask"):
        model(x, attn_mask=torch.zeros(1))


def test_unprune_keeps_what_was_trained(small, images):
    model = tpbook.prune(small(), "dynamicvit").train()
    model(images(model)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    weight = model.blocks[2].mlp.fc1.weight.clone()
    assert torch.equal(tpbook.unprune(model).blocks[2].mlp.fc1.weight, weight)
    assert model.training


@pytest.mark.parametrize("method", COUNTED)
def test_gradients_and_checkpointing(small, images, method):
    model = tpbook.prune(small(), method, seed=5).train()
    x = images(model)
    grads, before = [], held(model)
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(2)
        model(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        assert held(model) == before
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("method", LEARNED)
def test_training_where_no_token_is_drawn(small, images, method):
    model = tpbook.prune(small(), method, keep_ratio=0.3).train()
    with torch.no_grad():  # a predictor that drops everything
        for predictor in model.score_predictor:
            predictor.out_conv[-2].bias.copy_(torch.tensor([-50.0, 50.0]))
    with tpbook.trace(model) as t:
        logits = model(images(model))
    assert [d.sum(1).tolist() for d in t.decisions] == [[1.0, 1.0]] * 3
    logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.usefixtures("stages")
@pytest.mark.parametrize("method", LEARNED)
@pytest.mark.parametrize("family", ["deit", "average", "siglip", "dinov2_reg"])
def test_gather_equals_mask(small, images, family, method, monkeypatch):
    """The training forward with the choices of eval mode is the eval forward."""
    model = tpbook.prune(small(family), method, keep_ratio=0.6)
    x = images(model)
    with torch.no_grad(), tpbook.trace(model) as t:
        want = model(x)
    kept = iter(t.kept)

    def chosen(log_probs, alive):
        return torch.zeros_like(alive).scatter(1, next(kept), 1.0)

    monkeypatch.setattr("tpbook.methods.dynamicvit.sample", chosen)
    torch.testing.assert_close(model.train()(x), want, atol=1e-4, rtol=1e-4)


def test_training_forward_with_every_decision_keep_is_dense(small, images, monkeypatch):
    model = small()
    x = images(model)
    want = model(x)
    monkeypatch.setattr("tpbook.methods.dynamicvit.sample", lambda log_probs, alive: torch.ones_like(alive))
    torch.testing.assert_close(tpbook.prune(model, "dynamicvit").train()(x), want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_random_draws(small, images):
    model = tpbook.prune(small(), "random", keep_ratio=0.5, seed=7)
    x = images(model)
    assert torch.equal(model(x), model(x))
    tpbook.unprune(model)
    tpbook.prune(model, "random", keep_ratio=0.5)
    torch.manual_seed(1)
    first = model(x)
    assert not torch.equal(first, model(x))
    torch.manual_seed(1)
    assert torch.equal(model(x), first)


@pytest.mark.parametrize("method", COUNTED)
@pytest.mark.parametrize("score", ["predictor", "class_attention", "random", "static"])
@torch.no_grad()
def test_every_score_drives_every_method(small, images, method, score):
    model = small()
    x = images(model)
    at = (3,) if METHODS[method].reduce.rejoins else None  # who waits is not heard, so nobody chooses by it again
    tpbook.prune(model, method, keep_ratio=0.5, score=score, seed=0, at=at)
    with tpbook.trace(model) as t:
        best = model(x)
    inverts = model.pruning.method.chooses.inverts
    tpbook.unprune(model)
    if not inverts:
        with pytest.raises(ValueError, match="^invert must be False"):
            tpbook.prune(model, method, keep_ratio=0.5, score=score, invert=True)
        return
    tpbook.prune(model, method, keep_ratio=0.5, score=score, seed=0, invert=True, at=at)
    if score == "predictor":  # new predictors each time
        return
    with tpbook.trace(model) as worst:
        assert not torch.equal(model(x), best)
    n = t.scores[0].shape[1]
    k = n // 2
    assert torch.equal(t.scores[0], worst.scores[0])
    kept, dropped = t.kept[0][:, :k], worst.kept[0][:, :k]
    assert (t.scores[0].gather(1, kept).amin(1) >= t.scores[0].gather(1, dropped).amax(1)).all()
    if score == "static":  # the same patches for every image
        assert torch.equal(kept[0], kept[1])


@pytest.mark.parametrize(
    ("kwargs", "error", "says"),
    [
        ({"method": "evt"}, ValueError, "'evt'.*|method"),
        ({"keep_ratio": 0}, ValueError, r"keep_ratio.*\(0, 1\].*0"),
        ({"keep_ratio": 1.1}, ValueError, "keep_ratio.*1.1"),
        ({"keep_ratio": float("nan")}, ValueError, "keep_ratio.*nan"),
        ({"keep_ratio": "0.5"}, TypeError, "keep_ratio.*'0.5'"),
        ({"keep_ratio": True}, TypeError, "keep_ratio.*True"),
        ({"keep_ratio": None}, TypeError, "keep_ratio.*None"),
        ({"keep_ratio": (0.5, 0.5)}, ValueError, "keep_ratio.*3 stages.*0.5, 0.5"),
        ({"at": ()}, ValueError, "at must"),
        ({"at": (1, 6)}, ValueError, "at must.*0 to 5.*6"),
        ({"at": (-1, 2)}, ValueError, "at must.*-1"),
        ({"at": (2, 2)}, ValueError, "at must.*increasing"),
        ({"at": (3, 1)}, ValueError, "at must.*increasing"),
        ({"at": (1.0,)}, TypeError, "at must.*1.0"),
        ({"at": 3}, TypeError, "at must.*3"),
        ({"score": "best"}, ValueError, "score.*'best'"),
        ({"invert": 1}, TypeError, "invert.*1"),
        ({"seed": 1.5}, TypeError, "seed.*1.5"),
        ({"fuse": "no"}, TypeError, "fuse.*'no'"),
        ({"similarity": "cosine"}, TypeError, "similarity.*evit.*fuse"),
        ({"method": "etps", "similarity": "dot"}, ValueError, "similarity.*'dot'"),
        ({"method": "dtps", "score": "class_attention", "at": (0, 2)}, ValueError, "at=.*above 0"),
        ({"ratio": 0.5}, TypeError, "'ratio'"),
    ],
)
def test_bad_arguments_leave_the_model_alone(small, images, kwargs, error, says):
    model = small()
    x, before = images(model), dict(model.__dict__)
    logits = model(x)
    with pytest.raises(error, match=says):
        tpbook.prune(model, **{"method": "evit", **kwargs})
    assert model.__dict__ == before and torch.equal(model(x), logits)


def test_models_that_cannot_be_pruned(small):
    with pytest.raises(TypeError, match="VisionTransformer.*Linear"):
        tpbook.prune(torch.nn.Linear(2, 2), "evit")
    with pytest.raises(ValueError, match="cls_token is None"):
        tpbook.prune(small("siglip"), "etps")
    with pytest.raises(ValueError, match="cls_token is None"):  # registers alone do not help
        tpbook.prune(small(class_token=False, reg_tokens=2, global_pool="avg"), "evit")
    with pytest.raises(ValueError, match="blocks.*ParallelScalingBlock"):
        from timm.models.vision_transformer import ParallelScalingBlock

        tpbook.prune(small(block_fn=ParallelScalingBlock), "dynamicvit")
    model = tpbook.prune(small(), "evit")
    with pytest.raises(ValueError, match="already.*evit"):
        tpbook.prune(model, "dtps")
    tpbook.unprune(model)
    with pytest.raises(ValueError, match="pruned"):
        tpbook.unprune(model)


def test_knob(small, images):
    model = tpbook.prune(small(), "evit")
    assert model.keep_ratio == 0.7 and model.pruning.at == (1, 3, 4)
    model.keep_ratio = [0.9, 0.8, 0.7]
    assert model.keep_ratio == (0.9, 0.8, 0.7)
    for bad in (0, 2, "x", (0.5,)):
        with pytest.raises((ValueError, TypeError), match="keep_ratio"):
            model.keep_ratio = bad
    assert model.keep_ratio == (0.9, 0.8, 0.7)
    tpbook.unprune(model)
    tpbook.prune(model, "dynamicvit")
    with pytest.warns(UserWarning, match="one is kept"):
        model.keep_ratio = 0.01
    with pytest.warns(UserWarning), tpbook.trace(model) as t:
        assert model(images(model)).isfinite().all()
    assert [k.shape[1] for k in t.kept] == [1, 1, 1]


@pytest.mark.usefixtures("stages")
@torch.no_grad()
def test_before_a_block_is_after_the_attention_of_the_one_before(small, images):
    """What the tour says: DynamicViT by the class token's attention is EViT without fusion a block earlier."""
    model = small()
    x, keep = images(model), (20, 12, 6)
    before = tpbook.prune(model, "dynamicvit", score="class_attention", keep=keep, at=(2, 3, 5))(x)
    earlier, there = (
        tpbook.prune(tpbook.unprune(model), "evit", fuse=False, keep=keep, at=at)(x) for at in ((1, 2, 4), (2, 3, 5))
    )
    torch.testing.assert_close(before, earlier, atol=1e-6, rtol=0)
    assert (before - there).abs().max() > 1e-3


@pytest.mark.parametrize("depth", [1, 2, 3, 12])
def test_default_blocks(small, depth):
    want = {1: (0,), 2: (0, 1), 3: (0, 1, 2), 12: (3, 6, 9)}[depth]
    assert tpbook.prune(small(depth=depth), "evit").pruning.at == want


def test_pickle_survives_a_buffer(small, images):
    model = tpbook.prune(small("distilled"), "dtps")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert type(again) is type(model)
    x = images(model)
    assert torch.equal(again(x), model(x))


# ---------------------------------------------------------------------------- attention while a learned method trains


def gradients(model, x):
    """(logits, every parameter's gradient) of one training forward."""
    model.zero_grad()
    torch.manual_seed(3)
    logits = model(x)
    logits.float().square().sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
def test_masked_softmax_is_the_plain_one(dtype):
    """Ã and its gradients, those of dropped tokens' decisions too, are those of the bias log G and autograd."""
    q, k, v = (torch.randn(2, 3, 9, 4, dtype=dtype).requires_grad_() for _ in range(3))
    keep = torch.tensor([[1, 1, 0, 1, 0, 0, 1, 1, 0], [1] + 8 * [0]], dtype=torch.float32).requires_grad_()
    got = F.scaled_dot_product_attention(q, k, v, attn_mask=AttentionMask(dtype, keep), dropout_p=0.0)
    assert got.dtype is dtype
    logits = (q * 0.5) @ k.transpose(-2, -1)
    want = (logits + masked_attention(keep)).softmax(dim=-1).to(dtype) @ v
    torch.testing.assert_close(got, want, atol=0, rtol=0 if dtype is torch.bfloat16 else 1e-6)
    upstream = torch.randn_like(got)
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]  # log G is float32
    grads = torch.autograd.grad(got, (q, k, v, keep), upstream, retain_graph=True)
    for a, b in zip(grads, torch.autograd.grad(want, (q, k, v, keep), upstream)):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
    assert (grads[3][:, 1:] != 0).all()
    again = torch.autograd.grad(got, (q, k, v, keep), upstream)
    assert all(torch.equal(a, b) for a, b in zip(grads, again))


@pytest.mark.parametrize("family", ["deit", "average", "siglip", "qk_norm", "dinov2_reg"])
@pytest.mark.parametrize("method", [*LEARNED, "evit"])
def test_masks_train_alike_in_fused_and_explicit_attention(small, images, family, method):
    if method == "evit" and family == "siglip":
        pytest.skip("no class token")
    model = tpbook.prune(small(family).train(), method, score="predictor", keep_ratio=0.5)
    x = images(model)
    fused = gradients(model, x)
    for block in model.blocks:
        block.attn.fused_attn = False
    explicit = gradients(model, x)
    torch.testing.assert_close(fused[0], explicit[0], atol=1e-4, rtol=1e-4)
    assert fused[1].keys() == explicit[1].keys()
    for name, gradient in explicit[1].items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(fused[1][name], gradient, atol=1e-3 * scale + 1e-6, rtol=1e-3, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("family", ["deit", "qk_norm"])
def test_masks_train_in_half_precision(small, images, family, dtype):
    """Under autocast the decisions of dropped tokens get a gradient, float16 or not; whole models take bfloat16."""
    model = tpbook.prune(small(family).train(), "dynamicvit", keep_ratio=0.5)
    x = images(model)
    exact = gradients(model, x)[1]
    with torch.autocast("cpu", dtype), fast_attention(model, x):
        assert [block.attn.fused_attn for block in model.blocks] == [dtype is torch.float16] + 5 * [True]
        logits, half = gradients(model, x)
    assert logits.isfinite().all()
    weight = "score_predictor.0.out_conv.4.weight"
    assert torch.cosine_similarity(exact[weight].flatten(), half[weight].flatten(), dim=0) > 0.5
    model, x = model.bfloat16(), x.bfloat16()
    for fused in (True, False):
        for block in model.blocks:
            block.attn.fused_attn = fused
        assert gradients(model, x)[0].dtype is torch.bfloat16


def test_masks_train_with_attention_dropout(small, images):
    model = tpbook.prune(small(attn_drop_rate=0.1).train(), "dynamicvit", keep_ratio=0.5)
    grads = gradients(model, images(model))[1]
    assert all(grads[f"score_predictor.{s}.out_conv.4.weight"].abs().max() > 0 for s in range(3))


@torch.no_grad()
def test_a_subclass_with_a_forward_of_its_own(images):
    """What a model does around its blocks, and what it calls its parts, is its own affair."""

    class Scaled(timm.models.VisionTransformer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.stages = torch.nn.Linear(48, 48)

        def forward_features(self, images, attn_mask=None, is_causal=False):
            x = 2 * self._pos_embed(self.patch_embed(images))
            for block in self.blocks:
                x = block(x)
            return self.norm(self.stages(x))

    model = Scaled(img_size=96, embed_dim=48, depth=4, num_heads=3, num_classes=10).eval()
    x = images(model)
    logits, keys = model(x), list(model.state_dict())
    tpbook.prune(model, "evit", keep_ratio=1.0)
    assert torch.equal(model(x), logits)
    model.keep_ratio = 0.5
    with tpbook.trace(model) as t:
        pruned = model(x)
    assert pruned.isfinite().all() and [kept.shape[1] for kept in t.kept] == [19, 11, 7]
    tpbook.unprune(model)
    assert torch.equal(model(x), logits) and list(model.state_dict()) == keys


def test_a_part_stays_as_it_was_registered(small, monkeypatch):
    """Options change it, and nothing else does: neither what it was made with nor its class."""

    class Own(Fuse):
        pass

    for reduce in (Squeeze("euclidean"), Own()):
        method = replace(METHODS["etps"], reduce=reduce)
        monkeypatch.setitem(METHODS, "own", method)
        assert tpbook.prune(small(), "own").pruning.method.reduce is reduce
    monkeypatch.setitem(METHODS, "own", replace(method, reduce=Squeeze("euclidean")))
    assert tpbook.prune(small(), "own", similarity="cosine").pruning.method.reduce.similarity is cosine
