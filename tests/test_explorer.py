"""The explorer's page as a reader meets it: from disk, in Chromium, with the network cut; and its part in Jupyter."""

import functools
import io
import json
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import AXE, CHROMIUM, serious
from PIL import Image
from test_export import assert_kept
from test_site import WIDE, browser_needed, every_site

import tpbook
from tpbook import flops
from tpbook.book import looks, photographs, widgets
from tpbook.book.plots import NAMES
from tpbook.methods import token_counts
from tpbook.weights import DIGITS, load_trained_digits

RATIOS = (0.2, 0.35, 0.7, 1.0)
COMMITTED = photographs.read(
    Path(__file__).parent.parent / "book/photographs"
)  # computed by DeiT-Ti; see test_photographs.py


@functools.cache
def model_of(photographs, method, half=False):
    """The model behind an explorer's state, made anew; `half` as the page's own files store it."""
    name, options = widgets.CHOICES[method]
    if tpbook.METHODS[name].score.learned:
        return load_trained_digits(method)
    model = tpbook.load_backbone("deit_tiny_patch16_224" if photographs else DIGITS)
    if half:
        model.load_state_dict({k: v.half().float() if v.nbytes >= 1024 else v for k, v in model.state_dict().items()})
    return tpbook.prune(model, name, **options)


@pytest.fixture
def explorer(visit):
    """A site → the explorer's page, its first state drawn."""

    def open_(site, width=1280):
        page = visit((site / "book/explorer.html").as_uri(), width)
        page.wait_for_selector(".explorer canvas")
        return page

    return open_


def settled(page):
    """What the explorer shows, once it has come to rest."""
    page.wait_for_function("(e => e.explorer?.state && !e.explorer.busy)(document.querySelector('.explorer'))")
    return page.evaluate("""() => {
        const {state, request} = document.querySelector('.explorer').explorer;
        return {...state, logits: Array.from(state.logits ?? []), request};
    }""")


def click(page, set_, image, method):
    """A picture and a method, by mouse. → the slider of the keep ratio."""
    page.locator(".explorer .images fieldset").nth(set_).locator(".thumb").nth(image).click()
    page.locator(".explorer .methods").get_by_text(NAMES[method], exact=True).click()
    return page.locator(".explorer").get_by_label("Keep ratio ρ")


def choose(page, set_, image, method, ratio):
    """By mouse and keyboard: a picture, a method, a keep ratio."""
    slider = click(page, set_, image, method)
    slider.focus()
    slider.press("Home")
    ratios = carried_by(page)["ratios"]
    for _ in range(ratios.index(ratio) - int(slider.get_attribute("min"))):
        slider.press("ArrowRight")
    return settled(page)


def computed(model, x, request):
    """What tpbook computes where the page answers a request: trace, logits and cost of an input (1, C, H, W)."""
    model.keep_ratio = request["ratio"]
    with torch.inference_mode(), tpbook.trace(model) as t:
        logits = model(x)[0]
    return t, logits


def expected(group, image, method, request):
    """What the page has to show: of the photographs what is committed, of the digits what tpbook computes now."""
    if len(group["classes"]) == 1000:
        one, ratio = COMMITTED[image], request["ratio"]
        own, at = one.state(method, ratio), one.seen["ratios"].index(ratio)
        cost = one.seen["costs"][method][at] or {key: own[key] for key in ("tokens", "macs", "total")}
        kept, host = ([row.tolist() for row in own[key]] for key in ("kept", "host"))
        return {"kept": kept, "host": host, "top": own["top"], **cost}
    model = model_of(False, method)
    x = widgets.input_of(group["images"][image]["src"], model)
    t, logits = computed(model, x, request)
    p = logits.softmax(0)
    cost = flops.closed_form(model, x)[0] if model.pruning.method.chooses.varies else flops.closed_form(model)
    kept = [sorted(i for i in kept[0].tolist() if i >= 0) for kept in t.kept]
    return {
        "kept": kept, "host": [host[0].tolist() for host in t.host],
        "top": [[int(i), float(p[i])] for i in p.topk(5).indices],
        "tokens": widgets.cost_of(model, x)["tokens"], "macs": list(cost.by_block), "total": cost.total,
    }  # fmt: skip


