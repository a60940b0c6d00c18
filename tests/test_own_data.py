"""Data of one's own: folders with any names, sets of torchvision and Hugging Face; trainings that go on from others."""

import gzip
import json
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config
from torchvision.transforms.functional import pil_to_tensor

import tpbook
from tpbook import data, train
from tpbook.book import own
from tpbook.training import models, sources
from tpbook.training.loop import taught
from tpbook.training.recipes import make, read
from tpbook.training.sources import source_of
from tpbook.weights import told

RECIPES = Path(__file__).parent.parent / "recipes" / "inaturalist"
NAMES = ("cat", "dog", "it's odd!")
SMALL = {
    "model": "test_vit",
    "data": "pets",
    "batch": 4,
    "lr": 1e-3,
    "workers": 0,
}  # 6 blocks, 100 patches of 160 pixels


def picture(seed, size=(40, 30), mode="RGB"):
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def grow(folder, names=NAMES, images=4):
    for i, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for j in range(images):
            picture(100 * i + j).save(folder / name / f"{j}.png")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with `pets/train` and `pets/val`, and weights of a small ViT and a small ConvNet of ImageNet-1k."""
    grow(tmp_path / "pets" / "train")
    grow(tmp_path / "pets" / "val", images=2)
    monkeypatch.setenv("TPBOOK_DATA", str(tmp_path))
    monkeypatch.setenv("TPBOOK_WEIGHTS", str(tmp_path))
    for name in ("test_vit", "test_resnet"):
        torch.manual_seed(0)
        model = timm.create_model(name)
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    return tmp_path


def go(out, **keys):
    return train.run(make({**SMALL, **keys}), out, progress=False)


def source(**keys):
    return source_of(make({**SMALL, **keys}))


# -------------------------------------------------------------------------------------------------------- image folders


def test_from_the_command_line_to_a_named_prediction(home, capsys, monkeypatch):
    recipe = home / "recipe.yaml"
    recipe.write_text("\n".join(f"{key}: {value}" for key, value in SMALL.items()))
    monkeypatch.chdir(home)
    train.main([str(recipe), "data=pets", f"out={home / 'run'}", "precision=fp32"])
    assert "of 6 test images right" in capsys.readouterr().out
    result = json.loads((home / "run" / "result.json").read_text())
    assert result["classes"] == list(NAMES) and result["num_classes"] == 3
    confusion = np.array(result["confusion"])
    assert confusion.sum(1).tolist() == [2, 2, 2] and confusion.trace() == result["accuracy"]["right"]
    assert told(home / "run" / "model.safetensors") == {"model": "test_vit", "method": "", "classes": list(NAMES)}

    model = train.load(home / "run")
    assert model.pretrained_cfg["label_names"] == NAMES
    recipe = make({**SMALL, "start": str(home / "run")})
    images, labels = train.test_tensors(recipe, model)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    with torch.no_grad():
        taken = model(images).argmax(1)
    assert [[int(((labels == i) & (taken == j)).sum()) for j in range(3)] for i in range(3)] == result["confusion"]
    # the weights are the pretrained ones but for a new head, trained a little
    start = load_file(home / "test_vit.safetensors")
    ends = model.state_dict()
    assert ends["head.weight"].shape[0] == 3 and start["head.weight"].shape[0] == 1000
    assert 0 < (ends["pos_embed"] - start["pos_embed"]).abs().max() < 0.05


def test_a_path_will_do(home, monkeypatch):
    monkeypatch.delenv("TPBOOK_DATA")
    assert source(data=str(home / "pets"))[0].names == NAMES
    monkeypatch.chdir(home)
    classes, images, test = source(data="pets")
    assert classes.names == NAMES and classes.found == (0, 1, 2) and classes.own
    assert [label for _, label in images] == sorted([0, 1, 2] * 4) and len(test) == 6


def test_every_kind_of_image_is_rgb(home):
    for i, mode in enumerate(("L", "CMYK", "RGBA", "P", "1", "I;16")):
        kind = "tif" if mode == "CMYK" else "png"
        saved = picture(i, mode="L" if mode == "I;16" else mode)
        (saved.convert("I;16") if mode == "I;16" else saved).save(home / "pets/train/cat" / f"m{i}.{kind}")
    modes = {image.mode for image, _ in source()[1]}
    assert modes == {"RGB"} and len(source()[1]) == 18


def test_classes_of_the_two_folders(home):
    for file in (home / "pets/val/cat").iterdir():
        file.unlink()
    (home / "pets/val/cat").rmdir()
    assert [label for _, label in source()[2]] == [1, 1, 2, 2]  # and not counted anew
    assert np.array(go(home / "run", epochs=1)["confusion"]).sum(1).tolist() == [0, 2, 2]
    grow(home / "pets/val", ["cow"])
    with pytest.raises(ValueError, match="class folder .*val/cow has no like among the training images"):
        source()


@pytest.mark.parametrize("content", [b"", b"no image", "cut"])
def test_an_image_that_does_not_decode_is_named(home, content):
    bad = home / "pets/train/dog/2.png"
    bad.write_bytes(bad.read_bytes()[:900] if content == "cut" else content)
    with pytest.raises(ValueError, match="dog/2.png does not decode as an image"):
        go(home / "run")
    assert not (home / "run" / "result.json").exists()


def test_folders_that_are_no_data_set(home):
    (home / "pets/train/cow").mkdir()
    (home / "pets/train/.ipynb_checkpoints").mkdir()
    with pytest.raises(ValueError, match="class folder .*train/cow holds no image"):
        source()
    (home / "pets/train/cow").rmdir()
    assert source()[0].names == NAMES  # hidden folders are no class
    grow(home / "pets/train", ["n01440764"])
    with pytest.raises(ValueError, match="folder .*cat is no WordNet id"):  # some are, so a typing error is likely
        source()
    with pytest.raises(FileNotFoundError, match=r"no data set 'cifar100'.*did you mean 'torchvision:CIFAR100'"):
        source(data="cifar100")
    with pytest.raises(FileNotFoundError, match="no data set 'nowhere'.*no such folder here$"):
        source(data="nowhere")
    (home / "bare/train").mkdir(parents=True)
    with pytest.raises(ValueError, match="bare/train holds no image folder; one a class is expected"):
        source(data="bare")


def test_a_share_of_each_class_is_the_test_set(home):
    grow(home / "flat", images=10)
    picture(1).save(home / "flat/cat/more.png")

    def files(images):
        return [images.dataset.samples[i][0] for i in images.which]

    classes, images, test = source(data="flat", held_out=0.2)
    assert classes.names == NAMES and [label for _, label in test] == [0, 0, 1, 1, 2, 2] and len(images) == 25
    assert not set(files(images)) & set(files(test))
    assert files(source(data="flat", held_out=0.2, seed=5)[2]) == files(test)  # a run's seed changes nothing
    assert files(source(data="flat", held_out=0.2, split_seed=1)[2]) != files(test)
    assert len(source(data="flat", held_out=0.01)[2]) == 3 and len(source(data="flat", held_out=1.0)[1]) == 3
    with pytest.raises(ValueError, match="'flat' has no test set .*held_out must say what share"):
        source(data="flat")
    with pytest.raises(ValueError, match="held_out must be 0 where data has a test set, as 'pets'; got 0.2"):
        source(held_out=0.2)
    with pytest.raises(ValueError, match=r"held_out must lie in \[0, 1\], got -0.1"):
        source(held_out=-0.1)
    grow(home / "flat", ["emu"], images=1)
    with pytest.raises(ValueError, match="held_out needs two images of a class; 'emu' of 'flat' has 1"):
        source(data="flat", held_out=0.2)


def test_photographs_in_a_folder_are_learned(home):
    """From files to accuracy: a model with random weights tells pieces of scikit-learn's two photographs apart."""
    from sklearn.datasets import load_sample_images

    photographs, drawn = load_sample_images(), np.random.default_rng(0)
    for file, pixels in zip(photographs.filenames, photographs.images):
        folder = home / "pieces" / file.rpartition("/")[2]
        folder.mkdir(parents=True)
        for i in range(40):
            y, x = drawn.integers(0, (pixels.shape[0] - 160, pixels.shape[1] - 160))
            Image.fromarray(pixels[y : y + 160, x : x + 160]).save(folder / f"{i}.jpg")
    result = go(home / "run", data="pieces", start="random", held_out=0.25, epochs=4, batch=10, lr=2e-3)
    assert result["classes"] == ["china.jpg", "flower.jpg"] and result["accuracy"]["n"] == 20
    assert result["accuracy"]["percent"] >= 85


