"""Element codes <-> bytes, in the layouts that compressed-tensors, AutoRound and vLLM share.

E2M1 and INT4 put two codes into a byte, element 2i in the low nibble and 2i + 1 in the high one; an E4M3 code is its
own byte. An INT4 code is the value + 8. Four such bytes, read as a little-endian 32-bit word, hold element j in bits 4j
to 4j + 3, which is how checkpoints store them.
"""

from __future__ import annotations

import torch

from .formats import E2M1, E2M1_VALUES, E4M3, INT4, Element

INT4_OFFSET = 8


def encode(elements: torch.Tensor, element: Element) -> torch.Tensor:
    """Values of `element` (FP32 [..., K], each exactly one) -> bytes, uint8 [..., K * bits / 8]."""
    if element == E4M3:
        return elements.to(torch.float8_e4m3fn).view(torch.uint8)
    codes = (elements + INT4_OFFSET if element == INT4 else _e2m1_codes(elements)).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4


def _e2m1_codes(elements: torch.Tensor) -> torch.Tensor:
    magnitudes = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=elements.device)
    return torch.searchsorted(magnitudes, elements.abs().contiguous()) + 8 * elements.signbit()


def decode(codes: torch.Tensor, element: Element) -> torch.Tensor:
    """Bytes (uint8) -> values of `element` (FP32 [..., K]); the inverse of `encode`."""
    if element == E4M3:
        return codes.view(torch.float8_e4m3fn).float()
    nibbles = torch.stack((codes & 0xF, codes >> 4), dim=-1).flatten(-2)
    if element == INT4:
        return nibbles.float() - INT4_OFFSET
    assert element == E2M1, element.name
    values = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)], dtype=torch.float32, device=codes.device)
    return values[nibbles.int()]


def as_stored(codes: torch.Tensor, element: Element) -> torch.Tensor:
    """Bytes as checkpoints hold them: float8_e4m3fn for E4M3, uint8 for E2M1, int32 for INT4; no copy."""
    return codes.contiguous().view(element.storage)
