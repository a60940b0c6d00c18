"""The order of the book: what Next walks, how chapters and notebooks lead to one another, what the first pages do."""

import csv
import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import timm
import torch
import yaml
from test_site import browser_needed, built, every_site, soup_of

from tpbook.book import front

TOP = Path(__file__).parent.parent
PARTS = {part["caption"]: part["chapters"] for part in yaml.safe_load((TOP / "_toc.yml").read_text())["parts"]}
WALK = [entry["file"] for chapters in PARTS.values() for entry in chapters]
RUNS = [run["file"] for run in PARTS["Runs"][0]["sections"]]
NOTEBOOKS = sorted((TOP / "notebooks").glob("*.ipynb"))
PATH = ("Start", "Methods", "Judge")
WORDS = 16_000


@pytest.fixture
def extension(monkeypatch):
    monkeypatch.syspath_prepend(TOP / "book/extensions")


def test_contents():
    """Chapters first, in the order in which they are to be read; the notebooks together at the end."""
    assert list(PARTS) == ["Start", "Methods", "Judge", "Evidence", "More", "Reference", "Runs"]
    assert [list(entry) for part in list(PARTS)[:-1] for entry in PARTS[part]] == [["file"]] * (len(WALK) - 1)
    assert all(page.startswith("book/") for page in WALK)
    pages = {f"book/{page.stem}" for page in (TOP / "book").glob("*.md")} - {"book/welcome"}
    assert sorted(WALK) == sorted(pages)
    assert sorted(RUNS) == sorted(f"notebooks/{path.stem}" for path in NOTEBOOKS)
    methods = [entry["file"].removeprefix("book/") for entry in PARTS["Methods"]]
    assert methods[:3] == ["evit", "tps", "dynamicvit"] and methods[-1] == "masked-fine-tuning"


@pytest.mark.parametrize("chapter", [entry["file"] for entry in PARTS["Methods"]])
def test_a_method_chapter_has_its_equations_and_the_explorer(chapter):
    text = (TOP / f"{chapter}.md").read_text()
    own = set(re.findall(r"^\$\$ \(([\w-]+)\)", text, flags=re.MULTILINE))
    assert own and set(re.findall(r"\{eq\}`([\w-]+)`", text.split("## The code")[1])) & own or "masked" in own
    assert len(re.findall(r"^```\{explorer\} ", text, flags=re.MULTILINE)) == 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_names_its_chapter(path, extension):
    import runs

    assert runs.chapter_of(path) in WALK


def test_a_notebook_without_chapter_is_named(tmp_path, extension):
    import nbformat
    import runs

    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Run")]), tmp_path / "a.ipynb")
    with pytest.raises(ValueError, match=r"a\.ipynb: its first cell must link to its chapter"):
        runs.chapter_of(tmp_path / "a.ipynb")


def test_what_is_folded_or_in_a_table_takes_no_words(extension):
    import edition
    from docutils import nodes
    from docutils.utils import new_document

    def page(*parts):
        document = new_document("page")
        document += parts
        return document

    words = nodes.paragraph("", "word " * 1000)
    assert edition.minutes(page(words.deepcopy())) == 5
    body = nodes.container("", words.deepcopy(), nodes.table(), design_component="dropdown-body")
    assert edition.minutes(page(nodes.paragraph("", "word"), body)) == 1
    table = nodes.table("", nodes.tgroup("", nodes.tbody("", nodes.row("", nodes.entry("", words.deepcopy())))))
    assert edition.minutes(page(table)) == 1


