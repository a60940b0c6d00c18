"""Builds what a stage does on a CPU (`stage.cpp`, four operators of C++), once for an environment, in ten seconds::

    python -m tpbook.kernels.cpu

`make` does it. It takes Linux and a C++ compiler, that of CXX or `g++`. The library goes where PyTorch's own extensions
go, TORCH_EXTENSIONS_DIR or `torch_extensions` of the user's cache, and is loaded where a stage first asks for it.
Without it PyTorch's operators do the same, to rounding.

Chapter: :doc:`/book/speed`
"""

import functools
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("stage.cpp")
FLAGS = ("-O3", "-std=c++20", "-fopenmp", "-fno-math-errno", "-fPIC", "-shared", "-w")
MACHINES = {"AVX512": ("-march=x86-64-v4",), "AVX2": ("-march=x86-64-v3",)}  # as PyTorch itself is compiled for them


@functools.cache
def library():
    """Where the library of this source, this PyTorch and this processor is, or would be. → Path"""
    needs = (SOURCE.read_text("utf-8"), FLAGS, torch.__version__, torch.backends.cpu.get_cpu_capability())
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.join(cache, "torch_extensions")
    return Path(folder, f"tpbook-{hashlib.sha256(repr(needs).encode()).hexdigest()[:12]}.so")


@functools.cache
def operators():
    """`torch.ops.tpbook` with the functions of `tpbook.kernels.stage`, or None where nobody has built them."""
    if not library().exists():
        return None
    torch.ops.load_library(str(library()))
    return torch.ops.tpbook


def build():
    """Compile the library.

    Returns:
        Its Path.

    Raises:
        RuntimeError: this is not Linux, there is no compiler, or it fails.
        OSError: the folder cannot be written to.
    """
    from torch.utils import cpp_extension  # here, since it takes a while

    compiler, path = os.environ.get("CXX", "g++"), library()
    if sys.platform != "linux":
        raise RuntimeError(f"kernels for a CPU are built on Linux only, got {sys.platform!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".part{os.getpid()}")
    words = [
        compiler, *FLAGS, *MACHINES.get(torch.backends.cpu.get_cpu_capability(), ()), str(SOURCE), "-o", str(part),
        *(f"-I{folder}" for folder in cpp_extension.include_paths()),
        *(f"-L{folder}" for folder in cpp_extension.library_paths()), "-lc10", "-ltorch_cpu",
    ]  # fmt: skip
    try:
        subprocess.run(words, check=True, capture_output=True, text=True)
        part.replace(path)
    except FileNotFoundError as error:
        raise RuntimeError(f"CXX must be a C++ compiler that is installed, got {compiler!r}") from error
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{compiler} could not compile {SOURCE.name}:\n{error.stderr[-2000:]}") from error
    finally:
        part.unlink(missing_ok=True)
    operators.cache_clear()
    return path


def main():
    """The command."""
    try:
        print(library() if library().exists() else build())
    except (RuntimeError, OSError) as error:
        sys.exit(f"tpbook.kernels.cpu: {error}")


if __name__ == "__main__":
    main()
