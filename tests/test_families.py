"""Every family of backbones, against its dense model: nothing removed, removed = hidden, what is heard, compiled, cost.

The reference knows nothing of the engine: it runs the dense model at full length, one image at a time, hides removed
tokens by −∞ in `scaled_dot_product_attention`, and writes fused and squeezed tokens in between the halves of a block.
"""

import math
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from builders import BUILDERS, answer, learning
from timm.models.eva import Eva

import tpbook
from tpbook import flops
from tpbook.families import family_of
from tpbook.families.eva import gather_rope
from tpbook.methods.parts import Place

AT, RATIO = (1, 2), 0.6  # two stages, the second at reduced length
OPTIONS = {
    "random": {"seed": 0},
    "evit": {},
    "etps": {},
    "dynamicvit, received": {"score": "attention_received"},  # these two where there is no class token
    "etps, received": {"score": "attention_received"},
}
WITH_CLASS, WITHOUT = ("random", "evit", "etps"), ("random", "dynamicvit, received", "etps, received")


def prune(model, how, **kwargs):
    return tpbook.prune(model, how.split(",")[0], **{"at": AT, "keep_ratio": RATIO, **OPTIONS[how], **kwargs})


def inside(model):
    """The family that knows the blocks, and the model that it is asked about."""
    model = family_of(model).inside(model)
    return family_of(model), model


def ways(name):
    """The methods that a model is pruned by here; none where its library is not installed."""
    try:
        family, model = inside(BUILDERS[name]()[0])
    except pytest.skip.Exception:
        return ()
    return WITH_CLASS if family.has_class_token(model) else WITHOUT


CASES = [(name, how) for name in BUILDERS for how in ways(name)]
HEARING = [(name, how) for name, how in CASES if how != "random"]
ONE_EACH = [(name, how) for name, how in CASES if how in ("evit", "etps, received")]
COMPILED = (  # of each family one, and of each way that positions are gathered; the others are slow
    "vit", "lvvit", "eva_split", "eva_mixed", "beit", "beit_shared", "naflex_rope", "hf_vit", "hf_dinov3",
    "hf_timm_wrapper", "torchvision_vit", "open_clip_vit", "open_clip_timm",
)  # fmt: skip
EXPLICIT = [(name, how) for name, how in ONE_EACH if hasattr(BUILDERS[name]()[0], "blocks")]  # timm's
every_case = pytest.mark.parametrize("name, how", CASES)
every_model = pytest.mark.parametrize("name", BUILDERS)


# ---- nothing removed


def look(model):
    """What must not change of a model that is refused, or was pruned and is not any more."""
    modules = {name: (type(m), sorted(m.__dict__), m.training) for name, m in model.named_modules()}
    return modules, list(model.state_dict())


@every_case
def test_nothing_removed_is_the_dense_model_and_unprune_leaves_nothing_behind(name, how):
    model, images = BUILDERS[name]()
    before, dense = look(model), answer(model, images)
    prune(model, how, keep_ratio=1.0)
    assert torch.equal(answer(model, images), dense)
    with tpbook.trace(model) as t:
        traced = answer(model, images)
    if name == "beit_shared":  # a bias of three dimensions takes another kernel than one of four
        torch.testing.assert_close(traced, dense, atol=1e-6, rtol=0)
    else:
        assert torch.equal(traced, dense)
    everyone = torch.arange(t.scores[0].shape[1]).expand(len(images), -1)
    assert [kept.tolist() for kept in t.kept] == [everyone.tolist()] * len(AT)
    model.keep_ratio = RATIO
    assert not torch.allclose(answer(model, images), dense, atol=1e-4)
    assert tpbook.unprune(model) is model
    assert look(model) == before
    assert torch.equal(answer(model, images), dense)


# ---- removed = hidden


