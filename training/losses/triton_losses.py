"""Divergence and cross-entropy of rows of logits on a GPU: a pass over the logits forward, another one backward.

A program takes a row. Forward, each lane keeps the largest logit it has met and sums exponentials relative to it
(Milakov and Gimelshein, arXiv:1805.02867); what the backward pass needs of a row are its largest logit and the
logarithm of its sum. Backward, the gradient is computed from the logits again, multiplied by that of the loss in FP32
and rounded once. So a logit costs 2 bytes forward, 2 to read and 2 to write backward; nothing of the logits' size is
kept in FP32. No two programs write to one place, and every sum has one order: results have the same bits each time.

Numbers are FP32 in between, with u = 2^-24 and T the temperature. The row's largest logit is subtracted before anything
else is rounded, so the size of the logits does not count: log p has an error of 3 u |log p| + 2 u log V, and p the
relative error of that and of 2^x, 2 ulp. A divergence is sum q (t - s) / T less the difference of the logarithms of the
sums; its error is 4 u sum q |t - s| / T + 3 u log V.

distillation.py has the plain formulas. With TRITON_INTERPRET=1 the kernels run on CPU tensors.
"""

from __future__ import annotations

import math

import torch
from torch.autograd.function import once_differentiable

from qat.numerics.kernels.triton_device import _to_fp32, _to_view, tl, triton
from qat.numerics.kernels.triton_kernels import interpreting, launch, triton_dtype

_COLUMNS, _WARPS = 2048, 4  # of a program at a time
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def serves(*logits: torch.Tensor) -> bool:
    """Whether the kernels take these logits, [n, V] of one shape on one device; otherwise the plain formulas do."""
    first = logits[0]
    is_there = triton is not None and (first.is_cuda or interpreting()) and not torch.compiler.is_compiling()
    return is_there and all(
        type(x) is torch.Tensor and x.dtype in _DTYPES and x.shape == first.shape and x.device == first.device
        for x in logits
    )


