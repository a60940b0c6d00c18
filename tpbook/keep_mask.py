"""Attention with a mask that has a gradient: how tokens that a learned method drops in training stop counting.

DynamicViT's ``softmax_with_policy``, with logits P (B, H, T, T) and the decisions D (B, T), prefix tokens 1::

    Ã_ij = exp(P_ij) G_ij / Σ_k exp(P_ik) G_ik,  G_ij = 1 if i = j else D_j

The mask is one number a token; G, (B, 1, T, T), is not built where attention is fused.

Chapter: :doc:`/book/dynamicvit`
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .kernels import masked_kernels

HIDDEN = 1e-20  # what is left of a dropped token's weight, for its gradient


def masked_product(q, k, v, keep, scale, bias=None):
    """Ã v.

    Args:
        q, k, v: (B, H, T, D).
        keep: (B, T), D.
        scale: usually 1 / √D.
        bias: (B or 1, H, T, T), added to the logits, or None.

    Returns:
        (B, H, T, D), of the dtype of v.
    """
    if bias is None and (kernels := masked_kernels(q, k, v)):
        return kernels.masked_product(q, k, v, keep, scale)
    for x in (k, v):
        if x.requires_grad:
            x.register_hook(_flush)
    logits = (q * scale) @ k.transpose(-2, -1)  # (B, H, T, T)
    logits = logits if bias is None else logits + bias
    return MaskedSoftmax.apply(logits, keep.float()).to(v.dtype) @ v


class MaskedSoftmax(torch.autograd.Function):
    """Ã of logits P (B, H, T, T) and D (B, T), in float32 inside and of the logits' dtype outside.

    Its backward gets the gradient of the decisions from that of the logits, by one sum::

        ∂L/∂P = Ã ⊙ (∂L/∂Ã − Σ_k Ã_ik ∂L/∂Ã_ik),    ∂L/∂D_j = Σ_{heads, i ≠ j} (∂L/∂P)_ij / D_j
    """

    @staticmethod
    def forward(ctx, logits, keep):
        """P (B, H, T, T) and D (B, T) → Ã (B, H, T, T)."""
        dtype = torch.float32 if logits.dtype is torch.float16 else logits.dtype  # float16 has no 1e-20
        hidden = logits.to(torch.promote_types(dtype, torch.float32), copy=True)
        hidden += (keep + HIDDEN).log()[:, None, None, :]
        _diagonal(hidden).copy_(_diagonal(logits))  # a dropped token still sees itself
        attention = hidden.softmax(dim=-1).to(dtype)
        ctx.save_for_backward(attention, keep)
        ctx.dtype = logits.dtype
        return attention

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        """∂L/∂Ã → ∂L/∂P, ∂L/∂D."""
        attention, keep = ctx.saved_tensors
        gradient = torch._softmax_backward_data(gradient, attention, -1, attention.dtype)  # (B, H, T, T)
        own = _diagonal(gradient).clone()
        _diagonal(gradient).zero_()  # not subtracted from the sum: the others' part is 1e-20 of it
        by_key = gradient.sum(dim=(1, 2)).to(keep.dtype)  # (B, T)
        _diagonal(gradient).copy_(own)
        return gradient.to(ctx.dtype), by_key / (keep + HIDDEN)


def _diagonal(x):
    """(B, H, T, T) → a view (B, H, T) of each matrix's diagonal."""
    return x.diagonal(dim1=-2, dim2=-1)


def _flush(gradient):
    """Zero where it is below 1e-20: what the others give a dropped token, and denormal, so slow, a block further on."""
    return F.hardshrink(gradient, HIDDEN)


def masked_attention(keep):
    """The additive attention bias log G that hides dropped tokens from the others.

    Added to the logits before the softmax it gives Ã. The small constant lets the gradient reach the decisions of
    dropped tokens: it stands for e^P times 1e-20 there, where the official code adds 1e-6 / N.

    Args:
        keep: (B, T) mask over all tokens, prefix tokens 1.

    Returns:
        (B, 1, T, T) float32, for timm's `attn_mask`.
    """
    eye = torch.eye(keep.shape[1], device=keep.device)
    g = keep[:, None, None, :] * (1 - eye) + eye  # (B, 1, T, T)
    return (g.float() + HIDDEN).log()
