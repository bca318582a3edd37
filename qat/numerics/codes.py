"""Element codes <-> bytes, in the layouts that compressed-tensors, AutoRound and vLLM share.

MXFP4 puts two codes into a byte, element 2i in the low nibble and 2i + 1 in the high one; an MXFP8 code is its own
byte.
"""

from __future__ import annotations

import torch

from .formats import E2M1_VALUES, MXFormat


def encode(elements: torch.Tensor, fmt: MXFormat) -> torch.Tensor:
    """Elements in scaled units, each exactly a value of `fmt` (FP32 [..., K]) -> packed bytes (uint8).

    Returns [..., K / 2] for MXFP4 and [..., K] for MXFP8.
    """
    if fmt.bits == 8:
        return elements.to(torch.float8_e4m3fn).view(torch.uint8)
    magnitudes = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=elements.device)
    codes = torch.searchsorted(magnitudes, elements.abs().contiguous()) + 8 * elements.signbit()
    codes = codes.to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4


def decode(packed: torch.Tensor, fmt: MXFormat) -> torch.Tensor:
    """Packed bytes (uint8) -> elements in scaled units (FP32 [..., K]); the inverse of `encode`."""
    if fmt.bits == 8:
        return packed.view(torch.float8_e4m3fn).float()
    values = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)], dtype=torch.float32, device=packed.device)
    codes = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)
    return values[codes.int()]