def test_a_small_explorer_holds_what_it_shows_and_no_more(extension):
    import explore

    def group(name, *methods):
        state = {"kept": ["f0"], "host": [], "top": [[7, 0.9]]}
        return {
            "name": name, "grid": [2, 4], "at": [3], "dense": {}, "classes": [str(c) for c in range(10)], "onnx": {},
            "images": [{"src": str(i)} for i in range(3)], "methods": {method: {} for method in methods},
            "states": [{method: [None, state] for method in methods} for _ in range(3)],
            "costs": {method: [None, {"total": 5, "times": [1], "speed": "Speed: 1 ×"}] for method in methods},
        }  # fmt: skip

    data = {
        "methods": {name: {"title": name} for name in ("evit", "dtps", "random")}, "ratios": [0.2, 1.0],
        "paint": "grey", "sets": [group("photographs", "evit", "random"), group("digits", "evit", "dtps", "random")],
    }  # fmt: skip
    small = explore.part(data, ["dtps", "random"], 2, 0.5)
    [shown] = small["sets"]
    assert small["paint"] == "grey" and small["ratios"] == [0.2, 1.0]
    assert small["start"] == {"method": "dtps", "ratio": 0.5} and list(small["methods"]) == ["dtps", "random"]
    assert shown["name"] == "digits" and len(shown["images"]) == len(shown["states"]) == 2
    assert shown["states"][0] == {name: group("", "dtps")["states"][0]["dtps"] for name in ("dtps", "random")}
    assert shown["costs"]["dtps"] == [None, {"total": 5}] and shown["classes"] == {7: "7"} and "onnx" not in shown
    assert explore.part(data, ["evit", "dtps"], 9, 0.5)["sets"][0]["methods"] == {"evit": {}}  # of the first set
    with pytest.raises(ValueError, match="no set .* has states of 'tome'"):
        explore.part(data, ["tome"], 1, 0.5)


