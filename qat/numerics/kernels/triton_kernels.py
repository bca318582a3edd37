"""The GPU backend: the functions of `mx.py` as Triton kernels, bit-equal to it.

Here tensors are checked and allocated and kernels launched; `triton_device.py` holds what runs on the GPU. The kernels
are launched without fused multiply-adds, which would change bits where a product underflows and in the search rule's
sums of squares.

The module can be imported without Triton; then `is_available()` is False. With TRITON_INTERPRET=1 the kernels run,
slowly, on CPU tensors: that is how they are tested on machines without a GPU. There BF16 travels as int16, because the
interpreter of Triton 3.6 truncates to BF16 where GPUs round.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..formats import Element, Format, Quantized
from ..mx import BLOCK, FORMATS
from ..rules import mantissa_threshold
from .triton_device import (
    dequantize_kernel,
    fake_quantize_kernel,
    quantize_kernel,
    quantize_to_scale_kernel,
    tl,
    triton,
)
from .triton_launch import interpreting, launch

SERVES = tuple(FORMATS)
TRANSFORMS = True  # `fake_quantize` and `quantize` take `hadamard`, `fake_quantize` and `dequantize` take `back`
# Blocks per program and warps, by kernel: the fastest of 16 to 512 blocks and 1 to 8 warps on an H200.
_TILES = {
    "fake_quantize": (32, 2),
    "search": (32, 2),
    "quantize": (64, 1),
    "dequantize": (32, 1),
    "quantize_to_scale": (64, 1),
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache  # asking for devices takes longer than a launch
def is_available() -> bool:
    """Whether the kernels can be used here: Triton is installed and there is a GPU, or Triton's interpreter is on."""
    return triton is not None and (torch.cuda.is_available() or interpreting())


