import copy
import io

import numpy as np
import pytest
import timm
import torch

import tpbook
from tpbook.masking import PatchMask
from tpbook.training.setup import fast_attention


@pytest.mark.parametrize("family", ["deit", "dinov2_reg", "clip", "distilled", "average", "siglip", "any_size"])
def test_patches_are_really_gone_and_prefix_tokens_stay(small, images, family):
    model = small(family).train()
    x = images(model)
    patches = tpbook.mask(model, 0.5).forward_features(x).shape[1] - model.num_prefix_tokens
    tpbook.unmask(model)
    assert patches == (model.forward_features(x).shape[1] - model.num_prefix_tokens) // 2


def test_a_masked_forward_is_the_forward_on_the_visible_patches(small, images):
    model = small("deit").train()
    x = images(model)
    tpbook.mask(model, 0.75)
    with tpbook.trace(model) as t:
        logits = model(x)
    tpbook.unmask(model)
    tokens = model._pos_embed(model.patch_embed(x))
    for i in range(len(x)):  # the class token, then those patches with the positions they had
        seen = torch.cat([tokens[i, :1], tokens[i, 1:][t.visible[i]]])[None]
        for block in model.blocks:
            seen = block(seen)
        torch.testing.assert_close(model.forward_head(model.norm(seen))[0], logits[i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ratio, n", [(0, 36), (0.5, 18), (0.75, 9), (0.7, 10), (0.99, 1), (np.float32(0.1), 32)])
def test_counts_are_exact(small, images, ratio, n):
    model = tpbook.mask(small("deit").train(), ratio)
    assert model.forward_features(images(model)).shape[1] == 1 + n
    assert PatchMask(0.9, 1, "train", None, None).visible(100, 0.9) == 10  # floats say 9


def test_masks_are_uniform_and_differ_between_images(small):
    model = tpbook.mask(small("deit").train(), 0.5)
    seen = torch.zeros(36)
    with torch.no_grad(), tpbook.trace(model) as t:
        for _ in range(20):
            model(torch.randn(50, 3, 96, 96))
            seen += torch.bincount(t.visible.flatten(), minlength=36)
            assert (t.visible.sort(dim=1).values.diff(dim=1) > 0).all()  # each patch once
    assert len(t.visible.sort(dim=1).values.unique(dim=0)) > 45
    expected = 1000 * 0.5
    assert (seen - expected).abs().max() < 5 * (1000 * 0.25) ** 0.5


def test_eval_is_dense_unless_always(small, images):
    model = small("deit")
    x = images(model)
    dense = model(x)
    assert torch.equal(tpbook.mask(model, 0.5)(x), dense)
    tpbook.unmask(model)
    always = tpbook.mask(model, 0.5, when="always", seed=3)
    first = always(x)
    assert not torch.allclose(first, dense) and torch.equal(always(x), first)
    assert tpbook.flops.count(always) == tpbook.flops.closed_form(always)
    assert tpbook.flops.count(always).total < 0.6 * tpbook.flops.count(tpbook.unmask(model)).total


def test_seed_repeats_and_leaves_the_global_generator_alone(small, images):
    model = tpbook.mask(small("deit").train(), (0.2, 0.8), seed=1)
    x = images(model)
    with tpbook.trace(model) as t:
        torch.manual_seed(5)
        model(x)
        first, after = t.visible, torch.rand(1)
        model(x)
    assert torch.equal(first, t.visible)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))


def test_a_seed_gives_the_masks_that_it_always_gave(monkeypatch):
    """Pinned; and no generator but its own is touched, of no device."""
    x = torch.arange(7.0).view(1, 7, 1).repeat(2, 1, 1)
    monkeypatch.setattr(torch, "manual_seed", None)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", None)
    left = PatchMask(0.5, 1, "always", 0, None)(x)
    assert left[:, :, 0].tolist() == [[0, 3, 6, 5], [0, 3, 5, 4]]
    assert PatchMask((0.1, 0.9), 1, "always", 3, None)(x).shape[1] == 6


