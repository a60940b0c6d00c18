"""The worked example: eight tokens, eight lines a method, and the package gives the same."""

import inspect

import torch
from torch.testing import assert_close

from tpbook import METHODS
from tpbook.book import diagrams, example
from tpbook.masking import PatchMask
from tpbook.methods import evit, tome, tps
from tpbook.methods.dynamicvit import KEEP

X = example.X
PLAIN = (example.evit, example.etps, example.dynamicvit, example.tome, example.masked)


def test_each_method_takes_eight_lines_of_pytorch():
    for lines in PLAIN:
        source = inspect.getsource(lines)
        body = source.split('"""')[2].strip().splitlines()
        assert len(body) <= 9 and body[-1].strip().startswith("return")  # what it gives back is no step
        assert all(len(line) - 4 <= 76 for line in body)  # what a page shows without scrolling
        for name in ("tps", "evit", "ScorePredictor", "tome", "tpbook"):  # nothing of the package in it
            assert name not in lines.__code__.co_names


def test_scores_and_fused_token_are_those_of_the_package():
    a, kept, left = example.evit(X, example.QUERY)
    query, keys = example.QUERY.view(1, 1, 1, 4), torch.cat([torch.zeros(1, 4), X]).view(1, 1, 9, 4)
    row = evit.class_attention(query, keys, 4**-0.5)
    assert_close(a, row[0, 1:])
    assert a.sum() < 1
    others = [i for i in range(8) if i not in kept]
    order = torch.tensor([[*kept.tolist(), *others]])
    assert_close(left, evit.fuse(X[None], order, 4, a[None])[0])


def test_squeezed_tokens_are_those_of_the_package():
    a = example.evit(X, example.QUERY)[0]
    kept, pruned, host, left = example.etps(X, a)
    squeezed, to = tps.squeeze(X[None, kept], X[None, pruned])
    assert_close(left, squeezed[0])
    assert host.tolist() == kept[to[0]].tolist()


def test_the_score_predictor_is_that_of_the_package():
    p, kept, left = example.dynamicvit(X, *example.WEIGHTS)
    assert_close(p, example.predictor()(X[None])[0, :, KEEP].exp())
    assert_close(left, X[p.argsort(descending=True)[:4].sort().values])


def test_merged_tokens_are_those_of_the_package():
    w, go, host, left = example.tome(X)
    found = tome.match(X[None], prefix=1)
    assert_close(w, found.similarity[0, found.joins])
    assert found.host[0, go].tolist() == host.tolist()
    stay = torch.tensor([[*(i for i in (1, 3, 5, 7) if i not in go), 0, 2, 4, 6]])
    place = torch.tensor([[stay[0].tolist().index(h) for h in host]])
    merged, size = tome.merge(X[None], None, stay, go[None], place)
    assert_close(left, merged[0])
    assert size.tolist() == [[1, 2, 1, 2, 2]]


def test_what_is_hidden_is_what_the_package_hides():
    visible, left = example.masked(X, example.SEED)
    hide = PatchMask(3 / 8, 1, "always", example.SEED, None)
    seen = hide(torch.cat([torch.zeros(1, 4), X])[None])
    assert_close(seen[0, 1:], left)
    assert len(visible) == 5 and 2 not in visible  # of the head nothing is seen


def test_the_methods_differ_where_it_matters():
    """A leaf of middle score goes another way in each."""
    _, by_attention, fused = example.evit(X, example.QUERY)
    _, by_predictor, _ = example.dynamicvit(X, *example.WEIGHTS)
    assert 6 not in by_attention and 6 in by_predictor  # the leaf with the edge
    assert 1 in by_attention and 1 not in by_predictor  # the cloud
    _, pruned, host, _ = example.etps(X, example.evit(X, example.QUERY)[0])
    assert host[pruned.tolist().index(6)] == 5  # squeezed into the other leaf
    assert 6 in example.tome(X)[2]  # and where tokens merge, it is the host
    assert fused[-1].norm() < X.norm(dim=1).min() / 3


def test_no_choice_hangs_by_a_rounding():
    """With two decimals everybody chooses as the lines do."""
    for method in ("evit", "dynamicvit", "tome"):
        call, kept, others = diagrams.choice(METHODS[method], 0.7 if method == "tome" else 0.5)
        scores = call.scores[0].exp() if method == "dynamicvit" else call.scores[0]
        least, most = scores[kept].min(), scores[others].max()
        assert (least * 100).round() > (most * 100).round()


def test_printed():
    said = example.printed(a=torch.tensor([0.054, 1.0]), kept=torch.tensor([1]), left=torch.eye(2))
    assert said == "a     0.05  1.00\nkept  1\nleft  1.00  0.00\n      0.00  1.00"
