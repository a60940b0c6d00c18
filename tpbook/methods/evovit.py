"""Evo-ViT (Xu et al. 2022): the tokens that are not chosen wait, and come back.

From the block before the first stage on, a score gathers what the class token looks at, block after block::

    g_j ← a_j of the first block that is heard;   then g_j ← ½ g_j + ½ a_j   for the tokens that are in the block,
    unchanged for those that wait;   a = mean over heads of softmax(q_cls Kᵀ / √d)          `Lasting`

Before each pruned block all N tokens are there again, in the order in which they came back, and the ⌊ρ·N⌋ with the
largest g go on; the others wait, as they are, until the next stage or the end of the model       `Bypass`

Two stages at blocks 4 and 8 are the official "stage-wise" way, a stage in every block from 4 on its "layer-wise" one.
The official models have no class token at their head but average all patches: timm's `global_pool="avg"`; read by the
class token, the method runs on any trained ViT. At the end the tokens stand in the order of the image again.

The official code sums over heads where we average, which changes no order. It mixes attention of sequences of different
length in g, as this does: of a waiting token g stays on the scale of all tokens, of the others it grows.

Chapter: :doc:`/book/tokens-that-come-back`
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_flag
from ..tokens import drop, retain
from .parts import Reduce, Score

DECAY = 0.5


class Waiting(NamedTuple):
    """What a stage set aside, and what was heard so far."""

    x: Tensor | None = None  # (B, w, C)
    patch: Tensor | None = None  # (B, w) int64
    heard: Tensor | None = None  # (B, N + 1) float32, g of each patch, by its number, and of what is none


class Lasting(Score):
    """The class token's attention, gathered over the blocks."""

    name, words, queries, lasting = "lasting_attention", "score: class attention, gathered over blocks", "class", True
    remembers = Waiting

    def follow(self, tokens, prefix):
        state, row = tokens.state or Waiting(), tokens.heard.row[:, prefix:]  # (B, n)
        place, n = places(tokens), tokens.host.shape[1]
        if state.heard is None:
            g = row.new_zeros(row.shape[0], n + 1).scatter(1, place, row)
        else:
            g = state.heard.scatter(1, place, DECAY * state.heard.gather(1, place) + (1 - DECAY) * row)
        return tokens.replace(state=state._replace(heard=g))

    def __call__(self, call):
        return call.tokens.state.heard.gather(1, places(call.tokens))


def places(tokens):
    """(B, n) int64, where g of each token is; all that are no patches share the last place."""
    return tokens.patch.masked_fill(tokens.patch < 0, tokens.host.shape[1])


class Bypass(Reduce):
    """The others wait, unchanged, and come back.

    Args:
        rejoin_last: whether they come back at the end of the model too (`prunecls` of the official code says not).
    """

    name, words, gone = "bypass", "the others wait", "waiting"
    rejoins, options, remembers = True, ("rejoin_last",), Waiting

    def __init__(self, rejoin_last=True):
        check_flag("rejoin_last", rejoin_last)
        self.rejoin_last = rejoin_last

    def configure(self, rejoin_last=True):
        return Bypass(rejoin_last)

    def __call__(self, tokens, order, kept, call):
        stay, wait = order[:, :kept], order[:, kept:]
        state = (tokens.state or Waiting())._replace(x=drop(call.x, wait), patch=drop(tokens.patch, wait))
        x = retain(tokens.x, stay, call.prefix)
        return tokens.replace(x=x, patch=drop(tokens.patch, stay), state=state)

    def rejoin(self, tokens, prefix, last=False):
        state = tokens.state
        if state is None or state.x is None or (last and not self.rejoin_last):
            return tokens
        patch = torch.cat([tokens.patch, state.patch], dim=1)  # (B, N)
        x = torch.cat([tokens.x, state.x], dim=1)
        if last:  # as they stand in the image
            every = torch.arange(patch.shape[1], device=patch.device).expand_as(patch)
            order = torch.zeros_like(patch).scatter(1, patch, every)
            x, patch = retain(x, order, prefix), drop(patch, order)
        return tokens.replace(x=x, patch=patch, state=state._replace(x=None, patch=None))
