"""A step of StochasticAdamW on a GPU: one kernel that reads and writes every tensor once; the bits of `update_plain`.

BF16 travels as int16, in and out: its bits are the upper half of FP32's. With TRITON_INTERPRET=1 the kernel runs on CPU
tensors, which is how it is tested without a GPU.
"""

from __future__ import annotations

from typing import Any

import torch

from qat.numerics.kernels.triton_device import tl, triton
from qat.numerics.kernels.triton_launch import interpreting, launch

from .random_bits import HIGH_WORD, MIX_1, MIX_2, SECOND_WORD, signed

_ELEMENTS, _WARPS = 1024, 4  # of a program


def is_available(device: torch.device) -> bool:
    """Whether the kernel can update tensors on `device`."""
    return triton is not None and (device.type == "cuda" or (interpreting() and device.type == "cpu"))


def update(flat: list[torch.Tensor], scalars: Any, keys: tuple[int, int], first: int) -> None:
    """See `stochastic_adamw.update_plain`; the parameter is BF16.

    Args:
        flat: parameter, gradient, first and second moment [n], contiguous.
    """
    count = flat[0].numel()
    if not count:
        return
    is_bf16 = [tensor.dtype == torch.bfloat16 for tensor in flat]
    tensors = tuple(t.view(torch.int16) if narrow else t for t, narrow in zip(flat, is_bf16, strict=True))
    options = {"GRAD_BF16": is_bf16[1], "MOMENTS_BF16": is_bf16[2], "ELEMENTS": _ELEMENTS, "num_warps": _WARPS}
    options |= {"MIX1": MIX_1, "MIX2": MIX_2, "HIGH": signed(HIGH_WORD), "SECOND": SECOND_WORD}
    launch(_kernel, (triton.cdiv(count, _ELEMENTS),), tensors, count, first, *keys, *scalars, **options)


def _jit(function):
    return triton.jit(function) if triton is not None else function


def _jit_kernel(function):
    """Without a variant for keys and counts that happen to be 1 or multiples of 16."""
    return (
        triton.jit(function, do_not_specialize=["count", "first", "key0", "key1"]) if triton is not None else function
    )


@_jit
def _mix(words, MIX1: tl.constexpr, MIX2: tl.constexpr):
    words = (words ^ ((words >> 16) & 0xFFFF)) * MIX1
    words = (words ^ ((words >> 15) & 0x1FFFF)) * MIX2
    return words ^ ((words >> 16) & 0xFFFF)


@_jit
def _from_bf16(halves):
    return (halves.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@_jit
def _rounded(values, bits):
    """BF16 as int16, from FP32 values and 16 random bits."""
    patterns = values.to(tl.int32, bitcast=True)
    rounded = (patterns + (bits & 0xFFFF)) >> 16
    return tl.where((patterns & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).to(tl.int16)


@_jit_kernel
def _kernel(
    parameter_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, count, first, key0, key1,
    beta1, beta2, rest1, rest2, root_correction2, eps, decay, step_size,
    GRAD_BF16: tl.constexpr, MOMENTS_BF16: tl.constexpr, ELEMENTS: tl.constexpr,
    MIX1: tl.constexpr, MIX2: tl.constexpr, HIGH: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    exists = offsets < count
    grad = tl.load(grad_ptr + offsets, mask=exists, other=0)
    m = tl.load(exp_avg_ptr + offsets, mask=exists, other=0)
    v = tl.load(exp_avg_sq_ptr + offsets, mask=exists, other=0)
    if GRAD_BF16:
        grad = _from_bf16(grad)
    if MOMENTS_BF16:
        m = _from_bf16(m)
        v = _from_bf16(v)
    m = m * beta1 + grad * rest1
    v = v * beta2 + (grad * grad) * rest2
    root = tl.math.div_rn(tl.math.sqrt_rn(v), tl.zeros_like(v) + root_correction2)
    quotient = tl.math.div_rn(m, root + eps)
    value = _from_bf16(tl.load(parameter_ptr + offsets, mask=exists, other=0)) * decay - quotient * step_size
    element = offsets + first
    words = _mix(element.to(tl.int32) ^ key0, MIX1, MIX2)
    words = _mix(words ^ ((element >> 32).to(tl.int32) * HIGH + key1), MIX1, MIX2)
    tl.store(parameter_ptr + offsets, _rounded(value, words >> 16), mask=exists)
    if MOMENTS_BF16:
        tl.store(exp_avg_sq_ptr + offsets, _rounded(v, words), mask=exists)
        tl.store(exp_avg_ptr + offsets, _rounded(m, (words * SECOND) >> 16), mask=exists)
    else:
        tl.store(exp_avg_sq_ptr + offsets, v, mask=exists)
        tl.store(exp_avg_ptr + offsets, m, mask=exists)
