"""Which family a model is, or why it is none. A family is imported when its library has been."""

import importlib
import sys

from torch import nn

from .family import Family

# library → the families of its models, the more special first: (file of this folder, class)
FAMILIES = {
    "timm": [
        ("lvvit", "LVViT"), ("t2t_vit", "T2TViT"), ("ps_vit", "PSViT"), ("timm_vit", "TimmViT"), ("eva", "Eva"),
        ("beit", "Beit"), ("naflex", "NaFlex"), ("pvt", "PVTv2"), ("fast_swin", "FastSwin"),
        ("fast_convnext", "FastConvNeXt"),
    ],
    "transformers": [
        ("huggingface", "HuggingFace"), ("huggingface", "DINOv3"), ("timm_wrapper", "TimmWrapper"), ("hf_pvt", "PVT"),
        ("hf_cvt", "CvT"),
    ],
    "torchvision": [("torchvision_vit", "TorchvisionViT")],
    "open_clip": [("open_clip_tower", "OpenClipTower"), ("open_clip_tower", "OpenClipTimmTower")],
}  # fmt: skip
_added = []


def register_family(family):
    """Make models of another library known.

    Args:
        family: a `Family`; it is asked before those that come with the package.

    Raises:
        TypeError: it is no `Family`.
    """
    if not isinstance(family, Family):
        raise TypeError(f"family must be a Family, got {family!r}")
    _added.insert(0, family)


def family_of(model):
    """The family of a model.

    Raises:
        TypeError: it is of none, or of one that cannot be pruned as it is; the message says why, or which there are.
    """
    for family in known() if isinstance(model, nn.Module) else ():
        if family.fits(model):
            if why := family.refusal(model):
                raise TypeError(f"model {type(model).__name__} {why}")
            return family
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    there = ", ".join(family.name for family in known())
    raise TypeError(f"model must be of a known family ({there}; see tpbook.families), got {kind}")


def is_known(model):
    """Whether `family_of` knows it."""
    return isinstance(model, nn.Module) and any(f.fits(model) and not f.refusal(model) for f in known())


def known():
    """All families whose library has been imported, those that were registered first."""
    yield from _added
    for library, families in FAMILIES.items():
        if library in sys.modules:
            for file, name in families:
                yield _family(file, name)


def _family(file, name, made={}):  # noqa: B006, one of each
    if name not in made:
        made[name] = getattr(importlib.import_module(f".{file}", __package__), name)()
    return made[name]
