"""Photographs that every edition shows: whole, credited, light, and what DeiT-Ti makes of them; and on the 1,000 that
they come from the engine gives the official EViT code's accuracy. Some need TPBOOK_DATA and TPBOOK_WEIGHTS."""

import base64
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset

import tpbook
from tpbook import data
from tpbook.book import looks, panels, photographs, results, states, widgets

TOP = Path(__file__).parent.parent
FOLDER = TOP / "book/photographs"
images_there = os.path.isdir(os.path.join(os.environ.get("TPBOOK_DATA", "-"), data.NIPS))
weights_there = os.path.isfile(os.path.join(os.environ.get("TPBOOK_WEIGHTS", "-"), "deit_tiny_patch16_224.safetensors"))
SHOWN = photographs.read(FOLDER)


def names(suffix):
    return sorted(path.stem for path in FOLDER.glob(f"*{suffix}"))


def test_each_has_its_author_licence_and_link():
    assert len(SHOWN) == 12 and [one.row["photograph"] for one in SHOWN] == list(photographs.CHOSEN)
    assert names(".jpg") == sorted(photographs.CHOSEN) and set(names(".json")) == {
        *photographs.CHOSEN,
        photographs.MODEL,
    }
    for one in SHOWN:
        row = one.row
        assert all(value.strip() for value in row.values()) and None not in row
        assert (
            row["license"] == "https://creativecommons.org/licenses/by/2.0/" and row["changes"] == photographs.CHANGES
        )
        assert all(re.match(r"https://(www\.)?flickr\.com/", row[key]) for key in ("author_profile", "landing_url"))
        for text in (one.credit, photographs.explorer_set([one])["images"][0]["credit"], photographs.credits([one])):
            assert all(row[key] in text for key in ("author", "author_profile", "license", "landing_url"))
        assert "by us" in photographs.credits([one]), "that it was changed is said"


@pytest.mark.skipif(not images_there, reason="needs TPBOOK_DATA")
def test_attribution_is_that_of_the_source():
    theirs = data.attribution()
    for one in SHOWN:
        row, mine = theirs[one.row["file"]], one.row
        assert mine["label"] == data.class_name(int(row["imagenet_index"]))
        assert mine["author"].split() == row["author"].split()
        assert all(mine[key] == row[key] for key in ("author_profile", "license", "landing_url"))


def test_they_are_light_and_as_large_as_the_model_sees_them():
    for path in FOLDER.glob("*.jpg"):
        assert path.stat().st_size <= 40_000 and Image.open(path).size == (224, 224)
    sizes = [path.stat().st_size for path in FOLDER.glob("*.json")]
    assert max(sizes) <= 1_000_000 and sum(sizes) <= 3_000_000


def test_every_state_is_there():
    learned = {name for name in looks.CHOICES if looks.method_of(name).score.learned}
    for one in SHOWN:
        assert set(one.states) == set(looks.CHOICES) - learned == set(one.seen["costs"])
        for name, several in one.states.items():
            least = looks.method_of(name).reduce.least_ratio
            assert [state is not None for state in several] == [ratio >= least for ratio in one.seen["ratios"]]
            whole = one.state(name, 1.0)
            assert whole["says"] == one.label, "the dense model is right about each"
        assert len({tuple(one.state(name, 0.5)["kept"][-1]) for name in ("random", "evit", "etps", "ats")}) >= 3
    with pytest.raises(ValueError, match="method must be one of evit, .*, got 'dtps'"):
        SHOWN[0].state("dtps", 0.5)
    for method, ratio in (("evit", 0.51), ("tome", 0.3)):
        with pytest.raises(ValueError, match=f"ratio must be one of .* for {method}, got {ratio}"):
            SHOWN[0].state(method, ratio)


def test_methods_differ_on_the_one_that_the_explorer_opens_on():
    evit, random = (SHOWN[0].state(name, 0.5) for name in ("evit", "random"))
    assert evit["says"] == SHOWN[0].label != random["says"]


