"""The ledger says what the results say, and its rules do what the page says of them."""

import csv
import itertools
import json
import re
from collections import Counter
from functools import cache

import numpy as np
import pytest
from scipy import stats

from notebooks import ledger
from tpbook.book import results

CLAIMS = ledger.claims()
WOOF = ledger.RESULTS / "imagewoof-gpu"


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


@cache
def entries():
    return ledger.ledger()


def bits(name, data):
    """(seeds, n) array of which images were right, from the digits of a row's files; not read as the ledger does."""
    files = [json.loads(path.read_text())["rows"] for path in sorted(WOOF.glob(f"{name}-s*.json"))]
    rows = [row for file in files for row in file if row["data"] == data and row["trained"]]
    right = ["".join(f"{int(digit, 16):04b}" for digit in row["correct"])[-row["n"] :] for row in rows]
    return np.array([list(one) for one in right], int)


@pytest.mark.parametrize(
    ("data", "claim", "ours", "theirs", "said", "status"),
    [
        ("val", "ρ = 0.3; from", "masked-dynamicvit-0.3", "plain-dynamicvit-0.3", (1.96, 1.26, 2.67), "same trend"),
        ("val", "ρ = 0.8; from", "masked-dynamicvit-0.7", "plain-dynamicvit-0.7", (0.05, -0.29, 0.40), "not seen"),
        ("test", "ρ = 0.3; from", "masked-dynamicvit-0.3", "plain-dynamicvit-0.3", (1.13, -0.74, 3.01), "not seen"),
        ("test", "ρ = 0.3: dTPS", "plain-dtps-0.3", "plain-dynamicvit-0.3", (6.87, 4.30, 9.43), "same trend"),
        ("test", "ρ = 0.2: eTPS", "plain-etps-0.2", "plain-evit-0.2", (3.27, 1.23, 5.31), "same trend"),
    ],
)
def test_a_row_of_imagewoof_says_what_its_files_do(data, claim, ours, theirs, said, status):
    """The difference, its interval, p, n, seeds, power and commands, by the formulas of a textbook."""
    gain = 100.0 * (bits(ours, data) - bits(theirs, data))  # (seeds, n)
    (seeds, n), by_image = gain.shape, gain.mean(axis=0)
    mean, error, critical = by_image.mean(), by_image.std(ddof=1) / n**0.5, stats.t.ppf(0.975, n - 1)
    low, high, p = mean - critical * error, mean + critical * error, 2 * stats.t.sf(abs(by_image.mean()) / error, n - 1)
    assert tuple(round(x, 2) for x in (mean, low, high)) == said
    (row,) = [e for e in entries() if e["setting"].startswith(f"Imagewoof {data} ") and claim in e["claim"]]
    assert row["ours"] == (
        f"{mean:+.1f} points [{low:+.1f}, {high:+.1f}], {results.probability(p)}, n = {n}, "
        f"{(gain.mean(axis=1) > 0).sum()} of {seeds} seeds ahead"
    )
    assert row["status"] == status and f" {seeds} seeds" in row["setting"]
    again = [f"make row ROW={name}-s{seed} OF=imagewoof-gpu" for name in (ours, theirs) for seed in range(seeds)]
    assert sorted(row["command"].split("; ")) == sorted(again)
    power = results.power(gain / 100, 0 * gain)  # there the noncentral t is beyond the critical value in 80 %
    found = stats.nct.sf(critical, n - 1, power / error) + stats.nct.cdf(-critical, n - 1, power / error)
    assert found == pytest.approx(0.8, abs=1e-4)
    assert row["power"] == (f"{power:.1f} points" if status == "not seen" else "")


def figures(entry):
    """Difference and interval, of the text of a claim of direction."""
    return [float(x) for x in re.findall(r"[+-][\d.]+", entry["ours"])[:3]]


