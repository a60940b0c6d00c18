"""Render the book: `python book/render.py _build/PROFILE`, after its notebooks have run.

Lays out `_build/PROFILE/site` (pages, executed notebooks, figures) and calls Jupyter Book there, warnings as errors.
The numbers that the notebooks wrote become MyST substitutions, so a page says `{{ cost.dense.deit_small }}` and never a
number typed by hand.
"""

import base64
import functools
import hashlib
import importlib.metadata
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pack
import pandas as pd
import yaml
from PIL import Image

from tpbook.book import cost, differences, front, plots, results

TOP = Path(__file__).parent.parent


def lay_out(out):
    """Everything Jupyter Book reads, under `out/site`. → that folder."""
    site = out / "site"
    shutil.rmtree(site, ignore_errors=True)
    tidy(out)
    sources = {path: path.relative_to(TOP) for path in (TOP / "book").rglob("*") if path.is_file()}
    for pattern in ("tpbook/**/*.py", "recipes/*/*.yaml"):  # shown in the chapters
        sources |= {path: path.relative_to(TOP) for path in TOP.glob(pattern)}
    for name in ("explorer.js", "explorer.css"):  # the page's explorer is the one that Jupyter shows
        sources[TOP / "tpbook/book/javascript" / name] = Path("book/static") / name
    sources[TOP / "_toc.yml"] = Path("_toc.yml")
    sources |= {path: Path("notebooks") / path.name for path in executed(out)}
    sources |= {path: Path("results") / path.name for path in written(out)}
    config = yaml.safe_load((TOP / "_config.yml").read_text())
    found = numbers(written(out))
    parts = [part["differences"] for part in found.values() if "differences" in part]
    found |= {"status": status(out), "differences": differences.listed(parts), "front": first_page(site)}
    config["parse"]["myst_substitutions"] = found
    if config["repository"]["url"]:
        config["html"] |= {"use_repository_button": True, "use_issues_button": True}
        config["launch_buttons"] |= {
            "binderhub_url": "https://mybinder.org", "colab_url": "https://colab.research.google.com",
            "notebook_interface": "jupyterlab",
        }  # fmt: skip
    sphinx = config["sphinx"]["config"]
    if (modules := TOP / "_build/javascript/node_modules").exists():
        for path in (modules / "mathjax/es5/tex-svg.js", modules / "mathjax/LICENSE"):
            sources[path] = Path("javascript/mathjax") / path.name
        pack.runtime(modules / "onnxruntime-web", site / "javascript")
        pack.models((out / "results/explorer/models").glob("*.onnx"), site / "javascript")
        sphinx["html_static_path"].append("javascript")
        sphinx["mathjax_path"] = "mathjax/tex-svg.js"
    else:
        version = json.loads((TOP / "book/javascript/package.json").read_text())["dependencies"]["mathjax"]
        sphinx["mathjax_path"] = f"https://cdn.jsdelivr.net/npm/mathjax@{version}/es5/tex-svg.js"
    for source, target in sources.items():
        (site / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, site / target)
    (site / "book/static/rules.js").write_text(cost.script(), encoding="utf-8")
    (site / "_config.yml").write_text(yaml.safe_dump(config, allow_unicode=True))
    return site


def tidy(out):
    """Remove what a notebook that was renamed, or failed, left beside the executed copies and the results."""
    known = executed(out)
    for path in (out / "notebooks").glob("*.ipynb"):
        if path not in known:
            path.unlink()
    for path in (out / "results").glob("*"):
        if path.is_dir() and path.name not in {notebook.stem for notebook in known}:
            shutil.rmtree(path)


def first_page(site):
    """Draws the first page's figure. → what the page says"""
    rows = front.photographs(TOP / "notebooks/results/deit-ti/family.json")
    (site / "results").mkdir(parents=True)
    plots.style()
    plots.save(front.figure(rows), site / "results", "front-accuracy.svg")
    return front.numbers(rows) | {"ten": front.ten()}


def executed(out):
    """The executed copies of the notebooks that there are."""
    return [out / "notebooks" / path.name for path in sorted((TOP / "notebooks").glob("*.ipynb"))]


def written(out):
    """What those notebooks wrote, each to a folder of its own, for the pages."""
    files = [path for notebook in executed(out) for path in sorted((out / "results" / notebook.stem).glob("*.*"))]
    return [path for path in files if path.suffix in {".json", ".svg", ".jpg", ".html"}]


def numbers(files):
    """What pages may say: one name for each JSON, with its contents."""
    return {path.stem.replace("-", "_"): json.loads(path.read_text()) for path in files if path.suffix == ".json"}


