"""The fast path of Swin and ConvNeXt, against a forward that is written from the equations under official names."""

import copy
import io
import math
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import held
from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer

import tpbook
from notebooks import fast_path
from tpbook import flops, losses
from tpbook.training.recipes import make
from tpbook.training.setup import optimizer_of

DIMS, DEPTHS, HEADS, WINDOW = (8, 16, 32, 64), (1, 2, 6, 1), (1, 2, 4, 4), 4
SIZE, LARGE = (64, 128), (128, 256)  # images of patches of 2 pixels and of 4
N = 128  # positions in the third stage: 8 × 16


def swin(**kwargs):
    return SwinTransformer(**{
        "img_size": SIZE, "patch_size": 2, "window_size": WINDOW, "embed_dim": DIMS[0], "depths": DEPTHS,
        "num_heads": HEADS, "num_classes": 10, "drop_path_rate": 0.0, **kwargs,
    })  # fmt: skip


def convnext(**kwargs):
    model = ConvNeXt(**{"dims": DIMS, "depths": DEPTHS, "num_classes": 10, **kwargs})
    model.pretrained_cfg = {"input_size": (3, *LARGE)}
    return model


# ---- the reference: what papers and official files say, by their names


class Weights:
    """A random state dict under official names, made as the reference asks for it."""

    def __init__(self):
        self.state, self.random = {}, torch.Generator().manual_seed(0)

    def __call__(self, name, *shape):
        if name not in self.state:
            x = torch.randn(shape, generator=self.random)
            scale, shift = (0.2, 0.6) if len(shape) == 1 else (math.prod(shape[1:]) ** -0.5, 0)
            self.state[name] = (scale * x + shift).requires_grad_()
        return self.state[name]

    def linear(self, name, x, n, bias=True):
        b = self(f"{name}.bias", n) if bias else None
        return F.linear(x, self(f"{name}.weight", n, x.shape[-1]), b)

    def norm(self, name, x, eps):
        n = x.shape[-1]
        return F.layer_norm(x, (n,), self(f"{name}.weight", n), self(f"{name}.bias", n), eps)

    def conv(self, name, x, n, size, stride=1, groups=1):  # (B, H, W, C)
        weight = self(f"{name}.weight", n, x.shape[-1] // groups, size, size)
        padding = size // 2 if groups > 1 else 0
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, self(f"{name}.bias", n), stride, padding, groups=groups)
        return y.permute(0, 2, 3, 1)


