"""The engine gives what the official code gives, from the official state dicts."""

import pytest
import timm
import torch

import tpbook
from tpbook.methods.tps import squeeze, squeeze_masked

CASES = {
    "dynamicvit": ("dynamicvit", {}),
    "dtps": ("dtps", {}),
    "evit_fuse": ("evit", {}),
    "evit_drop": ("evit", {"fuse": False}),
}


def load(method, tensors, **options):
    model = timm.models.VisionTransformer(embed_dim=48, depth=6, num_heads=3, num_classes=10)
    tpbook.prune(model, method, keep_ratio=0.7, at=(1, 3, 4), **options)
    state = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    model.load_state_dict(state, strict=True)
    return model


@pytest.mark.usefixtures("stages")
@pytest.mark.parametrize("name", CASES)
def test_eval(official, name):
    method, options = CASES[name]
    want = official(name)
    model = load(method, want, **options).eval()
    with torch.no_grad(), tpbook.trace(model) as t:
        logits = model(want["images"])
    torch.testing.assert_close(logits, want["logits"], atol=1e-5, rtol=0)
    for s in range(3):
        if f"kept.{s}" in want:
            assert torch.equal(t.kept[s], want[f"kept.{s}"])
        if f"topk.{s}" in want:
            kept = want[f"topk.{s}"]
            assert torch.equal(t.scores[s].topk(kept.shape[1]).indices, kept)


@pytest.mark.parametrize("name", ["dynamicvit", "dtps"])
def test_train(official, name):
    want = official(name)
    if "train.logits" not in want:
        pytest.skip("training forwards are in the full fixtures only")
    model = load(name, want).train()
    torch.manual_seed(11)
    with tpbook.trace(model) as t:
        logits = model(want.get("train.images", want["images"]))
    torch.testing.assert_close(logits, want["train.logits"], atol=1e-4, rtol=0)
    if "train.features" in want:
        torch.testing.assert_close(t.features, want["train.features"], atol=1e-4, rtol=0)
    for s in range(3):
        assert torch.equal(t.decisions[s].round(), want[f"train.decisions.{s}"].round())
    logits.square().sum().backward()
    for p in model.score_predictor.parameters():
        assert p.grad.abs().max() > 0


def test_squeeze(official):
    want = official("tps_squeeze")
    got, _ = squeeze(want["eval.kept"], want["eval.pruned"])
    torch.testing.assert_close(got, want["eval.out"], atol=1e-6, rtol=0)
    got, _ = squeeze_masked(want["train.tokens"], want["train.prev"][..., 0], want["train.keep"][..., 0])
    torch.testing.assert_close(got, want["train.out"], atol=1e-6, rtol=0)