def test_the_chapters_sample(home):
    """Pieces of the left of three photographs, and of the right; what to look at in a folder."""
    folder = own.sample("digits", home / "sample")
    classes, images, test = source(data="sample")
    assert classes.names == tuple(own.PIECES) == ("flower", "it's a portrait!", "temple")
    assert own.counts(classes, train=images, test=test).to_dict("list") == {"train": [80] * 3, "test": [30] * 3}
    assert own.in_both(images, test) == 0
    (folder / "val/temple/again.jpg").write_bytes((folder / "train/flower/003.jpg").read_bytes())
    _, images, test = source(data="sample")
    assert own.in_both(images, test) == 1 and own.counts(classes, test=test)["test"]["temple"] == 31
    begun = folder.stat().st_mtime
    assert own.sample("digits", folder).stat().st_mtime == begun  # what is there stays
    assert all(name in own.credits(folder, "digits") for name in ("vultilion", "danielbuechele", "U.S. Navy"))


# ------------------------------------------------------------------------------------------- torchvision, Hugging Face


def pets_of_oxford(root):
    base = root / "oxford-iiit-pet"
    (base / "images").mkdir(parents=True)
    (base / "annotations").mkdir()
    for split, n in (("trainval", 3), ("test", 2)):
        lines = []
        for i, name in enumerate(("Abyssinian", "great_dane")):
            for j in range(n):
                picture(i + j).save(base / "images" / f"{name}_{split}{j}.jpg")
                lines.append(f"{name}_{split}{j} {i + 1} 1 1")
        (base / "annotations" / f"{split}.txt").write_text("\n".join(lines))


