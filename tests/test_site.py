"""The built site, as a reader meets it: in a browser, from disk, with the network cut.

Looks at every site that `make book` has built under `_build` since its sources changed. Without one, or without an
installed Chromium or npm, its tests are skipped. `TPBOOK_SITE` names another site.
"""

import functools
import json
import os
import re
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from conftest import AXE, CHROMIUM, CUT, DARK, LONG, PICTURES, SMALL, WIDE, serious
from PIL import Image

from tpbook.book import plots

bs4 = pytest.importorskip("bs4")

TOP = Path(__file__).parent.parent
SOURCES = ("_config.yml", "_toc.yml", "book/**/*", "notebooks/*.ipynb", "tpbook/**/*.py")
CHANGED = max(path.stat().st_mtime for pattern in SOURCES for path in TOP.glob(pattern) if path.is_file())
SITES = [TOP / "_build" / profile / "site/_build/html" for profile in ("digits", "imagenette")]
SITES = [site for site in SITES if (site / "search.html").exists() and (site / "search.html").stat().st_mtime > CHANGED]
if "TPBOOK_SITE" in os.environ:
    SITES = [Path(os.environ["TPBOOK_SITE"]).resolve()]
PAGES = [page for site in SITES for page in sorted(site.rglob("*.html")) if "_static" not in page.parts]

built = pytest.mark.skipif(not SITES, reason="needs a site built since its sources changed: make book")
browser_needed = pytest.mark.skipif(
    not (SITES and CHROMIUM and AXE.exists()),
    reason="needs such a site, an installed Chromium, and npm, which brings MathJax and axe-core",
)


def name_of(page):
    site = next(site for site in SITES if site in page.parents)
    return f"{site.parts[-4]}/{page.relative_to(site).with_suffix('')}"


every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


def listings():
    """Pages of code that hold nothing new: no class, no script, no longer a word outside the code than pages before."""
    known, longest, found = set(), 0, set()
    for page in (page for page in PAGES if "_modules" in page.parts):
        text = page.read_text()
        kinds = set(re.findall(r'class="([^"]*)"|src="[./]*([^"?]*)', text))
        words = re.sub(r"<pre>.*?</pre>|<script.*?</script>|<[^>]*>", " ", text, flags=re.DOTALL).split()
        if kinds <= known and max(map(len, words)) <= longest:
            found.add(page)
        known, longest = known | kinds, max(longest, *map(len, words))
    return found


# of pages that are the same in both editions, to the byte and the address, one is opened; of code, what is new
OPENED = {(page.name, page.parent.name, page.read_bytes()): page for page in reversed(PAGES)}
every_other_page = pytest.mark.parametrize("page", sorted({*OPENED.values()} - listings()), ids=name_of)
every_site = pytest.mark.parametrize("site", SITES, ids=lambda site: site.parts[-4])


@functools.cache
def soup_of(page):
    return bs4.BeautifulSoup(page.read_text(), "html.parser")


@functools.cache
def anchors_of(page):
    soup = soup_of(page)
    return {tag.get("id") for tag in soup.find_all(id=True)} | {tag.get("name") for tag in soup.find_all("a")}


ONE = re.compile(r"[a-z]{3,}\(s\)|(?<![\d.,/–-])1 (epoch|image|seed|thread|round|row|token|run)s\b")  # "1 epochs"


@built
@every_page
def test_page(page):
    """No error shown as content, nothing empty, no link or picture that leads nowhere."""
    text = page.read_text()
    assert len(text.encode()) < 2e6
    soup = soup_of(page)
    article = soup.find("article") or soup
    prose = article.get_text()
    if page.parent.name == "book" and page.name != "api.html" and "_modules" not in page.parts:
        assert "{{" not in prose, "a number was not filled in"
    for sign in ("Traceback (most recent call last)", "Substitution error", "[object Object]", "<IPython.core"):
        assert sign not in prose, sign
    for words in article.find_all(["p", "figcaption", "td"]) if page.name != "api.html" else []:
        assert not ONE.search(words.get_text()), words
    assert not article.select(".problematic, .system-message, .cell_output .stderr")
    for code in article.select(".highlight-python pre"):
        assert re.search(r"^\S", code.get_text(), re.MULTILINE), f"indented: {code.get_text()}"
    for output in article.select(".cell_output"):
        assert output.get_text(strip=True) or output.find(["img", "svg", "object"]), "an empty output"
    for tag, attribute in (("a", "href"), ("img", "src"), ("script", "src"), ("link", "href")):
        for target in (element.get(attribute) for element in soup.find_all(tag)):
            parts = urlsplit(target or "")
            if parts.scheme or not target or page.name == "404.html":
                continue
            there = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            assert there.exists(), f"{target} is not there"
            if parts.fragment and there.suffix == ".html" and tag == "a":
                assert unquote(parts.fragment) in anchors_of(there), f"{target}: no such place"


