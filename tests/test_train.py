import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import tpbook
from tpbook import data, train
from tpbook.training import loop, models, sources
from tpbook.training.checkpoints import FREE
from tpbook.training.recipes import budget, make, read, written

TOP = Path(__file__).parent.parent
TINY = {"train_images": 40, "test_images": 50, "batch": 20, "lr": 1e-4}
LEARNED = {"method": "dynamicvit", "keep_ratio": 0.5, "teacher": "start"}


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def go(out, **keys):
    return train.run(make({**TINY, **keys}), out, progress=False)


# ------------------------------------------------------------------------------------------------------------ recipes


@pytest.mark.parametrize("path", sorted((TOP / "recipes").rglob("*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_committed_recipes_are_whole(path):
    recipe = read(path)
    assert recipe.epochs >= 1
    if path.parent.name == "imagenet":  # every line says where its value is from
        lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
        assert all("  # " in line for line in lines), [line for line in lines if "  # " not in line]


def test_imagewoofs_rows_were_trained_by_its_recipes():
    """They are older than these files: every key but the row's own, and what changes nothing, is the same."""
    rows = sorted((TOP / "notebooks/results/imagewoof-gpu").glob("*.json"))
    assert len(rows) == 102
    for path in rows:
        trained = written(json.loads(path.read_text())["training"]["recipe"])
        own = ("start", "seed", "keep_ratio", "mask_ratio", *FREE)
        recipe = read(TOP / "recipes/imagewoof" / f"{trained.method or 'masked'}.yaml")
        assert trained == replace(recipe, **{key: getattr(trained, key) for key in own}), path


@pytest.mark.parametrize(
    "keys, error, words",
    [
        ({"mask_ration": 0.5}, ValueError, "unknown recipe key 'mask_ration'; did you mean 'mask_ratio'"),
        ({"zzz": 1}, ValueError, "unknown recipe key 'zzz'; keys are model"),
        ({"epochs": "three"}, TypeError, "epochs must be int, got 'three'"),
        ({"epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
        ({"lr": "fast"}, TypeError, "lr must be float, got 'fast'"),
        ({"method": "spvit"}, ValueError, "method must be one of '', 'dynamicvit'.*got 'spvit'"),
        ({"token_loss": "l1"}, ValueError, "token_loss must be one of 'mse', 'kl', got 'l1'"),
        ({"precision": "fp8"}, ValueError, "precision must be one of 'fp32', 'bf16', 'fp16', got 'fp8'"),
        ({"keep_warmup": [1]}, TypeError, r"keep_warmup must be tuple.*got \[1\]"),
        ({"method": "evit", "mask_ratio": 0.5}, ValueError, "mask_ratio must be 0 where a method prunes"),
        ({"batch": True}, TypeError, "batch must be int, got True"),
        ({"smoothing": 2}, ValueError, r"smoothing must lie in \[0, 1\], got 2.0"),
    ],
)
def test_bad_keys_are_named(keys, error, words):
    with pytest.raises(error, match=words):
        make(keys)


def test_budgets():
    small = {"epochs": 1, "train_images": 100}
    assert budget("slice", **small) == small and budget("recipe", **small) == {}
    assert budget("gpu", **small) == {"train_images": 0, "epochs": 10}
    with pytest.raises(ValueError, match="budget must be one of slice, recipe, gpu, got 'full'"):
        budget("full")


def test_recipe_files(tmp_path):
    path = tmp_path / "a.yaml"
    with pytest.raises(FileNotFoundError, match="a.yaml"):
        read(path)
    path.write_text("lr: 1e-3\nkeep_ratio: [0.7, 0.5, 0.3]\nepochs: 2\n")
    assert read(path).lr == 0.001 and read(path).keep_ratio == (0.7, 0.5, 0.3) and read(path, epochs=5).epochs == 5
    path.write_text("lr: [")
    with pytest.raises(ValueError, match="a.yaml is no YAML"):
        read(path)
    path.write_text("epoch: 3")
    with pytest.raises(ValueError, match="a.yaml: unknown recipe key 'epoch'; did you mean 'epochs'"):
        read(path)


# ---------------------------------------------------------------------------------------------------------- the loop


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"mask_ratio": 0.5, "smoothing": 0.1},
        {"mask_ratio": [0.25, 0.75], "ema": 0.9},
        {"method": "evit", "keep_ratio": 0.5, "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1},
        {"method": "etps", "keep_ratio": 0.3, "teacher": "start", "options": {"similarity": "euclidean"}},
        {"method": "dtps", "keep_ratio": 0.3, "teacher": "pretrained", "token_loss": "kl", "precision": "bf16"},
        {**LEARNED, "accumulate": 2, "clip_grad": 1.0},
        {"method": "random", "keep_ratio": [0.7, 0.5], "at": [2, 4]},
    ],
    ids=lambda keys: "-".join(str(v) for v in keys.values())[:40],
)
def test_every_kind_of_run(tmp_path, keys):
    result = go(tmp_path, **keys)
    assert result["accuracy"]["n"] == 50 == len(result["correct"])
    assert result["accuracy"]["right"] == result["correct"].count("1")
    assert result["images_seen"] == 40 and result["run"]["torch"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["metrics.jsonl", "model.safetensors", "result.json"] + ["ema.safetensors"] * ("ema" in keys)
    )
    start = tpbook.load_backbone("vit_digits_patch4_56").state_dict()
    assert any(not torch.equal(start[k], v) for k, v in weights(tmp_path).items() if k in start)

    model = train.load(tmp_path)
    assert tpbook.engine.is_pruned(model) == ("method" in keys)
    if keys.get("method") != "random":
        test = data.digits("test")
        chosen = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:50]
        with torch.no_grad():
            right = model(test.images[chosen]).argmax(1) == test.labels[chosen]
        assert "".join("01"[r] for r in right.tolist()) == result["correct"]


def test_a_finished_run_is_not_run_again(tmp_path):
    first = go(tmp_path)
    at = (tmp_path / "model.safetensors").stat().st_mtime_ns
    assert go(tmp_path, workers=1) == first  # a key that changes nothing
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == at
    with pytest.raises(ValueError, match="another run: lr=0.0001 there and 0.5 here"):
        go(tmp_path, lr=0.5)


def test_accumulated_parts_are_one_batch(tmp_path):
    go(tmp_path / "one")
    go(tmp_path / "two", accumulate=2)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-4, rtol=1e-4)


def test_frozen_parts_do_not_move(tmp_path):
    go(tmp_path, **LEARNED, freeze_epochs=1)
    start = tpbook.load_backbone("vit_digits_patch4_56").state_dict()
    end = weights(tmp_path)
    assert all(torch.equal(start[k], end[k]) for k in start)
    fresh = tpbook.prune(tpbook.load_backbone("vit_digits_patch4_56"), "dynamicvit").state_dict()
    assert all(
        not torch.equal(fresh[k], end[k]) for k in fresh if k.startswith("score_predictor") and k.endswith("weight")
    )
    go(tmp_path / "named", **LEARNED, frozen=["cls_token", "pos_embed"])
    end = weights(tmp_path / "named")
    assert torch.equal(start["cls_token"], end["cls_token"]) and torch.equal(start["pos_embed"], end["pos_embed"])
    assert not torch.equal(start["blocks.0.attn.qkv.weight"], end["blocks.0.attn.qkv.weight"])


def test_learning_rates_of_predictors_and_backbone():
    recipe = make({**LEARNED, "backbone_lr_scale": 0.01, "weight_decay": 0.05})
    model = train.adapt(recipe, train.build(recipe, sources.DIGITS))
    groups = train.optimizer_of(recipe, model).param_groups
    assert {(g["learned"], g["weight_decay"]) for g in groups} == {(True, 0.05), (True, 0), (False, 0.05), (False, 0)}
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    for name, p in model.named_parameters():
        assert (id(p) in decayed) == (p.ndim > 1 and name not in ("pos_embed", "cls_token")), name
    everywhere = train.optimizer_of(make({**LEARNED, "decay_all": True}), model).param_groups
    assert all(g["weight_decay"] == 0.05 for g in everywhere)


def test_metrics_and_keep_rate_warm_up(tmp_path):
    go(tmp_path, method="etps", keep_ratio=0.5, keep_warmup=[1, 2], epochs=4, log_every=1, eval_every=1)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "total" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert [line["keep_ratio"] for line in steps] == pytest.approx([1, 1, 1, 0.926777, 0.75, 0.573223, 0.5, 0.5])
    assert sum("test" in line for line in lines) == 3
    assert steps[0]["lr"] > steps[-1]["lr"] > 0
    assert train.load(tmp_path).keep_ratio == 0.5


def test_masked_from_a_run_and_from_a_file(tmp_path):
    go(tmp_path / "a", mask_ratio=0.5)
    from_run = go(tmp_path / "b", start=str(tmp_path / "a"), lr=0, min_lr=0)
    from_file = go(tmp_path / "c", start=str(tmp_path / "a" / "model.safetensors"), lr=0, min_lr=0)
    assert from_run["correct"] == from_file["correct"]
    assert same(weights(tmp_path / "b"), weights(tmp_path / "a"))


# ------------------------------------------------------------------------------------- stopped, damaged, misused, full


SLOWLY = {"train_images": 100, "epochs": 2, "seed": 3, "mixup": 0.8, "log_every": 1, **LEARNED}


def words(out, **keys):
    """The command line of a small training."""
    pairs = {"epochs": 1, "mask_ratio": 0, "precision": "fp32", **TINY, **keys}
    return [str(TOP / "recipes/digits/masked.yaml"), f"out={out}", *(f"{k}={v}" for k, v in pairs.items())]


def start(out, *args, **keys):
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", *args, "-m", "tpbook.train", *words(out, **keys)],
        cwd=TOP, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip


@pytest.fixture
def one_thread():
    """As the processes of `start` have it: sums of several threads differ in the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_killed_in_an_epoch_it_ends_the_same(tmp_path, one_thread):
    """The killed run is a process of its own; the whole one and the one that goes on need none."""
    train.main(words(tmp_path / "whole", **SLOWLY))
    killed = start(tmp_path / "killed", **SLOWLY)
    log, until = tmp_path / "killed" / "metrics.jsonl", time.time() + 300
    while time.time() < until and killed.poll() is None:
        if log.exists() and '"epoch": 1' in log.read_text():
            break
        time.sleep(0.02)
    assert killed.poll() is None, killed.stderr.read()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert (tmp_path / "killed" / "epoch-0001").is_dir() and not (tmp_path / "killed" / "result.json").exists()
    train.main(words(tmp_path / "killed", **SLOWLY))
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    lines = [
        [{k: v for k, v in json.loads(line).items() if k != "images_per_second"} for line in
         (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("whole", "killed")
    ]  # fmt: skip
    assert lines[0] == lines[1]


def stop(folder, **keys):
    """Run a recipe that stops after its first epoch of two, in a folder."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "evaluate", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        go(folder, epochs=2, eval_every=1, **keys)
    assert [p.name for p in sorted(folder.iterdir())] == ["epoch-0001", "metrics.jsonl"]
    return folder


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory):
    return stop(tmp_path_factory.mktemp("stopped") / "run")


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """A run that stopped after its first epoch of two → its folder."""
    return shutil.copytree(stopped_once, tmp_path / "run")