@pytest.mark.slow
@pytest.mark.skipif(not weights_there, reason="needs TPBOOK_WEIGHTS")
def test_deit_says_so():
    """Computed anew at a few ratios; of near ties another version of PyTorch may keep another patch."""
    model, ratios = tpbook.load_backbone(photographs.MODEL), [0.3, 0.5, 0.7]
    assert {key: SHOWN[0].seen[key] for key in states.describe(model)} == states.describe(model)
    for part, ratio in enumerate(ratios):  # every method of every photograph, at one of the ratios
        some = SHOWN[part :: len(ratios)]
        costs, found = states.states_of(model, [widgets.input_of(one.src, model) for one in some], [ratio])
        for name, [cost] in costs.items():
            assert cost == SHOWN[0].seen["costs"][name][photographs.RATIOS.index(ratio)]
        for one, own in zip(some, found, strict=True):
            for name, [state] in own.items():
                if state is None:
                    continue
                mine, state = one.state(name, ratio), states.decode(state, 196)
                assert all(len(set(a) ^ set(b)) <= 2 for a, b in zip(mine["kept"], state["kept"], strict=True)), name
                assert all((a == b).mean() > 0.95 for a, b in zip(mine["host"], state["host"], strict=True)), name
                assert mine["top"][0][0] == state["top"][0][0]
                assert mine["top"][0][1] == pytest.approx(state["top"][0][1], abs=0.02)


@pytest.mark.slow
@pytest.mark.skipif(not (weights_there and images_there), reason="needs TPBOOK_DATA and TPBOOK_WEIGHTS")
def test_one_command_makes_them(tmp_path, monkeypatch):
    """The same files, here with three keep ratios and two photographs."""
    monkeypatch.setattr(photographs, "RATIOS", [0.5, 0.7, 1.0])
    monkeypatch.setattr(photographs, "CHOSEN", dict(list(photographs.CHOSEN.items())[:2]))
    photographs.main([f"out={tmp_path / 'made'}", f"hero={tmp_path / 'hero.svg'}"])
    again = photographs.read(tmp_path / "made")
    assert [one.row for one in again] == [one.row for one in SHOWN[:2]] and [one.src for one in again] == [
        one.src for one in SHOWN[:2]
    ]
    assert (again[0].state("evit", 0.5)["kept"][2] == SHOWN[0].state("evit", 0.5)["kept"][2]).all()


def test_a_licence_that_is_another_is_refused(tmp_path, monkeypatch):
    rows = {file: {"file": file, "license": photographs.LICENCE} for file in photographs.CHOSEN.values()}
    rows[photographs.CHOSEN["bee"]]["license"] = "https://creativecommons.org/licenses/by-nc/2.0/"
    monkeypatch.setattr(photographs, "load_backbone", lambda name: tpbook.load_backbone("vit_digits_patch4_56"))
    monkeypatch.setattr(photographs.data, "attribution", lambda: rows)
    monkeypatch.setattr(photographs.data, "root", lambda name: tmp_path)
    with pytest.raises(ValueError, match="bee must be under .*/by/2.0/, but .*by-nc"):
        photographs.make(tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="deit_tiny_patch16_224.json"):
        photographs.read(tmp_path)


def test_states_are_packed_and_unpacked():
    """The digits ViT's own trace comes back, and so do the hosts of more patches than a byte counts."""
    model = tpbook.prune(tpbook.load_backbone("vit_digits_patch4_56"), "etps", keep_ratio=0.5)
    x = data.digits("test").images[:1]
    with torch.inference_mode(), tpbook.trace(model) as t:
        model(x)
    got = states.decode(states.state(model, x), 196)
    assert [kept.tolist() for kept in got["kept"]] == [sorted(kept[0].tolist()) for kept in t.kept]
    assert [host.tolist() for host in got["host"]] == [host[0].tolist() for host in t.host]
    hosts = np.arange(300)[::-1]
    packed = {"kept": [], "host": [base64.b64encode(hosts.astype("<u2").tobytes()).decode()]}
    assert (states.decode(packed, 300)["host"][0] == hosts).all()


# ---- figures


