import gc
import os
import shutil
import types
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import timm
import torch
from safetensors.torch import load_file

from tpbook import kernels

HERE = Path(__file__).parent
FULL = Path(os.environ.get("TPBOOK_FIXTURES", HERE.parent.parent / "shared" / "fixtures"))

gc.set_threshold(100_000, 20, 20)  # what tests import has a million objects, and few are garbage
torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))))


def pytest_collection_modifyitems(items):
    """What takes long begins first, so that in the end no worker is alone with it."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=[True, False], ids=["kernels", "operators"])
def stages(request, monkeypatch):
    """Both ways that a stage without gradient runs on a CPU: by our kernels, and by PyTorch's operators."""
    monkeypatch.setattr(kernels, "enabled", request.param)
    if request.param and not kernels.stage_kernels(torch.zeros(1)):
        pytest.skip("the kernels are not built")


@pytest.fixture
def official():
    """name → the tensors that the official code gave; the full set where it is there, else the committed subset."""

    def load(name):
        if (FULL / f"{name}.safetensors").exists():
            return load_file(FULL / f"{name}.safetensors")
        if not (HERE / "fixtures" / f"{name}.safetensors").exists():
            pytest.skip(f"{name} is in the full fixtures only")
        tensors = load_file(HERE / "fixtures" / f"{name}.safetensors")
        if name == "evit_drop":
            fuse = load_file(HERE / "fixtures" / "evit_fuse.safetensors")
            tensors |= {k: v for k, v in fuse.items() if k.startswith("model.")}
        if name != "tps_squeeze":
            tensors |= load_file(HERE / "fixtures" / "images.safetensors")
        if name == "dynamicvit":  # whose training forward saw two images
            tensors |= load_file(HERE / "fixtures" / "dynamicvit_train.safetensors")
            tensors["train.images"] = torch.cat([tensors["images"], tensors["train.second_image"]])
        return tensors

    return load


# name → arguments of a small model of that family; every trait that the engine must leave to timm is here
FAMILIES = {
    "deit": ("deit_tiny_patch16_224", {}),
    "deit3": ("deit3_small_patch16_224", {}),  # LayerScale, no position embedding of the class token
    "dinov2_reg": ("vit_small_patch14_reg4_dinov2", {"img_size": 112}),  # registers, LayerScale
    "clip": ("vit_base_patch16_clip_224", {}),  # norm before the blocks
    "distilled": ("deit_tiny_distilled_patch16_224", {}),  # two heads
    "average": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "siglip": ("vit_base_patch16_siglip_224", {}),  # attention pooling, no class token
    "qk_norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "large_image": ("vit_tiny_patch16_224", {"img_size": (96, 160)}),
    "any_size": ("vit_tiny_patch16_224", {"dynamic_img_size": True}),
}


@pytest.fixture
def small():
    """family → a small random model of it in eval mode, LayerScale and norms far from their trivial start."""

    def make(family="deit", **kwargs):
        name, args = FAMILIES[family]
        size = {"embed_dim": 48, "num_heads": 3, "depth": 6, "num_classes": 10, "img_size": 96}
        model = timm.create_model(name, **{**size, **args, **kwargs}).eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() == 1:
                    p.uniform_(0.2, 0.8)
                else:
                    p.normal_(std=0.1)
        return model

    return make


@pytest.fixture
def images():
    """model → a batch of images it takes; not square where it can take that."""

    def make(model, batch=2):
        size = (64, 128) if model.dynamic_img_size else model.patch_embed.img_size
        return torch.randn(batch, model.in_chans, *size)

    return make


def held(thing, path="model"):
    """Every tensor that a module, or an object it refers to, holds: id → where. Two equal ones: nothing was kept."""
    found, seen, ahead = {}, set(), [(path, thing)]
    while ahead:
        path, thing = ahead.pop()
        if id(thing) in seen or isinstance(thing, (type, types.ModuleType, types.FunctionType, str, bytes)):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            found[id(thing)] = path
        elif isinstance(thing, dict):
            ahead += [(f"{path}[{key!r}]", value) for key, value in thing.items()]
        elif isinstance(thing, (list, tuple, set, frozenset)):
            ahead += [(f"{path}[{i}]", value) for i, value in enumerate(thing)]
        else:
            ahead += [(f"{path}.{key}", value) for key, value in getattr(thing, "__dict__", {}).items()]
    return found


# ---- in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
AXE = HERE.parent / "_build/javascript/node_modules/axe-core/axe.min.js"

# what sticks out at the right
WIDE = """() => {
    const over = e => e.getBoundingClientRect().right > innerWidth + 1;
    if (document.documentElement.scrollWidth <= innerWidth + 1) return [];
    return [...document.querySelectorAll('main *')].filter(over).slice(0, 5).map(e => e.outerHTML.slice(0, 120));
}"""

