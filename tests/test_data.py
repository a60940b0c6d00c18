"""Image folders, and what happens to those that are not as they should be."""

import os

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision.datasets import Imagenette

import tpbook
from tpbook import data

needs_data = pytest.mark.skipif(
    not os.path.isdir(os.path.join(os.environ.get("TPBOOK_DATA", "-"), data.IMAGENETTE)), reason="needs TPBOOK_DATA"
)


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A small `imagenette2-160` under TPBOOK_DATA: two classes, seen and held-out files in both folders."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for wnid in ("n03888257", "n01440764"):
            folder = tmp_path / data.IMAGENETTE / split / wnid
            folder.mkdir(parents=True)
            for name in (f"{wnid}_1.JPEG", f"{wnid}_2.JPEG", "ILSVRC2012_val_00000001.JPEG"):
                Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8)).save(folder / name)
            (folder / "notes.txt").write_text("not an image")
    monkeypatch.setenv("TPBOOK_DATA", str(tmp_path))
    return tmp_path / data.IMAGENETTE


def test_labels_are_imagenet_indices(tree):
    folder = data.ImageNetFolder(tree / "train")
    assert folder.class_indices == (0, 701) and len(folder) == 6
    assert [folder[i][1] for i in (0, 5)] == [0, 701]
    assert data.class_name(0) == "tench" and data.class_name(701) == "parachute"


def test_imagenette_splits(tree):
    def names(split):
        parts = getattr(data.imagenette(split), "datasets", [data.imagenette(split)])
        return [os.path.basename(path) for part in parts for path, _ in part.samples]

    assert len(names("test")) == 4 and all(n.startswith("ILSVRC2012_val_") for n in names("test"))
    assert len(names("train")) == len(names("val")) == 4 and not any("val" in n for n in names("train"))
    with pytest.raises(ValueError, match="split.*'valid'"):
        data.imagenette("valid")


def test_images_of_every_mode_become_rgb(tree):
    folder = tree / "train" / "n01440764"
    for i, mode in enumerate(("L", "RGBA", "P", "CMYK", "1")):
        Image.new(mode, (8, 8)).save(folder / f"m{i}.{'jpg' if mode == 'CMYK' else 'png'}")
    assert {image.mode for image, _ in data.ImageNetFolder(folder.parent)} == {"RGB"}


@pytest.mark.parametrize("content", [b"", b"no image", b"P6 1", "truncated"])
def test_image_that_does_not_decode(tree, content):
    bad = tree / "train" / "n01440764" / "a.JPEG"
    if content == "truncated":
        content = (bad.parent / "n01440764_1.JPEG").read_bytes()[:-200]
    bad.write_bytes(content)
    folder = data.ImageNetFolder(tree / "train", pattern="a.JPEG")
    with pytest.raises(ValueError, match="a.JPEG does not decode"):
        folder[0]


def test_bad_folders(tree, monkeypatch):
    with pytest.raises(ValueError, match="no image file matching 'x"):
        data.ImageNetFolder(tree / "train", pattern="x*")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data.ImageNetFolder(tree / "nowhere")
    (tree / "train" / "cats").mkdir()
    with pytest.raises(ValueError, match="cats is no WordNet id"):
        data.ImageNetFolder(tree / "train")
    with pytest.raises(FileNotFoundError, match="nips2017-dev.*get nips2017-dev"):
        data.nips2017_dev()
    monkeypatch.delenv("TPBOOK_DATA")
    with pytest.raises(FileNotFoundError, match="TPBOOK_DATA is not set"):
        data.root("imagenette2-160")


def test_an_empty_data_set(tmp_path):
    with pytest.raises(ValueError, match="holds no image folder"):
        data.ImageNetFolder(tmp_path)