class Attending:
    """Inside, every fused attention hides keys by −∞; it remembers what each saw, (q, k, bias or None).

    `sizes` (T,) or None: how many tokens each key stands for.
    """

    def __enter__(self):
        self.hidden, self.seen, self.sizes = [], [], None
        self.own, F.scaled_dot_product_attention = F.scaled_dot_product_attention, self
        return self

    def __exit__(self, *error):
        F.scaled_dot_product_attention = self.own

    def __call__(self, q, k, v, attn_mask=None, *args, **kwargs):
        if self.hidden or self.sizes is not None:
            hidden = torch.zeros(q.shape[-2], k.shape[-2])
            if self.sizes is not None:
                hidden += self.sizes.log()
            hidden[:, self.hidden] = float("-inf")
            attn_mask = hidden if attn_mask is None else attn_mask + hidden
        self.seen.append((q.detach(), k.detach(), attn_mask if isinstance(attn_mask, torch.Tensor) else None))
        F.scaled_dot_product_attention = self.own
        try:
            return self.own(q, k, v, attn_mask, *args, **kwargs)
        finally:
            F.scaled_dot_product_attention = self


def attention(q, k, bias=None):
    """softmax(q Kᵀ / √d + bias), mean over heads: (B, T, T) in float64."""
    logits = q.double() @ k.double().transpose(-2, -1) / math.sqrt(q.shape[-1])
    return (logits if bias is None else logits + bias).softmax(dim=-1).mean(dim=1)


@contextmanager
def silent(module, several=False):
    """Inside, a half of a block adds zero."""

    def nothing(*args, **kwargs):
        zeros = torch.zeros_like([*args, *kwargs.values()][0])
        return (zeros, None) if several else zeros

    module.forward = nothing
    try:
        yield
    finally:
        del module.forward


