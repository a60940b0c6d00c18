"""Run one notebook by papermill: `python notebooks/run.py SOURCE TARGET name=value …`.

TARGET appears only when every cell has run; a run that fails leaves `TARGET`'s name with `.failed.ipynb` instead.
"""

import os
import sys
from pathlib import Path

import nbformat
import papermill
import yaml
from papermill.exceptions import PapermillExecutionError

KERNEL = [
    # what a notebook imports is a million objects, none of them garbage, and every search for garbage looks at them
    "--IPKernelApp.exec_lines=__import__('gc').set_threshold(100_000, 20, 20)",
    "--log-level=ERROR",  # each would warn that it is not encrypted, on a port of this machine alone
]


def run(source, target, parameters, **hooks):
    """Execute `source` with `parameters` into `target`, with hooks of papermill. → how long it took, in seconds."""
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
            execution_timeout=seconds, extra_arguments=KERNEL, **hooks,
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
