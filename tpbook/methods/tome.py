"""ToMe, token merging (Bolya et al. 2023): nothing is dropped; in every block the most similar pairs become one token.

Between the attention and the MLP of block i, of tokens x with sizes s, the number of patches that each stands for::

    A = softmax(q Kᵀ/√d + 1·(log s)ᵀ)                   proportional attention: a token of s patches counts s times
    m = mean over heads of k, unit length               the keys of this attention, of norm1(x) before it
    set A: positions 0, 2, 4, … of the whole sequence; set B: 1, 3, 5, …; prefix tokens are in neither
    host(i) = argmax_{j ∈ B} m_i·m_j,  w_i = max_{j ∈ B} m_i·m_j,   i ∈ A            `Keys`
    the r tokens of A with the largest w go; what is left: A in its order, then all of B         `Pairs`
    s'_j = s_j + Σ_{i → j} s_i,   x_j ← (s_j x_j + Σ_{i → j} s_i x_i) / s'_j           `merge`

Matching has no gradient, the averages have. No pair within A or within B is compared, so at most half can go; the next
block splits the new sequence anew. How many go is said by r (`schedule.py`), or by a keep ratio at a few blocks, as
Haurum et al. (2023) do: then ⌊ρ₁⋯ρ_s·N⌋ stay, or half where that is more, and ρ below ½ is refused.

Our choices: all prefix tokens are protected, registers too; without a class token A keeps its order as well (the
official code leaves it sorted by similarity); a model that rotates or norms its keys compares those. Pools weigh a
token by its size, attention pools too, but for those that take no mask (Hugging Face's SigLIP, open_clip's attentional
pool), which count it once. `score=` other than the pairs' chooses who goes, and each joins the kept token with the most
similar key.

Chapter: :doc:`/book/merging`
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_flag
from ..tokens import drop, in_float32, move, rows
from .parts import Choice, Choose, Reduce, Score


class Matching(NamedTuple):
    """Who would join whom."""

    joins: Tensor  # (n,) bool, whether a token is of set A
    host: Tensor  # (B, n) int64, the position of the partner of each token of A; of the others their own
    similarity: Tensor  # (B, n) float32, w of A, −∞ of the others


@torch.no_grad()
@in_float32
def match(keys, prefix):
    """The bipartite matching.

    Args:
        keys: (B, n, D), of the patch tokens.
        prefix: P, how many tokens stand before them in the sequence.

    Returns:
        `Matching`.
    """
    n, first = keys.shape[1], prefix % 2  # the first patch of A: position P + first is even
    every = torch.arange(n, device=keys.device)
    joins = (every + prefix) % 2 == 0  # (n,)
    if n < 2:
        return Matching(joins, every.expand(keys.shape[:2]), keys.new_full(keys.shape[:2], float("-inf")))
    m = unit(keys)
    similarity, partner = (m[:, first::2] @ m[:, 1 - first :: 2].transpose(1, 2)).max(dim=2)  # (B, |A|) each
    similarity, partner = F.pad(similarity, (0, 1)), F.pad(2 * partner + 1 - first, (0, 1))
    similarity = torch.where(joins, similarity[:, every // 2], float("-inf"))  # (B, n): that of its own in A
    return Matching(joins, torch.where(joins, partner[:, every // 2], every), similarity)


def unit(keys):
    """(B, n, D) of unit length, in float32."""
    return F.normalize(keys.float(), dim=-1)


@in_float32
def merge(x, size, stay, go, host, first=0):
    """Average tokens into others, by how many patches each stands for.

    What is computed is x_j + Σ_{i → j} (s_i / s'_j)(x_i − x_j): the average, and it touches only the rows that go.

    Args:
        x: (B, P + n, C).
        size: (B, n) float32, s; None while all are 1.
        stay: (B, k) int64, positions of the tokens that stay, among the n.
        go: (B, r) int64, of those that go.
        host: (B, r) int64, positions in `stay` of whom they join.
        first: P, tokens that stay in any case.

    Returns:
        (B, P + k, C) and the sizes (B, k).
    """
    size = x.new_ones(stay.shape[0], x.shape[1] - first, dtype=torch.float32) if size is None else size
    guests = size.gather(1, go)  # (B, r)
    total = size.gather(1, stay).scatter_add(1, host, guests)  # s' (B, k)
    share = (guests / total.gather(1, host)).unsqueeze(-1)  # (B, r, 1)
    step = share * (drop(x, go, first).float() - drop(x, stay.gather(1, host), first).float())  # (B, r, C)
    every = torch.cat([torch.arange(first, device=x.device).expand(stay.shape[0], -1), stay + first], dim=1)
    y = drop(x, every).float().flatten(0, 1)  # (B·(P + k), C)
    y = y.index_add_(0, rows(host, every.shape[1], first).flatten(), step.flatten(0, 1))
    return y.view(*every.shape, -1).to(x.dtype), total


class Keys(Score):
    """Minus the similarity w of a token of A to its partner: the most similar go first. Of B none goes: +∞."""

    name, words, reads = "keys", "score: the most similar key", ("keys",)

    def __init__(self):
        self.choose = Pairs()

    def find(self, call):
        return match(call.tokens.heard.keys[:, call.prefix :], call.prefix)

    def __call__(self, call):
        return -call.found.similarity

    def matching(self, enter, prefix, keys):
        of_a = (enter + 1 - prefix % 2) // 2
        return of_a * (enter - of_a) * keys


class Pairs(Choose):
    """As many of A as have to go do; what is left of A stands before B."""

    name, words, inverts = "pairs", "every other one may go", False

    def __call__(self, call, kept, rank, others):
        n, joins = call.scores.shape[1], call.found.joins
        go = rank(-call.scores, n - kept)  # (B, r)
        key = torch.arange(n, device=go.device) + n * ~joins  # A before B, each in its order
        key = key.expand_as(call.scores).scatter_add(1, go, torch.full_like(go, 2 * n))  # and what goes last
        return Choice(rank(-key, n, True), kept)


class Merge(Reduce):
    """Each of the others is averaged into the token with the most similar key.

    Args:
        proportional: whether attention weighs a token by how many patches it stands for.
    """

    name, words, gone = "merge", "each of the others joins its most similar one", "merged into"
    hosts, reads, options, least_ratio = True, ("keys",), ("proportional",), 0.5

    def __init__(self, proportional=True):
        check_flag("proportional", proportional)
        self.proportional = proportional

    def configure(self, proportional=True):
        return Merge(proportional)

    def least(self, n):
        return n - n // 2

    def matching(self, enter, kept, keys):
        return (enter - kept) * kept * keys

    def __call__(self, tokens, order, kept, call):
        stay, go = order[:, :kept], order[:, kept:]  # (B, k), (B, r)
        host = host_of(call, stay, go)  # (B, r)
        x, size = merge(tokens.x, tokens.size, stay, go, host, call.prefix)
        patch, carried = tokens.patch, tokens.host
        if patch is not None:
            ids = drop(patch, stay)
            patch, carried = ids, move(carried, patch, go, drop(ids, host))
        return tokens.replace(x=x, size=size, patch=patch, host=carried)


def host_of(call, stay, go):
    """(B, r), the positions in `stay` (B, k) of whom each of `go` (B, r) joins."""
    if isinstance(call.found, Matching):
        place = torch.zeros_like(call.found.host)
        place = place.scatter(1, stay, torch.arange(stay.shape[1], device=stay.device).expand_as(stay))
        return place.gather(1, call.found.host.gather(1, go))
    with torch.no_grad():
        m = unit(call.tokens.heard.keys[:, call.prefix :])
        return (drop(m, go) @ drop(m, stay).transpose(1, 2)).argmax(dim=2)
