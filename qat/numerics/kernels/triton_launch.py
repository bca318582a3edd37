"""Launches of Triton kernels, with as little work for the processor as possible.

Triton binds the arguments of each call anew and looks for the kernel that was compiled for them, which takes longer
than the launch itself. What it looks at does not change from one call of a layer to the next: dtypes, whether pointers
are aligned, and whether integers are 1 or multiples of 16. So a compiled kernel is kept under these and is called
directly. On AMD's GPUs Triton compiles for the size of a tensor's memory, too; there it binds each call.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any

import torch

_ALIGNMENT = 16  # bytes, and what integers are divided by
_BINDS_EACH_CALL = torch.version.hip is not None
_NO_VIEWS: Mapping[int, torch.dtype] = {}
_BYTES = (torch.float8_e4m3fn, torch.float8_e5m2)
_compiled: dict[tuple, tuple[Any, tuple]] = {}


@functools.cache
def interpreting() -> bool:
    """Whether Triton's interpreter is on."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: tuple[torch.Tensor, ...],
    *numbers: float,
    views: Mapping[int, torch.dtype] = _NO_VIEWS,
    **options: Any,
) -> None:
    """Start `kernel` on the device of its tensors, without fused multiply-adds.

    Args:
        tensors, numbers: the kernel's first parameters, in its order.
        views: which tensors, by position, the kernel sees in another dtype, the same for the same constants. Tensors in
            FP8 it sees as bytes.
        options: the kernel's constants, and Triton's options.
    """
    if interpreting():
        _start(kernel, grid, tensors, numbers, views, options)
        return
    index = tensors[0].get_device()
    if index != torch.cuda.current_device():
        with torch.cuda.device(index):
            launch(kernel, grid, tensors, *numbers, views=views, **options)
        return
    dtypes, bits = [], 0
    for tensor in tensors:
        dtypes.append(tensor.dtype)
        bits |= tensor.data_ptr()
    if bits % _ALIGNMENT or _BINDS_EACH_CALL:
        _start(kernel, grid, tensors, numbers, views, options)
        return
    key = (kernel, index, *dtypes, *map(_kind, numbers), *options.items())
    found = _compiled.get(key)
    if found is None:
        compiled = _start(kernel, grid, tensors, numbers, views, options)
        _compiled[key] = compiled, _constants(kernel, len(tensors) + len(numbers), options)
        return
    compiled, constants = found
    compiled[grid if len(grid) == 3 else (*grid, 1, 1)[:3]](*tensors, *numbers, *constants)


def _start(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: tuple[torch.Tensor, ...],
    numbers: tuple[float, ...],
    views: Mapping[int, torch.dtype],
    options: dict[str, Any],
) -> Any:
    """Launch by Triton's own binding; the compiled kernel."""
    seen = [_viewed(tensor, views.get(i)) for i, tensor in enumerate(tensors)]
    compiled = kernel[grid](*seen, *numbers, enable_fp_fusion=False, **options)
    return compiled.result() if hasattr(compiled, "result") else compiled


def _viewed(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if tensor.dtype in _BYTES:
        dtype = torch.uint8
    elif tensor.dtype == torch.bfloat16 and interpreting():
        dtype = torch.int16
    return tensor if dtype is None else tensor.view(dtype)


def _constants(kernel: Any, given: int, options: dict[str, Any]) -> tuple:
    """The values of the kernel's parameters after the first `given`."""
    return tuple(options.get(parameter.name, parameter.default) for parameter in kernel.params[given:])


def _kind(number: float) -> object:
    """What Triton compiles for: all floats alike; integers by width, whether they are 1, and a multiple of 16."""
    if isinstance(number, float):
        return float
    return number if number == 1 else (number % _ALIGNMENT == 0, -(2**31) <= number < 2**31, number < 2**63)
