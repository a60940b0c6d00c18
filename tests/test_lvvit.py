"""LV-ViT: the official code's numbers, the equations, the training that distils its second head, what it costs."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from builders import COUNTED
from safetensors.torch import save_file

import tpbook
from tpbook import flops, train
from tpbook.backbones.lvvit import Stem
from tpbook.families import family_of
from tpbook.methods.counts import token_counts
from tpbook.training import sources
from tpbook.training.models import build
from tpbook.training.recipes import make

SMALL = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 10}
AT = (1, 2)


def small(**kwargs):
    """A small random model in eval mode, nothing in it trivial."""
    torch.manual_seed(0)
    model = tpbook.LVViT(**{**SMALL, "stem_width": 8, "skip_lam": 3.0, **kwargs}).eval()
    return random(model)


def random(model):
    with torch.no_grad():
        for name, t in model.state_dict().items():
            if t.is_floating_point():
                t.uniform_(0.5, 1.5) if "var" in name or t.dim() == 1 else t.normal_(std=0.1)
    return model


def images(batch=2, size=(32, 48)):
    return torch.randn(batch, 3, *size)


# ---- the official code


# file → LVViT's arguments, the method and where it prunes, the ratios, the seed of the training forward
OFFICIAL = {
    "a": ((64, 8, 64, 8, 4, 10, 2.0), "dynamicvit", (2, 4, 6), (0.7, 0.5), 20274),
    "p16": ((64, 16, 48, 8, 4, 12, 1.0), "dynamicvit", (2, 4, 6), (0.7, 0.9), 20263),
    "dtps": ((64, 8, 48, 6, 4, 10, 2.0), "dtps", (1, 3, 5), (0.7, 0.5), None),  # official parts, put together here
}
ARGUMENTS = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes", "skip_lam")


def state_of(tensors):
    return {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}


def loaded(name, tensors, tmp_path, pruned=True):
    """The model with the official state dict, read strictly."""
    values, method, at, ratios, _ = OFFICIAL[name]
    model = tpbook.LVViT(**dict(zip(ARGUMENTS, values)))
    state = state_of(tensors)
    if pruned:
        tpbook.prune(model, method, keep_ratio=ratios[0], at=at)
    else:
        state = {key: value for key, value in state.items() if not key.startswith("score_predictor")}
    torch.save({"state_dict": state}, tmp_path / "official.pth.tar")
    return tpbook.load_checkpoint(model, tmp_path / "official.pth.tar").eval()


@pytest.mark.parametrize("name", OFFICIAL)
@torch.no_grad()
def test_official_dense(official, tmp_path, name):
    want = official(f"lvvit-{name}")
    model = loaded(name, want, tmp_path, pruned=False)
    torch.testing.assert_close(model(want["images"]), want["dense.logits"], atol=1e-5, rtol=0)
    features = model.forward_features(want["images"])
    torch.testing.assert_close(features, want["dense.features"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", OFFICIAL)
@torch.no_grad()
def test_official_pruned(official, tmp_path, name):
    want = official(f"lvvit-{name}")
    model = loaded(name, want, tmp_path)
    for ratio in OFFICIAL[name][3]:
        model.keep_ratio, key = ratio, f"rho{round(100 * ratio)}"
        with tpbook.trace(model) as t:
            logits = model(want["images"])
        torch.testing.assert_close(logits, want[f"{key}.logits"], atol=1e-5, rtol=0)
        torch.testing.assert_close(t.features, want[f"{key}.features"][:, 1:], atol=1e-5, rtol=0)
        for s in range(3):
            assert torch.equal(t.kept[s], want[f"{key}.kept.{s}"])
            torch.testing.assert_close(t.scores[s], want[f"{key}.scores.{s}"], atol=1e-5, rtol=0)


def a_step(model, teacher, x, labels, **changes):
    """The loss terms of one training step, by the loop's own function."""
    recipe = make({"method": "dynamicvit", "teacher": "start", "token_loss": "kl", **changes})
    accelerator = SimpleNamespace(autocast=nullcontext)
    return train.terms_of(recipe, accelerator, model, model, teacher, x, labels)


