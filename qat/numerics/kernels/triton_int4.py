"""The INT4 formats on the GPU, bit-equal to `integer.py`: a program takes several blocks."""

from __future__ import annotations

from typing import Any

import torch

from ..formats import Format, Quantized
from ..integer import FORMATS
from .triton_blocks import _divide, _largest_bits, _pack, _sum_of_squares, _unpack
from .triton_device import _float, _jit, _offsets, _tile, _to_fp32, _to_view, tl, triton
from .triton_kernels import check_dtype, check_tensor, is_available, launch, prepare, triton_dtype

SERVES = tuple(FORMATS)
_VALUES, _WARPS = 512, 2  # of a program: the fastest of 512 to 2048 values and 1 to 4 warps on an H100, as is search

__all__ = ["SERVES", "dequantize", "fake_quantize", "is_available", "quantize", "quantize_to_scale"]


def fake_quantize(x: torch.Tensor, fmt: Format, rule: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Same arguments and bits as `integer.fake_quantize`, contiguous.

    Raises:
        ValueError: an argument that these kernels cannot take.
    """
    x, dtype = prepare(x, fmt, dtype)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    options = {"SEARCH": rule == "search", "GIVEN": False, "TO_CODES": False, "VIEW": triton_dtype(dtype)}
    _launch(quantize_kernel, (x, out, out), x.numel(), fmt, options)
    return out


def quantize(x: torch.Tensor, fmt: Format, rule: str, dtype: torch.dtype | None = None) -> Quantized:
    """Codes and scales; same arguments and bytes as `integer.quantize`; raises like `fake_quantize`."""
    x, dtype = prepare(x, fmt, dtype)
    scale = torch.empty(fmt.scale_shape(x.shape), dtype=torch.float32, device=x.device)
    codes = _codes(x, scale, fmt, dtype, {"SEARCH": rule == "search", "GIVEN": False})
    return Quantized(codes, (scale.bfloat16(),))  # exact: the kernel has rounded it


def quantize_to_scale(
    x: torch.Tensor, scale: torch.Tensor, fmt: Format, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Codes of x under given scales; same bytes as `integer.quantize_to_scale`."""
    x, dtype = prepare(x, fmt, dtype)
    fmt.check_scales(x.shape, scale)
    return _codes(x, scale.float().contiguous(), fmt, dtype, {"SEARCH": False, "GIVEN": True})


def dequantize(quantized: Quantized, fmt: Format, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `quantize`, as `integer.dequantize`."""
    codes, (scale,) = quantized.codes, quantized.scales
    shape = fmt.value_shape(codes)
    check_tensor(codes, (torch.uint8,))
    check_tensor(scale, (fmt.scale.storage,))
    fmt.check_scales(shape, scale)
    check_dtype(dtype)
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    tensors = (codes.contiguous(), scale.float().contiguous(), out)
    _launch(dequantize_kernel, tensors, out.numel(), fmt, {"VIEW": triton_dtype(dtype)})
    return out


def _codes(x: torch.Tensor, scale: torch.Tensor, fmt: Format, dtype: torch.dtype, options: dict) -> torch.Tensor:
    codes = torch.empty(fmt.code_shape(x.shape), dtype=torch.uint8, device=x.device)
    options |= {"TO_CODES": True, "VIEW": triton_dtype(dtype)}
    _launch(quantize_kernel, (x, codes.view(torch.int32), scale), x.numel(), fmt, options)
    return codes


def _launch(kernel: Any, tensors: tuple[torch.Tensor, ...], values: int, fmt: Format, options: dict) -> None:
    assert fmt.block is not None, fmt.name
    if blocks := values // fmt.block:
        rows = _VALUES // fmt.block
        options |= {"ROWS": rows, "SIZE": fmt.block, "num_warps": _WARPS}
        if kernel is quantize_kernel:
            options["BF16"] = triton_dtype(torch.bfloat16)
        launch(kernel, (triton.cdiv(blocks, rows),), tensors, blocks, **options)


@_jit
def _elements(x, scale, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """-8 to 7 (FP32): clamped before they are rounded, by adding and subtracting 1.5 * 2^23."""
    clamped = tl.maximum(tl.minimum(_divide(x, scale, ROWS, SIZE), 7.0), -8.0)
    return (clamped + 12582912.0) - 12582912.0


@_jit
def _scale(amax_bits, DIVISOR: tl.constexpr, BF16: tl.constexpr):
    quotient = tl.math.div_rn(_float(amax_bits), tl.zeros_like(_float(amax_bits)) + DIVISOR)
    scale = tl.maximum(_to_fp32(_to_view(quotient, BF16)), 1.1754943508222875e-38)
    return tl.where(amax_bits >= 0x7F800000, float("nan"), scale)


@_jit
def _error(x, scale, ROWS: tl.constexpr, SIZE: tl.constexpr):
    return _sum_of_squares(x - _elements(x, scale, ROWS, SIZE) * scale[:, None], ROWS, SIZE)


@_jit
def quantize_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    blocks,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    SEARCH: tl.constexpr,
    GIVEN: tl.constexpr,
    TO_CODES: tl.constexpr,
    VIEW: tl.constexpr,
    BF16: tl.constexpr,
):
    rows, exists = _tile(blocks, ROWS)
    offsets = _offsets(rows, SIZE)
    x = _to_fp32(_to_view(_to_fp32(tl.load(x_ptr + offsets, mask=exists[:, None], other=0)), VIEW))
    if GIVEN:
        scale = tl.load(scale_ptr + rows, mask=exists, other=1.0)
    else:
        amax = _largest_bits(x)
        if SEARCH:
            scale = _scale(amax, 8.0, BF16)
            least = _error(x, scale, ROWS, SIZE)
            other = _scale(amax, 7.5, BF16)
            error = _error(x, other, ROWS, SIZE)
            scale = tl.where(error < least, other, scale)
            least = tl.where(error < least, error, least)
            other = _scale(amax, 7.0, BF16)
            error = _error(x, other, ROWS, SIZE)
            scale = tl.where(error < least, other, scale)
        else:
            scale = _scale(amax, 7.5, BF16)
    elements = _elements(x, scale, ROWS, SIZE)
    if TO_CODES:
        if not GIVEN:
            tl.store(scale_ptr + rows, scale, mask=exists)
        codes = tl.where((scale == scale)[:, None], elements, 0.0).to(tl.int32) + 8
        words = tl.arange(0, SIZE // 8)
        tl.store(
            out_ptr + rows[:, None] * (SIZE // 8) + words[None, :], _pack(codes, ROWS, SIZE // 8), mask=exists[:, None]
        )
    else:
        tl.store(out_ptr + offsets, _to_view(elements * scale[:, None], VIEW), mask=exists[:, None])


@_jit
def dequantize_kernel(
    packed_ptr, scale_ptr, out_ptr, blocks, ROWS: tl.constexpr, SIZE: tl.constexpr, VIEW: tl.constexpr
):
    rows, exists = _tile(blocks, ROWS)
    elements = (_unpack(packed_ptr, rows, exists, ROWS, SIZE) - 8).to(tl.float32)
    scale = tl.load(scale_ptr + rows, mask=exists, other=0)
    out = _to_view(elements * scale[:, None], VIEW)
    tl.store(out_ptr + _offsets(rows, SIZE), out, mask=exists[:, None])