def same_hosts_and_cost(state, model, t, x):
    varies = model.pruning.method.chooses.varies
    cost = flops.closed_form(model, x)[0] if varies else flops.closed_form(model)
    assert state["host"] == [host[0].tolist() for host in t.host]
    assert state["macs"] == list(cost.by_block) and state["total"] == cost.total
    assert state["tokens"] == widgets.cost_of(model, x)["tokens"]


def carried_by(page):
    """What the page carries, which is some MB: read once."""
    if not hasattr(page, "carried"):
        page.carried = json.loads(page.locator("#explorer-data").text_content())
    return page.carried


@browser_needed
@every_site
def test_every_state_shown_is_what_tpbook_computes(site, explorer):
    """Every method of every set at two of the ratios, by turns, and where it stops; every picture."""
    page = explorer(site)
    carried = carried_by(page)
    for set_, group in enumerate(carried["sets"]):
        asked = ((n, r, m, ratio) for (n, m), (r, ratio) in product(enumerate(group["methods"]), enumerate(RATIOS)))
        by_turns = ((m, q) for n, r, m, q in asked if (n + r) % 2 == 0 or q < looks.method_of(m).reduce.least_ratio)
        for i, (method, ratio) in enumerate(by_turns):
            if ratio < (least := looks.method_of(method).reduce.least_ratio):
                click(page, set_, i % len(group["images"]), method).press("Home")  # the slider stops, and says so
                assert settled(page)["request"]["ratio"] == least
                assert page.get_by_text(f"{NAMES[method]} stops at ρ = {least:.2f}").is_visible()
                continue
            state = choose(page, set_, i % len(group["images"]), method, ratio)
            assert state["request"]["method"] == method and state["request"]["ratio"] == ratio
            want = expected(group, state["request"]["image"], method, state["request"])
            for key in ("kept", "host", "tokens", "macs", "total"):
                assert state[key] == want[key], (group["name"], method, ratio, key)
            assert [q for _, q in state["top"]] == pytest.approx([q for _, q in want["top"]], abs=1e-4)
            assert state["top"][0][0] == want["top"][0][0]
            # and it is on the page: the sentence, the captions, the alternative texts, the numbers
            left = [len(kept) for kept in want["kept"]]
            said = page.locator(".explorer .said").inner_text()
            assert f"{NAMES[method]}, ρ = {ratio:.2f}: {', '.join(map(str, left))} of 196 patches left" in said
            assert group["classes"][want["top"][0][0]] in said
            for stage, n in enumerate(left):
                label = page.locator(".explorer canvas").nth(stage + 1).get_attribute("aria-label")
                assert f"Stage {stage + 1}, block {(3, 6, 9)[stage]}: {n} of 196 patches left" in label
            row = page.locator(".explorer details tbody tr").nth(11).locator("td").all_text_contents()
            assert row[0] == str(want["tokens"][11]) and row[2] == f"{state['macs'][11]:,}"
    assert not page.wrong


MIDDLES = """i => {
    const [first, canvas] = [0, i].map(n => document.querySelectorAll('.explorer canvas')[n]);
    const of = c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
    const [a, b] = [of(first), of(canvas)], cell = canvas.width / 14, out = [];
    for (let p = 0; p < 196; p++) {
        const x = Math.floor((p % 14 + 0.5) * cell), y = Math.floor((Math.floor(p / 14) + 0.5) * cell);
        const at = 4 * (y * canvas.width + x);
        out.push([a, b].map(of => Array.from(of.slice(at, at + 3))));
    }
    return out;
}"""


