"""A module gets another class, made of a mixin and its own, and gives it back: nothing is wrapped, copied or renamed.

Chapter: :doc:`/book/a-tour-of-keep-ratios`
"""

import functools


def enter(module, mixin, **attributes):
    """Put `mixin` ahead of the module's class, and set plain attributes that it needs."""
    module.__dict__.update(attributes)  # behind nn.Module's back: what is referred to is registered elsewhere
    module.__class__ = mixed(mixin, type(module))


def leave(module, *attributes):
    """Undo the last `enter`."""
    module.__class__ = type(module)._base
    for name in attributes:
        del module.__dict__[name]


@functools.cache
def mixed(mixin, base):
    """The class `base` with `mixin` ahead of it, `_base` remembered.

    It keeps the name of `base`, which Hugging Face's models write into their configuration.
    """

    def reduce(self, protocol):  # the class is made at run time, so pickle is told how
        return _empty, (mixin, base), self.__dict__

    names = {"__module__": mixin.__module__, "__qualname__": f"{mixin.__name__}({base.__name__})"}
    return type(base.__name__, (mixin, base), {"_base": base, "__reduce_ex__": reduce, **names})


def _empty(mixin, base):
    cls = mixed(mixin, base)
    return cls.__new__(cls)
