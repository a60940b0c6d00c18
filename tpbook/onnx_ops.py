"""What a traced model says in other operators, since TorchScript's ONNX exporter has no words for it, or wrong ones.

`Plain` does so for the calls inside it alone, so what the process exports otherwise is translated as ever::

    with Plain():
        model(images)     # while it is traced

Chapter: :doc:`/book/explorer`
"""

from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from .attention import AttentionMask


class Plain(TorchFunctionMode):
    """Calls the functions of `OTHERS` in the place of PyTorch's."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return OTHERS.get(func, func)(*args, **(kwargs or {}))


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **kwargs):
    """softmax(q Kᵀ · scale + mask) v, of queries and keys that are there once anyway: (B, H, T, D) each."""
    if is_causal or dropout_p or kwargs.get("enable_gqa") or getattr(attn_mask, "dtype", None) is torch.bool:
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, **kwargs)
    logits = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)  # (B, H, T, T)
    if attn_mask is not None:
        if isinstance(attn_mask, AttentionMask):
            attn_mask.listen(k, v)
        logits = logits + attn_mask
    return logits.softmax(dim=-1) @ v


def rms_norm(x, normalized_shape, weight=None, eps=None):
    """x / √(mean of x² + ε) · w, over the last dimensions."""
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    dims = tuple(range(-len(normalized_shape), 0))
    y = x * (x.square().mean(dim=dims, keepdim=True) + eps).rsqrt()
    return y if weight is None else y * weight


def index_add(x, dim, index, source, *, alpha=1):
    """The exporter's own forgets all but one of equal indices."""
    return x.scatter_add(dim, _everywhere(index, dim, source), source * alpha)


def index_add_(x, dim, index, source, *, alpha=1):
    """The same, in place."""
    return x.scatter_add_(dim, _everywhere(index, dim, source), source * alpha)


def largest(x, *args, **kwargs):
    """`max`, along one dimension by TopK: ONNX Runtime's ReduceMax of no rows gives another shape."""
    dim, keepdim = (*args, *(kwargs.get(key) for key in ("dim", "keepdim")[len(args) :]))[:2]
    if not isinstance(dim, int) or x.dim() < 2:
        return torch.max(x, *args, **kwargs)
    rows = (dim - 1) % x.dim()  # one more, since where there are none its build for browsers divides by zero
    more = x.new_zeros([1 if d == rows else size for d, size in enumerate(x.shape)])
    best = (torch.ops.aten.slice(part, rows, 0, -1) for part in torch.cat([x, more], dim=rows).topk(1, dim=dim))
    return torch.return_types.max(part if keepdim else part.select(dim, 0) for part in best)


def argmax(x, dim, keepdim=False):
    """As `largest`."""
    return largest(x, dim, keepdim).indices


def argmin(x, dim, keepdim=False):
    """As `largest`."""
    return largest(-x, dim, keepdim).indices


def cdist(x, y, *args, **kwargs):
    """Of one row more, since ONNX Runtime multiplies no rows wrongly."""
    return torch.cdist(torch.cat([x, y[:, :1]], dim=1), y, *args, **kwargs)[:, :-1]


def repeat_interleave(x, repeats, dim=None, **kwargs):
    """The exporter's own takes another dimension for the one that is meant."""
    if not isinstance(repeats, int) or dim is None:
        return torch.repeat_interleave(x, repeats, dim, **kwargs)
    dim = dim % x.dim()
    return torch.stack([x] * repeats, dim=dim + 1).flatten(dim, dim + 1)


def _everywhere(index, dim, source):
    """(k,) positions along `dim` → of the shape of `source`."""
    return index.view([-1 if d == dim % source.dim() else 1 for d in range(source.dim())]).expand_as(source)


OTHERS = {
    F.scaled_dot_product_attention: attention,
    F.rms_norm: rms_norm,
    torch.rms_norm: rms_norm,
    torch.index_add: index_add,
    torch.Tensor.index_add: index_add,
    torch.Tensor.index_add_: index_add_,
    torch.max: largest,
    torch.Tensor.max: largest,
    torch.Tensor.argmax: argmax,
    torch.Tensor.argmin: argmin,
    torch.cdist: cdist,
    torch.repeat_interleave: repeat_interleave,
    torch.Tensor.repeat_interleave: repeat_interleave,
}


@contextmanager
def quiet():
    """Without the pages of graph that torch's exporter prints before it raises: it turns a log on, and leaves it on."""
    was = torch._C._jit_is_onnx_log_enabled()
    torch._C._jit_set_onnx_log_enabled(False)
    try:
        with patch.object(torch._C, "_jit_set_onnx_log_enabled"):
            yield
    finally:
        torch._C._jit_set_onnx_log_enabled(was)
