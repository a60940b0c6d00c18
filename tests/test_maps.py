"""PVT and CvT: pruned positions are zeros where an operator needs the map.

The reference knows nothing of the engine: it runs the library's own modules at full length on maps whose removed
positions it zeroes, and reads the kept patches from the trace.
"""

import pytest
import timm
import torch
import torch.nn.functional as F
from builders import answer, lively
from transformers import CvtConfig, CvtForImageClassification, PvtConfig, PvtForImageClassification

import tpbook
from tpbook import flops, losses
from tpbook.families import family_of
from tpbook.methods import dynamicvit
from tpbook.timing.bound import sliced

FOUR, TWO = [(16, 16), (8, 8), (4, 4), (2, 2)], [(16, 16), (8, 8)]
GRIDS = {"pvt_v2": FOUR, "pvt": FOUR, "cvt": TWO}


def build(name):
    """A small random model in eval mode, and two images of 64 × 64."""
    torch.manual_seed(0)
    four = {"depths": (2, 1, 1, 2), "num_heads": (1, 2, 2, 4), "mlp_ratios": (2, 2, 2, 2)}
    if name == "pvt_v2":
        model = timm.create_model("pvt_v2_b0", embed_dims=(16, 24, 32, 48), num_classes=10, **four)
    elif name == "pvt":
        model = PvtForImageClassification(PvtConfig(
            image_size=64, num_labels=10, hidden_sizes=[16, 24, 32, 48], depths=list(four["depths"]),
            mlp_ratios=[2] * 4, num_attention_heads=list(four["num_heads"]),
        ))  # fmt: skip
    else:
        two = {key: getattr(CvtConfig(), key)[:1] * 2 for key in (
            "attention_drop_rate", "drop_rate", "drop_path_rate", "kernel_qkv", "padding_kv", "padding_q", "qkv_bias",
            "qkv_projection_method", "stride_kv", "stride_q")}  # fmt: skip
        model = CvtForImageClassification(CvtConfig(
            depth=[2, 3], embed_dim=[16, 32], num_heads=[1, 2], mlp_ratio=[2.0, 2.0], cls_token=[False, True],
            patch_sizes=[7, 3], patch_stride=[4, 2], patch_padding=[2, 1], num_labels=10, **two,
        ))  # fmt: skip
    model, images = lively(model, (64, 64))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model, images


def pruned(model, method, **options):
    """Pruned, with predictors that tell tokens apart."""
    tpbook.prune(model, method, **options)
    torch.manual_seed(1)
    for p in getattr(model, "score_predictor", torch.nn.Module()).parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model


def traced(model, images):
    with tpbook.trace(model) as t:
        out = answer(model, images)
    return out, t


@pytest.fixture(params=list(GRIDS))
def name(request):
    return request.param


# ---- what a pruned forward computes


def on(mask, x):
    """Zeros where a position is gone: mask (N,), x (1, N, C)."""
    return x * mask[None, :, None]


def through(name, segment, x, grid, kept):
    """The blocks of one map of one image, by the library's modules: (1, P + N, C) and kept (n,) → (1, P + N, C)."""
    mask, prefix = torch.zeros(grid[0] * grid[1]), segment.prefix
    mask[kept] = 1
    everywhere = torch.cat([torch.ones(prefix), mask])
    rows = everywhere.nonzero().flatten()

    def attend(h, run, keys_are_tokens):
        if not keys_are_tokens:
            return run(on(everywhere, h), grid)
        return torch.zeros_like(h).index_copy(1, rows, run(h[:, rows], (len(rows), 1)))

    for block in segment.blocks:
        if name == "pvt_v2":
            x = x + attend(block.norm1(x), block.attn, block.attn.sr is None)
            hidden = on(mask, block.mlp.fc1(block.norm2(x))).transpose(1, 2).unflatten(2, grid)
            x = x + block.mlp.fc2(block.mlp.act(block.mlp.dwconv(hidden).flatten(2).transpose(1, 2)))
        elif name == "pvt":
            run = block.attention
            x = x + attend(block.layer_norm_1(x), lambda h, g: run(h, *g)[0], run.self.sequences_reduction_ratio == 1)  # noqa: B023
            x = x + block.mlp(block.layer_norm_2(x))
        else:
            x = x + attend(block.layernorm_before(x), lambda h, g: block.attention(h, *g), False)  # noqa: B023
            x = block.output(block.intermediate(block.layernorm_after(x)), x)
        x = on(everywhere, x)
    return x


