"""DPC-KNN (Zeng et al. 2022, as Haurum et al. 2023 run it): clusters by density, each of which becomes its mean.

Before each pruned block, of n patch tokens x of C channels, with no attention and no class token::

    d_ij = ‖x_i − x_j‖ / √C
    ρ_i = exp(−mean of d_ij² over the 5 nearest j, i itself among them)               how dense it is around i
    δ_i = min of d_ij over the denser j; of the densest the largest distance there is   how far the next denser one is
    centres: the ⌊ρ₁⋯ρ_s·N⌋ tokens of the largest ρ_i δ_i                             `Density`
    every other token goes to its nearest centre; y_k = mean of cluster k               `Cluster`

Weights are equal. The official code adds noise of 1e-6 to ρ_i, in eval mode too, against ties; ours does not: of tokens
as dense as each other the earlier one counts as the denser.

Chapter: :doc:`/book/merging`
"""

import torch
import torch.nn.functional as F

from ..tokens import drop, in_float32, move, rows
from .parts import Reduce, Score


@in_float32
def distances(x, y):
    """d: (B, n, C), (B, k, C) → (B, n, k) float32."""
    return torch.cdist(x.float(), y.float()) / x.shape[-1] ** 0.5


def density(d, neighbors=5):
    """How dense it is around each token: distances (B, n, n) → (B, n)."""
    d = F.pad(d, (0, neighbors), value=float("inf"))  # where there are fewer
    nearest = d.topk(neighbors, dim=-1, largest=False).values  # (B, n, 5)
    there = nearest < float("inf")
    return (-nearest.square().masked_fill(~there, 0).sum(dim=-1) / there.sum(dim=-1)).exp()


def separation(d, dense):
    """How far the next denser token is: distances (B, n, n), densities (B, n) → (B, n)."""
    place = torch.arange(d.shape[1], device=d.device)
    denser = dense.unsqueeze(1) > dense.unsqueeze(2)  # (B, n, n): whether j is denser than i
    same = (dense.unsqueeze(1) == dense.unsqueeze(2)) & (place.unsqueeze(0) < place.unsqueeze(1))
    away = d.masked_fill(~(denser | same), float("inf")).amin(dim=2)  # (B, n)
    return torch.where(away.isinf(), d.amax(dim=(1, 2)).unsqueeze(1), away)


class Density(Score):
    """ρδ: a centre of a cluster is dense, and far from what is denser."""

    name, words = "density", "score: density × distance to the next denser one"

    def find(self, call):
        with torch.no_grad():
            return distances(call.x, call.x)  # (B, n, n)

    def __call__(self, call):
        dense = density(call.found)
        return dense * separation(call.found, dense)


class Cluster(Reduce):
    """Each of the others joins its nearest centre; a cluster becomes the mean of its tokens."""

    name, words, gone = "cluster", "each cluster becomes its mean", "clustered with"
    hosts = True

    def __call__(self, tokens, order, kept, call):
        centre, other = order[:, :kept], order[:, kept:]  # (B, k), (B, n − k)
        if torch.is_tensor(call.found):
            pick = call.found.gather(1, other.unsqueeze(-1).expand(-1, -1, call.found.shape[2]))
            near = pick.gather(2, centre.unsqueeze(1).expand(-1, other.shape[1], -1))  # (B, n − k, k)
        else:
            with torch.no_grad():
                near = distances(drop(call.x, other), drop(call.x, centre))
        host = near.argmin(dim=2)  # (B, n − k)
        x, patch, carried = mean(call.x, centre, other, host), tokens.patch, tokens.host
        if patch is not None:
            ids = drop(patch, centre)
            patch, carried = ids, move(carried, patch, other, drop(ids, host))
        return tokens.replace(x=torch.cat([tokens.x[:, : call.prefix], x], dim=1), patch=patch, host=carried)


@in_float32
def mean(x, centre, other, host):
    """Means of clusters: x (B, n, C), centres (B, k), the others (B, p) and where in `centre` they go → (B, k, C)."""
    to = rows(host, centre.shape[1]).flatten()
    total = drop(x, centre).float().flatten(0, 1)
    total = total.index_add(0, to, drop(x, other).float().flatten(0, 1))
    number = x.new_ones(total.shape[0], 1, dtype=torch.float32)
    number = number.index_add(0, to, number.new_ones(to.shape[0], 1))
    return (total / number).view(*centre.shape, -1).to(x.dtype)
