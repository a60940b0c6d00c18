"""Hugging Face's models: what their library does beside the blocks, which a pruned model goes on doing or refuses.

That removing is hiding, and nothing removed nothing changed, is in `test_families.py`.
"""

import copy
import inspect
import sys

import pytest
import torch
from builders import BUILDERS, answer
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import tpbook

transformers = pytest.importorskip("transformers")

CLASS = ["hf_vit", "hf_deit", "hf_dinov2", "hf_dinov3", "hf_clip_classifier"]
SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64,
    "patch_size": 16,
}  # fmt: skip


def pruned(name, method="evit", keep_ratio=0.6, at=(1, 2), **kwargs):
    model, images = BUILDERS[name]()
    return tpbook.prune(model, method, keep_ratio=keep_ratio, at=at, **kwargs), images


# ---- the same weights in timm's ViT and in Hugging Face's


def as_hugging_face(timm_model):
    """ViTForImageClassification with the weights of a timm ViT."""
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=128,
        num_hidden_layers=len(timm_model.blocks), num_attention_heads=2, image_size=(64, 80),
        patch_size=16, num_labels=10, layer_norm_eps=1e-6,
    )  # fmt: skip
    names = {
        "cls_token": "vit.embeddings.cls_token", "pos_embed": "vit.embeddings.position_embeddings",
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection", "norm": "vit.layernorm", "head": "classifier",
        "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.o_proj",
        "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
    }  # fmt: skip
    weights = {}
    for key, value in timm_model.state_dict().items():
        part, _, kind = key.rpartition(".") if key.endswith(("weight", "bias")) else (key, "", "")
        if part.startswith("blocks."):
            _, i, inner = part.split(".", 2)
            if inner == "attn.qkv":
                for letter, third in zip("qkv", value.chunk(3)):
                    weights[f"vit.layers.{i}.attention.{letter}_proj.{kind}"] = third
                continue
            part = f"vit.layers.{i}.{names[inner]}"
        else:
            part = names[part]
        weights[f"{part}.{kind}" if kind else part] = value
    model = transformers.ViTForImageClassification(config).eval()
    model.load_state_dict(weights, strict=True)
    return model


@pytest.mark.parametrize("method, options", [
    ("random", {"seed": 0}), ("evit", {}), ("etps", {}), ("dynamicvit", {}), ("dtps", {}),
])  # fmt: skip
def test_the_same_weights_give_what_they_give_in_timm(method, options):
    ours, images = BUILDERS["vit"]()
    theirs = as_hugging_face(ours)
    torch.testing.assert_close(theirs(images).logits, ours(images), atol=1e-5, rtol=0)
    for model in (ours, theirs):
        tpbook.prune(model, method, keep_ratio=0.6, at=(1, 2), **options)
    if hasattr(ours, "score_predictor"):
        theirs.score_predictor.load_state_dict(ours.score_predictor.state_dict())
    with tpbook.trace(ours) as t:
        want = ours(images)
    with tpbook.trace(theirs) as u:
        got = theirs(images).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert all(map(torch.equal, t.kept, u.kept)) and all(map(torch.equal, t.host, u.host)) and len(u.kept) == 2
    torch.testing.assert_close(u.features, t.features, atol=1e-5, rtol=0)


# ---- attention


