"""The explorer's states, its pictures, and what the widget answers, without a browser."""

import base64
import io
import json
import runpy
import statistics
import struct
import time
import zlib
from fractions import Fraction
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tpbook
from tpbook import data, flops
from tpbook.book import looks, widgets
from tpbook.weights import DIGITS, load_trained_digits

WEIGHTS = Path(tpbook.__file__).parent / "pretrained"


@pytest.fixture(scope="module")
def digits():
    return data.digits("test")


STATES = [
    (method, ratio) for method, ratio in product(widgets.CHOICES, (0.2, 0.5, 1.0))
    if ratio >= looks.method_of(method).reduce.least_ratio
]  # fmt: skip


@pytest.mark.parametrize("method, ratio", STATES)
def test_a_state_is_what_the_model_did(digits, method, ratio):
    name, options = widgets.CHOICES[method]
    if tpbook.METHODS[name].score.learned:
        model = load_trained_digits(method, keep_ratio=ratio)
    else:
        model = tpbook.prune(tpbook.load_backbone(DIGITS), name, keep_ratio=ratio, **options)
    x = digits.images[5:6]
    with torch.inference_mode(), tpbook.trace(model) as t:
        p = model(x)[0].softmax(0)
    state = widgets.state(model, x)
    for mask, kept in zip(state["kept"], t.kept, strict=True):
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(mask), np.uint8))[:196]
        assert bits.nonzero()[0].tolist() == sorted(i for i in kept[0].tolist() if i >= 0)
    for text, host in zip(state["host"], t.host, strict=True):
        assert list(base64.b64decode(text)) == host[0].tolist()
    assert [c for c, _ in state["top"]] == p.argsort(descending=True)[:5].tolist()
    assert [q for _, q in state["top"]] == pytest.approx(p.sort(descending=True).values[:5].tolist(), abs=6e-5)
    cost, varies = widgets.cost_of(model, x), model.pruning.method.chooses.varies
    if varies:
        with pytest.raises(ValueError, match="how many tokens .* depends on them"):
            widgets.cost_of(model)
    want = flops.closed_form(model, x)[0] if varies else flops.closed_form(model)
    assert cost["total"] == want.total and len(cost["tokens"]) == len(cost["macs"]) == 12
    assert [cost["tokens"][i] - 1 for i in (3, 6, 9)] == [len(kept[0]) for kept in t.kept]


def test_many_patches_take_two_bytes(small):
    model = tpbook.prune(small("deit", img_size=288), "etps", keep_ratio=0.5)  # 324 patches
    x = torch.randn(1, 3, 288, 288)
    with torch.inference_mode(), tpbook.trace(model) as t:
        model(x)
    host = np.frombuffer(base64.b64decode(widgets.state(model, x)["host"][-1]), "<u2")
    assert host.tolist() == t.host[-1][0].tolist() and host.max() > 255


def test_a_state_is_of_one_image_and_a_pruned_model(digits):
    model = tpbook.load_backbone(DIGITS)
    with pytest.raises(ValueError, match="model must be pruned.*VisionTransformer"):
        widgets.state(model, digits.images[:1])
    with pytest.raises(ValueError, match=r"one image.*\(2, 1, 56, 56\)"):
        widgets.state(tpbook.prune(model, "evit"), digits.images[:2])


# ---- pictures


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_pictures_are_turned_as_the_camera_says():
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (0, 0, 20, 20))  # blue left, red right
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90° clockwise
    upright = widgets.read_picture(encoded(image, "JPEG", exif=exif, quality=100, subsampling=0))
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5))[2] > 200 and upright.getpixel((10, 35))[0] > 200


