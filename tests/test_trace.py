"""`trace` tells which tokens survive and who carries whom, and changes nothing."""

import pytest
import torch
from builders import COUNTED
from conftest import held

import tpbook


@pytest.mark.parametrize("method", COUNTED)
@pytest.mark.parametrize("keep_ratio", [1.0, 0.6, (1.0, 0.5, 1.0)])
@torch.no_grad()
def test_eval(small, images, method, keep_ratio):
    model = tpbook.prune(small(), method, keep_ratio=keep_ratio)
    x, was = images(model), held(model)
    torch.manual_seed(4)
    want = model(x)
    torch.manual_seed(4)
    with tpbook.trace(model) as t:
        assert torch.equal(model(x), want)
    counts, parts = model.pruning.counts(36), model.pruning.method
    if parts.chooses.varies:  # as many as the image of the two that keeps more
        assert [s.shape[1] for s in t.scores] == [36, *(k.shape[1] for k in t.kept[:-1])]
        assert all(int((k >= 0).sum(1).max()) == k.shape[1] <= c.kept for k, c in zip(t.kept, counts, strict=True))
    else:
        assert [k.shape for k in t.kept] == [(2, c.leave) for c in counts]
        assert [s.shape for s in t.scores] == [(2, c.enter) for c in counts]
    left = 36 if parts.reduce.rejoins else t.kept[-1].shape[1]
    assert t.features.shape == (2, left, 48) and t.decisions == []
    for kept in t.kept:
        for row in kept:
            patches = row[row >= 0]
            assert len(patches.unique()) == len(patches) and patches.max() < 36
    for before, after in zip(t.kept, t.kept[1:] if not parts.reduce.rejoins else ()):
        added = {-2} if parts.chooses.varies else {-1}
        assert all(set(a.tolist()) <= set(b.tolist()) | added for a, b in zip(after, before))
    assert held(model) == was and not any(m._forward_hooks for m in model.modules())
    model(x[:1])
    assert t.features.shape[0] == 2  # nobody looks any more


@pytest.mark.parametrize("method", ["dtps", "etps", "tome", "dpcknn"])
@torch.no_grad()
def test_host(small, images, method):
    model = tpbook.prune(small(), method, keep_ratio=0.6)
    with tpbook.trace(model) as t:
        model(images(model))
    for kept, host in zip(t.kept, t.host, strict=True):
        assert host.shape == (2, 36)
        assert torch.equal(host.gather(1, kept), kept)  # itself for kept patches
        assert all(set(h.tolist()) <= set(k.tolist()) for h, k in zip(host, kept))
    for first, second in zip(t.host, t.host[1:]):  # transitive: who shared a host goes on sharing
        assert torch.equal(second.gather(1, first), second)


def test_training(small, images):
    model = tpbook.prune(small(), "dtps").train()
    with tpbook.trace(model) as t:
        logits = model(images(model))
    assert t.kept == [] and len(t.decisions) == len(t.scores) == len(t.host) == 3
    for before, after in zip(t.decisions, t.decisions[1:]):
        assert (after <= before + 1e-6).all()
    assert t.decisions[-1].requires_grad and t.features.requires_grad
    logits.sum().backward()


def test_evit_trains_by_gathering(small, images):
    model = tpbook.prune(small(), "evit", keep_ratio=0.5).train()
    with tpbook.trace(model) as t:
        model(images(model)).sum().backward()
    assert [k.shape[1] for k in t.kept] == [19, 11, 7] and t.decisions == []
    assert (t.kept[0][:, -1] == -1).all()


def test_last_forward_and_errors(small, images):
    model = tpbook.prune(small(), "random")
    before = held(model)
    with tpbook.trace(model) as t:
        model(images(model))
        model(images(model, batch=3))
    assert len(t.kept) == 3 and t.kept[0].shape[0] == 3
    with pytest.raises(AssertionError), tpbook.trace(model):
        model(torch.zeros(1, 3, 7, 7))
    assert held(model) == before
    with pytest.raises(TypeError, match="VisionTransformer"), tpbook.trace(torch.nn.Linear(1, 1)):
        pass


@torch.no_grad()
def test_dense_model_gives_features(small, images):
    model = small()
    x = images(model)
    with tpbook.trace(model) as t:
        model(x)
    assert torch.equal(t.features, model.forward_features(x)[:, 1:]) and t.kept == []
