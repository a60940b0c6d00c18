"""Notebooks as a learner meets them: short, nothing said twice, from any folder, also where nothing is installed."""

import ast
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import nbformat
import numpy as np
import pytest
import timm
import torch
import yaml
from sklearn.metrics import average_precision_score

import tpbook
from tpbook.book import counters, differences, experiments, home, maps, redundancy, results

TOP = Path(__file__).parent.parent
NOTEBOOKS = sorted((TOP / "notebooks").glob("*.ipynb"))
LINES = 250


def code_of(path):
    """The code cells of a notebook, without the one that all begin with."""
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"][1:]


def first_of(path):
    return nbformat.read(path, as_version=4).cells[1]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_can_be_read(path):
    cells = code_of(path)
    assert sum(len(cell.source.splitlines()) for cell in [first_of(path), *cells]) <= LINES
    for cell in cells:  # what is imported, drawn for the pages and written for them is one click away
        folded = "hide-input" in cell.metadata.get("tags", [])
        if re.search(r"\A(import|from) |^(plots|results)\.save\(", cell.source, re.MULTILINE):
            assert folded, cell.source


def test_no_function_is_defined_in_two_notebooks():
    """Of one name or of one body; what two need is in the package."""
    names, bodies = defaultdict(set), defaultdict(set)
    for path in NOTEBOOKS:
        for cell in code_of(path):
            for node in ast.parse(cell.source).body:
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    said = ast.get_docstring(node) is not None
                    names[node.name].add(path.stem)
                    bodies[ast.dump(ast.Module(node.body[said:], []))].add((path.stem, node.name))
    assert not {name: sorted(where) for name, where in names.items() if len(where) > 1}
    assert not [sorted(where) for where in bodies.values() if len({notebook for notebook, _ in where}) > 1]


# ---- from any folder


def test_home_is_around_the_working_folder_or_the_package(tmp_path, monkeypatch):
    for folder in (tmp_path, TOP, TOP / "notebooks" / "results"):
        monkeypatch.chdir(folder)
        assert home.find() == TOP
    other = tmp_path / "other"
    (other / "notebooks" / "deep").mkdir(parents=True)
    (other / "_toc.yml").touch()
    monkeypatch.chdir(other / "notebooks" / "deep")
    assert home.find() == other.resolve()  # where one works counts more
    assert home.enter() == Path.cwd() == other.resolve() / "notebooks"


def test_without_a_checkout_it_is_said_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(home, "__file__", str(tmp_path / "site-packages/tpbook/book/home.py"))
    with pytest.raises(FileNotFoundError, match=f"neither {tmp_path} nor the package lies in a checkout"):
        home.find()


def test_a_notebook_runs_from_another_folder(tmp_path):
    """Its own first cell, then what the others do: import a module beside it, read a committed file and a recipe."""
    notebook = nbformat.read(TOP / "notebooks/questions-masks.ipynb", as_version=4)
    notebook.cells = [
        notebook.cells[1],
        nbformat.v4.new_code_cell("import pooling\nfrom pathlib import Path"),
        nbformat.v4.new_code_cell('print(*Path("results").glob("load*"), *Path("../recipes/own").glob("etps*"))'),
    ]
    nbformat.write(notebook, tmp_path / "here.ipynb")
    command = [sys.executable, "-m", "papermill", "here.ipynb", "there.ipynb", "--no-progress-bar"]
    environment = os.environ | {"PYTHONPATH": str(TOP)}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    printed = nbformat.read(tmp_path / "there.ipynb", as_version=4).cells[2].outputs
    assert [out.text for out in printed if out.get("name") == "stdout"] == [
        "results/loading.json ../recipes/own/etps.yaml\n"
    ]


def test_all_begin_alike_and_name_the_one_address():
    cells = [first_of(path) for path in NOTEBOOKS]
    assert len({cell.source for cell in cells}) == 1 and all(cell.metadata.tags == ["remove-cell"] for cell in cells)
    [address] = re.findall(r'address = "(.*)"', cells[0].source)
    url = yaml.safe_load((TOP / "_config.yml").read_text())["repository"]["url"] or ""
    assert address == url, "the address stands in _config.yml and in every notebook's first cell: see _config.yml"


