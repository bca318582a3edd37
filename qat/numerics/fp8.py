"""FP8 quantization (E4M3, a scale for a row, a block or a tensor) in plain PyTorch: the specification of its kernels.

Weights have a scale for each output channel (row of [N, K]), stored in BF16; inputs one for each token or for 128
values of it, which the engine computes. Unlike MX scales they are not powers of two, so an element times its scale is
rounded once more, to the dtype of the result.

    weights             s = bf16(amax / 448), q = e4m3(clamp(w / s)), value = q * s
    inputs, absmax      s = max(amax / 448, 1 / (448 * 512)), the rest as above: vLLM's dynamic quantization per token
    inputs, absmax_native   s = amax / 448, x / s and q * s each rounded to the tensor's dtype; s = eps where amax is 0:
                        compressed-tensors in transformers

A row or block that holds a NaN or an infinity becomes NaN as a whole (its scale is NaN).

Keys and values in a cache have one static scale a tensor, calibrated, which does not depend on what is quantized:

    absmax          s in FP32, q = e4m3(clamp(x / s)), value = q * s: vLLM
    absmax_native   s, x / s and q * s each rounded to the tensor's dtype: compressed-tensors in transformers

An infinity saturates there, as in engines; a NaN stays NaN.
"""

from __future__ import annotations

import torch

from .codes import decode, encode
from .formats import BF16, E4M3, FP32, Format, Quantized
from .rules import FP8_INPUT_RULES, FP8_WEIGHT_RULES

FORMATS = {
    "fp8_channel": Format("fp8_channel", E4M3, None, BF16, FP8_WEIGHT_RULES, (), "fp"),
    "fp8_token": Format("fp8_token", E4M3, None, FP32, FP8_INPUT_RULES, FP8_INPUT_RULES, "fp_token"),
    "fp8_g128": Format("fp8_g128", E4M3, 128, FP32, FP8_INPUT_RULES, FP8_INPUT_RULES, "fp_group"),
}
# Keys and values. Not among FORMATS: codes of a cache are kept by engines alone, so it has no packed layout.
TENSOR = Format("fp8_tensor", E4M3, None, FP32, FP8_INPUT_RULES, FP8_INPUT_RULES, "fp_tensor")
SMALLEST_WEIGHT_SCALE = float(torch.finfo(torch.bfloat16).tiny)  # a row of zeros has no scale of its own
SMALLEST_INPUT_SCALE = 1.0 / (E4M3.largest * 512.0)  # vLLM, csrc/quantization/w8a8/fp8: min_scaling_factor


def quantize(x: torch.Tensor, fmt: Format, rule: str, dtype: torch.dtype | None = None) -> Quantized:
    """Quantize to E4M3 codes and a scale for each row or block.

    Args:
        x: [..., K] float32, bfloat16 or float16.
        fmt: one of FORMATS.
        rule: one of `fmt.rules`.
        dtype: the view of `x` that is quantized (default: its own dtype).

    Returns:
        codes, uint8 [..., K], and the scales [..., 1] or [..., K / block], BF16 for weights and FP32 for inputs.
    """
    viewed = _in_rows(x.to(dtype or x.dtype), fmt)
    scale = row_scale(viewed, fmt, rule)
    native = rule == "absmax_native"
    scaled = (viewed / scale.to(viewed.dtype)).float() if native else viewed.float() / scale.float()
    codes = encode(scaled.clamp(-E4M3.largest, E4M3.largest).nan_to_num(0.0), E4M3)
    return Quantized(codes.reshape(x.shape), (scale.reshape(fmt.scale_shape(x.shape)),))


def _in_rows(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    """x [..., K] with the values that share a scale along its last dimension."""
    return x if fmt.block is None else x.unflatten(-1, (x.shape[-1] // fmt.block, fmt.block))


def _in_columns(scale: torch.Tensor, fmt: Format) -> torch.Tensor:
    """The scales of x, each beside its values in `_in_rows(x)`."""
    return scale.float() if fmt.block is None else scale.float()[..., None]


def row_scale(viewed: torch.Tensor, fmt: Format, rule: str) -> torch.Tensor:
    """The scales [..., 1] of the rows of x, in the storage dtype of the format; NaN for rows that are not finite."""
    amax = viewed.abs().amax(-1, keepdim=True) if viewed.numel() else viewed.new_zeros((*viewed.shape[:-1], 1))
    if rule == "absmax_native":
        scale = amax / torch.tensor(E4M3.largest, dtype=viewed.dtype)
        scale = torch.where(scale == 0, torch.finfo(viewed.dtype).eps, scale)
    else:
        scale = (amax.float() / E4M3.largest).to(fmt.scale.storage)
        scale = scale.clamp(min=SMALLEST_WEIGHT_SCALE if fmt.scale == BF16 else SMALLEST_INPUT_SCALE)
    return torch.where(amax.isfinite(), scale, torch.nan).to(fmt.scale.storage)


def dequantize(quantized: Quantized, fmt: Format, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `quantize`: [..., K] in `dtype`; rows whose scale is NaN are NaN."""
    values = _in_rows(decode(quantized.codes, E4M3), fmt) * _in_columns(quantized.scales[0], fmt)
    return values.reshape(quantized.codes.shape).to(dtype)


def fake_quantize(x: torch.Tensor, fmt: Format, rule: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`dequantize(quantize(x))`: [..., K] in `dtype`."""
    return dequantize(quantize(x, fmt, rule, dtype), fmt, dtype or x.dtype)


def tensor_scale(amax: torch.Tensor) -> torch.Tensor:
    """The static scale, FP32 [1], of tensors whose largest magnitude is `amax`."""
    return (amax.float() / E4M3.largest).reshape(1)


def fake_quantize_static(x: torch.Tensor, scale: torch.Tensor, rule: str, dtype: torch.dtype) -> torch.Tensor:
    """The nearest values of x under one given scale, in `dtype`: first `x.to(dtype)`, then rounding.

    Args:
        x: any shape, float32, bfloat16 or float16.
        scale: FP32 [1], greater than 0.
        rule: one of `TENSOR.rules`.
    """
    viewed = x.to(dtype)
    if rule == "absmax_native":
        scale = scale.to(dtype)
        return _nearest(viewed / scale).to(dtype) * scale
    return (_nearest(viewed.float() / scale).float() * scale).to(dtype)


def _nearest(quotient: torch.Tensor) -> torch.Tensor:
    return quotient.clamp(-E4M3.largest, E4M3.largest).to(E4M3.storage)


def quantize_to_scale(
    x: torch.Tensor, scale: torch.Tensor, fmt: Format, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Codes of x under given scales instead of a rule's, quotients in FP32; the layout of `quantize`."""
    fmt.check_scales(x.shape, scale)
    scaled = _in_rows(x.to(dtype or x.dtype).float(), fmt) / _in_columns(scale, fmt)
    return encode(scaled.clamp(-E4M3.largest, E4M3.largest).nan_to_num(0.0), E4M3).reshape(x.shape)


def saturates(x: torch.Tensor, quantized: Quantized, fmt: Format) -> torch.Tensor:
    """Which values of x [..., K] exceed the largest element under their scale, which was rounded: bool [..., K]."""
    largest = E4M3.largest * _in_columns(quantized.scales[0], fmt)
    return (_in_rows(x.float(), fmt).abs() > largest).reshape(x.shape)


def broken_blocks(quantized: Quantized, fmt: Format) -> torch.Tensor:
    """How many rows or blocks held NaN or infinity; int64 scalar."""
    return quantized.scales[0].isnan().sum()