@browser_needed
@every_site
def test_pictures_show_the_state(site, explorer):
    """Pixels: the middles of patches are as in the first picture where they are kept, and of one colour where not."""
    page = explorer(site)
    digits = len(carried_by(page)["sets"]) - 1
    for set_, method in ((digits, "dynamicvit"), (0, "etps")):
        state = choose(page, set_, 1, method, 0.5)
        for stage, kept in enumerate(state["kept"], 1):
            gone = [p for p in range(196) if p not in kept]
            pixels = page.evaluate(MIDDLES, stage)
            assert np.flatnonzero([b != a for a, b in pixels]).tolist() == gone
            assert {tuple(pixels[p][1]) for p in gone} == {(0x8C, 0x91, 0x9A)} and looks.GONE == "#8c919a"


@browser_needed
@every_site
def test_it_opens_on_a_photograph_on_which_methods_differ(site, explorer):
    page = explorer(site)
    state, group = settled(page), carried_by(page)["sets"][0]
    assert state["request"]["set"] == state["request"]["image"] == 0 and len(group["classes"]) == 1000
    label = group["images"][0]["label"]
    assert group["classes"][state["top"][0][0]] == label
    page.locator(".explorer .methods").get_by_text("random", exact=True).click()
    other = settled(page)
    assert group["classes"][other["top"][0][0]] != label and other["kept"] != state["kept"]
    links = page.locator(".explorer .note").last.locator("a").evaluate_all("links => links.map(a => a.href)")
    row = COMMITTED[0].row
    assert {row[key] for key in ("landing_url", "author_profile", "license")} == set(links)


