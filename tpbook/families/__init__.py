"""Which backbones can be pruned, one small file each. What a file says of its backbone is in `family.py`.

Chapter: :doc:`/book/a-tour-of-keep-ratios`
"""

from .family import Family
from .registry import FAMILIES, family_of, is_known, register_family

__all__ = ["FAMILIES", "Family", "family_of", "is_known", "register_family"]