class Dense:
    """A dense model that runs one image (1, C, H, W) at full length, tokens hidden and written in.

    Args:
        model: the dense model; it cannot be used any further.
        kept: a list of patches a stage, those that are left, in token order; −1 for a fused one.
        place: of the stages.
        rewrite: (self, stage, x (1, T, C) between the halves, attention (T, T)) → x and the positions alive; before a
            block there is no attention. A position that is named several times enters the pool as often.

    Attributes:
        sizes: (T,), how many tokens each stands for in the attention; None for one.
        waits: whether hidden tokens stay as they are and are there again after the last block.
    """

    sizes, waits = None, False

    def __init__(self, model, kept, place, rewrite=None):
        self.model, self.kept, self.place, self.rewrite = model, kept, place, rewrite
        self.family, trunk = inside(model)
        self.prefix = self.family.prefix(trunk)
        self.alive = list(range(self.prefix + math.prod(self.family.grid(trunk))))  # positions, in token order
        self.fused = []  # positions of fused tokens, which are appended
        self.mode, self.blocks = Attending(), self.family.blocks(trunk)
        for i, block in enumerate(self.blocks):
            self._follow(i, block, self.family.attention(block)[0])

    def __call__(self, image):
        with self.mode:
            return answer(self.model, image)

    def _follow(self, i, block, attend):
        def enter(module, args, kwargs):
            if i in AT and self.place is Place.BEFORE:
                self.alive, s = self.positions(self.kept[AT.index(i)]), AT.index(i)
                if self.rewrite is not None:
                    x, self.alive = self.rewrite(self, s, args[0], None)
                    args = (x, *args[1:])
            self.mode.hidden = [p for p in range(args[0].shape[1]) if p not in self.alive]
            self.mode.sizes = self.sizes
            return args, {name: self.placed(name, value) for name, value in kwargs.items()}

        def attended(module, args, out):
            self.several = isinstance(out, tuple)

        def leave(module, args, kwargs, out):
            if i in AT and self.place is Place.BETWEEN:
                several, s = self.several, AT.index(i)
                with silent(self.family.mlp(block)):
                    x = module.forward(*args, **kwargs)
                x, self.alive = self.rewrite(self, s, x, attention(*self.mode.seen[-1])[0].float())
                with silent(attend, several):
                    out = module.forward(x, *args[1:], **kwargs)
            if self.waits:
                out = out.clone()
                out[:, self.mode.hidden] = args[0][:, self.mode.hidden]
            self.mode.hidden, self.mode.sizes = [], None
            return out[:, self.alive] if i == len(self.blocks) - 1 and not self.waits else out

        attend.register_forward_hook(attended)
        block.register_forward_pre_hook(enter, with_kwargs=True)
        block.register_forward_hook(leave, with_kwargs=True)
        if getattr(attend, "relative_position_bias_table", None) is not None:
            own = attend._get_rel_pos_bias
            attend._get_rel_pos_bias = lambda: self.placed("shared_rel_pos_bias", own())

    def positions(self, kept):
        """Positions of the first tokens and of those kept."""
        fused = iter(self.fused)
        return [*range(self.prefix), *(self.prefix + p if p >= 0 else next(fused) for p in kept)]

    def placed(self, name, value):
        """Positions for fused tokens too, as documented: they are not rotated, and have the class token's biases."""
        for _ in self.fused if value is not None else ():
            if name == "rope":  # (…, N, 2d), sines and cosines
                still = torch.zeros_like(value[..., :1, :])
                still[..., value.shape[-1] // 2 :] = 1
                value = torch.cat([value, still], dim=-2)
            elif name == "position_embeddings":  # cosines (N, d) and sines
                value = F.pad(value[0], (0, 0, 0, 1), value=1.0), F.pad(value[1], (0, 0, 0, 1))
            elif name == "shared_rel_pos_bias":  # (…, T, T)
                value = torch.cat([value, value[..., :1, :]], dim=-2)
                value = torch.cat([value, value[..., :1]], dim=-1)
        return value


def fuse(dense, s, x, weights):
    """EViT: the last of `kept` is Σ a_i x_i over those that go."""
    *kept, new = dense.kept[s]
    assert new == -1
    alive = dense.positions(kept)
    summed = sum(weights[0, p] * x[:, p] for p in dense.alive if p not in alive)  # (1, C)
    dense.fused.append(x.shape[1])
    return torch.cat([x, summed.unsqueeze(1)], dim=1), [*alive, x.shape[1]]


def squeeze(dense, s, x, weights):
    """TPS: each that goes joins the kept one most like it, by e^cos against the host's own e."""
    alive = dense.positions(dense.kept[s])
    kept = alive[dense.prefix :]
    total, weight = {p: math.e * x[0, p] for p in kept}, dict.fromkeys(kept, math.e)
    for p in dense.alive:
        if p not in alive:
            like, host = F.cosine_similarity(x[0, p].unsqueeze(0), x[0, kept]).max(dim=0)
            total[kept[host]] = total[kept[host]] + like.exp() * x[0, p]
            weight[kept[host]] = weight[kept[host]] + like.exp()
    x = x.clone()
    for p in kept:
        x[0, p] = total[p] / weight[p]
    return x, alive


@pytest.mark.usefixtures("stages")
@every_case
def test_removing_tokens_is_hiding_them(name, how):
    model, images = BUILDERS[name]()
    prune(model, how)
    with torch.no_grad(), tpbook.trace(model) as t:  # kernels have no gradient
        got = answer(model, images)
    lengths = [scores.shape[1] for scores in t.scores] + [t.kept[-1].shape[1]]
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) == 3
    method, rewrite = model.pruning.method, fuse if how == "evit" else squeeze
    for b, image in enumerate(images.split(1)):
        dense = Dense(BUILDERS[name]()[0], [kept[b].tolist() for kept in t.kept], method.place, rewrite)
        torch.testing.assert_close(got[b : b + 1], dense(image), atol=5e-6, rtol=1e-6)


