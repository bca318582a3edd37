"""Adapters of experts in fused parameters, as PEFT keeps them and as layers compute with them."""

from __future__ import annotations

import torch

from qat.layers.lora import FACTORS


def as_published(name: str, factor: torch.Tensor) -> torch.Tensor:
    """A or B as PEFT keeps it; of experts A [E, r, K] -> [E * r, K] and B [E, N, r] -> [N, r * E]."""
    if factor.ndim == 2:
        return factor
    return factor.flatten(0, 1) if name.endswith(FACTORS[0]) else factor.permute(1, 2, 0).flatten(1)


def from_published(name: str, factor: torch.Tensor, experts: int) -> torch.Tensor:
    """The inverse of `as_published` for a stack of experts."""
    if name.endswith(FACTORS[0]):
        return factor.unflatten(0, (experts, -1))
    return factor.unflatten(1, (-1, experts)).permute(2, 0, 1)