def reference(name, model, image, kept):
    """The logits of one image, given which patches each map keeps: list of (n,)."""
    family = family_of(model)
    segments, x = family.segments(model), image
    for i, (segment, grid, chosen) in enumerate(zip(segments, GRIDS[name], kept)):
        if name == "pvt_v2":
            x = (model.patch_embed if i == 0 else model.stages[i].downsample)(x).flatten(1, 2)
        elif name == "pvt":
            x = model.pvt.encoder.patch_embeddings[i](x)[0]
        else:
            stage = model.cvt.encoder.stages[i]
            x = stage.embedding(x).flatten(2).transpose(1, 2)
            x = torch.cat([stage.cls_token, x], dim=1) if segment.prefix else x
        x = through(name, segment, x, grid, chosen)
        if name == "pvt_v2":
            mask = torch.zeros(x.shape[1]).index_fill(0, chosen, 1.0)
            x = on(mask, model.stages[i].norm(x))
        if i < len(segments) - 1:
            x = x[:, segment.prefix :].transpose(1, 2).unflatten(2, grid)
    if name == "pvt_v2":
        return model.head(x[:, kept[-1]].mean(1))
    if name == "pvt":
        return model.classifier(model.pvt.encoder.layer_norm(x)[:, 0])
    return model.classifier(model.layernorm(x[:, 0]))


