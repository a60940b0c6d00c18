"""`trace`: which tokens survived, who carries whom, and what the choice was made on.

Chapter: :doc:`/book/a-tour-of-keep-ratios`
"""

from contextlib import contextmanager
from dataclasses import dataclass, field

from timm.models import VisionTransformer
from torch import Tensor


@dataclass
class Trace:
    """What the last forward inside `tpbook.trace` did. Lists that do not apply are empty.

    B images, N patches at the input, n tokens entering a stage, n_s patch tokens leaving stage s.
    """

    kept: list[Tensor] = field(default_factory=list)
    """One (B, n_s) int64 a stage, the original patch of each surviving token, in token order; −1 for a fused token."""
    host: list[Tensor] = field(default_factory=list)
    """TPS, one (B, N) int64 a stage, the original patch whose token now carries each patch; itself for kept ones."""
    scores: list[Tensor] = field(default_factory=list)
    """One (B, n) a stage, what the choice was made on, in the token order entering the stage."""
    decisions: list[Tensor] = field(default_factory=list)
    """Training a learned method, one (B, N) a stage, straight-through keep masks, cumulative, with gradient."""
    visible: Tensor | None = None
    """(B, n) int64, the patches that a masked model saw, in token order; None where it saw all."""
    features: Tensor | None = None
    """(B, n, C), the final patch tokens after the last norm, for distillation."""

    def clear(self):
        self.__init__()


@contextmanager
def trace(model):
    """Record what a ViT's forward does with its tokens, without changing any output::

        with tpbook.trace(model) as t:
            logits = model(images)
        t.kept[0]      # (B, n_1)

    Several forwards leave the record of the last one. A model that is not pruned gives `features`, and `visible` where
    it is masked.

    Args:
        model: a timm `VisionTransformer`, pruned or not.

    Yields:
        Trace: filled by each forward.

    Raises:
        TypeError: the model is no timm VisionTransformer.
    """
    if not isinstance(model, VisionTransformer):
        raise TypeError(f"model must be a timm VisionTransformer, got {type(model).__name__}")
    record, outer = Trace(), model.__dict__.get("_trace")

    def keep_features(norm, args, x):  # x (B, P + n, C)
        record.features = x[:, model.num_prefix_tokens :]

    hook = model.norm.register_forward_hook(keep_features)
    model._trace = record
    hides = model.patch_drop if hasattr(model, "mask_ratio") else None
    if hides is not None:
        hides.record = record
    try:
        yield record
    finally:
        hook.remove()
        if hides is not None:
            hides.record = outer
        model._trace = outer
        if outer is None:
            del model._trace
