"""transformers' PVT (v1, Wang et al. 2021): four maps with positions of their own, a class token with the last one.

    x ← x + drop_path(attention(layer_norm_1(x)))   queries W_q LN x, keys, values of LN(conv_{sr × sr, stride sr}(M))
    x ← x + drop_path(mlp(layer_norm_2(x)))         row by row
"""

import math

import torch.nn.functional as F

from .costs import convolved, linear_macs
from .family import Segment
from .grid import Grid, check_divides, heads, run, to_map
from .huggingface import PrunedHuggingFace, library_class

MODELS = ("PvtModel", "PvtForImageClassification")


class PVT(Grid):
    """PVT-Tiny to -Large."""

    name, mixin, call = "Hugging Face PVT", PrunedHuggingFace, ("height", "width", "output_attentions")

    def fits(self, model):
        return library_class(model) in MODELS

    def encoder(self, model):
        """What holds the blocks."""
        return getattr(model, "pvt", model).encoder

    def segments(self, model, size=None):
        encoder, segments, first = self.encoder(model), [], 0
        grid = self.image_size(model) if size is None else size
        for embedding, layers in zip(encoder.patch_embeddings, encoder.block):
            blocks, conv = list(layers), embedding.projection
            grid = convolved(conv, grid)
            last = layers is encoder.block[-1]
            norm = encoder.layer_norm if last else blocks[-1]
            segments.append(Segment(first, blocks, norm, int(last), grid, conv.out_channels))
            first += len(blocks)
        return segments

    def wrap(self, y):
        return (y,)

    # ---- a block

    def check_block(self, block):
        return None if library_class(block) == "PvtLayer" else f"must be a PvtLayer, got {type(block).__name__}"

    def check_attention(self, block):
        ratio = block.attention.self.sequences_reduction_ratio
        return f"needs keys that are the tokens, and a map reduced by {ratio} has others," if ratio > 1 else None

    def attend(self, block, tokens, mask, arguments):
        grid, y = (arguments["height"], arguments["width"]), block.layer_norm_1(tokens.x)
        attention, given = block.attention, (tokens, mask, grid, block._plan.prefix)
        y = run(*given, lambda: attention(y, *grid)[0], lambda: self.ours(attention, y, *given))
        return block.drop_path(y) + tokens.x

    def ours(self, attention, y, tokens, mask, grid, prefix):
        """The attention of what is left: (B, P + n, C), normed → (B, P + n, C)."""
        attn, source = attention.self, y
        if (ratio := attn.sequences_reduction_ratio) > 1:
            check_divides(grid, ratio)
            whole, mask = to_map(y[:, prefix:], tokens, grid), None
            source = attn.layer_norm(attn.sequence_reduction(whole).flatten(2).transpose(1, 2))  # (B, M, C)
        q, k, v = (heads(w(z), attn.num_attention_heads)
                   for w, z in ((attn.query, y), (attn.key, source), (attn.value, source)))  # fmt: skip
        dropout = attn.dropout.p if attn.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)  # (B, H, P + n, d)
        return attention.output(y.transpose(1, 2).flatten(2))

    def second(self, block, x):
        return x + block.drop_path(block.mlp(block.layer_norm_2(x)))

    # ---- cost

    def channels(self, model):
        return model.config.num_channels

    def image_size(self, model):
        return (model.config.image_size,) * 2

    def patch_size(self, model):
        return (math.prod(model.config.patch_sizes),) * 2

    def embeddings(self, model):
        return list(self.encoder(model).patch_embeddings)

    def projections(self, model):
        return [embedding.projection for embedding in self.embeddings(model)]

    def block_macs(self, block, seen, left, queries, grid):
        attn, dim, keys, reducing = block.attention.self, block.attention.self.hidden_size, seen, 0
        if attn.sequences_reduction_ratio > 1:
            check_divides(grid, attn.sequences_reduction_ratio)
            count = grid[0] * grid[1]
            keys, reducing = count // attn.sequences_reduction_ratio**2, count * dim * dim
        linear = 2 * seen * dim * dim + 2 * keys * dim * dim + reducing + left * linear_macs(block.mlp)
        heard = {"class": 1, "all": seen, None: 0}[queries] * keys * dim
        return linear, 2 * seen * keys * dim, heard

    def head_macs(self, model, n):
        return linear_macs(model.classifier) if hasattr(model, "classifier") else 0
