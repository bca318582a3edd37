"""Loss and perplexity over tokens: exact sums, independent of batch size, padding and number of processes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from transformers import EvalPrediction

from data.conversations.formatting import IGNORE_INDEX


def get_metrics_with_perplexity(metrics: dict[str, float]) -> dict[str, float]:
    """`metrics` with a perplexity beside each loss: exp(loss), infinite where that overflows.

    "eval_loss" gets "eval_perplexity", "eval_python_loss" gets "eval_python_perplexity".
    """
    result = dict(metrics)
    for key, value in metrics.items():
        prefix, is_loss = key.removesuffix("loss"), key.endswith("loss")
        if is_loss and (prefix == "" or prefix.startswith("eval_")):
            try:
                result[f"{prefix}perplexity"] = math.exp(value)
            except OverflowError:
                result[f"{prefix}perplexity"] = math.inf
    return result


def token_loss_sums(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per sample: the sum of negative log-likelihoods (nats, FP32 [batch]) and the number of labelled tokens (int64
    [batch]).

    Args:
        logits: [batch, time, vocabulary], any float dtype; the logits at t predict the token at t + 1.
        labels: [batch, time], IGNORE_INDEX where nothing is predicted.
    """
    targets = labels[:, 1:]
    # One sample at a time: FP32 logits of a whole batch would be the largest tensor of an evaluation.
    nll = torch.stack(
        [
            F.cross_entropy(row[:-1].float(), target, ignore_index=IGNORE_INDEX, reduction="sum")
            for row, target in zip(logits, targets, strict=True)
        ]
    )
    return nll, (targets != IGNORE_INDEX).sum(-1)


def sum_by_sample(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Values [n] of all labelled tokens of a batch (labels [batch, time]), in order -> their sums, FP32 [batch]."""
    sample = (labels[:, 1:] != IGNORE_INDEX).nonzero()[:, 0]
    return torch.zeros(len(labels), device=values.device).index_add_(0, sample, values.float())


def loss_over_tokens(prediction: EvalPrediction) -> dict[str, float]:
    """Trainer's `compute_metrics` for sums per sample: the mean loss of a token and its perplexity.

    With a teacher the sums are [batch, 2], loss and divergence, and "kl" is the mean divergence of a token.
    """
    means = prediction.predictions.sum(axis=0, dtype="float64") / prediction.label_ids.sum()
    if means.ndim == 0:
        return get_metrics_with_perplexity({"loss": float(means)})
    return get_metrics_with_perplexity({"loss": float(means[0]), "kl": float(means[1])})
