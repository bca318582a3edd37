"""Element codes <-> bytes, in the layouts that compressed-tensors, AutoRound and vLLM share.

E2M1 puts two codes into a byte, element 2i in the low nibble and 2i + 1 in the high one; an E4M3 code is its own byte.
"""

from __future__ import annotations

import torch

from .formats import E2M1, E2M1_VALUES, E4M3, Element


def encode(elements: torch.Tensor, element: Element) -> torch.Tensor:
    """Values of `element` (FP32 [..., K], each exactly one) -> bytes, uint8 [..., K * bits / 8]."""
    if element == E4M3:
        return elements.to(torch.float8_e4m3fn).view(torch.uint8)
    assert element == E2M1, element.name
    magnitudes = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=elements.device)
    codes = torch.searchsorted(magnitudes, elements.abs().contiguous()) + 8 * elements.signbit()
    codes = codes.to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4


def decode(codes: torch.Tensor, element: Element) -> torch.Tensor:
    """Bytes (uint8) -> values of `element` (FP32 [..., K]); the inverse of `encode`."""
    if element == E4M3:
        return codes.view(torch.float8_e4m3fn).float()
    assert element == E2M1, element.name
    values = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)], dtype=torch.float32, device=codes.device)
    nibbles = torch.stack((codes & 0xF, codes >> 4), dim=-1).flatten(-2)
    return values[nibbles.int()]


def as_stored(codes: torch.Tensor, element: Element) -> torch.Tensor:
    """Bytes as checkpoints hold them: float8_e4m3fn for E4M3, uint8 for E2M1; no copy."""
    return codes.view(element.storage)