@pytest.mark.parametrize("name", CLASS)
def test_what_is_heard_is_the_attention_that_the_library_reports(name):
    model, images = BUILDERS[name]()
    model.set_attn_implementation("eager")
    attention = model(images, output_attentions=True).attentions[1]  # (B, H, T, T)
    model.set_attn_implementation("sdpa")
    tpbook.prune(model, "evit", keep_ratio=0.6, at=(1, 2))
    prefix = model._plan.prefix
    with tpbook.trace(model) as t:
        answer(model, images)
    torch.testing.assert_close(t.scores[0], attention[:, :, 0, prefix:].mean(dim=1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", CLASS)
def test_eager_attention_gives_what_fused_attention_gives(name):
    model, images = pruned(name)
    with tpbook.trace(model) as t:
        fused = answer(model, images)
    model.set_attn_implementation("eager")
    with tpbook.trace(model) as u:
        torch.testing.assert_close(answer(model, images), fused, atol=2e-6, rtol=0)
    assert all(map(torch.equal, t.kept, u.kept))


@pytest.mark.parametrize("given", ["flash_attention_2", "flex_attention"])
def test_kernels_that_take_no_mask_are_refused_where_one_is_needed(given):
    model, images = BUILDERS["hf_vit"]()
    model.config._attn_implementation = given
    with pytest.raises(ValueError, match=f"needs attn_implementation='sdpa' or 'eager', got '{given}' in blocks"):
        tpbook.prune(model, "evit", at=(1, 2))
    if given == "flex_attention":  # whose kernels take minutes to build
        return
    tpbook.prune(model, "dynamicvit", at=(0, 2)).train()  # without a mask in eval mode
    with pytest.raises(ValueError, match="attn_implementation"):
        model(images)


def test_a_mask_is_refused():
    model, images = pruned("hf_vit", "random", at=(0,))
    with pytest.raises(ValueError, match="attention_mask must be left unset on a pruned model"):
        model(images, attention_mask=torch.tensor([[1] * 16 + [0]] * 2))
    with pytest.raises(ValueError, match="attention_mask must be left unset"):
        model(images, None, None, torch.tensor([[1] * 16 + [0]] * 2))
    assert model(images, attention_mask=None).logits.shape == (2, 10)


# ---- training


@pytest.mark.parametrize("method", ["evit", "dynamicvit", "dtps"])
@pytest.mark.parametrize("name", ["hf_vit", "hf_dinov3", "hf_clip_classifier"])
def test_checkpointing_gives_the_same_gradients_and_saves_less(name, method):
    gradients, saved = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model, images = pruned(name, method)
        if checkpointing:
            model.gradient_checkpointing_enable()
        size = []
        count = saved_tensors_hooks(lambda x, size=size: size.append(x.numel()) or x, lambda x: x)
        torch.manual_seed(1)  # of Gumbel's draws
        with count, tpbook.trace(model) as t:
            loss = answer(model.train(), images).square().sum() + t.features.square().mean()
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        saved.append(sum(size))
    assert gradients[0].keys() == gradients[1].keys()
    learned = [g.abs().max() for n, g in gradients[0].items() if n.startswith("score_predictor")]
    assert method == "evit" or max(learned) > 0
    for n, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][n], gradient, atol=1e-6, rtol=1e-5)
    assert saved[1] < 0.5 * saved[0]


def test_loss_and_signature_are_the_librarys():
    model, images = BUILDERS["hf_vit"]()
    plain = inspect.signature(model.forward)
    tpbook.prune(model, "evit", keep_ratio=0.6, at=(1, 2))
    assert inspect.signature(model.forward) == plain and "pixel_values" in plain.parameters  # a Trainer reads it
    labels = torch.tensor([3, 7])
    out = model(pixel_values=images, labels=labels)
    assert torch.equal(out.loss, nn.functional.cross_entropy(out.logits, labels))
    loss, logits = model(images, labels, return_dict=False)
    assert torch.equal(logits, out.logits) and torch.equal(loss, out.loss)


@pytest.mark.parametrize("name", ["hf_dinov2", "hf_dinov2_registers", "hf_clip_classifier", "hf_siglip_classifier"])
@pytest.mark.parametrize("method", ["dynamicvit", "dtps"])
def test_while_a_learned_method_trains_a_mean_is_that_of_the_tokens_that_count(name, method):
    model, images = pruned(name, method)
    read = []
    model.classifier.register_forward_pre_hook(lambda m, args: read.append(args[0]))
    torch.manual_seed(3)
    with tpbook.trace(model.train()) as t:
        model(images)
    keep = t.decisions[-1].unsqueeze(-1)  # (B, N, 1)
    assert 0 < keep.sum() < keep.numel()
    mean = (t.features * keep).sum(dim=1) / keep.sum(dim=1)
    if name.startswith("hf_dinov2"):  # the head reads class token ⊕ mean
        torch.testing.assert_close(read[0][:, 32:], mean, atol=2e-6, rtol=1e-5)
    else:
        torch.testing.assert_close(read[0], mean, atol=2e-6, rtol=1e-5)


def test_an_attention_pool_takes_no_mask_so_no_learned_score_trains():
    model, _ = BUILDERS["hf_siglip"]()
    with pytest.raises(ValueError, match="a learned score cannot train on SiglipVisionModel"):
        tpbook.prune(model, "dynamicvit")
    assert not hasattr(model, "pruning")


