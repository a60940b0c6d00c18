"""Rows of the reproduction, driven by Snakemake; without it (it is optional) these are skipped."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parent.parent
SNAKEMAKE = Path(sys.executable).with_name("snakemake")
pytestmark = pytest.mark.skipif(not SNAKEMAKE.exists(), reason="no Snakemake (`make results` installs it)")


def snakemake(folder, *arguments):
    command = [SNAKEMAKE, "-s", "notebooks/Snakefile", "--cores=1", "--rerun-triggers=mtime", "--nolock", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(TOP)}
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    return ran.stderr + ran.stdout


def test_every_row_is_committed(tmp_path):
    """A clean clone has nothing to do."""
    (tmp_path / "notebooks").symlink_to(TOP / "notebooks")
    assert "Nothing to be done" in snakemake(tmp_path, "--dry-run")
    woof = ("profile=imagewoof", "name=imagewoof-gpu", "seeds=[0, 1, 2]")
    assert "Nothing to be done" in snakemake(tmp_path, "--dry-run", "--config", *woof)


@pytest.mark.slow
def test_rows_are_made_once(tmp_path):
    (tmp_path / "notebooks").mkdir()
    for name in ("Snakefile", "run.py", "one-training.ipynb"):
        shutil.copy(TOP / "notebooks" / name, tmp_path / "notebooks")
    (tmp_path / "recipes").symlink_to(TOP / "recipes")
    shutil.copy(TOP / "_toc.yml", tmp_path)  # what marks a checkout: notebooks work in the one around them
    row = tmp_path / "notebooks/results/test/masked-etps-0.5-s1.json"
    call = (row.relative_to(tmp_path), "--config", "profile=digits", "budget=slice", "name=test")
    snakemake(tmp_path, *call)
    made = json.loads(row.read_text())
    assert [(r["start"], r["method"], r["seed"], r["trained"]) for r in made["rows"]] == [("masked", "etps", 1, True)]
    assert made["training"]["recipe"]["start"] == "../_build/rows/test/masked-s1"
    start = json.loads((row.parent / "masked-s1.json").read_text())
    assert {r["method"] for r in start["rows"]} >= {"dense", "evit", "etps", "random"}
    assert "Nothing to be done" in snakemake(tmp_path, *call)
