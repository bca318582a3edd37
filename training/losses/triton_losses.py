"""Divergence and cross-entropy of rows of logits on a GPU: a pass over the logits forward, another one backward.

A program takes a row. Forward, each lane keeps the largest logit it has met and sums exponentials relative to it
(Milakov and Gimelshein, arXiv:1805.02867); what the backward pass needs of a row are its largest logit and the
logarithm of its sum. Backward, the gradient is computed from the logits again, multiplied by that of the loss in FP32
and rounded once. So a logit costs 2 bytes forward, 2 to read and 2 to write backward; nothing of the logits' size is
kept in FP32. No two programs write to one place, and every sum has one order: results have the same bits each time.

Numbers are FP32 in between, with u = 2^-24 and T the temperature. Logits are subtracted from the row's largest before
they are divided, so log p has the error 3 u |log p| + u log V, whatever the size of the logits, and p the relative
error of `exp` (2 ulp and u |log p|) besides. A divergence is sum q (t - s) / T less the difference of the two
logarithms of sums, and its error 4 u sum q |t - s| / T + 2 u log V.

distillation.py has the plain formulas. With TRITON_INTERPRET=1 the kernels run on CPU tensors.
"""

from __future__ import annotations

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
        launch(kernel, (rows,), tensors, vocabulary, 1 / temperature, float(temperature), **options)


# ---- Kernels ----


def _jit(function):
    return triton.jit(function) if triton is not None else function


@_jit
def _load(row_ptr, columns, count):
    """Logits, FP32; -inf beyond the row."""
    exists = columns < count
    return tl.where(exists, _to_fp32(tl.load(row_ptr + columns, mask=exists, other=0)), float("-inf"))


@_jit
def _of_row(largest, total, inverse):
    """From lanes' largest logits and sums: the row's largest, the logarithm of its sum, the factors of lanes' sums."""
    row_largest = tl.max(largest, 0)
    factors = tl.exp((largest - row_largest) * inverse)
    return row_largest, tl.log(tl.sum(total * factors, 0)), factors


@_jit
def _kl_kernel(student_ptr, teacher_ptr, result_ptr, stats_ptr, count, inverse, temperature, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, COLUMNS)
    largest_s = tl.full([COLUMNS], -3.4028234663852886e38, tl.float32)
    largest_t = tl.full([COLUMNS], -3.4028234663852886e38, tl.float32)
    total_s = tl.zeros([COLUMNS], tl.float32)
    total_t = tl.zeros([COLUMNS], tl.float32)
    weighted = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, count, COLUMNS):
        columns = start + lanes
        s = _load(student_ptr + row * count, columns, count)
        t = _load(teacher_ptr + row * count, columns, count)
        now_s = tl.maximum(largest_s, s)
        now_t = tl.maximum(largest_t, t)
        total_s = total_s * tl.exp((largest_s - now_s) * inverse) + tl.exp((s - now_s) * inverse)
        down = tl.exp((largest_t - now_t) * inverse)
        q = tl.exp((t - now_t) * inverse)
        total_t = total_t * down + q
        weighted = weighted * down + tl.where(columns < count, q * ((t - s) * inverse), 0.0)
        largest_s = now_s
        largest_t = now_t
    row_s, log_s, _ = _of_row(largest_s, total_s, inverse)
    row_t, log_t, factors = _of_row(largest_t, total_t, inverse)
    mean = tl.sum(weighted * factors, 0) / tl.sum(total_t * factors, 0)
    divergence = mean - ((row_t - row_s) * inverse + (log_t - log_s))
    tl.store(result_ptr + row, divergence * temperature * temperature)
    tl.store(stats_ptr + row * 4, row_s)
    tl.store(stats_ptr + row * 4 + 1, log_s)
    tl.store(stats_ptr + row * 4 + 2, row_t)
    tl.store(stats_ptr + row * 4 + 3, log_t)


@_jit
def _kl_backward_kernel(
    student_ptr, teacher_ptr, stats_ptr, grad_ptr, gradient_ptr, count, inverse, temperature,
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
        p = tl.exp((_load(student_ptr + row * count, columns, count) - row_s) * inverse - log_s)
        q = tl.exp((_load(teacher_ptr + row * count, columns, count) - row_t) * inverse - log_t)
        tl.store(gradient_ptr + row * count + columns, _to_view((p - q) * factor, VIEW), mask=columns < count)


@_jit
def _ce_kernel(student_ptr, ids_ptr, result_ptr, stats_ptr, count, inverse, temperature, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, COLUMNS)
    largest = tl.full([COLUMNS], -3.4028234663852886e38, tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, count, COLUMNS):
        s = _load(student_ptr + row * count, start + lanes, count)
        now = tl.maximum(largest, s)
        total = total * tl.exp((largest - now) * inverse) + tl.exp((s - now) * inverse)
        largest = now
    row_largest, log_of_sum, _ = _of_row(largest, total, inverse)
    label = tl.load(ids_ptr + row)
    is_token = (label >= 0) & (label < count)
    chosen = _to_fp32(tl.load(student_ptr + row * count + tl.where(is_token, label, 0)))
    log_of_sum = tl.where(is_token, log_of_sum, float("nan"))
    tl.store(result_ptr + row, (log_of_sum - (chosen - row_largest) * inverse) * temperature * temperature)
    tl.store(stats_ptr + row * 2, row_largest)
    tl.store(stats_ptr + row * 2 + 1, log_of_sum)


@_jit
def _ce_backward_kernel(
    student_ptr, ids_ptr, stats_ptr, grad_ptr, gradient_ptr, count, inverse, temperature,
    COLUMNS: tl.constexpr, VIEW: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(grad_ptr + row) * temperature
    row_largest = tl.load(stats_ptr + row * 2)
    log_of_sum = tl.load(stats_ptr + row * 2 + 1)
    label = tl.load(ids_ptr + row)
    for start in range(0, count, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        p = tl.exp((_load(student_ptr + row * count, columns, count) - row_largest) * inverse - log_of_sum)
        gradient = (p - tl.where(columns == label, 1.0, 0.0)) * factor
        tl.store(gradient_ptr + row * count + columns, _to_view(gradient, VIEW), mask=columns < count)