@every_model
def test_while_a_learned_method_trains_dropped_tokens_do_not_count(name):
    model, images = BUILDERS[name]()
    family, trunk = inside(model)
    if family.pools_unmasked(trunk):
        before = look(model)
        with pytest.raises(ValueError, match="learned"):
            tpbook.prune(model, "dynamicvit", at=AT)
        assert look(model) == before
        return
    learning(tpbook.prune(model, "dynamicvit", at=AT))
    with tpbook.trace(model) as t:
        got = answer(model, images)
    for b, image in enumerate(images.split(1)):
        kept = [decided[b].round().nonzero().flatten().tolist() for decided in t.decisions]
        assert 0 < len(kept[1]) < len(kept[0]) < t.decisions[0].shape[1]
        dense = Dense(learning(BUILDERS[name]()[0]), kept, Place.BEFORE)
        torch.testing.assert_close(got[b : b + 1], dense(image), atol=5e-6, rtol=1e-6)
    got.square().sum().backward()
    predictors = trunk.score_predictor.parameters()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert all(p.grad.abs().sum() > 0 for p in predictors if p.dim() > 1)


# ---- what is heard


@pytest.mark.parametrize("name, how", HEARING)
def test_what_is_heard_is_the_attention_of_the_block_itself(name, how):
    model, images = BUILDERS[name]()
    prune(model, how)
    family, trunk = inside(model)
    mode, calls = Attending(), []
    for i, block in enumerate(family.blocks(trunk)):
        block.register_forward_hook(lambda *_, i=i: calls.append((i, mode.seen[-1])))
    with tpbook.trace(model) as t, mode:
        answer(model, images)
    calls, prefix = dict(calls), family.prefix(trunk)
    for s, i in enumerate(AT):
        rows = attention(*calls[i - (model.pruning.method.place is Place.BEFORE)])  # (B, T, T)
        rows = rows[:, 0] if "received" not in how else rows.mean(dim=1)
        torch.testing.assert_close(t.scores[s].double(), rows[:, prefix:], atol=1e-6, rtol=0)
    assert rows.shape[1] < prefix + math.prod(family.grid(trunk)) or "dynamicvit" in how


@pytest.mark.parametrize("name, how", EXPLICIT)
def test_explicit_attention_is_the_fused_one(name, how):
    results = []
    for fused in (True, False):
        model, images = BUILDERS[name]()
        for block in model.blocks:
            block.attn.fused_attn = fused
        prune(model, how)
        with tpbook.trace(model) as t:
            got = answer(model, images)
        tpbook.prune(tpbook.unprune(model), "dynamicvit", at=AT).train()
        torch.manual_seed(0)
        for p in model.score_predictor.parameters():
            torch.nn.init.normal_(p, std=0.2)
        with tpbook.trace(model) as trained:
            learned = answer(model, images)
        results.append((got, t.scores, learned, trained.decisions))
    torch.testing.assert_close(*results, atol=5e-6, rtol=1e-6)


# ---- compiled, cost


@pytest.mark.parametrize(
    "name, how", [pytest.param(*case, marks=() if case[0] in COMPILED else pytest.mark.slow) for case in ONE_EACH]
)
def test_compiled_whole_it_says_the_same(name, how):
    model, images = BUILDERS[name]()
    prune(model, how)
    torch._dynamo.reset()
    with torch.no_grad():
        with tpbook.kernels.allowed(False):  # a compiled model is of PyTorch's operators
            eager = answer(model, images)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(answer(compiled, images), eager, atol=1e-6, rtol=0)


@every_model
def test_cost_counted_is_cost_by_arithmetic(name):
    model, _ = BUILDERS[name]()
    dense = flops.count(model)
    assert dense.total == dense.embed + sum(dense.by_block) + dense.head and min(dense.by_block) > 0
    assert flops.closed_form(model) == dense
    for how in ways(name):
        prune(model, how)
        pruned = flops.count(model)
        assert pruned.by_block[-1] < dense.by_block[-1] and pruned.embed == dense.embed
        assert flops.closed_form(model) == pruned
        tpbook.unprune(model)


# ---- refused


