"""T2T-ViT and PS-ViT: stems against references of a few lines, official keys, printed sizes and costs, bad sizes."""

import math

import pytest
import torch
import torch.nn.functional as F
from builders import BUILDERS, COUNTED

import tpbook
from tpbook import flops
from tpbook.backbones import PSViT, T2TViT
from tpbook.backbones.ps_vit import sample
from tpbook.backbones.t2t_vit import Performer, Transformer, random_attention, sinusoids, soft_split
from tpbook.families import family_of

NAMES = ("t2t_performer", "t2t_transformer", "ps_vit")
every_model = pytest.mark.parametrize("name", NAMES)
SMALL = {"depth": 3, "num_heads": 2, "num_classes": 10}


def small(cls, *args, **kwargs):
    """A new model with the weights that its constructor gives."""
    torch.manual_seed(0)
    own = {"embed_dim": 64, "iterations": 1, "stem_width": 64} if cls is PSViT else {"embed_dim": 32, "token_dim": 8}
    return cls(*args, **{**SMALL, **own, **kwargs}).eval()


# ---- the stem of T2T-ViT


def windows(x, kernel, stride, pad):
    """The soft split, window by window: (c, h, w) → a list of rows, c outermost."""
    c, h, w = x.shape
    rows = []
    for top in range(-pad, h - kernel + pad + 1, stride):
        for left in range(-pad, w - kernel + pad + 1, stride):
            row = []
            for channel in range(c):
                for i in range(top, top + kernel):
                    for j in range(left, left + kernel):
                        row.append(x[channel, i, j].item() if 0 <= i < h and 0 <= j < w else 0.0)
            rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize("kernel, stride, pad", [(7, 4, 2), (3, 2, 1)])