def test_masked_fine_tuning_on_imagewoof():
    """Each part of the abstract that the rows can test has both columns; and what the page says of them in words."""
    all_of = [e for e in entries() if e["paper"] == "Masked fine-tuning" and "Imagewoof" in e["setting"]]
    test, val = ([e for e in all_of if f"Imagewoof {data} " in e["setting"]] for data in ("test", "val"))
    robust = [e for e in test if "occlusion" in e["claim"]]  # removal without training was run on test alone
    trained = [e for e in test if e not in robust]
    assert len(robust) == 1 and robust[0]["status"] == "same trend"
    assert [(e["claim"], e["why"]) for e in trained] == [(e["claim"], e["why"]) for e in val] and len(val) == 7
    assert all("no ρ = 0.8 was run" in e["why"] for e in all_of if "0.8" in e["claim"])
    assert [e["status"] for e in val] == [
        "not seen", "same trend",  # the headline at ρ = 0.7 for 0.8, at 0.3
        "same trend", "same trend",  # more at 0.3, at 0.2
        "same trend", "same trend", "not seen",  # EViT, dTPS, eTPS
    ]  # fmt: skip
    assert float(val[0]["power"].split()[0]) < 81.9 - 81.3  # a gain as printed for ρ = 0.8 would have shown at 0.7
    for e, other in zip(trained, val):  # nothing else is decided on test: its intervals hold zero, and what val found
        _, low, high = figures(e)
        assert e["status"] == "not seen" and low <= 0 <= high and low <= figures(other)[0] <= high


def test_masked_fine_tuning_on_other_data():
    mine = [e for e in entries() if e["paper"] == "Masked fine-tuning" and e["ours"]]
    assert {e["status"] for e in mine if "occlusion" in e["claim"]} == {"same trend"}  # every data set decides it alike
    short = [e for e in mine if e["setting"].startswith("Imagenette") and "not trained" not in e["setting"]]
    for e in short:  # its power is above what Imagewoof shows of the same claim
        shown = [figures(o)[0] for o in mine if o["claim"] == e["claim"] and "Imagewoof" in o["setting"]]
        assert len(shown) >= 2 and float(e["power"].split()[0]) > max(shown)


def test_imagewoof_tests_all_that_it_can():
    """A claim that Imagenette tests has a row for each column whose files hold its starts, methods and ratios."""
    keys = ("data", "start", "method", "keep_ratio", "select", "trained")
    held = {tuple(row[key] for key in keys) for row in ledger.measured("imagewoof-gpu")}
    tested = set()
    for claim in CLAIMS:
        if claim["ours"].startswith("imagewoof-gpu"):
            tested.add((ledger.words(claim), claim["table"], next(ledger.parts(claim["ours"]))[1]["data"]))
    for claim, data in itertools.product(CLAIMS, ("test", "val")):
        if claim["ours"].startswith("imagenette; start"):
            wants = [want for side in ("ours", "against") for _, want in ledger.parts(claim[side])]
            cells = [
                (data, want["start"], method, float(ratio), want["select"], want["trained"] == "true")
                for want in wants for method in want["method"].split("|") for ratio in want["keep_ratio"].split("|")
            ]  # fmt: skip
            assert not set(cells) <= held or (ledger.words(claim), claim["table"], data) in tested
    assert len(tested) > 30


def test_what_a_setting_says():
    for claim in CLAIMS:
        if claim["ours"]:
            name, want = next(ledger.parts(claim["ours"]))
            setting = ledger.direction(claim)[-1]
            seeds = {row["seed"] for row in ledger.measured(name) if row["data"] == want["data"]} - {None}
            said = "1 seed," if len(seeds) == 1 else f"{len(seeds)} seeds"
            assert said in f"{setting}," or want["data"] == "nips"
    assert all("H100" in json.loads(path.read_text())["run"]["device"] for path in WOOF.glob("*.json"))


def test_power():
    """At the difference that it names four of five experiments find one, by the test that `paired` makes."""
    rng, n, apart = np.random.default_rng(0), 400, 0.16  # the share of images that only one of the two gets right
    truth = (apart * 2.807**2 / (n + 2.807**2)) ** 0.5  # 2.807 standard errors: t of 399 at 0.975 and 0.8
    found, named = [], []
    for _ in range(1000):
        draw = rng.random(n)
        ours, theirs = (draw < (apart + truth) / 2)[None], (draw > 1 - (apart - truth) / 2)[None]
        found.append(results.paired(ours, theirs)["p"] < 0.05)
        named.append(results.power(ours, theirs))
    assert np.mean(found) == pytest.approx(0.8, abs=0.03)
    assert np.mean(named) == pytest.approx(100 * truth, rel=0.01)


def test_power_is_of_the_mean_over_seeds():
    a = np.zeros((2, 100))
    a[0, :20], a[1, 10:30] = 1, 1
    scatter = 100 * a.mean(axis=0).std(ddof=1)
    assert results.power(a, 0 * a) == pytest.approx(scatter / 10 * (1.984217 + 0.845267), rel=1e-6)
    assert results.power(0 * a, a) == results.power(a, 0 * a)
    assert np.isnan(results.power(a, a))


