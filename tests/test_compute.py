"""Models and pictures in the reader's browser, from disk, with the network cut.

Without an installed Chromium, npm's packages or onnx, all of this is skipped.
"""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CHROMIUM
from PIL import Image, ImageOps

import tpbook

pytest.importorskip("onnx")
from book import pack  # noqa: E402, since it needs onnx

TOP = Path(__file__).parent.parent
RUNTIME = TOP / "_build/javascript/node_modules/onnxruntime-web"
METHODS = ("evit", "etps", "random")
pytestmark = pytest.mark.skipif(not (CHROMIUM and RUNTIME.exists()), reason="needs an installed Chromium, and npm")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A page on disk with the scripts that a built book has."""
    site = tmp_path_factory.mktemp("site")
    for method in ("dense", *METHODS):
        model = tpbook.load_backbone("vit_digits_patch4_56")
        if method != "dense":
            tpbook.prune(model, method)
        tpbook.export(model, site / f"{method}.onnx")
    pack.runtime(RUNTIME, site / "_static")
    pack.models(site.glob("*.onnx"), site / "_static")
    shutil.copy(TOP / "book/static/compute.js", site / "_static")
    (site / "page.html").write_text(
        "<!doctype html><meta charset=utf-8><script src=_static/compute.js></script><input type=file>"
    )
    return site


@pytest.fixture
def page(site, chromium):
    """That page, opened; `page.asked` is what it loaded."""
    context = chromium.new_context(offline=True)
    page = context.new_page()
    page.asked, page.wrong = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("console", lambda message: page.wrong.append(message.text))
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.goto((site / "page.html").as_uri())
    yield page
    assert not page.wrong
    assert all(url.startswith((site.as_uri(), "blob:null/")) for url in page.asked)
    context.close()


# through JSON, since Playwright is slow with long lists
RUN = """async ([name, pixels, shape, ratio, random]) => {
    const model = await tpbook.load("_static/", name);
    const floats = text => text && Float32Array.from(JSON.parse(text));
    const {logits, kept, host} = await tpbook.run(model, floats(pixels), shape, ratio, floats(random));
    return JSON.stringify({logits: [...logits], kept, host, about: model.about});
}"""


def ran(page, name, images, ratio, draws=None):
    """What `tpbook.run` gives for images (B, C, H, W) and draws (B, S, N)."""
    pixels, draws = (tensor if tensor is None else json.dumps(tensor.flatten().tolist()) for tensor in (images, draws))
    return json.loads(page.evaluate(RUN, [name, pixels, list(images.shape), ratio, draws]))


@pytest.mark.parametrize("method", METHODS)
def test_the_browser_gives_what_pytorch_gives(page, method):
    model = tpbook.load_backbone("vit_digits_patch4_56").eval()
    tpbook.prune(model, method)
    for batch, ratio in ((1, 0.7), (1, 0.3), (2, 0.5), (1, [0.9, 0.5, 0.7]), (1, 1.0)):
        images = tpbook.data.digits("test").images[:batch]
        model.keep_ratio = ratio
        with torch.inference_mode(), tpbook.trace(model) as trace:
            logits = model(images)
        draws = None
        if method == "random":
            draws = torch.zeros(batch, 3, 196)  # (B, S, N)
            for stage, scores in enumerate(trace.scores):
                draws[:, stage, : scores.shape[1]] = scores
        got = ran(page, method, images, ratio, draws)
        assert np.allclose(got["logits"], logits.flatten(), atol=1e-4, rtol=0)
        assert got["kept"] == [kept.flatten().tolist() for kept in trace.kept]
        assert got["host"] == [host.flatten().tolist() for host in trace.host]
        assert got["about"]["method"] == method and got["about"]["image_size"] == [56, 56]


def test_a_model_that_is_not_pruned(page):
    images = tpbook.data.digits("test").images[:1]
    got = ran(page, "dense", images, 1)
    with torch.inference_mode():
        logits = tpbook.load_backbone("vit_digits_patch4_56").eval()(images)
    assert np.allclose(got["logits"], logits.flatten(), atol=1e-4, rtol=0)
    assert got["kept"] == [] and got["host"] == [] and got["about"]["method"] is None


def test_loaded_when_asked_and_once(page):
    def asked():
        return [Path(url).name for url in page.asked if url.startswith("file:")]

    assert asked() == ["page.html", "compute.js"]
    for name in ("evit", "etps", "evit"):
        page.evaluate("name => tpbook.load('_static', name).then(() => null)", name)
    later = asked()[2:]
    assert sorted(later) == sorted(
        ["ort.js", "wasm.js", "index.js", "evit.graph.js", "dense.weights.js", "etps.graph.js"]
    )
    texts = "async texts => { await tpbook.load('_static', 'random', text => texts.push(text)); return texts }"
    assert page.evaluate(texts, []) == ["Loading ONNX Runtime", "Loading the model", "Starting the model"]


FAIL = "([base, name]) => tpbook.load(base, name).then(() => 'loaded', error => error.message)"


def test_what_cannot_be_loaded_is_said_in_words_and_tried_again(page, site, tmp_path):
    said = page.evaluate(FAIL, ["_static", "none"])
    assert said == "the model none could not be loaded: there is none of that name; there are dense, etps, evit, random"

    static = site / "again"
    shutil.copytree(site / "_static", static)
    wasm = static / "onnxruntime/wasm.js"
    wasm.rename(tmp_path / "wasm.js")
    assert page.evaluate(FAIL, ["again", "evit"]) == f"the runtime could not be loaded: {wasm.as_uri()} is not there"
    wasm.write_text((tmp_path / "wasm.js").read_text()[:-1000])
    assert page.evaluate(FAIL, ["again", "evit"]) == f"the runtime could not be loaded: {wasm.as_uri()} is damaged"
    shutil.copy(tmp_path / "wasm.js", wasm)
    graph = static / "models/evit.graph.js"
    good = graph.read_text()
    pack.write(static, "models/evit.graph", b"not a model")
    assert page.evaluate(FAIL, ["again", "evit"]).startswith("the model evit could not be loaded: ")
    graph.write_text(good)
    assert page.evaluate(FAIL, ["again", "evit"]) == "loaded"
    page.wrong.clear()  # the browser has said so too


def test_random_draws_must_be_given(page):
    with pytest.raises(Exception, match="random must be given"):
        ran(page, "random", torch.zeros(1, 1, 56, 56), 0.5)


# ---- pictures

READ = """async options => {
    const bitmap = await tpbook.read(document.querySelector("input").files[0]);
    const {tensor, shape, canvas} = tpbook.pixels(bitmap, options);
    const size = [bitmap.width, bitmap.height], shown = [canvas.width, canvas.height];
    return {bitmap: size, tensor: JSON.stringify([...tensor]), shape, canvas: shown};
}"""
SIZE = 32
COLOUR = {"size": SIZE, "mean": [0, 0, 0], "std": [1, 1, 1], "channels": 3, "crop": 1}


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def read(page):
    """File name, bytes → (C, H, W) in 0 to 1, and the size of the bitmap; or the words of the error."""

    def read(name, data, **options):
        page.set_input_files("input", {"name": name, "mimeType": "image/png", "buffer": data})
        return shown({**COLOUR, **options})

    def shown(options):
        got = page.evaluate(READ, options)
        assert got["shape"] == [1, options["channels"], options["size"], options["size"]]
        assert got["canvas"] == [options["size"], options["size"]]
        return np.array(json.loads(got["tensor"]), dtype=np.float32).reshape(got["shape"][1:]), tuple(got["bitmap"])

    return read


def smooth(width, height):
    """A random colour picture without fine detail."""
    few = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(few).resize((width, height), Image.Resampling.BICUBIC)


def wanted(image, crop=1.0):
    """What torchvision's resize and centre crop give."""
    short = int(SIZE / crop)
    scale = short / min(image.size)
    image = image.resize([int(side * scale) for side in image.size], Image.Resampling.BICUBIC)
    left, top = (round((side - SIZE) / 2) for side in image.size)
    image = image.crop((left, top, left + SIZE, top + SIZE))
    return np.asarray(image, dtype=np.float32).reshape(SIZE, SIZE, -1).transpose(2, 0, 1) / 255  # (C, H, W)


