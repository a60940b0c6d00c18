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
from .kernels import stage_kernels
from .tokens import Heard, in_float32


class AttentionMask:
    """An `attn_mask` of one forward of one block.

    Args:
        dtype: of the tokens; libraries ask a mask for it.
        keep: (B, T), D over all tokens, prefix tokens 1; hides those with D = 0 from the others. None hides none.
        queries: whose rows of the attention are heard: "class" (the first token's) or "all"; None hears none.
        reads: what else is heard, names of `HEARABLE`.
        bias: (B, T), added to the logits of every query: log s where tokens merged, −∞ for padding. None adds nothing.
        graph: whether what is heard keeps its gradient.
        heads: (B, H), by which the output of each head is multiplied. None multiplies none.

    Attributes:
        heard: `Heard`, once the attention has run. Its row is the mean over heads and heard rows of softmax(q Kᵀ / √d).
    """

    ndim = 4

    def __init__(self, dtype, keep=None, queries=None, reads=(), bias=None, graph=True, heads=None):
        self.dtype, self.keep, self.queries, self.reads, self.graph = dtype, keep, queries, reads, graph
        self.bias = None if bias is None else bias[:, None, None, :]  # (B, 1, 1, T)
        self.heads, self.gated = heads, heads is None
        self.heard = Heard()

    def to(self, *args, **kwargs):
        """Libraries cast a mask to the dtype of the queries; `attend` does."""
        return self

    @property
    def hears(self):
        """Whether it has to hear anything."""
        return self.queries is not None or bool(self.reads)

    @property
    def only_looks(self):
        """Whether it neither hides nor weighs anything, and whoever hears takes no part in the result."""
        return not self.graph and self.keep is None and self.bias is None and self.heads is None

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
        if self.bias is not None:
            bias = self.bias.to(q.dtype) if bias is None else bias + self.bias.to(q.dtype)
        self.hear(q, k, v, scale, bias)
        if self.heads is not None:  # weighs values, which is the same
            v, self.gated = v * self.heads[:, :, None, None].to(v.dtype), True
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
        if self.bias is not None:
            logits = logits + self.bias.to(logits.dtype)
        if self.queries is not None:
            with self._graph():
                asking = logits[:, :, :1] if self.queries == "class" else logits
                self.heard = self.heard._replace(row=shares(asking, self.keep))
        if self.keep is not None:
            logits = logits + masked_attention(self.keep).to(logits.dtype)
        return logits

    def hear(self, q, k, v, scale, bias=None):
        """Hear what the method asks of queries, keys and values, (B, H, T, D) each; `bias` as in `heard`."""
        with self._graph():
            if self.queries is not None:
                asking = q[:, :, :1] if self.queries == "class" else q
                self.heard = self.heard._replace(row=heard(asking, k, scale, bias, self.keep))
            self.listen(k, v)

    def listen(self, k, v):
        """Hear what the method reads of keys and values, (B, H, T, D) each."""
        for name in self.reads:
            self.heard = self.heard._replace(**{name: HEARABLE[name](k, v)})

    def check(self):
        """RuntimeError where the attention ran, and did not let hear or turn off what was asked."""
        if not self.gated:
            raise RuntimeError(
                "the method turns heads off, and this attention is explicit, which hands its logits on alone: build "
                'the model with fused attention (timm\'s fused_attn, or attn_implementation="sdpa")'
            )
        if any(getattr(self.heard, name) is None for name in self.reads):
            raise RuntimeError(
                f"the method reads {' and '.join(self.reads)} of an attention, and this one is explicit, which hands "
                "its logits on alone: build the model with fused attention (timm's fused_attn, or "
                'attn_implementation="sdpa")'
            )

    def _graph(self):
        return torch.set_grad_enabled(self.graph and torch.is_grad_enabled())


# what of keys and values, (B, H, T, D) each, can be heard, by its name in `Heard`
HEARABLE = {
    "keys": lambda k, v: k.mean(dim=1),
    "norms": lambda k, v: v.float().square().sum(dim=(1, 3)).sqrt(),
}


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
    if bias is None and keep is None and q.shape[2] == 1 and (kernels := stage_kernels(q, k)):
        return kernels.row(q, k, scale)
    shape, whole = (*q.shape[:3], k.shape[2]), torch.contiguous_format  # keys are copied once, whatever their dtype
    q, k = (part.to(torch.float32, memory_format=whole).flatten(0, 1) for part in (q, k))  # (B·H, Q, D), (B·H, T, D)
    logits = torch.baddbmm(q.new_empty(1), q, k.transpose(1, 2), beta=0, alpha=scale).view(shape)  # (B, H, Q, T)
    if bias is not None:
        logits = logits + bias[:, :, : shape[2]].float()
    return shares(logits, keep)


def shares(logits, keep=None):
    """(B, H, Q, T) logits → (B, T): softmax in float32, mean over heads, and over the queries that count."""
    logits = logits.float()
    if keep is not None:
        logits = logits + (keep.float() + HIDDEN).log()[:, None, None, :]
    attention = logits.softmax(dim=-1)  # (B, H, Q, T)
    if keep is None or attention.shape[2] == 1:
        return attention.mean(dim=(1, 2))
    attention = attention.mean(dim=1)  # (B, Q, T)
    asking = keep / keep.sum(dim=1, keepdim=True)  # (B, T), and Q = T
    return (attention * asking.unsqueeze(-1)).sum(dim=1)