def mnist(root):
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, n in (("train", 20), ("t10k", 10)):
        images = np.random.default_rng(0).integers(0, 256, (n, 28, 28), dtype=np.uint8)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, n, 28, 28) + images.tobytes())
        labels = (np.arange(n) % 10).astype(np.uint8)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, n) + labels.tobytes())
        for file in raw.glob(f"{split}*ubyte"):
            with gzip.open(file.with_suffix(".gz"), "wb") as packed:
                packed.write(file.read_bytes())


def inaturalist(root):
    for place in ("Birds/0", "Plants/1", "Birds/2"):
        (root / "2019" / place).mkdir(parents=True)
        for j in range(3):
            picture(j).save(root / "2019" / place / f"{j}.jpg")


@pytest.mark.parametrize(
    "lay, named, more, names, sizes",
    [
        (pets_of_oxford, "OxfordIIITPet", {}, ("Abyssinian", "Great Dane"), (6, 4)),
        (mnist, "MNIST", {}, ("0 - zero", "1 - one"), (20, 10)),
        (inaturalist, "INaturalist?version=2019", {"held_out": 0.3}, ("Birds/0", "Plants/1", "Birds/2"), (6, 3)),
    ],
    ids=["pets", "mnist", "inaturalist"],
)
def test_sets_of_torchvision(home, lay, named, more, names, sizes):
    lay(home)
    classes, images, test = source(data=f"torchvision:{named}", **more)
    assert classes.names[: len(names)] == names and classes.own and classes.found == tuple(range(len(classes.names)))
    assert (len(images), len(test)) == sizes
    image, label = images.seen_by(pil_to_tensor)[0]
    assert image.shape[0] == 3 and isinstance(label, int) and {label for _, label in test} <= set(classes.found)