@pytest.mark.parametrize("around", [True, False])
def test_the_first_cell_installs_what_is_missing(tmp_path, monkeypatch, around):
    """From the checkout around it; elsewhere a clone is made first. Then it is imported from there."""
    ran = []

    def run(command, check):
        ran.append(command)
        if command[0] == "git":
            make(Path(command[-1]))
        else:
            del sys.modules["tpbook.book.home"]  # there it is

    def make(top):
        (top / "notebooks").mkdir(parents=True)
        (top / "_toc.yml").touch()

    if around:
        make(tmp_path)
    monkeypatch.chdir(tmp_path / "notebooks" if around else tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.delattr(tpbook.book, "home")
    monkeypatch.setitem(sys.modules, "tpbook.book.home", None)  # an import of it fails
    exec(first_of(NOTEBOOKS[0]).source.replace('address = ""', 'address = "https://host/book"'), {})
    top = tmp_path if around else tmp_path / "book"
    *clones, install = ran
    assert clones == ([] if around else [["git", "clone", "--quiet", "--depth", "1", "https://host/book", str(top)]])
    assert install[:4] == [sys.executable, "-m", "pip", "install"] and install[-1].startswith(f"{top}[book")
    assert sys.path[0] == str(top)  # so that the package is imported from there, and the notebooks are found beside it


# ---- what the notebooks on papers and codes share


def test_differences_of_logits(small, images):
    ours = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 3.0]])
    theirs = torch.tensor([[1.0, 0.5], [1.5, 1.0], [2.0, 0.0], [0.0, 3.0]])
    assert differences.apart(ours, theirs) == {"largest change of a logit": 1.5, "answers that change, %": 25}
    model = tpbook.prune(small("deit"), "dynamicvit", keep_ratio=0.5, at=(1, 3)).train()
    assert differences.even_odds(model) is model
    x = images(model, 60)
    with tpbook.trace(model) as t:
        logits = differences.drawn(model, x, seed=3, batch=60)
    share = t.decisions[0].float().mean().item()  # of 60 · 36 coins
    assert abs(share - 0.5) < 0.04
    assert torch.equal(logits, differences.drawn(model, x, seed=3, batch=60))
    assert not torch.equal(logits, differences.drawn(model, x, seed=4, batch=60))


def test_how_numbers_are_said():
    assert [differences.ten(v) for v in (3.2e-6, 1e-20, 0.0123, 0.0, 2.0)] == ["3·10⁻⁶", "1·10⁻²⁰", "0.012", "0", "2"]
    assert differences.span([0.25, -1, 3], "+.1f") == "−1.0 to +3.0"


def test_the_list_of_differences():
    of_two = {1: ("a", "one", "ours", "measured"), 3: ("c", "", "", "exact")}
    parts = [{"2": ("b", "two", "as the code", "exact")}, of_two]
    found = differences.listed(parts)
    assert found["listed"] == 3 and found["kinds"] == {"published": 0, "exact": 2, "measured": 1, "not_measured": 0}
    assert found["table"].splitlines()[2:4] == ["| [1 a](#pc-1) | one | ours |", "| [2 b](#pc-2) | two | as the code |"]
    with pytest.raises(ValueError, match=r"once each, got \[1, 2, 2, 3\]"):
        differences.listed([*parts, {2: ("again", "", "", "exact")}])
    with pytest.raises(ValueError, match="a kind must be one of .*, got guess"):
        differences.listed([{1: ("a", "", "", "guess")}])


def test_every_section_of_the_list_is_in_a_notebook():
    sections = re.findall(r"^\(pc-(\d+)\)=$", (TOP / "book/paper-and-code.md").read_text(), re.MULTILINE)
    named = []
    for path in NOTEBOOKS:
        for cell in code_of(path):
            if found := re.search(r"^DIFFERENCES = \{\n(.*?)^\}", cell.source, re.MULTILINE | re.DOTALL):
                named += re.findall(r"^    (\d+): ", found[1], re.MULTILINE)
    assert sorted(named, key=int) == sorted(sections, key=int)


