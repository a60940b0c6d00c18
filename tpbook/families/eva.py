"""timm's `Eva`: EVA, EVA-02, DINOv3, PE (Perception Encoder), RoPE-ViT, Sapiens2: blocks whose attention is rotated.

    x ← x + drop_path1(γ₁ attn(norm1(x), rope))
    x ← x + drop_path2(γ₂ mlp(norm2(x)))

The rotation of a patch is a row (sin, cos) of the table `rope`, and goes where its token goes. A fused token has no
place: its row is sin 0, cos 1, no rotation, as the class token's. Nobody has published that; it is our choice. A token
that others were squeezed into keeps its own row.
"""

import torch
import torch.nn.functional as F
from timm.layers import AttentionRope
from timm.models import eva

from ..tokens import Tokens, drop
from .timm_vit import PrunedTimm, TimmViT, pool_kept


class PrunedEva(PrunedTimm):
    """Mixed into the class of a pruned `Eva`."""

    def pool(self, x, pool_type=None):
        """timm's `pool`; while a learned method trains, tokens it decided to drop do not enter the pool."""
        if not isinstance(x, Tokens):
            return super().pool(x, pool_type)
        pool_type = self.global_pool if pool_type is None else pool_type
        return pool_kept(x, pool_type, include_prefix=self.attn_pool is not None, attn_pool=self.attn_pool)


class Eva(TimmViT):
    """Models of `EvaBlock`, with every rotation that timm has, or none."""

    name, mixin = "timm Eva", PrunedEva
    positioned, call = True, ("rope", "attn_mask", "is_causal")

    def fits(self, model):
        return isinstance(model, eva.Eva)

    def check_block(self, block):
        if type(block).forward is not eva.EvaBlock.forward:
            return f"must be a timm EvaBlock (norm → attention, norm → MLP), got {type(block).__name__}"
        return None

    def check_attention(self, block):
        if type(block.attn).forward not in (eva.EvaAttention.forward, AttentionRope.forward):
            return f"needs timm's EvaAttention or AttentionRope, got {type(block.attn).__name__}"
        return None

    def positions(self, arguments, patch, prefix):
        rope = arguments.get("rope")
        if rope is None or patch is None:
            return arguments
        return {**arguments, "rope": gather_rope(rope, patch)}

    def first(self, block, x, mask, arguments):
        y = block.attn(block.norm1(x), rope=arguments.get("rope"), attn_mask=mask)
        return x + block.drop_path1(y if block.gamma_1 is None else block.gamma_1 * y)

    def second(self, block, x):
        y = block.mlp(block.norm2(x))
        return x + block.drop_path2(y if block.gamma_2 is None else block.gamma_2 * y)

    def pools_prefix(self, model):
        return True


def gather_rope(rope, patch):
    """The rows of a rotation that belong to the tokens that are left.

    Args:
        rope: (N, 2d), the same in all heads; (H, N, 2d), one of each head; or (B, 1 or H, N, 2d), one of each image.
            The first d numbers of a row are sines, the others cosines.
        patch: (B, n) int64, the original patch of each token, below 0 for one that has no place.

    Returns:
        (B, 1 or H, n, 2d); sin 0, cos 1 for tokens without a place.
    """
    heads = 1 if rope.dim() == 2 else rope.shape[-3]
    n, width = rope.shape[-2:]
    table = rope.reshape(-1, heads, n, width).transpose(1, 2)  # (B or 1, N, H, 2d)
    sin, cos = table[:, :1].chunk(2, dim=-1)
    still = torch.cat([torch.zeros_like(sin), torch.ones_like(cos)], dim=-1)  # (B or 1, 1, H, 2d)
    table = torch.cat([table, still], dim=1).flatten(2)  # (B or 1, N + 1, H·2d)
    row = torch.where(patch < 0, n, patch)  # (B, n)
    rows = F.embedding(row, table[0]) if table.shape[0] == 1 else drop(table, row)  # (B, n, H·2d)
    return rows.unflatten(2, (heads, width)).transpose(1, 2)
