"""Products with a Hadamard matrix, 32 values at a time, in plain PyTorch: the specification.

T = S / sqrt(32), where S is Sylvester's matrix of 1 and -1: symmetric, and its own inverse. The product with S is five
stages of sums and differences of values 16, 8, 4, 2 and 1 apart, in FP32 and in this order, so that its bits depend
neither on a device nor on a library's order of sums. Sums of 32 BF16 values are exact, in any order, as long as their
exponents span no more than 11; so they mostly are what a product of matrices gives.
"""

from __future__ import annotations

import torch

SIZE = 32
STAGES = (16, 8, 4, 2, 1)  # how far apart the values are that a stage adds
ROOT = 5.656854152679443  # sqrt(32) in FP32
_SIGNS = [[-1 if (row & column).bit_count() % 2 else 1 for column in range(SIZE)] for row in range(SIZE)]


def matrix(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Sylvester's matrix S [32, 32] of 1 and -1, symmetric, S S = 32."""
    return torch.tensor(_SIGNS, device=device, dtype=dtype)


def transform(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x [..., K], seen in `dtype`, times T in blocks of 32 -> [..., K] in `dtype`, computed in FP32.

    Raises:
        ValueError: 32 does not divide K.
    """
    check_shape(x)
    values = x.to(dtype).float()
    for stage in STAGES:
        first, second = values.unflatten(-1, (-1, 2, stage)).unbind(-2)
        values = torch.stack((first + second, first - second), -2).flatten(-3)
    root = torch.full((1,), ROOT, dtype=torch.float32, device=x.device)  # by a number GPUs would multiply, not divide
    return (values / root).to(dtype)


def check_shape(x: torch.Tensor) -> None:
    """Raise a ValueError unless x can be cut into blocks."""
    if x.dim() == 0 or x.shape[-1] % SIZE:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last dimension is cut into blocks of {SIZE}")