@built
@every_page
def test_every_picture_has_words(page):
    if page.parent.name not in ("book", "notebooks"):
        return
    for image in (soup_of(page).find("article") or soup_of(page)).find_all("img"):
        assert len(image.get("alt", "")) > 10 and "results/" not in image["alt"], image


@built
@every_site
def test_weight(site):
    """Beside what the explorer loads at a press of its button."""
    files = [path for path in site.rglob("*") if path.is_file() and path.parent.name not in ("onnxruntime", "models")]
    assert sum(path.stat().st_size for path in files) < 25e6


@built
@every_site
def test_code_leads_to_source_and_source_to_chapter(site):
    for source in sorted((TOP / "tpbook").rglob("*.py")):
        if source.stem == "__init__":
            continue
        page = site / "_modules" / source.relative_to(TOP).with_suffix(".html")
        assert soup_of(page).select(".under-title a"), f"{source.name} names no chapter"
    for page in sorted((site / "book").glob("*.html")):
        for shown in soup_of(page).select("p.shown"):
            assert "_modules/tpbook/" in shown.find_all("a")[-1]["href"]
        for code in soup_of(page).select("article code.literal"):
            if re.fullmatch(r"tpbook(\.\w+)+", code.get_text()) and not code.find_parent("a"):
                assert code.find_parent(class_=["sig", "shown"]) or not importable(code.get_text()), code


def importable(name):
    import tpbook

    try:
        functools.reduce(getattr, name.split(".")[1:], tpbook)
    except AttributeError:
        return False
    return True


@built
@every_site
def test_notebooks_can_be_taken_along(site):
    for page in sorted((site / "notebooks").glob("*.html")):
        if "http-equiv" in page.read_text():  # sends on
            continue
        links = [a["href"] for a in soup_of(page).select(".dropdown-download-buttons a")]
        notebooks = [page.parent / link for link in links if link.endswith(".ipynb")]
        assert notebooks and all(notebook.resolve().exists() for notebook in notebooks), page


@built
@every_site
def test_published_addresses_stay(site):
    """Whoever kept a link finds its page, or is sent on: addresses are only ever added to this list."""
    published = (TOP / "book/published.txt").read_text().split()
    for address in published:
        assert (site / address).exists(), f"{address} is gone: name its successor in book/redirects.txt"
    pages = {page.relative_to(site).as_posix() for page in [*site.glob("book/*.html"), *site.glob("notebooks/*.html")]}
    assert pages <= set(published), "a new page: add it to book/published.txt"


@built
@every_site
def test_the_explorer_carries_no_clock(site):
    """Its states are counted; what a machine took while the book was made is no part of them."""
    data = soup_of(site / "book/explorer.html").find(id="explorer-data").string
    assert '"kept"' in data and not re.search(r'"(speed|times|seconds|ms)":', data)


@built
@every_site
def test_speed_is_found_before_it_is_tabled(site):
    """A part begins with a sentence of numbers, then its figure; all tables are folded."""
    article = soup_of(site / "book/speed.html").find("article")
    assert not [table for table in article.find_all("table") if not table.find_parent("details")]
    sections = [figure.find_parent("section") for figure in article.find_all("figure")]
    assert len(sections) == len(set(map(id, sections))) >= 7
    for section in sections:
        first = section.find("p")
        assert re.search(r"\d", first.get_text()) and first.sourceline < section.find("figure").sourceline, first


# ---- in a browser


DRAWN = "new Promise(drawn => requestAnimationFrame(() => requestAnimationFrame(drawn)))"


@functools.cache
def smallest(picture, width):
    """Pixels of the smallest text of a figure shown so wide; of one in pixels, whose text nobody can read here, what
    `plots.save` sees to."""
    if picture.suffix == ".svg":
        drawing = picture.read_text()
        points = [100 * float(size) for size in re.findall(r"scale\(([\d.]+) -\1\)", drawing)]  # as matplotlib says it
        natural = float(re.search(r'viewBox="0 0 ([\d.]+)', drawing)[1])
        return min(points) * width / natural
    dots = {".jpg": 150, ".png": 100}[picture.suffix]  # an inch: plots.style
    return plots.SIZE * dots / 72 * width / Image.open(picture).width


# the kinds of elements that axe tells apart, each with its first element in `window.kinds`: an element's own and its
# parent's tag and class, its role, attributes and colours
KINDS = """() => {
    const named = e => e && e.tagName + '.' + (e.getAttribute('class') || '').replace(/\\d+/g, '0');
    window.kinds = {};
    for (const element of document.querySelectorAll(':not(mjx-container *)')) {
        const colours = (element.getAttribute('style') || '').match(/(color|background)[^;]*/g);
        const traits = [element.role, element.getAttributeNames().sort(), colours, !element.firstChild];
        kinds[[named(element.parentElement), named(element), ...traits].join(' ')] ??= element;
    }
    return Object.keys(kinds);
}"""