@pytest.mark.parametrize("name", ["a", "p16"])
def test_official_training(official, tmp_path, name):
    want = official(f"lvvit-{name}")
    model, teacher = loaded(name, want, tmp_path).train(), loaded(name, want, tmp_path, pruned=False)
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    torch.manual_seed(OFFICIAL[name][4])
    with tpbook.trace(model) as t:
        x_cls = model(want["images"])
    torch.testing.assert_close(x_cls, want["train.x_cls"], atol=1e-5, rtol=0)
    torch.testing.assert_close(model.aux_head(t.features), want["train.x_aux"], atol=1e-5, rtol=0)
    for s in range(3):
        assert torch.equal(t.decisions[s].round(), want[f"train.decision.{s}"])
    assert torch.equal(t.decisions[-1].round(), want["train.mask"][..., 0])

    model.load_state_dict(before, strict=False)  # the statistics have moved
    torch.manual_seed(OFFICIAL[name][4])
    terms = a_step(model, teacher, want["images"], want["train.labels"])
    got = torch.stack([terms[key] for key in ("cls", "ratio_sum", "logit_kl", "token")])
    torch.testing.assert_close(got, want["train.loss_parts"], atol=1e-5, rtol=0)
    torch.testing.assert_close(terms["total"], want["train.loss"][0], atol=1e-5, rtol=0)
    terms["total"].backward()
    gradients = [key for key in want if key.startswith("train.grad.")]
    assert len(gradients) == 3
    for key in gradients:
        grad = model.get_parameter(key.removeprefix("train.grad.")).grad
        torch.testing.assert_close(grad, want[key], atol=1e-5, rtol=0)


# ---- the equations, in float64


