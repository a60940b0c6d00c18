"""Whether what is computed often may run as kernels of our own, in the place of PyTorch's operators.

They are Triton's, so they need an NVIDIA GPU of compute capability 8 or more, and the package `triton`, which PyTorch
for CUDA brings. PyTorch's operators are their reference, and run wherever they cannot: on a CPU, and while a model is
compiled, traced or exported (`torch.compile` joins operators by itself). `TPBOOK_KERNELS=0` in the environment turns
them off, and so does::

    tpbook.kernels.enabled = False

Chapter: :doc:`/book/speed`
"""

import functools
import os
from importlib.util import find_spec

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch: kernels run on a CPU, slowly
HALF = (torch.float16, torch.bfloat16)

there = find_spec("triton") is not None and (torch.version.cuda is not None or INTERPRETED)
enabled = there and os.environ.get("TPBOOK_KERNELS", "1") != "0"


def stage_kernels(*tensors):
    """`tpbook.kernels.stage`, which has no gradient, where it can be had for these tensors; else None."""
    if not _may_run(tensors, (torch.float32, *HALF)):
        return None
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return None
    from . import stage

    return stage


def masked_kernels(*tensors):
    """`tpbook.kernels.masked`, which has, where it can be had for these tensors of half precision; else None."""
    if not _may_run(tensors, HALF):
        return None
    from . import masked

    return masked


def _may_run(tensors, dtypes):
    if not enabled or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return all((INTERPRETED or x.is_cuda and _can(x.device)) and x.dtype in dtypes for x in tensors)


@functools.cache
def _can(device):
    return torch.cuda.get_device_capability(device) >= (8, 0)
