"""NVFP4 quantization in plain PyTorch: the executable specification of its kernels.

E2M1 elements share an E4M3 scale s in blocks of 16; a divisor g of the whole tensor brings the scales into E4M3's
range (NVIDIA: g = 448 * 6 / amax of the tensor).

    s = e4m3(g * amax / 6), or 0.125 where that is 0
    q = e2m1(x / (s / g)), value = q * (s / g)

All of it is computed in FP32, and the value is rounded to the dtype of the result: compressed-tensors' arithmetic. The
divisor is given, not computed: engines fuse layers and take one divisor for all of them, and that of inputs is
calibrated. Stacked weights [E, N, K], of experts, have one each: a divisor [E].

A block that holds a NaN or an infinity becomes NaN as a whole (its scale is NaN).
"""

from __future__ import annotations

import torch

from .codes import decode, encode
from .elements import round_to_element, squared_error
from .formats import E2M1, E4M3, FP32, Format, Quantized
from .rules import NVFP4_INPUT_RULES, NVFP4_RULES

BLOCK = 16
FORMATS = {"nvfp4": Format("nvfp4", E2M1, BLOCK, E4M3, NVFP4_RULES, NVFP4_INPUT_RULES, "nv_fp", FP32)}
ZERO_SCALE = 0.125  # compressed-tensors' eps of E4M3, for blocks whose own scale would be 0


def tensor_divisor(amax: torch.Tensor) -> torch.Tensor:
    """The divisor g, FP32 [1], of a tensor with this largest magnitude; 1 for a tensor of zeros. Of [E], [E]."""
    largest = amax.float().reshape(-1)
    return torch.where(largest > 0, E4M3.largest * E2M1.largest / largest, 1.0)


def quantize(
    x: torch.Tensor, fmt: Format, rule: str, dtype: torch.dtype | None = None, divisor: torch.Tensor | None = None
) -> Quantized:
    """Quantize to E2M1 codes and E4M3 scales.

    Args:
        x: [..., K] float32, bfloat16 or float16, K a multiple of 16.
        fmt: that of FORMATS.
        rule: one of `fmt.rules`.
        dtype: the view of `x` that is quantized (default: its own dtype).
        divisor: g, FP32 [1], or [E] for x [E, N, K]; default: that of x.

    Returns:
        codes, uint8 [..., K / 2]; the scales, E4M3 [..., K / 16], and the divisor.
    """
    elements, scale, divisor = _quantize_elements(x, fmt, rule, dtype, divisor)
    codes = encode(elements.nan_to_num(0.0), E2M1).flatten(-2)
    return Quantized(codes, (scale.to(torch.float8_e4m3fn), divisor))


def dequantize(quantized: Quantized, fmt: Format, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `quantize`: [..., K] in `dtype`; blocks whose scale is NaN are NaN."""
    scale, divisor = quantized.scales
    return _scale_back(_in_blocks(decode(quantized.codes, E2M1)), scale.float(), divisor, dtype)


def fake_quantize(
    x: torch.Tensor, fmt: Format, rule: str, dtype: torch.dtype | None = None, divisor: torch.Tensor | None = None
) -> torch.Tensor:
    """`dequantize(quantize(x))`: [..., K] in `dtype`."""
    elements, scale, divisor = _quantize_elements(x, fmt, rule, dtype, divisor)
    return _scale_back(elements, scale, divisor, dtype or x.dtype)


def quantize_to_scale(
    x: torch.Tensor,
    scale: torch.Tensor,
    fmt: Format,
    dtype: torch.dtype | None = None,
    divisor: torch.Tensor | None = None,
) -> torch.Tensor:
    """Codes of x under given scales (E4M3 [..., K / 16]) instead of a rule's; the layout of `quantize`."""
    fmt.check_scales(x.shape, scale)
    viewed = x.to(dtype or x.dtype).float()
    divisor = tensor_divisor(viewed.abs().max()) if divisor is None else divisor
    elements = _round_elements(_in_blocks(viewed), scale.float(), divisor)
    return encode(elements.nan_to_num(0.0), E2M1).flatten(-2)


def saturates(x: torch.Tensor, quantized: Quantized, fmt: Format) -> torch.Tensor:
    """Which values of x [..., K] exceed the largest element of their block: bool [..., K]."""
    scale, divisor = quantized.scales
    return (_in_blocks(x.float()).abs() > E2M1.largest * _effective(scale.float(), divisor)).flatten(-2)


def broken_blocks(quantized: Quantized, fmt: Format) -> torch.Tensor:
    """How many blocks held NaN or infinity; int64 scalar."""
    return quantized.scales[0].isnan().sum()


def _in_blocks(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (x.shape[-1] // BLOCK, BLOCK))


def _quantize_elements(x, fmt, rule, dtype, divisor):
    """Elements (FP32 [..., K / 16, 16]), scales (FP32 [..., K / 16], each an E4M3 number) and the divisor."""
    viewed = x.to(dtype or x.dtype)
    blocks = _in_blocks(viewed)
    amax = blocks.abs().amax(-1) if blocks.numel() else blocks.new_zeros(blocks.shape[:-1])
    divisor = tensor_divisor(amax.max() if amax.numel() else amax.new_zeros(())) if divisor is None else divisor
    per_element = amax / 6.0 if rule == "absmax_native" else amax.float() / 6.0
    scale = _as_scale(_along(divisor, per_element) * per_element.float())
    scale = torch.where(amax.isfinite(), scale, torch.nan)
    elements = _round_elements(blocks.float(), scale, divisor)
    if rule == "search":
        elements, scale = _search(blocks.float(), elements, scale, divisor)
    return elements, scale, divisor


def _as_scale(value: torch.Tensor) -> torch.Tensor:
    scale = value.clamp(max=E4M3.largest).to(torch.float8_e4m3fn).float()
    return torch.where(scale == 0, ZERO_SCALE, scale)


def _search(blocks, elements, scale, divisor):
    """The better of the scale and its neighbours in E4M3, the next larger one first."""
    error = squared_error(blocks - elements * _effective(scale, divisor))
    code = scale.to(torch.float8_e4m3fn).view(torch.uint8).int()
    for step in (1, -1):
        neighbour = (code + step).clamp(1, E4M3.largest_code).to(torch.uint8).view(torch.float8_e4m3fn).float()
        neighbour = torch.where(scale.isnan(), scale, neighbour)
        other = _round_elements(blocks, neighbour, divisor)
        other_error = squared_error(blocks - other * _effective(neighbour, divisor))
        better = other_error < error
        elements = torch.where(better[..., None], other, elements)
        scale, error = torch.where(better, neighbour, scale), torch.where(better, other_error, error)
    return elements, scale


def _along(divisor: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The divisor in a shape that goes with `scales` [..., K / 16]."""
    return divisor if divisor.numel() == 1 else divisor.view(-1, *[1] * (scales.dim() - 1))


def _effective(scale: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
    """What elements are multiplied by, [..., K / 16, 1]."""
    return (scale / _along(divisor, scale))[..., None]


def _round_elements(blocks: torch.Tensor, scale: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
    return round_to_element(blocks / _effective(scale, divisor), E2M1)


def _scale_back(elements: torch.Tensor, scale: torch.Tensor, divisor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (elements * _effective(scale, divisor)).to(dtype).flatten(-2)
