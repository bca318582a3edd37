"""What runs on the GPU: the Triton kernels that `triton_kernels.py` launches, and the functions they are made of.

Quantization does some twenty instructions per value and needs no matrix unit, so a GPU is limited by its memory; each
kernel reads its input once and writes its output once. A program takes a tile of [ROWS, 32] values, a row being one MX
block: memory is contiguous, so a thread loads 16 bytes at a time, and four threads share a block and find its largest
magnitude by exchanging registers.

The arithmetic is that of mx.py: FP32 and exact multiplications by powers of two. A GPU does half as many operations on
bits as on FP32 numbers, maxima included; so elements are rounded by additions alone (`_round_magnitude`).

Without Triton, `triton` and `tl` are None and the kernels plain functions that cannot be launched.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

from ..hadamard import ROOT


def _jit(function):
    return triton.jit(function) if triton is not None else function


@_jit
def _bits(value):
    return value.to(tl.int32, bitcast=True)


@_jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@_jit
def _to_fp32(value):
    if value.dtype == tl.int16:
        value = _float(value.to(tl.int32) << 16)
    return value.to(tl.float32)


@_jit
def _to_view(value, VIEW: tl.constexpr):
    """FP32 -> VIEW, to nearest even."""
    if tl.int16 == VIEW:
        bits = _bits(value)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        value = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)
    return value.to(VIEW)


@_jit
def _tile(blocks, ROWS: tl.constexpr):
    """This program's blocks [ROWS], 64 bits wide for tensors of more than 2^31 values, and which of them exist."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return rows, rows < blocks


