"""Scores that need no method: random, static, and attention received; a learned choice has to beat them.

Chapter: :doc:`/book/a-tour-of-keep-ratios`
"""

import torch

from .parts import Score


def random_scores(batch, n, *, device, generator=None):
    """(B, n) float32, uniform in [0, 1): every set of tokens is equally likely to be kept."""
    chance = {} if generator is None else {"generator": generator}  # torch.compile cannot trace generator=None
    return torch.rand(batch, n, device=device, **chance)


@torch.library.custom_op("tpbook::seeded_scores", mutates_args=())
def seeded_scores(seed: int, skip: int, x: torch.Tensor) -> torch.Tensor:
    """Of tokens (B, n, C) as `random_scores`, from a generator of its own, after `skip` scores an image before them.

    An operator of its own since `torch.compile` cannot trace a generator, nor `torch.jit.trace` a device.
    """
    batch, n = x.shape[:2]
    generator = torch.Generator(x.device).manual_seed(seed)
    if skip:
        torch.rand(batch, skip, device=x.device, generator=generator)
    return torch.rand(batch, n, device=x.device, generator=generator)


@seeded_scores.register_fake
def _(seed, skip, x):
    return x.new_empty(x.shape[:2], dtype=torch.float32)


def static_scores(grid, device=None):
    """The same choice for every image: patches nearer to the image centre score higher.

    Photographers put their subject in the middle, so this is the strongest choice that needs neither the image nor
    training. (DynamicViT's "static" row learns its positions; this one has nothing to learn.)

    Args:
        grid: (rows, columns) of patches.

    Returns:
        (N,) float32, minus the distance to the centre in patches.
    """
    rows, columns = (torch.arange(n, device=device) - (n - 1) / 2 for n in grid)
    return -(rows[:, None] ** 2 + columns[None, :] ** 2).sqrt().flatten()


class Random(Score):
    """Chance, anew in each forward; with a seed the same in every forward of the same shape."""

    name, words, drawn = "random", "score: chance", True

    def __call__(self, call):
        if call.seed is None:
            return random_scores(*call.x.shape[:2], device=call.x.device)
        return seeded_scores(call.seed, call.skip, call.x)


class Static(Score):
    """The patch's place in the image alone."""

    name, words, placed, settled = "static", "score: the place in the image", True, True

    def __call__(self, call):
        scores = static_scores(call.grid, call.x.device)  # (N,)
        patch = call.tokens.patch  # (B, n)
        return scores[patch.clamp(min=0)].masked_fill(patch < 0, float("-inf"))


class AttentionReceived(Score):
    """How much all tokens look at each: the mean of its column, over heads and queries.

    For models without a class token; nobody has published it as a method of its own (Evo-ViT ablates it), so it is our
    choice.
    """

    name, words, queries = "attention_received", "score: the attention it receives", "all"

    def __call__(self, call):
        return call.heard
