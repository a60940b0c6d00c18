"""The workflows of GitHub Actions: what they run exists, what they use is pinned, what they may do is little."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

TOP = Path(__file__).parent.parent
FILES = sorted((TOP / ".github/workflows").glob("*.y*ml"))
TEXTS = {path.stem: path.read_text() for path in FILES}
WORKFLOWS = {name: yaml.safe_load(text) for name, text in TEXTS.items()}
JOBS = {(name, job): its for name, workflow in WORKFLOWS.items() for job, its in workflow["jobs"].items()}
CI = (TOP / ".ci/run").read_text()
SCRIPTS = [step["run"] for its in JOBS.values() for step in its["steps"] if "run" in step]
ON = True  # what YAML 1.1 makes of the key `on`


def lint(folder):
    """What jactionlint, which has actionlint's rules and those of security, says of a checkout's workflows."""
    command = [sys.executable, "-m", "jactionlint", "--oneline", "--strict-exit"]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return ran.returncode, ran.stdout


@pytest.fixture
def checkout(tmp_path):
    shutil.copytree(TOP / ".github", tmp_path / ".github")
    (tmp_path / ".git").mkdir()
    return tmp_path


def test_there_are_two():
    assert set(WORKFLOWS) == {"ci", "gpu"}


def test_actionlint_has_nothing_to_say(checkout):
    assert lint(checkout) == (0, "")


@pytest.mark.parametrize(
    "name, this, becomes, said",
    [
        ("ci", "needs: book", "needs: boook", "boook"),
        ("ci", "branches: [main]", "branch: main", 'unexpected key "branch"'),
        ("ci", "ubuntu-24.04", "ubuntu", 'label "ubuntu" is unknown'),
        ("gpu", "matrix.notebook }}", "matrix.notebok }}", "notebok"),
        ("gpu", '"notebooks/$NOTEBOOK.ipynb"', '"${{ inputs.notebooks }}"', "template-injection"),
        ("gpu", "timeout-minutes: 360", "timeout-minutes: long", "timeout-minutes"),
    ],
)
def test_actionlint_would_say(checkout, name, this, becomes, said):
    assert this in TEXTS[name]
    (checkout / f".github/workflows/{name}.yml").write_text(TEXTS[name].replace(this, becomes))
    code, out = lint(checkout)
    assert code == 1 and said in out


def test_every_action_is_pinned_with_its_version():
    """By the whole commit, the same one everywhere; all are GitHub's own."""
    pins = {}
    for name, text in TEXTS.items():
        for line in re.findall(r"uses:.*", text):
            pin = re.fullmatch(r"uses: (actions/[\w-]+)@([0-9a-f]{40}) # v\d+\.\d+\.\d+", line)
            assert pin, f"{name}: {line}"
            assert pins.setdefault(pin[1], pin[2]) == pin[2]
    assert len(pins) == len(set(pins.values())) == 6


def test_no_secret_is_read():
    for text in TEXTS.values():
        assert not re.search(r"\bsecrets\b|github\.token|GITHUB_TOKEN", text)
    checkouts = [s for its in JOBS.values() for s in its["steps"] if s.get("uses", "").startswith("actions/checkout@")]
    assert checkouts and all(step["with"] == {"persist-credentials": False} for step in checkouts)


def test_only_the_job_that_publishes_may_write():
    assert all(workflow["permissions"] == {"contents": "read"} for workflow in WORKFLOWS.values())
    may = {key: its["permissions"] for key, its in JOBS.items() if "permissions" in its}
    assert may == {("ci", "pages"): {"pages": "write", "id-token": "write"}}
    pages = JOBS["ci", "pages"]
    assert "github.event_name == 'push'" in pages["if"] and pages["needs"] == "book"
    assert not any("run" in step or "checkout" in step["uses"] for step in pages["steps"])  # no code of ours
    assert WORKFLOWS["ci"][ON]["push"] == {"branches": ["main"]}