@pytest.mark.parametrize(
    "named, error, words",
    [
        (
            "torchvision:CIFAR10O",
            ValueError,
            "must name a set of torchvision.datasets.*'CIFAR10O'; did you mean 'CIFAR10'",
        ),
        ("torchvision:OxfordIIITPet", FileNotFoundError, "get 'torchvision:OxfordIIITPet'` downloads it"),
        ("torchvision:MNIST?version=2", ValueError, "no option 'version' for torchvision:MNIST; it takes train"),
        ("torchvision:MNIST?root=/", ValueError, "no option 'root'"),
        ("torchvision:INaturalist?target_type=super", ValueError, "no option 'target_type'"),
        ("torchvision:INaturalist?version=1999", ValueError, "INaturalist.version=1999 does not take this.*1999"),
        ("torchvision:FakeData", ValueError, "must name a set of torchvision.datasets"),
        ("torchvision:", ValueError, "got ''"),
    ],
)
def test_what_torchvision_has_not(home, named, error, words):
    with pytest.raises(error, match=words):
        source(data=named)


def test_torchvision_downloads_only_when_told(home, monkeypatch):
    asked = []

    class Pet:
        classes = ("a", "b")

        def __init__(self, root, split="trainval", download=False):
            asked.append((root.name, split, download))

        def __getitem__(self, i):
            return None, 0

    monkeypatch.setattr(sources.torchvision.datasets, "OxfordIIITPet", Pet)
    data.get("torchvision:OxfordIIITPet")
    assert asked == [(home.name, "trainval", True), (home.name, "test", True)]
    sources.torchvision_sets("torchvision:OxfordIIITPet")
    assert asked[2:] == [(home.name, "trainval", False), (home.name, "test", False)]


def test_data_sets_of_hugging_face(home):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({
        "picture": datasets.Image(), "kind": datasets.ClassLabel(names=list(NAMES)),
        "mood": datasets.ClassLabel(names=["good", "bad"]), "note": datasets.Value("string"),
    })  # fmt: skip

    def rows(n):
        return datasets.Dataset.from_dict({
            "picture": [picture(i, mode="L" if i else "CMYK") for i in range(n)], "kind": [i % 3 for i in range(n)],
            "mood": [i % 2 for i in range(n)], "note": ["?"] * n,
        }, features=features)  # fmt: skip

    datasets.DatasetDict({"train": rows(9), "validation": rows(6)}).save_to_disk(home / "both")
    rows(12).save_to_disk(home / "one")
    classes, images, test = source(data="both?label=kind")
    assert classes.names == NAMES and (len(images), len(test)) == (9, 6)
    assert [label for _, label in images] == [0, 1, 2] * 3 and images[0][0].mode == images[1][0].mode == "RGB"
    assert source(data=f"{home}/both?label=mood&image=picture")[0].names == ("good", "bad")
    assert len(source(data="one?label=kind", held_out=0.25)[2]) == 3
    with pytest.raises(
        ValueError, match=r"\?label=….*must name one of its columns of ClassLabel: kind, mood; got None"
    ):
        source(data="both")
    with pytest.raises(ValueError, match="columns of Image: picture; got 'note'"):
        source(data="both?label=kind&image=note")
    assert go(home / "run", data="one?label=kind", held_out=0.25)["classes"] == list(NAMES)


# ----------------------------------------------------------------------------------------------------------- going on


@pytest.fixture
def dense(home):
    """A dense model trained on the pets."""
    go(home / "dense")
    return home / "dense"


