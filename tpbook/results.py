"""Numbers that a run printed, written down with where they come from."""

import datetime
import json
import os
import platform
from pathlib import Path

import timm
import torch
from scipy.stats import binomtest


def save(folder, name, numbers):
    """Write `folder/name.json`, whole or not at all, with the provenance of the run under "run".

    Args:
        folder: where to; made if it is not there.
        name: the file's stem; book pages read `{{ name.… }}` with `-` as `_`.
        numbers: a dict of what json can hold.

    Returns:
        Path of the file.
    """
    path = Path(folder) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({**numbers, "run": provenance()}, indent=1, allow_nan=False) + "\n")
    os.replace(part, path)
    return path


def provenance():
    """dict: date, versions and hardware of this process."""
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
        "timm": timm.__version__,
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "threads": torch.get_num_threads(),
    }


def accuracy(right, n):
    """dict of `right` correct answers out of n: the share and its binomial 95 % interval (Wilson), in percent."""
    low, high = binomtest(right, n).proportion_ci(method="wilson")
    return {"right": right, "n": n, "percent": 100 * right / n, "low": 100 * low, "high": 100 * high}