@pytest.mark.parametrize("image, seen", [
    (Image.new("RGBA", (8, 8), (255, 0, 0, 0)), (255, 255, 255)),
    (Image.new("LA", (8, 8), (0, 0)), (255, 255, 255)),
    (Image.new("L", (8, 8), 90), (90, 90, 90)),
    (Image.new("1", (8, 8), 1), (255, 255, 255)),
    (Image.new("P", (8, 8), 0), (0, 0, 0)),
    (Image.new("RGB", (1, 1), (1, 2, 3)), (1, 2, 3)),
])  # fmt: skip
def test_pictures_of_every_kind(image, seen):
    picture = widgets.read_picture(encoded(image))
    assert picture.mode == "RGB" and picture.getpixel((0, 0)) == seen
    for model in (tpbook.load_backbone(DIGITS),):
        assert data.eval_transform(model)(picture).shape == (1, 56, 56)


def bomb():
    """A PNG of a few bytes that claims 40,000 × 40,000 pixels."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("broken, said", [
    (b"", "no picture that Pillow can read"),
    (b"a text", "no picture that Pillow can read"),
    (encoded(Image.effect_noise((64, 64), 50), "JPEG")[:600], "truncated"),
    (bomb(), "pixels"),
    (encoded(Image.new("L", (3000, 2))), "3000 × 2 px"),
])  # fmt: skip
def test_pictures_that_are_none(broken, said, tmp_path):
    with pytest.raises(ValueError, match=f"the picture.*{said}"):
        widgets.read_picture(broken)
    path = tmp_path / "mine.png"
    path.write_bytes(broken)
    with pytest.raises(ValueError, match=f"mine.png.*{said}"):
        widgets.read_picture(path)


def test_a_huge_photograph_is_read_smaller():
    photograph = encoded(Image.effect_noise((9000, 6000), 30), "JPEG", quality=30)
    assert max(widgets.read_picture(photograph).size) < 5000


def test_a_missing_picture():
    with pytest.raises(FileNotFoundError, match="nowhere.jpg"):
        widgets.read_picture("nowhere.jpg")


@pytest.mark.parametrize("name, kwargs", [(DIGITS, {}), ("deit_tiny_patch16_224", {"depth": 1})])
def test_an_embedded_picture_says_what_the_model_saw(name, kwargs):
    import timm

    model = tpbook.load_backbone(name) if name == DIGITS else timm.create_model(name, **kwargs).eval()
    seen = torch.rand(1, model.in_chans, *model.patch_embed.img_size)
    x = widgets.input_of(widgets.picture_of(seen, model), model)
    src = widgets.picture_of(x, model)
    if name == DIGITS:  # PNG: the same to the last bit
        assert torch.equal(widgets.input_of(src, model), x)
    assert widgets.input_of(src, model).shape == x.shape


def test_the_pages_part_is_safe_to_embed():
    html = widgets.page({"credit": "</script><script>alert(1)</script>"})
    assert html.count("</script>") == 1
    assert json.loads(html[html.index("{") : html.rindex("}") + 1])["credit"].startswith("</script>")
    html = widgets.page({"credit": "<!--<script>", "left": 1})
    assert "<!--" not in html and html.count("<script") == html.count("</script>") == 1
    assert json.loads(html[html.index("{") : html.rindex("}") + 1])["credit"] == "<!--<script>"
    with pytest.raises(ValueError):
        widgets.page({"speed": float("nan")})


# ---- trained predictors


@pytest.mark.parametrize("method", ["dynamicvit", "dtps"])
def test_trained_digits_are_as_good_as_their_file_says(method, digits):
    path = WEIGHTS / f"{DIGITS}_{method}.safetensors"
    assert path.stat().st_size < 2e6
    said = {row["keep_ratio"]: row["right"] for row in json.loads(path.with_suffix(".json").read_text())["accuracy"]}
    model = load_trained_digits(method)
    with torch.inference_mode():
        right = int((torch.cat([model(x) for x in digits.images.split(100)]).argmax(1) == digits.labels).sum())
    assert abs(right - said[0.5]) <= 2  # sums differ in the last bit between machines


def test_trained_digits_of_no_such_method():
    with pytest.raises(ValueError, match="dynamicvit or dtps, got 'evit'"):
        load_trained_digits("evit")


# ---- the widget


@pytest.fixture
def asked():
    """widget, question → its answer."""

    def ask(widget, buffers=(), **question):
        sent = []
        widget.send = lambda reply, *_: sent.append(reply)
        widget.answer(None, {"id": 7, **question}, list(buffers))
        assert len(sent) == 1 and sent[0]["id"] == 7
        json.dumps(sent[0])
        return sent[0]

    return ask


def test_the_widget_answers_with_states(asked, digits):
    widget = widgets.explorer(images=[digits.images[0], digits.images[1]])
    assert list(widget.models) == list(widgets.CHOICES)
    for method, (name, options) in widgets.CHOICES.items():
        for ratio, at in ((0.5, [3, 6, 9]), (0.37, [3, 6, 9])):
            if ratio < looks.method_of(method).reduce.least_ratio:  # where the slider does not go
                reply = asked(widget, kind="state", image=1, method=method, ratio=ratio, at=at)
                assert "at least 98 stay, got keep_ratio=0.37" in reply["error"]
                continue
            model = widget.models[method]
            reply = asked(widget, kind="state", image=1, method=method, ratio=ratio, at=at)
            if not tpbook.METHODS[name].score.learned:
                model = tpbook.prune(tpbook.load_backbone(DIGITS), name, keep_ratio=ratio, at=at, **options)
            assert {key: reply[key] for key in ("kept", "host", "top")} == widgets.state(model, digits.images[1:2])
            varies = looks.method_of(method).chooses.varies
            want = flops.closed_form(model, digits.images[1:2])[0] if varies else flops.closed_form(model)
            assert reply["total"] == want.total and "ms" in reply["speed"]


def test_the_widget_prunes_other_blocks(asked):
    widget = widgets.explorer()
    reply = asked(widget, kind="state", image=0, method="etps", ratio=0.5, at=[1, 2, 4, 8])
    assert len(reply["kept"]) == 4 and reply["tokens"][:3] == [197, 99, 50]
    reply = asked(widget, kind="state", image=0, method="dtps", ratio=0.5, at=[1])
    assert "trained to prune before blocks (3, 6, 9)" in reply["error"]
    reply = asked(widget, kind="state", image=0, method="evit", ratio=0.5, at=[40])
    assert "40" in reply["error"]


def test_the_widget_takes_pictures(asked, tmp_path):
    path = tmp_path / "cat.png"
    Image.new("RGB", (300, 200), "green").save(path)
    widget = widgets.explorer(images=[path])
    assert [image["alt"] for image in widget.data["sets"][0]["images"]] == ["cat"]
    reply = asked(widget, [encoded(Image.new("RGB", (30, 20), "white"))], kind="picture", name="mine.png")
    assert reply["alt"] == "mine.png" and reply["src"].startswith("data:image/png;base64,")
    assert asked(widget, kind="state", image=1, method="evit", ratio=0.5, at=[3])["kept"]
    reply = asked(widget, [b"junk"], kind="picture", name="mine.txt")
    assert "mine.txt is no picture" in reply["error"] and len(widget.inputs) == 2
    assert [image["number"] for image in widget.data["sets"][0]["images"]] == [0, 1], "for displays to come"
    assert asked(widget, kind="state", image=0, method="no such", ratio=0.5, at=[3])["error"] == "KeyError: 'no such'"


def test_the_widget_leaves_the_readers_model_alone(small):
    model = small()
    before = model(torch.ones(1, 3, 96, 96))
    widget = widgets.explorer(model, [Image.new("RGB", (96, 96))])
    assert list(widget.models) == [
        "evit", "evit, no fusion", "topk", "etps", "tome", "ats", "dpcknn", "evovit", "random"
    ]  # fmt: skip
    assert widget.model is not model and type(model).__name__ == "VisionTransformer"
    assert torch.equal(model(torch.ones(1, 3, 96, 96)), before)


def test_what_was_trained_is_shown(small, asked):
    """Also for a method that needs no training by itself, and under the name that its options have."""
    evit = tpbook.prune(small(), "evit", score="predictor", keep_ratio=0.5)
    dropping = tpbook.prune(small(), "evit", score="predictor", keep_ratio=0.5, fuse=False, at=(2, 4))
    for one in (evit, dropping):  # random, but not as the explorer's own would be
        torch.nn.init.normal_(one.score_predictor[0].out_conv[-2].weight)
    x = torch.randn(3, 96, 96)
    widget = widgets.explorer(small(), [x], trained=[evit, dropping])
    for name, one in (("evit", evit), ("evit, no fusion", dropping)):
        reply = asked(widget, kind="state", image=0, method=name, ratio=0.5, at=list(one.pruning.at))
        assert {key: reply[key] for key in ("kept", "host", "top")} == widgets.state(one, x[None])
        assert reply["total"] == flops.closed_form(one).total
    reply = asked(widget, kind="state", image=0, method="evit, no fusion", ratio=0.5, at=[1])
    assert reply["error"] == "EViT, no fusion was trained to prune in blocks (2, 4); choose those"
    reply = asked(widget, kind="state", image=0, method="etps", ratio=0.5, at=[1])
    assert len(reply["kept"]) == 1, "the others are as before"
    with pytest.raises(ValueError, match="trained must hold one model a method, got two of 'evit'"):
        widgets.explorer(small(), trained=[evit, evit])


def test_a_trained_model_opens_at_its_own_blocks(small):
    trained = tpbook.prune(small(), "dtps", keep_ratio=0.5, at=(2, 4))
    shown = widgets.explorer(small(), trained=[trained], method="dtps").data["sets"][0]
    assert shown["at"] == [2, 4] and widgets.explorer(small(), trained=[trained]).data["sets"][0]["at"] == [1, 3, 4]


@pytest.mark.parametrize("ratio", [Fraction(1, 2), np.float32(0.5), np.array(0.5)])
def test_the_widget_opens_at_any_number(small, ratio):
    widget = widgets.explorer(small(), keep_ratio=ratio, at=np.array([1, 2]))
    assert json.loads(json.dumps(widget.data["start"]))["ratio"] == 0.5 and widget.data["sets"][0]["at"] == [1, 2]


def test_the_widget_offers_trained_models(small):
    trained = tpbook.prune(small(), "dynamicvit", keep_ratio=0.5)
    assert list(widgets.explorer(small(), trained=[trained]).models)[0] == "dynamicvit"
    with pytest.raises(ValueError, match="trained must hold models pruned by a method with predictors"):
        widgets.explorer(small(), trained=[tpbook.prune(small(), "evit")])
    with pytest.raises(ValueError, match="trained must take what model takes"):
        widgets.explorer(small(), trained=[tpbook.prune(small(img_size=128), "dtps")])


@pytest.mark.parametrize("arguments, error, said", [
    ((3,), TypeError, "model must be of a known family .*VisionTransformer.*got builtins.int"),
    (("no_such_model",), ValueError, "no_such_model"),
    ((torch.nn.Linear(2, 2),), TypeError, "known family.*got torch.*Linear"),
    (("pvt_digits_56",), ValueError, "model must work on one map of patches, got a timm PyramidVisionTransformerV2"),
    (("swin_digits_56",), ValueError, "model must work on one map of patches, got a timm SwinTransformer"),
])  # fmt: skip
def test_the_widget_refuses(arguments, error, said):
    with pytest.raises(error, match=said):
        widgets.explorer(*arguments)


@pytest.mark.parametrize("arguments, error, said", [
    ({"keep_ratio": 1.5}, ValueError, r"keep_ratio must lie in \(0, 1\], got 1.5"),
    ({"keep_ratio": 0, "method": "dtps"}, ValueError, r"keep_ratio must lie in \(0, 1\], got 0"),
    ({"keep_ratio": [0.5, 0.5, 0.5]}, TypeError, r"keep_ratio must be one number, got \[0.5"),
    ({"at": [12]}, ValueError, "at must hold indices from 0 to 11, got 12"),
    ({"at": ()}, ValueError, r"at must name at least one block.*got \(\)"),
    ({"method": ["evit"]}, ValueError, r"method must be one of .*got \['evit'\]"),
    ({"images": ["nowhere.png"]}, FileNotFoundError, "nowhere.png"),
    ({"images": "cat.jpg"}, TypeError, "images must be a list of pictures, got str"),
    ({"images": [3]}, TypeError, "a picture must be a path, bytes or a PIL image, got int"),
    ({"images": [torch.zeros(3, 56, 56)]}, ValueError, r"must be \(1, 56, 56\), got \(3, 56, 56\)"),
    ({"trained": torch.nn.Linear(2, 2)}, TypeError, "trained must be a list of pruned models, got Linear"),
])  # fmt: skip
def test_the_widget_refuses_a_start_that_cannot_be(arguments, error, said):
    with pytest.raises(error, match=said):
        widgets.explorer(**arguments)


def test_a_model_without_class_token_is_pruned_by_what_needs_none(small, asked):
    widget = widgets.explorer(small("siglip"), [Image.new("RGB", (96, 96))], method="random")
    assert list(widget.models) == ["tome", "dpcknn", "random"]
    assert len(asked(widget, kind="state", image=0, method="random", ratio=0.5, at=[1, 3])["kept"]) == 2
    with pytest.raises(ValueError, match="method must be one of tome, dpcknn, random for this model, got 'evit'"):
        widgets.explorer(small("siglip"))


def test_models_of_other_libraries(asked):
    from torchvision.models import VisionTransformer

    model = VisionTransformer(96, 16, 3, 3, 48, 96, num_classes=7).eval()
    torch.nn.init.normal_(model.heads.head.weight)
    widget = widgets.explorer(model, [Image.effect_noise((90, 120), 50)], method="etps")
    x = widget.inputs[0]
    assert x.shape == (1, 3, 96, 96) and widget.data["sets"][0]["classes"] == [str(i) for i in range(7)]
    reply = asked(widget, kind="state", image=0, method="etps", ratio=0.5, at=[1])
    with torch.inference_mode(), tpbook.trace(tpbook.prune(model, "etps", keep_ratio=0.5, at=(1,))) as t:
        best = model(x)[0].softmax(0).max(0)
    assert reply["top"][0] == [int(best.indices), pytest.approx(float(best.values), abs=6e-5)]
    assert list(base64.b64decode(reply["host"][0])) == t.host[0][0].tolist()
    assert reply["tokens"] == [37, 19, 19]


def test_a_model_without_logits(small):
    with pytest.raises(ValueError, match="model must classify, but VisionTransformer gives no logits"):
        widgets.explorer(small(num_classes=0, global_pool=""))


def test_methods_that_are_added_are_shown(monkeypatch):
    mine = tpbook.Method("class_attention", "squeeze", "between", "floor", "nobody")
    monkeypatch.setitem(tpbook.METHODS, "mine", mine)
    shown = runpy.run_path(looks.__file__, {"__package__": "tpbook.book"}, "tpbook.book.again")
    assert shown["CHOICES"]["mine"] == ("mine", {})
    assert shown["LOOKS"]["mine"].title == "mine"
    assert shown["LOOKS"]["mine"].colour not in {look.colour for look in looks.LOOKS.values()}


def test_the_widget_refuses_methods_it_cannot_show(small):
    with pytest.raises(ValueError, match="method must be one of evit.*for this model, got 'dynamicvit'"):
        widgets.explorer(small(), method="dynamicvit")
    with pytest.raises(ValueError, match="must not be pruned.*pass it in `trained`"):
        widgets.explorer(tpbook.prune(small(), "evit"))


def test_a_move_is_fast(asked):
    """DeiT-Ti's size, untrained: the bar is 150 ms a move on two cores."""
    import timm

    widget = widgets.explorer(timm.create_model("deit_tiny_patch16_224"), [Image.new("RGB", (224, 224))])
    times = []
    for i in range(9):
        begun = time.perf_counter()
        method = ("evit", "etps", "random")[i % 3]
        asked(widget, kind="state", image=0, method=method, ratio=0.3 + 0.05 * i, at=[3, 6, 9])
        times.append(time.perf_counter() - begun)
    assert statistics.median(times) < 0.15
