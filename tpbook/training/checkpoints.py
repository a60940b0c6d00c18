"""A run's files: written whole or not at all, and never taken for another run's.

Chapter: :doc:`/book/reproduction`
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

from safetensors.torch import save_file

from .recipes import as_dict, written

FREE = ("workers", "log_every", "eval_every")  # recipe keys that may change when a run goes on
MANIFEST = "manifest.json"


def save(accelerator, recipe, out, epochs, seconds):
    """Write `out/epoch-NNNN` after `epochs` finished epochs, then remove the one before.

    Raises:
        OSError: it could not be written. The epoch before is still there, and nothing half-written is.
    """
    folder, part = out / f"epoch-{epochs:04}", out / f"epoch-{epochs:04}.part"
    try:
        if accelerator.is_main_process:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(part))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            sums = {str(p.relative_to(part)): _sum(p) for p in sorted(part.rglob("*")) if p.is_file()}
            manifest = {"recipe": as_dict(recipe), "epochs": epochs, "seconds": seconds, "sha256": sums}
            (part / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
            os.replace(part, folder)
    except Exception as error:  # OSError, torch's RuntimeError or safetensors' own, where a disk is full
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(f"{folder} could not be written ({error}); epochs finished before it are kept") from error
    if accelerator.is_main_process:
        for old in out.glob("epoch-*"):
            if old != folder:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def resume(accelerator, recipe, out):
    """Load the last finished epoch, if there is one. → (epochs finished, seconds they took).

    Raises:
        ValueError: it belongs to another recipe, or is damaged; the message names the folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    folders = sorted(folder for folder in out.glob("epoch-*") if folder.suffix != ".part")
    if not folders:
        return 0, 0.0
    folder = folders[-1]
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        wrong = [name for name, digest in manifest["sha256"].items() if _sum(folder / name) != digest]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} is damaged ({error}); remove it to go on from what was before it") from error
    if wrong:
        raise ValueError(f"{folder} is damaged, in {', '.join(wrong)}; remove it to go on from what was before it")
    _same_run(recipe, manifest["recipe"], folder)
    accelerator.load_state(str(folder))
    return manifest["epochs"], manifest["seconds"]


def finished(out, recipe):
    """`out/result.json`; ValueError if it is another recipe's."""
    result = json.loads((out / "result.json").read_text())
    _same_run(recipe, result["recipe"], out / "result.json")
    return result


def save_weights(model, path, said=None):
    """Write a state dict as safetensors, whole or not at all; `said` goes with it, as a dict of texts."""
    part = path.with_suffix(".part")
    try:
        state = model.state_dict()  # copied, since layers may share a tensor, and a file may not
        save_file({name: tensor.to("cpu", copy=True).contiguous() for name, tensor in state.items()}, part, said)
        os.replace(part, path)
    except Exception as error:
        part.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written ({error})") from error


def _same_run(recipe, theirs, where):
    ours = as_dict(recipe)
    try:
        theirs = as_dict(written(theirs))  # keys that are newer than the run have their defaults
        keys = [key for key in ours if key not in FREE and theirs[key] != ours[key]]
        differ = "; ".join(f"{key}={theirs[key]!r} there and {ours[key]!r} here" for key in keys)
    except (ValueError, TypeError) as error:  # of a method or a key that this version does not know
        differ = str(error)
    if differ:
        raise ValueError(f"{where} is of another run: {differ}. Choose another folder with out=")


def _sum(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Log:
    """Metrics as JSON lines. Those of epochs that will be run again are dropped first.

    Attributes:
        last: the latest line with loss terms.
    """

    def __init__(self, path: Path, epochs, writes):
        self.path, self.writes, self.last = path, writes, None
        lines = path.read_text().splitlines() if path.exists() else []
        kept = []
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:  # cut off in the middle
                continue
            if entry["epoch"] < epochs:
                kept.append(line)
                self.last = entry if "total" in entry else self.last
        if writes:
            part = path.with_suffix(".part")
            part.write_text("".join(f"{line}\n" for line in kept))
            os.replace(part, path)

    def write(self, entry):
        self.last = entry if "total" in entry else self.last
        if self.writes:
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
