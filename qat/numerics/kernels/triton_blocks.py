"""Device functions for formats whose scales are not powers of two and belong to blocks; see triton_device.py."""

from __future__ import annotations

from .triton_device import _add_neighbours, _bits, _float, _jit, tl


@_jit
def _divide(x, scale, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """x [ROWS, SIZE] over the scales [ROWS] of its rows, rounded as in IEEE 754."""
    return tl.math.div_rn(x, tl.zeros((ROWS, SIZE), tl.float32) + scale[:, None])


@_jit
def _corrected(x, scale, reciprocal):
    """x / scale, rounded as in IEEE 754, by products (arguments of one shape); the reciprocal is rounded that way too.

    Two corrections: the first leaves less than a unit of the last place, from where the second rounds correctly
    (Markstein 1990). Quotients and rests that count must be normal numbers.
    """
    quotient = x * reciprocal
    quotient = tl.fma(tl.fma(quotient, -scale, x), reciprocal, quotient)
    return tl.fma(tl.fma(quotient, -scale, x), reciprocal, quotient)


@_jit
def _sum_of_squares(difference, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """[ROWS, SIZE] -> [ROWS]; neighbours are added in pairs, as in the plain functions."""
    total = difference * difference
    if SIZE >= 128:
        total = _add_neighbours(total, ROWS, 64)
        total = _add_neighbours(total, ROWS, 32)
    if SIZE >= 32:
        total = _add_neighbours(total, ROWS, 16)
    total = _add_neighbours(total, ROWS, 8)
    total = _add_neighbours(total, ROWS, 4)
    total = _add_neighbours(total, ROWS, 2)
    return tl.sum(total, axis=1)


@_jit
def _magnitude(x):
    """|x|, by its bits: those of |x| as a BF16 number would be converted to FP32 once more."""
    return _float(_bits(x) & 0x7FFFFFFF)


@_jit
def _largest_bits(x):
    """The largest magnitudes [ROWS] of rows, as FP32 bits; compared as integers, NaN and infinity come out on top."""
    return tl.max(_bits(x) & 0x7FFFFFFF, axis=1)


@_jit
def _unpack(packed_ptr, rows, exists, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """The codes of 4 bits (int32 [ROWS, SIZE]) of blocks of SIZE values."""
    offsets = rows[:, None] * (SIZE // 2) + tl.arange(0, SIZE // 2)[None, :]
    pairs = tl.load(packed_ptr + offsets, mask=exists[:, None], other=0).to(tl.int32)
    return tl.reshape(tl.join(pairs & 0xF, pairs >> 4), (ROWS, SIZE))
