"""Distillation: the quantized student learns the whole next-token distribution of an unquantized teacher.

The loss is the forward Kullback-Leibler divergence KL(teacher || student) over labelled tokens (quantization-aware
distillation, arXiv:2601.20088). Logits have one row of vocabulary size for every token, so what is kept of them decides
the memory of a step: rows without a label are dropped first, both models' rows stay in the dtype they were computed in,
and FP32 exists for `CHUNK` tokens at a time, forward and backward.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from data.formatting import IGNORE_INDEX

CHUNK = 512  # tokens whose FP32 logits exist at one time: 2 x 512 x 50,000 x 4 bytes = 200 MB


def labelled_rows(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Logits [batch, time, V] -> [n, V]: the rows that predict a labelled token (the row before it), in order."""
    return logits[:, :-1][labels[:, 1:] != IGNORE_INDEX]


def forward_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(teacher || student) of each row, in nats.

    Args:
        student, teacher: logits [n, V], any float dtype; the gradient goes to `student` only.
        temperature: both are divided by it; the result is multiplied by its square, so that gradients keep their size
            (Hinton et al., arXiv:1503.02531).

    Returns:
        FP32 [n].
    """
    return _ForwardKL.apply(student, teacher, temperature)


class _ForwardKL(torch.autograd.Function):
    """Rows are recomputed in backward: only the logits themselves are kept, not their FP32 probabilities."""

    @staticmethod
    def forward(ctx, student, teacher, temperature):
        ctx.save_for_backward(student, teacher)
        ctx.temperature = temperature
        result = torch.empty(len(student), dtype=torch.float32, device=student.device)
        for rows in _chunks(len(student)):
            log_p, log_q = _log_probabilities(student[rows], teacher[rows], temperature)
            result[rows] = (log_q.exp() * (log_q - log_p)).sum(-1) * temperature**2
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        student, teacher = ctx.saved_tensors
        result = torch.empty_like(student)
        for rows in _chunks(len(student)):
            log_p, log_q = _log_probabilities(student[rows], teacher[rows], ctx.temperature)
            # d/ds of sum q (log q - log softmax(s / T)) * T^2 = (p - q) * T
            result[rows] = (log_p.exp_() - log_q.exp_()).mul_(grad[rows, None] * ctx.temperature).to(result.dtype)
        return result, None, None


def _chunks(count: int) -> list[slice]:
    return [slice(start, start + CHUNK) for start in range(0, count, CHUNK)]


def _log_probabilities(student, teacher, temperature):
    return tuple((logits.float() / temperature).log_softmax(-1) for logits in (student, teacher))


def check_teacher(student: nn.Module, teacher: nn.Module, student_tokenizer=None, teacher_tokenizer=None) -> None:
    """Refuse a teacher whose logits mean other tokens than the student's.

    Raises:
        ValueError: the vocabularies differ in size, or the tokenizers in content.
    """
    sizes = [model.config.get_text_config().vocab_size for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"--teacher_model_name_or_path has a vocabulary of {sizes[1]} tokens, the student of {sizes[0]}; "
            "distillation compares distributions over the same tokens, so choose a teacher of the same family"
        )
    if student_tokenizer is None or teacher_tokenizer is None:
        return
    ours, theirs = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    if ours != theirs:
        token = next(iter({*ours.items()} ^ {*theirs.items()}))[0]
        raise ValueError(
            f"the teacher's tokenizer differs from the student's, at token {token!r} (ids {theirs.get(token)} and "
            f"{ours.get(token)}); choose a teacher with the same tokenizer"
        )
