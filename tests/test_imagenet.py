"""The chapter on ImageNet can be followed: every command of its page runs, from the archives on, on made-up images.

Bash itself runs the page's blocks, with a `python` and an `accelerate` that write down what they were asked for.
"""

import functools
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import timm
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.datasets import imagenet as torchvision_imagenet

from tpbook import data, train
from tpbook.training.recipes import read

TOP = Path(__file__).parent.parent
PAGE = TOP / "book" / "imagenet.md"
HOME = "/home/reader"
STUBS = r"""
tell() { printf '%s\0' "$TPBOOK_DATA" "$@"; printf '\036'; }
accelerate() { tell accelerate "$@"; }
python() { tell python "$@"; }
"""
SMALL = {"max_steps": "2", "batch": "4", "accumulate": "1", "workers": "0"}


def page():
    """What the page's blocks call, in order: [[TPBOOK_DATA, program, argument, …]]."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    environment = {"HOME": HOME, "PATH": os.environ["PATH"]}
    ran = subprocess.run(
        ["bash", "-euo", "pipefail"], input=STUBS + "".join(blocks), env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0 and not ran.stderr, ran.stderr
    return [call.split("\0")[:-1] for call in ran.stdout.split("\36") if call]


CALLS = page()


class Command:
    """One training command of the page."""

    def __init__(self, call):
        self.launch = call[2:]
        self.recipe, *pairs = call[call.index("tpbook.train") + 1 :]
        self.changes = dict(pair.split("=", 1) for pair in pairs)
        self.name = self.changes["out"].removeprefix(f"{HOME}/runs/")

    @functools.cache  # noqa: B019
    def read(self):
        return read(TOP / self.recipe, **{k: yaml.safe_load(v) for k, v in self.changes.items() if k != "out"})


COMMANDS = {command.name: command for command in (Command(call) for call in CALLS if call[1] == "accelerate")}
every = pytest.mark.parametrize("command", COMMANDS.values(), ids=lambda command: command.name)


# ------------------------------------------------------------------------------------------------------- the commands


def test_each_row_has_its_own_folder():
    assert len(COMMANDS) == sum(call[1] == "accelerate" for call in CALLS) >= 70
    assert {call[0] for call in CALLS} == {f"{HOME}/data"}  # exported before anything is called


@every
def test_command(command):
    known = launch_command_parser().parse_args(command.launch[1:])
    assert known.multi_gpu and known.num_processes == 8 and known.module and known.training_script == "tpbook.train"
    recipe = command.read()
    assert recipe.data == "imagenet" and recipe.batch % (8 * recipe.accumulate) == 0
    ratio = re.search(r"-(0\.\d)$", command.name)
    assert bool(ratio) == bool(recipe.method)
    if ratio:
        assert recipe.keep_ratio == float(ratio[1])
        assert command.name.split("/")[0].split("-")[0] == recipe.method
    at, other = re.search(r"-at(\d+)-", command.name), re.search(r"-(lvvit_.|swin_t|convnext_t)/", command.name)
    size = re.search(r"-(base)/|/(small|tiny)-", command.name)
    timms = {"swin_t": "swin_tiny_patch4_window7_224", "convnext_t": "convnext_tiny.fb_in1k"}
    model = f"deit_{(size and (size[1] or size[2])) or 'small'}_patch16_224"
    assert recipe.model == (timms.get(other[1], other[1]) if other else model)
    if recipe.method:
        usual = {"lvvit_s": (4, 8, 12), "lvvit_m": (5, 10, 15), "swin_t": (1, 2, 3), "convnext_t": (1, 2, 3)}
        assert recipe.at == (tuple(map(int, at[1])) if at else usual.get(other and other[1], (3, 6, 9)))
    if recipe.start not in ("pretrained", "random"):  # the folder of a command further up
        names = list(COMMANDS)
        start = recipe.start.removeprefix(f"{HOME}/runs/")
        assert start in names[: names.index(command.name)] and COMMANDS[start].read().model == recipe.model
        assert Path(start).name == command.name.split("/")[1].split("-")[0]


def test_every_recipe_is_used():
    assert {command.recipe for command in COMMANDS.values()} == {
        str(path.relative_to(TOP)) for path in (TOP / "recipes" / "imagenet").glob("*.yaml")
    }


# ------------------------------------------------------------------------------------------------------- the archives


LABELS = {"n01440764": 0, "n02102040": 217, "n03000684": 491, "n03888257": 701}  # of ImageNet-1k
CLASSES = tuple(LABELS)


def jpeg(rng):
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (72, 96, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


def pack(path, files, mode="w"):
    """A tar at `path` of {name: bytes}."""
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def archives(root):
    """The three files of ILSVRC2012 as they are laid out, with four classes. → the classes of the validation images."""
    root.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for wordnet in CLASSES:
        pack(root / f"{wordnet}.tar", {f"{wordnet}_{i}.JPEG": jpeg(rng) for i in range(2)})
    inner = {path.name: path.read_bytes() for path in sorted(root.glob("n*.tar"))}
    pack(root / "ILSVRC2012_img_train.tar", inner)
    for name in inner:
        (root / name).unlink()
    truth = (3, 1, 2, 4, 2)  # by the devkit's own numbers, which are not the order of the WordNet ids
    pack(root / "ILSVRC2012_img_val.tar", {f"ILSVRC2012_val_{i:08}.JPEG": jpeg(rng) for i in range(1, 6)})

    numbered = (CLASSES[1], CLASSES[0], CLASSES[3], CLASSES[2])
    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")
    synsets = np.array(
        [(i, wordnet, "a, b", "gloss", 0) for i, wordnet in enumerate(numbered, 1)] + [(5, "n00001740", "c", "d", 4)],
        dtype=[(name, object) for name in fields],
    )
    mat = io.BytesIO()
    scipy.io.savemat(mat, {"synsets": synsets.reshape(-1, 1)})
    said = "".join(f"{i}\n" for i in truth).encode()
    kit = {"meta.mat": mat.getvalue(), "ILSVRC2012_validation_ground_truth.txt": said}
    kit = {f"ILSVRC2012_devkit_t12/data/{name}": content for name, content in kit.items()}
    pack(root / "ILSVRC2012_devkit_t12.tar.gz", kit, "w:gz")
    return [numbered[i - 1] for i in truth]


def unpack(home):
    """Run the page's own command on the archives at `home`."""
    (call,) = [call for call in CALLS if call[1] == "python"]
    _, _, flag, program = call
    assert flag == "-c"
    exec(compile(program.replace(HOME, str(home)), PAGE.name, "exec"), {})


