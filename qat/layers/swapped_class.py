"""Swapped classes: that of a module whose products are rounded, made of the class that it had.

transformers recognizes modules by their classes, so a quantized module keeps its own among its bases. Such a class has
no name that pickle finds; a module of it is rebuilt from the two classes that it was made of.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_CLASSES: dict[tuple[type, type, str], type[nn.Module]] = {}


def swapped_class(kind: type, original: type, prefix: str) -> type[nn.Module]:
    """The class of modules of class `original` that compute as `kind` does: one for each pair, so that types compare.

    Args:
        kind: a class of ours whose modules are made of others, such as QuantExperts.
        prefix: of the name of the class.
    """

    def reduce(self: nn.Module, protocol: Any) -> Any:
        if type(self) is not _CLASSES[kind, original, prefix]:  # another library made a subclass, as FSDP2 does
            return object.__reduce_ex__(self, protocol)
        return _rebuild, (kind, original, prefix), self.__dict__

    if (kind, original, prefix) not in _CLASSES:
        own = {"__module__": kind.__module__, "__reduce_ex__": reduce}
        _CLASSES[kind, original, prefix] = type(f"{prefix}{original.__name__}", (kind, original), own)
    return _CLASSES[kind, original, prefix]


def _rebuild(kind: type, original: type, prefix: str) -> nn.Module:
    """For pickle and copy: a module without state."""
    made = swapped_class(kind, original, prefix)
    return made.__new__(made)