@pytest.fixture(scope="session")
def seen():
    """The kinds of elements that axe has looked at."""
    return set()


@browser_needed
@every_other_page
def test_in_a_browser(page, turn, seen):
    """Light and dark, wide and narrow: nothing fails, nothing sticks out, nobody is shut out.

    Whom it shuts out is asked of kinds of elements that no page before it held; a page by itself is asked as a whole.
    """
    if page.name == "404.html" or "http-equiv" in page.read_text():
        pytest.skip("lives on a server, or sends on")
    shown = turn(page.as_uri())
    shown.add_style_tag(content="* { transition: none !important }")  # of menus that slide, which is waited for else
    kinds = set(shown.evaluate(KINDS)) - seen
    where = f"{json.dumps(sorted(kinds))}.map(kind => kinds[kind])"
    for scheme, widths in {"light": (390, 1280), "dark": (1280, 390)}.items():
        if scheme == "dark" and not kinds:
            break  # no colour and no drawing of a new kind
        shown.emulate_media(color_scheme=scheme)
        shown.wait_for_function(f"document.documentElement.dataset.theme == '{scheme}'")
        for width in widths:
            shown.set_viewport_size({"width": width, "height": 900})
            shown.evaluate(DRAWN)  # the page hears of its new size before it draws
            assert not shown.evaluate(WIDE), f"{scheme}: wider than {width} px"
            assert not shown.evaluate(CUT), f"{scheme}: cut off at {width} px"
            assert width < 1280 or not shown.evaluate(LONG), f"{scheme}: does not fit {width} px"
        found = serious(shown, DARK if scheme == "dark" else None, where) if kinds else {}
        assert not found, f"{scheme}: {json.dumps(found, indent=1)}"
    seen |= kinds
    shown.set_viewport_size({"width": 390, "height": 900})
    shown.evaluate(DRAWN)
    assert not shown.evaluate(SMALL), "drawn too small for a phone"
    for address, width, column in shown.evaluate(PICTURES):
        assert width > column - 2, f"{address} leaves a phone's column of {column} px empty"
        assert smallest(Path(unquote(urlsplit(address).path)), width) >= 9, f"{address}: text below 9 px on a phone"
    shown.evaluate("document.querySelectorAll('article details').forEach(folded => folded.open = true)")
    shown.evaluate(DRAWN)
    assert not shown.evaluate(CUT), "what was folded is cut off"
    assert not shown.evaluate("[...document.images].filter(i => !i.naturalWidth).map(i => i.src)")
    assert not shown.evaluate("document.querySelectorAll('[data-mjx-error], mjx-merror').length")
    unset = "[...document.querySelectorAll('.math')].filter(m => !m.querySelector('mjx-container')).length"
    assert not shown.evaluate(unset), "an equation was not set"
    assert not shown.wrong


@browser_needed
@every_site
def test_search_from_disk(site, visit):
    page = visit((site / "search.html").as_uri() + "?q=predictor")
    page.wait_for_selector("#search-results li a")
    found = page.eval_on_selector_all("#search-results li a", "links => links.map(a => a.href)")
    assert any("dynamicvit" in link for link in found)
    assert not page.wrong


@browser_needed
@every_site
def test_print(site, visit):
    """On paper: no menus, nothing cut off at the right, solutions open."""
    page = visit((site / "book/evit.html").as_uri(), 794)  # A4 at 96 dpi
    page.emulate_media(media="print")
    wide = page.evaluate(WIDE)
    assert not wide, wide
    for selector in (".bd-sidebar-primary", ".bd-header-article", "#pst-back-to-top", ".prev-next-footer"):
        assert not page.evaluate("s => [...document.querySelectorAll(s)].some(e => e.offsetParent)", selector), selector
    assert page.query_selector("article details:not([open])")
    assert len(page.pdf(format="A4")) > 50_000
    assert not page.query_selector("article details:not([open])")


@pytest.fixture
def served():
    """A site → its address on a server on this machine."""
    servers = []

    def serve(site):
        class Quiet(SimpleHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def send_error(self, code, *args):
                if code != 404:
                    return super().send_error(code, *args)
                self.send_response(404)
                self.send_header("Content-Type", "text/html")
                self.end_headers()
                self.wfile.write((site / "404.html").read_bytes())

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site)))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield serve
    for server in servers:
        server.shutdown()


@browser_needed
@every_site
def test_not_found(site, visit, served):
    page = visit(f"{served(site)}/book/no-such-page.html")
    assert "not here" in page.inner_text("article")
    page.click("article a[href*='welcome']")
    assert "Token pruning in vision transformers" in page.inner_text("h1")
    assert [wrong for wrong in page.wrong if "404" not in wrong] == []
