"""torchvision's ViT and open_clip's towers: what their libraries do beside the blocks.

That removing is hiding, and nothing removed nothing changed, is in `test_families.py`.
"""

import pytest
import torch
from builders import BUILDERS, answer
from torch import nn

import tpbook

MULTIHEAD = ["torchvision_vit", "open_clip_vit"]  # attention of nn.MultiheadAttention


def pruned(name, method="evit", keep_ratio=0.6, at=(1, 2), **kwargs):
    model, images = BUILDERS[name]()
    return tpbook.prune(model, method, keep_ratio=keep_ratio, at=at, **kwargs), images


def attention_of(block):
    return block.self_attention if hasattr(block, "self_attention") else block.attn


# ---- nn.MultiheadAttention


@pytest.mark.parametrize("name", MULTIHEAD)
@pytest.mark.parametrize("grad", [True, False])  # without, PyTorch takes a kernel of its own
def test_what_is_heard_is_the_attention_that_the_module_reports(name, grad):
    model, images = BUILDERS[name]()
    seen = []
    block = tpbook.families.family_of(model).blocks(model)[1]
    block.ln_1.register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.set_grad_enabled(grad):
        dense = answer(model, images)
        want = attention_of(block)(seen[0], seen[0], seen[0], average_attn_weights=True)[1][:, 0, 1:]  # (B, N)
        for ratio in (1.0, 0.6):
            tpbook.prune(model, "evit", keep_ratio=ratio, at=(1, 2))
            plain = answer(model, images)
            with tpbook.trace(model) as t:
                assert torch.equal(answer(model, images), plain)
            torch.testing.assert_close(t.scores[0], want, atol=1e-6, rtol=0)
            assert torch.equal(plain, dense) == (ratio == 1.0)
            tpbook.unprune(model)


@pytest.mark.parametrize("name", MULTIHEAD)
def test_the_module_runs_itself_where_nobody_hears(name):
    model, images = pruned(name)
    ran = []
    blocks = model._plan.family.blocks(model)
    for i, block in enumerate(blocks):
        attention_of(block).register_forward_hook(lambda m, args, out, i=i: ran.append(i))
    model.keep_ratio = (1.0, 0.6)
    answer(model, images)
    assert ran == [i for i in range(len(blocks)) if i != 2]


@pytest.mark.parametrize("name", MULTIHEAD)
def test_attention_dropout_stays(name):
    model, images = pruned(name)
    attention_of(model._plan.family.blocks(model)[1]).dropout = 0.5  # one whose mask makes it run outside the module
    assert torch.equal(answer(model, images), answer(model, images))
    model.train()
    assert not torch.allclose(answer(model, images), answer(model, images), atol=1e-3)


@pytest.mark.parametrize("name", MULTIHEAD)
def test_another_attention_is_refused_where_it_must_be_heard(name):
    class Other(nn.MultiheadAttention):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model, images = BUILDERS[name]()
    attention_of(tpbook.families.family_of(model).blocks(model)[1]).__class__ = Other
    with pytest.raises(ValueError, match=r"needs nn.MultiheadAttention, got Other in blocks\[1\]"):
        tpbook.prune(model, "evit", at=(1, 2))
    tpbook.prune(model, "random", at=(1, 2))
    answer(model, images)


def mean_of_kept(model, t):
    keep = t.decisions[-1].unsqueeze(-1)
    assert 0 < keep.sum() < keep.numel()
    return (t.features * keep).sum(dim=1) / keep.sum(dim=1)


@pytest.mark.parametrize("late", [True, False])
def test_while_a_learned_method_trains_an_average_is_that_of_the_tokens_that_count(late):
    transformer = pytest.importorskip("open_clip.transformer")
    torch.manual_seed(0)
    model = transformer.VisionTransformer(
        64, 16, width=32, layers=3, heads=2, mlp_ratio=2, output_dim=8, pool_type="avg", final_ln_after_pool=late
    )
    tpbook.prune(model, "dynamicvit", keep_ratio=0.6, at=(1, 2)).train()
    with tpbook.trace(model) as t:
        got = model(torch.randn(2, 3, 64, 64))
    mean = mean_of_kept(model, t)
    torch.testing.assert_close(got, (model.ln_post(mean) if late else mean) @ model.proj, atol=2e-6, rtol=1e-5)
    got.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.score_predictor.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["torchvision_vit", "open_clip_vit", "open_clip_timm"])
