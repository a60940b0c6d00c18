"""`to_grid` lays the tokens that are left on the map again."""

import pytest
import torch

import tpbook


@pytest.fixture
def traced(small, images):
    def run(method, **options):
        model = tpbook.prune(small(), method, keep_ratio=0.5, **options)
        with torch.no_grad(), tpbook.trace(model) as t:
            model(images(model))
        return model, t

    return run


@pytest.mark.parametrize("method", ["random", "evit", "etps"])
@pytest.mark.parametrize("fill", ["zero", "nearest", "last_seen", "host"])
def test_kept_patches_are_where_they_were(traced, method, fill):
    model, t = traced(method)
    if fill == "host" and method != "etps":
        with pytest.raises(ValueError, match="fill='host'"):
            tpbook.to_grid(t.features, t, fill)
        return
    laid = tpbook.to_grid(t.features, t, fill)
    assert laid.shape == (2, 48, 6, 6)
    flat = laid.flatten(2).transpose(1, 2)  # (B, N, C)
    for b in range(2):
        left = t.kept[-1][b]
        here = left >= 0
        assert torch.equal(flat[b, left[here]], t.features[b, here])
        for patch in set(range(36)) - set(left.tolist()):
            row = flat[b, patch]
            if fill == "zero":
                assert not row.any()
            elif fill == "host":
                assert torch.equal(row, t.features[b, left == t.host[-1][b, patch]][0])
            elif fill == "nearest":
                gap = [(p // 6 - patch // 6) ** 2 + (p % 6 - patch % 6) ** 2 for p in left[here].tolist()]
                assert torch.equal(row, flat[b, min(p for p, g in zip(left[here].tolist(), gap) if g == min(gap))])
            else:
                stage = next(s for s, kept in enumerate(t.kept) if patch not in kept[b])
                entering = torch.arange(36) if stage == 0 else t.kept[stage - 1][b]
                state = t.entered[stage][b, entering == patch]
                torch.testing.assert_close(row, model.norm(state)[0])


def test_a_dense_model_is_its_map(small, images):
    model = small()
    with torch.no_grad(), tpbook.trace(model) as t:
        model(images(model))
    laid = tpbook.to_grid(t.features, t)
    assert torch.equal(laid, t.features.transpose(1, 2).reshape(2, 48, 6, 6))


@pytest.mark.parametrize("fill", ["zero", "nearest", "last_seen", "host"])
def test_tokens_that_came_back_are_the_map(small, images, fill):
    """Evo-ViT hands all of them on, in the order of the image, so there is nothing to fill."""
    model = tpbook.prune(small(), "evovit", keep_ratio=0.5)
    with torch.no_grad(), tpbook.trace(model) as t:
        model(images(model))
    assert t.kept[-1].shape == (2, 18)
    assert torch.equal(tpbook.to_grid(t.features, t, fill).flatten(2).transpose(1, 2), t.features)


@pytest.mark.parametrize("fill", ["zero", "nearest", "last_seen"])
def test_padding_has_no_place(small, images, fill):
    """An image that keeps fewer tokens than its neighbour in the batch has the map that it has alone."""
    model = tpbook.prune(small(), "ats", keep_ratio=1.0)
    x, alone = images(model), []
    with torch.no_grad(), tpbook.trace(model) as t:
        for image in x.split(1):
            model(image)
            alone.append(tpbook.to_grid(t.features, t, fill))
        model(x)
    assert any((kept == -2).any() for kept in t.kept)
    torch.testing.assert_close(tpbook.to_grid(t.features, t, fill), torch.cat(alone), atol=2e-5, rtol=0)


def test_grad_cam(small, images):
    """As its users do it: activations of the last block's norm and their gradient, each laid on the map."""
    model, seen = tpbook.prune(small(), "etps", keep_ratio=0.5), []

    def keep(module, args, out):
        out.retain_grad()
        seen.append(out)

    model.blocks[-1].norm1.register_forward_hook(keep)
    with tpbook.trace(model) as t:
        logits = model(images(model))
    logits[:, 3].sum().backward()
    activation, gradient = (tpbook.to_grid(x[:, 1:], t, "zero") for x in (seen[0].detach(), seen[0].grad))
    cam = (activation * gradient.mean(dim=(2, 3), keepdim=True)).sum(1)  # (B, rows, columns)
    left = torch.zeros(2, 36).scatter(1, t.kept[-1], 1.0).view(2, 6, 6) > 0
    assert cam[left].abs().min() > 0 and not cam[~left].any()


def test_what_does_not_fit_is_named(traced):
    _, t = traced("random")
    with pytest.raises(ValueError, match="fill must be one of host, zero"):
        tpbook.to_grid(t.features, t, "mean")
    with pytest.raises(ValueError, match="features must be those of"):
        tpbook.to_grid(t.features[:, 1:], t, "zero")
    with pytest.raises(ValueError, match="4 × 4"):
        tpbook.to_grid(t.features, t, "zero", grid=(4, 4))
