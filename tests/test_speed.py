"""What the pages say of committed clocks; and that no chapter quotes a clock that ran while the book was made."""

import ast
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest

from tpbook.book import speed, speed_plots

TOP = Path(__file__).parent.parent
SHARED = {"model": "deit_small_patch16_224", "image_size": 224, "dtype": "bfloat16", "rounds": 31}


def rows_of(batch, mode, ratios, commit_ms=10.0, **more):
    """A dense row, and one a method with its × dense and an interval of ± 0.01."""
    own = {**SHARED, "batch": batch, "mode": mode, **more}
    dense = [{**own, "method": "dense", "keep_ratio": 1.0, "ms": commit_ms}]
    return dense + [
        {
            **own, "method": method, "keep_ratio": rho, "ms": commit_ms / ratio,
            "times_dense": [ratio, ratio - 0.01, ratio + 0.01],
        } for (method, rho), ratio in ratios.items()
    ]  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def write(name, rows, commit="aaaaaaaaaaaa", date="2026-01-01", device="GPU"):
        run = {"device": device, "machine": "m", "commit": commit, "date": date, "torch": "2", "threads": 1}
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": rows, "run": run}))
        return tmp_path

    return write


def test_rows_of_several_files(write):
    write("a", rows_of(1, "eager", {("evit", 0.7): 0.8}))
    rows = rows_of(8, "eager", {("tome", (0.7, 0.5, 0.3)): 1.25}, model="vit_large_patch14_dinov2")
    folder = write("b", rows, device="CPU")
    table = speed.read(folder)
    assert list(table.model) == ["DeiT-S", "DeiT-S", "DINOv2-L", "DINOv2-L"] and list(table.width) == list("SSLL")
    assert list(table.device) == ["GPU", "GPU", "CPU", "CPU"] and table.name[3] == "vit_large_patch14_dinov2"
    one = table.iloc[1]
    assert (one.times_dense, one.times_dense_low, one.times_dense_high) == (0.8, 0.79, 0.81)
    assert one.times_dense_said == "0.80 [0.79, 0.81]" and one.efficiency_said == "" and np.isnan(one.efficiency)
    assert table.keep_ratio[3] == (0.7, 0.5, 0.3)
    with pytest.raises(ValueError, match="folders must hold files"):
        speed.read(folder / "nothing")


def test_an_older_engine_stands_only_where_nothing_else_was_measured(write):
    old, new = {("evit", 0.7): 0.5, ("evit", 0.5): 0.6}, {("evit", 0.7): 0.9}
    write("eager", rows_of(1, "eager", old), commit="bbb-dirty", date="2026-02-01")
    write("graphs", rows_of(1, "graphs", {("evit", 0.7): 0.7}), commit="bbb")
    folder = write("new", rows_of(1, "eager", new, commit_ms=5.0), commit=None)
    table = speed.read(folder)
    latest = speed.latest(table, "bbb")
    pruned = latest[latest.method != "dense"].set_index(["mode", "keep_ratio"]).times_dense
    assert pruned.to_dict() == {("eager", 0.7): 0.9, ("graphs", 0.7): 0.7}  # ρ = 0.5 was not measured again
    assert list(latest.commit) == ["bbb", "bbb", "not named", "not named"]
    both = speed.changed(table, "bbb")
    assert list(both.method) == ["dense", "evit"]
    assert (both.times_dense_before[1], both.times_dense_now[1]) == (0.5, 0.9)
    assert both.ms_before[1] == 20 and both.ms_now[1] == pytest.approx(5 / 0.9)
    assert speed.changed(table, "zzz").empty and len(speed.latest(table, "zzz")) == 5


def test_the_last_of_several_rows_counts(write):
    write("a", rows_of(1, "eager", {("evit", 0.7): 0.8}), date="2026-03-01")
    folder = write("b", rows_of(1, "eager", {("evit", 0.7): 0.6}), date="2026-01-01")
    latest = speed.latest(speed.read(folder))
    assert list(latest.times_dense.dropna()) == [0.8]


def test_where_pruning_pays_in_words(write):
    write("a", rows_of(1, "eager", {("evit", 0.7): 0.6, ("etps", 0.7): 0.55}))
    write("b", rows_of(8, "eager", {("evit", 0.7): 1.2, ("etps", 0.7): 1.005}))  # [0.995, 1.015] holds 1
    write("c", rows_of(256, "eager", {("evit", 0.7): 1.5, ("etps", 0.7): 1.5}))
    folder = write("d", rows_of(1, "graphs", {("evit", 0.7): 0.9}))
    table = speed.read(folder)
    assert speed.reading(table) == (
        "eager, none of 2 at batch 1 (0.55 to 0.60 ×), 1 of 2 at batch 8 (1.00 to 1.20 ×), "
        "all 2 at batch 256 (1.50 ×); "
        "compiled, in a CUDA graph, none of 1 at batch 1 (0.90 ×)"
    )  # fmt: skip
    assert list(speed.pays(table, ["mode", "batch"]).slower) == [2, 0, 0, 1]
    assert speed.threshold(table.assign(gmacs=4.6 * table.batch)) == (
        "eager, none is faster up to 4.6 GMACs, all are from 1,178 on; "
        "compiled, in a CUDA graph, none is faster up to 4.6 GMACs"
    )
    assert speed.ranges(table, ["device", "mode"], "times_dense") == "GPU, eager 0.55 to 1.50; GPU, graphs 0.90"