def test_a_pruner_is_trained_on(home, dense):
    """At another ratio, for more epochs: it begins where the first training ended, predictors too."""
    begun = {"method": "dtps", "start": str(dense), "teacher": "start", "token_loss": "kl"}
    go(home / "first", **begun, keep_ratio=0.7)
    first = load_file(home / "first/model.safetensors")
    learned = [key for key in first if key.startswith("score_predictor.")]
    dense_weights = load_file(dense / "model.safetensors")
    assert learned and not torch.equal(first["head.weight"], dense_weights["head.weight"])

    recipe = make({**SMALL, **begun, "start": str(home / "first"), "keep_ratio": 0.5})
    classes = train.load_data(recipe)[0]
    model = train.build(recipe, classes)
    assert not set(model.state_dict()) & set(learned)  # dense
    models.take_along(recipe, train.adapt(recipe, model))
    assert model.keep_ratio == 0.5 and all(torch.equal(v, first[k]) for k, v in model.state_dict().items())
    result = go(home / "second", **begun | {"start": str(home / "first")}, keep_ratio=0.5)
    assert result["recipe"]["keep_ratio"] == 0.5 and train.load(home / "second").keep_ratio == 0.5

    start = str(home / "first")
    for method, keys in (("dynamicvit", {}), ("evit", {}), ("", {"mask_ratio": 0.5})):
        with pytest.raises(ValueError, match="start .* has .* that method 'dtps' learned .*drop_added=true"):
            go(home / f"not-{method}", start=start, method=method, **keys)
        go(home / f"other-{method}", start=start, method=method, drop_added=True, **keys)
    with pytest.raises(ValueError, match="another method or other stages learned"):
        go(home / "stages", start=start, method="dtps", at=[2])


