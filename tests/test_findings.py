"""Findings before tables: a chapter says what was found, by a number that was computed, and folds what it rests on."""

import json
import re
from pathlib import Path

import pytest
from test_site import built, every_site, soup_of

TOP = Path(__file__).parent.parent
CHAPTERS = sorted((TOP / "book").glob("*.md"))
OPEN = 3
COMPARES = re.compile(  # "behind" after a verb of being alone: else it is a place
    r"\b(faster|slower|cheaper|dearer|better|worse|best|worst|ahead|(is|are|was|were|lies) behind|beats?|outperforms?|"
    r"(more|less) accurate)\b", re.IGNORECASE
)  # fmt: skip
COMPUTED = re.compile(r"\{\{")
CITED = re.compile(r"\]\(|\{cite|\((?:[^()]*\W)?(?:V2?|D|I)(?:\W[^()]*)?\)")  # a link, a reference, how it was read
# asserts nothing: what the word means, the side of a figure, an open question
DEFINES = re.compile(r"\W*(Ahead|Behind|Right of zero|Whether)\b|.*\?\W*$", re.DOTALL)
NO_FINDINGS = {"imagenet": "commands that nobody has run", "status": "what ran", "notation": "to look things up"}


def sections(text):
    """(heading, Markdown) of every section of a page, whatever its depth; what stands in code is no heading."""
    text = re.sub(
        r"^(`{3,})(.*?)$(.*?)^\1$", lambda block: block[0] if block[2].startswith("{figure}") else "", text,
        flags=re.MULTILINE | re.DOTALL,
    )  # fmt: skip
    parts = re.split(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return list(zip(["", *parts[1::2]], parts[::2]))


def sentences(text):
    """The sentences of a section: of prose, captions and folds; no equation, table or option of a directive."""
    text = re.sub(r"\$\$.*?\$\$", "", text, flags=re.DOTALL)
    text = re.sub(r"^(:\w+:|\||:{3,}|`{3,}|\(.*\)=$).*$", "", text, flags=re.MULTILINE)
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.|:) )", text):
        yield from re.split(r"(?<=[.?!])[*)]* (?=[A-Z*`\[({]|[de]TPS)", " ".join(block.split()))


def holds_results(text):
    return "{{" in text or "../results/" in text


def unfounded(page):
    """Sentences with a word of comparison, in sections that hold results, that are neither computed nor cited."""
    for heading, text in sections(page):
        if holds_results(text) and heading != "Exercises":
            for sentence in sentences(text):
                if COMPARES.search(re.sub(r"\{\{.*?\}\}|\{\w+\}`.*?`", "", sentence)) and not DEFINES.match(sentence):
                    if not COMPUTED.search(sentence) and not CITED.search(sentence):
                        yield sentence


@pytest.mark.parametrize("page", CHAPTERS, ids=lambda page: page.stem)
def test_a_comparison_is_computed_or_cited(page):
    assert not list(unfounded(page.read_text()))


def test_what_is_unfounded():
    page = """# A chapter
Pruning is better than nothing.

## The experiment
EViT is ahead by {{ evit.points }}. Here dTPS is slower. eTPS has 79.5 % (V), which is better. *Ahead*: by an interval.

- A [smaller model](x.md) may be worse;
- a larger one is worse.

```{figure} ../results/a.svg
:alt: the worst
A figure in which all are cheaper.
```
```python
faster = 1  # and better
```
"""
    assert list(unfounded(page)) == [
        "Here dTPS is slower.",
        "- a larger one is worse.",
        "A figure in which all are cheaper.",
    ]


@pytest.mark.parametrize("page", [p for p in CHAPTERS if p.stem not in NO_FINDINGS], ids=lambda page: page.stem)
def test_a_finding_stands_before_its_table(page):
    """Of a section with computed tables the prose before the first of them holds a number that was computed too."""
    for heading, text in sections(page.read_text()):
        before, table, _ = re.sub(r"^:\w+:.*$", "", text, flags=re.MULTILINE).partition(".table_")
        if table and heading != "The equations":
            prose = before.rpartition("{dropdown}")[0] or before.rpartition("{{")[0]
            assert re.search(r"\{\{ (?!\w+\.table_)", prose), heading


@built
@every_site
def test_tables_are_folded(site):
    """At most three are open in a chapter, and a fold says what is inside."""
    opened = {}
    for page in (site / "book").glob("*.html"):
        tables = soup_of(page).select("article table")
        opened[page.stem] = sum(not table.find_parent("details") for table in tables)
        for fold in soup_of(page).select("article details:has(table)"):
            assert len(fold.find("summary").get_text(" ", strip=True)) >= 5, (page.stem, fold.find("summary"))
    assert max(opened.values()) <= OPEN, opened


@built
@every_site
def test_no_table_is_lost(site):
    """Whatever a run tabled for the chapters, under a name of its own, one of them shows."""
    shown = "".join(page.read_text() for page in CHAPTERS)
    for path in (site.parents[1] / "results").glob("*.json"):
        name = path.stem.replace("-", "_")
        for key in json.loads(path.read_text()):
            if key.startswith("table_"):
                assert f"{{{{ {name}.{key} }}}}" in shown, f"{path.name} has {key}"
