"""MX formats as data: everything the kernels know about MXFP4 and MXFP8 is derived here, once.

An MX tensor (OCP Microscaling Formats v1.0, 2023) is cut along its last dimension into blocks of 32 values.
A block shares one power-of-two scale, stored as an E8M0 byte (exponent + 127, 0xFF = NaN); each value is stored in a
small floating-point element format and means `element * 2^(byte - 127)`.

The shared exponent of a block follows from the largest magnitude `amax` in it:

    exponent = floor(log2(amax)) - emax  (+ 1 when the mantissa of amax reaches the rule's threshold)

so a scale rule is a single number, a threshold on the FP32 mantissa of amax, and one kernel serves them all.
"""

from __future__ import annotations

from dataclasses import dataclass

BLOCK_SIZE = 32  # OCP MX v1.0, section 5.2: every concrete MX format has k = 32
E8M0_BIAS = 127  # section 5.4.1
E8M0_NAN = 0xFF
FP32_MANTISSA_BITS = 23
NEVER = 1 << FP32_MANTISSA_BITS  # a threshold that no 23-bit mantissa reaches


@dataclass(frozen=True)
class MXFormat:
    """An element format under E8M0 block scales. Widths in bits, exponents unbiased."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    max_normal: float

    @property
    def bits(self) -> int:
        """Bits per element, sign included, scale not."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def emax(self) -> int:
        """floor(log2(max_normal)): the exponent that the largest element has in scaled units."""
        return {6.0: 2, 448.0: 8}[self.max_normal]

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal element: 1 - bias, with bias = 2^(exponent_bits - 1) - 1."""
        return 2 - (1 << (self.exponent_bits - 1))

    @property
    def packed_bytes_per_block(self) -> int:
        """Bytes of one block of 32 elements, without its scale byte."""
        return BLOCK_SIZE * self.bits // 8


# E2M1: 0 .5 1 1.5 2 3 4 6 and negatives; no NaN, no infinity (OCP MX v1.0, 5.3.3).
MXFP4 = MXFormat(name="mxfp4", exponent_bits=2, mantissa_bits=1, max_normal=6.0)
# E4M3: largest 1.75 * 2^8, since the code above it is NaN (OCP MX v1.0, 5.3.1).
MXFP8 = MXFormat(name="mxfp8", exponent_bits=4, mantissa_bits=3, max_normal=448.0)

FORMATS = {fmt.name: fmt for fmt in (MXFP4, MXFP8)}

# Magnitudes of the eight E2M1 codes; code = sign << 3 | index.
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

# Scale rules by name:
#   floor   OCP's own rule and AutoRound's MXFP4/MXFP8: never rounds the exponent up, so amax may saturate.
#   even    compressed-tensors: amax is rounded to one mantissa bit first, so 1.75 and above count as 2.
#   rceil   NVIDIA's rule (cuBLAS, PTX cvt with .rp; AutoRound's *_RCEIL): the smallest exponent that does not saturate
#   amax. search  floor or floor + 1, whichever gives the block the smaller squared error (ties: floor); for weights,
#   whose
#           scale is stored in the file.
SCALE_RULES = ("floor", "even", "rceil", "search")


def mantissa_threshold(fmt: MXFormat, rule: str) -> int:
    """The 23-bit mantissa of amax from which `rule` adds one to the shared exponent of `fmt`.

    `search` starts from floor, so it has floor's threshold.
    """
    if rule in ("floor", "search"):
        return NEVER
    if rule == "even":
        return 0x600000  # 1.75 = 1 + 0x600000 / 2^23, included
    if rule == "rceil":
        # amax > max_normal * 2^k; max_normal / 2^emax is 1.5 (E2M1) or 1.75 (E4M3), itself excluded: + 1.
        return round((fmt.max_normal / 2**fmt.emax - 1) * (1 << FP32_MANTISSA_BITS)) + 1
    raise ValueError(f"scale rule {rule!r} is unknown; choose one of {', '.join(SCALE_RULES)}")


def get_format(name: str) -> MXFormat:
    """The format called `name` ("mxfp4" or "mxfp8")."""
    if name not in FORMATS:
        raise ValueError(f"format {name!r} is unknown; choose one of {', '.join(FORMATS)}")
    return FORMATS[name]


def check_scale_shape(x, scale_e8m0_biased) -> None:
    """Raise a ValueError unless the scales have one value for each block of x [..., K]: shape [..., K / 32]."""
    expected = (*x.shape[:-1], x.shape[-1] // BLOCK_SIZE)
    if scale_e8m0_biased.shape != expected:
        raise ValueError(f"the scales are {tuple(scale_e8m0_biased.shape)}; values {tuple(x.shape)} need {expected}")
