"""`nn.MultiheadAttention` as the self-attention of a pruned block: it hands its mask to no fused attention as it is.

Where nobody hears and nothing is hidden the module runs itself; else its weights run here.
"""

import torch.nn.functional as F
from torch import nn


def attend(attention, x, mask):
    """Self-attention.

    Args:
        attention: `nn.MultiheadAttention`.
        x: (B, T, C).
        mask: an `AttentionMask`, or None.

    Returns:
        (B, T, C).

    Raises:
        ValueError: there is a mask, and the module is not PyTorch's own.
    """
    if mask is None:
        return attention(x, x, x, need_weights=False)[0]
    if why := unknown(attention):
        raise ValueError(f"the model {why}")
    q, k, v = (
        F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
        .unflatten(-1, (3, attention.num_heads, attention.head_dim))
        .permute(2, 0, 3, 1, 4)
    )  # (B, H, T, D) each
    if mask.only_looks:  # somebody looks, and no token goes: that changes no output
        mask.hear(q, k, v, attention.head_dim**-0.5)
        return attention(x, x, x, need_weights=False)[0]
    dropout = attention.dropout if attention.training else 0.0
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)  # (B, H, T, D)
    return attention.out_proj(y.transpose(1, 2).flatten(2))


def unknown(attention):
    """Why it cannot be listened to; or None."""
    if type(attention).forward is not nn.MultiheadAttention.forward:
        return f"needs nn.MultiheadAttention, got {type(attention).__name__}"
    if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
        return "needs an nn.MultiheadAttention with one in_proj_weight and no token added"
    return None
