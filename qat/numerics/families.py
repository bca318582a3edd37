"""Every format by name, and the module of its family; modules are discovered, so a new family is one new file.

A family is a module of this package with a dictionary FORMATS and the functions

    quantize(x, fmt, rule, dtype) -> Quantized          x [..., K], seen in `dtype` (None: its own)
    dequantize(quantized, fmt, dtype) -> Tensor         [..., K] in `dtype`
    fake_quantize(x, fmt, rule, dtype) -> Tensor        dequantize(quantize(x)), bit for bit
    quantize_to_scale(x, scale, fmt, dtype) -> Tensor   the codes of x under given scales
    saturates(x, quantized, fmt) -> Tensor              bool [..., K]: which values exceed the largest of their block
    broken_blocks(quantized, fmt) -> Tensor             how many blocks are NaN because they held NaN or infinity

Formats with a tensor scale have `tensor_divisor(amax) -> Tensor` as well, FP32 [1]; the functions `quantize`,
`fake_quantize` and `quantize_to_scale` take such a `divisor` at the end (default: that of x). All of it is plain
PyTorch: the executable specification with which kernels are compared, bit for bit.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import ModuleType

from .formats import Format


@cache
def families() -> dict[str, ModuleType]:
    """The family of each format, by the format's name."""
    import qat.numerics as package

    found: dict[str, ModuleType] = {}
    for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(info.name) if info.name not in (__name__, f"{package.__name__}.ops") else None
        found |= dict.fromkeys(getattr(module, "FORMATS", {}), module)
    return found


def formats() -> dict[str, Format]:
    """Every format by name."""
    return {name: module.FORMATS[name] for name, module in families().items()}


def get_format(name: str) -> Format:
    """The format called `name`.

    Raises:
        ValueError: there is none.
    """
    module = families().get(name)
    if module is None:
        raise ValueError(f"format {name!r} is unknown; choose one of {', '.join(families())}")
    return module.FORMATS[name]


def family_of(fmt: Format) -> ModuleType:
    """The module with the plain functions of `fmt`."""
    return families()[fmt.name]
