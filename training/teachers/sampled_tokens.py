"""A distribution as a few weighted tokens whose expectation is the distribution.

Of each distribution q the `top_k` most likely tokens are kept with their probabilities, and `samples` tokens drawn from
the rest of q, which share the rest of the probability equally. Summed as one-hot vectors their expectation is q, so the
cross-entropy with the student, and its gradient, are those of the whole distribution in expectation: random-sampling
distillation (arXiv:2503.16870), with the likeliest tokens exact, which leaves less variance. Plain top-k would teach a
sharper distribution than the teacher's. The entropy of q is kept too, so that the loss is a divergence.
"""

from __future__ import annotations

import numpy as np
import torch

from ..arguments.distillation import CacheSettings
from ..losses.distillation import SampledRows


def sample_rows(
    logits: torch.Tensor, settings: CacheSettings, generator: torch.Generator | None = None
) -> dict[str, torch.Tensor]:
    """Logits [c, V] -> "top_ids" and "top_probabilities" (FP16) [c, top_k], "sampled_ids" [c, samples], "entropy" [c].

    A sampled token stands for (1 - sum of the top probabilities, as rounded) / samples.
    """
    log_q = (logits.float() / settings.temperature).log_softmax(-1)
    q = log_q.exp()
    top, top_ids = q.topk(settings.top_k)
    rest = q.scatter(1, top_ids, 0.0).clamp_min(1e-30)  # never nothing to draw from
    return {
        "top_ids": top_ids,
        "top_probabilities": top.half(),
        "sampled_ids": torch.multinomial(rest, settings.samples, replacement=True, generator=generator),
        "entropy": -(q * log_q).sum(-1),
    }


def as_rows(sampled: dict[str, torch.Tensor]) -> SampledRows:
    """What `sample_rows` gave, as weighted tokens."""
    top, number = sampled["top_probabilities"].float(), sampled["sampled_ids"].shape[1]
    rest = (1 - top.sum(-1, keepdim=True)).clamp_min(0) / number
    return SampledRows(
        ids=torch.cat([sampled["top_ids"].int(), sampled["sampled_ids"].int()], -1),
        weights=torch.cat([top, rest.expand(-1, number)], -1),
        entropy=sampled["entropy"],
    )


def bytes_of_a_token(settings: CacheSettings, vocabulary: int) -> int:
    """On disk, for each labelled token."""
    return sum(np.dtype(dtype).itemsize * width for dtype, width in columns(settings, vocabulary).values())


def columns(settings: CacheSettings, vocabulary: int) -> dict[str, tuple[str, int]]:
    """NumPy dtype and width of what is kept of a token."""
    token = "<u2" if vocabulary <= 2**16 else "<u4"
    return {
        "top_ids": (token, settings.top_k),
        "top_probabilities": ("<f2", settings.top_k),
        "sampled_ids": (token, settings.samples),
        "entropy": ("<f4", 1),
    }