@pytest.mark.parametrize(
    "keys", [{"mask_ratio": [0.2, 0.8], "ema": 0.9, "accumulate": 2}, {"method": "dtps", "keep_ratio": 0.3}]
)
def test_goes_on(tmp_path, keys):
    stopped = stop(tmp_path / "run", **keys)
    first, whole = go(stopped, epochs=2, eval_every=1, **keys), go(tmp_path / "whole", epochs=2, **keys)
    assert same(weights(stopped), weights(tmp_path / "whole"))
    assert first.get("ema_correct") == whole.get("ema_correct")
    if "ema" in keys:
        averages = [load_file(folder / "ema.safetensors") for folder in (stopped, tmp_path / "whole")]
        assert same(*averages) and not same(averages[0], weights(stopped))


def test_not_with_another_recipe(stopped):
    with pytest.raises(ValueError, match="epoch-0001 is of another run: seed=0 there and 1 here.*out="):
        go(stopped, epochs=2, seed=1)


@pytest.mark.parametrize("what", ["cut", "flipped", "gone", "manifest"])
def test_damaged(stopped, what):
    folder = stopped / "epoch-0001"
    victim = folder / ("manifest.json" if what == "manifest" else "model.safetensors")
    whole = bytearray(victim.read_bytes())
    if what == "cut" or what == "manifest":
        victim.write_bytes(whole[: len(whole) // 2])
    elif what == "flipped":
        whole[len(whole) // 2] ^= 1
        victim.write_bytes(whole)
    else:
        victim.unlink()
    with pytest.raises(ValueError, match=r"epoch-0001 is damaged.*remove it"):
        go(stopped, epochs=2)
    if what == "gone":  # without the folder there is no damage, whatever it was
        shutil.rmtree(folder)
        assert go(stopped, epochs=2)["images_seen"] == 80


def test_full_disk(stopped):
    size = sum(p.stat().st_size for p in (stopped / "epoch-0001").iterdir())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 10, before[1]))  # a write beyond it fails as on a full disk
    try:
        with pytest.raises(OSError, match="epoch-0002 could not be written.*kept"):
            go(stopped, epochs=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in stopped.glob("epoch-*")] == ["epoch-0001"]
    assert go(stopped, epochs=2)["images_seen"] == 80


def test_loss_that_is_no_number(tmp_path):
    with pytest.raises(RuntimeError, match="the loss is nan in epoch 0"):
        go(tmp_path, lr=1e30, log_every=1, epochs=2)


@pytest.mark.parametrize(
    "keys, error, words",
    [
        ({"data": "imagenette2-160"}, FileNotFoundError, "no data set 'imagenette2-160'"),
        ({"data": "elsewhere"}, FileNotFoundError, "no data set 'elsewhere'"),
        ({"model": "vit_tiny_patch16_224", "start": "random"}, ValueError, "3 channels.*'digits' has 1"),
        ({"model": "vit_none"}, ValueError, "vit_none"),
        ({"model": "vit_none", "start": "random"}, ValueError, "vit_none"),
        ({"start": "nowhere.safetensors"}, FileNotFoundError, "nowhere.safetensors"),
        ({"batch": 2000, "train_images": 0}, ValueError, "batch must be at most.*got 2000"),
        ({"train_images": 5000}, ValueError, "train_images must be at most 1000, got 5000"),
        ({"mixup": 0.8, "batch": 5}, ValueError, "must be even for mixup, got 5 / 1"),
        ({"accumulate": 3}, ValueError, "batch must be a multiple of processes × accumulate = 3, got 20"),
        ({"method": "evit", "options": {"similarity": "cosine"}}, TypeError, "option 'similarity' is not known"),
        ({"method": "evit", "at": [99]}, ValueError, "99"),
        ({"precision": "fp16"}, ValueError, "precision must be fp32 or bf16 on a CPU.*got 'fp16'"),
        (
            {"teacher": "resnet1"},
            FileNotFoundError,
            "teacher must be '', 'start', 'pretrained', 'random', a timm model, a checkpoint.*got 'resnet1'",
        ),
        (
            {"start": ""},
            FileNotFoundError,
            "start must be 'pretrained', 'random', a checkpoint file or the folder.*got ''",
        ),
        ({"model": "resnet18", "start": "random"}, TypeError, "model must be of a known family"),
    ],
)
def test_misuse(tmp_path, monkeypatch, keys, error, words):
    monkeypatch.setenv("TPBOOK_DATA", str(tmp_path))
    with pytest.raises(error, match=words):
        go(tmp_path / "run", **keys)
    assert not (tmp_path / "run" / "result.json").exists()


def test_command_line(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="RECIPE.yaml"):
        train.main([])
    with pytest.raises(SystemExit, match="tpbook.train: no recipe at nothing.yaml"):
        train.main(["nothing.yaml"])
    recipe = str(TOP / "recipes" / "digits" / "evit.yaml")
    with pytest.raises(SystemExit, match="did you mean 'keep_ratio'"):
        train.main([recipe, "keep_ration=0.5"])
    pairs = [f"{k}={v}" for k, v in TINY.items()]
    train.main([recipe, *pairs, "epochs=1", "keep_ratio=[0.7,0.5,0.3]", f"out={tmp_path}"])
    assert "of 50 test images right" in capsys.readouterr().out
    assert train.load(tmp_path).keep_ratio == (0.7, 0.5, 0.3)
    for word, says in (
        ("keep_ratio=[", r"keep_ratio must be a value in YAML, got '\['"),
        ("keep_ratio", "key=value must follow, got 'keep_ratio'"),
        ("seed=", "seed must be int, got None"),
        ("out=", "out must name a folder, got ''"),
        ("teacher=resnet1", "teacher must be '', 'start', .* got 'resnet1'"),
    ):
        with pytest.raises(SystemExit, match=f"tpbook.train: .*{says}"):
            train.main([recipe, *pairs, f"out={tmp_path / 'none'}", word])
    assert not (tmp_path / "none").exists()
    train.main(["--help"])
    assert "RECIPE.yaml" in capsys.readouterr().out


def test_words_of_a_command_line(monkeypatch):
    """Lists go without brackets, no text is none, and a text stays what it is."""
    given = {}
    monkeypatch.setattr(train, "run", lambda recipe, out, **keys: given.update(keys, out=out) or {"accuracy": {
        "right": 1, "n": 2, "percent": 50.0,
    }})  # fmt: skip
    words = ("keep_ratio=0.7,0.5,0.3", "at=3,6,9", "teacher=", "out=2024", "data=2024", "lr=1e-3", "auto_augment=a,b",
             "keep_warmup=[0, 2]", "options={fuse: false}", "seed=3")  # fmt: skip
    train.main(["recipe.yaml", *words])
    assert given == {
        "keep_ratio": [0.7, 0.5, 0.3], "at": [3, 6, 9], "teacher": "", "out": "2024", "data": "2024", "lr": "1e-3",
        "auto_augment": "a,b", "keep_warmup": [0, 2], "options": {"fuse": False}, "seed": 3,
    }  # fmt: skip
    recipe = make({key: value for key, value in given.items() if key != "out"})
    assert recipe.keep_ratio == (0.7, 0.5, 0.3) and recipe.teacher == "" and recipe.lr == 0.001


def test_runs_of_older_versions(tmp_path):
    """Keys that have gone are passed over where they said nothing, as in every committed result."""
    committed = sorted((TOP / "notebooks" / "results" / "imagenette").glob("*.json"))
    recipes = [json.loads(path.read_text())["training"] for path in committed]
    recipes = [training["recipe"] for training in recipes if training]
    assert len(recipes) > 30 and all(recipe["pool_at"] == -1 for recipe in recipes)
    for recipe in recipes:
        assert written(recipe).method == recipe["method"]
    with pytest.raises(ValueError, match="unknown recipe key 'pool_at'"):
        written(recipes[0] | {"pool_at": 6})

    first = go(tmp_path)
    result = tmp_path / "result.json"
    for pool_at in (-1, 6):
        result.write_text(json.dumps(first | {"recipe": {**first["recipe"], "pool_at": pool_at}}))
        if pool_at == -1:
            assert go(tmp_path)["correct"] == first["correct"] and train.load(tmp_path).num_classes == 10
    with pytest.raises(ValueError, match="result.json is of another run: unknown recipe key 'pool_at'"):
        go(tmp_path)


def test_load_wants_a_finished_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished run"):
        train.load(tmp_path)


# ------------------------------------------------------------------------------------------------------- photographs


@pytest.fixture
def photographs(tmp_path, monkeypatch):
    """A folder laid out as ImageNet, of two classes and noise."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 6), ("val", 3)):
        for wordnet in ("n01440764", "n03000684"):
            folder = tmp_path / "tiny" / split / wordnet
            folder.mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.integers(0, 256, (80, 100, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    monkeypatch.setenv("TPBOOK_DATA", str(tmp_path))
    monkeypatch.delenv("TPBOOK_WEIGHTS", raising=False)
    return tmp_path


AUGMENTED = {
    "data": "tiny", "model": "vit_tiny_patch16_224", "start": "random", "train_images": 0, "test_images": 0, "batch": 4,
    "auto_augment": "rand-m9-mstd0.5-inc1", "color_jitter": 0.3, "random_erasing": 0.25, "hflip": 0.5,
    "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1,
}  # fmt: skip


@pytest.mark.parametrize("workers", [0, 2])
def test_photographs_with_augmentation_repeat(photographs, workers):
    ends = [go(photographs / str(i), **AUGMENTED, head="data", workers=workers)["last"]["total"] for i in range(2)]
    assert ends[0] == ends[1]
    model = train.load(photographs / "0")
    assert model.num_classes == 2
    images, labels = train.test_tensors(make({**TINY, **AUGMENTED, "head": "data"}), model)
    assert images.shape == (6, 3, 224, 224) and labels.tolist() == [0] * 3 + [1] * 3
    assert same(weights(photographs / "0"), weights(photographs / "1"))


def test_classes_that_only_the_test_set_has(photographs):
    shutil.copytree(photographs / "tiny/val/n01440764", photographs / "tiny/val/n02102040")
    with pytest.raises(ValueError, match="val has 1 classes that .*train lacks"):
        go(photographs / "run", **AUGMENTED, head="data")


def test_head_rows_are_those_of_the_classes(photographs, monkeypatch):
    full = train.new_model("vit_tiny_patch16_224", 1000).eval()
    monkeypatch.setattr(models, "load_backbone", lambda name, **kwargs: full)
    recipe = make({"data": "tiny", "model": "vit_tiny_patch16_224", "head": "data"})
    classes = train.load_data(recipe)[0]
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        logits = full(x)[:, list(classes.found)]
        narrow = train.build(recipe, classes)
        assert classes.found == (0, 491) and not classes.own
        torch.testing.assert_close(narrow(x), logits)
    with pytest.raises(ValueError, match="has 2 classes and data 'tiny' has 1000"):
        train.build(make({"data": "tiny", "model": "vit_tiny_patch16_224"}), classes)


def test_both_heads_of_a_distilled_model_keep_their_rows(photographs, monkeypatch):
    name = "deit_tiny_distilled_patch16_224"
    full = train.new_model(name, 1000, embed_dim=48, num_heads=3, depth=1).eval()
    monkeypatch.setattr(models, "load_backbone", lambda name, **kwargs: full)
    recipe = make({"data": "tiny", "model": name, "head": "data"})
    classes, heads = train.load_data(recipe)[0], (full.head, full.head_dist)
    narrow = train.build(recipe, classes)
    rows = list(classes.found)
    for head, old in zip((narrow.head, narrow.head_dist), heads):
        assert torch.equal(head.weight, old.weight[rows]) and torch.equal(head.bias, old.bias[rows])


def test_repeated_augmentation_sees_fewer_images_more_often(photographs):
    recipe = make({**AUGMENTED, "repeats": 3})
    _, augmented, _ = train.load_data(recipe)
    accelerator = type("One", (), {"num_processes": 1, "process_index": 0, "device": torch.device("cpu")})
    model = train.new_model("vit_tiny_patch16_224", 2)
    seen = list(train.loader_of(recipe, accelerator, augmented(model, 0), 0).sampler)
    assert len(seen) == 12 and all(seen.count(i) == 3 for i in set(seen))


# ---------------------------------------------------------------------------------------------------- many processes


@pytest.mark.slow
def test_two_processes_end_where_one_does(tmp_path, one_thread):
    """On CPUs torchrun starts the processes (`accelerate launch` would want MPI); gloo joins them.

    Same images a step, so the same weights but for rounding.
    """
    train.main(words(tmp_path / "one", epochs=2))
    two = start(tmp_path / "two", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", epochs=2)
    assert two.wait() == 0, two.stderr.read()
    result = [json.loads((tmp_path / n / "result.json").read_text()) for n in ("one", "two")]
    assert [r["processes"] for r in result] == [1, 2]
    assert sum(a != b for a, b in zip(result[0]["correct"], result[1]["correct"])) <= 1
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-4, rtol=1e-3)