def test_get(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TPBOOK_DATA", str(tmp_path))
    for name, says in (("nips2017-dev", "CC-BY"), ("imagenet", "image-net.org"), ("cifar", "NAME must be one of")):
        with pytest.raises(SystemExit) as stop:
            data.main(["get", name])
        assert says in str(stop.value)

    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(data, "download_and_extract_archive", no_network)
    with pytest.raises(SystemExit, match="could not be downloaded: no route to host"):
        data.main(["get", data.IMAGENETTE])
    assert list(tmp_path.iterdir()) == []  # nothing half-made

    def archive(url, part, md5):
        (part / url.rpartition("/")[2].removesuffix(".tgz")).mkdir()
        assert len(md5) == 32

    monkeypatch.setattr(data, "download_and_extract_archive", archive)
    for name in (data.IMAGENETTE, data.IMAGEWOOF):
        data.main(["get", name])
        assert capsys.readouterr().out.strip() == str(tmp_path / name) and (tmp_path / name).is_dir()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name, size", [("deit_tiny_patch16_224", 224), ("eva02_tiny_patch14_336", 336)])
def test_eval_transform_is_timms(name, size):
    image, model = Image.new("RGB", (300, 500)), timm.create_model(name, depth=1)
    assert data.eval_transform(model)(image).shape == (3, size, size)
    assert data.eval_transform(tpbook.prune(model, "random", at=(0,)))(image).shape == (3, size, size)


@needs_data
def test_the_real_sets():
    test = data.imagenette("test")
    assert (
        len(test) == 500 and len(data.imagenette("train")) == 9469 - 366 and len(data.imagenette("val")) == 3925 - 134
    )
    for name, (_, md5) in data.ARCHIVES.items():
        assert name != data.IMAGENETTE or md5 == Imagenette._ARCHIVES["160px"][1]
    photos = data.nips2017_dev()
    assert len(photos) == 1000 and len(photos.class_indices) == 430
    rows = data.attribution()
    for path, target in photos.samples:
        row = rows[os.path.relpath(path, photos.root)]
        assert int(row["imagenet_index"]) == target and row["author"] and row["license"] and row["landing_url"]
        assert "\\" not in row["author"]
    assert {"Frédéric BISSON", "總統府"} <= {row["author"] for row in rows.values()}


def test_digits():
    digits = data.digits()
    assert digits.images.shape == (797, 1, 56, 56) and digits.digit_patches.shape == (797, 196)
    assert digits.images.dtype == torch.float32 and digits.labels.dtype == torch.int64
    assert abs(digits.images.mean()) < 0.1 and abs(digits.images.std() - 1) < 0.1
    assert digits.labels.unique().tolist() == list(range(10))
    assert 4 <= digits.digit_patches.sum(1).min() and digits.digit_patches.sum(1).max() <= 64
    image, label = digits[5]
    assert torch.equal(image, digits.images[5]) and label == digits.labels[5]

    again, other = data.digits(), data.digits(seed=1)
    assert torch.equal(again.images, digits.images)
    for held in (again.images, again.labels, again.digit_patches):  # is the caller's, to write into as well
        held.zero_()
    anew = data.digits()
    assert torch.equal(anew.images, digits.images) and torch.equal(anew.labels, digits.labels)
    assert torch.equal(anew.digit_patches, digits.digit_patches)
    assert not torch.equal(other.images, digits.images) and torch.equal(other.labels, digits.labels)
    assert len(data.digits("train", per_digit=2)) == 2000

    brightness = (digits.images.unfold(2, 4, 4).unfold(3, 4, 4).mean((-1, -2))).flatten(1)
    on, off = brightness[digits.digit_patches].mean(), brightness[~digits.digit_patches].mean()
    assert on > off + 1  # the digit is where the patches say
    for bad in ({"split": "val"}, {"per_digit": 0}, {"fragments": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}.*{next(iter(bad.values()))}"):
            data.digits(**bad)


def test_no_digit_is_in_both_splits():
    from sklearn.datasets import load_digits

    from tpbook.digits import _glyphs

    assert len(_glyphs("train")[0]) == 1000 and len(_glyphs("test")[0]) == 797
    train, test = ({glyph.tobytes() for glyph in _glyphs(split)[0][16]} for split in ("train", "test"))
    assert not train & test
    assert len(train | test) == len({image.tobytes() for image in load_digits().images})
