"""Scale rules: how the scale of a block follows from its largest magnitude `amax`.

MX formats (power-of-two scales). The shared exponent is floor(log2(amax)) - emax, plus one when the mantissa of amax
reaches a threshold; so a rule is a single number, and one kernel serves them all.

    floor    never plus one, so amax may saturate: OCP's own rule and AutoRound's MXFP4/MXFP8.
    even     amax is rounded to one mantissa bit first, so 1.75 and above count as 2: compressed-tensors.
    rceil    the smallest exponent that does not saturate amax: NVIDIA (cuBLAS, PTX cvt with .rp), AutoRound's *_RCEIL.
    search   floor or floor + 1, whichever gives the block the smaller squared error (ties: floor); for weights, whose
             scale is stored in the file.

INT4 (a BF16 scale for a block).

    absmax   amax / 7.5: compressed-tensors and AutoRound. The largest magnitude becomes 7 or -8, off by half a step.
    search   amax / 8, amax / 7.5 or amax / 7, whichever gives the block the smallest squared error (ties: the first).

NVFP4 (an E4M3 scale for a block, relative to a divisor g of the whole tensor).

    absmax          e4m3(g * amax / 6), in FP32: vLLM.
    absmax_native   the same with amax / 6 rounded to the tensor's own dtype: compressed-tensors in transformers.
    search          that of absmax or one of its two neighbours in E4M3, whichever gives the block the smallest squared
                    error (ties: absmax, then the larger); for weights.

FP8 (a scale a row).

    absmax          amax / 448, scale and quotient in FP32: vLLM.
    absmax_native   the same in the tensor's own dtype, each operation rounded to it: compressed-tensors in
                    transformers.
"""

from __future__ import annotations

from .formats import FP32_MANTISSA_BITS, Element

MX_RULES = ("floor", "even", "rceil", "search")
MX_INPUT_RULES = ("floor", "even", "rceil")  # engines quantize activations themselves, and none of them searches
INT4_RULES = ("absmax", "search")
NVFP4_RULES = ("absmax", "absmax_native", "search")
NVFP4_INPUT_RULES = ("absmax", "absmax_native")
FP8_WEIGHT_RULES = ("absmax",)
FP8_INPUT_RULES = ("absmax", "absmax_native")

NEVER = 1 << FP32_MANTISSA_BITS  # a threshold that no 23-bit mantissa reaches


def mantissa_threshold(element: Element, rule: str) -> int:
    """The 23-bit mantissa of amax from which `rule` adds one to the shared exponent of a block of `element`.

    `search` starts from floor, so it has floor's threshold.

    Raises:
        ValueError: `rule` is none of MX_RULES.
    """
    if rule in ("floor", "search"):
        return NEVER
    if rule == "even":
        return 0x600000  # 1.75 = 1 + 0x600000 / 2^23, included
    if rule == "rceil":
        # amax > largest * 2^k; largest / 2^emax is 1.5 (E2M1) or 1.75 (E4M3), itself excluded: + 1.
        return round((element.largest / 2**element.emax - 1) * (1 << FP32_MANTISSA_BITS)) + 1
    raise ValueError(f"scale rule {rule!r} is unknown; choose one of {', '.join(MX_RULES)}")
