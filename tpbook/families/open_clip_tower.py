"""open_clip's image towers, the `visual` of its models: its own `VisionTransformer`, and `TimmModel` around timm's.

The halves of a block (`ln_attn` in custom blocks alone)::

    x ← x + ls_1(ln_attn(attn(ln_1(x))))
    x ← x + ls_2(mlp(ln_2(x)))
"""

from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.timm_model import TimmModel
from open_clip.transformer import Attention, CustomResidualAttentionBlock, ResidualAttentionBlock, VisionTransformer

from ..pruned import PrunedModel
from .costs import linear_macs
from .family import Family, mean_as_weighed
from .multihead import attend, unknown
from .wrapper import Wrapper


class PrunedOpenClip(PrunedModel):
    """Mixed into the class of a pruned tower."""

    def forward(self, *args, **kwargs):
        """The tower's own forward, with tokens removed.

        Raises:
            ValueError: patch dropout is on (it does not say which patches are left).
        """
        prob = getattr(self.patch_dropout, "prob", 0)
        if self.training and prob > 0:
            raise ValueError(f"patch_dropout must be 0 while a pruned model trains, got {prob}")
        return super().forward(*args, **kwargs)

    def forward_intermediates(self, *args, **kwargs):
        """Refused: tokens that were removed leave no feature map.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("a pruned model has no feature maps: use tpbook.trace, or tpbook.unprune it first")


class OpenClipTower(Family):
    """Towers of `ResidualAttentionBlock`, whose attention is `nn.MultiheadAttention`, or of custom blocks."""

    name, mixin = "open_clip VisionTransformer", PrunedOpenClip
    pools_tokens, call = True, ("k_x", "v_x", "attn_mask")

    def fits(self, model):
        return isinstance(model, (VisionTransformer, CLIP, CustomTextCLIP, CoCa))

    def refusal(self, model):
        if not isinstance(model, VisionTransformer):
            return "has two towers: prune its image tower, model.visual"
        if not model.transformer.batch_first:
            return "has batch_first=False: build it with batch_first=True"
        return None

    def blocks(self, model):
        return list(model.transformer.resblocks)

    def norm(self, model):
        all_tokens = model.attn_pool is None and not model.final_ln_after_pool
        return model.ln_post if all_tokens else model.transformer.resblocks[-1]

    def prefix(self, model):
        return 1

    def grid(self, model):
        return tuple(model.grid_size)

    def width(self, model):
        return model.transformer.width

    def has_class_token(self, model):
        return True

    def pools_unmasked(self, model):
        if model.attn_pool is not None:
            return "a tower with attentional_pool, whose pool takes no mask"
        return None

    def hand_on(self, tokens, plan):
        return mean_as_weighed(tokens, plan.prefix)

    # ---- a block

    def check_block(self, block):
        if type(block).forward not in (ResidualAttentionBlock.forward, CustomResidualAttentionBlock.forward):
            return f"must be an open_clip ResidualAttentionBlock, or the custom one, got {type(block).__name__}"
        return None

    def check_attention(self, block):
        if type(block.attn).forward is not Attention.forward:
            return unknown(block.attn)
        return "needs attention of dot products, got scaled cosines" if block.attn.scaled_cosine else None

    def first(self, block, x, mask, arguments):
        y = block.ln_1(x)
        if isinstance(block, CustomResidualAttentionBlock):
            y = block.ln_attn(block.attn(y, attn_mask=mask))
        else:
            y = attend(block.attn, y, mask)
        return x + block.ls_1(y)

    def second(self, block, x):
        return x + block.ls_2(block.mlp(block.ln_2(x)))

    # ---- cost

    def channels(self, model):
        return model.conv1.in_channels

    def image_size(self, model):
        return tuple(model.image_size)

    def patch_size(self, model):
        return tuple(model.patch_size)

    def embedding(self, model):
        return model.conv1

    def head_macs(self, model, n):
        if model.attn_pool is not None:
            raise TypeError("model must pool without attention for its cost to be such a sum, got attentional_pool")
        rows = n + 1 if model.pool_type == "none" else 1
        return 0 if model.proj is None else rows * model.proj.numel()


class OpenClipTimmTower(Wrapper):
    """The timm model in `.trunk` is what is pruned."""

    name, held = "open_clip TimmModel", "trunk"

    def fits(self, model):
        return isinstance(model, TimmModel)

    def head_macs(self, model, n):
        return super().head_macs(model, n) + linear_macs(model.head)
