"""timm's `Beit`: BEiT and BEiT v2, whose attention adds a bias of relative positions to its logits.

    x ← x + drop_path1(γ₁ attn(norm1(x), bias))
    x ← x + drop_path2(γ₂ mlp(norm2(x)))

The bias, (H, 1 + N, 1 + N), comes from a table of each block or from one that all share, and is gathered on both axes.
A fused token has no place: it takes the biases of the class token. Nobody has published that; it is our choice. A token
that others were squeezed into keeps its own.

timm's attention takes no mask, and no table's bias can be put into it, so it is written again below. It runs where
tokens are gone or a mask is needed; elsewhere the module itself is called.
"""

from copy import deepcopy

import torch
import torch.nn.functional as F
from timm.models import beit

from ..attention import AttentionMask
from .family import mean_as_weighed
from .timm_vit import PrunedTimm, TimmViT


class Beit(TimmViT):
    """Models of BEiT's `Block`."""

    name, mixin = "timm Beit", PrunedTimm
    positioned, call = True, ("shared_rel_pos_bias",)

    def fits(self, model):
        return isinstance(model, beit.Beit)

    def check_block(self, block):
        if type(block).forward is not beit.Block.forward:
            return f"must be a timm BEiT Block (attention → MLP), got {type(block).__name__}"
        if type(block.attn).forward is not beit.Attention.forward:
            return f"needs timm's BEiT Attention, got {type(block.attn).__name__}"
        return None

    def check_attention(self, block):
        return None  # `check_block` did

    def positions(self, arguments, patch, prefix):
        return {**arguments, "patch": patch}

    def first(self, block, x, mask, arguments):
        shared, patch = arguments.get("shared_rel_pos_bias"), arguments["patch"]
        y = block.norm1(x)
        if mask is None and patch is None:
            y = block.attn(y, shared_rel_pos_bias=shared)
        else:
            y = attend(block.attn, y, gather_bias(block.attn, shared, patch), mask or AttentionMask(x.dtype))
        return x + block.drop_path1(y if block.gamma_1 is None else block.gamma_1 * y)

    def second(self, block, x):
        y = block.mlp(block.norm2(x))
        return x + block.drop_path2(y if block.gamma_2 is None else block.gamma_2 * y)

    def hand_on(self, tokens, plan):
        return mean_as_weighed(tokens, plan.prefix)  # `forward_head` knows no mean but that of all

    # ---- cost

    def resized(self, model, size):
        model = deepcopy(model)
        model.set_input_size(size)
        return model

    def attention(self, block):
        return block.attn, block.attn.proj.in_features


def gather_bias(attention, shared, patch):
    """The bias between the tokens that are left.

    Args:
        attention: of a block.
        shared: (H, 1 + N, 1 + N), what the model gives all blocks, or None.
        patch: (B, n) int64, the original patch of each token, below 0 for one that has no place; None for all N.

    Returns:
        (B, H, 1 + n, 1 + n), or with B = 1 where `patch` is None; None where there is no bias.
    """
    bias = None if shared is None else shared.unsqueeze(0)  # (1, H, 1 + N, 1 + N)
    if attention.relative_position_bias_table is not None:
        bias = attention._get_rel_pos_bias() if bias is None else attention._get_rel_pos_bias() + bias
    if bias is None or patch is None:
        return bias
    token = F.pad((patch + 1).clamp(min=0), (1, 0))  # (B, T = 1 + n), the class token is 0
    pair = token.unsqueeze(2) * bias.shape[-1] + token.unsqueeze(1)  # (B, T, T), positions in a flattened matrix
    return bias[0].flatten(1).index_select(1, pair.flatten()).view(-1, *pair.shape).transpose(0, 1)


def attend(attention, x, bias, mask):
    """The forward of timm's BEiT `Attention`, with another bias and a mask.

    Args:
        attention: the module.
        x: (B, T, C).
        bias: (B or 1, H, T, T) or None.
        mask: `AttentionMask`.

    Returns:
        (B, T, C).
    """
    if attention.q_bias is None:
        qkv = attention.qkv(x)
    else:
        qkv_bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
        if attention.qkv_bias_separate:
            qkv = attention.qkv(x) + qkv_bias
        else:
            qkv = F.linear(x, attention.qkv.weight, qkv_bias)
    qkv = qkv.reshape(*x.shape[:2], 3, attention.num_heads, -1)  # (B, T, 3, H, D)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, T, D) each
    if attention.fused_attn:
        x = mask.attend(q, k, v, dropout_p=attention.attn_drop.p if attention.training else 0.0, bias=bias)
    else:
        logits = (q * attention.scale) @ k.transpose(-2, -1)  # (B, H, T, T)
        mask.listen(k, v)
        logits = mask.add_to(logits if bias is None else logits + bias)
        x = attention.attn_drop(logits.softmax(dim=-1)) @ v
    return attention.proj_drop(attention.proj(x.transpose(1, 2).flatten(2)))