def fake_quantize(
    x: torch.Tensor,
    fmt: Format,
    rule: str,
    dtype: torch.dtype | None = None,
    hadamard: bool = False,
    back: bool = False,
) -> torch.Tensor:
    """x's nearest values on the MX grid; same arguments and bits as `mx.fake_quantize`.

    Args:
        x: [..., K] float32, bfloat16 or float16 on a GPU, K a multiple of 32.
        fmt: element format.
        rule: one of `rules.MX_RULES`.
        dtype: the view of `x` that is quantized (default: its own dtype).
        hadamard: quantize `hadamard.transform(x, dtype)`, which is computed in registers.
        back: return `hadamard.transform(values, dtype)`, computed there, too.

    Returns:
        [..., K] in `dtype`, contiguous.

    Raises:
        ValueError: an argument that MX formats or these kernels cannot take.
    """
    x, dtype = prepare(x, fmt, dtype)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    options = _options("fake_quantize", fmt.name, rule, dtype, hadamard, back)
    name = "search" if rule == "search" else "fake_quantize"
    _launch(name, fake_quantize_kernel, (x, out), x.numel() // BLOCK, options)
    return out


def quantize(
    x: torch.Tensor, fmt: Format, rule: str, dtype: torch.dtype | None = None, hadamard: bool = False
) -> Quantized:
    """Codes and biased E8M0 scales; same bytes as `mx.quantize`; arguments and errors are those of `fake_quantize`."""
    x, dtype = prepare(x, fmt, dtype)
    codes = torch.empty(fmt.code_shape(x.shape), dtype=torch.uint8, device=x.device)
    scale_e8m0_biased = torch.empty(fmt.scale_shape(x.shape), dtype=torch.uint8, device=x.device)
    tensors = (x, codes, scale_e8m0_biased)
    options = _options("quantize", fmt.name, rule, dtype, hadamard)
    _launch("quantize", quantize_kernel, tensors, scale_e8m0_biased.numel(), options, {1: torch.int32})
    return Quantized(codes, (scale_e8m0_biased,))


def dequantize(quantized: Quantized, fmt: Format, dtype: torch.dtype, back: bool = False) -> torch.Tensor:
    """The inverse of `quantize`: [..., K] in `dtype` (float32, bfloat16 or float16), as `mx.dequantize`.

    `back` as in `fake_quantize`.
    """
    codes, (scale_e8m0_biased,) = quantized.codes, quantized.scales
    shape = fmt.value_shape(codes)
    for tensor in quantized.tensors:
        check_tensor(tensor, (torch.uint8,))
    fmt.check_scales(shape, scale_e8m0_biased)
    check_dtype(dtype)
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    tensors = (codes.contiguous(), scale_e8m0_biased.contiguous(), out)
    options = _options("dequantize", fmt.name, None, dtype, None, back)
    _launch("dequantize", dequantize_kernel, tensors, scale_e8m0_biased.numel(), options)
    return out


def quantize_to_scale(
    x: torch.Tensor, scale_e8m0_biased: torch.Tensor, fmt: Format, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Codes of x under given scales; same bytes as `mx.quantize_to_scale` where NaN has the NaN scale."""
    x, dtype = prepare(x, fmt, dtype)
    check_tensor(scale_e8m0_biased, (torch.uint8,))
    fmt.check_scales(x.shape, scale_e8m0_biased)
    codes = torch.empty(fmt.code_shape(x.shape), dtype=torch.uint8, device=x.device)
    tensors = (x, scale_e8m0_biased.contiguous(), codes)
    options = _options("quantize_to_scale", fmt.name, None, dtype)
    _launch(
        "quantize_to_scale", quantize_to_scale_kernel, tensors, scale_e8m0_biased.numel(), options, {2: torch.int32}
    )
    return codes


def prepare(x: torch.Tensor, fmt: Format, dtype: torch.dtype | None) -> tuple[torch.Tensor, torch.dtype]:
    """x checked and contiguous, and the dtype it is seen in.

    Raises:
        ValueError: a dtype, device or shape that the kernels or the format cannot take.
    """
    dtype = dtype or x.dtype
    check_dtype(dtype)
    check_tensor(x, _DTYPES)
    if x.dim() == 0 or not fmt.fits(x.shape[-1]):
        raise ValueError(f"x has shape {tuple(x.shape)}; {fmt.name} cuts its last dimension into blocks of {fmt.block}")
    return x.contiguous(), dtype


def check_tensor(tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise a ValueError unless `tensor` is on a GPU in one of `dtypes`."""
    if not (tensor.is_cuda or interpreting()) or tensor.dtype not in dtypes:
        raise ValueError(
            f"the Triton kernels got a {tensor.dtype} tensor on {tensor.device}; they take GPU tensors of dtype "
            f"{', '.join(map(str, dtypes))}"
        )


def check_dtype(dtype: torch.dtype) -> None:
    """Raise a ValueError for a dtype that the kernels do not compute in."""
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype}; choose one of {', '.join(map(str, _DTYPES))}")


@functools.cache
def triton_dtype(dtype: torch.dtype) -> Any:
    """Triton's name of a dtype; int16 for BF16 in the interpreter."""
    if dtype == torch.bfloat16 and interpreting():
        return tl.int16
    return getattr(tl, str(dtype).removeprefix("torch."))


@functools.cache
def _rule(element: Element, rule: str) -> dict[str, int | float | bool]:
    """What rounding needs to know about an element format and a scale rule, as compile-time constants.

    Callers copy it.
    """
    return {
        "EMAX": element.emax,
        "EMIN": element.emin,
        "MANTISSA_BITS": element.mantissa_bits,
        "MAX_NORMAL": element.largest,
        "THRESHOLD": mantissa_threshold(element, rule),
        "SEARCH": rule == "search",
    }


@functools.cache
def _options(
    kernel: str,
    fmt: str,
    rule: str | None,
    dtype: torch.dtype,
    hadamard: bool | None = None,
    back: bool | None = None,
) -> dict[str, Any]:
    """The constants of a kernel; callers do not change them."""
    element = FORMATS[fmt].element
    options: dict[str, Any] = {"VIEW": triton_dtype(dtype)}
    if kernel != "fake_quantize":
        options["BITS"] = element.bits
    if back is not None:
        options["BACK"] = back
    if kernel == "dequantize":
        options |= {"MANTISSA_BITS": element.mantissa_bits, "BIAS_FACTOR": 2.0 ** (126 + element.emin)}
        return options | {"MAX_CODE": element.largest_code}
    options |= _rule(element, rule or "floor")
    if hadamard is not None:
        options["HADAMARD"] = hadamard
    if kernel == "quantize_to_scale":
        del options["EMAX"], options["THRESHOLD"], options["SEARCH"]
    return options


def _launch(
    name: str,
    kernel: Any,
    tensors: tuple[torch.Tensor, ...],
    blocks: int,
    options: dict[str, Any],
    views: dict[int, torch.dtype] | None = None,
) -> None:
    if blocks:
        rows, warps = _TILES[name]
        programs = triton.cdiv(blocks, rows)
        launch(kernel, (programs,), tensors, blocks, views=views or {}, ROWS=rows, num_warps=warps, **options)
