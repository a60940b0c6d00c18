"""Models whose tokens lie on a map that some operators need whole: PVT, CvT. Pruned positions are zeros there.

Each map is a `Segment`. The first block of each decides, as TPS does on hybrid ViTs; from there on the queries of the
attention and the rows of the MLP are those of the n tokens that are left. Where a convolution needs the map M of all
N = H·W positions, the tokens are put on it, at their places p, and zeros elsewhere; in training the decisions weigh::

    M_p = x_p if patch p is left, else 0          in training   M = D ⊙ x
    y   = x + attention(queries of LN x, keys and values of M(LN x))
    y   = y + MLP(LN y), its convolution on the map of the hidden units
    at the end of the map all N positions are there again, zero where a token is gone

That decisions fall in the first block of each map, that the queries get fewer and that zeros fill the map is all that
is public of TPS on PVT and CvT (notes on the paper; no code). The rest is our choice, and :doc:`/book/hybrid-vits`
measures others: zeros come after the norm, since LN(0) is its bias; each map decides anew, for all of its positions; ρ
is the same for all maps; a mean over the last map is one over the tokens that are left.
"""

import torch

from ..checks import check_name
from ..methods.parts import Place
from ..tokens import drop
from .family import Family, mean_elsewhere

REJOIN = ("zero", "host", "last_seen")


class Grid(Family):
    """Base of them. `rejoin` is what a position holds at the end of its map whose token is gone: "zero"; "host", its
    host's token (methods that squeeze); or "last_seen", its own as it was when it went."""

    positioned, options = True, ("rejoin",)

    # ---- the model: what flat models answer is asked of the last map

    def blocks(self, model):
        return [block for segment in self.segments(model) for block in segment.blocks]

    def norm(self, model):
        return self.segments(model)[-1].norm

    def prefix(self, model):
        return self.segments(model)[-1].prefix

    def grid(self, model):
        return self.segments(model)[-1].grid

    def width(self, model):
        return self.segments(model)[-1].width

    def has_class_token(self, model):
        return self.prefix(model) > 0

    def projections(self, model):
        """The convolution that begins each map."""
        raise NotImplementedError

    def embed_macs(self, model, size):
        made = zip(self.segments(model, size), self.projections(model))
        return sum(segment.grid[0] * segment.grid[1] * conv.weight.numel() for segment, conv in made)

    # ---- how it is pruned

    def default_at(self, model, method):
        return tuple(s.first for s in self.segments(model) if method.queries != "class" or s.prefix)

    def check(self, model, pruning):
        method, rejoin = pruning.method, pruning.options.get("rejoin", "zero")
        check_name("rejoin", rejoin, REJOIN)
        if rejoin == "host" and not method.reduce.hosts:
            return f"rejoin='host' needs a method that squeezes tokens into hosts, and {pruning.name} does not"
        if method.reads or method.reduce.rejoins or method.chooses.varies:
            return (
                f"{pruning.name} with score={method.score.name!r} cannot run on a {self.name}: it reads keys or values "
                "of its tokens, or brings them back, or keeps another number of each image"
            )
        if method.reduce.adds:
            return f"{pruning.name} fuses tokens into one that has no place on the map of a {self.name}"
        firsts = {segment.first: segment for segment in self.segments(model)}
        for i in pruning.at:
            segment = firsts[max(first for first in firsts if first <= i)]
            if method.queries == "class" and not segment.prefix:
                return f"at={pruning.at} must name blocks of a map with a class token, and block {i} has none"
            if method.queries and method.place is Place.BEFORE and i == segment.first:
                return f"at={pruning.at} must not name block {i}: no block of its map is before it, to hear"
        return None

    def leaving(self, tokens, plan):
        if plan.pruning.options.get("rejoin") != "last_seen":
            return tokens
        x, alive = laid(tokens, plan.prefix)
        earlier = 0 if tokens.gone is None else weigh(tokens.gone, 1 - alive)
        return tokens.replace(gone=weigh(x, alive) + earlier)

    def keeps_tokens(self, tokens):
        return True  # `hand_on` makes the map whole again

    def hand_on(self, tokens, plan):
        if is_whole(tokens, tokens.counts[0].enter, plan.prefix):
            return tokens.x
        x, alive = laid(tokens, plan.prefix)  # (B, N, C), (B, N)
        rejoin = plan.pruning.options.get("rejoin", "zero")
        if rejoin == "host":
            x = x.gather(1, tokens.host.unsqueeze(-1).expand_as(x))
        elif rejoin == "last_seen":
            x = weigh(x, alive) + weigh(tokens.gone, 1 - alive)
        elif plan.pooled:
            x = mean_elsewhere(x, alive)
        else:
            x = weigh(x, alive)
        return torch.cat([tokens.x[:, : plan.prefix], x], dim=1)


def is_whole(tokens, count, prefix):
    """Whether all `count` patches are there, none of them weighed."""
    return tokens.keep is None and tokens.x.shape[1] == prefix + count


def weigh(x, alive):
    """(B, N, C) and weights (B, N) → (B, N, C)."""
    return x * alive.unsqueeze(-1).to(x.dtype)


def laid(tokens, prefix):
    """What is left at its places (B, N, C), and (B, N): D, or 1 where something is left and 0 elsewhere."""
    x, count = tokens.x[:, prefix:], tokens.counts[0].enter
    if tokens.keep is not None:
        return x, tokens.keep
    if x.shape[1] == count:
        return x, torch.ones_like(x[..., 0])
    return put(x, tokens.patch, count), put(torch.ones_like(x[..., :1]), tokens.patch, count).squeeze(-1)


def put(x, patch, count):
    """(B, n, C) at places (B, n) of `count`, zeros elsewhere → (B, count, C)."""
    return x.new_zeros(x.shape[0], count, x.shape[2]).scatter(1, patch.unsqueeze(-1).expand_as(x), x)


def to_map(x, tokens, grid):
    """Patch tokens (B, n, C) → (B, C, rows, columns), zero where none is left; in training weighed by D."""
    count = grid[0] * grid[1]
    if tokens.keep is not None:
        x = weigh(x, tokens.keep)
    elif x.shape[1] < count:
        x = put(x, tokens.patch, count)
    return x.transpose(1, 2).unflatten(2, grid)


def from_map(x, tokens):
    """(B, C, rows, columns) → (B, n, C), the places of the patch tokens that are left."""
    x = x.flatten(2).transpose(1, 2)  # (B, N, C)
    if tokens.keep is not None or tokens.patch is None or tokens.patch.shape[1] == x.shape[1]:
        return x
    return drop(x, tokens.patch)


def heads(x, number):
    """(B, n, C) → (B, H, n, d)."""
    return x.unflatten(2, (number, -1)).transpose(1, 2)


def run(tokens, mask, grid, prefix, theirs, ours):
    """An attention: the library's where all is as it was, to the last bit, else ours; `mask` may want to hear it."""
    hears = mask is not None and mask.queries is not None
    if not is_whole(tokens, grid[0] * grid[1], prefix) or (hears and mask.graph):
        return ours()
    if hears:
        ours()
    return theirs()


def check_divides(grid, by):
    """ValueError where a reduction would cut the map's border off."""
    if any(side % by for side in grid):
        raise ValueError(
            f"the image must make maps that the attention's reduction by {by} divides, got one of {grid[0]} × {grid[1]}"
        )