@pytest.mark.parametrize("crop", [1.0, 0.8])
@pytest.mark.parametrize("size", [(90, 60), (60, 90), (32, 32), (20, 30), (900, 600)])
def test_pixels(read, size, crop):
    image = smooth(*size)
    got, bitmap = read("picture.png", encoded(image, "PNG"), crop=crop)
    assert bitmap == size
    assert np.abs(got - wanted(image, crop)).mean() < 0.02
    mean, std = [0.5, 0.4, 0.3], [0.25, 0.5, 0.75]
    normalised, _ = read("picture.png", encoded(image, "PNG"), crop=crop, mean=mean, std=std)
    expected = (got - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    assert np.allclose(normalised, expected, atol=1e-5)


def test_grey(read):
    """Colours turn grey as in Pillow, and a grey picture has three equal channels where three are wanted."""
    image = smooth(SIZE, SIZE)
    got, _ = read("picture.png", encoded(image, "PNG"), channels=1, mean=[0], std=[1])
    assert np.abs(got - np.asarray(image.convert("L"))[None] / 255).max() < 1e-6
    got, _ = read("grey.png", encoded(image.convert("L"), "PNG"))
    assert np.abs(got - np.asarray(image.convert("L"))[None] / 255).max() < 1e-6


def test_transparent(read):
    """What is transparent is white; half transparent black is grey."""
    image = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
    image.paste((0, 0, 0, 128), (0, 0, SIZE, SIZE // 2))
    got, _ = read("picture.png", encoded(image, "PNG"))
    assert np.allclose(got[:, : SIZE // 2], 0.5, atol=0.01) and (got[:, SIZE // 2 :] == 1).all()


@pytest.mark.parametrize("size", [(1, 1), (300, 1)])
def test_tiny(read, size):
    got, bitmap = read("picture.png", encoded(Image.new("RGB", size, (255, 0, 51)), "PNG"), crop=0.9)
    assert bitmap == size and np.allclose(got.mean((1, 2)), (1, 0, 0.2)) and got.std((1, 2)).max() < 1e-6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_as_the_camera_was_held(read, orientation):
    image, exif = smooth(90, 60), Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, "JPEG", quality=95, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    got, bitmap = read("picture.jpg", data)
    assert bitmap == upright.size
    assert np.abs(got - wanted(upright)).mean() < 0.02


def test_huge(read):
    """As many pixels as cameras give are read, and made fewer at once, turned as they should be."""
    image, exif = smooth(60, 45).resize((12000, 9000), Image.Resampling.NEAREST), Image.Exif()
    exif[0x0112] = 6
    data = encoded(image, "JPEG", quality=50, exif=exif)
    got, bitmap = read("huge.jpg", data)
    assert bitmap == (1024, 1365)
    small = smooth(60, 45).transpose(Image.Transpose.ROTATE_270)
    assert np.abs(got - wanted(small)).mean() < 0.02


JPEG = encoded(smooth(300, 200), "JPEG")
PNG = encoded(smooth(300, 200), "PNG")


BAD = {
    "notes.png": (b"no picture at all", "is not a picture that this browser can read"),
    "empty.png": (b"", "is empty"),
    "cut.jpg": (JPEG[: len(JPEG) // 2], "cannot be decoded"),
    "cut.png": (PNG[: len(PNG) // 2], "cannot be decoded"),
    "header.jpg": (JPEG[:20], "is not a picture"),
    "vast.png": (encoded(Image.new("1", (20000, 10000)), "PNG"), "is 20000 × 10000 pixels; at most 150 million"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_picture(read, name):
    data, said = BAD[name]
    with pytest.raises(Exception, match=f"{name} {said}"):
        read(name, data)


def test_a_file_too_large(page, tmp_path):
    path = tmp_path / "film.png"
    with path.open("wb") as file:
        file.truncate(60_000_001)
    page.set_input_files("input", path)
    with pytest.raises(Exception, match="film.png has 61 MB; at most 50 MB are read"):
        page.evaluate(READ, COLOUR)
