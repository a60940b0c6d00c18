"""AdaViT (Meng et al. 2022), our reading: no code may be used, and what the paper leaves open is our choice.

Before each block, of patch tokens x, with a class token x_0, small linear layers say what the block leaves out::

    tokens  l_i = w·x_i + b      keep where σ(l_i) > 0.6      the others skip the block, and are there again after it
    heads   l_h = W_h·x_0 + b    on where σ(l_h) > ½          of a head that is off the output is zero
    layers  l_s = W_s·x_0 + b    on where σ(l_s) > ½          attention, MLP: where off, its residual branch is zero
    training: the decision σ((l + g − g′)/τ) > ½, τ = 5, g and g′ Gumbel noise, straight through     `gumbel_sigmoid`

In the first block all heads and both layers are on. A token that skips a block is no key there either. While it trains
all tokens run and the decisions mask them; at inference tokens that skip a block are not computed in it, in batches
padded to the longest image. Heads and layers that are off are computed and left out, as their number is the image's.

The mean of the patches stands for the class token where there is none. Biases start at 3, so that nearly all is on.
Only some blocks in `at`: then a token that skips one is back at the next of them.

Chapter: :doc:`/book/tokens-that-come-back`
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tokens import drop, retain
from .choosing import Above
from .parts import Reduce, Score

TAU, TOKEN_THRESHOLD, START = 5.0, 0.6, 3.0
HALVES = ("attention", "mlp")


class Switched(NamedTuple):
    """What is off now, and the decisions so far."""

    x: Tensor | None = None  # (B, N, C), the patch tokens as they came to the block; None after it
    heads: Tensor | None = None  # (B, H), 0 where a head of this block is off
    layers: Tensor | None = None  # (B, 2), likewise of its attention and its MLP
    all_heads: tuple = ()  # of (B, H), of every block that decides; with gradient in training
    all_layers: tuple = ()  # of (B, 2), likewise


class Decision(NamedTuple):
    """Logits of one block."""

    tokens: Tensor  # (B, n)
    heads: Tensor  # (B, H)
    layers: Tensor  # (B, 2)


class Decider(nn.Module):
    """The logits of one block.

    Args:
        dim: C.
        heads: H.
    """

    def __init__(self, dim, heads, device=None, dtype=None):
        super().__init__()
        self.token, self.head, self.layer = (
            nn.Linear(dim, of, device=device, dtype=dtype) for of in (1, heads, len(HALVES))
        )

    def init_weights(self):
        """Nearly all on."""
        for linear in self.children():
            nn.init.constant_(linear.bias, START)

    def forward(self, x, first):
        """(B, n, C) patch tokens and (B, C) class token → `Decision`."""
        return Decision(self.token(x).squeeze(-1), self.head(first), self.layer(first))


def gumbel_sigmoid(logits):
    """Zeros and ones, drawn, with the gradient of the soft sample; any shape."""
    noise = torch.rand_like(logits, dtype=torch.float32).clamp(1e-6, 1 - 1e-6).logit()  # that of two Gumbels
    soft = torch.sigmoid((logits.float() + noise) / TAU)
    return (soft > 0.5).float() + (soft - soft.detach())


class Switch(Score):
    """The token's logit, and beside it what else of the block is on."""

    name, words, learned, objective = "switch", "score: a linear layer", True, "adavit"
    every, switches, counts_heads, remembers, choose = 0, True, True, Switched, Above()
    threshold = math.log(TOKEN_THRESHOLD / (1 - TOKEN_THRESHOLD))

    def build(self, dim, heads, **dd):
        return Decider(dim, heads, **dd)

    def find(self, call):
        first = call.tokens.x[:, 0] if call.prefix else call.x.mean(dim=1)  # (B, C)
        return call.predictor(call.x, first)

    def note(self, tokens, call, training):
        decided = [gumbel_sigmoid(x) if training else (x > 0).float() for x in call.found[1:]]
        state = tokens.state or Switched()
        if call.stage:
            heads, layers = decided
            state = state._replace(all_heads=(*state.all_heads, heads), all_layers=(*state.all_layers, layers))
        else:  # all on; the layers that decide keep a gradient of zero, which training on many machines wants
            heads, layers = (1 + 0 * on for on in decided)
        return tokens.replace(state=state._replace(heads=heads, layers=layers))

    def __call__(self, call):
        return call.found.tokens

    def decide(self, call, invert):
        return call.found.tokens, gumbel_sigmoid(call.found.tokens)

    def heads(self, tokens):
        return None if tokens.state is None else tokens.state.heads

    def gate(self, tokens, x, half):
        if tokens.state is None or tokens.state.layers is None:
            return x
        on = tokens.state.layers[:, HALVES.index(half), None, None].to(x.dtype)
        return torch.lerp(tokens.x, x, on)

    def macs(self, enter, dim):
        return enter * dim

    def once(self, predictor):
        return sum(linear.weight.numel() for linear in (predictor.head, predictor.layer))


class Skip(Reduce):
    """The others skip what there is until the next stage, and come back as they were, in their places."""

    name, words, gone = "skip", "the others skip the block", "skipping"
    ordered, padded, rejoins, remembers = False, True, True, Switched

    def __call__(self, tokens, order, kept, call):
        chosen = order[:, :kept]
        x = retain(tokens.x, chosen, call.prefix)
        state = (tokens.state or Switched())._replace(x=call.x)
        return tokens.replace(x=x, patch=drop(tokens.patch, chosen), state=state)

    def masked(self, tokens, keep, call):
        return tokens.replace(keep=keep, state=(tokens.state or Switched())._replace(x=call.x))

    def rejoin(self, tokens, prefix, last=False):
        state = tokens.state
        if state is None or state.x is None:
            return tokens
        whole, n = F.pad(state.x, (0, 0, 0, 1)), state.x.shape[1]  # (B, N + 1, C), the last for padding
        place = tokens.patch.masked_fill(tokens.patch < 0, n).unsqueeze(-1).expand(-1, -1, whole.shape[2])
        x = tokens.x[:, prefix:]
        if tokens.keep is not None:
            x = torch.lerp(whole.gather(1, place), x, tokens.keep.unsqueeze(-1).to(x.dtype))
        x = whole.scatter(1, place, x)[:, :n]
        return tokens.replace(
            x=torch.cat([tokens.x[:, :prefix], x], dim=1), patch=tokens.host, keep=None, state=state._replace(x=None)
        )  # fmt: skip
