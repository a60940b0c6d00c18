"""IA-RED² (Pan et al. 2021), our reading, since no code was published: who stays is a policy's act.

Before each pruned block a multi-head interpreter compares each patch token x_i with a learned token t, H heads of d::

    p_i = mean over heads of σ(q_h(x_i)·k_h(t)/√d + b_h)                                       `Interpreter`
    training:   a_i ~ Bernoulli(p_i),   D ← D ⊙ a, hidden by DynamicViT's mask; no gradient passes through a
    inference:  p_i > ½ stays, the others are dropped: another number of each image, in batches padded to the longest

The policy learns by REINFORCE (`losses.ia_red2`). b, which starts at 2 so that most tokens stay, is our choice, and so
is that the stages learn together: the paper trains one after the other. An image keeps its best token in any case.

Chapter: :doc:`/book/a-count-for-each-image`
"""

import torch
import torch.nn.functional as F
from torch import nn

from ..tokens import in_float32
from .choosing import Above
from .parts import Score

START, LEAST = 2.0, 1e-4


class Interpreter(nn.Module):
    """The logit of p for each token.

    Args:
        dim: C.
        heads: H, a divisor of C.
    """

    def __init__(self, dim, heads, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm, self.q, self.k = nn.LayerNorm(dim, **dd), nn.Linear(dim, dim, **dd), nn.Linear(dim, dim, **dd)
        self.token, self.bias = nn.Parameter(torch.empty(dim, **dd)), nn.Parameter(torch.empty(heads, **dd))
        self.init_weights()

    def init_weights(self):
        """Most tokens stay."""
        nn.init.trunc_normal_(self.token)
        nn.init.constant_(self.bias, START)

    def forward(self, x):
        """(B, n, C) → (B, n)."""
        heads = len(self.bias)
        q = self.q(self.norm(x)).unflatten(-1, (heads, -1))  # (B, n, H, d)
        k = self.k(self.token).unflatten(-1, (heads, -1))  # (H, d)
        return mean_logit(q, k, self.bias)


@in_float32
def mean_logit(q, k, bias):
    """logit(p): (B, n, H, d), (H, d) and (H,) → (B, n) float32."""
    product = (q.float() * k.float()).sum(dim=-1) / k.shape[-1] ** 0.5  # (B, n, H)
    return torch.sigmoid(product + bias.float()).mean(dim=-1).clamp(LEAST, 1 - LEAST).logit()


class Policy(Score):
    """The logit of the probability to stay."""

    name, words, learned, objective, counts_heads = "policy", "score: a policy's probability", True, "ia_red2", True
    choose = Above(1)

    def build(self, dim, heads, **dd):
        return Interpreter(dim, heads, **dd)

    def __call__(self, call):
        return call.predictor(call.x)

    def decide(self, call, invert):
        logits, alive = call.predictor(call.x), call.tokens.keep  # (B, n)
        with torch.no_grad():
            alive = torch.ones_like(logits) if alive is None else alive
            keep = torch.bernoulli(logits.sigmoid()) * alive
            best = logits.masked_fill(alive < 0.5, float("-inf")).argmax(dim=1)  # (B,)
            empty = keep.sum(dim=1, keepdim=True) < 0.5
            keep = (keep + empty * F.one_hot(best, keep.shape[1])).to(call.x.dtype)
        return logits, keep

    def macs(self, enter, dim):
        return enter * dim * dim

    def once(self, predictor):
        return predictor.k.weight.numel()