def test_soft_split_is_a_window_a_token(kernel, stride, pad):
    x = torch.randn(2, 3, 8, 12)
    got = soft_split(x, kernel, stride)
    assert got.shape == (2, (8 // stride) * (12 // stride), 3 * kernel * kernel)
    for one, tokens in zip(x, got):
        assert torch.equal(tokens, windows(one, kernel, stride, pad))


def test_tokens_to_token_are_three_splits_of_maps_in_their_order():
    stem = small(T2TViT, (32, 48)).tokens_to_token
    image = torch.randn(1, 3, 32, 48)
    x = stem.attention1(windows(image[0], 7, 4, 2).unsqueeze(0))  # (1, 8 · 12, 8)
    x = stem.attention2(windows(x[0].T.reshape(8, 8, 12), 3, 2, 1).unsqueeze(0))  # (1, 4 · 6, 8)
    x = stem.project(windows(x[0].T.reshape(8, 4, 6), 3, 2, 1))  # (2 · 3, C)
    torch.testing.assert_close(stem(image)[0], x)


def test_performer_is_its_sum_token_by_token():
    q, k, v, w = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.randn(4, 8)

    def phi(x):
        return [math.exp(sum(a * b for a, b in zip(row, x)) - sum(a * a for a in x) / 2) / 2 for row in w.tolist()]

    for b in range(2):
        keys, queries = [phi(x) for x in k[b].tolist()], [phi(x) for x in q[b].tolist()]
        for i, query in enumerate(queries):
            like = [sum(a * c for a, c in zip(query, key)) for key in keys]  # φ(q_i)·φ(k_j)
            want = sum(weight * row for weight, row in zip(like, v[b])) / (sum(like) + 1e-8)
            torch.testing.assert_close(random_attention(q, k, v, w)[b, i], want, atol=1e-5, rtol=1e-4)


def test_performers_estimate_softmax_attention_and_their_directions_are_orthogonal():
    x, v = 0.3 * torch.randn(2, 1, 6, 4).unbind(0)[0], torch.randn(1, 6, 4)
    want = torch.softmax(x @ x.transpose(1, 2), dim=-1) @ v
    got = random_attention(x, x, v, torch.randn(200_000, 4))
    torch.testing.assert_close(got, want, atol=0.02, rtol=0)
    w = Performer(12, 8).w
    assert not w.requires_grad
    torch.testing.assert_close(w @ w.T, 4 * torch.eye(4), atol=1e-5, rtol=0)


def test_layers_of_the_stem_add_to_their_values():
    x = torch.randn(1, 5, 12)
    performer, transformer = Performer(12, 8).eval(), Transformer(12, 8).eval()
    with torch.no_grad():
        for layer in (performer, transformer):
            for p in layer.parameters():
                p.normal_(std=0.3) if p.requires_grad else None
        k, q, v = performer.kqv(performer.norm1(x)).split(8, dim=-1)  # keys first
        y = v + performer.proj(random_attention(q, k, v, performer.w))
        torch.testing.assert_close(performer(x), y + performer.mlp(performer.norm2(y)))
        q, k, v = transformer.attn.qkv(transformer.norm1(x)).split(8, dim=-1)
        weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(12), dim=-1)  # of the 12 channels that came in
        y = v + transformer.attn.proj(weights @ v)
        torch.testing.assert_close(transformer(x), y + transformer.mlp(transformer.norm2(y)))


@every_model
def test_norms_have_the_official_epsilon(name):
    norms = [module for module in BUILDERS[name]()[0].modules() if isinstance(module, torch.nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-5} and len(norms) >= 7


def test_performers_drop_out_in_training():
    layer, x = Performer(12, 8), torch.randn(1, 5, 12)
    assert {module.p for module in layer.modules() if isinstance(module, torch.nn.Dropout)} == {0.1}
    assert not torch.equal(layer(x), layer(x)) and torch.equal(layer.eval()(x), layer(x))


def test_positions_are_sinusoids_and_stay():
    model = small(T2TViT, 32)
    for p in range(5):
        for c in range(32):
            angle = p / 10000 ** (2 * (c // 2) / 32)
            assert model.pos_embed[0, p, c].item() == pytest.approx((math.cos if c % 2 else math.sin)(angle), abs=1e-6)
    assert sinusoids(2, 5).shape == (1, 2, 5)
    model.set_input_size(64)
    assert model.pos_embed.shape == (1, 17, 32)
    model.train()(torch.randn(2, 3, 64, 64)).sum().backward()
    frozen = {name for name, p in model.named_parameters() if p.grad is None}
    assert frozen == {"pos_embed", "tokens_to_token.attention1.w", "tokens_to_token.attention2.w"}


def test_t2t_takes_any_size_where_it_is_dynamic():
    fixed, dynamic = small(T2TViT, 32), small(T2TViT, 32, dynamic_img_size=True)
    images = torch.randn(2, 3, 48, 32)
    fixed.set_input_size((48, 32))
    torch.testing.assert_close(dynamic(images), fixed(images))
    assert flops.closed_form(dynamic, (48, 32)) == flops.count(fixed) == flops.closed_form(fixed)
    with pytest.raises(AssertionError, match="a multiple of 16 pixels, got 40"):
        dynamic(images[:, :, :40])


# ---- the sampler of PS-ViT


def bilinear(x, row, column):
    """(C, h, w) at a place, by hand; 0 outside."""
    c, h, w = x.shape
    total = torch.zeros(c)
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < h and 0 <= j < w:
                total += (1 - abs(row - i)) * (1 - abs(column - j)) * x[:, i, j]
    return total


def test_sampling_is_bilinear_and_zero_outside():
    places = [(0.0, 0.0), (1.25, 2.5), (3.0, 5.9), (-0.75, 1.0), (2.5, 6.4), (-3.0, 1.0), (0.5, 99.0), (4.0, 6.0)]
    x = torch.randn(2, 3, 5, 7)
    got = sample(x, torch.tensor(places).expand(2, -1, -1))
    for one, tokens in zip(x, got):
        want = torch.stack([bilinear(one, *place) for place in places])
        torch.testing.assert_close(tokens, want, atol=1e-5, rtol=0)


def test_points_begin_at_the_centres_and_go_column_by_column():
    model = small(PSViT, (32, 24), points=(4, 3))  # a map of 8 × 6 cells, points 2 apart
    want = [[2.0 * i + 1, 2.0 * j + 1] for j in range(3) for i in range(4)]
    assert model.point_coord.tolist() == [want]
    official = tpbook.create_model("ps_vit_ti_14").point_coord
    assert official[0, :2].tolist() == [[2, 2], [6, 2]] and official[0, -1].tolist() == [54, 54]


@torch.no_grad()
def test_iterations_sample_where_the_one_before_says():
    model, images = BUILDERS["ps_vit"]()
    got = model._pos_embed(images)
    feature_map, (one, two), pos = model.stem(images), model.ps_layers, model.pos_layer
    rows, columns = feature_map.shape[-2:]
    assert (rows, columns) == (16, 20)
    for b, fmap in enumerate(feature_map):
        place = model.point_coord[0]
        at = torch.stack([bilinear(fmap, *p) for p in place.tolist()])
        x = one.transformer_layer((at + pos(place / torch.tensor([rows, columns])))[None])[0]
        place = place + one.offset_layer(x)
        assert (place - model.point_coord[0]).abs().max() > 1  # they move
        at = torch.stack([bilinear(fmap, *p) for p in place.tolist()])
        x = two.transformer_layer((at + pos(place / torch.tensor([rows, columns])) + x)[None])[0]
        want = torch.cat([model.cls_token[0], x.reshape(5, 4, -1).transpose(0, 1).flatten(0, 1)])
        torch.testing.assert_close(got[b], want, atol=1e-4, rtol=1e-4)


def test_tokens_are_row_by_row():
    model = small(PSViT, (32, 24), points=(4, 3))
    model.ps_layers[0].transformer_layer = torch.nn.Identity()
    torch.nn.init.zeros_(model.pos_layer.weight)
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(6.0), indexing="ij")
    model.stem = torch.nn.Identity()
    feature_map = torch.stack([rows, columns] + 62 * [rows])[None]  # each cell says where it is
    tokens = model._pos_embed(feature_map)[0, 1:, :2]
    assert tokens.tolist() == [[2.0 * i + 1, 2.0 * j + 1] for i in range(4) for j in range(3)]


def test_offsets_learn_by_what_is_sampled_alone():
    def gradient(feature_map):
        model = small(PSViT, 32, points=2, depth=4, iterations=3)  # at 2 and 6 of 8 cells
        model.stem = torch.nn.Identity()
        model._pos_embed(feature_map).square().sum().backward()
        assert model.ps_layers[-1].offset_layer is None
        return [layer.offset_layer.weight.grad.abs().max() for layer in model.ps_layers[:-1]]

    torch.manual_seed(0)
    assert min(gradient(torch.randn(1, 64, 8, 8))) > 1e-4
    assert max(gradient(torch.ones(1, 64, 8, 8))) < 1e-6  # the map is flat, though the position is not


def test_new_points_do_not_move_and_drop_path_grows_along_all_layers():
    model = small(PSViT, 32, points=4, depth=5, iterations=2, drop_path_rate=0.4)
    layers = [layer.transformer_layer for layer in model.ps_layers] + list(model.blocks)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in layers]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert not any(p.any() for p in model.ps_layers[0].offset_layer.parameters())
    model.init_weights()
    assert not any(p.any() for p in model.ps_layers[0].offset_layer.parameters())


# ---- official weights

BLOCK = (
    "norm1.weight norm1.bias attn.qkv.weight attn.proj.weight attn.proj.bias norm2.weight norm2.bias mlp.fc1.weight "
    "mlp.fc1.bias mlp.fc2.weight mlp.fc2.bias"
).split()
PERFORMER = (
    "w kqv.weight kqv.bias proj.weight proj.bias norm1.weight norm1.bias norm2.weight norm2.bias mlp.0.weight "
    "mlp.0.bias mlp.2.weight mlp.2.bias"
).split()
BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
CONVS = [f"conv{i}.weight" for i in (1, 2, 3)] + [f"bn{i}.{key}" for i in (1, 2, 3) for key in BN]
SHORTCUT = ["downsample.0.weight", *(f"downsample.1.{key}" for key in BN)]


def keys_of(name):
    """The keys of the official code's models, as its modules are called and registered."""
    head = ["norm.weight", "norm.bias", "head.weight", "head.bias", "cls_token"]
    if name.startswith("t2t"):
        layer = BLOCK if "_t_" in name else PERFORMER
        stem = [f"attention{i}.{key}" for i in (1, 2) for key in layer] + ["project.weight", "project.bias"]
        return {*head, "pos_embed", *(f"tokens_to_token.{key}" for key in stem)} | blocks("blocks", 14)
    iterations = {f"ps_layers.{i}.position_layer.{key}" for i in range(4) for key in ("weight", "bias")}
    iterations |= {f"ps_layers.{i}.offset_layer.{key}" for i in range(3) for key in ("weight", "bias")}
    iterations |= {f"ps_layers.{i}.transformer_layer.{key}" for i in range(4) for key in BLOCK}
    stem = {"stem.0.weight", *(f"stem.1.{key}" for key in BN)} | {f"stem.{i}.{key}" for i in (4, 5) for key in CONVS}
    stem |= {f"stem.4.{key}" for key in SHORTCUT} | {f"stem.5.{key}" for key in SHORTCUT if name == "ps_vit_b_14"}
    own = {*head, "point_coord", "pos_layer.weight", "pos_layer.bias"}
    return own | stem | iterations | blocks("trans_layers", 10 if name == "ps_vit_b_14" else 8)


def blocks(name, depth):
    return {f"{name}.{i}.{key}" for i in range(depth) for key in BLOCK}


@pytest.mark.parametrize("name", ["t2t_vit_14", "t2t_vit_t_14", "ps_vit_b_14", "ps_vit_ti_14"])
def test_official_state_dicts_fit_as_they_are(name, tmp_path):
    with torch.device("meta"):
        model = tpbook.create_model(name)
    state = model.state_dict()
    assert set(state) == keys_of(name)
    shapes = {
        "t2t_vit_14": {
            "tokens_to_token.attention1.kqv.weight": (192, 147), "tokens_to_token.attention2.kqv.weight": (192, 576),
            "tokens_to_token.attention2.w": (32, 64), "tokens_to_token.project.weight": (384, 576),
            "pos_embed": (1, 197, 384), "blocks.13.mlp.fc1.weight": (1152, 384),
        },
        "t2t_vit_t_14": {
            "tokens_to_token.attention1.attn.qkv.weight": (192, 147),
            "tokens_to_token.attention2.mlp.fc1.weight": (64, 64),
        },
        "ps_vit_b_14": {
            "stem.0.weight": (64, 3, 7, 7), "stem.4.conv3.weight": (256, 64, 1, 1),
            "stem.5.conv1.weight": (64, 256, 1, 1), "stem.5.downsample.0.weight": (384, 256, 1, 1),
            "pos_layer.weight": (384, 2), "ps_layers.0.offset_layer.weight": (2, 384), "point_coord": (1, 196, 2),
        },
        "ps_vit_ti_14": {"stem.4.conv3.weight": (192, 64, 1, 1), "trans_layers.0.attn.qkv.weight": (576, 192)},
    }[name]  # fmt: skip
    assert {key: tuple(state[key].shape) for key in shapes} == shapes


@pytest.mark.parametrize("name, key", [*zip(NAMES, ("state_dict_ema", "state_dict", "model"))])  # T2T-ViT's the first
def test_checkpoints_load_strictly(name, key, tmp_path):
    model, images = BUILDERS[name]()
    want = model(images)
    torch.save({key: model.state_dict(), "epoch": 1}, tmp_path / "official.pth")
    other = BUILDERS[name]()[0]
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert torch.equal(tpbook.load_checkpoint(other, tmp_path / "official.pth")(images), want)
    state = model.state_dict()
    state["nobodys"] = state.pop("norm.weight")
    torch.save(state, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match="misses 1 keys: norm.weight; has unexpected 1 keys: nobodys"):
        tpbook.load_checkpoint(other, tmp_path / "wrong.pth")


def test_weights_that_share_a_layer_are_saved_and_come_back(tmp_path):
    from tpbook.training.checkpoints import save_weights

    model, images = BUILDERS["ps_vit"]()
    save_weights(model, tmp_path / "model.safetensors")
    assert model.ps_layers[0].position_layer is model.ps_layers[1].position_layer is model.pos_layer
    other = small(PSViT, (64, 80), points=(4, 5), depth=5, iterations=2)
    assert torch.equal(tpbook.load_checkpoint(other, tmp_path / "model.safetensors")(images), model(images))


def test_checkpoints_of_another_size_are_named_and_nothing_is_touched(tmp_path):
    for cls, said in ((T2TViT, r"pos_embed \(1, 5, 32\) for \(1, 17, 32\)"), (PSViT, "point_coord must be that of")):
        torch.save(small(cls, 32).state_dict(), tmp_path / "small.pth")
        model = small(cls, 64)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with torch.no_grad():
            model.head.weight.add_(1)
        with pytest.raises(ValueError, match=said):
            tpbook.load_checkpoint(model, tmp_path / "small.pth")
        before["head.weight"] += 1
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name, size", [("t2t_vit_7", 64), ("ps_vit_ti_14", 112)])
def test_load_backbone_fits_a_file_to_another_size(name, size, tmp_path, monkeypatch):
    from tpbook.training.checkpoints import save_weights

    made = tpbook.create_model(name)
    save_weights(made, tmp_path / f"{name}.safetensors")
    monkeypatch.setenv("TPBOOK_WEIGHTS", str(tmp_path))
    model, images = tpbook.load_backbone(name, img_size=size, num_classes=1000), torch.randn(1, 3, size, size)
    made.eval().set_input_size(size)
    torch.testing.assert_close(model(images), made(images), atol=1e-5, rtol=1e-4)
    assert tpbook.load_backbone(name, num_classes=7).head.weight.shape[0] == 7


@pytest.mark.parametrize("name", ["t2t_performer", "ps_vit"])
@pytest.mark.parametrize("fused", [True, False])
def test_qk_scale_is_what_the_logits_are_multiplied_by(name, fused):
    """The two models that one official file is: head_dim^-½ unless said otherwise, or embed_dim^-½."""
    own, images = BUILDERS[name]()
    width = own.embed_dim
    if name == "ps_vit":
        kwargs = {"points": (4, 5), "embed_dim": 64, "depth": 5, "iterations": 2, "stem_width": 64}
        scaled = PSViT((64, 80), **{**SMALL, **kwargs}, qk_scale=width**-0.5)
    else:
        scaled = T2TViT((64, 80), **SMALL, embed_dim=width, token_dim=8, qk_scale=width**-0.5)
    scaled.load_state_dict(own.state_dict(), strict=True)
    want, seen = own(images), [*own.blocks, *(layer.transformer_layer for layer in getattr(own, "ps_layers", ()))]
    assert not torch.allclose(scaled.eval()(images), want, atol=1e-3)
    with torch.no_grad():
        for block in seen:  # the same by the weights: q · √(head_dim / embed_dim)
            block.attn.qkv.weight[:width] *= math.sqrt(block.attn.head_dim / width)
            block.attn.fused_attn = fused
    torch.testing.assert_close(scaled(images), own(images), atol=2e-5, rtol=1e-5)


# ---- what is printed

PRINTED = {  # name → millions of parameters, GMACs, as the READMEs of the official code print them
    "t2t_vit_7": ("4.3", "1.1"), "t2t_vit_10": ("5.9", "1.5"), "t2t_vit_12": ("6.9", "1.8"),
    "t2t_vit_14": ("21.5", "4.8"), "t2t_vit_19": ("39.2", "8.5"), "t2t_vit_t_14": ("21.5", "6.1"),
    "t2t_vit_t_19": ("39.2", "9.8"), "t2t_vit_t_24": ("64.1", "15.0"), "ps_vit_ti_14": ("4.8", "1.6"),
    "ps_vit_b_10": ("21.3", "3.1"), "ps_vit_b_14": ("21.3", "5.4"),
    # not to the digit:
    "t2t_vit_24": ("64.1", "13.7"),  # printed 13.8, while T2T-ViT_t-24, whose stem costs 1.3 more, is printed 15.0
    "ps_vit_b_18": ("21.3", "8.7"),  # printed 8.8: its counter takes five a value of every norm, 0.05 here
}  # fmt: skip


def rounded(model):
    params, cost = sum(p.numel() for p in model.parameters()), flops.closed_form(model)
    return f"{params / 1e6:.1f}", f"{cost.total / 1e9:.1f}"


@pytest.mark.parametrize("name", PRINTED)
def test_sizes_and_costs_are_those_that_are_printed(name):
    with torch.device("meta"):
        model = tpbook.create_model(name)
    assert rounded(model) == PRINTED[name]
    assert model.pretrained_cfg["input_size"] == (3, 224, 224) and model.pretrained_cfg["crop_pct"] == 0.9


@pytest.mark.parametrize("name", ["t2t_vit_7", "ps_vit_ti_14"])
def test_cost_of_a_whole_model_counted(name):
    model = tpbook.prune(tpbook.create_model(name), "dtps")
    assert flops.count(model) == flops.closed_form(model)


def test_ps_vit_b_14_pruned_costs_what_tps_prints():
    with torch.device("meta"):
        model = tpbook.prune(tpbook.create_model("ps_vit_b_14"), "dtps", at=(0, 2, 5), keep_ratio=0.7)
    assert rounded(model)[1] == "3.7"
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}" == "22.07"
    tpbook.unprune(model)
    tpbook.prune(model, "dtps", at=(2, 5, 8), keep_ratio=0.5)
    assert rounded(model)[1] == "3.7"


def test_t2t_vit_14_pruned():
    with torch.device("meta"):
        model = tpbook.prune(tpbook.create_model("t2t_vit_14"), "dtps", keep_ratio=0.7)
    assert model.pruning.at == (3, 7, 10)
    t, c = [197, 138, 97, 68], 384  # tokens in each stretch of blocks; ⌊196 · 0.7^s⌋ and the class token
    dense = {n: n * 10 * c * c + 2 * n * n * c for n in t}
    squeezing = [a - 1 for a in t[:-1]]  # patch tokens that are scored and squeezed
    own = sum(dense[t[s]] * k for s, k in enumerate((3, 4, 3, 4)))
    predictors = sum(n * (c * c + c * c // 2 + c * c // 8 + c // 2) for n in squeezing)
    got = flops.closed_form(model)
    assert got.embed == 298_973_696
    left = got.total - got.embed - got.head - own - predictors
    assert 0 < left < 0.01e9  # comparing the pruned with the kept


# ---- every method, and what is refused


@every_model
@pytest.mark.parametrize("method", COUNTED)
def test_every_method_works_and_keeps_all_at_one(name, method):
    model, images = BUILDERS[name]()
    dense = model(images)
    tpbook.prune(model, method, at=(1, 2), keep_ratio=1.0)
    parts = model.pruning.method
    assert torch.equal(model(images), dense) is not parts.chooses.varies  # which samples at ρ = 1 too
    model.keep_ratio = 0.6
    with tpbook.trace(model) as t:
        assert model(images).shape == dense.shape
    counts = model.pruning.counts(20)
    if parts.chooses.varies:
        assert all(1 <= kept.shape[1] <= count.kept for kept, count in zip(t.kept, counts, strict=True))
    else:
        assert [kept.shape[1] for kept in t.kept] == [count.leave for count in counts]
    assert counts[1].leave < 12 or parts.reduce.rejoins and counts[1].leave == 12
    assert t.grid == (4, 5)
    assert tpbook.to_grid(t.features, t, "zero").shape == (2, model.embed_dim, 4, 5)
    assert torch.equal(tpbook.unprune(model)(images), dense)


@every_model
def test_heads_masks_and_features(name):
    model, images = BUILDERS[name]()
    assert family_of(model).name == ("PS-ViT" if name == "ps_vit" else "T2T-ViT")
    maps = model.forward_intermediates(images, intermediates_only=True)
    assert [tuple(fmap.shape) for fmap in maps] == 3 * [(2, model.embed_dim, 4, 5)]
    model.reset_classifier(7)
    assert model(images).shape == (2, 7)
    tpbook.mask(model, 0.5, when="always", seed=0)
    assert flops.count(model) == flops.closed_form(model)
    assert tpbook.unmask(model)(images).shape == (2, 7)
    tpbook.prune(model, "etps", at=(1, 2))
    model.reset_classifier(0)
    assert model(images).shape == (2, model.embed_dim)


@pytest.mark.parametrize("kwargs, named", [
    ({"img_size": 40}, "img_size must be one or two multiples of 16, got 40"),
    ({"img_size": (32, 0)}, r"img_size .* got \(32, 0\)"),
    ({"patch_size": 8}, "patch_size must be 16"),
    ({"tokens_type": "convolution"}, "tokens_type must be one of performer, transformer, got 'convolution'"),
    ({"qk_scale": 0.0}, "qk_scale must be above 0"),
    ({"qk_scale": 0.1, "qk_norm": True}, "qk_scale must be None where qk_norm"),
    ({"dynamic_img_size": True, "dynamic_img_pad": True}, "dynamic_img_pad"),
])  # fmt: skip
def test_t2t_names_what_it_cannot_be(kwargs, named):
    with pytest.raises(ValueError, match=named):
        T2TViT(**{**SMALL, "embed_dim": 32, "img_size": 32, **kwargs})


@pytest.mark.parametrize("kwargs, named", [
    ({"img_size": 30}, "img_size must be one or two multiples of 4, got 30"),
    ({"iterations": 0}, "iterations must lie from 1 to depth - 1 = 2, got 0"),
    ({"iterations": 3}, "iterations .* got 3"),
    ({"embed_dim": 96}, "embed_dim must be a multiple of 64.* got 96"),
    ({"points": 0}, r"points must be .* got \(0, 0\)"),
    ({"dynamic_img_size": True}, "dynamic_img_size must be False"),
])  # fmt: skip
def test_ps_vit_names_what_it_cannot_be(kwargs, named):
    with pytest.raises(ValueError, match=named):
        PSViT(**{**SMALL, "embed_dim": 64, "img_size": 32, "iterations": 1, **kwargs})


@every_model
def test_images_and_sizes_that_do_not_fit_are_named(name):
    model, images = BUILDERS[name]()
    with pytest.raises(AssertionError, match="a side of the images must be 80 pixels, got 64"):
        model(images[..., :64])
    step = 4 if name == "ps_vit" else 16
    with pytest.raises(ValueError, match=f"multiples of {step}, got 70"):
        model.set_input_size(70)
    with pytest.raises(ValueError, match=f"patch_size must stay {step}"):
        model.set_input_size(64, 32)
    with pytest.raises(ValueError, match="image_size must be one or two multiples of the patch size"):
        flops.closed_form(model, 70)


def test_ps_vit_of_another_size_has_as_many_points_over_all_of_the_map():
    model = small(PSViT, 32, points=4)
    images = torch.randn(1, 3, 64, 48)
    state = {key: value for key, value in model.state_dict().items() if key != "point_coord"}
    other = small(PSViT, (64, 48), points=4)
    assert other.load_state_dict(state, strict=False).missing_keys == ["point_coord"]
    assert flops.count(model, (64, 48)) == flops.closed_form(model, (64, 48)) == flops.closed_form(other)
    model.set_input_size((64, 48))
    assert model.point_coord[0, -1].tolist() == [14, 10.5]
    torch.testing.assert_close(model(images), other(images))
    pooled = F.adaptive_avg_pool2d(model.stem(images), 1)
    assert model.stem(images).shape == (1, 64, 16, 12) and pooled.isfinite().all()
