"""Distillation: the quantized student learns the whole next-token distribution of an unquantized teacher.

The loss is the forward Kullback-Leibler divergence KL(teacher || student) over labelled tokens (quantization-aware
distillation, arXiv:2601.20088). An `Objective` compares the logits of a batch's labelled tokens with their
targets, some tokens at a time; chunked.py calls it so that logits exist for those tokens only. The teacher's
distributions come in one of two forms: its hidden states, from which its head computes logits when they are needed, or
a few token ids with weights (teachers/cache.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.autograd.function import once_differentiable

from data.conversations.formatting import IGNORE_INDEX

from . import triton_losses

CHUNK = 512  # tokens whose FP32 logits exist at one time: 512 x 50,000 x 4 bytes = 100 MB for each of a few tensors


def chunks(count: int, size: int | None = None) -> list[slice]:
    """`count` tokens in slices of at most `size`, CHUNK by default."""
    size = size or CHUNK
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def label_mask(labels: torch.Tensor) -> torch.Tensor:
    """Labels [batch, time] -> bool [batch, time - 1]: whether the token after each one is labelled."""
    return labels[:, 1:] != IGNORE_INDEX


def labelled_rows(states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Logits or hidden states [batch, time, D] -> [n, D]: those that predict a labelled token, the one after."""
    return states[:, :-1][label_mask(labels)]


# ---- Divergences ----


def forward_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(teacher || student) of each row, in nats.

    Args:
        student, teacher: logits [n, V], any float dtype; the gradient goes to `student` only.
        temperature: both are divided by it; the result is multiplied by its square, so that gradients keep their size
            (Hinton et al., arXiv:1503.02531).

    Returns:
        [n] in FP32, or in FP64 for FP64 logits.
    """
    if triton_losses.serves(student, teacher):
        return triton_losses.ForwardKL.apply(student, teacher, temperature)
    return _ForwardKL.apply(student, teacher, temperature)


class _ForwardKL(torch.autograd.Function):
    """The gradient is written where the divergence is computed: one tensor of the logits' dtype is all that is kept."""

    @staticmethod
    def forward(ctx, student, teacher, temperature):
        wide = _at_least_fp32(student.dtype)
        result = torch.empty(len(student), dtype=wide, device=student.device)
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        for rows in chunks(len(student)):
            log_p, log_q = (_log_softmax(x[rows], temperature) for x in (student, teacher))
            q = log_q.exp()
            result[rows] = log_q.sub_(log_p).mul_(q).sum(-1) * temperature**2
            if gradient is not None:  # of sum q (log q - log softmax(s / T)) * T^2: (p - q) * T
                gradient[rows] = _times(log_p.exp_().sub_(q), temperature)
        ctx.save_for_backward(gradient)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _scaled(ctx.saved_tensors[0], grad), None, None


def sparse_cross_entropy(
    student: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor | None = None, temperature: float = 1.0
) -> torch.Tensor:
    """Cross-entropy of each row with a few weighted tokens, -sum_k w_k log softmax(s / T)[id_k], times T^2, in nats.

    Args:
        student: logits [n, V], any float dtype.
        ids, weights: int and float [n, K]; a token may occur several times. Without weights, K is 1.

    Returns:
        [n] in FP32, or in FP64 for FP64 logits.
    """
    if weights is None and triton_losses.serves(student):
        return triton_losses.CrossEntropy.apply(student, ids[:, 0], temperature)
    return _SparseCrossEntropy.apply(student, ids, weights, temperature)


class _SparseCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, ids, weights, temperature):
        wide = _at_least_fp32(student.dtype)
        result = torch.empty(len(student), dtype=wide, device=student.device)
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        for rows in chunks(len(student)):
            log_p, tokens = _log_softmax(student[rows], temperature), ids[rows].long()
            w = torch.ones_like(tokens, dtype=wide) if weights is None else weights[rows].to(wide)
            result[rows] = -(w * log_p.gather(1, tokens)).sum(-1) * temperature**2
            if gradient is not None:
                p = log_p.exp_() if weights is None else log_p.exp_().mul_(w.sum(-1, keepdim=True))
                gradient[rows] = _times(p.scatter_add_(1, tokens, -w), temperature)
        ctx.save_for_backward(gradient)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _scaled(ctx.saved_tensors[0], grad), None, None, None


