"""timm's `NaFlexVit` on plain images: the blocks are those of `VisionTransformer`, or with rotations those of `Eva`.

Dictionaries of patches are refused on a pruned model: their images have different numbers of patches, and so would the
counts.
"""

from timm.models.eva import EvaBlock
from timm.models.naflexvit import NaFlexVit

from ..tokens import Tokens
from .eva import Eva
from .timm_vit import PrunedTimm, TimmViT, pool_kept


class PrunedNaFlex(PrunedTimm):
    """Mixed into the class of a pruned `NaFlexVit`."""

    def forward_features(self, patches, patch_coord=None, patch_valid=None, attn_mask=None):
        """timm's `forward_features` with tokens removed: images (B, in_chans, H, W) → (B, P + n, C).

        Raises:
            ValueError: patches are given in the place of images, or what `PrunedTimm.forward_features` refuses.
        """
        if patch_coord is not None or patch_valid is not None or patches.dim() != 4:
            raise ValueError(
                f"x must be images (B, {self.in_chans}, H, W) on a pruned NaFlexVit, got patches "
                f"{tuple(patches.shape)}: their number differs from image to image"
            )
        return super().forward_features(patches, attn_mask=attn_mask)

    def _pool(self, x, pool_type=None, patch_valid=None):
        if not isinstance(x, Tokens):
            return super()._pool(x, pool_type, patch_valid)
        pool_type = self.global_pool if pool_type is None else pool_type
        return pool_kept(x, pool_type, self.pool_include_prefix, self.attn_pool)


class NaFlex(TimmViT):
    """Each block is run as the family does that it comes from."""

    name, mixin = "timm NaFlexVit", PrunedNaFlex
    positioned, call = True, ("rope", "attn_mask", "is_causal")  # by name alone, so the order does not matter
    rotated, plain = Eva(), TimmViT()

    def _of(self, block):
        return self.rotated if isinstance(block, EvaBlock) else self.plain

    def fits(self, model):
        return isinstance(model, NaFlexVit)

    def refusal(self, model):
        if model.embeds.pos_embed_grid_size is None:
            return "has no image size of its own: build it with img_size= or pos_embed_grid_size="
        return None

    def grid(self, model):
        return tuple(model.embeds.pos_embed_grid_size)

    def has_class_token(self, model):
        return model.has_class_token

    def check_block(self, block):
        return self._of(block).check_block(block)

    def check_attention(self, block):
        return self._of(block).check_attention(block)

    def positions(self, arguments, patch, prefix):
        return self.rotated.positions(arguments, patch, prefix)

    def first(self, block, x, mask, arguments):
        return self._of(block).first(block, x, mask, arguments)

    def second(self, block, x):
        return self._of(block).second(block, x)

    # ---- cost

    def image_size(self, model):
        return tuple(rows * side for rows, side in zip(self.grid(model), self.patch_size(model)))

    def patch_size(self, model):
        return tuple(model.embeds.patch_size)

    def resized(self, model, size):
        return model  # takes any

    def embedding(self, model):
        return model.embeds

    def patch_macs(self, model):
        return model.embeds.proj.weight.numel()
