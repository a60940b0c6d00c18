"""ATS, adaptive token sampling (Fayyaz et al. 2022): how many tokens stay depends on the image.

Between the attention and the MLP of each pruned block, of n patch tokens::

    S_j = (Σ_h A^h_{1j}) · ‖[v¹_j; …; v^H_j]‖,   S ← S / Σ S                          `AttentionValue`
    ascending: S_(1) ≤ … ≤ S_(n);   F_j = Σ_{l ≤ j} S_(l),   F ← (F − F_1)/(F_n − F_1)
    u_k = f + (1 − f)·k/(K − 1),   k = 0 … K − 1,   f the smallest F_j > 0
    kept = {argmin_j |F_j − u_k|}, in ascending order: points that fall on the same token keep it once     `Sample`

K points are at most K tokens; an image whose attention gathers on a few tokens keeps few. The token with the least
score has F = 0 and is never drawn, so every stage removes at least one, at ρ = 1 too.

A batch is padded to its longest image (compiled, to K tokens). Padding has no part in any sum, neither here nor in the
attention (−∞ on its key), so an image's result does not depend on its batch; in the official code it does, since its
padding enters F.

K = ⌊ρ₁⋯ρ_s·N⌋, so ρ = 1 is the released setting, K = N at every stage. Fewer points are our reading: the official code
fails with them. Haurum et al. (2023) and others sample in other ways under the same name.

Chapter: :doc:`/book/a-count-for-each-image`
"""

import torch

from ..tokens import in_float32
from .parts import Choice, Choose, Score


@in_float32
def points(f, count):
    """u: (B, 1) first point and K → (B, K) float32 from f to 1."""
    steps = torch.arange(count, device=f.device) / max(1, count - 1)  # (K,)
    return f + (1 - f) * steps


@torch.no_grad()
@in_float32
def sample(scores, count, alive=None):
    """Inverse-transform sampling at fixed points.

    Args:
        scores: (B, n), at least 0.
        count: K, how many points.
        alive: (B, n) bool, the tokens that are there; None for all.

    Returns:
        order (B, k) int64, positions of the sampled tokens by ascending score, padded with others, and alive (B, k)
        bool, those that were sampled; k is the most that an image keeps.
    """
    scores = scores.float()
    if alive is not None:
        scores = scores.masked_fill(~alive, float("inf"))
    ascending, order = scores.sort(dim=1)  # (B, n) each
    there = ascending < float("inf")
    total = ascending.masked_fill(~there, 0).cumsum(dim=1)  # F, as yet from S_(1) to Σ S
    least, most = total[:, :1], total[:, -1:]
    f = (total - least) / (most - least).clamp(min=torch.finfo(torch.float32).tiny)  # F from 0 to 1
    f = f.masked_fill(~there, float("inf"))
    first = f.masked_fill(f <= 0, float("inf")).amin(dim=1, keepdim=True)  # the smallest above 0
    u = points(first.clamp(max=1), count)  # (B, K)
    after = torch.searchsorted(f, u).clamp(max=f.shape[1] - 1)  # the first with F ≥ u
    before = torch.searchsorted(f, f.gather(1, (after - 1).clamp(min=0)))  # the first of those just below
    nearest = torch.where((f.gather(1, before) - u).abs() <= (f.gather(1, after) - u).abs(), before, after)
    hit = torch.zeros_like(there).scatter(1, nearest, torch.ones_like(nearest, dtype=torch.bool))  # (B, n)
    number = hit.sum(dim=1)  # (B,)
    compiled = torch.compiler.is_compiling()  # then no shape may depend on an image
    longest = min(count, f.shape[1]) if compiled else int(number.max())
    chosen = (~hit).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]  # those hit first, in their order
    return order.gather(1, chosen), torch.arange(longest, device=order.device) < number.unsqueeze(1)


class AttentionValue(Score):
    """The class token's attention to a token, times the length of its values."""

    name, words, queries, reads = "attention_value", "score: class attention × length of the value", "class", ("norms",)

    def __call__(self, call):
        s = call.heard * call.tokens.heard.norms[:, call.prefix :]  # (B, n)
        return s / s.sum(dim=1, keepdim=True)


class Sample(Choose):
    """Those that the points fall on."""

    name, words, varies, inverts = "sample", "what ρN points fall on", True, False

    def __call__(self, call, kept, rank, others):
        alive = None if call.tokens.keep is None else call.tokens.keep > 0.5
        order, alive = sample(call.scores, kept, alive)
        alone = len(order) == 1 and not torch.compiler.is_compiling()  # an image that needs no padding
        return Choice(order, order.shape[1], None if alone else alive)