def _log_softmax(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """In FP32 at least; without a temperature in one pass fewer."""
    wide = _at_least_fp32(logits.dtype)
    return logits.log_softmax(-1, dtype=wide) if temperature == 1 else (logits.to(wide) / temperature).log_softmax(-1)


def _times(x: torch.Tensor, factor: float) -> torch.Tensor:
    return x if factor == 1 else x.mul_(factor)


def _scaled(gradient: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """In place, since there is one such tensor: autograd refuses a second backward pass. Products are FP32."""
    return gradient.mul_(grad[:, None])


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@dataclass
class HiddenRows:
    """A teacher's last hidden states [n, H] for the labelled tokens, and the head that turns some of them into logits.

    Where a teacher's head is not known, the rows are its logits and the head returns them.
    """

    hidden: torch.Tensor
    head: Callable[[torch.Tensor], torch.Tensor] = staticmethod(lambda hidden: hidden)

    def divergence(self, student: torch.Tensor, rows: slice, temperature: float) -> torch.Tensor:
        """KL [c] of the student's logits [c, V], which belong to `rows`."""
        with torch.no_grad():
            teacher = self.head(self.hidden[rows])
        return forward_kl(student, teacher, temperature)


@dataclass
class SampledRows:
    """A teacher's distributions as a few tokens each: unbiased estimates of the whole (see teachers/cache.py).

    Args:
        ids: int [n, K], tokens; one may occur several times.
        weights: float [n, K], their probabilities; the expectation of the summed one-hot vectors is the distribution.
        entropy: float [n], of the whole distribution, in nats, so that the loss is a divergence and not more.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    entropy: torch.Tensor

    def divergence(self, student: torch.Tensor, rows: slice, temperature: float) -> torch.Tensor:
        """An unbiased estimate of KL [c] of the student's logits [c, V]; single values may be negative."""
        cross = sparse_cross_entropy(student, self.ids[rows], self.weights[rows], temperature)
        return cross - self.entropy[rows] * temperature**2


# ---- The objective ----


@dataclass
class Objective:
    """What the logits of a batch's n labelled tokens are compared with.

    Args:
        labels: int64 [batch, time], IGNORE_INDEX where nothing is predicted.
        teacher: its distributions of the n tokens, in their order; None without a teacher.
        weights: of "ce" (cross-entropy with the labels) and "kl" (divergence from the teacher) in the loss; a term
            without weight is not computed.
        temperature: of the divergence.
        device_type: of the device for which chunks are chosen, "cuda" or "cpu"; default: that of the hidden states.
        generic: int64 [batch, time], 1 at tokens of generic text, which count for the divergence only; None: none do.
        tokens: int64 [2], labelled tokens of the whole step, and those of the domain among them. Cross-entropy counts
            the former for the latter, so that it is a mean over the domain where the loss is divided by the former.
    """

    labels: torch.Tensor
    teacher: HiddenRows | SampledRows | None = None
    weights: dict[str, float] = field(default_factory=lambda: {"ce": 1.0})
    temperature: float = 1.0
    device_type: str = ""
    generic: torch.Tensor | None = None
    tokens: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.weights = {name: weight for name, weight in self.weights.items() if weight}
        self.mask = label_mask(self.labels)
        self.targets = self.labels[:, 1:][self.mask]
        self.is_domain = None if self.generic is None else self.generic[:, 1:][self.mask] == 0
        if self.is_domain is not None and self.tokens is None:
            self.tokens = torch.stack([torch.ones_like(self.is_domain).sum(), self.is_domain.sum()])

    def parts(self, count: int, size: int | None) -> list[slice]:
        """The tokens, all `count` of them, whose logits exist at a time; see `chunks`."""
        return chunks(count, size)

    def token_losses(self, logits: torch.Tensor, rows: slice) -> torch.Tensor:
        """Logits [c, V] of `rows` among the n tokens -> [c, terms], one column for each of `weights`, unweighted."""
        terms = {"ce": self._cross_entropy, "kl": self._divergence}
        return torch.stack([terms[name](logits, rows) for name in self.weights], dim=-1)

    def weighted_sum(self, token_losses: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        """The loss of tokens: [c, terms] of `rows` -> scalar.

        The processor does not wait for the device, as it would in `new_tensor`.
        """
        weights = torch.tensor(list(self.weights.values()), dtype=token_losses.dtype)
        weighted = token_losses * weights.to(token_losses.device, non_blocking=True)
        if self.is_domain is None or "ce" not in self.weights:
            return weighted.sum()
        everything, domain = self.tokens.to(weighted)
        column = list(self.weights).index("ce")
        kept = torch.where(self.is_domain[rows], weighted[:, column], 0.0) * (everything / domain.clamp(min=1))
        return weighted[:, :column].sum() + kept.sum() + weighted[:, column + 1 :].sum()

    def _cross_entropy(self, logits, rows):
        return sparse_cross_entropy(logits, self.targets[rows, None])

    def _divergence(self, logits, rows):
        return self.teacher.divergence(logits, rows, self.temperature)
