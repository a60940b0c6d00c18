"""What pages show fits its place: code and figures here; in a browser, tests/test_site.py measures the rest."""

import ast
import re
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image
from sphinx.pycode import ModuleAnalyzer

from tpbook.book import plots

TOP = Path(__file__).parent.parent
NOTEBOOKS = sorted((TOP / "notebooks").glob("*.ipynb"))
PAGES = sorted((TOP / "book").glob("*.md"))
FOLDED = {"hide-input", "hide-cell", "remove-input", "remove-cell"}


@pytest.fixture
def fit(monkeypatch):
    monkeypatch.syspath_prepend(TOP / "book/extensions")
    import fit

    return fit


def meaning(code):
    """What runs: the tree, in which a docstring's line breaks count nothing."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            node.value.value = " ".join(node.value.value.split())
    return ast.dump(tree)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_code_of_a_notebook_is_shown_in_short_lines(path, fit):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            shown = fit.fit(cell.source)
            assert meaning(shown) == meaning(cell.source)
            if not FOLDED & set(cell.metadata.get("tags", [])):
                assert not [line for line in shown.split("\n") if len(line) > fit.WIDTH], "no place to break it"


BLOCK = re.compile(r"^( *)(`{3,})(?:python|\{code-block\} python)\n(.*?)^\1\2", re.MULTILINE | re.DOTALL)
INCLUDE = re.compile(r"literalinclude\} (\S+\.py)\n((?: *:[\w-]+:.*\n)*)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_of_a_chapter_is_shown_in_short_lines(page, fit):
    text = page.read_text()
    shown = [textwrap.dedent(code) for _, _, code in BLOCK.findall(text)]
    for file, options in INCLUDE.findall(text):
        source, said = (page.parent / file).read_text(), dict(re.findall(r":([\w-]+): ?(.*)", options))
        if name := said.get("pyobject"):
            tags = ModuleAnalyzer.for_string(source, Path(file).stem)
            tags.find_tags()
            _, first, last = tags.tags[name]
            source = textwrap.dedent("\n".join(source.splitlines()[first - 1 : last]))
        assert said["language"] in fit.LANGUAGES
        shown.append(source)
    for code in shown:
        fitted = fit.fit(code)
        assert meaning(fitted) == meaning(code)
        assert not [line for line in fitted.split("\n") if len(line) > fit.WIDTH], "no place to break it"


LONG = '''
def told(name, value):
    """A text of one line that is longer than a column of a page is wide, and so it goes on below."""
    if name not in ("first", "second", "third") and value not in (1, 2, 3) or value is None:  # one of the two
        return f"{name} is not one of {', '.join(('first', 'second'))}, and neither is {{}} beside {value:.2f}"
    return {name: value for name, value in (("first", 1), ("second", 2), ("third", 3), ("fourth", 4))}[name]
'''


def test_a_long_line_is_broken_where_that_says_the_same(fit):
    shown = fit.fit(LONG)
    assert max(map(len, shown.split("\n"))) <= fit.WIDTH and meaning(shown) == meaning(LONG)
    before, after = {}, {}
    exec(LONG, before), exec(shown, after)
    for call in (("none", 4), ("third", 7)):
        assert before["told"](*call) == after["told"](*call)
    comment = next(i for i, line in enumerate(shown.split("\n")) if line.strip() == "# one of the two")
    assert shown.split("\n")[comment + 1].startswith("    if name")  # it stands above what it was beside


def test_what_is_short_or_no_python_stays(fit):
    short = "x = [\n    1, 2,\n\n    3,\n]  # as the author laid it out"
    assert fit.fit(short) == short
    assert fit.fit("x = {'a': 1}  # fmt: skip") == "x = {'a': 1}"
    for other in ("train() { " + "word " * 20 + "(", "x = " + "a" * 90, 'text = """\n' + "word " * 30 + '"""'):
        assert fit.fit(other) == other


@pytest.mark.parametrize("name", ["lines.svg", "pictures.jpg"])
def test_a_figure_is_made_for_a_phone_and_for_dark_pages(tmp_path, name):
    """However it was laid out: no wider than is read there, no text below 9 px in a column of 342."""
    plots.style()
    figure, axes = plt.subplots(2, figsize=(11, 4), layout="constrained")
    axes[0].plot([0, 1], [0, 1], label="a line")
    axes[0].set_title("small", fontsize=6)
    axes[0].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    axes[1].barh(["a label that needs a good part of the width"], [1])
    plots.save(figure, tmp_path, name)
    if name.endswith(".svg"):
        drawing = (tmp_path / name).read_text()
        wide = float(re.search(r'viewBox="0 0 ([\d.]+)', drawing)[1]) / 72
        sizes = {round(100 * float(size), 1) for size in re.findall(r"scale\(([\d.]+) -\1\)", drawing)}
        grounds = re.findall(r'id="patch_(?:1|2)">\s*<path [^>]*style="([^"]*)"', drawing)  # figure's, axes'
        assert grounds and all("fill: none" in ground for ground in grounds)
        assert min(sizes) == plots.SIZE
    else:
        picture = Image.open(tmp_path / name)
        wide = picture.width / plt.rcParams["savefig.dpi"]
        corner = picture.convert("RGB").getpixel((2, 2))
        assert max(abs(a - 255 * b) for a, b in zip(corner, to_rgb(plots.DARK))) < 4
        assert {text.get_color() for text in figure.findobj(Text)} == {plots.LIGHT}
        assert min(text.get_fontsize() for text in figure.findobj(Text)) == plots.SIZE
    assert plots.WIDE - 1 < wide <= plots.WIDE + 0.05 and plots.SIZE * 342 / 72 / wide >= 9
    plt.close(figure)


def test_a_figure_that_does_not_lay_itself_out_is_narrowed_too(tmp_path):
    plots.style()
    parts = ["MLP", "q, k, v and output projections", "QKᵀ and AV", "patch embedding and head"]
    shares = pd.DataFrame([[50, 30, 15, 5]] * 2, ["DeiT-Ti", "DeiT-S at 384 px"], parts)
    ax = shares.plot.barh(stacked=True, figsize=(8, 2))
    ax.legend(loc="upper center", bbox_to_anchor=(0.4, -0.25), ncol=2)
    plots.save(ax.figure, tmp_path, "bars.svg")
    wide = float(re.search(r'viewBox="0 0 ([\d.]+)', (tmp_path / "bars.svg").read_text())[1]) / 72
    assert plots.WIDE - 0.2 < wide < plots.WIDE + 0.05
    plt.close(ax.figure)