def squares(svg, colour):
    """Of a panel's SVG: the patches that are filled by a colour."""
    path = "".join(re.findall(rf'<path fill="{colour}"[^>]* d="([^"]*)"', svg))
    found = []
    for x, y, wide in re.findall(r"M(\d+) (\d+)h(\d+)v16h-\3z", path):
        found += [int(y) // 16 * 14 + int(x) // 16 + i for i in range(int(wide) // 16)]
    return sorted(found)


def panels_of(figure):
    return re.findall(r"<div><svg.*?</svg><p>.*?</p></div>", figure)


def test_a_figure_shows_what_is_left_after_each_stage():
    shown = panels_of(panels.stages(SHOWN[:2], "evit", 0.5))
    assert len(shown) == 8
    for one, row in zip(SHOWN, (shown[:4], shown[4:])):
        assert (
            row[0].count(one.src) == 1
            and f'aria-label="photograph: {one.label}"' in row[0]
            and not squares(row[0], looks.GONE)
        )
        for s, (panel, kept) in enumerate(zip(row[1:], one.state("evit", 0.5)["kept"]), 1):
            assert squares(panel, looks.GONE) == sorted(set(range(196)) - set(kept))
            assert one.src not in panel and f"stage {s}: {len(kept)} patches</p>" in panel
            assert f'aria-label="{one.label}, stage {s}: {len(kept)} patches"' in panel


def test_a_line_parts_what_is_kept_from_what_is_gone():
    alive = np.zeros((2, 3), bool)
    alive[0, 1] = True
    [line] = re.findall(r' d="([^"]*)"', panels._edges(alive, "#ffffff", 2))
    wide, tall = 224 / 3, 112
    assert (
        set(line.split("M")[1:]) == {f"{wide:g} 0v112", f"{2 * wide:g} 0v112", f"{wide:g} 112h{wide:g}"} and tall == 112
    )


def test_a_figure_of_methods_says_what_the_model_says():
    shown = panels_of(panels.methods(SHOWN[:1], ("random", "evit"), 0.5))
    said = [SHOWN[0].state(name, 0.5)["says"] for name in ("random", "evit")]
    assert f"random: {said[0]} (wrong)</p>" in shown[1] and f"EViT: {said[1]}</p>" in shown[2]


def test_a_figure_of_hosts_paints_a_group_in_its_mean_colour():
    one = SHOWN[2]
    host = one.state("etps", 0.5)["host"][0]
    panel = panels_of(panels.hosts([one], "etps", 0.5, kept=True))[2]
    assert f"stage 1: {len(set(host))} tokens</p>" in panel
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(one.src.split(",")[1]))), float)
    token = np.bincount(host).argmax()  # of the largest group
    group = np.flatnonzero(host == token)
    mean = np.mean([pixels[i // 14 * 16 :][:16, i % 14 * 16 :][:, :16].mean((0, 1)) for i in group], axis=0)
    painted = [c for c in re.findall(r'fill="(#\w{6})"', panel) if set(group) <= set(squares(panel, c))]
    assert painted and np.abs(np.array([int(painted[0][i : i + 2], 16) for i in (1, 3, 5)]) - mean).max() <= 1


def test_the_front_pages_picture_is_the_states():
    hero = (TOP / "book/images/hero.svg").read_text(encoding="utf-8")
    assert hero == panels.hero(SHOWN[photographs.HERO], "evit", 0.7) and len(hero) < 40_000
    kept = SHOWN[photographs.HERO].state("evit", 0.7)["kept"]
    for panel, of in zip(hero.split("<g ")[2:], (kept[0], kept[-1])):
        assert squares(panel, looks.GONE) == sorted(set(range(196)) - set(of))


@pytest.mark.slow
@pytest.mark.skipif(not (weights_there and images_there), reason="needs TPBOOK_DATA and TPBOOK_WEIGHTS")
@torch.inference_mode()
def test_evit_without_training():
    """fixtures/README.md of the shared data: dense 84.9 %, EViT 79.8 % at ρ = 0.7 and 38.8 % at 0.3.

    Dense by every fifth photograph, which is right where the committed row has it right.
    """
    model = tpbook.load_backbone("deit_tiny_patch16_224")
    photographs, right = data.nips2017_dev(data.eval_transform(model)), {0.7: 0, 0.3: 0}
    rows = json.loads((TOP / "notebooks/results/deit-ti/family.json").read_text())["rows"]
    [committed] = results.correct(rows, data=data.NIPS, method="dense")
    assert committed.size == 1000 and committed.sum() == 849
    fifth = Subset(photographs, range(0, 1000, 5))
    dense = torch.cat([model(images).argmax(1) == labels for images, labels in DataLoader(fifth, batch_size=50)])
    assert (dense.numpy() != committed[::5]).sum() <= 1
    tpbook.prune(model, "evit")
    for images, labels in DataLoader(photographs, batch_size=50):
        for ratio in right:
            model.keep_ratio = ratio
            right[ratio] += (model(images).argmax(1) == labels).sum().item()
    percent = {ratio: n / 10 for ratio, n in right.items()}
    assert percent == pytest.approx({0.7: 79.8, 0.3: 38.8}, abs=0.3)
