"""What a pruned block hands to its attention in the place of `attn_mask`: it hears, and it hides.

A library's attention gives its mask to `scaled_dot_product_attention`, or adds it to the logits. Both come here by
`__torch_function__`, the way of PyTorch's own `torch.nn.attention.bias`. So the attention runs as its library wrote it,
with q/k norms, rotations and whatever adapters stand around its layers; the class token's row is taken from the
queries and keys that it computes anyway; and no module keeps anything.

Chapter: :doc:`/book/are-tokens-redundant`
"""

import torch
import torch.nn.functional as F

from .keep_mask import HIDDEN, masked_attention, masked_product
from .tokens import in_float32


class AttentionMask:
    """An `attn_mask` of one forward of one block.

    Args:
        dtype: of the tokens; libraries ask a mask for it.
        keep: (B, T), D over all tokens, prefix tokens 1; hides those with D = 0 from the others. None hides none.
        queries: whose rows of the attention are heard: "class" (the first token's) or "all"; None hears nothing.
        graph: whether what is heard keeps its gradient.

    Attributes:
        heard: (B, T) float32 once the attention has run, the mean over heads and heard rows of softmax(q Kᵀ / √d).
    """

    ndim = 4

    def __init__(self, dtype, keep=None, queries=None, graph=True):
        self.dtype, self.keep, self.queries, self.graph = dtype, keep, queries, graph
        self.heard = None

    def to(self, *args, **kwargs):
        """Libraries cast a mask to the dtype of the queries; `attend` does."""
        return self

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            q, k, v, *rest = args  # (B, H, T, D) each
            mask = rest.pop(0) if rest else kwargs.pop("attn_mask")
            return mask.attend(q, k, v, *rest, **kwargs)
        first, second = args  # explicit attention adds its mask to the logits, (B, H, T, T)
        mask, logits = (first, second) if isinstance(first, cls) else (second, first)
        return mask.add_to(logits)

    def attend(self, q, k, v, dropout_p=0.0, is_causal=False, scale=None, bias=None, **kwargs):
        """The fused attention; `bias`, (B or 1, H, T, T) or None, is added to its logits."""
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        bias = bias if bias is None else bias.to(q.dtype)
        if self.queries is not None:
            with torch.set_grad_enabled(self.graph and torch.is_grad_enabled()):
                asking = q[:, :, :1] if self.queries == "class" else q
                self.heard = heard(asking, k, scale, bias, self.keep)
        if self.keep is not None and dropout_p == 0:
            return masked_product(q, k, v, self.keep, scale, bias)
        if self.keep is not None:
            hidden = masked_attention(self.keep).to(q.dtype)  # (B, 1, T, T)
            bias = hidden if bias is None else hidden + bias
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, dropout_p=dropout_p, is_causal=is_causal, scale=scale, **kwargs
        )

    def add_to(self, logits):
        """The explicit attention: its logits (B, H, T, T), with what is hidden."""
        if self.queries is not None:
            with torch.set_grad_enabled(self.graph and torch.is_grad_enabled()):
                asking = logits[:, :, :1] if self.queries == "class" else logits
                self.heard = shares(asking, self.keep)
        if self.keep is not None:
            logits = logits + masked_attention(self.keep).to(logits.dtype)
        return logits


@in_float32
def heard(q, k, scale, bias=None, keep=None):
    """How much some queries look at each token: mean over heads and queries of softmax(q Kᵀ · scale), in float32.

    Args:
        q: (B, H, Q, D) queries.
        k: (B, H, T, D) keys.
        scale: usually 1 / √D.
        bias: (B or 1, H, T, T) of which the first Q rows are added to the logits, or None.
        keep: (B, T) mask of the tokens that count, or None for all.

    Returns:
        (B, T) float32, prefix tokens included.
    """
    logits = (q.float() * scale).flatten(0, 1).bmm(k.float().flatten(0, 1).transpose(1, 2))  # (B·H, Q, T)
    logits = logits.view(*q.shape[:3], k.shape[2])  # (B, H, Q, T)
    if bias is not None:
        logits = logits + bias[:, :, : q.shape[2]].float()
    return shares(logits, keep)


def shares(logits, keep=None):
    """(B, H, Q, T) logits → (B, T): softmax in float32, mean over heads, and over the queries that count."""
    logits = logits.float()
    if keep is not None:
        logits = logits + (keep.float() + HIDDEN).log()[:, None, None, :]
    attention = logits.softmax(dim=-1).mean(dim=1)  # (B, Q, T)
    if keep is None or attention.shape[1] == 1:
        return attention.mean(dim=1)
    asking = keep / keep.sum(dim=1, keepdim=True)  # (B, T), and Q = T
    return (attention * asking.unsqueeze(-1)).sum(dim=1)