def test_tables_have_a_column_a_method(write):
    ratios = {("etps", 0.7): 0.5, ("dynamicvit", 0.7): 0.7, ("dynamicvit", 0.5): 0.8}
    table = speed.read(write("a", rows_of(1, "eager", ratios)))
    by = ["model", "batch"]
    short = speed.short(table, "times_dense", by)
    assert short.to_dict("records") == [{"model": "DeiT-S", "batch": 1, "DynamicViT": "0.70/0.80", "eTPS": "0.50/–"}]
    whole = speed.table(table, "times_dense", by)
    assert list(whole.columns) == [*by, "keep_ratio", "DynamicViT", "eTPS"]
    assert list(whole.keep_ratio) == [0.7, 0.5] and list(whole.eTPS) == ["0.50 [0.49, 0.51]", "–"]


def test_the_map(write):
    """A cell where something was measured, blank elsewhere; fastest above slowest; a line where 1 is crossed."""
    write("a", rows_of(1, "eager", {("evit", 0.7): 0.6, ("etps", 0.7): 0.5}))
    write("b", rows_of(8, "eager", {("evit", 0.7): 1.2, ("etps", 0.7): 0.9}))
    folder = write("c", rows_of(1, "graphs", {("evit", 0.7): 1.1}, model="vit_base_patch16_224", image_size=384))
    rows = speed.read(folder)
    assert speed.one_ratio(rows) == 0.7
    grid = speed.grid(rows[rows["mode"] == "eager"])
    assert list(grid.index) == [("S", "fastest"), ("S", "slowest")] and list(grid) == [(224, 1), (224, 8)]
    assert grid.to_numpy().tolist() == [[0.6, 1.2], [0.5, 0.9]]
    figure = speed_plots.break_even(rows)
    eager, graphs = figure.axes
    assert [text.get_text() for text in eager.texts] == ["0.60", "1.20", "0.50", "0.90"]
    assert [text.get_text() for text in graphs.texts] == ["1.10", "1.10"]  # in the column of its own
    assert {text.get_position()[0] for text in graphs.texts} == {2}
    black = [line for line in eager.lines if line.get_color() == "black"]
    assert sorted((tuple(line.get_xdata()), tuple(line.get_ydata())) for line in black) == [
        ((0.5, 0.5), (-0.5, 0.5)), ((0.5, 1.5), (0.5, 0.5))
    ]  # fmt: skip
    assert [label.get_text() for label in graphs.get_xticklabels()] == ["1\n224 px", "8", "1\n384 px"]
    plt.close(figure)


def test_a_tie_of_ratios_goes_to_the_largest(write):
    rows = speed.read(write("a", rows_of(1, "eager", {("evit", 0.7): 0.6, ("evit", 0.5): 0.7})))
    assert speed.one_ratio(rows) == 0.7
    more = [*rows_of(1, "eager", {("evit", 0.7): 0.6, ("evit", 0.5): 0.7}), *rows_of(8, "eager", {("evit", 0.5): 0.7})]
    assert speed.one_ratio(speed.read(write("a", more))) == 0.5


def test_steps_are_drawn_in_dense_steps(write):
    rows = rows_of(32, "training", {("evit", 0.7): 1.25, ("dynamicvit", 0.7): 0.5})
    rows[2]["times_parts"] = [1.6, 1.5, 1.7]
    figure = speed_plots.steps(speed.read(write("a", rows)))
    (ax,) = figure.axes
    marks, ticks = [line for line in ax.lines if line.get_marker() in ("o", "|")]
    at = dict(zip(marks.get_ydata(), marks.get_xdata()))
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert at == {names.index("EViT"): 0.8, names.index("DynamicViT"): 2.0}
    assert [x for x in ticks.get_xdata() if x == x] == [1.25]  # 2 dense steps are 1.6 × the parts
    plt.close(figure)


# ---- no live clock in a chapter

CLOCKS = {"interleaved", "Timer", "perf_counter", "step_time", "process_time", "blocked_autorange", "timeit"}
TRAINED = {"seconds", "images_per_second"}  # what a training that ran with the page says of its own clock


