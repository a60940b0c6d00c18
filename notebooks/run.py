"""Run one notebook by papermill: `python notebooks/run.py SOURCE TARGET name=value …`.

TARGET appears only when every cell has run; a run that fails leaves `TARGET`'s name with `.failed.ipynb` instead.
Where TOGETHER is the number of a process, as make's is, those that run for it at once take turns (`turns.py`) and have
warm kernels (`warm.py`).
"""

import os
import sys
from pathlib import Path

import nbformat
import papermill
import yaml
from papermill.exceptions import PapermillExecutionError


def together(source, make):
    """What papermill is told of a notebook that runs beside others of one make: dict."""
    from jupyter_client.provisioning import local_provisioner

    import needs
    import turns
    import warm

    mine, clocked = turns.Turns(warm.HERE), needs.clocked(source)
    mine.take(alone=False)  # from now on, since a kernel that starts is no quiet neighbour
    cold = local_provisioner.launch_kernel

    def start(command, **how):
        try:
            return warm.kernel(make, command, how["env"], how.get("cwd") or os.getcwd())
        except (OSError, ValueError) as error:
            print(f"{source.name}: no warm kernel ({error!r})", file=sys.stderr)
            return cold(command, **how)

    if not any(clocked.values()):  # which have all cores, and a warm kernel has as many as the first that asked
        local_provisioner.launch_kernel = start

    def begins(cell, cell_index):
        if clocked.get(cell.source):
            mine.take(alone=True)

    def ended(cell, cell_index, execute_reply):
        mine.take(alone=False)

    return {"on_cell_execute": begins, "on_cell_executed": ended}


def run(source, target, parameters):
    """Execute `source` with `parameters` into `target`. → how long it took, in seconds."""
    hooks = together(source, int(os.environ["TOGETHER"])) if "TOGETHER" in os.environ else {}
    part, failed = target.with_suffix(".part.ipynb"), target.with_suffix(".failed.ipynb")
    target.parent.mkdir(parents=True, exist_ok=True)
    for old in (target, failed):
        old.unlink(missing_ok=True)
    print(f"{source.name} ({', '.join(f'{k}={v}' for k, v in parameters.items())})", file=sys.stderr)
    seconds = 1800 if parameters.get("budget", "slice") == "slice" else None  # a cell may take; recipes train for hours
    try:
        # no bar, since several notebooks may run at once
        papermill.execute_notebook(
            source, part, parameters, cwd=str(source.parent), log_output="CI" in os.environ, progress_bar=False,
            execution_timeout=seconds, **hooks,
        )  # fmt: skip
    except PapermillExecutionError as error:
        os.replace(part, failed)
        sys.exit(f"{source} failed in cell {error.exec_count}; its half-run copy is {failed}\n{error}")
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    notebook = nbformat.read(part, as_version=4)
    for cell in notebook.cells:
        if "outputs" in cell:  # no progress bars, no warnings of libraries
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.metadata.tags.append("hide-input")  # what this run was given, one click away
    nbformat.write(notebook, part)
    os.replace(part, target)
    return notebook.metadata.papermill.duration


if __name__ == "__main__":
    source, target, *pairs = sys.argv[1:]
    parameters = {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in pairs)}
    seconds = run(Path(source), Path(target), parameters)
    print(f"{target}: {seconds:.0f} s", file=sys.stderr)