@pytest.fixture(scope="session")
def reader(tmp_path_factory):
    """A reader's home: ImageNet unpacked from its archives as the page says, and weights. → (home, val's classes)."""
    home = tmp_path_factory.mktemp("home")
    root = home / "data" / "imagenet"
    truth = archives(root)
    with pytest.raises(RuntimeError, match="ILSVRC2012_devkit_t12.tar.gz is not present .* or is corrupted"):
        unpack(home)  # they are not the real ones
    with pytest.MonkeyPatch.context() as patch:
        names = {split: name for split, (name, _) in torchvision_imagenet.ARCHIVE_META.items()}
        sums = {split: (name, hashlib.md5((root / name).read_bytes()).hexdigest()) for split, name in names.items()}
        patch.setattr(torchvision_imagenet, "ARCHIVE_META", sums)
        unpack(home)
    return home, truth


def test_archives(reader, monkeypatch, capsys):
    home, truth = reader
    root = home / "data" / "imagenet"
    left = ["ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "meta.bin"]
    assert sorted(path.name for path in root.iterdir()) == [*left, "train", "val"]
    monkeypatch.setenv("TPBOOK_DATA", str(home / "data"))
    folders = {split: data.ImageNetFolder(data.root("imagenet") / split) for split in ("train", "val")}
    for split, n in (("train", 8), ("val", 5)):
        assert sorted(path.name for path in (root / split).iterdir()) == list(CLASSES) and len(folders[split]) == n
    placed = {Path(path).name: label for path, label in folders["val"].samples}
    assert placed == {f"ILSVRC2012_val_{i:08}.JPEG": LABELS[wordnet] for i, wordnet in enumerate(truth, 1)}

    for name in left[:3]:  # "tpbook needs neither", nor does a second call
        (root / name).rename(home / name)
    unpack(home)
    assert capsys.readouterr().out.split() == ["8", "5"]
    for name in left[:3]:
        (home / name).rename(root / name)


# -------------------------------------------------------------------------------------------------------- the dry run


@pytest.fixture
def dry(reader, monkeypatch):
    """Runs a command for two steps, after the one that makes its start → its result.

    The models are as deep and have as many tokens, heads and classes as their originals; they are only narrow.
    """
    home = reader[0]
    create = timm.create_model

    @functools.wraps(create)
    def narrow(name, **kwargs):
        width = 8 * {"tiny": 3, "small": 6, "base": 12, "s": 6, "m": 8}[name.split(".")[0].split("_")[1]]
        narrower = {"embed_dim": width} | ({"stem_width": 8} if name.startswith("lvvit") else {})
        narrower = {"dims": (8, 8, 16, 16)} if name.startswith("convnext") else narrower
        from_file = "pretrained_cfg_overlay" in kwargs  # and never from timm's hub
        return create(name, **{**kwargs, **narrower, "pretrained": from_file})

    monkeypatch.setattr(timm, "create_model", narrow)
    monkeypatch.setenv("TPBOOK_DATA", str(home / "data"))
    monkeypatch.setenv("TPBOOK_WEIGHTS", str(home / "narrow"))
    monkeypatch.chdir(TOP)
    (home / "narrow").mkdir(exist_ok=True)
    for name in {command.read().model for command in COMMANDS.values()}:
        weights = home / "narrow" / f"{name}.safetensors"
        if not weights.exists():
            save_file(timm.create_model(name).state_dict(), weights)

    def run(command):
        start = command.changes.get("start", "").removeprefix(f"{HOME}/runs/")
        if start in COMMANDS:
            run(COMMANDS[start])
        train.main(arguments(command, home))
        return json.loads((home / "runs" / command.name / "result.json").read_text())

    return run


def arguments(command, home):
    """A command's own arguments, then what makes it small; fp16 is for GPUs, and its stand-in on a CPU is bf16."""
    small = SMALL | ({"precision": "bf16"} if command.read().precision == "fp16" else {})
    pairs = {key: value.replace(HOME, str(home)) for key, value in command.changes.items()} | small
    return [command.recipe, *(f"{key}={value}" for key, value in pairs.items())]


@every
def test_dry_run(command, dry, reader):
    result, recipe = dry(command), command.read()
    assert result["images_seen"] == 8 and result["num_classes"] == 1000 and result["accuracy"]["n"] == 5
    assert ("ema_accuracy" in result) == bool(recipe.ema)
    for key in ("model", "method", "keep_ratio", "at", "teacher", "mask_ratio", "epochs", "options"):
        want = getattr(recipe, key)
        assert result["recipe"][key] == (list(want) if isinstance(want, tuple) else want), key
    assert result["recipe"]["start"] == recipe.start.replace(HOME, str(reader[0]))


def test_check_changes_nothing(dry, reader):
    dry(COMMANDS["check"])
    before = load_file(reader[0] / "narrow" / "deit_small_patch16_224.safetensors")
    after = load_file(reader[0] / "runs" / "check" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_accelerate_launch(reader, tmp_path):
    """The command line itself, at DeiT-Ti's real width, with a CPU instead of eight GPUs."""
    home, command = reader[0], COMMANDS["etps/tiny-at369-0.7"]
    save_file(timm.create_model("deit_tiny_patch16_224").state_dict(), tmp_path / "deit_tiny_patch16_224.safetensors")
    launch = command.launch[: command.launch.index(command.recipe)]
    i = launch.index("--multi_gpu")
    assert launch[i : i + 3] == ["--multi_gpu", "--num_processes", "8"]
    launch[i : i + 3] = ["--cpu", "--num_processes", "1"]
    out = tmp_path / "out"
    ran = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", *launch, *arguments(command, home), f"out={out}"],
        cwd=TOP, capture_output=True, text=True,
        env=os.environ | {"TPBOOK_DATA": f"{home}/data", "TPBOOK_WEIGHTS": str(tmp_path), "HF_HOME": str(tmp_path)},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "of 5 test images right" in ran.stdout
    assert json.loads((out / "result.json").read_text())["recipe"]["method"] == "etps"
