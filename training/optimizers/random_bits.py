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


def random_words(keys: tuple[int, int], first: int, count: int, device: torch.device | str) -> torch.Tensor:
    """The random words of elements `first` to `first + count - 1`, int32 [count].

    Args:
        first: number of an element; no multiple of 2^32 may lie between it and the last one.
    """
    high = first >> 32
    assert count == 0 or (first + count - 1) >> 32 == high, (first, count)
    words = torch.arange(count, dtype=torch.int32, device=device).add_(signed(first)).bitwise_xor_(keys[0])
    _mix(words)
    words.bitwise_xor_(signed(keys[1] + high * HIGH_WORD))
    return _mix(words)


def _mix(words: torch.Tensor) -> torch.Tensor:
    """lowbias32, in place."""
    words.bitwise_xor_((words >> 16).bitwise_and_(0xFFFF)).mul_(MIX_1)
    words.bitwise_xor_((words >> 15).bitwise_and_(0x1FFFF)).mul_(MIX_2)
    return words.bitwise_xor_((words >> 16).bitwise_and_(0xFFFF))


def _split_mix(state: int) -> int:
    state = (state + _GOLDEN_64) & _MASK_64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return state ^ (state >> 31)
