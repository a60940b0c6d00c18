"""This package's `T2TViT`: timm's blocks behind a stem that attends."""

from .. import backbones
from ..backbones.t2t_vit import Performer
from .costs import linear_macs
from .timm_vit import TimmViT


class T2TViT(TimmViT):
    """What differs is what the stem costs."""

    name = "T2T-ViT"

    def fits(self, model):
        return isinstance(model, backbones.T2TViT)

    def embed_macs(self, model, size):
        stem, (height, width) = model.tokens_to_token, size
        return (
            mixer_macs(stem.attention1, height // 4 * (width // 4))
            + mixer_macs(stem.attention2, height // 8 * (width // 8))
            + height // 16 * (width // 16) * linear_macs(stem.project)
        )


def mixer_macs(mixer, n):
    """MACs of an attention of the stem over n tokens."""
    linear = n * linear_macs(mixer)
    if isinstance(mixer, Performer):
        m, c = mixer.w.shape  # φ(q), φ(k), φ(k)ᵀ v and its product with φ(q); φ(q) Σ φ(k)
        return linear + n * (4 * m * c + m)
    return linear + 2 * n * n * mixer.attn.proj.in_features
