"""Whether what is computed often may run as kernels of our own, in the place of PyTorch's operators.

On an NVIDIA GPU of compute capability 8 or more they are Triton's, and need the package `triton`, which PyTorch for
CUDA brings. On a CPU they are C++, and run where ``python -m tpbook.kernels.cpu`` has built them, which `make` does.
PyTorch's operators are the reference of both, and run wherever they cannot: with a gradient, and while a model is
compiled, traced or exported (`torch.compile` joins operators by itself). `TPBOOK_KERNELS=0` in the environment turns
them off, and so does::

    tpbook.kernels.enabled = False

Chapter: :doc:`/book/speed`
"""

import functools
import os
from contextlib import contextmanager
from importlib.util import find_spec

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch: kernels run on a CPU, slowly
HALF = (torch.float16, torch.bfloat16)

with_triton = find_spec("triton") is not None and (torch.version.cuda is not None or INTERPRETED)
enabled = os.environ.get("TPBOOK_KERNELS", "1") != "0"


@contextmanager
def allowed(whether):
    """Within, `tpbook.kernels.enabled` is `whether`."""
    global enabled
    before, enabled = enabled, whether
    try:
        yield
    finally:
        enabled = before


def stage_kernels(*tensors):
    """What a stage does in kernels that have no gradient, where they can be had for these tensors; else None.

    Returns:
        An object with the functions of `tpbook.kernels.stage`: that module on a GPU, `torch.ops.tpbook` on a CPU.
    """
    if not _may_run(tensors, (torch.float32, *HALF)):
        return None
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return None
    if _triton(tensors):
        from . import stage

        return stage
    if all(type(x) is torch.Tensor and x.is_cpu for x in tensors):
        from . import cpu

        return cpu.operators()
    return None


def masked_kernels(*tensors):
    """`tpbook.kernels.masked`, which has one, where it can be had for these tensors of half precision; else None."""
    if not (_may_run(tensors, HALF) and _triton(tensors)):
        return None
    from . import masked

    return masked


def _may_run(tensors, dtypes):
    if not enabled or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return all(x.dtype in dtypes for x in tensors)


def _triton(tensors):
    return with_triton and all(INTERPRETED or x.is_cuda and _can(x.device) for x in tensors)


@functools.cache
def _can(device):
    return torch.cuda.get_device_capability(device) >= (8, 0)