def test_other_classes_get_another_head_and_say_so(home, dense):
    grow(home / "farm/train", ["cow", "pig", "sow"])
    grow(home / "farm/val", ["cow", "pig", "sow"])
    grow(home / "more/train", ["cow", "pig"])
    grow(home / "more/val", ["cow", "pig"])
    for name, n in (("farm", 3), ("more", 2)):  # of as many classes, and of fewer
        recipe = make({**SMALL, "data": name, "start": str(dense)})
        with pytest.warns(UserWarning, match=f"start .* is of other classes than data '{name}': the head begins anew"):
            model = train.build(recipe, train.load_data(recipe)[0])
        was = load_file(dense / "model.safetensors")
        assert model.num_classes == n and not torch.equal(model.head.weight, was["head.weight"][:n])
        assert torch.equal(model.norm.weight, was["norm.weight"])
        with pytest.raises(ValueError, match="teacher must know the classes of data"):
            train.teacher_of(make({**vars(recipe), "teacher": "start"}), train.load_data(recipe)[0], model)
    recipe = make({**SMALL, "start": str(dense)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = train.build(recipe, train.load_data(recipe)[0])
    assert torch.equal(model.head.weight, load_file(dense / "model.safetensors")["head.weight"])
    with pytest.raises(ValueError, match="the head of 'pretrained' would be new"):
        go(home / "untaught", method="evit", teacher="pretrained")


class One:
    """An accelerator of one process."""

    @staticmethod
    def autocast():
        return warnings.catch_warnings()


def test_a_teacher_of_another_architecture(home):
    """By its logits, on the student's images in its own normalisation."""
    grow(home / "fish/train", ["n01440764", "n01443537"])
    grow(home / "fish/val", ["n01440764", "n01443537"], images=2)
    keys = {"data": "fish", "head": "data", "method": "dynamicvit", "teacher": "test_resnet"}
    with pytest.raises(
        ValueError, match="token_weight must be 0 where teacher 'test_resnet' is no 'test_vit'.*got 0.5"
    ):
        go(home / "tokens", **keys)
    result = go(home / "run", **keys, token_weight=0.0)
    assert (
        result["last"]["logit_kl"] > 0 and result["last"]["token"] == 0 and result["classes"] == ["tench", "goldfish"]
    )

    recipe = make({**SMALL, **keys, "token_weight": 0.0})
    classes = train.load_data(recipe)[0]
    model = train.build(recipe, classes)
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    teacher = train.teacher_of(recipe, classes, model)
    plain = timm.create_model("test_resnet")
    plain.load_state_dict(load_file(home / "test_resnet.safetensors"))
    means = [
        torch.tensor(resolve_model_data_config(one)[key]).view(-1, 1, 1)
        for one in (model, plain)
        for key in ("mean", "std")
    ]
    pixels = torch.rand(2, 3, 160, 160)
    with torch.no_grad():
        want = plain.eval()((pixels - means[2]) / means[3])[:, [0, 1]]
    logits, features = taught(One, teacher, (pixels - means[0]) / means[1])
    torch.testing.assert_close(logits, want, atol=1e-5, rtol=1e-5)
    assert features is None and not any(p.requires_grad for p in teacher.parameters())

    with pytest.raises(
        ValueError, match="teacher must know the classes of data 'pets'.*head of 'test_resnet' would be new"
    ):
        go(home / "own", method="evit", teacher="test_resnet")


def test_a_teacher_that_was_trained_on_the_same_classes(home, dense):
    """A run of another architecture is found by its folder, and so is one of its own."""
    go(home / "big", model="test_vit3", start="random")
    result = go(home / "taught", method="etps", start=str(dense), teacher=str(home / "big"))
    assert result["last"]["logit_kl"] > 0
    recipe = make({**SMALL, "method": "etps", "start": str(dense), "teacher": str(home / "big")})
    classes = train.load_data(recipe)[0]
    teacher = train.teacher_of(recipe, classes, train.build(recipe, classes))
    assert isinstance(teacher, models.LogitTeacher) and teacher.model.pretrained_cfg["architecture"] == "test_vit3"
    same = make({**vars(recipe), "teacher": str(dense)})
    assert not isinstance(train.teacher_of(same, classes, train.build(same, classes)), models.LogitTeacher)


def test_exported_with_its_names(home, dense):
    onnx = pytest.importorskip("onnx")
    model = tpbook.prune(train.load(dense), "evit", keep_ratio=0.5)
    proto = onnx.load(tpbook.export(model, home / "model.onnx"))
    said = json.loads(next(one.value for one in proto.metadata_props if one.key == "tpbook"))
    assert said["classes"] == list(NAMES)


# --------------------------------------------------------------------------------------------------------- iNaturalist


def test_inaturalist_runs_as_written(home, monkeypatch):
    """Two steps by each recipe, the dense model and then dTPS from it, narrow and with three classes."""
    inaturalist(home)
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, **kwargs: create(name, **{**kwargs, "embed_dim": 48, "num_heads": 2})
    )
    save_file(timm.create_model("deit_small_patch16_224").state_dict(), home / "deit_small_patch16_224.safetensors")
    small = {"batch": 2, "epochs": 1, "precision": "bf16", "workers": 0, "max_steps": 2, "repeats": 1, "held_out": 0.3}
    base = train.run(RECIPES / "base.yaml", home / "base", progress=False, **small)
    result = train.run(RECIPES / "dtps.yaml", home / "dtps", progress=False, **small, start=str(home / "base"))
    assert base["classes"] == result["classes"] == ["Birds/0", "Plants/1", "Birds/2"]
    assert result["last"]["logit_kl"] > 0 and result["last"]["token"] > 0 and result["accuracy"]["n"] == 3
    for name in ("base", "dtps"):  # every line says where its value is from
        lines = [line for line in (RECIPES / f"{name}.yaml").read_text().splitlines() if line[:1] not in ("", "#")]
        assert all("  # " in line for line in lines) and read(RECIPES / f"{name}.yaml").held_out * 268_243 > 3_030