class ForwardKL(torch.autograd.Function):
    """KL(teacher || student) of each row, as `distillation.forward_kl` defines it; FP32 [n].

    Where a logit is NaN or infinite, the values are not finite where those of the plain formula are not.
    """

    @staticmethod
    def forward(ctx, student, teacher, temperature):
        student, teacher = student.contiguous(), teacher.contiguous()
        result, stats = _empty(student, 1), _empty(student, 4)
        _launch(_kl_kernel, (student, teacher, result, stats), temperature)
        _save(ctx, temperature, student, teacher, stats)
        return result[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        student, teacher, stats = ctx.saved_tensors
        gradient = torch.empty_like(student)
        _launch(_kl_backward_kernel, (student, teacher, stats, _fp32(grad), gradient), ctx.temperature, gradient.dtype)
        return gradient, None, None


class CrossEntropy(torch.autograd.Function):
    """-log softmax(student / T)[ids] * T^2 of each row; FP32 [n].

    Args of `apply`:
        student: [n, V].
        ids: integers [n]; one that is no token, negative or at least V, makes a row's loss and gradient NaN.
        temperature: T.
    """

    @staticmethod
    def forward(ctx, student, ids, temperature):
        student, ids = student.contiguous(), ids.long().contiguous()
        result, stats = _empty(student, 1), _empty(student, 2)
        _launch(_ce_kernel, (student, ids, result, stats), temperature)
        _save(ctx, temperature, student, ids, stats)
        return result[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        student, ids, stats = ctx.saved_tensors
        gradient = torch.empty_like(student)
        _launch(_ce_backward_kernel, (student, ids, stats, _fp32(grad), gradient), ctx.temperature, gradient.dtype)
        return gradient, None, None


def _empty(student: torch.Tensor, columns: int) -> torch.Tensor:
    return torch.empty(len(student), columns, dtype=torch.float32, device=student.device)


def _save(ctx, temperature: float, *tensors: torch.Tensor) -> None:
    ctx.temperature = temperature
    if ctx.needs_input_grad[0]:
        ctx.save_for_backward(*tensors)


def _fp32(grad: torch.Tensor) -> torch.Tensor:
    return grad.to(torch.float32).contiguous()  # that of a sum has the stride 0


def _launch(kernel, tensors: tuple, temperature: float, view: torch.dtype | None = None) -> None:
    rows, vocabulary = tensors[0].shape
    if rows:
        options = {"COLUMNS": _COLUMNS, "num_warps": _WARPS} | ({} if view is None else {"VIEW": triton_dtype(view)})
        launch(kernel, (rows,), tensors, vocabulary, math.log2(math.e) / temperature, float(temperature), **options)


# ---- Kernels, with scale = log2(e) / T: exp((s - largest) / T) = 2^((s - largest) scale) ----


def _jit(function):
    return triton.jit(function) if triton is not None else function


@_jit
def _load(row_ptr, columns, count):
    """Logits, FP32; -inf beyond the row."""
    exists = columns < count
    return tl.where(exists, _to_fp32(tl.load(row_ptr + columns, mask=exists, other=0)), float("-inf"))


@_jit
def _of_row(largest, total, scale):
    """From lanes' largest logits and sums: the row's, and the factors that lanes' sums had in it."""
    row_largest = tl.max(largest, 0)
    factors = tl.exp2((largest - row_largest) * scale)
    return row_largest, tl.sum(total * factors, 0), factors


@_jit
def _kl_kernel(student_ptr, teacher_ptr, result_ptr, stats_ptr, count, scale, temperature, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    largest_s = tl.full([COLUMNS], -3.4028234663852886e38, tl.float32)
    largest_t = tl.full([COLUMNS], -3.4028234663852886e38, tl.float32)
    total_s = tl.zeros([COLUMNS], tl.float32)
    total_t = tl.zeros([COLUMNS], tl.float32)
    weighted = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, count, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        s = _load(student_ptr + row * count, columns, count)
        t = _load(teacher_ptr + row * count, columns, count)
        now_s = tl.maximum(largest_s, s)
        now_t = tl.maximum(largest_t, t)
        total_s = total_s * tl.exp2((largest_s - now_s) * scale) + tl.exp2((s - now_s) * scale)
        down = tl.exp2((largest_t - now_t) * scale)
        q = tl.exp2((t - now_t) * scale)
        total_t = total_t * down + q
        weighted = weighted * down + tl.where(columns < count, q * (t - s), 0.0)
        largest_s = now_s
        largest_t = now_t
    row_s, sum_s, _ = _of_row(largest_s, total_s, scale)
    row_t, sum_t, factors = _of_row(largest_t, total_t, scale)
    mean = tl.sum(weighted * factors, 0) / sum_t  # of t - s under q
    divergence = (mean - (row_t - row_s)) / temperature - (tl.log(sum_t) - tl.log(sum_s))
    tl.store(result_ptr + row, divergence * temperature * temperature)
    tl.store(stats_ptr + row * 4, row_s)
    tl.store(stats_ptr + row * 4 + 1, tl.log2(sum_s))
    tl.store(stats_ptr + row * 4 + 2, row_t)
    tl.store(stats_ptr + row * 4 + 3, tl.log2(sum_t))


@_jit
def _kl_backward_kernel(
    student_ptr, teacher_ptr, stats_ptr, grad_ptr, gradient_ptr, count, scale, temperature,
    COLUMNS: tl.constexpr, VIEW: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(grad_ptr + row) * temperature
    row_s = tl.load(stats_ptr + row * 4)
    log_s = tl.load(stats_ptr + row * 4 + 1)
    row_t = tl.load(stats_ptr + row * 4 + 2)
    log_t = tl.load(stats_ptr + row * 4 + 3)
    for start in range(0, count, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        p = tl.exp2((_load(student_ptr + row * count, columns, count) - row_s) * scale - log_s)
        q = tl.exp2((_load(teacher_ptr + row * count, columns, count) - row_t) * scale - log_t)
        tl.store(gradient_ptr + row * count + columns, _to_view((p - q) * factor, VIEW), mask=columns < count)


@_jit
def _ce_kernel(student_ptr, ids_ptr, result_ptr, stats_ptr, count, scale, temperature, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full([COLUMNS], -3.4028234663852886e38, tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, count, COLUMNS):
        s = _load(student_ptr + row * count, start + tl.arange(0, COLUMNS), count)
        now = tl.maximum(largest, s)
        total = total * tl.exp2((largest - now) * scale) + tl.exp2((s - now) * scale)
        largest = now
    row_largest, row_sum, _ = _of_row(largest, total, scale)
    label = tl.load(ids_ptr + row)
    is_token = (label >= 0) & (label < count)
    row_sum = tl.where(is_token, row_sum, float("nan"))
    chosen = _to_fp32(tl.load(student_ptr + row * count + tl.where(is_token, label, 0)))
    loss = tl.log(row_sum) - (chosen - row_largest) / temperature
    tl.store(result_ptr + row, loss * temperature * temperature)
    tl.store(stats_ptr + row * 2, row_largest)
    tl.store(stats_ptr + row * 2 + 1, tl.log2(row_sum))


@_jit
def _ce_backward_kernel(
    student_ptr, ids_ptr, stats_ptr, grad_ptr, gradient_ptr, count, scale, temperature,
    COLUMNS: tl.constexpr, VIEW: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(grad_ptr + row) * temperature
    row_largest = tl.load(stats_ptr + row * 2)
    log_of_sum = tl.load(stats_ptr + row * 2 + 1)
    label = tl.load(ids_ptr + row)
    for start in range(0, count, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        p = tl.exp2((_load(student_ptr + row * count, columns, count) - row_largest) * scale - log_of_sum)
        gradient = (p - tl.where(columns == label, 1.0, 0.0)) * factor
        tl.store(gradient_ptr + row * count + columns, _to_view(gradient, VIEW), mask=columns < count)
