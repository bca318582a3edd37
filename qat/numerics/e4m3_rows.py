"""Matrices as E4M3 values with one scale a row, which GPUs multiply in FP8, in plain PyTorch: the specification.

A value on the MXFP4 grid is c * 2^e with c in {0, .5, 1, 1.5, 2, 3, 4, 6} and an exponent e for each block. Divided by
one power of two for the whole row it is exact in E4M3 as long as the exponents of the row's blocks span no more than
13: the row's largest magnitude becomes 128 to 256, and the step of a block, 2^(e - 1), at least 2^-9, the smallest that
E4M3 has. Rows with other blocks lose values; they are marked, and their products are computed in BF16.

Values in FP8 with a scale for each row (`fp8_channel`, `fp8_token`) are such matrices by definition, and lose nothing.
MXFP8 and NVFP4 are not. Elements of MXFP8 use all of E4M3's range, so all blocks of a row would need the same exponent.
An element of NVFP4 times its E4M3 scale has up to five significant bits; E4M3 has four.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import hadamard, mx
from .formats import E4M3, FP32_BIAS, FP32_MANTISSA_BITS, Format, Quantized

MX_FORMATS = ("mxfp4",)
FP8_FORMATS = ("fp8_channel", "fp8_token")
# Of the largest magnitude of a row, before rounding, which may take it to the next power of two; 448 is the largest.
LARGEST_EXPONENT = 7
SMALLEST_FIELD = 8  # of FP32's exponent: a row's largest magnitude counts as no less, so that scales are normal numbers
LARGEST_GAP = 15  # between the exponents of the row's largest magnitude and of a block: 2 for 4 <= c < 8, and 13


class Rows(NamedTuple):
    """A matrix for products in FP8: `values * scale`, except in lost rows.

    Attributes:
        values: float8_e4m3fn [R, K].
        scale: FP32 [R, 1].
        lost: uint8 [R], 1 for rows that do not hold their values; None where no row can be such.
        source: what the matrix was rounded from, [R, K] in any float dtype.
        fmt, rule: how.
        hadamard: whether it was transformed first, as hadamard.py does.
    """

    values: torch.Tensor
    scale: torch.Tensor
    lost: torch.Tensor | None
    source: torch.Tensor
    fmt: str
    rule: str
    hadamard: bool = False


def from_mx(x: torch.Tensor, quantized: Quantized, fmt: Format) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`values`, `scale` and `lost` of `Rows`.

    Args:
        x: [..., K] as it was seen when it was rounded.
        quantized: its MXFP4 codes and scales.
    """
    x = x.reshape(-1, x.shape[-1])
    values = mx.dequantize(quantized, fmt, torch.float32).view(x.shape)
    holds_some = (values != 0).unflatten(-1, (-1, mx.BLOCK)).any(-1)
    top = x.float().abs().view(torch.int32).amax(-1, keepdim=True) >> FP32_MANTISSA_BITS
    field = top.clamp(SMALLEST_FIELD, 254)
    exponents = quantized.scales[0].reshape(len(x), -1).int()
    lost = ((field - exponents > LARGEST_GAP) & holds_some).any(-1) | (top > 254).any(-1)
    scaled = values * _power(2 * FP32_BIAS + LARGEST_EXPONENT - field)
    return scaled.to(E4M3.storage), _power(field - LARGEST_EXPONENT), lost.to(torch.uint8)


def from_fp8(quantized: Quantized) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of FP8 rows -> `values` and `scale` of `Rows`; the codes are not copied."""
    columns = quantized.codes.shape[-1]
    return quantized.codes.reshape(-1, columns).view(E4M3.storage), quantized.scales[0].reshape(-1, 1).float()


def rounded(rows: Rows) -> torch.Tensor:
    """The values of a matrix in BF16, [R, K]; of FP8 rows without their scales."""
    if rows.fmt in FP8_FORMATS:
        return rows.values.to(torch.bfloat16)
    source = hadamard.transform(rows.source, torch.bfloat16) if rows.hadamard else rows.source
    return mx.fake_quantize(source, mx.FORMATS[rows.fmt], rows.rule, torch.bfloat16)


def product(x: Rows, weight: Rows, bias: torch.Tensor | None) -> torch.Tensor:
    """x [R, K] times weight [N, K] transposed, and the bias [N], in BF16 [R, N]: summed in FP64, rounded once."""
    out = rounded(x).double() @ rounded(weight).double().t()
    for rows, scale in ((x, x.scale), (weight, weight.scale.t())):
        out = out * scale if rows.fmt in FP8_FORMATS else out
    return (out if bias is None else out + bias).to(torch.bfloat16)


def _power(field: torch.Tensor) -> torch.Tensor:
    """2^(field - 127)."""
    return (field << FP32_MANTISSA_BITS).view(torch.float32)
