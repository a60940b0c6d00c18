"""Render the book: `python book/render.py _build/PROFILE`, after its notebooks have run.

Lays out `_build/PROFILE/site` (pages, executed notebooks, figures) and calls Jupyter Book there, warnings as errors.
The numbers that the notebooks wrote become MyST substitutions, so a page says `{{ cost.dense.deit_small }}` and never a
number typed by hand.
"""

import filecmp
import json
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

TOP = Path(__file__).parent.parent


def copy(source, target):
    """Copy a file where it differs, so that Sphinx reads again only what changed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists() or not filecmp.cmp(source, target, shallow=False):
        shutil.copyfile(source, target)


def lay_out(out):
    """Everything Jupyter Book reads, under `out/site`. → that folder."""
    site = out / "site"
    sources = {path: path.relative_to(TOP) for path in (TOP / "book").rglob("*") if path.is_file()}
    for pattern in ("tpbook/*.py", "recipes/*/*.yaml"):  # shown in the chapters
        sources |= {path: path.relative_to(TOP) for path in TOP.glob(pattern)}
    sources[TOP / "_toc.yml"] = Path("_toc.yml")
    for folder in ("notebooks", "results"):
        sources |= {path: path.relative_to(out) for path in (out / folder).iterdir() if path.suffix in KEEP}
    for source, target in sources.items():
        copy(source, site / target)
    wanted = {site / target for target in sources.values()}
    for folder in ("book", "notebooks", "results", "tpbook", "recipes"):
        for path in (site / folder).rglob("*"):
            if path.is_file() and path not in wanted:
                path.unlink()

    config = yaml.safe_load((TOP / "_config.yml").read_text())
    config["parse"]["myst_substitutions"] = numbers(out / "results")
    text = yaml.safe_dump(config, allow_unicode=True)
    if not (site / "_config.yml").exists() or (site / "_config.yml").read_text() != text:
        (site / "_config.yml").write_text(text)
    return site


KEEP = {".ipynb", ".json", ".svg", ".png"}


def numbers(folder):
    """What pages may say: one name for each JSON, with its contents."""
    return {path.stem.replace("-", "_"): json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


if __name__ == "__main__":
    site = lay_out(Path(sys.argv[1]).resolve())
    command = [Path(sys.executable).with_name("jupyter-book"), "build", site, "-W", "-n", "--keep-going", "--quiet"]
    sys.exit(subprocess.run(command).returncode)
