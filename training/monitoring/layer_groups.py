"""Quantized sites by what they do, and the parts of their weights that this process holds."""

from __future__ import annotations

import re

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from qat.layers.lora import adapter_of
from qat.layers.sites import CONV1D, EXPERTS, Site, quantized_sites

# The first that fits a layer's name; the names are those of the models in transformers.
_GROUPS = (
    ("experts", re.compile(r"experts?(\.|$|_)")),
    ("attention", re.compile(r"attn|attention")),
    ("mlp", re.compile(r"mlp|feed_forward|ffn|block_sparse_moe|\.fc\d")),
)


def group_of(name: str) -> str:
    """ "attention", "mlp", "experts" or "other", from a layer's full name."""
    return next((group for group, pattern in _GROUPS if pattern.search(name)), "other")


def grouped_sites(model: nn.Module) -> dict[str, dict[str, Site]]:
    """All quantized sites of `model` by group and label."""
    groups: dict[str, dict[str, Site]] = {}
    for site in quantized_sites(model):
        groups.setdefault(group_of(site.name), {})[site.label] = site
    return groups


def evenly_spaced(items: list, count: int) -> list:
    """At most `count` of `items`, from the first to the last."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def local_part(parameter: torch.Tensor | None, ndim: int) -> torch.Tensor | None:
    """What lies in this process of a parameter of so many dimensions: all of it, or FSDP2's shard of the first one.

    Detached, sharing memory. None where no rows are whole: FSDP1 cuts its flat buffers anywhere.
    """
    if isinstance(parameter, DTensor):
        whole_rows = all(getattr(placement, "dim", 0) == 0 for placement in parameter.placements)
        parameter = parameter.to_local() if whole_rows else None
    return None if parameter is None or parameter.ndim != ndim else parameter.detach()


def local_rows(site: Site) -> torch.Tensor | None:
    """The rows of a site's weight that lie in this process, [N, K], of experts [E, N, K]; see `local_part`.

    None for a Conv1D under FSDP2, whose shards cut its rows, and where factors of an adapter are sharded.
    """
    if site.kind == CONV1D.name and isinstance(site.weight, DTensor):
        return None
    adapter = adapter_of(site.module)
    if adapter is not None and any(isinstance(factor, DTensor) or factor.ndim < 2 for factor in adapter.factors):
        return None
    part = local_part(site.weight, 3 if site.kind == EXPERTS.name else 2)
    return None if part is None else site.module.rows(part)


def spread_rows(rows: torch.Tensor, count: int) -> torch.Tensor:
    """At most `count` rows [n, K] of [..., K], at even distances; no others are copied."""
    if rows.ndim == 2:
        return rows[:: max(1, len(rows) // count)][:count]
    each, picked = rows.shape[-2], row_numbers(rows, count)
    return rows[picked // each, picked % each]


def row_numbers(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Those of at most `count` rows of [E, N, K], at even distances, counted over all E x N."""
    total = rows.shape[0] * rows.shape[-2]
    return torch.arange(0, total, max(1, total // count), device=rows.device)[:count]


def block_of(name: str) -> tuple[str | None, int | None]:
    """The numbered block that a layer lies in: ("model.layers.3", 3); (None, None) where there is none."""
    match = re.match(r"(.*?\.(\d+))\.", name)
    return (match[1], int(match[2])) if match else (None, None)
