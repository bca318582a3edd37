"""Formats as data: everything that kernels, layers and exporters know about a quantized tensor is a field here.

A tensor is quantized along its last dimension. Values that share a scale are a block: 32 values in the MX formats, 16
in NVFP4, a whole row in FP8. Each value is stored as the code of an element format and means `element * scale`. A
format with a second level of scales has one more for the whole tensor.

Each family of formats is one file beside this one (`mx.py`, `fp8.py`) with its FORMATS and its functions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

FP32_MANTISSA_BITS = 23
FP32_BIAS = 127


@dataclass(frozen=True)
class Element:
    """How a single number is stored.

    Attributes:
        name: such as "e2m1".
        exponent_bits, mantissa_bits: of a floating-point number; an integer has no exponent bits.
        largest: the largest finite value. Floating-point numbers reach as far below zero, integers one further.
        is_signed: False for scales that have no sign bit.
        storage: torch dtype of a tensor of such numbers in a checkpoint; two E2M1 codes share a byte.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    largest: float
    storage: torch.dtype
    is_signed: bool = True

    @property
    def bits(self) -> int:
        """Width, the sign included."""
        return self.is_signed + self.exponent_bits + self.mantissa_bits

    @property
    def emax(self) -> int:
        """floor(log2(largest)): the exponent of the largest value."""
        return math.frexp(self.largest)[1] - 1

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal value: 1 - bias, with bias = 2^(exponent_bits - 1) - 1."""
        return 2 - (1 << (self.exponent_bits - 1))

    @property
    def largest_code(self) -> int:
        """Code of the largest value, without its sign: 0x7 for E2M1, 0x7E for E4M3."""
        mantissa = self.largest / 2**self.emax - 1
        return ((self.emax - self.emin + 1) << self.mantissa_bits) + round(mantissa * 2**self.mantissa_bits)


# E2M1: 0 .5 1 1.5 2 3 4 6 and negatives; no NaN, no infinity (OCP MX v1.0, 5.3.3). Two codes share a byte.
E2M1 = Element("e2m1", 2, 1, 6.0, torch.uint8)
# E4M3: largest 1.75 * 2^8, since the code above it is NaN (OCP MX v1.0, 5.3.1).
E4M3 = Element("e4m3", 4, 3, 448.0, torch.float8_e4m3fn)
# INT4: -8 to 7; a checkpoint holds eight codes in a 32-bit word (compressed-tensors' pack-quantized).
INT4 = Element("int4", 0, 3, 7.0, torch.int32)
# E8M0: a power of two from 2^-127 to 2^127, stored as exponent + 127; 0xFF is NaN (OCP MX v1.0, 5.4.1).
E8M0 = Element("e8m0", 8, 0, 2.0**127, torch.uint8, is_signed=False)
BF16 = Element("bf16", 8, 7, float(torch.finfo(torch.bfloat16).max), torch.bfloat16)
FP32 = Element("fp32", 8, 23, float(torch.finfo(torch.float32).max), torch.float32)

# Magnitudes of the eight E2M1 codes; code = sign << 3 | index.
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Format:
    """A kind of quantized tensor.

    Attributes:
        name: key into `families.FORMATS`.
        element: of the values.
        block: values that share a scale, along the last dimension; None for a whole row.
        scale: of the blocks.
        rules: the scale rules that exist for it (see rules.py); the first is the default.
        input_rules: those that an engine may apply to activations; empty where activations never have this format.
        data_type: what AutoRound calls the kind of format, without a rule ("mx_fp").
        tensor_scale: of the whole tensor, where there is a second level.
    """

    name: str
    element: Element
    block: int | None
    scale: Element
    rules: tuple[str, ...]
    input_rules: tuple[str, ...]
    data_type: str
    tensor_scale: Element | None = None

    def code_shape(self, shape: tuple[int, ...] | torch.Size) -> tuple[int, ...]:
        """Shape of the code bytes of values [..., K]."""
        return (*shape[:-1], shape[-1] * self.element.bits // 8)

    def scale_shape(self, shape: tuple[int, ...] | torch.Size) -> tuple[int, ...]:
        """Shape of the scales of values [..., K]: [..., K / block], or [..., 1]."""
        return (*shape[:-1], 1 if self.block is None else shape[-1] // self.block)

    def value_shape(self, codes: torch.Tensor) -> tuple[int, ...]:
        """Shape of the values whose code bytes are `codes`."""
        return (*codes.shape[:-1], codes.shape[-1] * 8 // self.element.bits)

    def bits_per_value(self, columns: int) -> float:
        """Bits per value in rows of `columns` values, scales included."""
        return self.element.bits + self.scale.bits / (self.block or columns)

    @property
    def nominal_bits(self) -> float:
        """Bits of a value in very long rows: 4.25 in MXFP4, 8.25 in MXFP8, 8 in FP8."""
        return self.element.bits + (self.scale.bits / self.block if self.block else 0)

    def fits(self, columns: int) -> bool:
        """Whether rows of so many values can be cut into blocks."""
        return columns % (self.block or 1) == 0

    def check_scales(self, shape: tuple[int, ...] | torch.Size, scale: torch.Tensor) -> None:
        """Raise a ValueError unless `scale` has the shape and dtype that values of this shape need."""
        expected = self.scale_shape(shape)
        if scale.dtype != self.scale.storage or tuple(scale.shape) != expected:
            raise ValueError(
                f"the scales are {scale.dtype} {tuple(scale.shape)}; values {tuple(shape)} in {self.name} need "
                f"{self.scale.storage} {expected}"
            )


@dataclass
class Quantized:
    """What every `quantize` returns and every `dequantize` takes.

    Attributes:
        codes: bytes, uint8 of `Format.code_shape`.
        scales: inner to outer; each in the storage dtype of its element.
    """

    codes: torch.Tensor
    scales: tuple[torch.Tensor, ...]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Codes, then scales."""
        return [self.codes, *self.scales]

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)
