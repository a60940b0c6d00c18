import pytest
import torch
import torch.nn.functional as F

import tpbook
from tpbook import losses
from tpbook.methods.evit import keep_rate

TERMS = ("cls", "ratio_sum", "logit_kl", "token", "total")


def inputs(stages=3, kept=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    trace = tpbook.Trace()
    trace.decisions = [(torch.rand(2, 9, generator=g) < 0.6).float() for _ in range(stages)]
    trace.decisions[-1][:, 0] = 1
    trace.features = torch.randn(2, 9, 4, generator=g)
    logits, labels = torch.randn(2, 5, generator=g), torch.tensor([1, 4])
    teacher = {
        "teacher_logits": torch.randn(2, 5, generator=g), "teacher_features": torch.randn(2, 9, 4, generator=g)
    }  # fmt: skip
    return logits, trace, labels, teacher


@pytest.mark.parametrize("token", ["mse", "kl"])
def test_official_terms(official, token):
    want = official("dynamicvit")
    if f"loss.{token}.total" not in want:
        pytest.skip("losses are in the full fixtures only")
    trace = tpbook.Trace(
        decisions=[want[f"train.decisions.{s}"] for s in range(3)], features=want["train.features"]
    )  # fmt: skip
    got = losses.dynamicvit(
        want["train.logits"], trace, want["labels"], teacher_logits=want["teacher.logits"],
        teacher_features=want["teacher.features"], keep_ratios=(0.7, 0.49, 0.343), token=token,
    )  # fmt: skip
    assert set(got) == set(TERMS)
    for term in TERMS:
        torch.testing.assert_close(got[term], want[f"loss.{token}.{term}"], rtol=1e-5, atol=0)


def test_terms_are_their_formulas():
    logits, trace, labels, teacher = inputs()
    got = losses.dynamicvit(logits, trace, labels, **teacher, keep_ratios=(0.7, 0.49, 0.343))
    p, q = teacher["teacher_logits"].softmax(1), logits.softmax(1)
    torch.testing.assert_close(got["logit_kl"], (p * (p / q).log()).sum(1).mean())  # KL(teacher ‖ student)
    ratio = sum(((d.mean(1) - r) ** 2).mean() for d, r in zip(trace.decisions, (0.7, 0.49, 0.343)))
    torch.testing.assert_close(got["ratio_sum"], ratio)
    kept = trace.decisions[-1].bool()
    gap = (trace.features - teacher["teacher_features"])[kept]
    torch.testing.assert_close(got["token"], gap.square().sum() / (4 * kept.sum()))
    total = got["cls"] + 2 * got["ratio_sum"] / 3 + 0.5 * got["logit_kl"] + 0.5 * got["token"]
    torch.testing.assert_close(got["total"], total)
    again = losses.dtps(logits, trace, labels, **teacher, keep_ratios=(0.7, 0.49, 0.343), ratio_weight=5.0)
    torch.testing.assert_close(again["total"] - got["total"], got["ratio_sum"])


def test_soft_labels_and_no_teacher():
    logits, trace, labels, _ = inputs()
    hard = losses.dynamicvit(
        logits, trace, labels, teacher_logits=None, teacher_features=None, keep_ratios=(0.5, 0.5, 0.5)
    )
    soft = losses.dynamicvit(
        logits, trace, F.one_hot(labels, 5).float(), teacher_logits=None, teacher_features=None, keep_ratios=(0.5,) * 3
    )
    torch.testing.assert_close(hard["total"], soft["total"])
    assert hard["logit_kl"] == 0 and hard["token"] == 0


def test_classification_objectives():
    logits, _, labels, teacher = inputs()
    cls = F.cross_entropy(logits, labels)
    for objective in (losses.masked, losses.evit, losses.etps):
        assert torch.equal(objective(logits, labels)["total"], cls)
    etps = losses.etps(logits, labels, teacher_logits=teacher["teacher_logits"])
    torch.testing.assert_close(etps["total"], cls + 0.5 * etps["logit_kl"])


def test_refusals():
    logits, trace, labels, teacher = inputs()
    with pytest.raises(ValueError, match="token must be one of mse, kl, got 'l1'"):
        losses.dynamicvit(logits, trace, labels, **teacher, keep_ratios=(0.7,) * 3, token="l1")
    with pytest.raises(ValueError, match="keep_ratios.*3 did"):
        losses.dynamicvit(logits, trace, labels, **teacher, keep_ratios=(0.7, 0.49))
    with pytest.raises(TypeError, match=r"keep_ratios must be a sequence, one ratio a stage, got 0\.5"):
        losses.dynamicvit(logits, trace, labels, **teacher, keep_ratios=0.5)
    with pytest.raises(ValueError, match="keep_ratios.*0 did"):
        losses.dynamicvit(logits, tpbook.Trace(), labels, **teacher, keep_ratios=())
    with pytest.raises(ValueError, match="both or neither"):
        losses.dynamicvit(
            logits, trace, labels, teacher_logits=teacher["teacher_logits"], teacher_features=None,
            keep_ratios=(0.7,) * 3,
        )  # fmt: skip


@pytest.mark.filterwarnings("ignore:keep_ratio")
@pytest.mark.parametrize("method", ["dynamicvit", "dtps"])
@pytest.mark.parametrize("ratio", [0.3, 0.05])
def test_no_nan_at_small_ratios(small, images, method, ratio):
    model = tpbook.prune(small("deit", num_classes=5).train(), method, keep_ratio=ratio)
    with torch.no_grad():
        for predictor in model.score_predictor:  # all but sure to drop: most images sample no token at all
            predictor.out_conv[-2].bias.copy_(torch.tensor([-6.0, 6.0]))
    teacher = small("deit", num_classes=5)
    x = images(model, 8)
    with torch.no_grad(), tpbook.trace(teacher) as t:
        theirs = teacher(x)
    with tpbook.trace(model) as trace:
        logits = model(x)
    assert all((d.sum(1) >= 1).all() for d in trace.decisions)
    shares = tuple(ratio ** (s + 1) for s in range(len(trace.decisions)))
    terms = losses.dynamicvit(
        logits, trace, torch.arange(8) % 5, teacher_logits=theirs, teacher_features=t.features, keep_ratios=shares
    )
    terms["total"].backward()
    assert terms["total"].isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    for predictor in model.score_predictor:
        assert any(p.grad.abs().max() > 0 for p in predictor.parameters())


@pytest.mark.parametrize("method", ["dynamicvit", "dtps"])
def test_all_keep_is_the_dense_forward(small, images, method):
    model = small("deit").train()
    x = images(model)
    dense = model(x)
    tpbook.prune(model, method, keep_ratio=0.3)
    with torch.no_grad():
        for predictor in model.score_predictor:
            predictor.out_conv[-2].bias.copy_(torch.tensor([50.0, -50.0]))
    torch.testing.assert_close(model(x), dense, atol=1e-5, rtol=1e-5)


def test_keep_rate_comes_down_on_a_cosine():
    assert keep_rate(0, 0.5, 10, 100) == keep_rate(9.99, 0.5, 10, 100) == 1
    assert keep_rate(60, 0.5, 10, 100) == pytest.approx(0.75)
    assert keep_rate(35, 0.7, 10, 100) == pytest.approx(0.7 + 0.3 * (1 + 0.5**0.5) / 2)
    assert keep_rate(110, 0.7, 10, 100) == keep_rate(300, 0.7, 10, 100) == 0.7
    assert keep_rate(0, (0.7, 0.5), 0, 0) == (0.7, 0.5)