def status(out):
    """What ran for this copy, when, for how long and on what; and so of the committed results. For `book/status.md`."""
    ran, profiles = {}, {"digits"}
    for path in executed(out):
        papermill = nbformat.read(path, as_version=4).metadata.papermill
        profiles.add(papermill.parameters.profile)
        ran[f"[{path.stem}](../notebooks/{path.name})"] = {
            "ran (UTC)": papermill.start_time[:16].replace("T", " "), "seconds": papermill.duration,
        }  # fmt: skip
    ran = pd.DataFrame(ran).T.rename_axis("notebook")
    folder = TOP / "notebooks/results"
    committed = {}
    speed = [f"speed/{path.stem}" for path in sorted((folder / "speed").glob("*.json"))]
    digits = [f"digits/{path.stem}" for path in sorted((folder / "digits").glob("*.json"))]
    for name in (*digits, "cost-and-speed", "loading", "operators", *speed):
        made = json.loads((folder / f"{name}.json").read_text())
        committed[name] = {"rows": len(made["rows"]), "minutes": made.get("training_minutes"), **made["run"]}
    for name in ("imagenette", "imagewoof-gpu"):
        committed[name] = {"rows": len(list((folder / name).glob("*.json"))), **results.made(folder / name)}
    shown = ["rows", "minutes", "date", "device", "threads", "torch"]
    table = pd.DataFrame(committed).T[shown].rename_axis("notebooks/results/").fillna("–")
    software = ("torch", "torchvision", "timm", "fvcore", "accelerate", "papermill", "jupyter-book", "sphinx")
    versions = pd.Series({name: importlib.metadata.version(name) for name in software}, name="version")
    return {
        "profile": max(profiles),  # those that ask for none ran as the digits'
        "run": results.provenance(), "minutes": float(ran["seconds"].sum() / 60),
        "table_notebooks": ran.to_markdown(floatfmt=".0f"), "table_committed": table.to_markdown(floatfmt=".0f"),
        "table_software": versions.rename_axis("package").to_markdown(disable_numparse=True),
    }  # fmt: skip


def fewer_colours(html):
    """Drawings of notebooks in 256 colours, which is what they have at most to the eye, and half the bytes."""
    for path in (html / "_images").glob("*.png"):
        picture = Image.open(path).convert("RGBA")
        if picture.getextrema()[3] == (255, 255):  # none of it is transparent
            smaller = io.BytesIO()
            picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(smaller, "PNG", optimize=True)
            if smaller.tell() < path.stat().st_size:
                path.write_bytes(smaller.getvalue())


def fewer_lines(html):
    """Drawings without the line breaks and indents that matplotlib writes, a tenth of them."""
    for path in (html / "_images").glob("*.svg"):
        path.write_text(re.sub(r">\s+<", "><", re.sub(r"\s*\n\s*", " ", path.read_text())))


def share_pictures(html):
    """Keep once what a page and a notebook both show: Sphinx copies a notebook's pictures under names of their own."""
    first, again = {}, {}  # contents → file; name of a copy → name of the file
    for path in sorted((html / "_images").iterdir(), key=lambda path: (len(path.name), path.name)):
        kept = first.setdefault(path.read_bytes(), path)
        if kept is not path:
            again[path.name] = kept.name
            path.unlink()
    for page in html.glob("*/*.html"):
        text = page.read_text()
        if shown := [name for name in again if name in text]:
            for name in shown:
                text = text.replace(f"_images/{name}", f"_images/{again[name]}")
            page.write_text(text)


SEARCH = re.compile(r'<script src="[^"]*(?:searchtools|language_data|searchindex)\.js[^"]*"></script>\n?')
ICONS = re.compile(r'<script [^>]*src="[^"]*scripts/fontawesome\.js[^"]*"></script>\n?')
MATHS = re.compile(r'<script[^>]*>window\.MathJax.*?</script>\n?|<script [^>]*/tex-svg\.js[^"]*"></script>\n?')


PLAIN = re.compile(r'<span class="(?:n|p|w)">([^<]*)</span>')  # names, punctuation, space: coloured as all code is
PICTURES = re.compile(r"data:image/(jpeg|png);base64,([A-Za-z0-9+/=]{2000,})")


def lighten(html):
    """Take out of each page the scripts that it does not use, three quarters of what it would load.

    The theme can search from any page, which is off here; its icons come from a font; MathJax is for equations. Code
    loses marks that have no colour of their own, and pictures that several pages carry are files.
    """
    for page in html.rglob("*.html"):
        text = ICONS.sub("", page.read_text())
        if page.name != "search.html":
            text = SEARCH.sub("", text)
        if page.parent.name != "notebooks" and 'class="math' not in text:
            text = MATHS.sub("", text)
        text = PLAIN.sub(r"\1", text)
        if page.name != "explorer.html":  # whose pictures are read by the models in it, which no file may be from disk
            text = PICTURES.sub(functools.partial(as_file, page, html), text)
        page.write_text(text)


def as_file(page, html, found):
    """A picture that a page carries as text, once as a file for all pages. → its address from there"""
    name = f"{hashlib.sha256(found[2].encode()).hexdigest()[:16]}.{found[1]}"
    (html / "_images" / name).write_bytes(base64.b64decode(found[2]))
    return "../" * (len(page.relative_to(html).parts) - 1) + f"_images/{name}"


def hand_out_notebooks(html):
    """What a page's download button gives is the notebook as it is committed: its outputs are on the page already."""
    for path in (html / "_sources/notebooks").glob("*.ipynb"):
        shutil.copyfile(TOP / "notebooks" / path.name, path)


if __name__ == "__main__":
    site = lay_out(Path(sys.argv[1]).resolve())
    # without the collector of cycles, which takes a third of the time and finds little
    start = "import gc; gc.disable(); from jupyter_book.cli.main import main; main()"
    code = subprocess.run(
        [sys.executable, "-c", start, "build", site, "-W", "-n", "--keep-going", "--quiet"]
    ).returncode
    # for debuggers of the theme, for browsers that know no .woff2 beside it, other languages, icons that are a font too
    for pattern in ("*.map", "*.ttf", "*.mo", "*.po", "fontawesome.js*"):
        for path in (site / "_build/html/_static").rglob(pattern):
            path.unlink()
    if code == 0:
        fewer_colours(site / "_build/html")
        fewer_lines(site / "_build/html")
        share_pictures(site / "_build/html")
        lighten(site / "_build/html")
        hand_out_notebooks(site / "_build/html")
    sys.exit(code)
