"""Eight tokens in numbers, and every method in eight lines of plain PyTorch that a pencil can follow.

The tokens are the patches of a small picture, a bird before the sky and two leaves. Each says of its patch how red, how
green and how blue it is, and how much edge there is in it. The diagrams of the book draw the same eight, the chapters
show these lines before they show the package's, and a test holds that both give the same.

Chapter: :doc:`/book/notation`
"""

import math

import torch
import torch.nn.functional as F

from ..methods.dynamicvit import ScorePredictor

NAMES = ("sky", "cloud", "head", "wing", "sky", "leaf", "leaf", "sky")
CHANNELS = ("red", "green", "blue", "edge")
# fmt: off
X = torch.tensor([  # (8, 4)
    [0.5, 0.7, 0.9, 0.0], [0.8, 0.9, 0.9, 0.2], [0.9, 0.3, 0.1, 0.8], [0.7, 0.4, 0.2, 0.5],
    [0.5, 0.6, 0.8, 0.1], [0.4, 0.6, 0.2, 0.5], [0.3, 0.6, 0.2, 0.7], [0.4, 0.7, 0.9, 0.0],
])
# fmt: on
QUERY = torch.tensor([4.0, 1.0, -2.0, 1.0])  # (4,): this class token looks for red, and away from blue
WEIGHTS = (  # of a score predictor that likes edges, and dislikes blue; its biases are zero
    torch.tensor([[0.0, 0, 0, 1], [0, 0, -1, 0], [0, 0, 0, 1], [0, 0, -1, 0]]),  # what it sees: edge, not blue, twice
    torch.tensor([[1.0, 0, -1, 0], [0, 1, 0, -1]]),  # each less its mean over the tokens
    torch.tensor([[1.0, 1]]),
    torch.tensor([[1.0], [-1]]),  # for keeping, for dropping
)
SEED = 7  # of the draw of masked fine-tuning: it hides the head


def evit(x, query):
    """EViT at ρ = ½. x: (8, 4) tokens, query: (4,) of the class token. → a (8,), kept (4,), left (5, 4)."""
    keys = torch.cat([torch.zeros(1, 4), x])  # the class token's own is zero
    a = (keys @ query / 4**0.5).softmax(dim=0)[1:]  # score: its attention
    order = a.argsort(descending=True)
    kept, others = order[:4].sort().values, order[4:]  # choose: the best four
    fused = a[others] @ x[others]  # fuse: the sum of the others, by score
    left = torch.cat([x[kept], fused[None]])
    return a, kept, left


def etps(x, a):
    """eTPS at ρ = ½. x: (8, 4) tokens, a: (8,) scores. → kept (4,), pruned (4,), host (4,), left (4, 4)."""
    order = a.argsort(descending=True)  # score and choose: as EViT
    kept, pruned = order[:4].sort().values, order[4:].sort().values
    unit = F.normalize(x, dim=1)
    c, host = (unit[pruned] @ unit[kept].T).max(dim=1)  # match: most similar
    weight = F.one_hot(host, 4).T * c.exp()  # row j: e^c for each guest of j
    total = math.e + weight.sum(dim=1, keepdim=True)
    left = (math.e * x[kept] + weight @ x[pruned]) / total  # squeeze
    return kept, pruned, kept[host], left


def dynamicvit(x, w1, w2, w3, w4):
    """DynamicViT at ρ = ½, when tested. x: (8, 4) tokens, and four weights. → p (8,), kept (4,), left (4, 4)."""
    u = F.gelu(F.layer_norm(x, (4,)) @ w1.T)  # (8, 4)
    local, everyone = u[:, :2], u[:, 2:].mean(dim=0)  # its own, all tokens'
    z = torch.cat([local, everyone.expand(8, 2)], dim=1)
    z = F.gelu(F.gelu(z @ w2.T) @ w3.T)
    p = (z @ w4.T).softmax(dim=1)[:, 0]  # score: the odds of keeping it
    kept = p.topk(4).indices.sort().values  # choose: the best four
    left = x[kept]  # the others are gone
    return p, kept, left


def tome(x):
    """ToMe with r = 3. x: (8, 4) tokens, all of size 1. → w (4,), go (3,), host (3,), left (5, 4)."""
    a, b = torch.arange(1, 8, 2), torch.arange(0, 8, 2)  # every other one
    unit = F.normalize(x, dim=1)  # the keys: here the tokens themselves
    w, partner = (unit[a] @ unit[b].T).max(dim=1)  # score: most similar key
    go, stay = w.topk(3).indices, w.topk(1, largest=False).indices  # choose
    size = torch.ones(4).index_add(0, partner[go], torch.ones(3))
    merged = x[b].index_add(0, partner[go], x[a[go]]) / size[:, None]  # mean
    left = torch.cat([x[a[stay]], merged])
    return w, a[go], b[partner[go]], left


def masked(x, seed):
    """Masked fine-tuning, r = 3/8. x: (8, 4) tokens, their positions in them. → visible (5,), left (5, 4)."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(8, generator=generator)  # no score: chance
    visible = noise.argsort()[:5]  # ⌊(1 − r)·8⌋ of them
    left = x[visible]  # the other three are not there
    return visible, left


def predictor():
    """The package's `ScorePredictor` with `WEIGHTS`."""
    network = ScorePredictor(4).requires_grad_(False)
    layers = (network.in_conv[1], network.out_conv[0], network.out_conv[2], network.out_conv[4])
    for layer, weight in zip(layers, WEIGHTS):
        layer.weight.copy_(weight)
        layer.bias.zero_()
    return network


def printed(**named):
    """What the lines found, to two decimals: a line for each (n,), one more a token for each (n, 4). → str"""
    wide = max(map(len, named))
    lines = []
    for name, found in named.items():
        for row in found.view(-1, found.shape[-1]):
            digits = "{:d}" if not found.is_floating_point() else "{:.2f}"
            lines.append(f"{name:{wide}}  " + "  ".join(digits.format(n) for n in row.tolist()))
            name = ""
    return "\n".join(lines)
