"""The small models of the digits: their committed weights, and that recipes and `load_backbone` know them by name."""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import tpbook
from tpbook import data, losses
from tpbook.book import results
from tpbook.training import loop, models, setup, sources
from tpbook.training.recipes import make

TOP = Path(__file__).parent.parent
PRETRAINED = TOP / "tpbook" / "pretrained"
NAMES = ("pvt_digits_56", "cvt_digits_56", "swin_digits_56", "lvvit_digits_56")


@pytest.fixture(scope="module")
def test():
    return data.digits("test")


@pytest.mark.parametrize("name", NAMES)
def test_committed_weights_do_what_is_said_of_them(name, test):
    path, said = PRETRAINED / f"{name}.safetensors", json.loads((PRETRAINED / f"{name}.json").read_text())
    assert path.stat().st_size <= 1e6
    model, stored = tpbook.load_backbone(name), load_file(path)
    state = model.state_dict()
    assert state.keys() == stored.keys() and not model.training
    assert all(torch.equal(state[key], value.to(state[key].dtype)) for key, value in stored.items())
    assert said["parameters"] == sum(p.numel() for p in model.parameters()) <= 450_000
    with torch.inference_mode():
        logits = torch.cat([model(images) for images in test.images.split(100)])
    right = int((logits.argmax(1) == test.labels).sum())
    assert abs(right - said["accuracy"]["right"]) <= 1  # another kernel may round another way
    assert said["accuracy"]["percent"] >= 90 and all(f"model={name}" in line for line in said["commands"])


@pytest.mark.parametrize("name", NAMES)
def test_names_are_timms_and_classes_are_asked_for(name, test):
    assert timm.is_model(name) and name in timm.list_models("*_digits_*")
    images = test.images[:2]
    model = timm.create_model(name, num_classes=3, drop_path_rate=0.1)
    assert model.train()(images).shape == (2, 3)
    assert data.eval_transform(model)(_picture()).shape == (1, 56, 56)
    own, other = tpbook.load_backbone(name), tpbook.load_backbone(name, num_classes=7)
    assert other(images).shape == (2, 7) and other.num_classes == 7 and own.num_classes == 10
    changed = {key for key, value in own.state_dict().items() if other.state_dict()[key].shape != value.shape}
    heads = model.get_classifier()
    heads = {id(p) for head in (heads if isinstance(heads, tuple) else (heads,)) for p in head.parameters()}
    assert changed == {key for key, p in model.named_parameters() if id(p) in heads}
    with pytest.raises(TypeError, match=f"'{name}' does not take these arguments"):
        tpbook.load_backbone(name, widht=3)
    with pytest.raises(ValueError, match="does not fit the model: it has other shapes in"):
        tpbook.load_backbone(name, in_chans=3)


def _picture():
    from PIL import Image

    return Image.new("L", (70, 60), 128)


@pytest.mark.parametrize("name", NAMES)
def test_recipes_know_them(name):
    model = models.build(make({"model": name, "start": "random"}), sources.DIGITS)
    assert isinstance(model, type(tpbook.load_backbone(name)))
    assert len(setup.optimizer_of(make({}), model).param_groups) == 2  # decayed or not
    with pytest.raises(ValueError, match="takes images of 1 channels and data 'imagenet' has 3"):
        models.build(make({"model": name, "start": "random", "data": "imagenet"}), sources.imagenet())


WITHOUT = """
import sys
sys.modules["transformers"] = None  # as if it were not installed
import timm, tpbook, tpbook.train
assert "sklearn" not in sys.modules
assert timm.is_model("cvt_digits_56")
try:
    tpbook.load_backbone("cvt_digits_56")
except ImportError as error:
    assert "cvt_digits_56" in str(error) and "pip install tpbook[huggingface]" in str(error), error
else:
    raise AssertionError
tpbook.prune(timm.create_model("pvt_digits_56"), "random")
"""


def test_nothing_but_cvt_needs_transformers():
    ran = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


# ------------------------------------------------------------------------------------------- LV-ViT's auxiliary head


def test_token_labels():
    torch.manual_seed(0)
    logits, tokens, labels = torch.randn(3, 10), torch.randn(3, 5, 10), torch.tensor([1, 7, 7])
    want = torch.stack([F.cross_entropy(tokens[b, i], labels[b]) for b, i in product(range(3), range(5))]).mean()
    terms = losses.classification(logits, labels, token_logits=tokens, aux_weight=0.25)
    torch.testing.assert_close(terms["aux"], want)
    torch.testing.assert_close(terms["total"], F.cross_entropy(logits, labels) + 0.25 * want)
    soft = losses.classification(logits, F.one_hot(labels, 10).float(), token_logits=tokens, aux_weight=0.25)
    torch.testing.assert_close(soft["total"], terms["total"])
    assert "aux" not in losses.classification(logits, labels)


def test_the_auxiliary_head_trains_where_a_recipe_says_so(test):
    from accelerate import Accelerator

    model = timm.create_model("lvvit_digits_56").train()
    for weight in (0.0, 0.5):
        model.zero_grad()
        recipe = make({"model": "lvvit_digits_56", "aux_weight": weight})
        terms = loop.terms_of(recipe, Accelerator(cpu=True), model, model, None, test.images[:4], test.labels[:4])
        terms["total"].backward()
        assert (model.aux_head.weight.grad is not None) == ("aux" in terms) == (weight > 0)
    tokens = model.aux_head(model.forward_features(test.images[:4])[:, 1:])
    want = F.cross_entropy(tokens.flatten(0, 1), test.labels[:4].repeat_interleave(196))
    assert abs(terms["aux"] - want) < 0.05  # batch norm in training
    with pytest.raises(ValueError, match="aux_weight must be 0 where a method prunes, got 0.5 and 'evit'"):
        make({"aux_weight": 0.5, "method": "evit"})
    with pytest.raises(ValueError, match="aux_weight must be 0 for model 'pvt_digits_56', which has no auxiliary head"):
        models.build(make({"model": "pvt_digits_56", "start": "random", "aux_weight": 0.5}), sources.DIGITS)


# ------------------------------------------------------------------------------------------------ the committed rows


def test_the_committed_matrix_of_backbones_is_whole():
    """Each model is there dense, and by its methods with three seeds; and fewer tokens cost less."""
    rows = json.loads((TOP / "notebooks" / "results" / "digits" / "backbones.json").read_text())["rows"]
    flat = ("random", "dynamicvit", "dtps", "etps")
    methods = {"vit_digits_patch4_56": flat, "lvvit_digits_56": flat, "pvt_digits_56": flat[:3],
               "cvt_digits_56": flat[:3], "swin_digits_56": flat[1:2]}  # fmt: skip
    for model, its in methods.items():
        ratios = (0.9, 0.7, 0.5) if model == "swin_digits_56" else (0.9, 0.7, 0.5, 0.3)
        (dense,) = [row for row in rows if row["model"] == model and row["method"] == "dense"]
        assert dense["n"] == 797
        if model in NAMES:
            said = json.loads((PRETRAINED / f"{model}.json").read_text())["accuracy"]
            assert abs(dense["right"] - said["right"]) <= 1
        for method in its:
            macs = [dense["macs"]]
            for ratio in ratios:
                cell = {"model": model, "method": method, "keep_ratio": ratio, "trained": True, "options": {}}
                assert results.correct(rows, **cell).shape == (3, 797)
                macs += {row["macs"] for row in rows if all(row[key] == value for key, value in cell.items())}
            assert len(macs) == 1 + len(ratios) and macs[1:] == sorted(macs[1:], reverse=True)
    for row in rows:
        assert results.correct([row]).sum() == row["right"]
