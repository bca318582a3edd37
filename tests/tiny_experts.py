"""Tiny layers of experts in fused parameters, of every layout that transformers has."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

HIDDEN, INNER, COUNT, CHOSEN = 64, 96, 4, 2


class Plain(nn.Module):
    """Experts with transformers' interface."""

    has_gate, has_bias, is_transposed, is_concatenated = True, False, False, True

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = COUNT
        first = INNER * (2 if self.has_gate else 1)
        shapes = ((COUNT, first, HIDDEN), (COUNT, HIDDEN, INNER))
        generator = torch.Generator().manual_seed(0)
        for name, shape in zip((("gate_up_proj" if self.has_gate else "up_proj"), "down_proj"), shapes, strict=True):
            weight = torch.randn(shape, generator=generator) * 0.2
            weight = weight.transpose(1, 2).contiguous() if self.is_transposed else weight
            setattr(self, name, nn.Parameter(weight))
            if self.has_bias:
                setattr(self, f"{name}_bias", nn.Parameter(torch.randn(shape[:2], generator=generator)))

    def act_fn(self, x):
        return F.silu(x)


class Ungated(Plain):
    has_gate = False


class Transposed(Plain):
    is_transposed = True


class GptOss(Plain):
    has_bias, is_transposed, is_concatenated = True, True, False

    def _apply_gate(self, y):
        return F.silu(y[..., ::2]) * (y[..., 1::2] + 1)


class Llama4TextExperts(Plain):
    """Takes rows that are sorted by expert."""

    is_transposed = True


class Model(nn.Module):
    def __init__(self, kind) -> None:
        super().__init__()
        self.experts = kind()

    def forward(self, x, index, weights):
        return self.experts(x, index, weights)