@torch.no_grad()
@pytest.mark.parametrize("ratio", [0.7, 0.3])
def test_removed_positions_are_zeros_in_every_map(name, ratio):
    model, images = build(name)
    pruned(model, "dynamicvit", keep_ratio=ratio)
    logits, t = traced(model, images)
    tpbook.unprune(model)
    assert [k.shape[1] for k in t.kept] == [int(ratio * a * b + 1e-9) for a, b in GRIDS[name]]
    for b in range(2):
        want = reference(name, model, images[b : b + 1], [k[b] for k in t.kept])
        torch.testing.assert_close(logits[b : b + 1], want, atol=2e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("method", ["dynamicvit", "dtps"])
@pytest.mark.parametrize("rejoin", ["zero", "last_seen", "host"])
def test_removing_equals_weighing_by_the_decisions_that_training_draws(name, method, rejoin, monkeypatch):
    if rejoin == "host" and method == "dynamicvit":
        pytest.skip("has no hosts")
    model, images = build(name)
    at = (0, 1, 2) if name == "cvt" else (0, 1, 2, 4)  # two stages on the first map
    pruned(model, method, keep_ratio=0.6, rejoin=rejoin, at=at)
    want, t = traced(model, images)
    counts = iter([k.shape[1] for k in t.kept])

    def best(log_probs, alive):
        score = log_probs[..., dynamicvit.KEEP].masked_fill(alive < 0.5, float("-inf"))
        return torch.zeros_like(alive).scatter(1, score.topk(next(counts)).indices, 1.0)

    monkeypatch.setattr(dynamicvit, "sample", best)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    got, u = traced(model, images)
    assert all(torch.equal(d.nonzero()[:, 1].view(2, -1), k.sort()[0]) for d, k in zip(u.decisions, t.kept))
    torch.testing.assert_close(got, want, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ["random", "dynamicvit", "dtps", "etps", "topk"])
def test_keeping_all_changes_no_bit_and_unprune_gives_the_model_back(name, method):
    if name == "pvt_v2" and method in ("etps", "topk"):
        pytest.skip("has no class token")
    model, images = build(name)
    keys = list(model.state_dict())
    with torch.no_grad():
        want, features = answer(model, images), traced(model, images)[1].features
        tpbook.prune(model, method, keep_ratio=1.0)
        got, t = traced(model, images)
        assert torch.equal(got, want) and torch.equal(t.features, features)
        model.keep_ratio = 0.5
        assert not torch.allclose(answer(model, images), want, atol=1e-4)
        tpbook.unprune(model)
        assert torch.equal(answer(model, images), want)
    assert list(model.state_dict()) == keys
    assert not any("_plan" in module.__dict__ for module in model.modules())


@torch.no_grad()
def test_what_a_position_holds_at_the_end_of_its_map():
    model, images = build("pvt_v2")
    tpbook.prune(model, "dtps", keep_ratio=0.5, at=(0, 1))
    maps = {}
    model.stages[1].downsample.register_forward_pre_hook(lambda m, x: maps.update(now=x[0].flatten(2).transpose(1, 2)))
    ends = {}
    for rejoin in ("zero", "host", "last_seen"):
        tpbook.unprune(model)
        pruned(model, "dtps", keep_ratio=0.5, at=(0, 1), rejoin=rejoin)
        _, t = traced(model, images)
        ends[rejoin] = maps["now"]
    kept, host = t.kept[-1], t.host[-1]
    alive = torch.zeros(2, 256, dtype=torch.bool).scatter(1, kept, True)
    assert alive.sum() == 2 * 64
    assert (ends["zero"][~alive] == 0).all() and (ends["zero"][alive] != 0).any(-1).all()
    for rejoin in ("host", "last_seen"):
        torch.testing.assert_close(ends[rejoin][alive], ends["zero"][alive])
    torch.testing.assert_close(ends["host"], ends["zero"].gather(1, host.unsqueeze(-1).expand(-1, -1, 16)))
    early, late = torch.zeros(2, 256, 16), torch.zeros(2, 256, 16)
    early = early + t.entered[0]
    late.scatter_(1, t.kept[0].unsqueeze(-1).expand(-1, -1, 16), t.entered[1])
    first = torch.zeros(2, 256, dtype=torch.bool).scatter(1, t.kept[0], True)
    seen = model.stages[0].norm(torch.where(first.unsqueeze(-1), late, early))
    torch.testing.assert_close(ends["last_seen"][~alive], seen[~alive], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_the_class_token_of_pvt_hears_what_the_library_reports():
    model, images = build("pvt")
    attention = model(images, output_attentions=True).attentions[4]  # (B, H, T, T), first block of the last map
    tpbook.prune(model, "etps", keep_ratio=0.5)
    assert model.pruning.at == (4,)
    _, t = traced(model, images)
    torch.testing.assert_close(t.scores[0], attention[:, :, 0, 1:].mean(1), atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_class_token_of_cvt_hears_the_key_that_each_place_would_have():
    model, images = build("cvt")
    tpbook.prune(model, "etps", keep_ratio=0.5)
    assert model.pruning.at == (2,)
    entered, norm = [], model.cvt.encoder.stages[1].layers[0].layernorm_before
    hook = norm.register_forward_hook(lambda m, a, y: entered.append(y))
    _, t = traced(model, images)
    hook.remove()
    attn, y = model.cvt.encoder.stages[1].layers[0].attention.attention, entered[0]  # (B, 1 + 64, C)
    part = attn.convolution_projection_key.convolution_projection
    patches = y[:, 1:].transpose(1, 2).unflatten(2, (8, 8))  # (B, C, 8, 8)
    window = F.unfold(patches, 3, padding=1).unflatten(1, (32, 9))  # (B, C, 9, 64)
    convolved = (window * part.convolution.weight.flatten(1)[None, :, :, None]).sum(2)
    key = part.normalization(convolved.unflatten(2, (8, 8)))
    own = attn.projection_key(torch.cat([y[:, :1], key.flatten(2).transpose(1, 2)], 1))  # (B, 1 + 64, C)
    own, query = (z.unflatten(2, (2, 16)).transpose(1, 2) for z in (own, attn.projection_query(y[:, :1])))
    row = (query @ own.transpose(2, 3) * 32**-0.5).softmax(-1)[:, :, 0, 1:].mean(1)
    torch.testing.assert_close(t.scores[0], row, atol=1e-6, rtol=0)
    theirs = attn.convolution_projection_key(patches).unflatten(1, (4, 4))  # where the model has a key, it is that one
    torch.testing.assert_close(key[:, :, ::2, ::2].permute(0, 2, 3, 1), theirs)


# ---- training


@pytest.mark.parametrize("method", ["dynamicvit", "dtps"])
def test_every_map_trains_towards_its_own_share(name, method):
    model, images = build(name)
    teacher, labels = answer(model, images).detach(), torch.tensor([1, 2])
    features = traced(model, images)[1].features.detach()
    tpbook.prune(model, method, keep_ratio=0.6).train()
    torch.manual_seed(0)
    logits, t = traced(model, images)
    assert model.shares(t.decisions) == [0.6] * len(GRIDS[name])
    assert [d.shape[1] for d in t.decisions] == [a * b for a, b in GRIDS[name]]
    terms = losses.dynamicvit(
        logits, t, labels, teacher_logits=teacher, teacher_features=features, keep_ratios=model.shares(t.decisions)
    )
    terms["total"].backward()
    for predictor in model.score_predictor:
        assert all(p.grad.isfinite().all() for p in predictor.parameters())
        assert predictor.out_conv[-2].weight.grad.abs().max() > 0


def test_all_tokens_of_a_last_map_that_was_not_decided_on_count():
    model, images = build("pvt_v2")
    features = traced(model, images)[1].features.detach()
    tpbook.prune(model, "dynamicvit", keep_ratio=0.6, at=(0,)).train()
    logits, t = traced(model, images)
    assert t.whole and t.features.shape == (2, 4, 48)
    terms = losses.dynamicvit(
        logits, t, torch.tensor([1, 2]), teacher_logits=logits.detach(), teacher_features=features,
        keep_ratios=model.shares(t.decisions),
    )  # fmt: skip
    torch.testing.assert_close(terms["token"], (t.features - features).square().mean())


# ---- the knob, chance, cost


@torch.no_grad()
def test_one_knob_for_all_maps_or_a_ratio_or_a_number_each():
    model, images = build("pvt")
    tpbook.prune(model, "random", keep_ratio=(0.9, 0.5, 0.5, 1.0), seed=3)
    _, t = traced(model, images)
    assert [k.shape[1] for k in t.kept] == [230, 32, 8, 4]
    model.keep = (200, 60, 10, 3)
    assert [k.shape[1] for k in traced(model, images)[1].kept] == [200, 60, 10, 3]
    with pytest.raises(ValueError, match="keep must lie from 1 to the 64 patch tokens that there are, got 65"):
        model.keep = (200, 65, 10, 3)
    model.keep_ratio = 0.5
    first, second = (traced(model, images)[1] for _ in range(2))
    assert all(map(torch.equal, first.kept, second.kept))
    assert not torch.equal(first.scores[0][:, :64], first.scores[1])  # each map draws on from where the last one was


@pytest.mark.parametrize("method", [None, "random", "dtps", "etps"])
def test_counted_is_what_the_closed_form_says(name, method):
    if name == "pvt_v2" and method == "etps":
        pytest.skip("has no class token")
    model, _ = build(name)
    if method:
        tpbook.prune(model, method, keep_ratio=0.7)
    assert flops.count(model, 64) == flops.closed_form(model, 64)


@pytest.mark.parametrize("depths, printed", [([2, 2, 2, 2], 1.9), ([3, 4, 6, 3], 3.8), ([3, 4, 18, 3], 6.7)])
def test_pvt_tiny_small_and_medium_cost_what_their_paper_prints(depths, printed):
    with torch.device("meta"):
        model = PvtForImageClassification(PvtConfig(depths=depths))
    assert round(flops.closed_form(model).total / 1e9, 1) == printed


@torch.no_grad()
def test_the_linear_variant_pools_its_keys():
    torch.manual_seed(0)
    model = timm.create_model("pvt_v2_b2_li", embed_dims=(16, 24, 40, 64), depths=(1, 1, 1, 1), num_classes=10).eval()
    assert flops.count(model, 64) == flops.closed_form(model, 64)
    tpbook.prune(model, "random", keep_ratio=0.6)
    assert flops.count(model, 64) == flops.closed_form(model, 64)


# ---- what cannot be


@pytest.mark.parametrize("which, method, options, message", [
    ("pvt_v2", "etps", {}, "cls_token is None"),
    ("pvt", "etps", {"at": (0, 4)}, r"at=\(0, 4\) must name blocks of a map with a class token, and block 0 has none"),
    ("pvt", "evit", {}, "fuses tokens into one that has no place"),
    ("pvt", "dtps", {"score": "class_attention", "at": (4,)}, "must not name block 4: no block of its map"),
    ("cvt", "topk", {"score": "attention_received", "at": (3,)}, "needs keys that are the tokens"),
    ("pvt_v2", "topk", {"score": "attention_received", "at": (0,)}, "needs keys that are the tokens"),
    ("pvt", "dynamicvit", {"rejoin": "host"}, "rejoin='host' needs a method that squeezes"),
    ("pvt", "dynamicvit", {"rejoin": "mean"}, "rejoin must be one of zero, host, last_seen, got 'mean'"),
    ("cvt", "dynamicvit", {"at": (0, 5)}, "at must hold indices from 0 to 4, got 5"),
    ("cvt", "dynamicvit", {"keep_ratio": (0.5,)}, "one for each of 2 stages"),
])  # fmt: skip
def test_what_cannot_be_is_named(which, method, options, message):
    model, images = build(which)
    before = answer(model, images)
    with pytest.raises(ValueError, match=message):
        tpbook.prune(model, method, **options)
    assert torch.equal(answer(model, images), before) and not hasattr(model, "score_predictor")


def test_rejoin_is_an_option_of_models_with_maps_alone(small):
    with pytest.raises(TypeError, match="option 'rejoin' is not known"):
        tpbook.prune(small(), "random", rejoin="zero")


def test_a_map_that_its_reduction_does_not_divide_is_named():
    model, _ = build("pvt_v2")
    tpbook.prune(model, "random", keep_ratio=0.5)
    with pytest.raises(ValueError, match="reduction by 8 divides, got one of 20 × 20"):
        model(torch.randn(1, 3, 80, 80))
    with pytest.raises(ValueError, match="image_size must be one or two multiples of the patch size"):
        flops.closed_form(model, 80)


@torch.no_grad()
def test_the_slicing_bound_keeps_as_many_positions_of_each_map():
    model, images = build("pvt_v2")
    tpbook.prune(model, "dtps", keep_ratio=0.5)
    bound = sliced(model)
    _, t = traced(bound, images)
    assert [k.shape[1] for k in t.kept] == [a * b // 2 for a, b in GRIDS["pvt_v2"]]
    assert all(torch.equal(k, torch.arange(k.shape[1]).expand_as(k)) for k in t.kept)
    bound.keep_ratio = 1.0
    assert torch.equal(answer(bound, images), answer(tpbook.unprune(model), images))
    swin = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=16, num_heads=(1, 1, 1, 1), depths=(1, 1, 6, 1))
    with pytest.raises(ValueError, match="removes tokens to have a slicing bound, got SwinTransformer"):
        sliced(tpbook.prune(swin, "dynamicvit"))
