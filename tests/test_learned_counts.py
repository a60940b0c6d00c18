"""A-ViT, AdaViT and IA-RED²: how many tokens a block sees is learned, and differs from image to image."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import held

import tpbook
from tpbook import flops, losses, train
from tpbook.methods import METHODS, Method
from tpbook.methods.adavit import TOKEN_THRESHOLD, gumbel_sigmoid
from tpbook.methods.ia_red2 import Interpreter
from tpbook.training import models
from tpbook.training.recipes import make

RECIPES = Path(__file__).parent.parent / "recipes" / "digits"
LEARNED = ("avit", "adavit", "ia_red2")
GATE = {"gate_scale": 0.7, "gate_center": 0.5}


def vit(class_token=True, **kwargs):
    """A small random model in eval mode, nothing in it trivial: 16 patches, 4 blocks."""
    torch.manual_seed(3)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 10}
    pool = {} if class_token else {"global_pool": "avg"}
    model = timm.models.VisionTransformer(**size, class_token=class_token, **pool, **kwargs).eval()
    return lively(model)


def lively(module):
    with torch.no_grad():
        for p in module.parameters():
            p.uniform_(0.2, 0.8) if p.dim() == 1 else p.normal_(std=0.25)
    return module


def pruned(method, class_token=True, **options):
    """Such a model, pruned, its decisions well spread."""
    model = tpbook.prune(vit(class_token), method, **{**(GATE if method == "avit" else {}), **options})
    if hasattr(model, "score_predictor"):
        with torch.no_grad():
            for p in model.score_predictor.parameters():
                p.normal_(std=0.5 if method == "ia_red2" else 0.2)
    return model


def images(batch=4):
    torch.manual_seed(5)
    return torch.randn(batch, 3, 32, 32)


def embedded(model, x):
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))


def headed(model, x):
    return model.forward_head(model.norm(x))


def hidden(alive):
    """(B, T) bool → what is added to the logits; where nobody is left, nothing."""
    return torch.zeros(alive.shape).masked_fill(~alive & alive.any(1, keepdim=True), float("-inf"))[:, None, None]


# ---- A-ViT


@torch.no_grad()
def test_the_official_code(official):
    """Its logits, depths, ponder and halting scores, from which nothing is missing though halted tokens are gone."""
    vit, want = official("vit"), official("avit")
    size = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 12, "num_heads": 4, "num_classes": 10}
    model = timm.models.VisionTransformer(**size).eval()
    model.load_state_dict({k.removeprefix("model."): v for k, v in vit.items() if k.startswith("model.")})
    tpbook.prune(model, "avit", gate_scale=1.0, gate_center=2.0)
    with tpbook.trace(model) as t:
        logits = model(vit["images"])
    torch.testing.assert_close(logits, want["logits"], atol=1e-5, rtol=0)
    torch.testing.assert_close(t.state.ponder, want["rho"], atol=1e-5, rtol=0)
    assert torch.equal(sum((h > 0).long() for h in t.state.halting), want["depth_of"])
    for i, h in enumerate(t.state.halting):
        alive = want[f"halted_before.{i}"] == 0
        torch.testing.assert_close(h[alive], want[f"halting_score.{i}"][alive], atol=1e-5, rtol=0)
        assert (h[~alive] == 0).all()
    for s, kept in enumerate(t.kept):
        there = (want[f"halted_before.{s + 1}"] == 0)[:, 1:]
        for row, of in zip(kept, there):
            assert torch.equal(row[row >= 0], of.nonzero().flatten())


def halting(model, x, scale, center):
    """The equations with masks: logits, ρ, and the score and who was alive after each block. (B, P + N) each."""
    x = embedded(model, x)
    out, c, rest, ponder = torch.zeros_like(x), *(torch.full(x.shape[:2], v) for v in (0.0, 1.0, 0.0))
    m, seen = torch.ones(x.shape[:2], dtype=torch.bool), []
    for i, block in enumerate(model.blocks):
        x = x + block.attn(block.norm1(x), attn_mask=hidden(m))
        x = x + block.mlp(block.norm2(x))
        score = torch.sigmoid(scale * x[..., 0] - center) * m
        seen.append((score, m))
        h = m.float() if i == len(model.blocks) - 1 else score
        c = c + h
        done, go = m & (c >= 0.99), m & (c < 0.99)
        out = out + x * (rest * done + h * go).unsqueeze(-1)
        ponder = ponder + m + rest * done
        rest, m = rest - h * go, go
    return headed(model, out), ponder, seen


@pytest.mark.parametrize("class_token", [True, False])
@torch.no_grad()
def test_the_equations(class_token):
    model, x = vit(class_token), images()
    want, ponder, seen = halting(model, x, 0.7, 0.5)
    tpbook.prune(model, "avit", **GATE)
    with tpbook.trace(model) as t:
        torch.testing.assert_close(model(x), want, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(t.state.ponder, ponder)
    for h, (score, _) in zip(t.state.halting, seen):
        torch.testing.assert_close(h, score)
    alive = [m[:, int(class_token) :].sum(1) for _, m in seen[1:]]
    assert [(kept >= 0).sum(1).tolist() for kept in t.kept] == [n.tolist() for n in alive]
    assert len({*alive[0].tolist()}) > 1 and not seen[-1][1].all(), "nothing is tried here"
    if class_token:
        assert not all(m[:, 0].all() for _, m in seen), "no class token halts here"


@pytest.mark.parametrize(("class_token", "fused"), [(True, True), (True, False), (False, False)])
@torch.no_grad()
def test_an_image_whose_every_token_has_halted(class_token, fused):
    """Its output is what it was when they did, and the others of its batch do not notice."""
    model, x = vit(class_token), images()
    for block in model.blocks:
        block.attn.fused_attn = fused
    after = model.blocks[0](embedded(model, x))
    first, least = headed(model, after), after[..., 0].amin(1)  # (B,)
    tpbook.prune(model, "avit", gate_scale=1.0, gate_center=-50.0)  # all of them after the first block
    torch.testing.assert_close(model(x), first)
    tpbook.unprune(model)
    gate = 200.0, 200 * least.sort().values[1:3].mean().item()  # those of two images
    want, _, seen = halting(model, x, *gate)
    gone = ~seen[1][1].any(1)
    assert gone.sum() == 2
    torch.testing.assert_close(want[gone], first[gone])
    tpbook.prune(model, "avit", gate_scale=gate[0], gate_center=gate[1])
    torch.testing.assert_close(model(x), want, atol=2e-6, rtol=1e-5)


def test_halted_tokens_are_really_gone_in_training_too():
    """The official code masks them, so nothing gets faster, and they gain biases."""
    model, x, lengths = pruned("avit"), images(), []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    model.train()
    with tpbook.trace(model) as t:
        logits = model(x)
    assert lengths == [17, *(1 + kept.shape[1] for kept in t.kept)] and lengths[-1] < 17
    model.eval()
    torch.testing.assert_close(model(x), logits)
    (logits.sum() + t.state.ponder.mean() + torch.stack(t.state.halting).sum()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name


def test_the_losses_of_avit():
    """By hand, with two prefix tokens, of which the prior knows nothing; the first image of a batch counts."""
    torch.manual_seed(0)
    scores = [torch.rand(3, 2 + 5) for _ in range(4)]
    state = SimpleNamespace(ponder=torch.rand(3, 7) * 4, halting=tuple(scores))
    trace, logits = SimpleNamespace(state=state, features=torch.zeros(3, 5, 8)), torch.randn(3, 10)
    labels = torch.tensor([1, 2, 3])
    got = losses.avit(logits, trace, labels, ponder_weight=0.3, prior_weight=0.2)
    d = torch.stack([h[:, 2:].mean() for h in scores])
    d = d / d.sum()
    p = torch.tensor([-((block - 8 / 3) ** 2) / 2 for block in (1, 2, 3, 4)]).exp()
    p = p / p.sum()
    torch.testing.assert_close(got["prior"], (p * (p / d).log()).sum())
    torch.testing.assert_close(got["ponder"], state.ponder.mean())
    total = F.cross_entropy(logits, labels) + 0.3 * got["ponder"] + 0.2 * got["prior"]
    torch.testing.assert_close(got["total"], total)
    scores[1][:, :2] = 0.9
    torch.testing.assert_close(losses.avit(logits, trace, labels)["prior"], got["prior"])
    scores[1][0, 2:] = 0.9
    assert abs(losses.avit(logits, trace, labels)["prior"] - got["prior"]) > 1e-3


# ---- AdaViT


def switching(model, x):
    """The equations with masks: logits, and who was in each block, (B, N) bool."""
    x, seen, heads = embedded(model, x), [], 4
    for i, (block, decider) in enumerate(zip(model.blocks, model.score_predictor)):
        patches, first = x[:, model.num_prefix_tokens :], x[:, 0] if model.num_prefix_tokens else x.mean(1)
        on = torch.sigmoid(decider.token(patches).squeeze(-1)) > TOKEN_THRESHOLD
        head, layer = (torch.sigmoid(of(first)) > 0.5 for of in (decider.head, decider.layer))
        head, layer = (torch.ones_like(of) if i == 0 else of for of in (head, layer))
        seen.append((on, head, layer))
        on = F.pad(on, (model.num_prefix_tokens, 0), value=True)
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5 + hidden(on)).softmax(-1)
        y = (weights @ v) * head[:, :, None, None]
        x = x + on.unsqueeze(-1) * layer[:, :1, None] * block.attn.proj(y.transpose(1, 2).flatten(2))
        x = x + on.unsqueeze(-1) * layer[:, 1:, None] * block.mlp(block.norm2(x))
    return headed(model, x), seen


@pytest.mark.parametrize("class_token", [True, False])
@torch.no_grad()
def test_tokens_heads_and_layers_are_left_out(class_token):
    model, x, lengths = pruned("adavit", class_token), images(), []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1] - class_token))
    with tpbook.trace(model) as t:
        logits = model(x)
    most = [kept.shape[1] for kept in t.kept]
    assert lengths == most and min(most) < 16, "they are not computed"
    own = tpbook.unprune(pruned("adavit", class_token))
    own.score_predictor = model.score_predictor
    want, seen = switching(own, x)
    torch.testing.assert_close(logits, want, atol=2e-6, rtol=1e-5)
    for kept, (on, *_) in zip(t.kept, seen):
        for row, there in zip(kept, on):
            assert torch.equal(row[row >= 0], there.nonzero().flatten())
    (one, *_), (two, *_) = seen[:2]
    assert (two & ~one).any(), "none comes back"
    assert not torch.stack([head for _, head, _ in seen[1:]]).all()
    off = torch.stack([layer for *_, layer in seen[1:]])
    assert not off[..., 0].all() and not off[..., 1].all()
    torch.testing.assert_close(torch.stack(t.state.all_heads), torch.stack([h for _, h, _ in seen[1:]]).float())


def test_training_masks_what_inference_leaves_out(monkeypatch):
    """With the decisions of inference the training forward gives what inference gives, and they get a gradient."""
    model, x = pruned("adavit", class_token=False), images()

    def sure(logits):  # at the threshold of inference, without noise
        bar = torch.tensor(TOKEN_THRESHOLD).logit() if logits.shape[1] == 16 else 0
        soft = torch.sigmoid(logits)
        return (logits > bar).float() + (soft - soft.detach())

    monkeypatch.setattr("tpbook.methods.adavit.gumbel_sigmoid", sure)
    want = model(x)
    with tpbook.trace(model.train()) as t:
        logits = model(x)
    torch.testing.assert_close(logits, want, atol=2e-6, rtol=1e-5)
    logits[:, 0].sum().backward()
    for s, decider in enumerate(model.score_predictor):
        assert decider.token.weight.grad.abs().max() > 0
        assert (decider.layer.weight.grad.abs().max() > 0) == (s > 0), "both are on in the first block"
    heads = [decider.head.weight.grad.abs().max() > 0 for decider in model.score_predictor]
    assert not heads[0] and any(heads)  # in some the whole attention is off
    assert [d.shape for d in t.decisions] == [(4, 16)] * 4
    assert not all((a >= b).all() for a, b in zip(t.decisions, t.decisions[1:])), "no token comes back"


def test_the_gumbel_sigmoid():
    """On with probability σ(l), whatever τ; straight through with the slope of σ(·/5)."""
    logits = torch.full((4000,), 1.2, requires_grad=True)
    drawn = gumbel_sigmoid(logits)
    assert set(drawn.tolist()) == {0.0, 1.0}
    assert abs(drawn.mean().item() - torch.tensor(1.2).sigmoid().item()) < 0.03
    drawn.sum().backward()
    assert 0 < logits.grad.min() and logits.grad.max() <= 0.25 / 5 + 1e-6


def test_the_losses_of_adavit():
    state = SimpleNamespace(
        all_heads=(torch.tensor([[1.0, 1, 0]]), torch.tensor([[1.0, 1, 1]])),
        all_layers=(torch.tensor([[0.0, 0]]), torch.tensor([[1.0, 0]])),
    )
    trace = SimpleNamespace(state=state, decisions=[torch.tensor([[1.0, 0, 0, 0]]), torch.tensor([[1.0, 1, 1, 0]])])
    logits, labels = torch.randn(1, 10), torch.tensor([4])
    got = losses.adavit(logits, trace, labels, token_usage=0.2)
    for name, value in {"heads": 5 / 6 - 0.5, "layers": 0.25, "tokens": 0.3**2}.items():
        torch.testing.assert_close(got[name], torch.tensor(value))
    torch.testing.assert_close(
        got["total"], F.cross_entropy(logits, labels) + 2 * (got["heads"] + got["layers"] + got["tokens"])
    )


def test_explicit_attention_cannot_turn_heads_off():
    model = pruned("adavit")
    model.blocks[2].attn.fused_attn = False
    with pytest.raises(RuntimeError, match="turns heads off"):
        model(images())


# ---- IA-RED²


@torch.no_grad()
def test_the_interpreter():
    net, x = lively(Interpreter(8, 2)), torch.randn(3, 5, 8)
    q, k = net.q(net.norm(x)), net.k(net.token)
    p = sum(torch.sigmoid(q[..., h] @ k[h] / 2 + net.bias[i]) for i, h in enumerate((slice(4), slice(4, 8)))) / 2
    torch.testing.assert_close(net(x).sigmoid(), p)


@torch.no_grad()
def test_the_likely_ones_stay_and_one_in_any_case():
    model, x = pruned("ia_red2", at=(1, 2)), images()
    with tpbook.trace(model) as t:
        model(x)
    for kept, scores, before in zip(t.kept, t.scores, (torch.arange(16).expand(4, -1), *t.kept)):
        for row, score, ids in zip(kept, scores, before):
            score, ids = score[ids >= 0], ids[ids >= 0]
            want = ids[score > 0] if (score > 0).any() else ids[score.argmax()][None]
            assert torch.equal(row[row >= 0], want)
    with torch.no_grad():
        for net in model.score_predictor:
            net.bias.fill_(-20.0)
    with tpbook.trace(model) as t:
        assert model(x).isfinite().all()
    assert [kept.shape[1] for kept in t.kept] == [1, 1]


def test_the_policy_acts_at_random_and_gets_no_gradient_through_its_acts():
    model, x = pruned("ia_red2", at=(1, 2)).train(), images(64)
    with tpbook.trace(model) as t:
        logits = model(x)
    first, second = t.decisions
    assert not first.requires_grad and set(first.unique().tolist()) == {0.0, 1.0}
    assert (second <= first).all() and second.sum(1).min() >= 1
    assert abs((first - t.scores[0].sigmoid()).mean()) < 0.03
    logits.sum().backward(retain_graph=True)
    assert all(p.grad is None for p in model.score_predictor.parameters())
    losses.ia_red2(logits, t, torch.arange(64) % 10)["policy"].backward()
    assert all(p.grad.abs().max() > 0 for name, p in model.score_predictor.named_parameters() if "k.bias" not in name)


def test_the_losses_of_ia_red2():
    """By hand: two images, two stages of two tokens; the right one is to do more of what it did."""
    scores = [torch.tensor([[0.5, -1.0], [2.0, 0.3]], requires_grad=True), torch.tensor([[1.0, 7.0], [0.1, 0.2]])]
    decisions = [torch.tensor([[1.0, 0], [1, 1]]), torch.tensor([[1.0, 0], [0, 1]])]
    logits = torch.tensor([[3.0, 0], [3, 0]])
    trace = SimpleNamespace(scores=scores, decisions=decisions)
    got = losses.ia_red2(logits, trace, torch.tensor([0, 1]), policy_weight=0.7)
    reward = torch.tensor([1 - 0.5**2, -0.5])
    log = F.logsigmoid
    chance = [
        (log(scores[0][0, 0]) + log(-scores[0][0, 1]) + log(scores[1][0, 0])) / 3,  # the second token was gone
        (log(scores[0][1, 0]) + log(scores[0][1, 1]) + log(-scores[1][1, 0]) + log(scores[1][1, 1])) / 4,
    ]
    policy = -((reward - reward.mean()) * torch.stack(chance)).mean()
    torch.testing.assert_close(got["policy"], policy)
    torch.testing.assert_close(got["reward"], reward.mean())
    torch.testing.assert_close(got["usage"], torch.tensor((0.5 + 0.75) / 2))
    torch.testing.assert_close(got["total"], F.cross_entropy(logits, torch.tensor([0, 1])) + 0.7 * policy)
    got["policy"].backward()
    assert scores[0].grad[0, 0] < 0 < scores[0].grad[0, 1]  # descent makes its acts likelier
    assert scores[0].grad[1].min() > 0  # and those of the wrong one less likely


# ---- all three


@pytest.mark.parametrize("method", LEARNED)
@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch_and_costs_what_it_keeps(method):
    model, x = pruned(method), images()
    logits = model(x)
    for i, image in enumerate(x.split(1)):
        torch.testing.assert_close(model(image)[0], logits[i], atol=1e-6, rtol=1e-5)
    costs = flops.closed_form(model, x)
    assert costs == flops.count(model, x) and len({cost.total for cost in costs}) > 1
    assert model(x.flip(0)).isfinite().all()


@pytest.mark.parametrize("method", LEARNED)
def test_nothing_is_kept_on_the_model(method):
    model = pruned(method).train()
    before = held(model)
    logits = model(images())
    assert held(model) == before and logits.requires_grad


@pytest.mark.parametrize("method", LEARNED)
def test_a_number_of_tokens_has_no_meaning(method):
    for given in ({"keep_ratio": 0.7}, {"keep": 9}, {"r": 2}):
        model = vit()
        with pytest.raises(ValueError, match=f"{next(iter(given))} must be left unset for {method}"):
            tpbook.prune(model, method, **given)
        assert not hasattr(model, "pruning")
    model = tpbook.prune(vit(), method)
    assert model.keep_ratio is None and model.keep is None and model.r is None
    for name, value in (("keep_ratio", 0.5), ("keep", 3), ("r", 1)):
        with pytest.raises(ValueError, match=f"{name} must be left unset for {method}"):
            setattr(model, name, value)
    with pytest.raises(ValueError, match="invert"):
        tpbook.prune(vit(), method, invert=True)
    with pytest.raises(ValueError, match="image_size must be images"):
        flops.count(model)


def test_where_they_stand():
    assert tpbook.prune(vit(), "avit").pruning.at == (1, 2, 3)
    assert tpbook.prune(vit(), "adavit").pruning.at == (0, 1, 2, 3)
    assert tpbook.prune(vit(), "ia_red2").pruning.at == tpbook.prune(vit(), "random").pruning.at
    assert tpbook.prune(vit(), "avit", at=[2]).pruning.at == (2,)


def test_what_cannot_be_is_refused():
    for option in ("gate_scale", "gate_center"):
        with pytest.raises(TypeError, match=f"{option} must be a number, got 'steep'"):
            tpbook.prune(vit(), "avit", **{option: "steep"})
        with pytest.raises(TypeError, match=option):
            tpbook.prune(vit(), "ia_red2", **{option: 1.0})
    with pytest.raises(ValueError, match="'lasting_attention' and reduce 'skip' remember different things"):
        tpbook.prune(vit(), "adavit", score="lasting_attention")
    with pytest.raises(ValueError, match="reduce 'fuse'"):
        Method("halting", "fuse", "before", "floor", "nobody")
    swin = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=24, num_heads=(1, 2, 4, 8), depths=(1, 1, 3, 1))
    for method in ("adavit", "ia_red2"):
        with pytest.raises(ValueError, match="method must be one of"):
            tpbook.prune(swin, method)


@pytest.mark.parametrize("method", LEARNED)
def test_each_has_a_recipe(method, tmp_path):
    """A few steps of it, and the trained model comes back."""
    small = {"max_steps": 2, "train_images": 50, "test_images": 20, "log_every": 1, "precision": "fp32"}
    result = train.run(RECIPES / f"{method}.yaml", tmp_path / "run", progress=False, **small)
    assert result["recipe"]["method"] == method and len(result["correct"]) == 20
    own = {"avit": {"ponder", "prior"}, "adavit": {"heads", "layers", "tokens"}, "ia_red2": {"policy", "reward"}}
    assert own[method] < set(result["last"])
    model = train.load(tmp_path / "run")
    assert model.pruning.name == method and METHODS[method].score.objective == method


@pytest.mark.parametrize("method", [*LEARNED, "random"])
def test_a_loss_that_takes_no_such_thing(method):
    recipe = make({"method": method, "loss": {"steepness": 1}})
    with pytest.raises(ValueError, match="loss must have keys of .*, got 'steepness'"):
        models.adapt(recipe, vit())