# ---- files, copies


@pytest.mark.parametrize("name", ["hf_vit", "hf_dinov2_registers", "hf_clip_classifier", "hf_timm_wrapper"])
@pytest.mark.parametrize("method", ["evit", "dynamicvit"])
def test_what_is_saved_is_a_plain_model(name, method, tmp_path):
    model, images = BUILDERS[name]()
    cls, dense = type(model), answer(model, images)
    tpbook.prune(model, method, keep_ratio=0.6, at=(1, 2)).save_pretrained(tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).architectures == [cls.__name__]
    again, report = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is cls and not report["missing_keys"]
    assert all("score_predictor" in key for key in report["unexpected_keys"])
    torch.testing.assert_close(answer(again.eval(), images), dense, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["hf_vit", "hf_clip", "hf_timm_wrapper"])
def test_a_copy_is_pruned_too_and_its_knob_is_its_own(name):
    model, images = pruned(name)
    want, twin = answer(model, images), copy.deepcopy(model)
    assert torch.equal(answer(twin, images), want)
    twin.keep_ratio = 0.3
    assert model.keep_ratio == 0.6 and torch.equal(answer(model, images), want)
    assert not torch.equal(answer(twin, images), want)


# ---- what is looked at


def test_features_are_what_the_last_norm_gives_or_where_it_norms_one_token_the_last_layer():
    for name in ("hf_vit_base", "hf_clip", "hf_siglip", "hf_dinov3"):
        for model, images in (BUILDERS[name](), pruned(name, "random")):
            with tpbook.trace(model) as t:
                out = model(images)
            prefix = out.last_hidden_state.shape[1] - t.features.shape[1]
            assert prefix == {"hf_siglip": 0, "hf_dinov3": 5}.get(name, 1)
            assert torch.equal(t.features, out.last_hidden_state[:, prefix:]), name


@pytest.mark.parametrize("what", ["output_hidden_states", "output_attentions"])
@pytest.mark.parametrize("name", ["hf_vit", "hf_dinov3", "hf_clip_classifier"])
def test_lists_of_layers_are_refused(name, what):
    model, images = pruned(name)
    with pytest.raises(ValueError, match=f"{what} must be False on a pruned model"):
        model(images, **{what: True})
    assert answer(model, images) is not None
    inner = getattr(model.config, "vision_config", model.config)
    model.set_attn_implementation("eager")  # the other kind is refused by the library
    setattr(inner, what, True)
    with pytest.raises(ValueError, match=f"{what} must be False on a pruned model"):
        model(images)
    tpbook.unprune(model)
    assert model(images)[what.removeprefix("output_")] is not None


# ---- which models


@pytest.mark.parametrize("name", ["Dinov2Backbone", "Dinov2WithRegistersBackbone", "DINOv3ViTBackbone"])
def test_backbones_are_refused(name):
    cls = getattr(transformers, name)
    with pytest.raises(TypeError, match=f"model {name} lays its tokens on a map"):
        tpbook.prune(cls(cls.config_class(**SMALL)), "random")


@pytest.mark.parametrize("name", ["ViTForMaskedImageModeling", "DeiTForMaskedImageModeling"])
def test_models_that_paint_are_refused(name):
    cls = getattr(transformers, name)
    with pytest.raises(TypeError, match=f"model {name} lays its tokens on a map"):
        tpbook.prune(cls(cls.config_class(**SMALL)), "random")


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel"])
def test_of_two_towers_the_vision_model_is_pruned(name):
    cls = getattr(transformers, name)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = cls(cls.config_class(vision_config=SMALL, text_config={**text, "projection_size": 32})).eval()
    with pytest.raises(TypeError, match=f"model {name} is more than a vision model: prune .* model.vision_model"):
        tpbook.prune(model, "random")
    words, images = {"input_ids": torch.tensor([[1, 2, 3]])}, torch.randn(2, 3, 64, 64)
    dense = model(pixel_values=images, **words).logits_per_image
    tpbook.prune(model.vision_model, "random", keep_ratio=0.5, at=(1,), seed=0)
    with tpbook.trace(model.vision_model) as t:
        got = model(pixel_values=images, **words)
    assert t.kept[0].shape == (2, 8) and not torch.equal(got.logits_per_image, dense)
    alone = model.get_image_features(pixel_values=images).pooler_output
    torch.testing.assert_close(got.image_embeds, alone / alone.norm(dim=-1, keepdim=True), atol=1e-6, rtol=0)
    tpbook.unprune(model.vision_model)
    assert torch.equal(model(pixel_values=images, **words).logits_per_image, dense)


