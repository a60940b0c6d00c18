"""Run the notebooks of the book that are out of date: `python notebooks/editions.py digits imagenette`, as make does.

A notebook is out of date in an edition where one of its `needs` is newer than what it gave there. JOBS run at a time
(2 where the environment has no other number) and share the cores, the longest first; those that are alike in all
editions run as the digits' and are copied. On Linux all are forked from one process that has imported the libraries.

`_build/EDITION/.ran` is no older than what was run or copied there.
"""

import multiprocessing
import os
import shutil
import signal
import sys
from multiprocessing.connection import wait

import needs
from turns import Turns

TOP = needs.TOP
ENVIRONMENT = ".venv/.ready"


def modified(path):
    """When a file was written; minus infinity where there is none."""
    return path.stat().st_mtime if path.exists() else float("-inf")


def due(editions, modified=modified):
    """What is out of date.

    Args:
        editions: their names.
        modified: path → when it was written.

    Returns:
        Two lists of (edition, notebook): those to run, in the order in which they begin, and those to copy from the
        digits' edition.
    """
    notebooks = {path.stem: path for path in sorted((TOP / "notebooks").glob("*.ipynb"))}
    longest = [name for name in needs.LONGEST if name in notebooks]
    order = [notebooks[name] for name in (*longest, *(name for name in notebooks if name not in longest))]
    newest = {path: max(modified(TOP / file) for file in (ENVIRONMENT, *needs.needs(path))) for path in order}
    alike = {path for path in order if needs.is_alike(path)}
    runs = {("digits" if path in alike else edition, path): None for edition in editions for path in order}
    runs = [(e, path) for e, path in runs if modified(given(e, path)) < newest[path]]
    copies = [
        (edition, path)
        for edition in editions
        for path in order
        if edition != "digits" and path in alike
        and (("digits", path) in runs or modified(given(edition, path)) < modified(given("digits", path)))
    ]  # fmt: skip
    return runs, copies


def given(edition, path):
    """The file that a notebook gives."""
    return TOP / "_build" / edition / "notebooks" / path.name


def one(edition, path):
    """Run a notebook; what it wrote before goes."""
    import run

    shutil.rmtree(TOP / "_build" / edition / "results" / path.stem, ignore_errors=True)
    out = f"../_build/{edition}/results/{path.stem}"
    run.run(path, given(edition, path), {"profile": edition, "out": out}, on_cell_execute=taking_turns(path))


def taking_turns(path):
    """What papermill calls before each cell of a notebook that runs beside others."""
    mine, clocked = Turns(TOP / "_build"), needs.clocked(path)
    mine.take(alone=False)  # from now on, since a kernel that starts is no quiet neighbour
    alone = False

    def begins(cell, cell_index):
        nonlocal alone
        measures = clocked.get(cell.source, False)
        if not (alone and measures):  # kept from one cell that measures time to the next
            mine.take(alone=measures)
        alone = measures

    return begins


def copy(edition, path):
    """Take a notebook, and what it wrote, from the digits' edition."""
    results = TOP / "_build" / edition / "results" / path.stem
    shutil.rmtree(results, ignore_errors=True)
    shutil.copytree(TOP / "_build/digits/results" / path.stem, results)
    given(edition, path).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(given("digits", path), given(edition, path))


def run_all(runs, jobs):
    """Run (edition, notebook) pairs, `jobs` at a time; after one that fails no other begins. → whether all ran."""
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    forks = sys.platform == "linux"  # elsewhere what has been imported may not be forked
    if forks:
        import warm

        warm.load()
    processes = multiprocessing.get_context("fork" if forks else "spawn")
    ahead, running, whole = list(runs), [], True
    try:
        while running or (ahead and whole):
            while ahead and whole and len(running) < jobs:
                running.append(processes.Process(target=one, args=ahead.pop(0)))
                running[-1].start()
            wait([process.sentinel for process in running])
            whole = whole and not any(process.exitcode for process in running)
            running = [process for process in running if process.exitcode is None]
    finally:
        for process in running:
            process.terminate()
    return whole


def main(editions):
    """Bring the editions up to date; exits with 1 where a notebook failed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # and what runs ends too
    runs, copies = due(editions)
    if runs and not run_all(runs, jobs=int(os.environ.get("JOBS", 2))):
        sys.exit(1)
    for edition, path in copies:
        copy(edition, path)
    for edition in editions:
        outputs = (TOP / "_build" / edition / "notebooks").glob("*.ipynb")
        if modified(ran := TOP / "_build" / edition / ".ran") < max(map(modified, outputs)):
            ran.touch()


if __name__ == "__main__":
    main(sys.argv[1:])