@browser_needed
@every_site
def test_every_control_by_mouse_and_by_keyboard(site, explorer):
    page = explorer(site)
    last = carried_by(page)["sets"][-1]
    state = choose(page, len(carried_by(page)["sets"]) - 1, 0, "etps", 0.7)

    def changed(what):
        nonlocal state
        before, state = state, settled(page)
        assert state["request"][what] != before["request"][what], what

    # pictures
    radio = page.locator(".explorer .images fieldset").last.locator("input")
    assert [radio.nth(i).get_attribute("aria-label") for i in range(6)] == [image["alt"] for image in last["images"]]
    radio.first.focus()
    page.keyboard.press("ArrowRight")
    changed("image")
    outline = "e => getComputedStyle(e.nextElementSibling).outlineStyle"
    assert radio.nth(1).evaluate(outline) == "solid", "focus is seen"
    page.locator(".explorer .images fieldset").last.locator(".thumb").nth(4).click()
    changed("image")
    # methods
    method = page.locator(".explorer .methods")
    method.get_by_label("eTPS").focus()
    page.keyboard.press("ArrowLeft")
    changed("method")
    assert state["request"]["method"] == "dtps"
    method.get_by_text("random").click()
    changed("method")
    assert not page.locator(".explorer .view").is_visible(), "random squeezes nothing"
    method.get_by_text("eTPS").click()
    changed("method")
    # keep ratio
    slider = page.locator(".explorer").get_by_label("Keep ratio ρ")
    slider.focus()
    for key in ("ArrowLeft", "Home", "End", "PageDown"):
        slider.press(key)
        changed("ratio")
        assert slider.get_attribute("aria-valuetext") == f"keep ratio {state['request']['ratio']:.2f}"
    box = slider.bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.4, box["y"] + box["height"] / 2)
    changed("ratio")
    # who carries whom
    canvas = page.locator(".explorer canvas").nth(3)
    before = canvas.evaluate("c => c.toDataURL()")
    page.get_by_label("patches that are left").focus()
    page.keyboard.press("ArrowDown")
    assert (after := canvas.evaluate("c => c.toDataURL()")) != before
    page.get_by_text("patches that are left").click()
    assert canvas.evaluate("c => c.toDataURL()") == before != after
    # follow a patch
    follow, said = page.get_by_label("Follow a patch"), page.locator(".explorer output").last
    follow.focus()
    follow.press("ArrowRight")
    assert said.inner_text().startswith("row 1, column 1: ")
    box = canvas.bounding_box()
    for patch in (0, 100, 195):
        across, down = (patch % 14 + 0.5) / 14, (patch // 14 + 0.5) / 14
        page.mouse.click(box["x"] + box["width"] * across, box["y"] + box["height"] * down)
        place = "row {}, column {}".format
        gone = next((s for s, kept in enumerate(state["kept"]) if patch not in kept), None)
        fate = "left to the end"
        if gone is not None:
            host, last_host = state["host"][gone][patch], state["host"][-1][patch]
            fate = f"squeezed into {place(host // 14 + 1, host % 14 + 1)} at stage {gone + 1}"
            fate += f", in the end in {place(last_host // 14 + 1, last_host % 14 + 1)}" if host != last_host else ""
        assert said.inner_text() == f"{place(patch // 14 + 1, patch % 14 + 1)}: {fate}"
    for name, fate in (("evit", "fused"), ("random", "dropped"), ("dynamicvit", "dropped")):
        method.get_by_text(NAMES[name], exact=True).click()
        state = settled(page)
        gone = next(patch for patch in range(196) if patch not in state["kept"][0])
        follow.fill(str(gone + 1))
        assert said.inner_text() == f"{place(gone // 14 + 1, gone % 14 + 1)}: {fate} at stage 1"
    # the numbers
    page.get_by_text("The same as numbers").focus()
    page.keyboard.press("Enter")
    assert page.locator(".explorer details table").is_visible()
    assert not page.wrong


@browser_needed
@every_site
def test_methods_without_trained_predictors_are_not_offered(site, explorer):
    page = explorer(site)
    sets = carried_by(page)["sets"]
    for i, group in enumerate(sets):
        page.locator(".explorer .images fieldset").nth(i).locator(".thumb").first.click()
        settled(page)
        for method in widgets.CHOICES:
            radio = page.locator(".explorer .methods").get_by_label(NAMES[method], exact=True)
            assert radio.is_enabled() == (method in group["methods"]), (group["name"], method)
        why = page.locator(".explorer").get_by_text("need trained predictors")
        assert why.is_visible() == (len(group["methods"]) < len(widgets.CHOICES))


@browser_needed
@every_site
def test_weight_and_first_picture(site, visit):
    address = (site / "book/explorer.html").as_uri()
    assert len((site / "book/explorer.html").read_bytes()) < 2e6
    shown = []
    for _ in range(3):  # the quickest: other tests run beside this one
        page = visit(address)
        page.wait_for_function("performance.getEntriesByName('explorer-shown').length")
        shown.append(page.evaluate("performance.getEntriesByName('explorer-shown')[0].startTime"))
    assert min(shown) < 1000
    loaded = {url.split("?")[0].split("#")[0] for url in page.asked if url.startswith("file:")}
    files = [site / url.removeprefix(f"{site.as_uri()}/") for url in loaded]
    assert any(file.name == "explorer.js" for file in files)
    assert not [file for file in files if file.parent.name in ("onnxruntime", "models")], "nobody asked for it"
    assert sum(file.stat().st_size for file in files) < 6e6


@browser_needed
@every_site
def test_motion_and_narrow_screens(site, explorer):
    page = explorer(site, 390)
    page.emulate_media(reduced_motion="reduce")
    assert not page.evaluate("""[...document.querySelectorAll('.explorer *, .cost-explorer *')].filter(e => {
        const {transitionDuration, animationName} = getComputedStyle(e);
        return parseFloat(transitionDuration) > 0.001 || animationName !== 'none';
    }).map(e => e.outerHTML.slice(0, 80))""")
    digits = len(carried_by(page)["sets"]) - 1
    choose(page, digits, 2, "dtps", 0.5)
    page.get_by_label("which token carries which patch").check()
    assert not page.evaluate(WIDE)
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert not serious(page)


# ---- a page of one picture, made here

CREDIT = (
    '<a href="https://example.org/1?a=1&amp;b=2">Photograph</a> by <b>A &lt; B</b><script>wrong()</script>'
    '<img src="nowhere" onerror="window.hurt = 1"><a href="javascript:window.hurt = 1">this</a>, '
    '<a href="https://example.org/2" onclick="window.hurt = 1">CC BY 2.0</a><!--<script>'
)


@pytest.fixture(scope="module")
def one():
    """What such a page carries: a digit, every method that needs no training, one keep ratio."""
    model, methods = tpbook.load_backbone(DIGITS), {}
    x = tpbook.data.digits("test").images[7:8]
    image = {"src": widgets.picture_of(x, model), "alt": "a digit", "label": "", "credit": CREDIT}
    group = {**widgets.describe(model), "name": "One", "missing": "", "images": [image], "methods": {}, "costs": {}}
    for name, (of, options) in widgets.CHOICES.items():
        if not tpbook.METHODS[of].score.learned:  # of each the state says what it costs
            tpbook.prune(model, of, keep_ratio=0.5, **options)
            methods[name] = [widgets.state(model, x) | widgets.cost_of(model, x)]
            tpbook.unprune(model)
    group |= {"methods": dict.fromkeys(methods, {}), "states": [methods]}
    return {**widgets.front(keep_ratio=0.5), "ratios": [0.5], "sets": [group]}


@pytest.fixture
def opened(visit, tmp_path):
    """Data → the page."""

    def open_(data):
        code = (Path(widgets.__file__).parent / "javascript/explorer.js").as_uri()
        (tmp_path / "page.html").write_text(f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>One</title>
            <main id="explorer"></main>{widgets.page(data)}<script src="{code}"></script><script>
            const data = JSON.parse(document.getElementById("explorer-data").textContent);
            tpbook.explorer(document.getElementById("explorer"), data, tpbook.embedded(data));</script></html>""")
        page = visit((tmp_path / "page.html").as_uri())
        page.wait_for_selector(".explorer canvas")
        return page

    return open_


def place(patch):
    return f"row {patch // 14 + 1}, column {patch % 14 + 1}"


chromium_needed = pytest.mark.skipif(not CHROMIUM, reason="needs an installed Chromium")


@chromium_needed
def test_a_credit_is_words_and_links(one, opened):
    page = opened(one)
    settled(page)
    credit = page.locator(".explorer .note").last
    assert credit.text_content() == "Photograph by A < Bthis, CC BY 2.0"
    links = credit.locator("a").evaluate_all("links => links.map(a => [a.textContent, a.href, a.attributes.length])")
    assert links == [["Photograph", "https://example.org/1?a=1&b=2", 1], ["CC BY 2.0", "https://example.org/2", 1]]
    assert credit.locator("*").count() == 2 and not page.evaluate("window.hurt") and not page.wrong


@chromium_needed
def test_what_became_of_a_patch_is_said_in_the_words_of_its_method(one, opened):
    page = opened(one)
    for name in one["sets"][0]["methods"]:
        page.locator(".explorer .methods").get_by_text(NAMES[name], exact=True).click()
        state = settled(page)
        gone = next(patch for patch in range(196) if patch not in state["kept"][0])
        page.get_by_label("Follow a patch").fill(str(gone + 1))
        fate = {"evit": "fused", "random": "dropped", "topk": "dropped", "evit, no fusion": "dropped"}.get(name)
        reduce = looks.method_of(name).reduce
        if reduce.rejoins:
            stages = [str(s + 1) for s, kept in enumerate(state["kept"]) if gone not in kept]
            said = page.locator(".explorer output").last.inner_text()
            assert said == f"{place(gone)}: waiting from stage {', '.join(stages)} on, until the next one"
            assert page.locator(".explorer .said").inner_text().count("patches left, the others waiting.") == 1
            continue
        if fate is None and not state["host"]:
            fate = "dropped"  # of a method that keeps as many as the image needs
        if fate is None:
            first, last = state["host"][0][gone], state["host"][-1][gone]
            fate = f"{reduce.gone} {place(first)}"
        said = page.locator(".explorer output").last.inner_text()
        assert said.split(", in the end")[0] == f"{place(gone)}: {fate} at stage 1"
        assert page.locator(".explorer .view").is_visible() == bool(state["host"])
        if state["host"] and first != last:
            assert said.endswith(f", in the end in {place(last)}")
    assert {"evit", "etps", "random", "tome", "dpcknn", "ats", "evovit"} <= set(one["sets"][0]["methods"])
    assert not page.wrong


# ---- in the page, really computing


@pytest.fixture
def running(explorer):
    """A site → its page after the button: the model runs there."""

    def start(site):
        page = explorer(site)
        page.get_by_role("button", name="Run the model in this page").press("Enter")
        page.wait_for_function("document.querySelector('.explorer').explorer.state.logits", timeout=60_000)
        return page

    return start


SEEN = """async ([set, image]) => {
    const {images, onnx} = JSON.parse(document.getElementById('explorer-data').textContent).sets[set];
    const picture = new Image();
    picture.src = images[image].src;
    await picture.decode();
    return Array.from(tpbook.pixels(picture, {...onnx.preparation, crop: 1}).tensor);
}"""


@browser_needed
@every_site
def test_the_page_computes_what_pytorch_computes(site, running):
    page = running(site)
    carried = carried_by(page)
    for set_, group in enumerate(carried["sets"]):
        if (
            "onnx" not in group
        ):  # the weights are not in this edition: what is carried stays, and no more can be asked for
            state = choose(page, set_, 1, "etps", 0.7)
            assert state["kept"] == [kept.tolist() for kept in COMMITTED[1].state("etps", 0.7)["kept"]]
            assert page.locator(".explorer").get_by_label("Keep ratio ρ").get_attribute("max") == str(
                len(carried["ratios"]) - 1
            )
            assert not page.get_by_label("A picture of your own").is_visible()
            assert page.locator(".explorer .methods").get_by_label("ATS", exact=True).is_enabled()
            continue
        assert set(group["onnx"]["models"]) == {m for m in group["methods"] if not looks.method_of(m).chooses.varies}
        for n, method in enumerate(group["methods"]):
            i, least = n % len(group["images"]), looks.method_of(method).reduce.least_ratio
            at = max(20 + 6 * n, round(100 * least) - 5)  # of the slider's places, a hundredth each
            if method not in group["onnx"]["models"]:
                assert page.locator(".explorer .methods").get_by_label(NAMES[method], exact=True).is_disabled()
                assert page.get_by_text("keep another number of tokens of every image").is_visible()
                continue
            click(page, set_, i, method).fill(str(at))
            state = settled(page)
            request = state["request"]
            assert request["method"] == method and request["image"] == i and request["ratio"] == (5 + at) / 100
            if method == "random":  # the page's own draws
                counts = token_counts(196, [request["ratio"]] * 3, tpbook.METHODS["random"])
                assert [len(kept) for kept in state["kept"]] == [count.kept for count in counts]
                continue
            photographs = len(group["classes"]) == 1000
            model = model_of(photographs, method, half=photographs)
            x = torch.tensor(page.evaluate(SEEN, [set_, i])).view(1, model.in_chans, *model.patch_embed.img_size)
            t, logits = computed(model, x, request)
            assert state["logits"] == pytest.approx(logits.tolist(), abs=1e-4)
            assert len(state["kept"]) == len(t.kept)
            for s, kept in enumerate(state["kept"]):
                assert_kept(np.array([kept]), s, t, 196)
            same_hosts_and_cost(state, model, t, x)
            if not photographs:  # its pictures are PNGs
                torch.testing.assert_close(x, widgets.input_of(group["images"][i]["src"], model))
    assert not page.wrong


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


THUMBS = "n => document.querySelector('.explorer').querySelectorAll('.thumb').length === n"
SAID = "text => document.querySelector('.explorer .said').textContent.includes(text)"


def able_in(page):
    """The first set whose model is in the page."""
    return next(i for i, group in enumerate(carried_by(page)["sets"]) if "onnx" in group)


def give(field, name, content):
    field.set_input_files({"name": name, "mimeType": "image/png", "buffer": content})


DROP = """([name, bytes]) => {
    const dropped = new DataTransfer();
    dropped.items.add(new File([new Uint8Array(bytes)], name, {type: 'image/png'}));
    const drop = new DragEvent('drop', {dataTransfer: dropped, bubbles: true, cancelable: true});
    document.querySelector('.explorer canvas').dispatchEvent(drop);
}"""


@browser_needed
@every_site
def test_a_picture_is_dropped(site, explorer):
    """Before the button was pressed: that loads the model too."""
    page = explorer(site)
    count, able = page.locator(".explorer .thumb").count(), able_in(page)
    page.evaluate(DROP, ["mine.png", list(png(Image.new("L", (70, 40), 200)))])
    page.wait_for_function(THUMBS, arg=count + 1, timeout=60_000)
    state, group = settled(page), carried_by(page)["sets"][able]
    assert state["request"]["set"] == able and state["request"]["image"] == len(group["images"])
    assert len(state["logits"]) == len(group["classes"])
    assert not page.locator("#explorer-run").is_visible() and not page.wrong


@browser_needed
@every_site
def test_a_picture_of_the_readers_own(site, running):
    page = running(site)
    field = page.get_by_label("A picture of your own")
    count = page.locator(".explorer .thumb").count()
    before = count - len(carried_by(page)["sets"][able_in(page)]["images"])  # of other sets
    pictures = {
        "grey.png": Image.new("L", (80, 50), 99), "clear.png": Image.new("RGBA", (5, 9), (9, 9, 9, 0)),
        "tiny.png": Image.new("RGB", (1, 1)),
    }  # fmt: skip
    for name, picture in pictures.items():
        give(field, name, png(picture))
        count += 1
        page.wait_for_function(THUMBS, arg=count)
        state = settled(page)
        assert state["request"]["image"] == count - before - 1 and np.isfinite(state["logits"]).all()
        assert page.locator(".explorer canvas").first.get_attribute("aria-label").startswith(name)
    broken = {"words.txt": b"no picture", "empty.png": b"", "half.png": png(Image.effect_noise((90, 90), 9))[:300]}
    for name, content in broken.items():
        give(field, name, content)
        page.wait_for_function(SAID, arg=f"{name} ")
        assert settled(page)["request"]["image"] == count - before - 1, "the last state stays"
    assert not [wrong for wrong in page.wrong if "blob:" not in wrong]


# ---- in Jupyter: the widget's own JavaScript; a stand-in for the kernel's messages lets the widget answer

JUPYTER = """async source => {
    const widget = (await import(URL.createObjectURL(new Blob([source], {type: 'text/javascript'})))).default;
    const heard = [], data = JSON.parse(await kernel('data'));
    window.asked = [];
    const model = {
        get: () => data,
        on: (_, hear) => heard.push(hear),
        off: () => heard.length = 0,
        send: async (question, _, buffers) => {
            asked.push(question);
            const bytes = buffers ? Array.from(new Uint8Array(buffers[0])) : [];
            const answer = JSON.parse(await kernel(JSON.stringify([question, bytes])));
            heard.forEach(hear => hear(answer));
        },
    };
    document.body.innerHTML = '<main></main><aside></aside>';
    widget.render({model, el: document.querySelector('main')});
    window.again = () => widget.render({model, el: document.querySelector('aside')});
}"""


@pytest.mark.skipif(not (CHROMIUM and AXE.exists()), reason="needs an installed Chromium, and npm for axe-core")
def test_the_widget_in_jupyter(visit, tmp_path):
    (tmp_path / "empty.html").write_text("<!doctype html><html lang=en><title>t</title><body></body></html>")
    page = visit((tmp_path / "empty.html").as_uri())
    widget = widgets.explorer(method="etps", keep_ratio=0.5)

    def kernel(asked):
        if asked == "data":
            return json.dumps(widget.data)
        question, content = json.loads(asked)
        answers = []
        widget.send = lambda reply, *_: answers.append(json.dumps(reply))
        widget.answer(None, question, [bytes(content)])
        return answers[0]

    page.expose_function("kernel", kernel)
    page.evaluate(JUPYTER, widget._esm)
    state = settled(page)
    assert state["request"]["method"] == "etps" and state["request"]["ratio"] == 0.5
    # overtaken moves are dropped: of many only the first and the last are asked
    page.evaluate("asked.length = 0")
    page.evaluate("""() => {
        const slider = document.querySelector('input[type=range]');
        for (let i = 10; i < 60; i++) { slider.value = i; slider.dispatchEvent(new Event('input')); }
    }""")
    state = settled(page)
    assert state["request"]["ratio"] == 0.64 and page.evaluate("asked.map(q => q.ratio)") == [0.15, 0.64]
    reference = tpbook.prune(tpbook.load_backbone(DIGITS), "etps", keep_ratio=0.64)
    with torch.inference_mode(), tpbook.trace(reference) as t:
        reference(widget.inputs[0])
    assert state["kept"] == [sorted(kept[0].tolist()) for kept in t.kept]
    assert state["host"] == [host[0].tolist() for host in t.host]
    # other blocks
    page.locator(".blocks").get_by_label("1", exact=True).check()
    state = settled(page)
    assert state["request"]["at"] == [1, 3, 6, 9] and len(state["kept"]) == 4
    assert page.locator("figcaption").count() == 5
    # what a method cannot do is said
    page.locator(".methods").get_by_text("dTPS").click()
    page.wait_for_function(SAID, arg="trained to prune before blocks (3, 6, 9)")
    assert "stale" in page.locator("main").get_attribute("class"), "the pictures are still another state's"
    page.locator(".blocks").get_by_label("1", exact=True).uncheck()
    assert settled(page)["request"]["method"] == "dtps"
    assert "stale" not in page.locator("main").get_attribute("class")
    # a picture
    field = page.locator("main input[type=file]")
    give(field, "mine.png", png(Image.new("L", (9, 9), 200)))
    page.wait_for_function(THUMBS, arg=7)
    assert settled(page)["request"]["image"] == 6 and len(widget.inputs) == 7
    give(field, "mine.txt", b"words")
    page.wait_for_function(SAID, arg="mine.txt is no picture")
    give(field, "long.png", bytes(10_000_001))
    page.wait_for_function(SAID, arg="long.png has 11 MB, and Jupyter takes 9")
    # a second display of the same widget has its own answers, and its own pictures
    page.evaluate("void again()")
    second = "document.querySelector('aside').explorer"
    page.wait_for_function(f"{second}?.state && !{second}.busy")
    page.evaluate("""() => {
        for (const [place, value] of [['main', 10], ['aside', 80]]) {
            const slider = document.querySelector(`${place} input[type=range]`);
            slider.value = value;
            slider.dispatchEvent(new Event('input'));
        }
    }""")
    page.wait_for_function(f"!{second}.busy")
    shown = [settled(page)["kept"][0], page.evaluate(f"{second}.state.kept[0]")]
    assert [len(kept) for kept in shown] == [math.floor(196 * 0.15), math.ceil(196 * 0.85)]  # dTPS, eTPS
    give(page.locator("aside input[type=file]"), "theirs.png", png(Image.new("L", (9, 9), 20)))
    page.wait_for_function("document.querySelectorAll('aside .thumb').length === 7")
    page.wait_for_function(f"!{second}.busy")
    assert page.evaluate("asked.at(-1).image") == 7
    give(field, "more.png", png(Image.new("L", (9, 9), 20)))
    page.wait_for_function(THUMBS, arg=8)
    settled(page)
    assert page.evaluate("asked.at(-1).image") == 8, "not the second display's"
    assert not page.wrong and not serious(page)
