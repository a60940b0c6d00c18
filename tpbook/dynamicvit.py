"""DynamicViT (Rao et al. 2021): a small network scores the tokens and learns to, end to end.

Before each pruned block (``PredictorLG`` and ``softmax_with_policy`` of the official code)::

    z = [MLP_loc(x) ; mean over living tokens of MLP_glob(x)],   π = LogSoftmax(MLP(z))       `ScorePredictor`
    training:   D ← D ⊙ GumbelSoftmax(π)_keep, straight through                                `sample`
                Ã_ij = exp(P_ij) G_ij / Σ_k exp(P_ik) G_ik,  G_ij = 1 if i = j else D_j        `KeepMask`
    inference:  the ⌊ρ₁⋯ρ_s·N⌋ tokens of the highest keep score stay, the others are dropped   `drop`

The paper calls "keep" index 1 of π; its code, and this file, index 0.

Chapter: :doc:`/book/dynamicvit`
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

KEEP = 0
HIDDEN = 1e-20  # what is left of a dropped token's weight, for its gradient


class ScorePredictor(nn.Module):
    """Log-probabilities of keeping and dropping each token, laid out as the official `PredictorLG`.

    Args:
        dim: C, channels of a token.
    """

    def __init__(self, dim, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.in_conv = nn.Sequential(nn.LayerNorm(dim, **dd), nn.Linear(dim, dim, **dd), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(dim, dim // 2, **dd), nn.GELU(),
            nn.Linear(dim // 2, dim // 4, **dd), nn.GELU(),
            nn.Linear(dim // 4, 2, **dd), nn.LogSoftmax(dim=-1),
        )  # fmt: skip

    def forward(self, x, alive=None):
        """Score patch tokens.

        Args:
            x: (B, n, C) patch tokens.
            alive: (B, n) mask of the tokens that still count in the global half; None counts all.

        Returns:
            (B, n, 2) log-probabilities, index 0 = keep.
        """
        u = self.in_conv(x)  # (B, n, C)
        local, glob = u.chunk(2, dim=-1)  # (B, n, C/2) each
        if alive is None:
            glob = glob.mean(dim=1, keepdim=True)  # (B, 1, C/2)
        else:
            alive = alive.unsqueeze(-1)  # (B, n, 1)
            glob = (glob * alive).sum(dim=1, keepdim=True) / alive.sum(dim=1, keepdim=True)
        return self.out_conv(torch.cat([local, glob.expand_as(local)], dim=-1))


def sample(log_probs, alive):
    """Draw the running keep mask D by the straight-through Gumbel-softmax.

    An image that would be left without a token keeps its best living one.

    Args:
        log_probs: (B, n, 2), index 0 = keep.
        alive: (B, n), D before this stage.

    Returns:
        (B, n): D after this stage, zeros and ones with the gradient of the soft sample.
    """
    keep = F.gumbel_softmax(log_probs, hard=True)[..., KEEP] * alive  # (B, n)
    empty = keep.sum(dim=1, keepdim=True) < 0.5  # (B, 1)
    best = log_probs[..., KEEP].masked_fill(alive < 0.5, float("-inf")).argmax(dim=1)  # (B,)
    return keep + empty * F.one_hot(best, keep.shape[1])


class KeepMask:
    """Goes where attention takes its `attn_mask`, and hides dropped tokens from the others: Ã above.

    The mask is one number a token; G, (B, 1, T, T), is never built. What attention does with its mask comes here by
    `__torch_function__`, the way of PyTorch's own `torch.nn.attention.bias`: the call of the fused one is answered by
    `MaskedSoftmax`, the addition of the explicit one, and dropout, by the plain `masked_attention`.

    Args:
        keep: (B, T) mask over all tokens, prefix tokens 1.
        dtype: of the tokens.
    """

    def __init__(self, keep, dtype):
        self.keep, self.dtype = keep.float(), dtype

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [name for name, value in kwargs.items() if value]
        if func is F.scaled_dot_product_attention and given == ["attn_mask"]:
            q, k, v = args  # (B, H, T, D) each
            for x in (k, v):
                if x.requires_grad:
                    x.register_hook(_flush)
            logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, H, T, T)
            return MaskedSoftmax.apply(logits, kwargs["attn_mask"].keep).to(v.dtype) @ v

        def plain(x):
            return masked_attention(x.keep).to(x.dtype) if isinstance(x, cls) else x

        return func(*map(plain, args), **{name: plain(x) for name, x in kwargs.items()})


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


def drop(x, kept, first=0):
    """Keep the chosen tokens and drop the others.

    Args:
        x: (B, n, C) or (B, n).
        kept: (B, k) int64, positions in x.
        first: the position in x, (B, n, C), from which `kept` counts; what is before it is dropped.

    Returns:
        (B, k, C) or (B, k), in the order of `kept`.
    """
    if x.dim() == 2:
        return x.gather(1, kept)
    return F.embedding(rows(kept, x.shape[1], first), x.flatten(0, 1))  # a lookup copies whole tokens, a gather numbers


def rows(index, n, first=0):
    """Where tokens first + (B, k) of (B, n, …) are in the flattened (B·n, …): (B, k)."""
    if index.shape[0] == 1:
        return index + first
    return index + torch.arange(first, first + index.shape[0] * n, n, device=index.device).unsqueeze(1)
