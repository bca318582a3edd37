"""Merging a low-rank adapter into a weight: W + s B A, in an order of additions that is the same everywhere.

A library's matrix product adds in an order that depends on the device, the shape and the version, and a last bit of
FP32 decides now and then into which BF16 value, and so to which code, a weight is rounded. Here each element is a chain
of fused multiply-adds over the ranks in their order,

    d = fma(B[n, r], A[r, k], ... fma(B[n, 1], A[1, k], fma(B[n, 0], A[0, k], 0)))
    W'[n, k] = W[n, k] + s d                                        each operation rounded to FP32

and W' is rounded to the dtype of W. So what is trained on a GPU, merged on a CPU and packed there is the same weight,
bit for bit. This is the specification in plain PyTorch, with which the kernels are compared.
"""

from __future__ import annotations

import torch


def merge(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """W + s B A, rounded to the dtype of W.

    Args:
        weight: W [..., N, K], float32, bfloat16 or float16.
        a, b: A [..., r, K] and B [..., N, r], float32.
        scaling: s, as a float32.

    Returns:
        [..., N, K] in W's dtype, contiguous.
    """
    product = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    for rank in range(a.shape[-2]):
        product = _fma(b[..., :, rank, None], a[..., rank, None, :], product)
    scale = torch.tensor(scaling, dtype=torch.float32, device=weight.device)
    return (weight.float() + scale * product).to(weight.dtype).contiguous()


def check_factors(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Raise a ValueError unless A [..., r, K] and B [..., N, r] belong to W [..., N, K]."""
    *stack, rows, columns = weight.shape
    rank = a.shape[-2] if a.ndim >= 2 else 0
    if tuple(a.shape) != (*stack, rank, columns) or tuple(b.shape) != (*stack, rows, rank):
        raise ValueError(
            f"an adapter with A {tuple(a.shape)} and B {tuple(b.shape)} does not belong to a weight "
            f"{tuple(weight.shape)}; A must be [..., r, K] and B [..., N, r]"
        )


def _fma(b: torch.Tensor, a: torch.Tensor, addend: torch.Tensor) -> torch.Tensor:
    """b * a + addend, rounded once to FP32.

    A product of two FP32 numbers is exact in FP64. Their sum is rounded to odd there, so that the second rounding, to
    FP32, does what one alone would (Boldo and Melquiond, IEEE Transactions on Computers 57(4), 2008).
    """
    product, addend = b.double() * a.double(), addend.double()
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    is_even = total.view(torch.int64) & 1 == 0
    odd = torch.nextafter(total, torch.where(error > 0, torch.inf, -torch.inf).to(total.dtype))
    return torch.where((error != 0) & is_even & total.isfinite(), odd, total).float()
