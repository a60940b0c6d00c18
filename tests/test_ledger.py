"""The ledger says what the results say, and its rules do what the page says of them."""

import csv
from collections import Counter

import numpy as np
import pytest

from notebooks import ledger

CLAIMS = ledger.claims()


def test_the_committed_ledger_is_what_the_results_say():
    with ledger.LEDGER.open(newline="") as file:
        assert list(csv.DictReader(file)) == ledger.ledger(), "`make ledger` writes book/ledger.csv again"


def test_every_claim_has_a_status_and_says_where_it_comes_from():
    for entry in ledger.ledger():
        assert entry["status"] in ledger.STATUSES and entry["tag"] in ("V", "V2", "D", "I") and entry["source"]
        if entry["ours"]:
            assert entry["results"] and entry["command"] and entry["setting"]
            assert all((ledger.TOP / path).exists() for path in entry["results"].split())
        if entry["status"] == "not covered":
            assert entry["why"]


def test_costs_are_equal_or_explained():
    costs = [entry for entry in ledger.ledger() if entry["setting"] == "closed form"]
    assert len(costs) >= 83
    assert all(entry["status"] == "equal" or entry["why"] for entry in costs)


def test_causes_of_parameters():
    """TPS's LV-ViT-S has as many as with a bias that LV-ViT does not have, in each row."""
    rows = [c for c in CLAIMS if c["quantity"] == "params" and c["cause"] and ledger.ours(c)]
    assert {(r["paper"], r["model"], r["cause"]) for r in rows} == {
        ("TPS", "lvvit_s", "as with a bias on queries, keys and values")
    }
    for row in rows:
        with ledger.pruned(row) as model:
            ours, bias = sum(p.numel() for p in model.parameters()), 3 * model.embed_dim * len(model.blocks)
        near = 0.5 * 10 ** -int(row["decimals"])
        assert abs((ours + bias) / 1e6 - float(row["value"])) <= near < abs(ours / 1e6 - float(row["value"]))


def test_the_headlines_are_tested_in_pairs():
    tested = [e for e in ledger.ledger() if "points" in e["ours"] and "Imagenette" in e["setting"]]
    assert all("p " in entry["ours"] for entry in tested)
    for paper in ("Masked fine-tuning", "TPS"):
        assert sum(entry["paper"] == paper for entry in tested) >= 5


@pytest.fixture
def two(monkeypatch):
    """Two ways on 400 images and two seeds, b right where a is not in as many images a seed as asked for."""

    def make(*better):
        a = np.zeros((2, 400), int)
        a[:, :200] = 1
        b = a.copy()
        for seed, n in enumerate(better):
            if n >= 0:
                b[seed, 200 : 200 + n] = 1
            else:
                b[seed, : -n] = 0
        sides = {"b": b, "a": a}
        monkeypatch.setattr(ledger, "select", lambda text: (sides[text], []))

    return make


def status(relation=">", ours="b", against="a"):
    return ledger.direction({"ours": ours, "against": against, "relation": relation})[0]


def test_direction(two, monkeypatch):
    two(40, 30)
    assert (status(), status(ours="a", against="b"), status("=")) == ("same trend", "contradicted", "contradicted")
    two(60, -2)  # one seed disagrees
    assert status() == "not seen"
    two(1, 1)  # within chance
    assert (status(), status("=")) == ("not seen", "same trend")
    a = np.zeros((2, 400), int)
    b = a.copy()
    a[:, :20], b[:, 20:42] = 1, 1  # no difference to be seen, but too wide an interval to say that there is none
    monkeypatch.setattr(ledger, "select", lambda text: ({"a": a, "b": b}[text], []))
    assert status("=") == "not seen"


def test_select(monkeypatch):
    def row(start, ratio, seed, correct):
        return {"start": start, "keep_ratio": ratio, "select": "own", "trained": True, "seed": seed, "n": 4,
                "correct": correct, "file": f"{start}-{ratio}.json"}  # fmt: skip

    rows = [row("plain", 0.5, 0, "f"), row("plain", 0.3, 0, "8"), row("masked", 0.5, 0, "c")]
    monkeypatch.setattr(ledger, "measured", lambda name: rows)
    bits, files = ledger.select("x; start=plain; keep_ratio=0.5")
    assert bits.tolist() == [[1, 1, 1, 1]] and files == ["plain-0.5.json"]
    bits, files = ledger.select("x; start=plain; keep_ratio=0.5|0.3")
    assert bits.tolist() == [[1, 0.5, 0.5, 0.5]] and files == ["plain-0.3.json", "plain-0.5.json"]
    bits, files = ledger.select("x; start=masked; keep_ratio=0.5 minus x; start=plain; keep_ratio=0.3")
    assert bits.tolist() == [[0, 1, 0, 0]] and files == ["masked-0.5.json", "plain-0.3.json"]
    with pytest.raises(ValueError, match="no row has"):
        ledger.select("x; start=plain; keep_ratio=0.1")