def test_prune_in_ten_minutes(tmp_path, monkeypatch, capsys):
    """The page's code, from its first line to its last, does what the page says of it; weights are random here."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False: create(name))
    monkeypatch.chdir(tmp_path)
    text = (TOP / "book/prune-in-ten-minutes.md").read_text()
    names = {}
    for code in re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        exec(compile(code, "prune-in-ten-minutes.md", "exec"), names)
        if "again =" in code:
            state = {key: value.clone() for key, value in names["model"].state_dict().items()}
    counted, timed = capsys.readouterr().out.splitlines()
    ten = front.ten()
    assert counted == f"{ten['dense']:.2f} → {ten['pruned']:.2f} GMACs"
    assert re.fullmatch(r"[\d.]+ times as fast \[[\d.]+, [\d.]+\]", timed)
    model, again, images, t = (names[name] for name in ("model", "again", "images", "t"))
    assert type(model) is timm.models.VisionTransformer and names["logits"].shape == (8, 1000)
    assert (t.kept[-1].shape, t.host[-1].shape) == ((8, 68), (8, 196))
    assert again.keep_ratio == 0.7 and all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
    assert any(not torch.equal(value, state[key]) for key, value in model.state_dict().items()), "it went on training"
    with torch.inference_mode():
        assert again(images).shape == (8, 1000)


def test_what_the_first_page_says():
    rows = front.photographs(TOP / "notebooks/results/deit-ti/family.json")
    said = front.numbers(rows)
    at = [row for row in rows if row["level"] == 0.7]
    assert said["best"]["right"] == max(row["right"] for row in at) > said["random"]["right"]
    best = next(row for row in at if row["right"] == said["best"]["right"])
    dense = next(row for row in rows if row["method"] == "dense")
    assert said["best"]["saved"] == pytest.approx(100 * (1 - best["macs"] / dense["macs"]))
    assert (said["dense"]["right"], said["n"]) == (dense["right"], 1000)
    assert len(said["table"].splitlines()) == 2 + len(rows)
    assert list(said["levels"]) == list(dict.fromkeys(said["levels"])) and set(said["levels"]) == {"0.7", "0.5", "0.3"}
    level = said["levels"]["0.5"]
    difference = (level["right"] - level["etps"]) / 10
    assert level["over"].startswith(f"{difference:+.1f} [")
    axes = front.figure(rows).axes[0]
    drawn = {line.get_label(): line.get_xydata() for line in axes.lines}
    assert drawn["eTPS"][0].tolist() == drawn["dense"][0].tolist()
    assert sorted(drawn["eTPS"][1:, 1] * 10) == pytest.approx([r["right"] for r in rows if r["name"] == "etps"][::-1])


# ---- in a built site


def target(page, link):
    return (page.parent / link["href"].split("#")[0]).resolve()


@built
@every_site
def test_next_walks_the_chapters(site):
    page, walked = site / "book/welcome.html", []
    while link := soup_of(page).select_one(".prev-next-footer .right-next"):
        there = target(page, link)
        assert target(there, soup_of(there).select_one(".prev-next-footer .left-prev")) == page
        page = there
        walked.append(page.relative_to(site).with_suffix("").as_posix())
    assert walked == WALK


@built
@every_site
def test_a_chapter_and_its_notebooks_are_one_click_apart(site, extension):
    import runs

    every = site / "book/runs.html"
    listed = [target(every, link) for link in soup_of(every).select("article a")]
    for path in NOTEBOOKS:
        run, chapter = site / f"notebooks/{path.stem}.html", site / f"{runs.chapter_of(path)}.html"
        for here, there in ((run, chapter), (chapter, run)):
            for where in (".under-title a", ".run-link a"):
                assert there in [target(here, link) for link in soup_of(here).select(where)], (here, where)
        assert not soup_of(run).select(".prev-next-footer a")
        assert run in listed


def words(page):
    """What is to be read of a page: no code, equation, table, control, or what is folded."""
    article = soup_of(page).find("article").__copy__()
    for other in article.select("script, style, pre, .math, table, details, .headerlink, .mini-explorer, #explorer"):
        other.decompose()
    return len(article.get_text(" ").split())


@built
@every_site
def test_the_path_can_be_read(site):
    path = ["book/welcome", *(entry["file"] for part in PATH for entry in PARTS[part])]
    counts = {page: words(site / f"{page}.html") for page in path}
    assert min(counts.values()) > 200, counts
    assert sum(counts.values()) <= WORDS, counts


@browser_needed
@every_site
def test_the_first_page_is_light_and_its_explorer_works_by_keyboard(site, visit):
    shown = []
    for _ in range(3):  # the quickest: other tests run beside this one
        page = visit((site / "book/welcome.html").as_uri())
        page.wait_for_function("document.querySelector('.mini-explorer').explorer?.state")
        shown.append(page.evaluate("performance.getEntriesByName('explorer-shown')[0].startTime"))
    assert min(shown) < 1000
    files = {Path(urlsplit(address).path) for address in page.asked if address.startswith("file:")}
    assert all(address.startswith(("file:", "data:", "blob:")) for address in page.asked)
    assert sum(file.stat().st_size for file in files) <= 1.5e6, sorted((f.stat().st_size, f.name) for f in files)
    slider = page.locator(".mini-explorer").get_by_label("Keep ratio ρ")
    before = page.locator(".mini-explorer .said").inner_text()
    slider.focus()
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("t => document.querySelector('.mini-explorer .said').innerText != t", arg=before)
    assert "ρ = 0.45" in page.locator(".mini-explorer .said").inner_text()
    page.locator(".mini-explorer .methods input:checked").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.querySelector('.mini-explorer .said').innerText.startsWith('eTPS')")
    page.keyboard.press("Shift+Tab")  # to the pictures
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.querySelector('.mini-explorer').explorer.request.image == 1")
    assert [card.get_attribute("href") for card in page.locator("article a.sd-stretched-link").all()] == [
        "explorer.html", "prune-in-ten-minutes.html", "ledger.html"
    ]  # fmt: skip
    assert not page.wrong


@browser_needed
@every_site
def test_a_chapter_draws_its_explorer_when_it_comes_near(site, visit):
    page = visit((site / "book/dynamicvit.html").as_uri())
    assert not page.evaluate("Boolean(document.querySelector('.mini-explorer canvas'))")
    page.locator(".mini-explorer").scroll_into_view_if_needed()
    page.wait_for_selector(".mini-explorer canvas")
    assert page.locator(".mini-explorer .said").inner_text().startswith("DynamicViT, ρ = 0.50")
    link = page.locator(".mini-more a").get_attribute("href")
    page = visit((site / "book" / link.split("?")[0]).as_uri() + f"?{link.split('?')[1]}&ratio=0.3")
    page.wait_for_function("document.querySelector('#explorer').explorer?.state")
    assert page.locator("#explorer .said").inner_text().startswith("DynamicViT, ρ = 0.30")
    assert not page.wrong


@browser_needed
@every_site
def test_the_ledger_is_searched(site, visit):
    entries = list(csv.DictReader((TOP / "book/ledger.csv").open(newline="")))
    page = visit((site / "book/ledger.html").as_uri())
    found, shown = page.locator(".ledger-filter output"), page.locator("details.ledger[open] tbody tr:visible")
    assert found.inner_text() == f"{len(entries)} of {len(entries)} rows" and shown.count() == 0
    page.get_by_label("Status").select_option("contradicted")
    wanted = [entry for entry in entries if entry["status"] == "contradicted"]
    assert found.inner_text() == f"{len(wanted)} of {len(entries)} rows" and shown.count() == len(wanted) > 0
    page.get_by_label("Paper").select_option("EViT")
    assert shown.count() == sum(entry["paper"] == "EViT" for entry in wanted)
    for label in ("Status", "Paper"):
        page.get_by_label(label).select_option("")
    page.get_by_label("Words").fill("imagewoof SEED")
    rows = shown.all_inner_texts()
    assert 0 < len(rows) < len(entries) and all("imagewoof" in row.lower() and "seed" in row.lower() for row in rows)
    page.get_by_label("Words").fill("no such words")
    assert found.inner_text().startswith("0 of ") and not page.locator("details.ledger:visible").count()
    assert not page.wrong


CODE = (
    '<div class="highlight-ipython3 notranslate"><div class="highlight"><pre><span></span>'
    '<span class="kn">import</span>'
    ' <span class="nn">tpbook</span>\n<span class="n">tpbook</span><span class="o">.</span><span class="n">prune</span>'
    '<span class="p">(</span><span class="n">{name}</span><span class="p">)</span>\n</pre></div>\n</div>'
)


@pytest.mark.parametrize("names", [("a", "b"), ("a",)])
def test_code_is_linked_as_sphinx_codeautolink_links_it(tmp_path, extension, names):
    """The page but for its code stays as it is, byte by byte."""
    import links
    from bs4 import BeautifulSoup
    from sphinx_codeautolink.extension.block import SourceTransform
    from sphinx_codeautolink.parse import LinkContext, Name

    page = "<p>1&nbsp;&lt; 2 <br/></p>".join(["<nav>x</nav>", *(CODE.format(name=name) for name in "ab"), "<p>end</p>"])
    prune = Name(["tpbook", "prune"], "tpbook.prune", 2, 2, LinkContext.none, "tpbook.prune")
    transforms = [SourceTransform(f"import tpbook\ntpbook.prune({name})", [prune], None, 1) for name in names]
    known, made = {"tpbook.prune": "book/api.html#tpbook.prune"}, []
    for link in (links.link_html, links.whole_page):
        (tmp_path / "notebooks").mkdir(exist_ok=True)
        (tmp_path / "notebooks/it.html").write_text(page)
        link("notebooks/it", tmp_path, transforms, known, {"ipython3": None}, [], disable_link_titles=False)
        made.append((tmp_path / "notebooks/it.html").read_text())
    assert made[0].count('href="../book/api.html#tpbook.prune"') == len(names)
    assert str(BeautifulSoup(made[0], "html.parser")) == made[1]
    assert links.CODE.sub("", made[0]) == links.CODE.sub("", page)
