"""The GPU backend: the functions of `reference.py` as Triton kernels, bit-equal to it.

Here tensors are checked and allocated and kernels launched; `triton_device.py` holds what runs on the GPU. The kernels
are launched without fused multiply-adds, which would change bits where a product underflows and in the search rule's
sums of squares.

The module can be imported without Triton; then `is_available()` is False. With TRITON_INTERPRET=1 the kernels run,
slowly, on CPU tensors: that is how they are tested on machines without a GPU. There BF16 travels as int16, because the
interpreter of Triton 3.6 truncates to BF16 where GPUs round.
"""

from __future__ import annotations

import contextlib
import os

import torch

from ..formats import BLOCK_SIZE, MXFormat, check_scale_shape, mantissa_threshold
from .triton_device import (
    dequantize_kernel,
    fake_quantize_kernel,
    quantize_kernel,
    quantize_to_scale_kernel,
    tl,
    triton,
)

# Blocks per program and warps, by kernel: the fastest of 16 to 512 blocks and 1 to 8 warps on an H200.
_TILES = {"fake_quantize": (32, 2), "quantize": (64, 1), "dequantize": (32, 1), "quantize_to_scale": (64, 1)}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_available() -> bool:
    """Whether the kernels can be used here: Triton is installed and there is a GPU, or Triton's interpreter is on."""
    return triton is not None and (torch.cuda.is_available() or _interpreting())