def test_other_models_and_layers_are_named():
    swin = transformers.SwinModel(transformers.SwinConfig(embed_dim=8, depths=[1], num_heads=[1], image_size=32))
    with pytest.raises(TypeError, match=r"got transformers\.models\.swin\.modeling_swin\.SwinModel"):
        tpbook.prune(swin, "random")
    model, _ = BUILDERS["hf_vit"]()

    class Other(type(model.vit.layers[1])):
        def forward(self, hidden_states, attention_mask=None, **kwargs):
            return hidden_states

    model.vit.layers[1].__class__ = Other
    with pytest.raises(ValueError, match=r"blocks\[1\] must be one of .* of transformers, as it is, got Other"):
        tpbook.prune(model, "random")


def test_transformers_4_is_refused_by_name(monkeypatch):
    model, _ = BUILDERS["hf_vit"]()
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.3")
    with pytest.raises(TypeError, match="is of transformers 4.57.3, and tpbook needs transformers >= 5"):
        tpbook.prune(model, "random")


@pytest.mark.parametrize("name", ["hf_dinov2", "hf_dinov3"])
def test_other_image_sizes(name):
    model, _ = pruned(name, "random")
    images = torch.randn(2, 3, 96, 64)
    with tpbook.trace(model) as t:
        answer(model, images)
    assert [kept.shape[1] for kept in t.kept] == [14, 8]  # ⌊24 · 0.6⌋, ⌊24 · 0.36⌋
    assert tpbook.flops.count(model, (96, 64)) == tpbook.flops.closed_form(model, (96, 64))


# ---- around a timm model


def test_a_wrapper_is_its_timm_model():
    model, images = BUILDERS["hf_timm_wrapper"]()
    twin = copy.deepcopy(model)
    keys = list(model.state_dict())
    tpbook.prune(model, "evit", keep_ratio=0.6, at=(1, 2))
    tpbook.prune(twin.timm_model, "evit", keep_ratio=0.6, at=(1, 2))
    assert type(model).__name__ == "TimmWrapperForImageClassification" and list(model.state_dict()) == keys
    assert torch.equal(model(images).logits, twin(images).logits)
    assert model.pruning is model.timm_model.pruning and model.keep_ratio == 0.6
    model.keep = 5
    assert model.timm_model.keep == 5 and model.keep_ratio is None
    with tpbook.trace(model) as t:
        out = model(images, labels=torch.tensor([1, 2]))
    assert [kept.shape[1] for kept in t.kept] == [6, 6] and out.loss.dim() == 0
    with pytest.raises(RuntimeError, match="a pruned model has no feature maps"):
        model(images, output_hidden_states=True)
    with pytest.raises(ValueError, match="pruned already"):
        tpbook.prune(model, "evit")
    tpbook.unprune(model)
    assert not hasattr(model, "pruning") and not hasattr(model.timm_model, "pruning")
    assert type(model) is transformers.TimmWrapperForImageClassification


def test_a_wrapper_trains_and_its_predictors_are_of_the_timm_model():
    model, images = BUILDERS["hf_timm_wrapper"]()
    tpbook.prune(model, "dynamicvit", keep_ratio=0.6, at=(1, 2)).train()
    model.gradient_checkpointing_enable()
    with tpbook.trace(model) as t:
        model(images, labels=torch.tensor([1, 2])).loss.backward()
    assert len(t.decisions) == 2
    gradients = [p.grad for n, p in model.named_parameters() if n.startswith("timm_model.score_predictor")]
    assert gradients and all(g.abs().max() > 0 for g in gradients[:2])
    again = model.state_dict()
    model.load_state_dict(again, strict=True)


def test_a_wrapper_of_something_else_says_what_it_holds():
    config = transformers.TimmWrapperConfig(architecture="resnet18", num_labels=2)
    model = transformers.TimmWrapperForImageClassification(config)
    with pytest.raises(TypeError, match=r"its timm_model that cannot be pruned: .*timm\.models\.resnet"):
        tpbook.prune(model, "random")