# what is wider than its box and cut off there, or scrolls and does not show it
CUT = """() => {
    const boxes = 'pre, .highlight, table, .math, mjx-container, .pst-scrollable-table-container, .cell_output';
    const hides = cell => getComputedStyle(cell).backgroundColor !== 'rgba(0, 0, 0, 0)';
    return [...document.querySelectorAll(`article :is(${boxes})`)].filter(box => {
        const {overflowX, backgroundImage} = getComputedStyle(box);
        if (!box.checkVisibility() || overflowX === 'visible' || box.scrollWidth <= box.clientWidth + 1) return false;
        return !['auto', 'scroll'].includes(overflowX) || box.tabIndex < 0 || !backgroundImage.includes('gradient')
            || [...box.querySelectorAll('tr, th, td')].some(hides);
    }).slice(0, 5).map(box => box.outerHTML.slice(0, 120));
}"""

# equations and Python, open ones, that a wide page should hold without scrolling
LONG = """() => [...document.querySelectorAll('.math, mjx-container, .highlight-python pre, .cell_input pre')]
    .filter(box => box.checkVisibility() && box.clientWidth && box.scrollWidth > box.clientWidth + 1)
    .filter(box => getComputedStyle(box).overflowX !== 'visible').map(box => box.textContent.trim().slice(0, 80))"""

# pictures as [address, width, width of their column]; texts of drawings within the page that are below 9 px
PICTURES = """() => [...document.querySelectorAll('article :is(figure, .cell_output) img')]
    .filter(image => image.checkVisibility())
    .map(image => [image, image.closest('figure, .cell_output')])
    .map(([image, box]) => [image, box.clientWidth - 2 * parseFloat(getComputedStyle(box).paddingLeft)])
    .map(([image, column]) => [image.src, image.clientWidth, column])"""
SMALL = """() => [...document.querySelectorAll('article svg text')].filter(text => text.checkVisibility()
    && !text.closest('mjx-container') && text.textContent.trim()
    && parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a < 9).map(text => text.textContent)"""


# the rules of axe-core that find other elements in the dark than in the light: of colours, and of drawings for either
DARK = ["color-contrast", "link-in-text-block", "link-name", "image-alt", "svg-img-alt", "role-img-alt", "object-alt"]
DARK += ["nested-interactive"]


def serious(page, rules=None, where="document"):
    """What axe-core finds that shuts somebody out: rule → the elements. `rules`: these alone, else all; `where`: in
    JavaScript, the elements to look at, with what is in them."""
    if not page.evaluate("Boolean(window.axe)"):
        page.evaluate(AXE.read_text())
    options = {"resultTypes": ["violations"], "preload": False} | ({"runOnly": rules} if rules else {})
    found = page.evaluate(f"options => axe.run({where}, options)", options)["violations"]
    return {
        violation["id"]: [node["html"][:150] for node in violation["nodes"]][:4]
        for violation in found
        if violation["impact"] in ("serious", "critical")
    }


@pytest.fixture(scope="session")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        gc.collect()  # a loader's worker that still lives holds the pipe whose end the browser's driver waits for
        browser.close()


def attend(page):
    """The page, which notes in `page.wrong` what goes wrong from now on, and in `page.asked` what it loads."""
    page.wrong, page.asked = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("console", lambda message: page.wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("requestfailed", lambda request: page.wrong.append(f"failed: {request.url}"))
    return page


def rest(page, address):
    """The page, gone to the address, loaded and at rest."""
    page.goto(address)
    page.wait_for_function("!window.MathJax || !MathJax.startup || MathJax.startup.promise.then(() => true)")
    page.wait_for_function("[...document.images].every(image => image.complete)")
    return page


@pytest.fixture
def visit(chromium):
    """address, width → the page, loaded and at rest, in a window of its own, which remembers nothing."""
    contexts = []

    def visit(address, width=1280):
        offline = urlsplit(address).scheme == "file"
        contexts.append(chromium.new_context(viewport={"width": width, "height": 900}, offline=offline))
        return rest(attend(contexts[-1].new_page()), address)

    yield visit
    for context in contexts:
        context.close()


@pytest.fixture(scope="session")
def turn(chromium):
    """address → the page, for who only looks at it: all in one window, since a new one costs more than most pages."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    page = attend(context.new_page())

    def turn(address):
        page.wrong.clear(), page.asked.clear()
        page.emulate_media(color_scheme="light")
        page.set_viewport_size({"width": 1280, "height": 900})
        return rest(page, address)

    yield turn
    context.close()
