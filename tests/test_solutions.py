"""The solutions of the exercises run, and find what they say."""

import os
import re
from pathlib import Path

import pytest
import timm
import torch

import tpbook

TOP = Path(__file__).parent.parent
SOLUTION = re.compile(r"^:::\{dropdown\} Solutions\n(.*?)^:::$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"^( *)```python\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
PAGES = [page for page in sorted((TOP / "book").glob("*.md")) if SOLUTION.search(page.read_text())]


def test_every_chapter_has_solutions():
    chapters = [page for page in (TOP / "book").glob("*.md") if "## Exercises" in page.read_text()]
    assert sorted(chapters) == PAGES and len(PAGES) >= 7


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_solutions(page, monkeypatch):
    monkeypatch.chdir(TOP)
    code = [
        "\n".join(line.removeprefix(indent) for line in block.splitlines())
        for indent, block in CODE.findall(SOLUTION.search(page.read_text())[1])
    ]
    assert code, "a chapter's solutions hold code"
    names = {"timm": timm, "torch": torch, "tpbook": tpbook, "os": os}
    for block in code:
        exec(compile(block, f"{page.name}, solutions", "exec"), names)