def test_jobs_end_and_do_not_pile_up():
    assert all("group" in workflow["concurrency"] for workflow in WORKFLOWS.values())
    assert all(0 < its["timeout-minutes"] <= 360 for its in JOBS.values())


def test_a_stranger_runs_nothing_on_your_machine():
    """Pull requests stay off the runners of one's own, which need a word of the repository's owner."""
    config = yaml.safe_load((TOP / ".github/actionlint.yaml").read_text())
    labels = {"self-hosted", *config["self-hosted-runner"]["labels"]}
    assert JOBS["gpu", "notebook"]["runs-on"] == ["self-hosted", "gpu"]
    for (name, _), its in JOBS.items():
        if "self-hosted" in its["runs-on"]:
            assert set(its["runs-on"]) <= labels
            assert set(WORKFLOWS[name][ON]) == {"workflow_dispatch", "schedule"}
            assert its["if"] == "github.event_name == 'workflow_dispatch' || vars.TPBOOK_GPU == 'on'"


def made(*arguments):
    ran = subprocess.run(["make", "-n", *arguments], cwd=TOP, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_what_make_is_asked_for_exists():
    calls = re.findall(r"^ *make (.*)", "\n".join((*SCRIPTS, CI)), re.MULTILINE)
    targets = {word for call in calls for word in call.split() if "=" not in word}
    assert targets == {"book", "books", "workflow", "test", ".venv/.ready"}
    made(*targets)
    with pytest.raises(AssertionError, match="No rule to make target"):
        made("boook")


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_ci_runs_what_ours_does_and_keeps_the_site_it_made():
    runs = [step["run"] for step in JOBS["ci", "book"]["steps"] if "run" in step]
    assert runs == [".ci/run"] and (TOP / ".ci/run").stat().st_mode & 0o111
    assert "make book PROFILE=digits" in CI
    upload = next(s for s in JOBS["ci", "book"]["steps"] if "upload-pages-artifact" in s.get("uses", ""))
    assert f"--directory {upload['with']['path']}/ " in made("PROFILE=digits", "serve")


def notebooks():
    """The names that one gets by hand, and those of every week."""
    by_hand = WORKFLOWS["gpu"][ON]["workflow_dispatch"]["inputs"]["notebooks"]["default"]
    weekly = re.search(r"inputs\.notebooks \|\| '(.*)'\)", JOBS["gpu", "notebook"]["strategy"]["matrix"]["notebook"])[1]
    return json.loads(by_hand), json.loads(weekly)


def test_notebooks_take_what_they_are_given():
    by_hand, weekly = notebooks()
    assert by_hand == weekly and len(set(weekly)) == len(weekly) > 0
    run = next(script for script in SCRIPTS if "notebooks/run.py" in script)
    words = shlex.split(run.replace("\\\n", " "))
    given = {word.split("=")[0]: word.split("=")[1] for word in words if re.fullmatch(r"[a-z]+=.*", word)}
    assert given["budget"] == "gpu" and given["out"] == "../_build/gpu/$NOTEBOOK"
    takes = set()
    for path in (TOP / "notebooks").glob("*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        source = next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))
        parameters = set(re.findall(r"^(\w+):", source, re.MULTILINE))
        if path.stem in weekly:
            assert set(given) <= parameters, path
        if re.search(r"^budget:.*\bgpu\b", source, re.MULTILINE):
            takes.add(path.stem)
    assert takes - set(weekly) == {"one-training"}  # a row of the reproduction, which `make results` asks for


def test_every_profile_has_recipes_and_data_to_download():
    from tpbook.data import ARCHIVES

    profile = WORKFLOWS["gpu"][ON]["workflow_dispatch"]["inputs"]["profile"]
    assert profile["default"] in profile["options"] and f"inputs.profile || '{profile['default']}'" in TEXTS["gpu"]
    for name in profile["options"]:
        assert (TOP / "recipes" / name).is_dir() and f"{name}2-160" in ARCHIVES