@every_model
@pytest.mark.parametrize(
    "method, kwargs, named",
    [
        ("nope", {}, "method"),
        ("random", {"at": (1, 99)}, "at"),
        ("random", {"at": (2, 1)}, "at"),
        ("random", {"keep_ratio": 0}, "keep_ratio"),
        ("random", {"keep": 10_000}, "keep"),
        ("random", {"score": "nope"}, "score"),
        ("random", {"fuse": True}, "fuse"),
        ("dynamicvit", {"score": "attention_received", "at": (0, 1)}, "at"),
    ],
)
def test_bad_arguments_are_named_and_the_model_is_as_it_was(name, method, kwargs, named):
    model, _ = BUILDERS[name]()
    before = look(model)
    with pytest.raises((ValueError, TypeError), match=named):
        tpbook.prune(model, method, **{"at": AT, **kwargs})
    assert look(model) == before


@pytest.mark.parametrize("name", [name for name in BUILDERS if ways(name) is WITHOUT])
@pytest.mark.parametrize("method", ["evit", "etps"])
def test_without_class_token_its_attention_is_refused(name, method):
    model, _ = BUILDERS[name]()
    before = look(model)
    with pytest.raises(ValueError, match="attention_received"):
        tpbook.prune(model, method, at=AT)
    assert look(model) == before


def test_post_norm_blocks_are_refused_by_name():
    model = Eva(img_size=64, embed_dim=32, num_heads=2, depth=3, use_post_norm=True)
    before = look(model)
    with pytest.raises(ValueError, match=r"blocks\[0\] must be a timm EvaBlock .* got EvaBlockPostNorm"):
        tpbook.prune(model, "random")
    assert look(model) == before


def test_naflex_takes_images_and_no_patches():
    model, images = BUILDERS["naflex"]()
    patches = torch.randn(2, 20, 16 * 16 * 3)
    coordinates = torch.cartesian_prod(torch.arange(4), torch.arange(5)).expand(2, -1, -1)
    given = {"patches": patches, "patch_coord": coordinates, "patch_valid": torch.ones(2, 20, dtype=torch.bool)}
    assert model(given).shape == (2, 10)
    tpbook.prune(model, "random", at=AT)
    with pytest.raises(ValueError, match=r"x must be images \(B, 3, H, W\).* got patches \(2, 20, 768\)"):
        model(given)
    assert model(images[:, :, :32]).shape == (2, 10)  # of another size


@pytest.mark.parametrize("name", ["eva_fused", "beit", "naflex"])
def test_feature_maps_are_refused(name):
    model, images = BUILDERS[name]()
    tpbook.prune(model, "random", at=AT)
    with pytest.raises(RuntimeError, match="no feature maps"):
        model.forward_intermediates(images)


def test_masks_and_patch_dropout_are_refused():
    model = tpbook.prune(BUILDERS["eva_fused"]()[0], "random", at=AT)
    with pytest.raises(ValueError, match="attn_mask"):
        model(torch.zeros(1, 3, 64, 80), attn_mask=torch.zeros(21, 21))
    model = tpbook.prune(Eva(img_size=64, embed_dim=32, num_heads=2, depth=3, patch_drop_rate=0.5), "random").train()
    with pytest.raises(ValueError, match="patch_drop_rate must be 0 .* got 0.5"):
        model(torch.zeros(1, 3, 64, 64))


# ---- rotations


@pytest.mark.parametrize("shape", [(6, 8), (3, 6, 8), (2, 1, 6, 8), (2, 3, 6, 8)])
def test_each_token_takes_its_row_of_the_rotation_along(shape):
    rope, patch = torch.randn(shape), torch.tensor([[5, 0, -1], [2, 5, 1]])
    got = gather_rope(rope, patch)
    heads = 1 if len(shape) == 2 else shape[-3]
    assert got.shape == (2, heads, 3, 8)
    for b in range(2):
        for h in range(heads):
            table = {2: lambda: rope, 3: lambda: rope[h], 4: lambda: rope[b, h]}[len(shape)]()  # noqa: B023
            rows = [table[p] if p >= 0 else torch.tensor([0.0] * 4 + [1.0] * 4) for p in patch[b].tolist()]
            assert torch.equal(got[b, h], torch.stack(rows))
