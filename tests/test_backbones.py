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
    claim = json.loads((files("tpbook") / "pretrained" / "vit_digits_patch4_56.json").read_text())
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


NAME = "test_vit"  # timm's smallest, 160 px


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Random weights of `NAME`, where timm's hub gives them → (their model, the file that would come first)."""
    model = timm.create_model(NAME)
    save_file(model.state_dict(), tmp_path / "hub.safetensors")
    create = timm.create_model

    def hub(name, pretrained=False, pretrained_cfg_overlay=None, **kwargs):
        overlay = pretrained_cfg_overlay or {"file": str(tmp_path / "hub.safetensors")}
        return create(name, pretrained=pretrained, pretrained_cfg_overlay=overlay, **kwargs)

    monkeypatch.setattr(timm, "create_model", hub)
    folder = tmp_path / "weights"
    folder.mkdir()
    monkeypatch.setenv("TPBOOK_WEIGHTS", str(folder))
    return model, folder / f"{NAME}.safetensors"


@pytest.mark.parametrize("keys", [
    {}, {"num_classes": 10}, {"num_classes": 0}, {"img_size": 224}, {"in_chans": 1}, {"in_chans": 4, "num_classes": 7},
    {"drop_path_rate": 0.1, "num_classes": 1000},
], ids=str)  # fmt: skip
def test_a_file_is_adapted_as_the_hubs_weights_are(places, keys):
    source, path = places
    loaded = [tpbook.load_backbone(NAME, **keys)]
    save_file(source.state_dict(), path)
    loaded.append(tpbook.load_backbone(NAME, **keys))
    new = keys.get("num_classes", 1000) != 1000
    for (name, hub), (own_name, own) in zip(*(model.state_dict().items() for model in loaded), strict=True):
        assert name == own_name and hub.shape == own.shape
        assert torch.equal(hub, own) != (new and name.startswith("head.")), name
    state, theirs = loaded[1].state_dict(), source.state_dict()
    same = [name for name in theirs if name in state and torch.equal(state[name], theirs[name])]
    other = {"img_size": 1, "in_chans": 1, "num_classes": 2 * new}
    assert len(same) == len(theirs) - sum(other.get(key, 0) for key in keys)
    channels = keys.get("in_chans", 3)
    assert state["patch_embed.proj.weight"].shape[1] == channels
    total = theirs["patch_embed.proj.weight"].sum(1)  # an image of equal channels gives what it gave
    torch.testing.assert_close(
        state["patch_embed.proj.weight"].sum(1), total, atol=1e-5, rtol=0
    ) if channels == 1 else 0
    assert loaded[1].num_classes == keys.get("num_classes", 1000) and not loaded[1].training
    size = keys.get("img_size", 160)
    assert loaded[1](torch.randn(1, channels, size, size)).shape[1] == (loaded[1].num_classes or 64)


def test_a_files_own_head(places):
    """Another number of classes is taken from the file where that has it, and never made up unasked."""
    path, small = places[1], timm.create_model(NAME, num_classes=7)
    save_file(small.state_dict(), path)
    assert torch.equal(tpbook.load_backbone(NAME, num_classes=7).head.weight, small.head.weight)
    assert tpbook.load_backbone(NAME, num_classes=3).head.weight.shape == (3, 64)
    with pytest.raises(ValueError, match=r"test_vit.safetensors does not fit test_vit:.*\[7, 64\]"):
        tpbook.load_backbone(NAME)
    headless = {k: v for k, v in small.state_dict().items() if not k.startswith("head.")}
    save_file(headless, path)
    assert tpbook.load_backbone(NAME, num_classes=0).num_classes == 0
    with pytest.raises(ValueError, match='does not fit test_vit:.*"head.weight"'):
        tpbook.load_backbone(NAME)
    save_file({k: v for k, v in headless.items() if k != "norm.weight"}, path)
    for keys in ({"num_classes": 5}, {"num_classes": 0}):
        with pytest.raises(ValueError, match='does not fit test_vit:.*"norm.weight"'):
            tpbook.load_backbone(NAME, **keys)
    path.write_bytes(path.read_bytes()[:100])
    for keys in ({}, {"num_classes": 5}):
        with pytest.raises(ValueError, match=r"test_vit\.safetensors"):
            tpbook.load_backbone(NAME, **keys)


def test_arguments_that_the_model_does_not_take(places, monkeypatch):
    for name in (NAME, "vit_digits_patch4_56"):
        with pytest.raises(TypeError, match=f"{name!r} does not take these arguments:.*'num_clases'"):
            tpbook.load_backbone(name, num_clases=10)
        for wrong in (-1, "ten", True):
            with pytest.raises(TypeError, match=f"num_classes must be an int of at least 0, got {wrong!r}"):
                tpbook.load_backbone(name, num_classes=wrong)
    save_file(places[0].state_dict(), places[1])
    with pytest.raises(TypeError, match="'test_vit' does not take these arguments:.*'num_clases'"):
        tpbook.load_backbone(NAME, num_clases=10)
    digits = tpbook.load_backbone("vit_digits_patch4_56", num_classes=3)
    assert digits.head.weight.shape == (3, 64)
    name, create = "naflexvit_base_patch16_gap", timm.create_model
    small = create(name, embed_dim=32, depth=1, num_heads=2, in_chans=1)
    monkeypatch.setattr(
        timm, "create_model", lambda name, **kwargs: small
    )  # timm warns and leaves its embedding random
    with pytest.raises(ValueError, match=f"in_chans must be 3 for {name!r}, got 1"):
        tpbook.load_backbone(name, in_chans=1)


@pytest.mark.parametrize("key", ["state_dict", "model", None])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", ""])
def test_checkpoints_as_people_have_them(small, tmp_path, prefix, key):
    source, model, path = small(), small(), tmp_path / "w.pth"
    state = {prefix + name: tensor for name, tensor in source.state_dict().items()}
    torch.save({key: state, "epoch": 3, "optimizer": {}} if key else state, path)
    tpbook.load_checkpoint(model, path)
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), model.state_dict().values()))


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