def test_speed(monkeypatch):
    claim = dict.fromkeys(ledger.CONFIG, "") | {"method": "evit"}
    for times, low, high, expected in (
        (1.5, 1.45, 1.55, "equal"),
        (1.2, 1.1, 1.3, "same trend"),
        (1.5, 0.9, 1.6, "not seen"),  # near the published ratio, and no telling from 1
        (1.05, 0.9, 1.2, "not seen"),
        (0.8, 0.7, 0.9, "contradicted"),
    ):
        rows = {ledger.configuration(claim): {"times": times, "low": low, "high": high}}
        monkeypatch.setattr(ledger, "counted", lambda rows=rows: rows)
        assert ledger.speed(claim, 1.5)[0] == expected


def test_what_a_speed_is_compared_with(monkeypatch):
    speeds = [claim for claim in CLAIMS if claim["quantity"] == "images/s"]
    others = {i: ledger.reference(claim, CLAIMS) for i, claim in enumerate(speeds)}
    for i, other in others.items():
        claim = speeds[i]
        if claim["table"] == "README figure" and other:  # the slowest of the same model in the figure
            same = [float(s["value"]) for s in speeds if (s["table"], s["model"]) == (claim["table"], claim["model"])]
            assert float(other["value"]) == min(same) < float(claim["value"])
        elif claim["table"] == "abstract":
            assert (other["model"], other["method"], other["value"]) == ("deit_tiny_patch16_224", "dense", "1686")
        elif other:
            assert ledger.configuration(other) == ledger.dense(ledger.configuration(claim))
            assert (other["paper"], other["table"]) == (claim["paper"], claim["table"])
    alone = [claim for i, claim in enumerate(speeds) if others[i] is None]
    assert all(any(other == claim for other in others.values()) for claim in alone)
    assert not any(ledger.reference(claim, CLAIMS) for claim in CLAIMS if claim["quantity"] != "images/s")

    i = next(i for i, claim in enumerate(speeds) if claim["table"] == "abstract")
    row = {"times": 1.1, "low": 1.05, "high": 1.2, "threads": 2}
    monkeypatch.setattr(ledger, "compared", lambda: {tuple(map(ledger.configuration, (speeds[i], others[i]))): row})
    got = ledger.entry(speeds[i], CLAIMS)
    assert got["published"] == "1745 images/s (1.03 × dense DeiT-Ti)"
    assert got["ours"] == "1.10 × dense DeiT-Ti [1.05, 1.20]"
    assert (got["status"], got["setting"]) == ("equal", "CPU, 2 threads, float32")


def test_an_imagenet_run_settles_its_claim(monkeypatch, tmp_path):
    sought = {"table": "Table 1", "quantity": "top-1", "method": "dynamicvit", "keep_ratio": "0.7"}
    claim = next(c for c in CLAIMS if sought.items() <= c.items())
    assert ledger.accuracy(claim)[0] == "needs ImageNet"
    recipe = {"model": claim["model"], "method": "dynamicvit", "keep_ratio": 0.7, "at": [], "options": {}}
    recipe |= {"start": "pretrained", "epochs": 30}
    for percent, expected in ((79.4, "equal"), (78.0, "not seen")):
        run = {"recipe": recipe, "accuracy": {"percent": percent, "low": percent - 0.35, "high": percent + 0.35}}
        monkeypatch.setattr(ledger, "imagenet_runs", lambda run=run: [(tmp_path, run)])
        assert ledger.accuracy(claim)[0] == expected
    recipe["epochs"] = 100  # another training
    assert ledger.accuracy(claim)[0] == "needs ImageNet"


def test_claims_are_written_once():
    assert not [row for row, n in Counter(tuple(c.values()) for c in CLAIMS).items() if n > 1]
