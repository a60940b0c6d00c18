"""What a worker makes of a photograph, and what the device does to the batch: together timm's transform."""

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import to_pil_image

from tpbook import train
from tpbook.data import load_image
from tpbook.timing import loading as measured
from tpbook.timing.clock import interleaved
from tpbook.training import loop
from tpbook.training.loading import augmented, finisher, timms
from tpbook.training.recipes import make

RESULTS = Path(__file__).parent.parent / "notebooks" / "results"
RANDAUGMENT = "rand-m9-mstd0.5-inc1"


def picture(height, width, seed=0):
    """Colours that say where they are, red by column and green by row; and noise in blue."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(seed).integers(0, 256, (height, width))
    return Image.fromarray(np.stack([255 * x / (width - 1), 255 * y / (height - 1), noise], -1).astype(np.uint8))


def drawn(seed, call, *arguments):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return call(*arguments), (random.random(), np.random.rand(), torch.rand(()).item())


@pytest.fixture(scope="module")
def model():
    return timm.create_model("deit_tiny_patch16_224")


@pytest.mark.parametrize("size", [(160, 213), (240, 160), (224, 224), (500, 375), (40, 900)], ids=str)
def test_crops_and_flips_are_timms(model, size):
    recipe, image, right = make({"hflip": 0.5, "min_scale": 0.25}), picture(*size), []
    pillow, ours = timms(recipe, model, use_prefetcher=True), augmented(recipe, model)
    for seed in range(30):
        theirs, after = drawn(seed, pillow, image)
        got, after_ours = drawn(seed, ours, image)
        assert got.dtype == torch.uint8 and got.shape == theirs.shape == (3, 224, 224)
        assert after == after_ours  # as many random numbers, in that order
        right.append((got.int() - theirs.int()).abs())
    right = torch.stack(right)
    assert right.max() <= 2 and (right > 0).float().mean() < 0.02 and (right > 1).float().mean() < 1e-4


def boxes(transform, size, n=600):
    """(n, 4): area and aspect of what was cut out, where it begins, and whether it is flipped; by its colours."""
    image, found, (height, width) = picture(*size), [], size
    for _ in range(n):
        got = transform(image).float()
        left, right, top, bottom = got[0, :, :4].mean(), got[0, :, -4:].mean(), got[1, :4].mean(), got[1, -4:].mean()
        w, h = (right - left).abs() / 255 * width, (bottom - top) / 255 * height
        found.append([w * h / (width * height), w / h, min(left, right) / 255, left > right])
    return torch.tensor(found, dtype=torch.float64)


def test_the_distribution_without_a_shared_seed(model):
    recipe = make({"hflip": 0.3, "min_scale": 0.25})
    random.seed(1)
    torch.manual_seed(1)
    theirs = boxes(timms(recipe, model, use_prefetcher=True), (160, 213))
    ours = boxes(augmented(recipe, model), (160, 213))
    error = 5 * ((theirs.var(0) + ours.var(0)) / len(ours)).sqrt()  # five standard errors
    assert ((theirs.mean(0) - ours.mean(0)).abs() < error).all()
    assert ((theirs[:, :3].quantile(0.1, 0) - ours[:, :3].quantile(0.1, 0)).abs() < 0.08).all()
    area, aspect, _, flipped = ours.T
    assert 0.22 < area.min() < 0.3 and 0.9 < area.max() < 1.02 and 0.72 < aspect.min() and aspect.max() < 1.36
    assert 0.2 < flipped.mean() < 0.4


@pytest.mark.parametrize("keys, share", [({"hflip": 1.0}, 1), ({"hflip": 0.0}, 0)], ids=["always", "never"])
def test_keys_arrive(model, keys, share):
    found = boxes(augmented(make({"min_scale": 1.0, **keys}), model), (224, 224), 20)
    assert found[:, 3].mean() == share and found[:, 0].min() > 0.95


@pytest.mark.parametrize("keys", [{"color_jitter": 0.4}, {"auto_augment": RANDAUGMENT}], ids=["jitter", "RandAugment"])
def test_colours_are_timms(model, keys):
    """Where nothing is cut off and nothing resized, every level is the same."""
    recipe, changed = make({"min_scale": 1.0, "hflip": 0.5, **keys}), 0
    pillow, ours, image = timms(recipe, model, use_prefetcher=True), augmented(recipe, model), picture(224, 224)
    plain = augmented(make({"min_scale": 1.0, "hflip": 0.5}), model)
    for seed in range(30):
        theirs, after = drawn(seed, pillow, image)
        got, after_ours = drawn(seed, ours, image)
        assert torch.equal(got, theirs) and after == after_ours
        changed += not torch.equal(got, drawn(seed, plain, image)[0])
    assert changed >= 15


def test_interpolation_and_size_are_the_models():
    model = timm.create_model("mixer_b16_224.miil_in21k_ft_in1k")  # bilinear, its mean 0 and standard deviation 1
    recipe, image = make({"min_scale": 0.3}), picture(100, 90)
    theirs = drawn(3, timms(recipe, model, use_prefetcher=True), image)[0]
    got = drawn(3, augmented(recipe, model), image)[0]
    cubic = drawn(3, augmented(recipe, timm.create_model("deit_tiny_patch16_224")), image)[0]
    assert (got.int() - theirs.int()).abs().max() <= 2 < (got.int() - cubic.int()).abs().max()
    white = finisher(recipe, model, "cpu")(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))
    assert torch.equal(white, torch.ones(1, 3, 2, 2))


@pytest.mark.parametrize("erasing", [0.0, 0.5])
def test_a_batch_is_finished_as_timm_finishes_image_by_image(model, erasing):
    recipe = make({"random_erasing": erasing})
    images = torch.randint(0, 256, (24, 3, 224, 224), dtype=torch.uint8)
    last = timms(recipe, model, separate=True)[2]
    theirs, after = drawn(0, lambda: torch.stack([last(to_pil_image(image)) for image in images]))
    got, after_ours = drawn(0, finisher(recipe, model, torch.device("cpu")), images)
    torch.testing.assert_close(got, theirs, rtol=0, atol=2e-6)
    assert after == after_ours and got.dtype == torch.float32
    clean = finisher(make({}), model, "cpu")(images)
    erased = ((got != clean).flatten(1).any(1)).sum()
    assert 5 <= erased <= 19 if erasing else erased == 0


def test_floats_are_finished_already(model):
    images = torch.rand(2, 1, 56, 56)
    assert torch.equal(finisher(make({"random_erasing": 1.0}), model, "cpu")(images), images)


# ---------------------------------------------------------------------------------------------------------- the files


@pytest.fixture
def folder(tmp_path):
    """Photographs of every mode, and one that a camera lays on its side."""
    where = tmp_path / "photographs" / "a"
    where.mkdir(parents=True)
    for i in range(6):
        picture(40 + i, 60, i).save(where / f"{i}.jpg", quality=95)
    for mode, suffix in (("L", "jpg"), ("CMYK", "jpg"), ("RGBA", "png"), ("P", "png"), ("1", "png")):
        picture(50, 60).convert(mode).save(where / f"{mode}.{suffix}")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90°
    picture(40, 80).save(where / "turned.jpg", exif=exif)
    return where.parent


def batches(folder, transform, **options):
    return [b for b, _ in DataLoader(ImageFolder(folder, transform, loader=load_image), 4, **options)]


def test_files_of_every_mode(model, folder):
    recipe = make({"hflip": 0.5, "min_scale": 0.5})
    theirs = drawn(0, batches, folder, timms(recipe, model))[0]
    ours = drawn(0, batches, folder, augmented(recipe, model))[0]
    finish = finisher(recipe, model, "cpu")
    assert sum(map(len, ours)) == 12
    for a, b in zip(ours, theirs):
        assert a.dtype == torch.uint8 and (finish(a) - b).abs().max() < 0.04  # two levels of 255, by σ ≥ 0.224


def test_workers_repeat_what_the_generator_says(model, folder):
    recipe = make({"hflip": 0.5, "min_scale": 0.1, "color_jitter": 0.4})

    def seen(seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.cat(batches(folder, augmented(recipe, model), num_workers=2, generator=generator))

    first = seen(1)
    assert torch.equal(first, seen(1)) and not torch.equal(first, seen(2))


def test_a_corrupt_file_is_named(model, folder):
    (folder / "a" / "half.jpg").write_bytes((folder / "a" / "0.jpg").read_bytes()[:200])
    with pytest.raises(ValueError, match="half.jpg does not decode as an image"):
        batches(folder, augmented(make({}), model), num_workers=1)


def test_a_training_step_sees_finished_images(tmp_path, monkeypatch):
    for split in ("train", "val"):
        for wnid in ("n01440764", "n03888257"):
            (tmp_path / "flat" / split / wnid).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (60, 50), (200, 100, 0)).save(tmp_path / "flat" / split / wnid / f"{i}.png")
    monkeypatch.setenv("TPBOOK_DATA", str(tmp_path))
    seen, terms_of = [], loop.terms_of
    monkeypatch.setattr(loop, "terms_of", lambda *given: seen.append(given[5]) or terms_of(*given))
    recipe = {"data": "flat", "head": "data", "model": "deit_tiny_patch16_224", "start": "random", "batch": 4}
    train.run(make({**recipe, "hflip": 0.5}), tmp_path / "run", progress=False)
    mean, std = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
    wanted = (torch.tensor([200, 100, 0]) / 255 - mean) / std
    assert len(seen) == 1 and seen[0].dtype == torch.float32
    torch.testing.assert_close(seen[0], wanted.view(3, 1, 1).expand(4, 3, 224, 224))


# -------------------------------------------------------------------------------------------------------- the measure


def test_the_command(folder, tmp_path, capsys):
    threads = torch.get_num_threads()
    measured.main([str(folder), "rounds=6", "images=8", f"out={tmp_path / 'loading.json'}"])
    torch.set_num_threads(threads)
    found = json.loads((tmp_path / "loading.json").read_text())
    assert [row["auto_augment"] for row in found["rows"]] == ["", RANDAUGMENT] and found["images"] == 8
    assert found["torchvision"] and found["pillow"] and found["run"]["torch"] and found["run"]["threads"] == 1
    for row in found["rows"]:
        assert all(ms > 0 for ms in row["ms"].values()) and row["ms"]["ours"] > row["ms"]["decode"]
        assert row["images_per_second"]["ours"] == pytest.approx(1e3 / row["ms"]["ours"])
        assert row["times"][1] <= row["times"][0] <= row["times"][2] and row["times_on_one"][0] < row["times"][0]
    assert "images a second and core" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["images=13"], "images must be at most 12, the image files of .*, got 13"),
        (["turns=3"], "unexpected keyword argument 'turns'"),
        (["rounds"], "key=value must follow, got 'rounds'"),
    ],
)
def test_what_cannot_be_measured(folder, words, message):
    with pytest.raises(SystemExit, match=message):
        measured.main([str(folder), *words])


def test_processor_time_does_not_count_waiting():
    taken = interleaved({"waits": lambda: time.sleep(0.05)}, rounds=2, warmup=0, clock=time.process_time)["waits"]
    assert taken.max() < 0.02


def test_what_was_measured():
    """Twice the images a second and core, at least."""
    plain, colours = json.loads((RESULTS / "loading.json").read_text())["rows"]
    assert plain["times"][1] > 2 and colours["times"][1] > 1 and plain["times_on_one"][1] > 1