def test_a_learned_method_hides_what_it_drops_while_it_trains(name):
    model, images = pruned(name, "dynamicvit")
    torch.manual_seed(2)
    with tpbook.trace(model.train()) as t:
        answer(model, images).square().sum().backward()
    assert len(t.decisions) == 2 and t.features.shape[1] == t.decisions[0].shape[1]
    gone = t.decisions[0].detach() == 0
    assert gone.any()
    predictors = [p for n, p in model.named_parameters() if "score_predictor.0" in n]
    assert predictors and max(p.grad.abs().max() for p in predictors) > 0


# ---- torchvision


def test_the_message_names_module_and_class():
    vision_transformer = pytest.importorskip("torchvision.models.vision_transformer")
    torchvision = pytest.importorskip("torchvision")
    model, _ = BUILDERS["torchvision_vit"]()
    with pytest.raises(TypeError, match=r"got torchvision\.models\.vision_transformer\.VisionTransformer"):
        tpbook.mask(model)
    with pytest.raises(TypeError, match=r"known family \(.*\), got torchvision\.models\.resnet\.ResNet"):
        tpbook.prune(torchvision.models.resnet18(), "random")

    class Other(vision_transformer.EncoderBlock):
        def forward(self, x):
            return x

    model.encoder.layers[1].__class__ = Other
    with pytest.raises(ValueError, match=r"blocks\[1\] must be a torchvision EncoderBlock, got Other"):
        tpbook.prune(model, "random")


def test_torchvision_knows_one_size():
    model, _ = pruned("torchvision_vit")
    with pytest.raises(ValueError, match=r"image_size must be \(64, 64\) or None for a torchvision VisionTransformer"):
        tpbook.flops.count(model, 96)
    assert tpbook.flops.count(model) == tpbook.flops.closed_form(model)


def test_a_stem_of_convolutions_has_no_closed_form():
    vision_transformer = pytest.importorskip("torchvision.models.vision_transformer")
    stem = [vision_transformer.ConvStemConfig(8, 3, 4), vision_transformer.ConvStemConfig(8, 3, 4)]
    model = vision_transformer.VisionTransformer(64, 16, 2, 2, 32, 64, conv_stem_configs=stem).eval()
    tpbook.prune(model, "evit", at=(1,))
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 1000)
    assert tpbook.flops.count(model).embed > 0
    with pytest.raises(TypeError, match="by one convolution, got 3"):
        tpbook.flops.closed_form(model)


# ---- open_clip


@pytest.fixture
def tower():
    transformer = pytest.importorskip("open_clip.transformer")

    def make(**kwargs):
        return transformer.VisionTransformer(
            image_size=64, patch_size=16, width=32, layers=3, heads=2, mlp_ratio=2, output_dim=8, **kwargs
        ).eval()

    return make


@pytest.mark.parametrize("custom", [False, True])
def test_of_two_towers_the_image_tower_is_pruned(custom):
    model_py = pytest.importorskip("open_clip.model")
    cls = model_py.CustomTextCLIP if custom else model_py.CLIP
    vision = model_py.CLIPVisionCfg(layers=3, width=32, head_width=16, patch_size=16, image_size=64)
    text = model_py.CLIPTextCfg(context_length=5, vocab_size=20, width=16, heads=1, layers=1)
    model, images = cls(8, vision, text).eval(), torch.randn(2, 3, 64, 64)
    with pytest.raises(TypeError, match=f"model {cls.__name__} has two towers: prune its image tower, model.visual"):
        tpbook.prune(model, "evit")
    dense = model.encode_image(images)
    tpbook.prune(model.visual, "evit", keep_ratio=0.6, at=(1,))
    with tpbook.trace(model.visual) as t:
        got = model(images, torch.randint(1, 20, (2, 5)))[0]
    assert t.kept[0].shape == (2, 11)
    torch.testing.assert_close(got, nn.functional.normalize(model.encode_image(images), dim=-1))
    assert not torch.allclose(model.encode_image(images), dense, atol=1e-4)
    tpbook.unprune(model.visual)
    assert torch.equal(model.encode_image(images), dense)


