"""What a backbone costs, and which images it wants.

A linear layer costs its weights once a token, attention 2·T²·C; norms and additions are free.

Chapter: :doc:`/book/where-the-cost-is`
"""

import math

from torch import nn


class Costed:
    """What `tpbook.flops` asks of a `Family`."""

    def channels(self, model):
        """Of the image."""
        raise NotImplementedError

    def image_size(self, model):
        """(height, width) in pixels, the model's own."""
        raise NotImplementedError

    def patch_size(self, model):
        """(height, width) in pixels."""
        raise NotImplementedError

    def resized(self, model, size):
        """A model that takes images of (height, width) pixels, perhaps a copy."""
        raise ValueError(f"image_size must be {self.image_size(model)} or None for a {self.name}, got {size}")

    def at_size(self, model, image_size):
        """The model for that input size, an int, (height, width) or None for its own; and the size.

        Raises:
            ValueError: the image does not cut into whole patches, or the model has one size.
        """
        own, patch = self.image_size(model), self.patch_size(model)
        if image_size is None:
            return model, own
        size = tuple(image_size) if isinstance(image_size, (tuple, list)) else (image_size, image_size)
        if len(size) != 2 or any(not isinstance(s, int) or s <= 0 or s % p for s, p in zip(size, patch)):
            raise ValueError(f"image_size must be one or two multiples of the patch size {patch}, got {image_size!r}")
        return (model if size == own else self.resized(model, size)), size

    def embedding(self, model):
        """The module that makes patch tokens."""
        raise NotImplementedError

    def embeddings(self, model):
        """All of them, where there are several."""
        return [self.embedding(model)]

    def embed_macs(self, model, size):
        """MACs of all patches of an image of (height, width) pixels."""
        return math.prod(self.segments(model, size)[0].grid) * self.patch_macs(model)

    def patch_macs(self, model):
        """MACs of one patch in `embedding`."""
        found = [module for module in self.embedding(model).modules() if isinstance(module, nn.Conv2d)]
        if len(found) != 1:
            raise TypeError(f"model must make its patches by one convolution, got {len(found)}")
        return found[0].weight.numel()

    def block_macs(self, block, seen, left, queries, grid):
        """MACs of a block, by kind, as the function `block_macs`; `grid` is (rows, columns) of its map."""
        attention, width = self.attention(block)
        return block_macs(seen, left, queries, linear_macs(attention), width, linear_macs(self.mlp(block)))

    def attention(self, block):
        """(module of the attention, width of all its heads together)."""
        return block.attn, block.attn.num_heads * block.attn.head_dim

    def heads(self, block):
        """H."""
        return self.attention(block)[1] // self.head_dim(block)

    def head_dim(self, block):
        """D, of one head."""
        attention, width = self.attention(block)
        return width // attention.num_heads

    def mlp(self, block):
        """The module of the MLP."""
        return block.mlp

    def head_macs(self, model, n):
        """MACs after the last norm, of n patch tokens that are left."""
        raise NotImplementedError


def block_macs(seen, left, queries, attention, width, mlp):
    """MACs of a block, by kind. Plain arithmetic: `tpbook.book.cost` hands it symbols.

    Args:
        seen, left: tokens that its attention sees and that its MLP gets, prefix tokens among them.
        queries: whose rows of QKᵀ a method reads besides: "class", "all" or None.
        attention, mlp: MACs of one token through the linear layers of each.
        width: of all heads together.

    Returns:
        Linear layers; QKᵀ and AV; the rows.
    """
    rows = {"class": 1, "all": seen, None: 0}[queries]
    return seen * attention + left * mlp, 2 * seen * seen * width, rows * seen * width


def prepared_size(model):
    """(height, width) that a model of any size is prepared for, in pixels, where timm's `pretrained_cfg` says it."""
    return tuple((getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))[1:])


def convolved(conv, grid):
    """(rows, columns) of what a convolution makes of a map."""
    sides = zip(grid, conv.kernel_size, conv.stride, conv.padding)
    return tuple((side + 2 * padding - kernel) // stride + 1 for side, kernel, stride, padding in sides)


def linear_macs(module):
    """MACs of one token through every linear layer in a module."""
    layers = [layer.weight for layer in module.modules() if isinstance(layer, nn.Linear)]
    layers += [layer.in_proj_weight for layer in module.modules() if hasattr(layer, "in_proj_weight")]
    return sum(weight.numel() for weight in layers)
