"""What must hold for any numbers: token counts, selection, squeezing."""

from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal, localcontext
from unittest.mock import patch

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from timm.models import VisionTransformer

import tpbook
from tpbook.methods import METHODS, Method, token_counts
from tpbook.methods.parts import Score
from tpbook.methods.tps import squeeze, squeeze_masked

settings.register_profile("book", deadline=None)
settings.load_profile("book")
ratio = st.floats(0.01, 1.0) | st.integers(1, 100).map(lambda p: p / 100)
seeds = st.integers(0, 2**31)
FUSING = METHODS["evit"]


def test_counts_of_the_papers():
    def kept(name, rho):
        return [c.kept for c in token_counts(196, [rho] * 3, METHODS[name])]

    assert kept("dynamicvit", 0.7) == [137, 96, 67] and kept("dtps", 0.3) == [58, 17, 5]
    assert kept("evit", 0.7) == [138, 98, 70] and kept("evit", 0.5) == [98, 50, 26]
    assert kept("etps", 0.7) == [138, 97, 68] and kept("etps", 0.6) == [118, 71, 43]
    assert token_counts(100, [0.7, 0.7], METHODS["random"])[1].kept == 49  # floats say 48
    assert token_counts(100, [0.55], METHODS["etps"])[0].kept == 55  # floats say 56


@given(st.integers(1, 2000), st.lists(ratio, min_size=1, max_size=4), st.sampled_from(list(METHODS)))
@example(2, [0.5, 1.0], "adavit")
@pytest.mark.filterwarnings("ignore:keep_ratio")
def test_counts(patches, ratios, name):
    reduce = METHODS[name].reduce
    if min(ratios) < reduce.least_ratio:
        with pytest.raises(ValueError, match="keep_ratio must leave half"):
            token_counts(patches, ratios, METHODS[name])
        return
    counts = token_counts(patches, ratios, METHODS[name])
    n, share = patches, Decimal(1)
    with localcontext(prec=200):
        for r, c in zip(ratios, counts, strict=True):
            share *= Decimal(str(r))
            if METHODS[name].count.name == "floor":
                kept = (patches * share).to_integral_value(ROUND_FLOOR)
            else:
                up = ROUND_CEILING if METHODS[name].count.name == "ceil" else ROUND_FLOOR
                kept = (n * Decimal(str(r))).to_integral_value(up)
            kept = n if r == 1 else kept  # all, also where the stage before had to leave more, or what waits comes back
            assert c.enter == n and c.kept == max(reduce.least(n), int(kept)) and 1 <= c.kept <= c.enter
            assert c.leave == c.kept + (reduce.name == "fuse" and c.kept < n) and c.leave <= c.enter
            assert r < 1 or name == "evit" or c.leave == c.enter
            n = c.enter if reduce.rejoins else c.leave


class Given(Score):
    """Scores that are known beforehand, (n,), the same for every image."""

    name = words = "given"

    def __init__(self, scores):
        self.scores = scores

    def __call__(self, call):
        return self.scores.expand(call.x.shape[0], -1)


@given(st.integers(2, 30), st.data(), st.integers(0, 3), st.booleans(), seeds)
@torch.no_grad()
def test_selection(n, data, prefix, invert, seed):
    k = data.draw(st.integers(1, n))
    torch.manual_seed(seed)
    size = {"img_size": (1, n), "patch_size": 1, "in_chans": 1, "embed_dim": 6, "depth": 1, "num_heads": 1}
    model = VisionTransformer(**size, class_token=False, reg_tokens=prefix, global_pool="avg", num_classes=2).eval()
    static, seen = torch.randn(n), []
    with patch.dict(METHODS, given=Method(Given(static), "drop", "before", "floor", "")):
        tpbook.prune(model, "given", keep=k, invert=invert)
    for module in (model.blocks[0], model.blocks[0].norm1):  # before and after the choice
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with tpbook.trace(model) as t:
        model(torch.randn(2, 1, 1, n))
    (x, out), [chosen] = seen, t.kept
    assert torch.equal(out[:, :prefix], x[:, :prefix])  # prefix tokens stay, in front
    assert out.shape[1] == prefix + k and x.shape[1] == prefix + n
    for b in range(2):
        assert torch.equal(out[b, prefix:], x[b, prefix + chosen[b]])
        kept = static[chosen[b]]
        others = static[[i for i in range(n) if i not in chosen[b].tolist()]]
        if k < n:
            assert kept.max() <= others.min() if invert else kept.min() >= others.max()


@given(st.integers(1, 12), st.integers(0, 12), seeds)
def test_squeezing_averages(k, p, seed):
    torch.manual_seed(seed)
    kept, pruned = torch.randn(2, k, 6), torch.randn(2, max(p, 1), 6)[:, :p]

    def direction(x, y):  # a similarity that ignores the last channel, which we set to one
        x, y = x[..., :-1], y[..., :-1]
        return torch.nn.functional.cosine_similarity(x.unsqueeze(2), y.unsqueeze(1), dim=-1)

    kept[..., -1] = pruned[..., -1] = 1
    out, host = squeeze(kept, pruned, direction)
    torch.testing.assert_close(out[..., -1], torch.ones(2, k))  # weights sum to one
    lonely = torch.ones(2, k, dtype=torch.bool).scatter(1, host, False)
    torch.testing.assert_close(out[lonely], kept[lonely])  # nobody's host is unchanged
    everyone = torch.cat([kept, pruned], dim=1)
    assert (out <= everyone.amax(1, keepdim=True) + 1e-5).all()
    assert (out >= everyone.amin(1, keepdim=True) - 1e-5).all()


@given(st.integers(2, 16), st.data(), seeds)
def test_squeezing_by_gather_equals_by_mask(n, data, seed):
    torch.manual_seed(seed)
    k = data.draw(st.integers(1, n - 1))
    x, order = torch.randn(1, n, 8), torch.randperm(n)
    kept, pruned = order[:k], order[k:]
    out, host = squeeze(x[:, kept], x[:, pruned])
    after = torch.zeros(1, n).scatter(1, kept[None], 1.0)
    masked, to = squeeze_masked(x, torch.ones(1, n), after)
    torch.testing.assert_close(masked[:, kept], out)
    assert torch.equal(to[0, pruned], kept[host[0]])
    assert torch.equal(to[0, kept], kept)
    torch.testing.assert_close(masked[:, pruned], x[:, pruned])
