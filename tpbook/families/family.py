"""What the engine asks of a backbone.

A family knows one library's models: where the blocks are, how the two halves of a block run, and which positions must
follow the tokens. The engine knows nothing of any library; a library's names occur in its family's file alone.

A model must hold a list of blocks that its own forward calls one after another, on a sequence (B, P + N, C) whose first
P tokens are never pruned.
"""

import torch
from torch import nn


class Family:
    """Base of all families; the docstring of each method says what it answers."""

    name: str  # as errors list it
    mixin: type  # mixed into the class of a pruned model: what of its public calls needs to know
    exported = False  # whether `tpbook.export` writes it: (B, C, H, W) images to a tensor of logits

    def fits(self, model):
        """Whether this family can take the model."""
        raise NotImplementedError

    def refusal(self, model):
        """Why this model, though of the family, cannot be pruned: a sentence; or None."""
        return None

    def inside(self, model):
        """The model that gets pruned: this one, or the one that it holds, which is of another family."""
        return model

    # ---- the model

    def blocks(self, model):
        """The blocks, in order."""
        raise NotImplementedError

    def norm(self, model):
        """The module that gives the final sequence (B, P + n, C): the last norm, or the last block."""
        raise NotImplementedError

    def prefix(self, model):
        """P, the tokens before the patches: class, distillation, registers."""
        raise NotImplementedError

    def grid(self, model):
        """(rows, columns) of the N patches of an image of the model's own size."""
        raise NotImplementedError

    def width(self, model):
        """C."""
        raise NotImplementedError

    def has_class_token(self, model):
        """Whether the first token is a class token."""
        raise NotImplementedError

    def trains_learned(self, model):
        """Why a learned score cannot train on this model, a sentence; or None."""
        return None

    def places(self, model):
        """Why a score that depends on the place in the image cannot be had, a sentence; or None."""
        return None

    # ---- a block

    call = ()  # names of what a block's forward takes after the tokens, in order

    def arguments(self, args, kwargs):
        """What a block was called with besides the tokens, by name."""
        return {**dict(zip(self.call, args)), **kwargs} if args else kwargs

    def check_block(self, block):
        """Why a block has no two halves that are known, what it is and what is wanted; or None."""
        return None

    def check_attention(self, block):
        """Why a block's attention cannot be listened to; or None."""
        return None

    def positions(self, arguments, patch, prefix):
        """The arguments of a block's call, with positions gathered: `patch` (B, n) says which tokens are left.

        Args:
            arguments: dict of what the model's forward gives a block besides the tokens.
            patch: (B, n) int64, or None where every token is there still.
            prefix: P.
        """
        return arguments

    positioned = False  # whether `positions` needs `patch`
    pools_tokens = False  # whether, while a learned method trains, the last block hands `Tokens` on to the model's pool

    def first(self, block, x, mask, arguments):
        """x plus the attention half: (B, T, C) and an `AttentionMask` or None → (B, T, C)."""
        raise NotImplementedError

    def second(self, block, x):
        """x plus the MLP half: (B, T, C) → (B, T, C)."""
        raise NotImplementedError

    def hand_on(self, tokens, prefix):
        """What the last norm hands on while a learned method trains, if `pools_tokens`: `Tokens`, or (B, P + n, C)."""
        return tokens

    # ---- cost, and the image that a model wants

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

    def patch_macs(self, model):
        """MACs of one patch in `embedding`."""
        found = [module for module in self.embedding(model).modules() if isinstance(module, nn.Conv2d)]
        if len(found) != 1:
            raise TypeError(f"model must make its patches by one convolution, got {len(found)}")
        return found[0].weight.numel()

    def attention(self, block):
        """(module of the attention, width of all its heads together)."""
        return block.attn, block.attn.num_heads * block.attn.head_dim

    def mlp(self, block):
        """The module of the MLP."""
        return block.mlp

    def head_macs(self, model, n):
        """MACs after the last norm, of n patch tokens that are left."""
        raise NotImplementedError


def linear_macs(module):
    """MACs of one token through every linear layer in a module."""
    layers = [layer.weight for layer in module.modules() if isinstance(layer, nn.Linear)]
    layers += [layer.in_proj_weight for layer in module.modules() if hasattr(layer, "in_proj_weight")]
    return sum(weight.numel() for weight in layers)


def dropped_as_mean(tokens, prefix):
    """Rows of dropped tokens become the mean of the others: then the mean of all is that of the others too, exactly.

    For models that average their patches and ask nobody which ones count.

    Args:
        tokens: `Tokens`, x (B, P + n, C) and D = keep (B, n).
        prefix: P.

    Returns:
        (B, P + n, C).
    """
    x, keep = tokens.x[:, prefix:], tokens.keep.unsqueeze(-1).to(tokens.dtype)  # (B, n, C), (B, n, 1)
    mean = (x * keep).sum(dim=1, keepdim=True) / keep.sum(dim=1, keepdim=True)  # (B, 1, C)
    return torch.cat([tokens.x[:, :prefix], x * keep + mean * (1 - keep)], dim=1)
