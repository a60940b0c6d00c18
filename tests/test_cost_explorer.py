"""The page's own arithmetic equals the package's, and the cost explorer shows it, by mouse and by keyboard.

In a browser, from disk, with the network cut. Skipped without an installed Chromium; the check for barriers also
without npm, which brings axe-core.
"""

import importlib.util
import json
import re
import warnings
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import timm
import torch
from conftest import AXE, CHROMIUM, WIDE, serious
from timm.models import VisionTransformer

import tpbook
from tpbook import flops, methods, weights
from tpbook.book import cost, looks
from tpbook.book.looks import CHOICES, method_of
from tpbook.book.plots import COLOURS, NAMES

METHODS = {name: of for name, of in CHOICES.items() if not method_of(name).chooses.varies}  # that can be counted
STATIC = Path(__file__).parent.parent / "book/static"
THEME = importlib.util.find_spec("pydata_sphinx_theme")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs an installed Chromium")


def token_counts(patches, ratios, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a stage that would keep no token keeps one
        ratios = [float(ratio) for ratio in ratios]  # JavaScript's 1 is one; an int of Python's is a number of tokens
        return [count._asdict() for count in tpbook.methods.token_counts(patches, ratios, method_of(name))]


@pytest.fixture
def explorer(visit, tmp_path):
    """width → a page that holds a cost explorer, styled by the theme."""

    def open_page(width=1280):
        theme = ""
        if THEME:
            folder = Path(THEME.origin).parent / "theme/pydata_sphinx_theme/static"
            theme = f'<link rel="stylesheet" href="{(folder / "styles/pydata-sphinx-theme.css").as_uri()}">'
        (tmp_path / "rules.js").write_text(cost.script(), encoding="utf-8")
        page = tmp_path / "page.html"
        page.write_text(f"""<!doctype html>
            <html lang="en" data-theme="light"><head><meta charset="utf-8"><title>Cost</title>
            <meta name="viewport" content="width=device-width">{theme}
            <link rel="stylesheet" href="{(STATIC / "cost-explorer.css").as_uri()}">
            <script src="rules.js"></script>
            <script src="{(STATIC / "cost.js").as_uri()}"></script>
            <script src="{(STATIC / "cost-explorer.js").as_uri()}"></script></head>
            <body><main><h1>Cost</h1><div id="here">Needs JavaScript.</div></main>
            <script>tpbook.costExplorer(document.getElementById("here"));</script></body></html>""")
        shown = visit(page.as_uri(), width)
        shown.set_default_timeout(5000)
        assert not shown.wrong
        return shown

    return open_page


# ---- the arithmetic


def test_methods(explorer):
    methods = explorer().evaluate("tpbook.methods")
    assert list(methods) == list(METHODS)
    for name, told in methods.items():
        method = method_of(name)
        named = {"score": method.score.name, "reduce": method.reduce.name, "place": method.place}
        assert {axis: told[axis] for axis in named} == named and told["count"]["name"] == method.count.name
        assert (told["title"], told["colour"]) == (NAMES[name], COLOURS[name])


def test_counts(explorer):
    mixed = [(0.7, 1, 0.05), (1, 0.33, 0.999), (0.123, 0.1234, 0.77), (0.01, 0.01, 0.01), (1e-7, 0.5, 1), (0.9,)]
    ratios = [(i / 100,) * stages for i, stages in product(range(1, 101), (1, 3))] + mixed
    cases = [
        case for case in product((1, 7, 49, 100, 196, 577), ratios, METHODS)
        if min(case[1]) >= method_of(case[2]).reduce.least_ratio
    ]  # fmt: skip
    ours = explorer().evaluate("cases => cases.map(([n, r, m]) => tpbook.counts(n, r, tpbook.methods[m]))", cases)
    for case, counts in zip(cases, ours):
        assert counts == token_counts(*case), case
    kept = {case: [count["kept"] for count in counts] for case, counts in zip(cases, ours)}
    assert kept[100, (0.7, 0.7, 0.7), "random"] == [70, 49, 34]  # 100 · 0.7² in floats: 48
    assert kept[100, (0.55,), "evit"] == [55]  # ⌈0.55 · 100⌉ in floats: 56


@cache
def meta(name, **kwargs):
    """A model without weights: only its shapes are read."""
    with torch.device("meta"):
        return timm.create_model(name, **kwargs) if name else VisionTransformer(**kwargs)


def shape_of(model):
    return {
        "size": model.patch_embed.img_size[0], "patch": model.patch_embed.patch_size[0], "channels": model.in_chans,
        "depth": len(model.blocks), "width": model.embed_dim, "hidden": model.blocks[0].mlp.fc1.out_features,
        "classes": model.num_classes, "prefix": model.num_prefix_tokens,
    }  # fmt: skip


def closed_form(model, name=None, ratios=(), at=()):
    """Python's cost of a model pruned under a name of the page; the model stays as it was."""
    if not at:
        return flops.closed_form(model)
    method, options = METHODS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tpbook.prune(model, method, keep_ratio=ratios, at=at, **options)
        try:
            return flops.closed_form(model)
        finally:
            tpbook.unprune(model)


MODELS = {
    "deit_tiny": lambda: meta("deit_tiny_patch16_224"),
    "deit_small": lambda: meta("deit_small_patch16_224"),
    "deit_small_384": lambda: meta("deit_small_patch16_224", img_size=384),
    "digits": weights.build_digits_vit,
    "vit_large": lambda: meta("vit_large_patch16_224"),
    "registers": lambda: meta("vit_small_patch14_reg4_dinov2", img_size=112),  # five prefix tokens, no head
    "odd": lambda: meta("", img_size=96, patch_size=8, embed_dim=150, depth=8, num_heads=5, mlp_ratio=3),
    "depth_8": lambda: meta("", embed_dim=128, depth=8, num_heads=2, num_classes=10, in_chans=1),
}


def can(name, ratios, at):
    """Whether the method goes to such ratios, and to such blocks."""
    method = method_of(name)
    before = method.hears and method.place is methods.Place.BEFORE  # reads the attention of the block before
    return min(ratios) >= method.reduce.least_ratio and not (method.score.lasting and before and at[0] == 0)


@pytest.mark.parametrize("family", MODELS)
def test_macs(explorer, family):
    model, page = MODELS[family](), explorer()
    shape, depth = shape_of(model), len(model.blocks)
    usual = (depth // 4, depth // 2, 3 * depth // 4)
    stages = [(usual, (ratio,) * 3) for ratio in (0.05, 0.35, 0.7, 0.95, 1.0)]
    stages += [((0,), (0.5,)), ((0, 1, depth - 1), (0.9, 1.0, 0.123)), (tuple(range(depth)), (0.8,) * depth)]
    cases = [(name, ratios, at) for name in METHODS for at, ratios in stages if can(name, ratios, at)]
    cases = [(None, (), ()), *cases]
    script = "([shape, cases]) => cases.map(([m, r, at]) => tpbook.macs(shape, tpbook.methods[m] ?? null, r, at))"
    for (name, ratios, at), ours in zip(cases, page.evaluate(script, [shape, cases])):
        cost = closed_form(model, name, ratios, at)
        assert ours["by_block"] == list(cost.by_block), (name, ratios, at)
        assert (ours["total"], ours["embed"], ours["head"]) == (cost.total, cost.embed, cost.head)
        patches, n, tokens = (shape["size"] // shape["patch"]) ** 2, None, []
        counts = dict(zip(at, token_counts(patches, ratios, name))) if at else {}
        for block in range(depth):
            n = counts[block]["leave"] if block in counts else n or patches
            tokens.append(shape["prefix"] + n)
        assert ours["tokens"] == tokens


class Pair(methods.dynamicvit.Drop):
    """Adds two tokens, which cost something."""

    name, adds = "pair", 2

    def macs(self, enter, kept, dim):
        return (enter - kept) * (kept + 2) * (dim // 3)


@pytest.mark.parametrize("score", ["class_attention", "attention_received", "predictor", "lasting_attention"])
def test_methods_to_come(explorer, monkeypatch, score):
    """Other points on the axes: nothing in the page knows which there are."""
    model, at, page = MODELS["depth_8"](), (1, 2, 5), explorer()
    shape = shape_of(model)
    for place, count, protects in product(methods.Place, methods.counts.COUNTS, (False, True)):
        reduce = Pair()
        reduce.protects = protects
        method = methods.Method(methods.SCORES[score], reduce, place, count, "nobody")
        monkeypatch.setitem(tpbook.METHODS, "new", method)
        told = json.loads(json.dumps(cost.rule(method, looks.Look("new", "#000000", "o"))))
        for ratios in ((0.7, 0.5, 0.9), (1.0, 0.33, 1.0), (0.001, 0.001, 0.001)):
            ours = page.evaluate("([s, m, r, at]) => tpbook.macs(s, m, r, at)", [shape, told, ratios, at])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                form = flops.closed_form(tpbook.prune(model, "new", keep_ratio=ratios, at=at))
                counts = [count._asdict() for count in model.pruning.counts(196)]
            tpbook.unprune(model)
            assert ours["by_block"] == list(form.by_block) and ours["total"] == form.total
            assert ours["counts"] == counts
            for s, (one, added) in enumerate(zip(counts, ours["stages"])):
                later = counts[s:] if method.score.lasting else [one]
                assert (added == 0) == all(count["kept"] == count["enter"] for count in later)


ERRORS = {
    "macs({...shape, size: 225}, null)": "size must be a multiple of the patch size 16, got 225",
    "macs({...shape, size: 0}, null)": "size must be a multiple of the patch size 16, got 0",
    "macs(shape, tpbook.methods.evit, [0.7], [3, 6])": "ratios must be as many as the 2 blocks of at, got 1",
    "macs(shape, tpbook.methods.evit, [0.7], [12])": "at must be increasing blocks from 0 to 11, got 12",
    "macs(shape, tpbook.methods.evit, [0.7, 0.7], [6, 3])": "at must be increasing blocks from 0 to 11, got 6,3",
    "counts(196, [0], tpbook.methods.evit)": "ratios must be numbers in (0, 1], got 0",
    "counts(196, [1.1], tpbook.methods.evit)": "ratios must be numbers in (0, 1], got 1.1",
    "counts(196, ['0.7'], tpbook.methods.evit)": "ratios must be numbers in (0, 1], got 0.7",
}


def test_errors(explorer):
    page, shape = explorer(), json.dumps(shape_of(meta("deit_tiny_patch16_224")))
    for call, named in ERRORS.items():
        attempt = f"const shape = {shape}; try {{ tpbook.{call} }} catch (error) {{ return String(error) }}"
        assert page.evaluate(f"() => {{ {attempt} }}") == f"RangeError: {named}"


# ---- the explorer

SLIDERS = ["resolution", "depth", "width", "keep ratio ρ"]
CHOICES = ["preset", "patch size", "method"]


def control(page, name):
    return page.get_by_role("slider" if name in SLIDERS else "combobox", name=name, exact=True)


def state(page):
    values = {name: control(page, name).input_value() for name in SLIDERS + CHOICES}
    at = page.locator(".blocks input").evaluate_all("boxes => boxes.filter(b => b.checked).map(b => Number(b.value))")
    return values | {"at": at}


def rows(page, caption):
    table = page.locator("table", has=page.locator("caption", has_text=caption))
    return table.locator("tbody tr").evaluate_all("rows => rows.map(r => [...r.cells].map(c => c.textContent))")


def gmacs(macs):
    return f"{macs / 1e9:.2f}" if macs >= 1e9 else f"{macs / 1e9:#.3g}"


def check(page, **fixed):
    """What is shown is what Python computes for the state that the controls are in. Returns that state."""
    now = state(page)
    width, ratio, at, name = int(now["width"]), float(now["keep ratio ρ"]), now["at"], now["method"]
    size, patch = int(now["resolution"]), int(now["patch size"])
    model = meta(
        "", img_size=size, patch_size=patch, embed_dim=width, depth=int(now["depth"]), num_heads=width // 64, **fixed
    )
    dense, pruned = closed_form(model), closed_form(model, name, (ratio,) * len(at), at)
    saved = 100 * (1 - pruned.total / dense.total)
    change = "nothing saved" if saved == 0 else f"{saved:.1f} % saved" if saved > 0 else f"{-saved:.1f} % more"
    said = page.inner_text("[role=status]").replace("\xa0", " ")
    assert said == f"{gmacs(pruned.total)} GMACs of {gmacs(dense.total)} dense: {change}"
    alternative = page.get_attribute("svg[role=img]", "aria-label").replace("\xa0", " ")
    assert f"costs {gmacs(pruned.total)} GMACs, the dense model {gmacs(dense.total)}: {change}." in alternative
    if at:
        assert f"{NAMES[name]} at keep ratio {ratio:g} in block" in alternative
    counts = token_counts((size // patch) ** 2, (ratio,) * len(at), name)
    assert rows(page, "Patch tokens") == [[str(v) for v in (i, *count.values())] for i, count in zip(at, counts)]
    by_block = [[f"{a / 1e6:.1f}", f"{b / 1e6:.1f}"] for a, b in zip(dense.by_block, pruned.by_block)]
    assert [row[2:] for row in rows(page, "MMACs")] == by_block
    quadratic = 2 * (1 + (size // patch) ** 2) ** 2 * width * len(model.blocks)
    assert f"({100 * quadratic / dense.total:.1f}\xa0%)" in rows(page, "GMACs by kind")[1][1]
    heights = page.locator("svg rect.pruned").evaluate_all("bars => bars.map(b => Number(b.getAttribute('height')))")
    assert [h / max(heights) for h in heights] == pytest.approx([b / max(pruned.by_block) for b in pruned.by_block])
    assert not page.wrong
    return now


def slide(page, name, share):
    """Press the mouse on a slider, at that share of its length."""
    box = control(page, name).bounding_box()
    page.mouse.click(box["x"] + share * box["width"], box["y"] + box["height"] / 2)


def press(page, name, key):
    """Press a key on a control. → what `check` gives then."""
    control(page, name).focus()
    page.keyboard.press(key)
    return check(page)


def test_as_it_opens(explorer):
    now = check(explorer())
    assert now["preset"] == "DeiT-S" and now["at"] == [3, 6, 9] and now["keep ratio ρ"] == "0.7"


@pytest.mark.parametrize("name", SLIDERS)
def test_sliders(explorer, name):
    page = explorer()
    opening = check(page)
    by_key = press(page, name, "ArrowRight")
    assert float(by_key[name]) > float(opening[name])
    assert by_key["preset"] == ("DeiT-S" if name == "keep ratio ρ" else "own values")
    assert press(page, name, "ArrowLeft") == opening
    slide(page, name, 0.1)
    assert float(check(page)[name]) < float(opening[name])
    slide(page, name, 0.8)
    assert float(check(page)[name]) > float(opening[name])


@pytest.mark.parametrize("name", CHOICES)
def test_choices(explorer, name):
    page = explorer()
    opening = check(page)
    by_key = press(page, name, "ArrowDown")
    assert by_key[name] != opening[name]
    control(page, name).select_option(opening[name])  # the mouse picks from a list that the system draws
    assert check(page) == opening
    options = control(page, name).locator("option:enabled").evaluate_all("all => all.map(o => o.value)")
    for option in options:
        control(page, name).select_option(option)
        digits = {"in_chans": 1, "num_classes": 10, "mlp_ratio": 2} if option == "digits ViT" else {}
        now = check(page, **digits)
        assert now[name] == option
        assert int(now["resolution"]) % int(now["patch size"]) == 0


def test_a_slider_stops_where_its_method_does(explorer):
    page = explorer()
    ratio = control(page, "keep ratio ρ")
    ratio.fill("0.3")
    for name in METHODS:
        least = method_of(name).reduce.least_ratio
        control(page, "method").select_option(name)
        assert float(ratio.get_attribute("min")) == max(0.05, least)
        assert float(ratio.input_value()) >= least
        assert page.get_by_text(f"{NAMES[name]} stops at ρ = {least:.2f}").count() == bool(least)
    assert any(method_of(name).reduce.least_ratio for name in METHODS) and not page.wrong
    script = "tpbook.counts(196, [0.4], Object.values(tpbook.methods).find(m => m.least_ratio))"
    with pytest.raises(Exception, match="ratios must be 0.5 or more for this method, got 0.4"):
        page.evaluate(script)


def test_presets_are_the_models(explorer):
    page = explorer()
    models = {"DeiT-Ti": "deit_tiny", "DeiT-S": "deit_small", "ViT-L/16": "vit_large", "digits ViT": "digits"}
    for preset, family in models.items():
        control(page, "preset").select_option(preset)
        dense = gmacs(closed_form(MODELS[family]()).total)
        assert f" of {dense} dense: " in page.inner_text("[role=status]")
        depth = int(control(page, "depth").input_value())
        assert state(page)["at"] == [depth // 4, depth // 2, 3 * depth // 4]


def test_methods_have_their_colours(explorer):
    page = explorer()
    assert set(control(page, "method").locator("option").evaluate_all("all => all.map(o => o.value)")) == set(METHODS)
    for name in METHODS:
        control(page, "method").select_option(name)
        assert NAMES[name] in page.inner_text(".legend")
        rgb = ", ".join(str(int(COLOURS[name][i : i + 2], 16)) for i in (1, 3, 5))
        for selector, part in ((".swatch.pruned", "backgroundColor"), ("svg .pruned", "fill")):
            assert page.eval_on_selector(selector, f"e => getComputedStyle(e).{part}") == f"rgb({rgb})"


def test_blocks(explorer):
    page = explorer()
    opening = check(page)
    box = page.get_by_role("group", name="pruned blocks").get_by_role("checkbox", name="4", exact=True)
    box.focus()
    page.keyboard.press("Space")
    assert check(page)["at"] == [3, 4, 6, 9]
    box.click()
    assert check(page) == opening
    for block in opening["at"]:
        page.locator(f".blocks input[value='{block}']").click()
    assert check(page)["at"] == []
    assert "pruned in no block" in page.get_attribute("svg", "aria-label")
    control(page, "depth").focus()
    page.keyboard.press("ArrowRight")  # another depth, its default blocks
    assert check(page)["at"] == [13 // 4, 13 // 2, 3 * 13 // 4]
    page.keyboard.press("Home")
    assert check(page)["at"] == [0, 1]


def test_keeping_all_saves_nothing(explorer):
    page = explorer()
    control(page, "keep ratio ρ").focus()
    page.keyboard.press("End")
    assert check(page)["keep ratio ρ"] == "1"
    page.keyboard.press("Home")
    assert check(page)["keep ratio ρ"] == "0.05"
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    check(page)  # 0.95


def test_only_resolutions_that_divide(explorer):
    page = explorer()
    size = control(page, "resolution")
    for patch, (low, high) in {4: (28, 128), 8: (112, 512), 14: (112, 504), 16: (112, 512), 32: (128, 512)}.items():
        control(page, "patch size").select_option(str(patch))
        size.focus()
        reached = []
        for key in ("Home", "ArrowRight", "End", "ArrowLeft"):
            page.keyboard.press(key)
            reached.append(int(size.input_value()))
        assert reached == [low, low + patch, high, high - patch]
        for share in (0.1, 0.37, 0.5, 0.9):
            slide(page, "resolution", share)
            assert int(size.input_value()) % patch == 0 and low <= int(size.input_value()) <= high
        check(page)


def test_named_and_said(explorer):
    """Every control has its visible name, and says its value with its unit."""
    page = explorer()
    values = ("224 px, 14 × 14 patches", "12 blocks", "384 channels", "0.70")
    for name, said in zip(SLIDERS, values):
        assert control(page, name).get_attribute("aria-valuetext") == said
        assert page.get_by_text(name, exact=True).is_visible() and page.get_by_text(said, exact=True).is_visible()
    for name in ("The model", "The pruning", "pruned blocks"):
        assert page.get_by_role("group", name=name, exact=True).count() == 1
    assert page.get_by_role("slider").count() == 4 and page.get_by_role("combobox").count() == 3
    for _ in range(4 + 3 + 12 + 1):  # by Tab alone: every control and the table under the chart
        page.keyboard.press("Tab")
        page.evaluate("document.activeElement.classList.add('reached')")
    assert page.locator(".cost-explorer :is(input, select, summary):not(.reached)").count() == 0
    page.locator("summary").focus()
    page.keyboard.press("Enter")
    assert page.get_by_role("table", name=re.compile("MMACs")).is_visible()


def test_two_on_a_page(explorer):
    page = explorer()
    page.evaluate("tpbook.costExplorer(document.querySelector('main').appendChild(document.createElement('section')))")
    control(page.locator("section"), "keep ratio ρ").focus()
    page.keyboard.press("Home")
    first, second = page.locator("[role=status]").all_inner_texts()
    assert first != second


@pytest.mark.skipif(not (AXE.exists() and THEME), reason="needs npm, which brings axe-core, and the theme")
def test_wide_and_narrow_light_and_dark(explorer):
    page = explorer()
    page.evaluate("document.querySelector('details').open = true")
    for scheme in ("light", "dark"):
        page.evaluate("scheme => document.documentElement.dataset.theme = scheme", scheme)
        for width, depth in ((1280, "12"), (390, "32")):
            page.set_viewport_size({"width": width, "height": 900})
            control(page, "depth").fill(depth)
            assert not page.evaluate(WIDE), f"{scheme}: wider than {width} px"
            assert page.evaluate("document.querySelector('svg').viewBox.baseVal.width") <= width
            found = serious(page)
            assert not found, f"{scheme}, {width} px: {json.dumps(found, indent=1)}"