def test_costs_and_traces_leave_a_model_as_it_was(small, images):
    model = small("deit")
    x, whole = images(model), tpbook.flops.closed_form(model).total / 1e9
    assert 0 < experiments.gmacs(model, "evit", 0.5) < whole == tpbook.flops.closed_form(model).total / 1e9
    t = experiments.traced(model, x, "etps", keep_ratio=0.5, at=(1, 3))
    assert [kept.shape[1] for kept in t.kept] == [18, 9] and len(t.host) == 2
    with pytest.raises(AttributeError):
        experiments.traced(model, None, "evit")
    assert not tpbook.engine.is_pruned(model)
    copy = experiments.pruned(model, "evit", 0.5)
    assert tpbook.engine.is_pruned(copy) and not tpbook.engine.is_pruned(model)
    said, mine = experiments.answers(copy, x, batch=1)
    with torch.no_grad(), tpbook.trace(copy) as t:
        assert torch.equal(said, copy(x).argmax(1))
    for alive, kept in zip(mine, t.kept[-1]):
        assert alive.nonzero()[:, 0].tolist() == sorted(i for i in kept.tolist() if i >= 0)


PRUNED = {"evit": {}, "etps": {"at": (5, 6)}, "random": {"seed": 3}, "dtps": {"score": "class_attention"}}


@pytest.mark.parametrize("method", PRUNED)
def test_a_model_may_begin_where_pruning_does(method):
    """With the tokens before that block in the place of images: the same answers at the same cost."""
    model = tpbook.load_backbone("vit_digits_patch4_56")
    images = tpbook.data.digits("test").images[:6]
    late, tokens = experiments.resumed(model, images, batch=4, first=2 if method == "dtps" else None)
    assert tokens.shape == (6, 197, 64)
    with torch.inference_mode():
        torch.testing.assert_close(late(tokens), model(images))
        for one in (late, model):
            tpbook.prune(one, method, keep_ratio=0.5, **PRUNED[method])
        torch.testing.assert_close(late(tokens), model(images))
        said, left = experiments.answers(late, tokens, batch=6)
        theirs = experiments.answers(model, images, batch=6)
        assert torch.equal(said, theirs[0]) and torch.equal(left, theirs[1])
    assert tpbook.flops.closed_form(late).total == tpbook.flops.closed_form(model).total
    with torch.inference_mode():
        torch.testing.assert_close(tpbook.unprune(late)(tokens), tpbook.unprune(model)(images))


def test_a_model_that_begins_later_cannot_be_pruned_earlier():
    model = tpbook.load_backbone("vit_digits_patch4_56")
    late, tokens = experiments.resumed(model, tpbook.data.digits("test").images[:2])
    with pytest.raises(ValueError, match="pruning must begin at block 3"):
        tpbook.prune(late, "evit", at=(2, 6))(tokens)
    with pytest.raises(ValueError, match="pruning must begin at block 3"):  # it hears block 2
        tpbook.prune(tpbook.unprune(late), "dtps", score="class_attention")(tokens)


def test_which_test_images_a_training_got_right():
    assert experiments.bits_in({"correct": "0110"}).tolist() == [[0, 1, 1, 0]]


def test_every_token_before_every_block(small, images):
    model = small("deit")
    x = images(model, 3)
    stream, rows, said = redundancy.streams(model, x, batch=2)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.blocks)
    with torch.no_grad():
        y = model._pos_embed(model.patch_embed(x))
        for b, block in enumerate(model.blocks):
            torch.testing.assert_close(stream[b], y)
            attn = block.attn
            q, k, _ = attn.qkv(block.norm1(y)).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
            row = (q[:, :, :1] * attn.scale @ k.transpose(-2, -1)).softmax(-1).mean(1)[:, 0, 1:]
            torch.testing.assert_close(rows[b], row)
            y = block(y)
        torch.testing.assert_close(stream[-1], y)
        assert torch.equal(said, model(x).argmax(1))
    assert [redundancy.blocks(which) for which in ([], [3], [1, 2])] == ["no block", "block 3", "blocks 1, 2"]


# ---- maps