@pytest.mark.parametrize(
    "pool", [{}, {"final_ln_after_pool": True}, {"attentional_pool": True}, {"no_ln_pre": True, "pool_type": "avg"}]
)
def test_pools_read_the_tokens_that_are_left(tower, pool):
    model = tower(output_tokens=True, attn_pooler_queries=3, **pool)
    images = torch.randn(2, 3, 64, 64)
    dense = model(images)
    tpbook.prune(model, "random", keep_ratio=0.5, at=(1,))
    with tpbook.trace(model) as t:
        pooled, tokens = model(images)
    assert t.features.shape == (2, 8, 32) and pooled.shape == dense[0].shape
    if not pool:
        assert torch.equal(tokens, t.features)
    tpbook.unprune(model)
    assert all(map(torch.equal, model(images), dense))


def test_custom_blocks_with_every_norm(tower):
    model = tower(qk_norm=True, scale_heads=True, scale_attn_inner=True, scale_attn=True, scale_fc=True)
    images = torch.randn(2, 3, 64, 64)
    dense = model(images)
    tpbook.prune(model, "evit", keep_ratio=1.0, at=(1,))
    assert torch.equal(model(images), dense)
    model.keep_ratio = 0.5
    with tpbook.trace(model) as t:
        assert model(images).shape == (2, 8)
    assert t.kept[0].shape == (2, 9)
    tpbook.unprune(model)
    tpbook.prune(model, "dynamicvit", keep_ratio=0.5, at=(1,)).train()
    model(images).sum().backward()


def test_what_a_tower_refuses(tower):
    with pytest.raises(ValueError, match="needs attention of dot products, got scaled cosines"):
        tpbook.prune(tower(scaled_cosine_attn=True), "evit")
    with pytest.raises(ValueError, match="cannot train on a tower with attentional_pool"):
        tpbook.prune(tower(attentional_pool=True), "dynamicvit")
    model = tpbook.prune(tower(patch_dropout=0.5), "random", at=(1,))
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 8)
    with pytest.raises(ValueError, match="patch_dropout must be 0 while a pruned model trains, got 0.5"):
        model.train()(torch.randn(2, 3, 64, 64))
    with pytest.raises(RuntimeError, match="a pruned model has no feature maps"):
        model.forward_intermediates(torch.randn(2, 3, 64, 64))
    with pytest.raises(TypeError, match="by attention|without attention"):
        tpbook.flops.closed_form(tower(attentional_pool=True))


@pytest.mark.parametrize("name", ["open_clip_vit", "open_clip_timm"])
def test_checkpointing_gives_the_same_gradients(name):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model, images = pruned(name, "dynamicvit")
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(1)
        model.train()(images).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_a_timm_tower_is_its_trunk():
    model, images = BUILDERS["open_clip_timm"]()
    keys = list(model.state_dict())
    tpbook.prune(model, "evit", keep_ratio=0.6, at=(1, 2))
    assert model.pruning is model.trunk.pruning and list(model.state_dict()) == keys
    with tpbook.trace(model) as t, tpbook.trace(model.trunk) as u:
        got = model(images)
    assert torch.equal(got, model.head(model.trunk(images)))
    assert [kept.shape[1] for kept in u.kept] == [13, 9] and not t.kept  # the inner of two traces
    model.keep = 4
    assert model.trunk.keep == 4
    tpbook.unprune(model)
    assert not hasattr(model.trunk, "pruning")
