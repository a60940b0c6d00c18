"""`trace`: which tokens survived, who carries whom, and what the choice was made on.

Chapter: :doc:`/book/a-tour-of-keep-ratios`
"""

from contextlib import contextmanager

import torch

from .checks import check_name
from .families import family_of
from .mixing import enter, leave
from .record import Listening, Trace, Traced


@contextmanager
def trace(model):
    """Record what a ViT's forward does with its tokens, without changing any output::

        with tpbook.trace(model) as t:
            logits = model(images)
        t.kept[0]      # (B, n_1)

    Several forwards leave the record of the last one. A model that is not pruned gives `features`, and `visible` where
    it is masked. Compiled models are traced too.

    Args:
        model: a vision transformer of a known family, pruned or not.

    Yields:
        Trace: filled by each forward.

    Raises:
        TypeError: the model is of no known family; the message says which there are.
    """
    family = family_of(model)
    record = Trace(grid=tuple(family.grid(model)), norm=family.norm(model))
    norm, hides = record.norm, getattr(model, "patch_drop", None) if hasattr(model, "mask_ratio") else None
    if "_plan" not in norm.__dict__:
        with _listening(norm, family_of(family.inside(model)).traced, family.prefix(model)), trace(model) as record:
            yield record
        return
    inside, outer = family.inside(model), norm._plan.trace
    plans = (norm._plan, getattr(inside, "_plan", norm._plan))  # of the last map, and of all
    for plan in plans:
        plan.trace = record
    if hides is not None:
        hides.record = record
    try:
        yield record
    finally:
        for plan in plans:
            plan.trace = outer
        if hides is not None:
            hides.record = outer


@contextmanager
def _listening(norm, traced, prefix):
    enter(norm, traced, _plan=Listening(prefix))
    try:
        yield
    finally:
        leave(norm, "_plan")


FILLS = ("host", "zero", "nearest", "last_seen")


def to_grid(features, trace, fill="host", *, grid=None):
    """Lay what is left of the patches on the map again, for heads and methods that want one::

        with tpbook.trace(model) as t:
            model(images)
        tpbook.to_grid(t.features, t, fill="nearest")     # (B, C, H, W)

    Args:
        features: (B, n, C) of the tokens that are left after the last stage, in their order: `trace.features`, or their
            gradients, or what a hook saw (without prefix tokens). Fused tokens have no place and are left out.
        trace: the `Trace` of that forward.
        fill: what a patch gets whose token is gone: "host", its host's features (methods that squeeze); "zero";
            "nearest", those of the nearest patch that is left, the first of equally near ones; "last_seen", its own
            token as it entered the stage that removed it, after the last norm.
        grid: (rows, columns) of patches; None is that of the model's own image size.

    Returns:
        (B, C, rows, columns).

    Raises:
        ValueError: an unknown `fill`, "host" without hosts, or a grid or features that do not fit the trace.
    """
    check_name("fill", fill, FILLS)
    rows, columns = trace.grid if grid is None else grid
    patches, (batch, n, channels) = rows * columns, features.shape
    every = torch.arange(patches, device=features.device).expand(batch, -1)  # (B, N)
    left = trace.kept and not trace.kept[-1].shape[1] < n == patches  # else all came back, or none was removed
    kept = trace.kept[-1] if left else every  # (B, n)
    if kept.shape != (batch, n) or kept.max() >= patches:
        raise ValueError(
            f"features must be those of the {tuple(kept.shape)} tokens that are left, on a grid of {patches} patches; "
            f"got {tuple(features.shape)} and {rows} × {columns}"
        )

    def put(grid, patch, tokens):  # row N takes what has no place
        return grid.scatter(1, patch.masked_fill(patch < 0, patches).unsqueeze(-1).expand_as(tokens), tokens)

    laid = put(features.new_zeros(batch, patches + 1, channels), kept, features)
    if fill == "host" and left:
        if not trace.host:
            raise ValueError("fill='host' needs a method that squeezes tokens into hosts, and the trace has none")
        laid = laid.gather(1, trace.host[-1].unsqueeze(-1).expand(-1, -1, channels))
    elif fill == "nearest":
        place = torch.cartesian_prod(*(torch.arange(side, device=features.device) for side in (rows, columns))).float()
        alive = torch.zeros_like(laid[..., 0]).scatter(1, kept.masked_fill(kept < 0, patches), 1.0)
        alive = alive[:, :patches] > 0  # (B, N)
        away = torch.cdist(place, place).expand(batch, -1, -1).masked_fill(~alive.unsqueeze(1), torch.inf)  # (B, N, N)
        laid = laid.gather(1, away.argmin(2).unsqueeze(-1).expand(-1, -1, channels))
    elif fill == "last_seen":
        laid = torch.zeros_like(laid)
        for patch, tokens in zip((every, *trace.kept) if left else (), trace.entered):
            laid = put(laid, patch, _own_forward(trace.norm, tokens).to(laid.dtype))
        laid = put(laid, kept, features)
    return laid[:, :patches].transpose(1, 2).unflatten(2, (rows, columns))


def _own_forward(norm, x):
    """The last norm of tokens, past what traces it; where the last block stands in its place, there is none."""
    if "_last" in norm.__dict__:
        return x
    return super(Traced, norm).forward(x) if isinstance(norm, Traced) else norm(x)