class Equations:
    """LV-ViT and DynamicViT's inference, from a state dict."""

    def __init__(self, state, heads, skip_lam, patch):
        self.w, self.heads, self.lam, self.patch = state, heads, skip_lam, patch

    def linear(self, name, x):
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def norm(self, name, x):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def stem(self, x):
        for i, (kernel, stride) in enumerate(((7, 2), (3, 1), (3, 1)), start=1):
            x = F.conv2d(x, self.w[f"patch_embed.conv{i}.weight"], stride=stride, padding=kernel // 2)
            weight, bias, mean, var = (
                self.w[f"patch_embed.bn{i}.{key}"].view(-1, 1, 1)
                for key in ("weight", "bias", "running_mean", "running_var")
            )
            x = ((x - mean) / (var + 1e-5).sqrt() * weight + bias).clamp(min=0)
        proj = self.w["patch_embed.proj.weight"], self.w["patch_embed.proj.bias"]
        return F.conv2d(x, *proj, stride=self.patch // 2).flatten(2).mT

    def attention(self, name, x):
        b, t, c = x.shape
        q, k, v = self.linear(f"{name}.qkv", x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        a = (q @ k.mT * (c // self.heads) ** -0.5).softmax(-1)
        return self.linear(f"{name}.proj", (a @ v).transpose(1, 2).reshape(b, t, c))

    def block(self, name, x):
        x = x + self.attention(f"{name}.attn", self.norm(f"{name}.norm1", x)) / self.lam
        y = self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.norm2", x))
        y = y * 0.5 * (1 + (y / 2**0.5).erf())
        return x + self.linear(f"{name}.mlp.fc2", y) / self.lam

    def scores(self, name, x):
        z = F.gelu(self.linear(f"{name}.in_conv.1", self.norm(f"{name}.in_conv.0", x)))
        local, glob = z.chunk(2, -1)
        z = torch.cat([local, glob.mean(1, keepdim=True).expand_as(local)], -1)
        z = F.gelu(self.linear(f"{name}.out_conv.2", F.gelu(self.linear(f"{name}.out_conv.0", z))))
        return self.linear(f"{name}.out_conv.4", z).log_softmax(-1)[..., 0]

    def features(self, x, depth, kept=()):
        """`kept`: {block: how many tokens} before it."""
        x = self.stem(x)
        x = torch.cat([self.w["cls_token"].expand(len(x), -1, -1), x], 1) + self.w["pos_embed"]
        for i in range(depth):
            if i in kept:
                best = self.scores(f"score_predictor.{list(kept).index(i)}", x[:, 1:]).argsort(1, descending=True)
                rows = [torch.cat([y[:1], y[1:][chosen]]) for y, chosen in zip(x, best[:, : kept[i]])]
                x = torch.stack(rows)
            x = self.block(f"blocks.{i}", x)
        return self.norm("norm", x)

    def heads_of(self, x):
        return self.linear("head", x[:, 0]), self.linear("aux_head", x[:, 1:])


def equations(model):
    return Equations(model.state_dict(), model.blocks[0].attn.num_heads, model.blocks[0].ls1.by, 8)


@torch.no_grad()
def test_what_it_computes_is_its_equations():
    model, x = small().double(), images().double()
    reference = equations(model)
    features = reference.features(x, 4)
    x_cls, x_aux = reference.heads_of(features)
    torch.testing.assert_close(model.forward_features(x), features, atol=1e-10, rtol=0)
    torch.testing.assert_close(model(x), x_cls + 0.5 * x_aux.max(1)[0], atol=1e-10, rtol=0)
    torch.testing.assert_close(family_of(model).class_logits(model, x), x_cls, atol=1e-10, rtol=0)
    assert not torch.allclose(model(x), x_cls, atol=1e-3)


@pytest.mark.parametrize("ratio", [1.0, 0.7, 0.4])
@torch.no_grad()
def test_the_maximum_is_over_the_tokens_that_are_left(ratio):
    model, x = random(tpbook.prune(small(), "dynamicvit", at=AT, keep_ratio=ratio)).double(), images().double()
    counts = [count.kept for count in token_counts(24, (ratio, ratio), model.pruning.method)]
    reference = equations(model)
    x_cls, x_aux = reference.heads_of(reference.features(x, 4, dict(zip(AT, counts))))
    assert x_aux.shape[1] == int(24 * ratio * ratio + 1e-9)
    torch.testing.assert_close(model(x), x_cls + 0.5 * x_aux.max(1)[0], atol=1e-10, rtol=0)


# ---- every method, and the model's other calls


@pytest.mark.parametrize("method", COUNTED)
def test_every_method_prunes_and_trains_it(method):
    model, x = small(), images()
    dense = model(x).detach()
    tpbook.prune(model, method, at=AT)
    model.keep_ratio, parts = 1.0, model.pruning.method
    assert torch.equal(model(x), dense) is not parts.chooses.varies  # which samples at ρ = 1 too
    model.keep_ratio = 0.5
    with torch.no_grad(), tpbook.trace(model) as t:
        logits = model(x)
    assert logits.shape == (2, 10) and not torch.allclose(logits, dense, atol=1e-4)
    assert t.kept[-1].shape[1] < 24 // 2 if not parts.reduce.rejoins else t.kept[-1].shape[1] == 24 // 2
    assert t.features.shape[1] == (24 if parts.reduce.rejoins else t.kept[-1].shape[1])
    logits = model.train()(x)
    logits.square().sum().backward()
    assert model.patch_embed.conv1.weight.grad.abs().sum() > 0
    assert model.aux_head.weight.grad is None  # class logits alone
    tpbook.unprune(model.eval())


def test_masked_it_reads_what_is_in_view():
    model, x = tpbook.mask(small(), 0.5, when="always", seed=0), images()
    with torch.no_grad(), tpbook.trace(model) as t:
        got = model(x)
        assert t.visible.shape == (2, 12) and t.features.shape == (2, 12, 32)
        x_cls = family_of(model).class_logits(model, x)
    torch.testing.assert_close(got, x_cls + 0.5 * model.aux_head(t.features).amax(1))


def test_both_heads_are_reset_together():
    model, x = small(), images()
    assert model.get_classifier() == (model.head, model.aux_head)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3) and model.aux_head.weight.shape == (3, 32)
    model.reset_classifier(0)
    assert torch.equal(model(x), model.forward_features(x)[:, 0])
    model.reset_classifier(0, "")
    assert torch.equal(model(x), model.forward_features(x))
    with pytest.raises(ValueError, match="global_pool must be 'token'.* got ''"):
        model.reset_classifier(3)
    model.reset_classifier(3, "token")
    assert model(x).shape == (2, 3)
    with pytest.raises(ValueError, match="global_pool must be 'token'.* got 'avg'"):
        model.reset_classifier(3, "avg")


@torch.no_grad()
def test_other_image_sizes():
    torch.manual_seed(0)
    model = small(dynamic_img_size=True)
    torch.testing.assert_close(model(x := images()), small()(x))
    assert model(images(size=(64, 16))).shape == (2, 10)
    fixed = small()
    with pytest.raises(AssertionError, match="must be 48 pixels, got 40"):
        fixed(images(size=(32, 40)))
    fixed.set_input_size((64, 64))
    assert fixed.pos_embed.shape == (1, 65, 32) and fixed(images(size=(64, 64))).shape == (2, 10)


# ---- training


def test_the_token_term_is_over_the_classes_of_the_second_head():
    model, x, labels = tpbook.prune(small(), "dynamicvit", at=AT), images(4), torch.tensor([1, 2, 3, 4])
    teacher = random(small())
    for bn in (model.patch_embed.bn1, model.patch_embed.bn2, model.patch_embed.bn3):
        bn.train(False)
    model.train()
    torch.manual_seed(1)
    terms = a_step(model, teacher, x, labels)
    torch.manual_seed(1)
    with tpbook.trace(model) as t:
        logits = model(x)
    reference = equations(teacher)
    x_cls, x_aux = reference.heads_of(reference.features(x, 4))
    kept = t.decisions[-1].round().bool()
    ours = model.aux_head(t.features)[kept].log_softmax(-1)  # (kept, classes)
    theirs = x_aux[kept].log_softmax(-1)
    torch.testing.assert_close(terms["token"], (theirs.exp() * (theirs - ours)).sum(-1).mean())
    ours, theirs = logits.log_softmax(-1), x_cls.log_softmax(-1)
    torch.testing.assert_close(terms["logit_kl"], (theirs.exp() * (theirs - ours)).sum(-1).mean())
    torch.testing.assert_close(terms["cls"], -ours[range(4), labels].mean())
    terms["total"].backward()
    assert model.aux_head.weight.grad.abs().sum() > 0


def test_a_teacher_of_two_heads_gives_its_class_logits_to_every_method():
    model, teacher, x = tpbook.prune(small(), "etps", at=AT).train(), small(), images(4)
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    terms = a_step(model, teacher, x, torch.tensor([1, 2, 3, 4]), method="etps")
    model.load_state_dict(small().state_dict())
    reference = equations(teacher)
    theirs = reference.heads_of(reference.features(x, 4))[0].log_softmax(-1)
    ours = model(x).log_softmax(-1)
    torch.testing.assert_close(terms["logit_kl"], (theirs.exp() * (theirs - ours)).sum(-1).mean())


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """$TPBOOK_WEIGHTS with a random LV-ViT-T in it; the model."""
    model = random(tpbook.create_model("lvvit_t")).eval()
    save_file(model.state_dict(), tmp_path / "lvvit_t.safetensors")
    monkeypatch.setenv("TPBOOK_WEIGHTS", str(tmp_path))
    return model


@torch.no_grad()
def test_weights_from_a_file(stored):
    x = torch.randn(1, 3, 224, 224)
    assert torch.equal(tpbook.load_backbone("lvvit_t")(x), stored(x))
    classes = (0, 217, 482)
    recipe = make({"model": "lvvit_t", "data": "imagenette2-160", "head": "data"})
    narrow = build(recipe, sources.imagenet(classes))
    torch.testing.assert_close(narrow(x), stored(x)[:, classes], atol=1e-4, rtol=0)
    five = tpbook.load_backbone("lvvit_t", num_classes=5, img_size=64, in_chans=1)
    assert five(torch.randn(1, 1, 64, 64)).shape == (1, 5) and five.aux_head.out_features == 5
    assert five.pos_embed.shape == (1, 17, 240)
    assert torch.equal(five.blocks[3].mlp.fc1.weight, stored.blocks[3].mlp.fc1.weight)
    config = timm.data.resolve_model_data_config(stored)
    assert config["crop_pct"] == 0.9 and config["mean"] == (0.485, 0.456, 0.406)
    assert tpbook.create_model("lvvit_m").pretrained_cfg["crop_pct"] == 1.0


# ---- what it costs: MACs in 10⁹, and parameters in 10⁶

AT_OF = {"lvvit_t": (3, 6, 9), "lvvit_s": (4, 8, 12), "lvvit_m": (5, 10, 15)}
BATCH_NORM = 2 * 3 * 64 * 112 * 112  # fvcore's two a number, which is in the reference's sums and not in ours
# (model, method, ρ): what DynamicViT, EViT and TPS print, and a reference's sum
COSTS = {
    ("lvvit_s", None, 1.0): ("6.6", "6.556"), ("lvvit_s", "dynamicvit", 0.9): ("5.8", "5.881"),
    ("lvvit_s", "dynamicvit", 0.8): ("5.1", "5.211"), ("lvvit_s", "dynamicvit", 0.7): ("4.6", "4.655"),
    ("lvvit_s", "dynamicvit", 0.5): ("3.7", "3.795"), ("lvvit_s", "evit", 0.7): ("4.7", "4.712"),
    ("lvvit_s", "dtps", 0.7): (None, "4.660"), ("lvvit_s", "etps", 0.7): (None, "4.679"),
    ("lvvit_s", "evit", 0.5): ("3.9", "3.880"), ("lvvit_s", "dtps", 0.5): ("3.8", "3.800"),
    ("lvvit_s", "etps", 0.5): ("3.8", "3.854"), ("lvvit_m", None, 1.0): ("12.7", "12.683"),
    ("lvvit_m", "dynamicvit", 0.9): ("11.1", "11.212"), ("lvvit_m", "dynamicvit", 0.8): ("9.6", "9.787"),
    ("lvvit_m", "dynamicvit", 0.7): ("8.5", "8.598"), ("lvvit_m", "dynamicvit", 0.5): (None, "6.745"),
    ("lvvit_t", None, 1.0): ("2.9", "2.873"), ("lvvit_t", "dynamicvit", 0.9): (None, "2.659"),
    ("lvvit_t", "dynamicvit", 0.8): (None, "2.442"), ("lvvit_t", "dynamicvit", 0.7): (None, "2.264"),
    ("lvvit_t", "dynamicvit", 0.5): ("2.0", "1.994"), ("lvvit_t", "dtps", 0.5): ("2.0", "1.997"),
    ("lvvit_t", "etps", 0.5): ("2.0", "2.025"),
}  # fmt: skip


@pytest.fixture(scope="module")
def models():
    return {name: tpbook.create_model(name).eval() for name in AT_OF}


@pytest.mark.parametrize("name, method, ratio", COSTS, ids=str)
def test_macs(models, name, method, ratio):
    model, (printed, reference) = models[name], COSTS[name, method, ratio]
    if method:
        tpbook.prune(model, method, keep_ratio=ratio, at=AT_OF[name])
    try:
        cost = flops.closed_form(model)
        if ratio in (1.0, 0.7):
            assert flops.count(model) == cost
    finally:
        if method:
            tpbook.unprune(model)
    assert f"{(cost.total + BATCH_NORM) / 1e9:.3f}" == reference
    ours = cost.total / 1e9
    if method == "dynamicvit" and name != "lvvit_t" and printed:  # lower than what its code runs; why is not known
        assert f"{ours:.1f}" != printed and 0 < ours - float(printed) < 0.2
    elif printed:
        assert f"{ours:.1f}" == printed


def test_embedding_and_heads_are_counted(models):
    cost = flops.closed_form(models["lvvit_s"])
    stem = 112 * 112 * 64 * (3 * 49 + 64 * 9 + 64 * 9) + 196 * 64 * 64 * 384
    assert (cost.embed, cost.head) == (stem, 1000 * 384 * (1 + 196))
    assert flops.closed_form(models["lvvit_s"], (256, 320)) == flops.count(models["lvvit_s"], (256, 320))


def test_parameters(models):
    assert [round(sum(p.numel() for p in models[name].parameters()) / 1e6, 2) for name in AT_OF] == [8.53, 26.15, 55.83]
    pruned = {"lvvit_t": 8.82, "lvvit_s": 26.88, "lvvit_m": 57.12}
    for name, at in AT_OF.items():
        model = tpbook.prune(models[name], "dynamicvit")
        assert model.pruning.at == at  # which are this package's own default too
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(pruned[name], abs=0.006)
        tpbook.unprune(model)


def test_sizes_are_the_official_ones(models):
    large = tpbook.create_model("lvvit_l", depth=1)  # one block, for the sake of time
    sizes = {}
    for name, m in {**models, "lvvit_l": large}.items():
        block, stem = m.blocks[0], m.patch_embed
        sizes[name] = (len(m.blocks), m.embed_dim, block.attn.num_heads, block.ls2.by, stem.bn1.num_features)
    assert sizes == {
        "lvvit_t": (12, 240, 4, 1.0, 64), "lvvit_s": (16, 384, 6, 2.0, 64), "lvvit_m": (20, 512, 8, 2.0, 64),
        "lvvit_l": (1, 768, 12, 3.0, 128),
    }  # fmt: skip
    assert all(m.blocks[0].norm1.eps == 1e-5 and m.blocks[0].attn.qkv.bias is None for m in models.values())


def test_state_dict_has_the_official_keys():
    model = tpbook.prune(small(depth=1), "dynamicvit", at=(0,))
    pairs = ["patch_embed.proj", "norm", "head", "aux_head"]
    pairs += [f"blocks.0.{name}" for name in ("norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")]
    pairs += [f"score_predictor.0.{name}" for name in ("in_conv.0", "in_conv.1", *(f"out_conv.{i}" for i in (0, 2, 4)))]
    pairs += [f"patch_embed.bn{i}" for i in (1, 2, 3)]
    keys = {"cls_token", "pos_embed", "blocks.0.attn.qkv.weight", *(f"patch_embed.conv{i}.weight" for i in (1, 2, 3))}
    keys |= {f"{name}.{part}" for name in pairs for part in ("weight", "bias")}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    keys |= {f"patch_embed.bn{i}.{part}" for i in (1, 2, 3) for part in statistics}
    assert set(model.state_dict()) == keys


def test_deit_256():
    model = tpbook.create_model("deit_256_patch16_224").eval()
    assert (model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads) == (256, 12, 4)
    tpbook.prune(model, "dynamicvit", keep_ratio=0.7, at=(3, 6, 9))
    cost = flops.closed_form(model)
    assert flops.count(model) == cost and f"{cost.total / 1e9:.1f}" == "1.4"  # printed 1.3


# ---- bad input


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"img_size": 100}, r"img_size must be one or two multiples of 16, got 100"),
        ({"img_size": (224, 100)}, r"img_size must be one or two multiples of 16, got \(224, 100\)"),
        ({"patch_size": 15}, "patch_size must be an even int.* got 15"),
        ({"patch_size": (16, 8)}, r"patch_size must be an even int.* got \(16, 8\)"),
        ({"skip_lam": 0}, "skip_lam must be above 0, got 0"),
        ({"dynamic_img_pad": True}, "dynamic_img_pad must be False"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(kwargs, words):
    with pytest.raises(ValueError, match=words):
        tpbook.LVViT(embed_dim=32, depth=1, num_heads=2, **kwargs)


def test_bad_sizes_later_are_named():
    model = small()
    with pytest.raises(ValueError, match="img_size must be one or two multiples of 8, got 60"):
        model.set_input_size(60)
    with pytest.raises(ValueError, match="patch_size must stay 8, got 16"):
        model.set_input_size(patch_size=16)
    assert model(images()).shape == (2, 10)
    with pytest.raises(ValueError, match="image_size must be one or two multiples"):
        flops.closed_form(model, 60)
    assert isinstance(model.patch_embed, Stem)


def test_a_checkpoint_of_another_size_is_named(tmp_path, monkeypatch):
    path = tmp_path / "other.safetensors"
    model = small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for kwargs, key in (({"img_size": 64}, "pos_embed"), ({"embed_dim": 48}, "cls_token"), ({"depth": 3}, "blocks.3.")):
        save_file(small(**kwargs).state_dict(), path)
        with pytest.raises(ValueError, match=f"other.safetensors does not fit the model.*{key}"):
            tpbook.load_checkpoint(model, path)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    monkeypatch.setenv("TPBOOK_WEIGHTS", str(tmp_path))
    path.rename(tmp_path / "lvvit_t.safetensors")
    with pytest.raises(ValueError, match="lvvit_t.safetensors does not fit lvvit_t"):
        tpbook.load_backbone("lvvit_t")
