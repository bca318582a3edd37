"""Random bits without a generator: a hash of (seed, step, parameter, element) in 32-bit integer arithmetic.

The bits of an element depend on these four numbers alone. So a resumed run draws those of a run that was never
interrupted, a CPU those of a GPU, and a process that holds a part of a parameter those that one process draws for this
part. No state is saved. The mixing function is the 32-bit permutation `lowbias32` of Chris Wellons (hash-prospector),
applied twice with 64 bits of key in between.

int32 stands for 32 unsigned bits: products wrap, and a shift to the right is masked.
"""

from __future__ import annotations

import torch

# As signed numbers: 0x7FEB352D, 0x846CA68B; 0x9E3779B9 is 2^32 over the golden ratio, 0x85EBCA6B a factor of Murmur3.
MIX_1, MIX_2 = 0x7FEB352D, 0x846CA68B - 2**32
HIGH_WORD, SECOND_WORD = 0x9E3779B9, 0x85EBCA6B - 2**32
_MASK_64 = 2**64 - 1
_GOLDEN_64 = 0x9E3779B97F4A7C15


def keys(seed: int, step: int, parameter: int) -> tuple[int, int]:
    """Two 32-bit keys, as signed numbers, for one step of one parameter: SplitMix64 over the three numbers."""
    state = 0
    for number in (seed, step, parameter):
        state = _split_mix(state ^ (number & _MASK_64))
    return signed(state), signed(state >> 32)


def signed(word: int) -> int:
    """The lowest 32 bits of `word` as the signed number that int32 has for them."""
    return ((word + 2**31) & (2**32 - 1)) - 2**31


def random_words(keys: tuple[int, int], first: int, words: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """Fill `words`, int32 [n], with those of the elements `first` to `first + n - 1`.

    Args:
        first: number of an element; no multiple of 2^32 may lie between it and the last one.
        scratch: int32 [n], overwritten.
    """
    high, count = first >> 32, len(words)
    assert count == 0 or (first + count - 1) >> 32 == high, (first, count)
    torch.arange(count, out=words)
    _mix(words.add_(signed(first)).bitwise_xor_(keys[0]), scratch)
    return _mix(words.bitwise_xor_(signed(keys[1] + high * HIGH_WORD)), scratch)


def _mix(words: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """lowbias32, in place."""
    for shift, mask, factor in ((16, 0xFFFF, MIX_1), (15, 0x1FFFF, MIX_2), (16, 0xFFFF, None)):
        words.bitwise_xor_(torch.bitwise_right_shift(words, shift, out=scratch).bitwise_and_(mask))
        if factor is not None:
            words.mul_(factor)
    return words


def _split_mix(state: int) -> int:
    state = (state + _GOLDEN_64) & _MASK_64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return state ^ (state >> 31)