def test_a_range_is_drawn_each_forward(small, images):
    model = tpbook.mask(small("deit").train(), (0.25, 0.75))
    counts = {model.forward_features(images(model)).shape[1] - 1 for _ in range(40)}
    assert min(counts) >= 9 and max(counts) <= 27 and len(counts) > 8
    model.mask_ratio = 0.5
    assert model.mask_ratio == 0.5 and model.forward_features(images(model)).shape[1] == 19


@pytest.mark.parametrize("drop", [0.0, 0.25])
def test_unmask_restores(small, images, drop):
    model = small("deit", patch_drop_rate=drop)
    keys, kind, patch_drop = list(model.state_dict()), type(model), model.patch_drop
    x = images(model)
    before = model(x)
    tpbook.mask(model, 0.5)
    assert list(model.state_dict()) == keys
    copied = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copied, loaded):
        assert other.mask_ratio == 0.5 and torch.equal(other(x), before)
        assert other.train().forward_features(x).shape[1] == 19
    assert tpbook.unmask(model) is model and type(model) is kind and model.patch_drop is patch_drop
    assert list(model.state_dict()) == keys and torch.equal(model(x), before)
    assert tpbook.unmask(copied).training and copied.patch_drop.training


def test_refusals(small):
    model = small("deit")
    for ratio, error in [(1, ValueError), (-0.1, ValueError), ("half", TypeError), (True, TypeError), (None, TypeError),
                         ((0.5,), ValueError), ((0.6, 0.4), ValueError), (float("nan"), ValueError)]:  # fmt: skip
        with pytest.raises(error, match="ratio"):
            tpbook.mask(model, ratio)
    with pytest.raises(ValueError, match="when.*train, always.*never"):
        tpbook.mask(model, when="never")
    with pytest.raises(TypeError, match="seed.*'x'"):
        tpbook.mask(model, seed="x")
    with pytest.raises(TypeError, match="VisionTransformer.*ResNet"):
        tpbook.mask(timm.create_model("resnet18"))
    with pytest.raises(ValueError, match="masked"):
        tpbook.unmask(model)
    tpbook.prune(model, "evit")
    with pytest.raises(ValueError, match="evit"):
        tpbook.mask(model)
    tpbook.mask(tpbook.unprune(model))
    with pytest.raises(ValueError, match="0.5"):
        tpbook.prune(model, "evit")
    with pytest.raises(ValueError, match="masked already"):
        tpbook.mask(model)
    with pytest.raises(ValueError, match="ratio"):
        model.mask_ratio = 2
    assert model.mask_ratio == 0.5


def test_every_parameter_learns(small, images):
    model = tpbook.mask(small("deit").train(), 0.75)
    model(images(model)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_explicit_attention_on_a_cpu_in_bfloat16(small, images):
    """It trains faster there; values stay, and so does the model."""
    model = tpbook.mask(small("deit").train(), 0.5, seed=0)
    x, seen = images(model), []
    attn = model.blocks[0].attn
    attn.register_forward_pre_hook(lambda module, args: seen.append(module.fused_attn))
    with fast_attention(model, x):
        exact = model(x)
    with torch.autocast("cpu", torch.bfloat16), fast_attention(model, x):
        half = model(x)
    assert seen == [True, False] and attn.fused_attn
    torch.testing.assert_close(half.float(), exact, atol=0.15, rtol=0.1)


def test_hidden_patches_leave_no_feature_map(small, images):
    model = tpbook.mask(small(), 0.5)
    x = images(model)
    maps = model.forward_intermediates(x, indices=[2], intermediates_only=True)
    assert maps[0].shape == (2, 48, 6, 6)  # eval mode hides nothing
    with pytest.raises(RuntimeError, match="no feature maps"):
        model.train().forward_intermediates(x)
    model = tpbook.mask(tpbook.unmask(model).eval(), 0.5, when="always")
    with pytest.raises(RuntimeError, match="no feature maps"):
        model.forward_intermediates(x)