class Timed:
    """What a notebook saves and draws of a clock that ran with it, as far as its sources say.

    A name is timed if what it was given last mentions a clock or a timed name, or if a timed value was put in it: by an
    index, in a loop, or by a method such as `append`; a function is, if its body is. `saved` are the dotted keys of
    what `results.save` or `numbers |= {…}` got, and `drawn` the figures of cells that use timed names.
    """

    def __init__(self, code):
        self.names, self.ran = set(CLOCKS), set()  # what holds a clock's word, and what holds a training
        self.saved, self.drawn = set(), set()
        for source in code:
            tree = ast.parse(source)
            for statement in tree.body:
                self.follow(statement, tree)

    def mentions(self, node):
        """Whether a clock is in it."""
        for inner in ast.walk(node):
            for loop in getattr(inner, "generators", ()):
                if self.trains(loop.iter):
                    self.ran |= _names(loop.target)
        for inner in ast.walk(node):
            if isinstance(inner, ast.Name) and inner.id in self.names:
                return True
            if isinstance(inner, ast.Attribute) and (inner.attr in CLOCKS or ast.unparse(inner) == "bench.run"):
                return True
            if isinstance(inner, ast.Subscript) and getattr(inner.slice, "value", None) in TRAINED:
                if self.trains(inner.value):
                    return True
        return False

    def trains(self, node):
        """Whether it holds what `train.run` returns."""
        found = (inner for inner in ast.walk(node) if isinstance(inner, (ast.Name, ast.Attribute)))
        return any(ast.unparse(inner) == "train.run" or getattr(inner, "id", None) in self.ran for inner in found)

    def follow(self, node, cell):
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if _root(target).id == "numbers" and isinstance(node.value, ast.Dict):
                    self.saved |= self.keys(node.value)
                    continue
                for names, holds in ((self.names, self.mentions), (self.ran, self.trains)):
                    if holds(node.value):
                        names |= _names(target)
                    elif isinstance(target, ast.Name) and isinstance(node, ast.Assign):
                        names.discard(target.id)
        elif isinstance(node, ast.FunctionDef):
            if any(self.mentions(inner) for inner in node.body):
                self.names.add(node.name)
        elif hasattr(node, "body"):  # a loop, a condition, a context
            for _ in range(2):  # what comes later in a loop times what stands above
                if isinstance(node, ast.For):
                    for names, holds in ((self.names, self.mentions), (self.ran, self.trains)):
                        names |= _names(node.target) if holds(node.iter) else set()
                for inner in [*node.body, *getattr(node, "orelse", ())]:
                    self.follow(inner, cell)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            self.call(node.value, cell)

    def call(self, call, cell):
        what = ast.unparse(call.func)
        if what == "results.save" and isinstance(call.args[2], ast.Dict):
            self.saved |= self.keys(call.args[2])
        elif what == "plots.save" and self.mentions(cell):
            self.drawn.add(ast.unparse(call.args[2]).strip("'\""))
        elif what.endswith((".append", ".update", ".add")) and any(map(self.mentions, call.args)):
            self.names |= _names(call.func)

    def keys(self, given, above=""):
        found = set()
        for key, value in zip(given.keys, given.values):
            name = f"{above}{key.value}" if isinstance(key, ast.Constant) else above.rstrip(".")
            if isinstance(value, ast.Dict):
                found |= self.keys(value, f"{name}.")
            elif self.mentions(value):
                found.add(name)
        return found


def _root(node):
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Starred)):
        node = node.value
    return node if isinstance(node, ast.Name) else ast.Name("")


def _names(target):
    """What an assignment to it changes."""
    parts = target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]
    return set().union(*(_names(part) for part in parts)) if len(parts) > 1 else {_root(parts[0]).id}


def stem_of(code):
    return re.search(r'results\.save\(\s*out,\s*"(\w[\w-]*)"', "\n".join(code))


NOTEBOOKS = sorted((TOP / "notebooks").glob("*.ipynb"))


def code_of(path):
    return [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def quoted(code):
    """What chapters say or show of the timed values of a notebook's cells."""
    timed, stem = Timed(code), stem_of(code)
    found = []
    for page in sorted((TOP / "book").glob("*.md")):
        text = page.read_text()
        for key in timed.saved if stem else ():
            name = f"{stem[1].replace('-', '_')}.{key}"
            if re.search(rf"\{{\{{[^}}]*\b{re.escape(name)}\b", text):
                found.append(f"{page.name}: {name}")
        found += [f"{page.name}: {name}" for name in timed.drawn if f"../results/{name}" in text]
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_chapter_quotes_a_live_clock(path):
    assert not quoted(code_of(path))


@pytest.mark.parametrize("cell", [
    'took = bench.interleaved(calls)\nresults.save(out, "speed", {"reading": bench.said(took["a"])})',
    'def faster(): return Timer("x").timeit()\nrow = {"a": faster()}\nrows = []\nrows.append(row)\n'
    'results.save(out, "speed", {"gpu": {"reading": rows}})',
    'live = bench.run(plan)\nfor one in live:\n    said[one] = one\nnumbers = {}\nnumbers |= {"reading": said}\n'
    'results.save(out, "speed", numbers)',
    'fig = draw(interleaved(calls))\nplots.save(fig, out, "speed-map.svg")',
])  # fmt: skip
def test_a_live_clock_is_found(cell):
    assert quoted(cell.split("\n\n"))


def test_a_committed_clock_is_not_taken_for_one():
    cell = 'rows = speed.read("results/speed")\nresults.save(out, "speed", {"reading": speed.reading(rows)})'
    assert not quoted([cell]) and not Timed([cell]).saved