class Reference:
    """Forward of a model of four stages in the third of which a fast path stands, from `at[0]` = 1 on."""

    at = (1, 2, 3)

    def __init__(self):
        self.w = Weights()

    def score(self, s, x, linear, eps):
        name = f"{self.predictors}.{s}"
        u = F.gelu(linear(f"{name}.in_conv.1", self.w.norm(f"{name}.in_conv.0", x, eps), DIMS[2]))
        half = DIMS[2] // 2
        u = torch.cat([u[..., :half], u[..., half:].mean(1, keepdim=True).expand(-1, x.shape[1], -1)], -1)
        u = F.gelu(linear(f"{name}.out_conv.0", u, half))
        u = F.gelu(linear(f"{name}.out_conv.2", u, half // 2))
        return linear(f"{name}.out_conv.4", u, 2).log_softmax(-1)

    def third(self, x, ratios, training):
        """The third stage: (B, H, W, C) → the same, and what each decision chose, (B, N)."""
        x1 = x2 = x
        m, chosen = torch.ones_like(x[..., :1]), []
        for i in range(DEPTHS[2]):
            if i in self.at:
                s = self.at.index(i)
                p = self.predict(s, (x1 * m + x2 * (1 - m)).flatten(1, 2))  # (B, N, 2)
                if training:
                    chosen.append(self.draw(p))
                else:
                    best = p[..., 0].topk(int(N * ratios[s] + 1e-9)).indices
                    x1 = x2 = x1 * m + x2 * (1 - m)  # there is one map
                    chosen.append(torch.zeros(p.shape[:2]).scatter(1, best, 1.0))
                m = chosen[-1].view(*x.shape[:3], 1)
            x = x1 * m + x2 * (1 - m)
            u, b1, b2 = self.spatial(i, x, x1, x2)
            if i < self.at[0]:
                x1 = x2 = b1 + self.mlp(i, u)
            else:
                x1, x2 = b1 + self.mlp(i, u * m + x1 * (1 - m)), b2 + self.fast(i, u * (1 - m) + x2 * m)
        return x1 * m + x2 * (1 - m), chosen

    def __call__(self, images, ratios=(0.7, 0.5, 0.3), training=False):
        x = self.stem(images)
        for stage in range(4):
            x = self.shrink(stage, x)
            if stage == 2:
                x, chosen = self.third(x, ratios, training)
                continue
            for i in range(DEPTHS[stage]):
                x = self.plain(stage, i, x)
        return *self.head(x), chosen


class OfficialSwin(Reference):
    predictors, at_end = "layers.2.score_predictor", True

    def stem(self, images):
        x = self.w.conv("patch_embed.proj", images.permute(0, 2, 3, 1), DIMS[0], 2, 2)
        return self.w.norm("patch_embed.norm", x, 1e-5)

    def shrink(self, stage, x):
        if not stage:
            return x
        name = f"layers.{stage - 1}.downsample"
        x = torch.cat([x[:, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))], -1)
        return self.w.linear(f"{name}.reduction", self.w.norm(f"{name}.norm", x, 1e-5), DIMS[stage], bias=False)

    def attention(self, stage, i, x):
        """By definition: positions see each other that share a shifted window, and their side of the edge."""
        name, (b, rows, columns, c) = f"layers.{stage}.blocks.{i}.attn", x.shape
        shift = WINDOW // 2 if i % 2 and min(rows, columns) > WINDOW else 0
        seen, place = torch.ones(rows * columns, rows * columns), []
        for side, along in ((rows, 0), (columns, 1)):
            p = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))[:, along]
            moved = (p - (shift if side > WINDOW else 0)) % side
            for key in (moved // WINDOW, p < shift):
                seen = seen * (key[:, None] == key)
            place.append((moved[:, None] - moved + WINDOW - 1).clamp(0, 2 * WINDOW - 2))
        table = self.w(f"{name}.relative_position_bias_table", (2 * WINDOW - 1) ** 2, HEADS[stage])
        bias = table[place[0] * (2 * WINDOW - 1) + place[1]].permute(2, 0, 1)
        self.w.state[f"{name}.relative_position_index"] = torch.zeros(WINDOW**2, WINDOW**2, dtype=torch.int64)
        qkv = self.w.linear(f"{name}.qkv", x.flatten(1, 2), 3 * c).view(b, rows * columns, 3, HEADS[stage], -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + bias - 1e9 * (1 - seen)
        return self.w.linear(f"{name}.proj", (logits.softmax(-1) @ v).transpose(1, 2).flatten(2), c).view(x.shape)

    def after_attention(self, stage, i, x):
        return x + self.attention(stage, i, self.w.norm(f"layers.{stage}.blocks.{i}.norm1", x, 1e-5))

    def feed(self, stage, i, u):
        name, c = f"layers.{stage}.blocks.{i}", u.shape[-1]
        y = F.gelu(self.w.linear(f"{name}.mlp.fc1", self.w.norm(f"{name}.norm2", u, 1e-5), 4 * c))
        return self.w.linear(f"{name}.mlp.fc2", y, c)

    def plain(self, stage, i, x):
        u = self.after_attention(stage, i, x)
        return u + self.feed(stage, i, u)

    def spatial(self, i, x, x1, x2):
        u = self.after_attention(2, i, x)
        return u, u, u

    def mlp(self, i, u):
        return self.feed(2, i, u)

    def fast(self, i, u):
        name = f"layers.2.blocks.{i}.fastmlp.fc1"
        return self.w.linear(f"{name}.1", self.w.norm(f"{name}.0", u, 1e-5), DIMS[2])

    def predict(self, s, x):
        return self.score(s, x, self.w.linear, 1e-5)

    def draw(self, p):
        return F.gumbel_softmax(p, hard=True, dim=2)[..., 0]

    def head(self, x):
        features = self.w.norm("norm", x.flatten(1, 2), 1e-5)
        return self.w.linear("head", features.mean(1), 10), features


class OfficialConvNeXt(Reference):
    predictors = "score_predictor"

    def stem(self, images):
        x = self.w.conv("downsample_layers.0.0", images.permute(0, 2, 3, 1), DIMS[0], 4, 4)
        return self.w.norm("downsample_layers.0.1", x, 1e-6)

    def shrink(self, stage, x):
        if not stage:
            return x
        name = f"downsample_layers.{stage}"
        return self.w.conv(f"{name}.1", self.w.norm(f"{name}.0", x, 1e-6), DIMS[stage], 2, 2)

    def dwconv(self, stage, i, x):
        return self.w.conv(f"stages.{stage}.{i}.dwconv", x, x.shape[-1], 7, groups=x.shape[-1])

    def feed(self, stage, i, u):
        name, c = f"stages.{stage}.{i}", u.shape[-1]
        y = F.gelu(self.w.linear(f"{name}.pwconv1", self.w.norm(f"{name}.norm", u, 1e-6), 4 * c))
        return self.w(f"{name}.gamma", c) * self.w.linear(f"{name}.pwconv2", y, c)

    def plain(self, stage, i, x):
        return x + self.feed(stage, i, self.dwconv(stage, i, x))

    def spatial(self, i, x, x1, x2):
        return self.dwconv(2, i, x), x1, x2

    def mlp(self, i, u):
        return self.feed(2, i, u)

    def fast(self, i, u):
        name = f"stages.2.{i}.fast_path"
        y = self.w.linear(f"{name}.1", self.w.norm(f"{name}.0", u, 1e-6), DIMS[2])
        return self.w(f"{name}_gamma", DIMS[2]) * y

    def predict(self, s, x):
        def linear(name, x, n):
            return self.w.conv(name, x.unsqueeze(2), n, 1).squeeze(2)

        return self.score(s, x, linear, 1e-6)

    def draw(self, p):  # on a map, (B, 2, H, W)
        p = p.transpose(1, 2).unflatten(2, (8, 16))
        return F.gumbel_softmax(p, hard=True, dim=1)[:, 0].flatten(1)

    def head(self, x):
        logits = self.w.linear("head", self.w.norm("norm", x.mean((1, 2)), 1e-6), 10)
        return logits, self.w.norm("norm", x.flatten(1, 2), 1e-6)


KINDS = {"swin": (swin, OfficialSwin, SIZE), "convnext": (convnext, OfficialConvNeXt, LARGE)}
each = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def loaded(tmp_path):
    """kind → a pruned model with an official file's weights, in eval mode; the reference; images."""

    def load(kind, batch=2):
        build, official, size = KINDS[kind]
        reference, images = official(), torch.randn(batch, 3, *size)
        reference(images)
        torch.save({"model": {k: v.detach() for k, v in reference.w.state.items()}}, tmp_path / "official.pth")
        model = tpbook.prune(build(), "dynamicvit", keep_ratio=0.7).eval()
        return tpbook.load_checkpoint(model, tmp_path / "official.pth"), reference, images

    return load


def small(kind, **kwargs):
    """A random model in eval mode, far from its trivial start, and images."""
    torch.manual_seed(0)
    model = KINDS[kind][0](**kwargs)
    return lively(model).eval(), torch.randn(3, 3, *KINDS[kind][2])


def lively(model):
    with torch.no_grad():
        for p in model.parameters():
            p.uniform_(0.2, 0.8) if p.dim() == 1 else p.normal_(std=0.2)
    return model


# ---- the two forwards


@each
@pytest.mark.parametrize("batch", [1, 2, 3])  # the official Swin takes 2 for a pair
def test_eval_is_the_official_forward(loaded, kind, batch):
    model, reference, images = loaded(kind, batch)
    with torch.no_grad():
        want, features, chosen = reference(images)
        with tpbook.trace(model) as t:
            got = model(images)
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(t.features, features, rtol=1e-4, atol=1e-5)
    assert [k.shape for k in t.kept] == [(batch, n) for n in (89, 64, 38)] and t.whole and not t.decisions
    for kept, m in zip(t.kept, chosen):
        assert torch.equal(torch.zeros_like(m).scatter(1, kept, 1.0), m)
    assert any((a - b).min() < 0 for a, b in zip(chosen, chosen[1:])), "decisions are not nested"


@each
def test_training_is_the_official_forward(loaded, kind):
    model, reference, images = loaded(kind)
    torch.manual_seed(3)
    want, features, chosen = reference(images, training=True)
    want.square().sum().backward()
    torch.manual_seed(3)
    with tpbook.trace(model.train()) as t:
        got = model(images)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(t.features, features, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(d, m) for d, m in zip(t.decisions, chosen)) and not t.kept
    got.square().sum().backward()
    names = {
        "swin": {
            "layers.2.blocks.1.fastmlp.fc1.1.weight": None, "layers.2.blocks.1.mlp.fc1.weight": None,
            "layers.2.score_predictor.0.in_conv.1.weight": None, "layers.2.score_predictor.2.out_conv.4.bias": None,
            "layers.1.downsample.reduction.weight": "layers.2.downsample.reduction.weight",
        },
        "convnext": {
            "stages.2.1.fast_path.1.weight": "stages.2.blocks.1.fast_path.1.weight",
            "stages.2.2.fast_path_gamma": "stages.2.blocks.2.fast_path_gamma",
            "stages.2.3.pwconv1.weight": "stages.2.blocks.3.mlp.fc1.weight",
            "score_predictor.0.in_conv.1.weight": None, "score_predictor.2.out_conv.4.bias": None,
            "downsample_layers.2.1.weight": "stages.2.downsample.1.weight",
        },
    }  # fmt: skip
    ours = dict(model.named_parameters())
    for theirs, name in names[kind].items():
        grad = reference.w.state[theirs].grad
        assert grad.abs().max() > 0
        torch.testing.assert_close(ours[name or theirs].grad, grad, rtol=1e-3, atol=1e-5 * float(grad.abs().max()))


@each
def test_train_and_eval_differ_where_a_decision_flips(kind):
    model, images = small(kind)
    lively(tpbook.prune(model, "dynamicvit", keep=N // 2))
    same, flipped = fast_path.gap(model, images, flips=False), fast_path.gap(model, images, flips=True)
    assert same["flips"] == [0, 0] and same["logits"] < 1e-5 * same["deviation"]
    assert min(flipped["flips"]) > 0.3 and flipped["logits"] > 1e-2 * flipped["deviation"]


@each
def test_a_batch_of_two_is_two_images(kind):
    model, images = small(kind)
    tpbook.prune(model, "dynamicvit")
    assert fast_path.alone(model, images[:2]) < 1e-4 and fast_path.alone(model, images) < 1e-4


@each
def test_loss_is_the_official_one(loaded, kind):
    model, _, images = loaded(kind)
    teacher = copy.deepcopy(model)
    tpbook.unprune(teacher)
    labels = torch.tensor([3, 8])
    with torch.no_grad(), tpbook.trace(teacher) as seen:
        theirs = teacher(images)
    with tpbook.trace(model.train()) as t:
        ours = model(images)
    assert model.shares(t.decisions) == [0.7, 0.5, 0.3]
    got = losses.dynamicvit(
        ours, t, labels, teacher_logits=theirs, teacher_features=seen.features, keep_ratios=model.shares(t.decisions),
        ratio_weight=10.0,
    )  # fmt: skip
    ratio = sum((d.mean(1) - r).square().mean() for d, r in zip(t.decisions, (0.7, 0.5, 0.3)))
    kl = (theirs.softmax(1) * (theirs.log_softmax(1) - ours.log_softmax(1))).sum(1).mean()
    mse = (t.features - seen.features).square().mean()  # of the whole map: 4 × 8 positions of 128 decisions
    assert t.features.shape == seen.features.shape == (2, 32, DIMS[3]) and mse > 0
    want = F.cross_entropy(ours, labels) + 10 * ratio / 3 + kl / 2 + mse / 2
    torch.testing.assert_close(got["total"], want)


# ---- the model


@each
def test_all_chosen_is_the_dense_model_and_unprune_leaves_nothing(kind):
    model, images = small(kind)
    before = {name: (type(m), sorted(m.__dict__), m.training) for name, m in model.named_modules()}
    keys = list(model.state_dict())
    with torch.no_grad():
        dense = model(images)
        tpbook.prune(model, "dynamicvit", keep_ratio=(1, 1, 1))
        assert torch.equal(model(images), dense)
        with tpbook.trace(model) as t:
            assert torch.equal(model(images), dense) and [s.shape for s in t.scores] == [(3, N)] * 3
        model.keep_ratio = (1, 0.5, 1)  # the last one takes every position in again
        with tpbook.trace(model) as t:
            some = model(images)
        assert [k.shape[1] for k in t.kept] == [N, N // 2, N] and not torch.equal(some, dense)
        tpbook.unprune(model)
        assert list(model.state_dict()) == keys and torch.equal(model(images), dense)
    assert before == {name: (type(m), sorted(m.__dict__), m.training) for name, m in model.named_modules()}


@each
def test_counts(kind):
    model, images = small(kind)
    tpbook.prune(model, "dynamicvit", keep_ratio=0.7)
    assert [c.kept for c in model.pruning.counts(196)] == [137, 98, 58]
    assert int(196 * (0.7 - 0.2)) == 97, "what the official code keeps, in floats"
    model.keep_ratio = 0.9
    assert [c.kept for c in model.pruning.counts(196)] == [176, 137, 98]
    model.keep = (100, 20, 128)
    with tpbook.trace(model) as t, torch.no_grad():
        model(images)
    assert [k.shape[1] for k in t.kept] == [100, 20, 128]
    lively(tpbook.prune(tpbook.unprune(model), "dynamicvit", at=(4,), keep_ratio=0.25, invert=True))
    with tpbook.trace(model) as worst, torch.no_grad():
        model(images)
    worst = worst.scores[0].gather(1, worst.kept[0]), worst.scores[0].sort(1).values[:, :32]
    assert torch.equal(*worst) and worst[0].std() > 1e-3
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model.keep_ratio = 0.001
        assert model(images).shape == (3, 10)
    assert "would keep none of 128" in str(said[0].message)


def test_default_blocks():
    for depth, at in {1: (0,), 2: (1,), 3: (1, 2), 6: (1, 2, 3), 9: (1, 2, 3), 18: (2, 4, 6), 27: (3, 6, 9)}.items():
        model = tpbook.prune(convnext(depths=(1, 1, depth, 1)), "dynamicvit")
        assert model.pruning.at == at
        paths = [name for name, _ in model.named_parameters() if name.endswith("fast_path_gamma")]
        assert paths == [f"stages.2.blocks.{i}.fast_path_gamma" for i in range(at[0], depth)]
        assert all(p.eq(1e-6).all() for name, p in model.named_parameters() if name in paths)


@each
def test_nothing_is_kept(kind):
    model, images = small(kind)
    tpbook.prune(model, "dynamicvit")
    for mode in (True, False):
        before = held(model.train(mode))
        model(images)
        assert held(model) == before
        with pytest.raises(RuntimeError):
            model(images[:, :2])
        assert held(model) == before


@each
def test_copies_and_checkpointing(kind):
    model, images = small(kind)
    tpbook.prune(model, "dynamicvit")
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for copied in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        copied.keep_ratio = 0.5
        assert model.keep_ratio == 0.7 and copied.pruning.ratios != model.pruning.ratios
        copied.keep_ratio = 0.7
        assert torch.equal(copied(images), model(images)) and list(copied.state_dict()) == list(model.state_dict())

    def gradients(model):
        model.zero_grad()
        torch.manual_seed(1)
        model(images).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients(model.train())
    model.set_grad_checkpointing()
    again = gradients(model)
    assert len(plain) == len(list(model.parameters())) and all(torch.equal(a, b) for a, b in zip(plain, again))


@each
def test_compiled_whole_it_says_the_same(kind):
    model, images = small(kind, depths=(1, 1, 3, 1))
    lively(tpbook.prune(model, "dynamicvit"))
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(images), model(images), atol=1e-6, rtol=0)


def test_a_wrapped_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.TimmWrapperConfig(
        architecture="swin_tiny_patch4_window7_224", num_labels=10, model_args={"embed_dim": 24}
    )  # fmt: skip
    model = transformers.TimmWrapperForImageClassification(config).eval()
    with torch.no_grad(), tpbook.trace(tpbook.prune(model, "dynamicvit")) as t:
        model(torch.randn(2, 3, 224, 224))
    assert [k.shape[1] for k in t.kept] == [137, 98, 58] and t.features.shape == (2, 49, 192)
    assert flops.count(model) == flops.closed_form(model)


@each
def test_what_is_new_learns_faster(kind):
    model, _ = small(kind)
    old = {name for name, _ in model.named_parameters()}
    tpbook.prune(model, "dynamicvit")
    groups = optimizer_of(make({"weight_decay": 0.1}), model).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    learned = {names[id(p)] for group in groups if group["learned"] for p in group["params"]}
    assert learned == set(names.values()) - old
    assert all(p.ndim > 1 for group in groups if group["weight_decay"] for p in group["params"])


# ---- the cost


BARS = [  # GMACs of the official code, by fvcore without LayerNorm, and millions of parameters
    ("swin_tiny_patch4_window7_224", 0.7, "4.04", "29.76"), ("swin_small_patch4_window7_224", 0.7, "6.85", "52.71"),
    ("swin_base_patch4_window7_224", 0.7, "12.07", "93.27"), ("convnext_tiny", 0.7, "3.58", "30.50"),
    ("convnext_small", 0.7, "5.77", "54.52"), ("convnext_base", 0.7, "10.18", "96.22"),
    ("convnext_tiny", 0.9, "3.91", "30.50"), ("convnext_small", 0.9, "6.76", "54.52"),
    ("convnext_base", 0.9, "11.93", "96.22"),
]  # fmt: skip


@pytest.mark.parametrize("name, ratio, macs, millions", BARS)
def test_cost_is_the_official_one(name, ratio, macs, millions):
    model = tpbook.prune(timm.create_model(name, device="meta"), "dynamicvit", keep_ratio=ratio)
    assert f"{flops.closed_form(model).total / 1e9:.2f}" == macs
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}" == millions


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convnext_tiny"])
def test_counters_agree_at_full_size(name):
    model = tpbook.prune(timm.create_model(name), "dynamicvit", keep_ratio=0.7)
    assert flops.count(model) == flops.closed_form(model)


@each
def test_counters_agree(kind):
    model, _ = small(kind)
    dense = flops.closed_form(model)
    assert flops.count(model) == dense and len(dense.by_block) == sum(DEPTHS)
    assert flops.count(model, (64, 128)) == flops.closed_form(model, (64, 128))
    tpbook.prune(model, "dynamicvit", keep_ratio=0.7)
    pruned = flops.closed_form(model)
    assert flops.count(model) == pruned and (pruned.embed, pruned.head) == (dense.embed, dense.head)
    c, predictor = DIMS[2], N * (32 * 32 + 32 * 16 + 16 * 8 + 8 * 2)
    kept = [N, 89, 64, 38, 38, 38]
    for i in range(6):
        saved = dense.by_block[3 + i] - pruned.by_block[3 + i]
        assert saved == (N - kept[i]) * (8 * c**2 - c**2) - predictor * (i in (1, 2, 3))
    model.keep_ratio = (1, 0.5, 1)
    assert flops.count(model) == flops.closed_form(model)


def test_counters_agree_where_windows_do_not_fit():
    """A dense Swin fills its maps up to whole windows."""
    model = swin(img_size=(72, 104), depths=(2, 2, 2, 2))
    assert flops.count(model) == flops.closed_form(model)


# ---- refusals


@each
@pytest.mark.parametrize("method", sorted(set(tpbook.METHODS) - {"dynamicvit"}))
def test_other_methods_are_refused(kind, method):
    model, _ = small(kind)
    before = {name: type(m) for name, m in model.named_modules()}
    with pytest.raises(ValueError, match=f"method must be one of dynamicvit, .*got {method!r}"):
        tpbook.prune(model, method)
    assert before == {name: type(m) for name, m in model.named_modules()}


@each
def test_bad_arguments(kind):
    model, _ = small(kind)
    keys = list(model.state_dict())
    for ratio in (0.4, 0.1):
        with pytest.raises(ValueError, match=f"keep_ratio must be above 0.4 for 3 decisions.*got {ratio}"):
            tpbook.prune(model, "dynamicvit", keep_ratio=ratio)
    with pytest.raises(ValueError, match="keep_ratio must be one number or one for each of 3"):
        tpbook.prune(model, "dynamicvit", keep_ratio=(0.5, 0.5))
    with pytest.raises(ValueError, match="at must hold indices from 0 to 5, got 6"):
        tpbook.prune(model, "dynamicvit", at=(5, 6))
    with pytest.raises(ValueError, match="with its own score.*got 'dynamicvit' with score='random'"):
        tpbook.prune(model, "dynamicvit", score="random")
    with pytest.raises(ValueError, match="128 patch tokens"):
        tpbook.prune(model, "dynamicvit", keep=129)
    assert list(model.state_dict()) == keys and not hasattr(model, "_plan")
    tpbook.prune(model, "dynamicvit")
    with pytest.raises(ValueError, match="keep_ratio must be above 0.4"):
        model.keep_ratio = 0.3
    assert model.keep_ratio == 0.7
    tpbook.prune(tpbook.unprune(model), "dynamicvit", at=(2, 4), keep_ratio=0.3)


def test_windows_must_fit():
    with pytest.raises(ValueError, match="windows of 4 × 4 fit, got one of 9 × 16"):
        tpbook.prune(swin(img_size=(72, 128)), "dynamicvit")
    model = tpbook.prune(swin(dynamic_img_size=True), "dynamicvit").eval()
    assert model(torch.randn(1, 3, 32, 64)).shape == (1, 10)
    for mode in (True, False):
        with pytest.raises(ValueError, match="windows of 4 × 4 fit, got one of 8 × 18"):
            model.train(mode)(torch.randn(1, 3, 64, 144))


def test_models_that_have_no_fast_path():
    for kwargs in ({"use_grn": True}, {"conv_mlp": True}):
        with pytest.raises(ValueError, match=r"blocks\[0\] must have an MLP that takes each position by itself"):
            tpbook.prune(convnext(**kwargs), "dynamicvit")
    with pytest.raises(TypeError, match="head_norm_first=False"):
        tpbook.prune(convnext(head_norm_first=True), "dynamicvit")
    with pytest.raises(TypeError, match="has 2 stages, and it is the third"):
        tpbook.prune(swin(depths=(1, 1), num_heads=(1, 2)), "dynamicvit")


@each
def test_a_checkpoint_of_another_size_is_named(loaded, kind, tmp_path):
    loaded(kind)
    build = KINDS[kind][0]
    wider = {"swin": {"window_size": 8}, "convnext": {"kernel_sizes": 5}}[kind]
    with pytest.raises(ValueError, match="has other shapes in .*(bias_table|conv_dw)"):
        tpbook.load_checkpoint(tpbook.prune(build(**wider), "dynamicvit"), tmp_path / "official.pth")
    with pytest.raises(ValueError, match="has unexpected .*score_predictor"):
        tpbook.load_checkpoint(build(), tmp_path / "official.pth")
    shallow = build(depths=(1, 2, 5, 1))
    with pytest.raises(ValueError, match="has unexpected"):
        tpbook.load_checkpoint(tpbook.prune(shallow, "dynamicvit"), tmp_path / "official.pth")
