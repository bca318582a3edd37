"""Quantized layers by what they do, and the parts of their weights that this process holds."""

from __future__ import annotations

import re

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from qat import QuantLinear, is_quantlinear

# The first that fits a layer's name; the names are those of the models in transformers.
_GROUPS = (
    ("experts", re.compile(r"experts?(\.|$|_)")),
    ("attention", re.compile(r"attn|attention")),
    ("mlp", re.compile(r"mlp|feed_forward|ffn|block_sparse_moe|\.fc\d")),
)


def group_of(name: str) -> str:
    """ "attention", "mlp", "experts" or "other", from a layer's full name."""
    return next((group for group, pattern in _GROUPS if pattern.search(name)), "other")


def grouped_layers(model: nn.Module) -> dict[str, dict[str, QuantLinear]]:
    """All QuantLinear layers of `model` by group and name."""
    groups: dict[str, dict[str, QuantLinear]] = {}
    for name, module in model.named_modules():
        if is_quantlinear(module):
            groups.setdefault(group_of(name), {})[name] = module
    return groups


def evenly_spaced(items: list, count: int) -> list:
    """At most `count` of `items`, from the first to the last."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def local_rows(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """The rows [n, K] of a matrix that lie in this process: all of them, or FSDP2's shard; detached, sharing memory.

    None where there are no whole rows: FSDP1 cuts its flat buffers anywhere.
    """
    if isinstance(parameter, DTensor):
        whole_rows = all(getattr(placement, "dim", 0) == 0 for placement in parameter.placements)
        parameter = parameter.to_local() if whole_rows else None
    return None if parameter is None or parameter.ndim != 2 else parameter.detach()


def block_of(name: str) -> tuple[str | None, int | None]:
    """The numbered block that a layer lies in: ("model.layers.3", 3); (None, None) where there is none."""
    match = re.match(r"(.*?\.(\d+))\.", name)
    return (match[1], int(match[2])) if match else (None, None)