def test_maps_are_rebuilt(small, images):
    model = tpbook.prune(small("deit"), "etps", keep_ratio=0.5, at=(1, 3))
    x = images(model)
    kept, lived, ways = maps.rebuild(model, x)
    with torch.no_grad(), tpbook.trace(model) as t:
        model(x)
    assert set(ways) == {"zero", "mean of kept", "nearest kept", "last seen", "host"}
    for b in range(len(x)):
        last = t.kept[-1][b]
        assert kept[b].nonzero()[:, 0].tolist() == sorted(last.tolist())
        assert lived[b].tolist() == [sum(i in stage[b].tolist() for stage in t.kept) for i in range(36)]
        for way in ways.values():
            torch.testing.assert_close(way[b, last], t.features[b])  # nobody changes what is there
        gone = ~kept[b]
        assert not ways["zero"][b, gone].any()
        torch.testing.assert_close(ways["mean of kept"][b, gone], t.features[b].mean(0).expand(int(gone.sum()), -1))
        torch.testing.assert_close(ways["host"][b], ways["zero"][b, t.host[-1][b]])


def test_average_precision():
    rng = np.random.default_rng(0)
    scores, truth = rng.integers(0, 5, (4, 30)) / 5, rng.random((4, 30)) < 0.3  # with ties
    found = maps.precision(torch.tensor(scores), torch.tensor(truth))
    assert found == pytest.approx([100 * average_precision_score(t, s) for t, s in zip(truth, scores)])
    values = rng.normal(5, 2, 400)
    assert maps.spread(values) == pytest.approx(1.96 * values.std() / 20, rel=0.1)


def test_what_a_convolution_sees():
    kept = torch.tensor([[1, 1, 0, 1, 1, 0, 0, 0, 1]]).bool()  # 3 × 3: a block of four, and a corner
    dense = torch.ones(1, 9, 2)
    seen = {name: value.item() for name, value in maps.windows(kept, dense, (3, 3)).items()}
    zero = [5, 5, 5, 4, 7]  # of eight neighbours of each kept patch
    assert seen["kept"] == 5 and seen["alone, %"] == 0 and seen["cells empty, %"] == 0
    assert seen["zero, %"] == pytest.approx(100 * sum(zero) / 40)
    assert seen["whole, %"] == pytest.approx(20)  # the first corner: its window holds the block of four alone
    full = maps.windows(torch.ones(1, 9).bool(), torch.randn(1, 9, 2), (3, 3))
    assert full["error"].item() == 0 and full["renormalised"].item() < 1e-6 and full["whole, %"].item() == 100
    assert seen["renormalised"] == pytest.approx(0, abs=1e-6) and seen["error"] > 0.1


def test_how_well_a_map_is_recovered():
    target = torch.randn(2, 4, 3)
    kept = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1]]).bool()
    zero = target * kept.unsqueeze(-1)
    found = maps.recover(kept, {"zero": zero, "best": target, "twice": zero + 2 * target * ~kept.unsqueeze(-1)}, target)
    for way, (error, cosine) in {"kept": (0, 1), "zero": (1, None), "best": (0, 1), "twice": (1, None)}.items():
        assert found[way][0] == pytest.approx([error] * 2, abs=1e-6)
        assert cosine is None or found[way][1] == pytest.approx([cosine] * 2, abs=1e-6)


def test_other_counters():
    """Without fused attention fvcore sees what the closed form counts, within 1 %; torch counts two for one."""
    model = timm.create_model("deit_tiny_patch16_224", depth=2)
    assert counters.set_fused(model, False) is model and not model.blocks[1].attn.fused_attn
    exact, explicit = tpbook.flops.closed_form(model).total, counters.by_fvcore(model)
    assert abs(explicit / exact - 1) < 0.01 and abs(counters.by_torch(model) / (2 * exact) - 1) < 0.01
    counters.set_fused(model, True)
    assert counters.by_fvcore(model) < 0.97 * explicit  # two products of 197 × 197 are missing


def test_intervals_in_words():
    pairs = {name: {"difference": d, "low": d - 1, "high": d + 1} for name, d in {"a": 2, "b": -1.5, "c": 0.5}.items()}
    assert results.interval(pairs["a"]) == "+2.0 [+1.0, +3.0]"
    assert results.about_zero(pairs) == "above zero: a; below zero: b; undecided: c."
    many = {f"m{i}": pairs["a"] for i in range(6)}
    assert results.about_zero(many) == "above zero: all; below zero: none; undecided: none."
    assert results.about_zero(many | {"b": pairs["b"]}) == "above zero: 6 of 7; below zero: b; undecided: none."
