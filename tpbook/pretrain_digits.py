"""Trains the small ViT of the embedded digits: `python -m tpbook.pretrain_digits`.

Writes the weights and, beside them, a JSON with the recipe and the figures of the run. Every epoch draws new canvases
of the 1,000 train digits; the 797 test digits are looked at when the run has ended. The canvases start without distractors,
since from full clutter a ViT this small is slow to find a start. `--start FILE` goes on from an earlier run.

The committed weights come from two runs on one thread each, whose figures their JSON holds::

    python -m tpbook.pretrain_digits --out first
    python -m tpbook.pretrain_digits --start first/vit_digits_patch4_56.safetensors --seed 1 --epochs 45 \\
        --clutter_from -1 --clutter_to 0
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from scipy.stats import binomtest
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import accuracy
from tqdm import trange

from .backbones import DIGITS, build_digits_vit, load_checkpoint
from .digits import FRAGMENTS, digits

RECIPE = {
    "epochs": 50, "per_digit": 4, "batch": 50, "lr": 1e-3, "warmup": 1, "weight_decay": 0.05, "smoothing": 0.1,
    "clutter_from": 5, "clutter_to": 20,  # epochs over which the distractors grow from none to all
}  # fmt: skip


def train(recipe, seed=0, start=None):
    """Train from scratch, or from the checkpoint `start`. → the model in eval mode, and how many images it saw."""
    torch.manual_seed(seed)
    model = build_digits_vit()
    if start is not None:
        load_checkpoint(model, start)
    for block in model.blocks:
        block.attn.fused_attn = False  # in bfloat16 on a CPU the explicit product trains about twice as fast
    optimizer = create_optimizer_v2(model, opt="adamw", lr=recipe["lr"], weight_decay=recipe["weight_decay"])
    per_epoch = 1000 * recipe["per_digit"] // recipe["batch"]
    schedule = CosineLRScheduler(
        optimizer, t_initial=recipe["epochs"] * per_epoch, warmup_t=recipe["warmup"] * per_epoch,
        warmup_lr_init=1e-6, lr_min=1e-6, t_in_epochs=False, warmup_prefix=False,
    )  # fmt: skip
    step, bar = 0, trange(recipe["epochs"], unit="epoch")
    for epoch in bar:
        grown = (epoch - recipe["clutter_from"]) / max(1, recipe["clutter_to"] - recipe["clutter_from"])
        data = digits(
            "train", seed=1000 * (seed + 1) + epoch, per_digit=recipe["per_digit"],
            fragments=round(FRAGMENTS * min(1, max(0, grown))),
        )  # fmt: skip
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(epoch))
        right = 0
        for batch in order.split(recipe["batch"]):
            schedule.step_update(step)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(data.images[batch]).float()
            loss = F.cross_entropy(logits, data.labels[batch], label_smoothing=recipe["smoothing"])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            right += (logits.argmax(1) == data.labels[batch]).sum().item()
        bar.set_postfix(train_accuracy=f"{right / len(data):.3f}", loss=f"{loss.item():.3f}")
    return model.eval(), step * recipe["batch"]


@torch.inference_mode()
def evaluate(model):
    """How many of the 797 test canvases the model gets right."""
    data = digits("test")
    logits = torch.cat([model(x) for x in data.images.split(200)])
    return round(accuracy(logits, data.labels)[0].item() * len(data) / 100), len(data)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "weights", help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="RNG seed")
    parser.add_argument("--start", type=Path, help="weights to go on from; their .json lies beside them")
    for name, value in RECIPE.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    args = vars(parser.parse_args())
    out, seed, start = args.pop("out"), args.pop("seed"), args.pop("start")
    earlier = json.loads(start.with_suffix(".json").read_text()) if start else None

    begun = time.perf_counter()
    model, seen = train(args, seed, start)
    seconds = time.perf_counter() - begun
    right, n = evaluate(model)
    interval = binomtest(right, n).proportion_ci(method="wilson")
    figures = {
        "model": DIGITS, "test_images": n, "right": right, "accuracy": right / n,
        "wilson_95": [interval.low, interval.high], "images_seen": seen, "seed": seed, "recipe": args,
        "seconds": round(seconds), "threads": torch.get_num_threads(), "machine": platform.machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
        "started_from": earlier,
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    weights, report = out / f"{DIGITS}.safetensors", out / f"{DIGITS}.json"
    save_file(model.state_dict(), f"{weights}.part")
    Path(f"{report}.part").write_text(json.dumps(figures, indent=1) + "\n")
    os.replace(f"{weights}.part", weights)
    os.replace(f"{report}.part", report)
    print(f"{right} of {n} test canvases right; wrote {weights} and {report}")


if __name__ == "__main__":
    main()