def test_what_is_not_seen_says_what_could_have_been():
    for e in entries():
        open_ = e["status"] == "not seen"
        if "points" in e["ours"]:
            assert bool(re.fullmatch(r"\d+\.\d points", e["power"])) == open_
            if open_ and "seeds ahead" not in e["ours"]:  # then the interval alone leaves it open
                assert abs(figures(e)[0]) < float(e["power"].split()[0])
        elif open_ and e["setting"].startswith("CPU"):
            times, low, high = (float(x) for x in re.findall(r"[\d.]+(?= × | ×$|, |]$)", e["ours"])[-3:])
            assert low <= 1 <= high and float(e["power"].removesuffix(" ×")) == pytest.approx(times / low, rel=0.02)
        else:
            assert e["power"] == ""


def test_a_row_that_was_run_again(tmp_path, capsys):
    again = tmp_path / "masked-evit-0.3-s1.json"
    row = json.loads((WOOF / again.name).read_text())

    def compared():
        again.write_text(json.dumps(row))
        return ledger.compare(again, "imagewoof-gpu"), *capsys.readouterr().out.splitlines()

    whole, trained, test, val = compared()
    assert whole and trained == "images seen in training: 43250"
    assert "test:" in test and "val:" in val
    assert all(" inside the committed" in line and "n =" not in line for line in (test, val))
    row["training"]["images_seen"] = 20000
    (seen,) = [r for r in row["rows"] if r["data"] == "val"]
    seen["right"], seen["n"] = round(1000 * seen["right"] / seen["n"]), 1000
    whole, trained, test, val = compared()
    assert whole and trained.endswith(": 20000; the committed row 43250, so a part of the data is missing here")
    assert "n =" not in test and " inside " in val and val.endswith("; n = 1000, the committed n = 3767")
    seen["right"] -= 100
    whole, trained, test, val = compared()
    assert not whole and " inside " in test and " OUTSIDE the committed" in val
    untouched = ledger.RESULTS / "imagenette" / "untouched-s0.json"  # nothing was trained
    assert ledger.compare(untouched, "imagenette") and "training" not in capsys.readouterr().out


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
        monkeypatch.setattr(ledger, "tested_on", lambda claim, seeds: "")
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
    one = {"ours": "b", "against": "a", "relation": ">"}
    assert ledger.direction(one)[3] == "0.7 points"  # of one image in 400: 0.25 (1.966 + 0.843)
    two(60, -2)
    assert ledger.direction(one)[3] != ""
    two(40, 30)
    assert ledger.direction(one)[3] == ""
    a = np.zeros((2, 400), int)
    b = a.copy()
    a[:, :20], b[:, 20:42] = 1, 1  # no difference to be seen, but too wide an interval to say that there is none
    monkeypatch.setattr(ledger, "select", lambda text: ({"a": a, "b": b}[text], []))
    assert status("=") == "not seen"


def test_select(monkeypatch):
    def row(start, ratio, seed, correct, data="test"):
        return {"start": start, "keep_ratio": ratio, "select": "own", "trained": True, "data": data, "seed": seed,
                "n": 4, "correct": correct, "file": f"{start}-{ratio}.json"}  # fmt: skip

    rows = [row("plain", 0.5, 0, "f"), row("plain", 0.3, 0, "8"), row("masked", 0.5, 0, "c")]
    rows += [row("plain", 0.5, 0, "1", "val"), row("plain", 0.5, 1, "7", "val")]
    monkeypatch.setattr(ledger, "measured", lambda name: rows)
    bits, files = ledger.select("x; start=plain; keep_ratio=0.5")
    assert bits.tolist() == [[1, 1, 1, 1]] and files == ["plain-0.5.json"]
    bits, files = ledger.select("x; start=plain; keep_ratio=0.5|0.3")
    assert bits.tolist() == [[1, 0.5, 0.5, 0.5]] and files == ["plain-0.3.json", "plain-0.5.json"]
    bits, files = ledger.select("x; start=masked; keep_ratio=0.5 minus x; start=plain; keep_ratio=0.3")
    assert bits.tolist() == [[0, 1, 0, 0]] and files == ["masked-0.5.json", "plain-0.3.json"]
    assert ledger.select("x; data=val; start=plain; keep_ratio=0.5")[0].tolist() == [[0, 0, 0, 1], [0, 1, 1, 1]]
    with pytest.raises(ValueError, match="no row has"):
        ledger.select("x; start=plain; keep_ratio=0.1")
    with pytest.raises(ValueError, match="no row has"):
        ledger.select("x; data=val; start=masked; keep_ratio=0.5")


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
