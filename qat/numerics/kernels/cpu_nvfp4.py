"""NVFP4 on the CPU: see `cpu_nvfp4.hpp`."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch

from ..formats import Format, Quantized
from ..nvfp4 import BLOCK, FORMATS, tensor_divisor
from .cpu_library import check_dtype, check_tensor, empty, function, is_available, prepare

SERVES = tuple(FORMATS)
_RULES = {"absmax": 0, "absmax_native": 1, "search": 2}

__all__ = ["SERVES", "dequantize", "fake_quantize", "is_available", "quantize", "quantize_to_scale"]


def fake_quantize(
    x: torch.Tensor, fmt: Format, rule: str, dtype: torch.dtype | None = None, divisor: torch.Tensor | None = None
) -> torch.Tensor:
    """Same arguments and bits as `nvfp4.fake_quantize`, contiguous.

    Raises:
        ValueError: an argument that these kernels cannot take.
    """
    x, dtype = prepare(x, fmt, dtype)
    divisor = _of(x, dtype) if divisor is None else divisor
    out = empty(x.shape, dtype)
    run = function("nvfp4_fake_quantize", (x.dtype, dtype), 2, ctypes.c_int64, ctypes.c_float, *[ctypes.c_int] * 2)
    for pointers, blocks, own in _parts(x.numel() // BLOCK, divisor, x, out):
        run(*pointers, blocks, own, _RULES[rule], torch.get_num_threads())
    return out


def quantize(
    x: torch.Tensor, fmt: Format, rule: str, dtype: torch.dtype | None = None, divisor: torch.Tensor | None = None
) -> Quantized:
    """Codes and scales; same arguments and bytes as `nvfp4.quantize`; raises like `fake_quantize`."""
    x, dtype = prepare(x, fmt, dtype)
    divisor = _of(x, dtype) if divisor is None else divisor
    codes, scale = empty(fmt.code_shape(x.shape), torch.uint8), empty(fmt.scale_shape(x.shape), torch.float8_e4m3fn)
    run = function("nvfp4_quantize", (x.dtype, dtype), 3, ctypes.c_int64, ctypes.c_float, *[ctypes.c_int] * 2)
    for pointers, blocks, own in _parts(x.numel() // BLOCK, divisor, x, codes, scale):
        run(*pointers, blocks, own, _RULES[rule], torch.get_num_threads())
    return Quantized(codes, (scale, divisor))


def quantize_to_scale(
    x: torch.Tensor,
    scale: torch.Tensor,
    fmt: Format,
    dtype: torch.dtype | None = None,
    divisor: torch.Tensor | None = None,
) -> torch.Tensor:
    """Codes of x under given scales; same bytes as `nvfp4.quantize_to_scale` where NaN has the NaN scale."""
    x, dtype = prepare(x, fmt, dtype)
    fmt.check_scales(x.shape, scale)
    scale, divisor = scale.contiguous(), _of(x, dtype) if divisor is None else divisor
    codes = empty(fmt.code_shape(x.shape), torch.uint8)
    run = function("nvfp4_quantize_to_scale", (x.dtype, dtype), 3, ctypes.c_int64, ctypes.c_float, ctypes.c_int)
    for pointers, blocks, own in _parts(x.numel() // BLOCK, divisor, x, scale, codes):
        run(*pointers, blocks, own, torch.get_num_threads())
    return codes


def dequantize(quantized: Quantized, fmt: Format, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `quantize`, as `nvfp4.dequantize`."""
    codes, (scale, divisor) = quantized.codes, quantized.scales
    shape = fmt.value_shape(codes)
    check_tensor(codes, (torch.uint8,))
    check_tensor(scale, (fmt.scale.storage,))
    fmt.check_scales(shape, scale)
    check_dtype(dtype)
    codes, scale = codes.contiguous(), scale.contiguous()
    out = empty(shape, dtype)
    run = function("nvfp4_dequantize", (dtype,), 3, ctypes.c_int64, ctypes.c_float, ctypes.c_int)
    for pointers, blocks, own in _parts(scale.numel(), divisor, codes, scale, out):
        run(*pointers, blocks, own, torch.get_num_threads())
    return out


def _parts(blocks: int, divisor: torch.Tensor, *tensors: torch.Tensor) -> Iterator[tuple[tuple[int, ...], int, float]]:
    """Addresses, number of blocks and divisor of each run of blocks that has one divisor; none without blocks."""
    own = blocks // divisor.numel()
    for i, value in enumerate(divisor.tolist() if own else ()):
        yield tuple(t.data_ptr() + i * (t.nbytes // divisor.numel()) for t in tensors), own, value


def _of(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor_divisor(x.abs().max().to(dtype) if x.numel() else x.new_zeros(()))
