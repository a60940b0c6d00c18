"""Notebooks are clean sources, and a run is whole or not there."""

import json
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
from colorspacious import cspace_convert, deltaE
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from matplotlib.text import Annotation
from sklearn.metrics import average_precision_score
from sphinx.pycode import ModuleAnalyzer

from tpbook import METHODS, moved
from tpbook.book import diagrams, example, experiments, maps, plots
from tpbook.methods import Method, evit, tps

TOP = Path(__file__).parent.parent
NOTEBOOKS = sorted((TOP / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_sources(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    parameters = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert len(parameters) == 1
    for line in parameters[0].source.splitlines():  # typed and commented, as `papermill --help-notebook` shows them
        assert re.fullmatch(r"\w+: (str|int|float|bool|list) = .+  # .+", line), line
    for cell in code:
        if "plt." in cell.source or "plots.figure" in cell.source:
            if "plots.save" in cell.source:
                assert cell.metadata["mystnb"]["image"]["alt"], cell.source


@pytest.mark.parametrize("path", [*NOTEBOOKS, *sorted((TOP / "notebooks").glob("*.py"))], ids=lambda p: p.name)
def test_no_notebook_imports_from_where_things_were(path):
    text = path.read_text()
    if path.suffix == ".ipynb":
        text = "\n".join(cell.source for cell in nbformat.reads(text, 4).cells if cell.cell_type == "code")
    for line in re.findall(r"^(?:from tpbook import|import tpbook\.|from tpbook\.).*", text, flags=re.MULTILINE):
        names = re.split(r"\W+", line.removeprefix("from tpbook import"))[: None if "tpbook import" in line else 3]
        assert not set(names) & set(moved.MOVED) or re.match(r"from tpbook\.(book|methods|training)", line), line


INCLUDE = re.compile(r"(`{3}\{|\.\. )literalinclude(?:\}|::) (\S+)\n((?: *:[\w-]+:.*\n)*)")


@pytest.mark.parametrize("page", sorted((TOP / "book").glob("*.md")), ids=lambda p: p.stem)
def test_code_that_a_page_shows_is_there(page):
    for _, file, options in INCLUDE.findall(page.read_text()):
        source = page.parent / file
        assert source.is_file(), file
        said = dict(re.findall(r":([\w-]+): ?(.*)", options))
        text = source.read_text()
        if "pyobject" in said:
            tags = ModuleAnalyzer.for_string(text, source.stem)
            tags.find_tags()
            assert said["pyobject"] in tags.tags, f"{file} has no {said['pyobject']}"
            _, first, last = tags.tags[said["pyobject"]]
            text = "\n".join(text.splitlines()[first - 1 : last])
        for edge in ("start-at", "end-before"):
            assert said.get(edge, "").strip('"') in text, f"{file}: {edge} {said[edge]}"


@pytest.mark.parametrize("page", [*sorted((TOP / "book").glob("*.md")), *TOP.glob("*.md")], ids=lambda p: p.stem)
def test_files_that_a_page_names_are_there(page):
    for name in re.findall(r"`((?:tpbook|notebooks|book|recipes|tests)/[\w./-]*\w)`", page.read_text()):
        assert (TOP / name).exists() or name == "notebooks/results/imagenet", name


@pytest.mark.parametrize("page", sorted((TOP / "book").glob("*.md")), ids=lambda p: p.stem)
def test_every_picture_has_a_text_alternative(page):
    text = page.read_text()
    for figure in re.findall(r"```\{figure\}.*?```", text, flags=re.DOTALL):
        assert re.search(r"^:alt: \S.{30,}", figure, flags=re.MULTILINE), figure


TEMPLATE = [
    "The problem", "The idea in one picture", "The equations", "The code that is those equations", "The experiment",
    "Where it breaks", "Summary", "Exercises",
]  # fmt: skip


CHAPTERS = (
    "masked-fine-tuning", "dynamicvit", "evit", "tps", "merging", "a-count-for-each-image", "tokens-that-come-back"
)  # fmt: skip


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_method_chapter_follows_the_template(name):
    text = (TOP / "book" / f"{name}.md").read_text()
    assert re.findall(r"^## (.+)$", text, flags=re.MULTILINE) == TEMPLATE
    for part in ("**What you will learn.**", "{literalinclude} ../tpbook/", "results/stage-", "**Further reading.**"):
        assert part in text


@pytest.mark.parametrize("sight", ["protanomaly", "deuteranomaly", "tritanomaly"])
def test_colours_are_told_apart(sight):
    def seen(colour):
        return cspace_convert(to_rgb(colour), {"name": "sRGB1+CVD", "cvd_type": sight, "severity": 100}, "sRGB1")

    assert all(deltaE(seen(a), seen(b)) > 10 for a, b in combinations(plots.COLOURS.values(), 2))
    assert len(set(plots.MARKS.values())) == len(plots.MARKS)


def test_a_forest_plot_shows_each_difference_with_its_interval():
    ahead, open_ = {"difference": 2.0, "low": 1.0, "high": 4.0}, {"difference": -1.0, "low": -3.0, "high": 0.5}
    none = {"difference": 0.0, "low": -1.0, "high": 1.0}
    figure = plots.forest({"one": {"ρ = 0.5": ahead, "ρ = 0.3": open_}, "other": ("#D55E00", {"ρ = 0.7": none})})
    (ax,) = figure.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["", "ρ = 0.5", "ρ = 0.3", "", "ρ = 0.7"]
    assert [text.get_text() for text in ax.texts] == ["one", "other"]
    drawn = [(bar.get_segments()[0][:, 0].tolist(), bar.get_segments()[0][0, 1]) for bar in ax.collections]
    assert drawn == [([1.0, 4.0], 1), ([-3.0, 0.5], 2), ([-1.0, 1.0], 4)]
    assert {"black", "#D55E00"} <= {line.get_color() for line in ax.lines}
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first is above
    plt.close(figure)


def test_a_diagram_shows_what_the_package_does(monkeypatch):
    """Each stage names its score and reduction, keeps the best, and mixes the colours as the method does."""
    monkeypatch.setitem(METHODS, "new", Method("attention_received", "drop", "before", "ceil", "nobody"))
    own = {  # which are kept, and the line that says so; of the others the four best
        "random": ([1, 3, 4, 6], "keep 4 of 8, ρ = 0.5"),
        "dynamicvit": ([2, 3, 5, 6], "keep 4 of 8, ρ = 0.5"),
        "dtps": ([2, 3, 5, 6], "keep 4 of 8, ρ = 0.5"),
        "tome": ([0, 2, 3, 4, 6], "keep 5 of 8, ρ = 0.7: every other one may go"),
        "ats": ([1, 2, 3, 4, 5, 6], "keep 6 of 8, ρ = 1: what ρN points fall on"),
        "dpcknn": ([1, 2, 3, 4], "keep 4 of 8, ρ = 0.5"),
        "masked": ([0, 1, 3, 5, 6], "5 of 8 are visible"),
    }
    above = [1, 2, 3, 5], "keep those above a threshold, here 4 of 8"
    joined = {"merge": [4, 6, 0], "cluster": [4, 3, 3, 4]}  # whom each of the others joins
    for method, how in {**METHODS, "masked": METHODS["random"]}.items():
        kept, line = own.get(method, ([1, 2, 3, 5], "keep 4 of 8, ρ = 0.5") if how.chooses.counted else above)
        score, reduced = (how.score.words, how.reduce.words) if method != "masked" else diagrams.MASKED[::2]
        figure = diagrams.stage(method)
        axes = figure.axes[0]
        words = [text.get_text() for text in axes.texts]
        assert {score, reduced, line} <= set(words)
        others = [i for i in range(8) if i not in kept]
        x, rest = example.X[None, kept], example.X[None, others]
        squeezed, host = tps.squeeze(x, rest)
        fused = evit.weighted_sum(rest, diagrams.ROW[None, others])
        hosts = joined.get(how.reduce.name, [])
        groups = [[k, *(i for i, h in zip(others, hosts) if h == k)] for k in kept]
        means = torch.stack([example.X[group].mean(dim=0) for group in groups])[None]
        after, ends = {
            "drop": (x, []),
            "bypass": (x, []),
            "skip": (x, []),
            "fuse": (torch.cat([x, fused], dim=1), [8] * 4),
            "squeeze": (squeezed, [kept[i] for i in host[0]]),
        }.get(how.reduce.name, (means, hosts))
        row = [patch for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_y() == 3.2]
        drawn = [patch.get_facecolor()[:3] for patch in row if patch.get_facecolor()[3]]
        torch.testing.assert_close(torch.tensor(drawn), after[0, :, :3])
        names = [*map(str, kept), "Σ"][: len(drawn)]
        last = words.index("cls", words.index(line)) + 1  # of the row of kept ones
        left = words[words.index("cls", last) + 1 :]
        assert left[: len(names)] == names
        said = left[len(names) : left.index(reduced)]  # a line for each channel, its name before the numbers
        columns = zip(example.CHANNELS, after[0].T.tolist())
        assert said == [word for channel, column in columns for word in (channel, *(f"{v:.2f}" for v in column))]
        arrows = [(*text.xyann, *text.xy) for text in axes.texts if isinstance(text, Annotation)]
        assert arrows == [(i + 1.1, 5.0, end + 1.1, 3.95) for i, end in zip(others, ends)]
        waits = len(others) * how.reduce.rejoins
        gone = {"×": 0 if ends or waits else len(others), how.reduce.gone: waits}
        assert {word: words.count(word) for word in gone} == gone
        bars = [patch for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_y() == 7.1]
        assert len(bars) + words.count("∞") == 8 and (words.count("∞") == 4) is (method == "tome")
        assert all(text.get_size() * 342 / 389 > 9 for text in axes.texts if text.get_text()), "too small on a phone"
        plt.close(figure)


@pytest.mark.parametrize(("ground", "dark"), [("#ffffff", False), ("#14181e", True)])
def test_a_diagram_is_seen_on_light_and_dark_pages(ground, dark):
    """WCAG's contrast of 4.5 for words, 3 for marks; nothing is laid under the drawing."""

    def light(colour):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear)) + 0.05

    def contrast(colour):
        return max(light(colour), light(ground)) / min(light(colour), light(ground))

    for method in ("dynamicvit", "evit", "etps", "tome", "masked"):
        figure = diagrams.stage(method, dark)
        assert figure.get_facecolor()[3] == 0
        axes = figure.axes[0]
        names = {str(i) for i in range(8)} | {"Σ"}  # those stand on the tokens
        for text in axes.texts:
            if (word := text.get_text()) and word not in names:
                assert contrast(text.get_color()) > (3 if word in "∞×" else 4.5), word
        bars = [patch for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_y() == 7.1]
        assert all(contrast(bar.get_facecolor()[:3]) > 3 for bar in bars)
        plt.close(figure)


def run(source, target, *parameters):
    command = [sys.executable, TOP / "notebooks" / "run.py", source, target, *parameters]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def source(tmp_path):
    notebook = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    )
    notebook.cells = [
        nbformat.v4.new_code_cell("n: int = 1  # how many", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("print(6 // n)"),
    ]
    nbformat.write(notebook, tmp_path / "source.ipynb")
    return tmp_path / "source.ipynb"


def test_run(source, tmp_path):
    target = tmp_path / "out" / "done.ipynb"
    assert run(source, target, "n=3").returncode == 0
    cells = nbformat.read(target, as_version=4).cells
    assert cells[2].outputs[0].text == "2\n"
    assert {"injected-parameters", "hide-input"} <= set(cells[1].metadata.tags)
    assert all(output.get("name") != "stderr" for cell in cells[1:] for output in cell.outputs)
    assert [p.name for p in target.parent.iterdir()] == ["done.ipynb"]


def test_a_failing_notebook(source, tmp_path):
    target = tmp_path / "out" / "done.ipynb"
    run(source, target, "n=1")
    failed = run(source, target, "n=0")
    assert failed.returncode != 0
    assert "ZeroDivisionError" in failed.stderr and "done.failed.ipynb" in failed.stderr
    assert [p.name for p in target.parent.iterdir()] == ["done.failed.ipynb"]
    run(source, target, "n=2")  # mended
    assert [p.name for p in target.parent.iterdir()] == ["done.ipynb"]


def test_what_a_killed_or_renamed_notebook_left_is_no_part_of_the_book(source, tmp_path, monkeypatch):
    """Pages and their numbers are of the notebooks that there are, whatever else lies beside."""
    monkeypatch.syspath_prepend(TOP / "book")
    import render

    out = tmp_path / "out"
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks/here.ipynb").write_text(source.read_text())
    (tmp_path / "notebooks/results").symlink_to(TOP / "notebooks/results")
    assert run(source, out / "notebooks/here.ipynb", "n=2", "profile=digits").returncode == 0
    for left in ("here.part.ipynb", "here.failed.ipynb", "old.ipynb"):
        (out / "notebooks" / left).write_text("{")
    for file in ("here/here-now.json", "here/runs/result.json", "old/old.json", "stray.json"):
        (out / "results" / file).parent.mkdir(parents=True, exist_ok=True)
        (out / "results" / file).write_text(json.dumps({"of": file}))
    monkeypatch.setattr(render, "TOP", tmp_path)
    assert render.numbers(render.written(out)) == {"here_now": {"of": "here/here-now.json"}}
    said = render.status(out)
    assert said["profile"] == "digits" and "here" in said["table_notebooks"] and "old" not in said["table_notebooks"]
    render.tidy(out)
    assert [path.name for path in (out / "notebooks").iterdir()] == ["here.ipynb"]
    assert {path.name for path in (out / "results").iterdir()} == {"here", "stray.json"}
    assert (out / "results/here/runs/result.json").exists()


def test_what_notebooks_begin_with(tmp_path):
    """A profile is known before anything is made; a page's training is as large as it says; trainings begin anew."""
    with pytest.raises(ValueError, match="profile must be digits or imagenette, got 'cats'"):
        experiments.begin("cats", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    experiments.begin("digits", tmp_path / "out")
    (experiments.runs(tmp_path / "out") / "old").mkdir(parents=True)
    assert not experiments.runs(tmp_path / "out").exists() and (tmp_path / "out").is_dir()

    asked = {"epochs": 2, "train_images": 0, "test_images": 7, "digits": (400, 100), "imagenette": (500, 250)}
    assert experiments.size("digits", "slice", **asked) == {"epochs": 2, "train_images": 400, "test_images": 7}
    assert experiments.size("imagenette", "slice", **asked) == {"epochs": 1, "train_images": 500, "test_images": 7}
    assert experiments.size("digits", "recipe", **asked) == {}

    x, labels = torch.eye(5)[torch.tensor([0, 1, 2, 3, 4])], torch.tensor([0, 1, 4, 3, 0])
    seen = []
    right = experiments.right(lambda part: seen.append(len(part)) or part, x, labels, batch=2)
    assert right.tolist() == [True, True, False, True, False] and seen == [2, 2, 1]


def test_what_a_chapter_measures_of_a_model(small, images):
    """Probabilities of the right class, and class tokens block by block."""
    model = small("deit")
    x, labels = images(model), torch.tensor([1, 0])
    with torch.no_grad():
        y = model._pos_embed(model.patch_embed(x))
        after = [y := block(y) for block in model.blocks]
        found = experiments.class_tokens(model, x, batch=1)
        assert torch.allclose(found, torch.stack([state[:, 0] for state in after]), atol=1e-6)
        logits = model(x)
        first, second = logits.argmax(1).tolist()
        assert experiments.confidence(model, x, torch.tensor([first, 1 - min(second, 1)]))[0].tolist() == [True, False]
        right, p = experiments.confidence(model, x, labels, batch=1)
        assert torch.allclose(p, logits.softmax(1)[[0, 1], labels], atol=1e-6)
        assert torch.equal(right, experiments.right(model, x, labels))
    assert not any(block._forward_hooks for block in model.blocks)


def test_average_precision_is_scikit_learns():
    """Of equal scores too; and of a patch that stands alone."""
    scores, truth = torch.randn(20, 49).round(decimals=1), torch.rand(20, 49) < 0.2
    truth[:, 7] = True
    scores[0], truth[1] = 0.0, torch.arange(49) == 3
    want = [100 * average_precision_score(t, s) for s, t in zip(scores.numpy(), truth.numpy())]
    assert maps.precision(scores, truth) == pytest.approx(want, abs=1e-3)


def test_intervals_are_drawn_where_they_are():
    figure, ax = plt.subplots()
    said = {1: {"percent": 50.0, "low": 40.0, "high": 65.0}, 2: {"percent": 80.0, "low": 79.0, "high": 90.0}}
    plots.intervals(ax, list(said), said.values(), "percent", color="#D55E00")
    line, _, (bars,) = ax.containers[0]
    assert line.get_xydata().tolist() == [[1, 50], [2, 80]] and line.get_color() == "#D55E00"
    assert [part[:, 1].tolist() for part in bars.get_segments()] == [[40, 65], [79, 90]]
    plt.close(figure)
