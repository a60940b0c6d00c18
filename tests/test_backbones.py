"""Weights are the right ones, or there is an error that says what is wrong."""

import argparse
import json
from importlib.resources import files

import pytest
import timm
import torch
from safetensors.torch import save_file

import tpbook


def test_digits_model_is_as_good_as_it_says():
    claim = json.loads((files("tpbook") / "weights" / "vit_digits_patch4_56.json").read_text())
    model, test = tpbook.load_backbone("vit_digits_patch4_56"), tpbook.data.digits("test")
    with torch.inference_mode():
        logits = torch.cat([model(x) for x in test.images.split(100)])
    right = int((logits.argmax(1) == test.labels).sum())
    n = len(test)
    assert n == claim["test_images"] == 797
    assert abs(right - claim["right"]) <= 2  # another build of torch may flip one or two
    assert claim["accuracy"] == claim["right"] / n and claim["wilson_95"][0] < claim["accuracy"] < claim["wilson_95"][1]


def test_weights_folder_comes_first(tmp_path, monkeypatch):
    model = timm.create_model("deit_tiny_patch16_224")
    save_file(model.state_dict(), tmp_path / "deit_tiny_patch16_224.safetensors")
    monkeypatch.setenv("TPBOOK_WEIGHTS", str(tmp_path))
    loaded = tpbook.load_backbone("deit_tiny_patch16_224")
    assert not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))


def test_never_random_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TPBOOK_WEIGHTS", str(tmp_path))

    def offline(name, pretrained=False, **kwargs):
        assert pretrained
        raise OSError("offline")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(RuntimeError, match="deit_small_patch16_224.*offline"):
        tpbook.load_backbone("deit_small_patch16_224")
    monkeypatch.delenv("TPBOOK_WEIGHTS")
    with pytest.raises(RuntimeError, match="TPBOOK_WEIGHTS is not set"):
        tpbook.load_backbone("deit_small_patch16_224")
    with pytest.raises(ValueError, match="'deit_micro'"):
        tpbook.load_backbone("deit_micro")


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_official_files(small, images, tmp_path, suffix, wrapped):
    source, model = (tpbook.prune(small(), "dtps") for _ in range(2))
    x, path = images(model), tmp_path / f"dtps.{suffix}"
    if suffix == "safetensors":
        save_file(source.state_dict(), path)
    else:  # as DeiT-style training scripts write them
        state = {"model": source.state_dict(), "epoch": 29, "args": argparse.Namespace(lr=1e-3)}
        torch.save(state if wrapped else source.state_dict(), path)
    assert tpbook.load_checkpoint(model, path) is model
    assert torch.equal(model(x), source(x))


def test_checkpoints_that_do_not_fit(small, tmp_path):
    model, path = small(), tmp_path / "w.safetensors"
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: torch.randn_like(v) for k, v in model.state_dict().items()}
    cases = {
        r"misses 1 keys: norm\.weight": {k: v for k, v in state.items() if k != "norm.weight"},
        r"unexpected 1 keys: extra\.bias": state | {"extra.bias": torch.zeros(1)},
        r"shapes in 1 keys: head\.weight \(1000, 48\) for \(10, 48\)": state | {"head.weight": torch.zeros(1000, 48)},
        r"misses 80 keys: .*, …; has unexpected 1 keys": {"w": torch.zeros(1)},
    }
    for says, content in cases.items():
        save_file(content, path)
        with pytest.raises(ValueError, match=r"w\.safetensors.*" + says):
            tpbook.load_checkpoint(model, path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(FileNotFoundError, match="gone.pth"):
        tpbook.load_checkpoint(model, tmp_path / "gone.pth")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_truncated_files(small, tmp_path, suffix):
    model, path = small(), tmp_path / f"w.{suffix}"
    save_file(model.state_dict(), path) if suffix == "safetensors" else torch.save(model.state_dict(), path)
    whole = path.read_bytes()
    for share in (0, 0.1, 0.5, 0.99):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=rf"w\.{suffix}"):
            tpbook.load_checkpoint(model, path)


def test_pickled_code_is_never_run(small, tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="evil.pth holds more than tensors"):
        tpbook.load_checkpoint(small(), tmp_path / "evil.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="list.pth holds no state dict"):
        tpbook.load_checkpoint(small(), tmp_path / "list.pth")
