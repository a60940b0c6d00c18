"""transformers' CvT (Wu et al. 2021): no positions; each block makes queries, keys and values by convolutions.

    x ← x + drop_path(attention(layernorm_before(x)))
        q, k, v = W(BN(conv_{3 × 3, a channel each}(M))), k and v with stride 2;  scale C^{−1/2}
    x ← drop_path(x + W₂ GELU(W₁ layernorm_after(x)))

The convolution of the queries runs on the zero-filled map, and those of the tokens that are left are gathered from it:
how TPS does it is not public. Keys are those of the map's cells, not of the tokens, so no mask hides any; the zeros do.
The class token's attention to a token is that to the key which the same convolution gives with stride 1 at the token's
place, our choice: at every other place it is a key of the model.
"""

import math

import torch
import torch.nn.functional as F

from .costs import convolved, linear_macs, prepared_size
from .family import Segment
from .grid import Grid, from_map, heads, run, to_map
from .huggingface import PrunedHuggingFace, library_class

MODELS = ("CvtModel", "CvtForImageClassification")


class CvT(Grid):
    """CvT-13, -21 and -W24; depthwise projections alone."""

    name, mixin, call = "Hugging Face CvT", PrunedHuggingFace, ("height", "width")

    def fits(self, model):
        return library_class(model) in MODELS

    def stages(self, model):
        """The library's, of one map each."""
        return getattr(model, "cvt", model).encoder.stages

    def segments(self, model, size=None):
        grid, segments, first = self.image_size(model) if size is None else size, [], 0
        for i, (stage, conv) in enumerate(zip(self.stages(model), self.projections(model))):
            grid = convolved(conv, grid)
            blocks, prefix = list(stage.layers), int(model.config.cls_token[i])
            pooled = i == len(self.stages(model)) - 1 and not prefix
            segments.append(Segment(first, blocks, blocks[-1], prefix, grid, conv.out_channels, pooled))
            first += len(blocks)
        return segments

    def projections(self, model):
        return [stage.embedding.convolution_embeddings.projection for stage in self.stages(model)]

    # ---- a block

    def check_block(self, block):
        if library_class(block) != "CvtLayer":
            return f"must be a CvtLayer, got {type(block).__name__}"
        attn = block.attention.attention
        if not all(hasattr(part, "convolution_projection") for part in _projections(attn)):
            return "must make its queries, keys and values by depthwise convolutions, qkv_projection_method='dw_bn'"
        if (stride := attn.convolution_projection_query.convolution_projection.convolution.stride) != (1, 1):
            return f"must make a query for each position, got stride_q={stride[0]}"
        return None

    def attend(self, block, tokens, mask, arguments):
        grid, y = (arguments["height"], arguments["width"]), block.layernorm_before(tokens.x)
        attention, given = block.attention, (tokens, mask, grid, block._plan.prefix)
        y = run(*given, lambda: attention(y, *grid), lambda: self.ours(attention, y, *given))
        return block.drop_path(y) + tokens.x

    def ours(self, attention, y, tokens, mask, grid, prefix):
        """The attention of what is left: (B, P + n, C), normed → (B, P + n, C)."""
        attn = attention.attention
        first, whole = y[:, :prefix], to_map(y[:, prefix:], tokens, grid)  # (B, P, C), (B, C, rows, columns)
        q, k, v = (part.convolution_projection(whole) for part in _projections(attn))
        q = from_map(q, tokens)  # (B, n, C)
        k, v = (part.flatten(2).transpose(1, 2) for part in (k, v))  # (B, M, C)
        q, k, v = (heads(w(torch.cat([first, part], dim=1)), attn.num_heads) for w, part in (
            (attn.projection_query, q), (attn.projection_key, k), (attn.projection_value, v)))  # fmt: skip
        if mask is not None and mask.queries is not None:
            own = torch.cat([first, from_map(_at_every_place(attn, whole), tokens)], dim=1)
            mask.hear(q, heads(attn.projection_key(own), attn.num_heads), v, attn.scale)
        dropout = attn.dropout.p if attn.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=attn.scale).transpose(1, 2).flatten(2)
        return attention.output(y, None)

    def second(self, block, x):
        return block.drop_path(block.output(block.intermediate(block.layernorm_after(x)), x))

    def check(self, model, pruning):
        if pruning.method.queries == "all":
            score = pruning.method.score.name
            return f"{pruning.name} with score={score!r} needs keys that are the tokens, and those of a CvT are not"
        return super().check(model, pruning)

    # ---- cost

    def channels(self, model):
        return model.config.num_channels

    def image_size(self, model):
        return prepared_size(model)

    def patch_size(self, model):
        return (math.prod(conv.stride[0] for conv in self.projections(model)),) * 2

    def resized(self, model, size):
        return model

    def embeddings(self, model):
        return [stage.embedding for stage in self.stages(model)]

    def block_macs(self, block, seen, left, queries, grid):
        attn = block.attention.attention
        key, dim = attn.convolution_projection_key.convolution_projection.convolution, attn.embed_dim
        cells, count, window = math.prod(convolved(key, grid)), math.prod(grid), key.weight[0].numel()
        keys, mlp = cells + attn.with_cls_token, linear_macs(block.intermediate) + linear_macs(block.output)
        linear = window * dim * (count + 2 * cells) + 2 * (seen + keys) * dim * dim + left * mlp
        hears = 0 if queries is None else window * dim * count + seen * dim * dim + seen * dim
        return linear, 2 * seen * keys * dim, hears

    def head_macs(self, model, n):
        return linear_macs(model.classifier) if hasattr(model, "classifier") else 0


def _projections(attn):
    return attn.convolution_projection_query, attn.convolution_projection_key, attn.convolution_projection_value


def _at_every_place(attn, whole):
    """The key's convolution with stride 1: (B, C, rows, columns)."""
    part = attn.convolution_projection_key.convolution_projection
    conv = part.convolution
    return part.normalization(F.conv2d(whole, conv.weight, None, 1, conv.padding, conv.dilation, conv.groups))