@_jit
def _offsets(rows, COLUMNS: tl.constexpr):
    return rows[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@_jit
def _scale_value(code):
    """2^(code - 127) for biased exponents; 2^-127 is subnormal, 255 means NaN."""
    bits = tl.where(code == 0, 1 << 22, code << 23)
    return _float(tl.where(code == 255, 0x7FC00000, bits))


@_jit
def _to_scaled_units(code):
    """2^(127 - code); for the NaN scale any number."""
    return _float(tl.maximum(254 - code, 1) << 23)


@_jit
def _shared_exponent(x, EMAX: tl.constexpr, THRESHOLD: tl.constexpr):
    """Biased exponents [ROWS] of the blocks in the rows of x (FP32 [ROWS, 32])."""
    # Compared as integers, NaN and infinity come out on top.
    amax = tl.max(_bits(x) & 0x7FFFFFFF, axis=1)
    field = amax >> 23
    rounds_up = ((amax & 0x7FFFFF) >= THRESHOLD).to(tl.int32)
    return tl.where(field == 255, 255, tl.maximum(field - EMAX + rounds_up, 0))


@_jit
def _round_magnitude(magnitude, SMALLEST_NORMAL: tl.constexpr, MANTISSA_BITS: tl.constexpr):
    """Magnitudes (FP32, not negative) to the nearest numbers of MANTISSA_BITS, ties to even, without an upper limit.

    With e the exponent of a, or the smallest one if that is larger, elements near a are multiples of 2^(e - M). So are
    all FP32 numbers in the binade of t = 2^(23 - M) max(a, 1.5 * 2^emin). t itself is an even multiple where a is
    halfway between two, hence a - t is rounded as a should be; t plus that is exact. Where t - a falls into the binade
    below, whose numbers are closer together, a is so close to 2^e that it becomes 2^e there too. The products are
    exact, so it does not matter that they are fused.
    """
    at_least = tl.maximum(magnitude, 1.5 * SMALLEST_NORMAL)
    up = tl.full(magnitude.shape, 2.0 ** (23 - MANTISSA_BITS), tl.float32)
    down = tl.full(magnitude.shape, -(2.0 ** (23 - MANTISSA_BITS)), tl.float32)
    return tl.fma(at_least, up, tl.fma(at_least, down, magnitude))


@_jit
def _sign(scaled):
    """Sign bits of elements; zero, and what underflows to zero in scaled units, is positive."""
    return _bits(scaled + 0.0) & -0x80000000


@_jit
def _round(scaled, EMIN: tl.constexpr, MANTISSA_BITS: tl.constexpr, MAX_NORMAL: tl.constexpr):
    """Nearest elements, in scaled units."""
    rounded = tl.minimum(_round_magnitude(tl.abs(scaled), 2.0**EMIN, MANTISSA_BITS), MAX_NORMAL)
    return _float(_bits(rounded) | _sign(scaled))


@_jit
def _code(magnitude, sign, EMIN: tl.constexpr, MANTISSA_BITS: tl.constexpr, BITS: tl.constexpr):
    """Codes, in the highest BITS bits (uint32), of elements' magnitudes (FP32) and sign bits."""
    # Multiplied so that the smallest normal element becomes FP32's own, an element has its code for exponent and
    # mantissa; the bits below are zero.
    code = _bits(magnitude * 2.0 ** (-126 - EMIN)) << (9 + MANTISSA_BITS - BITS)
    return (code | sign).to(tl.uint32, bitcast=True)


@_jit
def _round_to_code(
    scaled, EMIN: tl.constexpr, MANTISSA_BITS: tl.constexpr, BITS: tl.constexpr, MAX_NORMAL: tl.constexpr
):
    """Codes, in the highest BITS bits (uint32), of the nearest elements."""
    rounded = tl.minimum(_round_magnitude(tl.abs(scaled), 2.0**EMIN, MANTISSA_BITS), MAX_NORMAL)
    return _code(rounded, _sign(scaled), EMIN, MANTISSA_BITS, BITS)


@_jit
def _add_neighbours(x, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    return tl.sum(tl.reshape(x, (ROWS, PAIRS, 2)), axis=2)


@_jit
def _block_error(difference, ROWS: tl.constexpr):
    """Sums of squares [ROWS]; neighbours are added in pairs, as in mx.py."""
    total = _add_neighbours(difference * difference, ROWS, 16)
    total = _add_neighbours(total, ROWS, 8)
    total = _add_neighbours(total, ROWS, 4)
    total = _add_neighbours(total, ROWS, 2)
    return tl.sum(total, axis=1)


@_jit
def _find_scale(
    x,
    ROWS: tl.constexpr,
    EMAX: tl.constexpr,
    EMIN: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    MAX_NORMAL: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """Biased exponents [ROWS] under the scale rule."""
    code = _shared_exponent(x, EMAX, THRESHOLD)
    if SEARCH:
        # Without signs, which squares do not need, and in units of the smaller scale: the larger one's elements are
        # those of twice the size. None of them is too large for a value, and no code is 254 (only that of NaN is 255).
        scaled = tl.abs(x * _to_scaled_units(code)[:, None])
        rounded = tl.minimum(_round_magnitude(scaled, 2.0**EMIN, MANTISSA_BITS), MAX_NORMAL)
        rounded_up = _round_magnitude(scaled, 2.0 ** (EMIN + 1), MANTISSA_BITS)
        is_better = _block_error(scaled - rounded_up, ROWS) < _block_error(scaled - rounded, ROWS)
        code = tl.where(is_better & (code < 254), code + 1, code)
    return code


@_jit
def _as_words(codes, ROWS: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr):
    """Codes in the highest BITS bits (uint32 [ROWS, n * WORDS]) -> words [ROWS, WORDS], the first code lowest.

    Four bytes at a time: the codes of a word lie in one thread, so putting them together moves no data.
    """
    in_word: tl.constexpr = 32 // BITS
    down = 32 - BITS - tl.arange(0, in_word) * BITS
    words = tl.sum(tl.reshape(codes, (ROWS, WORDS, in_word)) >> down.to(tl.uint32)[None, None, :], axis=2)
    return words.to(tl.int32, bitcast=True)


@_jit
def _store_words(packed_ptr, codes, scale_code, rows, exists, ROWS: tl.constexpr, BITS: tl.constexpr):
    """Store what `_round_to_code` returned; zeros under the NaN scale."""
    words = tl.where(scale_code[:, None] == 255, 0, _as_words(codes, ROWS, BITS, BITS))
    tl.store(packed_ptr + _offsets(rows, BITS), words, mask=exists[:, None])


@_jit
def _store_codes(packed_ptr, codes, scale_code, rows, exists, ROWS: tl.constexpr, BITS: tl.constexpr):
    """Store codes in the lowest BITS bits (int32 [ROWS, 32])."""
    at_top = (codes << (32 - BITS)).to(tl.uint32, bitcast=True)
    _store_words(packed_ptr, at_top, scale_code, rows, exists, ROWS, BITS)


@_jit
def _stage(x, ROWS: tl.constexpr, GROUPS: tl.constexpr, DISTANCE: tl.constexpr):
    """Sums and differences of values of x [ROWS, 32] that are DISTANCE apart, in their places.

    The bits of a pair, added as integers, less those of one value are those of the other: a thread gets them by one
    exchange of registers, or has them already.
    """
    pairs = tl.reshape(x, (ROWS, GROUPS, 2, DISTANCE))
    other = _float(tl.sum(_bits(pairs), axis=2, keep_dims=True) - _bits(pairs))
    sign = (1 - 2 * tl.arange(0, 2)).to(tl.float32)[None, None, :, None]  # fused or not, the product is exact
    pairs = tl.fma(pairs, tl.broadcast_to(sign, (ROWS, GROUPS, 2, DISTANCE)), other)
    return tl.reshape(pairs, (ROWS, GROUPS * 2 * DISTANCE))


@_jit
def _over_root(x, VIEW: tl.constexpr, ROOT: tl.constexpr = ROOT):
    """x / sqrt(32), to be rounded to VIEW.

    Where that is narrower than FP32, a product with one correction does. From 2^-105 on it is the FP32 quotient; below
    it rounds to the same BF16 value, since x, a sum of BF16 values, is a multiple of 2^-133. Both were tried for all
    FP32 numbers. Nothing is corrected where the rest is zero, for the sign of zero, or NaN, as that of infinity is.
    """
    if tl.float32 != VIEW:
        root = tl.full(x.shape, -ROOT, tl.float32)
        reciprocal = tl.full(x.shape, 1.0 / ROOT, tl.float32)
        quotient = x * reciprocal
        rest = tl.fma(quotient, root, x)
        return tl.where(tl.abs(rest) > 0, tl.fma(rest, reciprocal, quotient), quotient)
    return tl.div_rn(x, ROOT)


@_jit
def _transformed(x, ROWS: tl.constexpr, VIEW: tl.constexpr):
    """Blocks x [ROWS, 32], FP32 values of VIEW, times a Hadamard matrix, to be rounded to VIEW: see ../hadamard.py."""
    x = _stage(x, ROWS, 1, 16)
    x = _stage(x, ROWS, 2, 8)
    x = _stage(x, ROWS, 4, 4)
    x = _stage(x, ROWS, 8, 2)
    return _over_root(_stage(x, ROWS, 16, 1), VIEW)


@_jit
def _seen(x, ROWS: tl.constexpr, STORED: tl.constexpr, VIEW: tl.constexpr, HADAMARD: tl.constexpr):
    """Blocks x [ROWS, 32] (FP32), which are stored in one dtype, as seen in another, transformed or not (FP32)."""
    if STORED != VIEW:
        x = _to_fp32(_to_view(x, VIEW))
    if HADAMARD:
        x = _to_fp32(_to_view(_transformed(x, ROWS, VIEW), VIEW))
    return x


@_jit
def _stored(values, ROWS: tl.constexpr, VIEW: tl.constexpr, BACK: tl.constexpr):
    """Rounded values [ROWS, 32] (FP32) in VIEW, transformed back or not."""
    if BACK:
        values = _transformed(_to_fp32(_to_view(values, VIEW)), ROWS, VIEW)
    return _to_view(values, VIEW)


@_jit
def fake_quantize_kernel(
    x_ptr,
    out_ptr,
    blocks,
    ROWS: tl.constexpr,
    EMAX: tl.constexpr,
    EMIN: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    MAX_NORMAL: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SEARCH: tl.constexpr,
    VIEW: tl.constexpr,
    HADAMARD: tl.constexpr,
    BACK: tl.constexpr,
):
    rows, exists = _tile(blocks, ROWS)
    offsets = _offsets(rows, 32)
    x = _to_fp32(tl.load(x_ptr + offsets, mask=exists[:, None], other=0))
    x = _seen(_to_fp32(_to_view(x, VIEW)), ROWS, VIEW, VIEW, HADAMARD)
    code = _find_scale(x, ROWS, EMAX, EMIN, MANTISSA_BITS, MAX_NORMAL, THRESHOLD, SEARCH)
    elements = _round(x * _to_scaled_units(code)[:, None], EMIN, MANTISSA_BITS, MAX_NORMAL)
    out = elements * _scale_value(code)[:, None]  # a NaN scale makes its whole block NaN
    tl.store(out_ptr + offsets, _stored(out, ROWS, VIEW, BACK), mask=exists[:, None])


@_jit
def quantize_kernel(
    x_ptr,
    packed_ptr,
    scale_ptr,
    blocks,
    ROWS: tl.constexpr,
    EMAX: tl.constexpr,
    EMIN: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    MAX_NORMAL: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SEARCH: tl.constexpr,
    BITS: tl.constexpr,
    VIEW: tl.constexpr,
    HADAMARD: tl.constexpr,
):
    rows, exists = _tile(blocks, ROWS)
    x = _to_fp32(tl.load(x_ptr + _offsets(rows, 32), mask=exists[:, None], other=0))
    x = _seen(x, ROWS, x_ptr.dtype.element_ty, VIEW, HADAMARD)
    code = _find_scale(x, ROWS, EMAX, EMIN, MANTISSA_BITS, MAX_NORMAL, THRESHOLD, SEARCH)
    tl.store(scale_ptr + rows, code.to(tl.uint8), mask=exists)
    codes = _round_to_code(x * _to_scaled_units(code)[:, None], EMIN, MANTISSA_BITS, BITS, MAX_NORMAL)
    _store_words(packed_ptr, codes, code, rows, exists, ROWS, BITS)


@_jit
def quantize_to_scale_kernel(
    x_ptr,
    scale_ptr,
    packed_ptr,
    blocks,
    ROWS: tl.constexpr,
    EMIN: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    MAX_NORMAL: tl.constexpr,
    BITS: tl.constexpr,
    VIEW: tl.constexpr,
):
    rows, exists = _tile(blocks, ROWS)
    x = _to_fp32(tl.load(x_ptr + _offsets(rows, 32), mask=exists[:, None], other=0))
    x = _to_fp32(_to_view(x, VIEW))
    code = tl.load(scale_ptr + rows, mask=exists, other=0).to(tl.int32)
    # Elements may exceed the largest one by far here, so they are cut off before rounding. 2^-127, for the largest
    # scale of all, which no rule gives, is subnormal.
    to_scaled = tl.where(code == 254, _scale_value(code * 0), _to_scaled_units(code))
    scaled = x * to_scaled[:, None]
    scaled = tl.minimum(tl.maximum(scaled, -MAX_NORMAL), MAX_NORMAL)
    codes = _round_to_code(scaled, EMIN, MANTISSA_BITS, BITS, MAX_NORMAL)
    _store_words(packed_ptr, codes, code, rows, exists, ROWS, BITS)


@_jit
def dequantize_kernel(
    packed_ptr,
    scale_ptr,
    out_ptr,
    blocks,
    ROWS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    BIAS_FACTOR: tl.constexpr,
    BITS: tl.constexpr,
    MAX_CODE: tl.constexpr,
    VIEW: tl.constexpr,
    BACK: tl.constexpr,
):
    rows, exists = _tile(blocks, ROWS)
    codes = tl.load(packed_ptr + _offsets(rows, 4 * BITS), mask=exists[:, None], other=0).to(tl.int32)
    if BITS == 4:
        codes = tl.reshape(tl.join(codes & 0xF, codes >> 4), (ROWS, 32))
    magnitude = codes & ((1 << (BITS - 1)) - 1)
    # An element's exponent and mantissa, put where FP32 has its own, differ from it by the two biases only; subnormal
    # elements become subnormal FP32 numbers, and one exact multiplication makes up for the biases of both.
    element = _float(magnitude << (23 - MANTISSA_BITS)) * BIAS_FACTOR
    element = tl.where(magnitude > MAX_CODE, float("nan"), element)
    # The sign bit is set, not the value negated: Triton negates by subtracting from zero, which has no -0.0.
    value = _float(_bits(element) | (codes >> (BITS - 1)) << 31)
    scale = _scale_value(tl.load(scale_ptr + rows, mask=exists, other=0).to(tl.int32))
    out = _stored(value * scale[:, None], ROWS, VIEW, BACK)
    tl.store(out_ptr + _offsets(rows, 32), out, mask=exists[:, None])