def fake_quantize(x: torch.Tensor, fmt: MXFormat, rule: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """x's nearest values on the MX grid; same arguments and bits as `reference.fake_quantize`.

    Args:
        x: [..., K] float32, bfloat16 or float16 on a GPU, K a multiple of 32.
        fmt: element format.
        rule: scale rule, see `formats.SCALE_RULES`.
        dtype: the view of `x` that is quantized (default: its own dtype).

    Returns:
        [..., K] in `dtype`, contiguous.

    Raises:
        ValueError: an argument that MX formats or these kernels cannot take.
    """
    x, dtype = _prepare(x, dtype)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    options = {**_rule(fmt, rule), "VIEW": _triton_dtype(dtype)}
    _launch("fake_quantize", fake_quantize_kernel, (x, out), x.numel() // BLOCK_SIZE, options)
    return out


def quantize(
    x: torch.Tensor, fmt: MXFormat, rule: str, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed codes, uint8 [..., K * fmt.bits / 8], and biased E8M0 scales, uint8 [..., K / 32].

    Same arguments and bytes as `reference.quantize`; raises like `fake_quantize`.
    """
    x, dtype = _prepare(x, dtype)
    *rows, columns = x.shape
    packed = torch.empty((*rows, columns * fmt.bits // 8), dtype=torch.uint8, device=x.device)
    scale_e8m0_biased = torch.empty((*rows, columns // BLOCK_SIZE), dtype=torch.uint8, device=x.device)
    options = {**_rule(fmt, rule), "BITS": fmt.bits, "MAX_CODE": _max_code(fmt), "VIEW": _triton_dtype(dtype)}
    tensors = (x, packed.view(torch.int32), scale_e8m0_biased)
    _launch("quantize", quantize_kernel, tensors, scale_e8m0_biased.numel(), options)
    return packed, scale_e8m0_biased


def dequantize(
    packed: torch.Tensor, scale_e8m0_biased: torch.Tensor, fmt: MXFormat, dtype: torch.dtype
) -> torch.Tensor:
    """The inverse of `quantize`: [..., K] in `dtype` (float32, bfloat16 or float16), as `reference.dequantize`."""
    *rows, blocks = scale_e8m0_biased.shape
    if packed.shape != (*rows, blocks * fmt.packed_bytes_per_block):
        raise ValueError(
            f"packed is {tuple(packed.shape)}; scales {tuple(scale_e8m0_biased.shape)} of {fmt.name} need "
            f"{(*rows, blocks * fmt.packed_bytes_per_block)}"
        )
    for tensor in (packed, scale_e8m0_biased):
        _check_tensor(tensor, (torch.uint8,))
    _check_dtype(dtype)
    out = torch.empty((*rows, blocks * BLOCK_SIZE), dtype=dtype, device=packed.device)
    tensors = (packed.contiguous(), scale_e8m0_biased.contiguous(), out)
    options = {"BITS": fmt.bits, "MAX_CODE": _max_code(fmt), "MANTISSA_BITS": fmt.mantissa_bits}
    options |= {"BIAS_FACTOR": 2.0 ** (126 + fmt.emin), "VIEW": _triton_dtype(dtype)}
    _launch("dequantize", dequantize_kernel, tensors, scale_e8m0_biased.numel(), options)
    return out


def quantize_to_scale(
    x: torch.Tensor, scale_e8m0_biased: torch.Tensor, fmt: MXFormat, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Codes of x under given scales; same bytes as `reference.quantize_to_scale` where NaN has the NaN scale."""
    x, dtype = _prepare(x, dtype)
    _check_tensor(scale_e8m0_biased, (torch.uint8,))
    check_scale_shape(x, scale_e8m0_biased)
    scale = scale_e8m0_biased.contiguous()
    packed = torch.empty((*x.shape[:-1], x.shape[-1] * fmt.bits // 8), dtype=torch.uint8, device=x.device)
    options = {"EMIN": fmt.emin, "MANTISSA_BITS": fmt.mantissa_bits, "MAX_NORMAL": fmt.max_normal}
    options |= {"BITS": fmt.bits, "MAX_CODE": _max_code(fmt), "VIEW": _triton_dtype(dtype)}
    tensors = (x, scale, packed.view(torch.int32))
    _launch("quantize_to_scale", quantize_to_scale_kernel, tensors, scale.numel(), options)
    return packed


def _prepare(x: torch.Tensor, dtype: torch.dtype | None) -> tuple[torch.Tensor, torch.dtype]:
    dtype = dtype or x.dtype
    _check_dtype(dtype)
    _check_tensor(x, _DTYPES)
    if x.dim() == 0 or x.shape[-1] % BLOCK_SIZE:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last dimension must be a multiple of {BLOCK_SIZE}")
    return x.contiguous(), dtype


def _check_tensor(tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not (tensor.is_cuda or _interpreting()) or tensor.dtype not in dtypes:
        raise ValueError(
            f"the Triton kernels got a {tensor.dtype} tensor on {tensor.device}; they take GPU tensors of dtype "
            f"{', '.join(map(str, dtypes))}"
        )


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype}; choose one of {', '.join(map(str, _DTYPES))}")


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_dtype(dtype: torch.dtype):
    if dtype == torch.bfloat16 and _interpreting():
        return tl.int16
    return getattr(tl, str(dtype).removeprefix("torch."))


def _rule(fmt: MXFormat, rule: str) -> dict[str, int | float | bool]:
    """What rounding needs to know about a format and a scale rule, as compile-time constants."""
    return {
        "EMAX": fmt.emax,
        "EMIN": fmt.emin,
        "MANTISSA_BITS": fmt.mantissa_bits,
        "MAX_NORMAL": fmt.max_normal,
        "THRESHOLD": mantissa_threshold(fmt, rule),
        "SEARCH": rule == "search",
    }


def _max_code(fmt: MXFormat) -> int:
    """The code of the largest element, without its sign: 0x7 (E2M1) or 0x7E (E4M3)."""
    mantissa = fmt.max_normal / 2**fmt.emax - 1
    return ((fmt.emax - fmt.emin + 1) << fmt.mantissa_bits) + round(mantissa * 2**fmt.mantissa_bits)


def _launch(name: str, kernel, tensors: tuple[torch.Tensor, ...], blocks: int, options: dict) -> None:
    if blocks == 0:
        return
    device = tensors[0].device
    if _interpreting():
        tensors = tuple(t.view(torch.int16) if t.dtype == torch.bfloat16 else t for t in tensors)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        rows, warps = _TILES[name]
        grid = (triton.cdiv(blocks, rows),)
        kernel[grid](*tensors, blocks, ROWS=rows, num_warps=warps, enable_fp_fusion=False, **options)
