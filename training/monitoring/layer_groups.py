"""Quantized sites by what they do, and the parts of their weights that this process holds."""

from __future__ import annotations

import re

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from qat.layers.lora import adapter_of
from qat.layers.sites import CONV1D, EXPERTS, Site, quantized_sites
from qat.numerics import ops

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

    None for a Conv1D under FSDP2, whose shards cut its rows, and for a weight with an adapter there, which is merged
    with more than this process holds.
    """
    adapter = adapter_of(site.module)
    if adapter is not None and isinstance(adapter.lora_A, DTensor):
        return None
    if site.kind == CONV1D.name and isinstance(site.weight, DTensor):
        return None
    part = local_part(site.weight, 3 if site.kind == EXPERTS.name else 2)
    return None if part is None else site.module.rows(part)


def spread_rows(rows: torch.Tensor, count: int) -> torch.Tensor:
    """At most `count` rows [n, K] of [..., K], at even distances; no others are copied."""
    if rows.ndim == 2:
        return rows[:: max(1, len(rows) // count)][:count]
    each, picked = rows.shape[-2], _row_numbers(rows, count)
    return rows[picked // each, picked % each]


def _row_numbers(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Those of at most `count` rows of [E, N, K], at even distances, counted over all E x N."""
    total = rows.shape[0] * rows.shape[-2]
    return torch.arange(0, total, max(1, total // count), device=rows.device)[:count]


def some_rows(site: Site, count: int) -> torch.Tensor:
    """At most `count` of the rows [n, K] that a site computes with, as `spread_rows` picks them: merged ones where it
    has an adapter. There must be `local_rows`."""
    rows, adapter = local_rows(site), adapter_of(site.module)
    assert rows is not None
    picked = spread_rows(rows, count)
    if adapter is None:
        return picked
    a, b = (factor.detach() for factor in adapter.factors)
    if rows.ndim == 2:
        return ops.merge(picked, a, spread_rows(b, count), adapter.scaling)
    experts = _row_numbers(rows, count) // rows.shape[-2]
    return ops.merge(picked[:, None], a[experts], spread_rows(b, count)[:, None], adapter.scaling)[:, 0]


def block_of(name: str) -> tuple[str | None, int | None]:
    """The numbered block that a layer lies in: ("model.layers.3", 3); (None, None) where there is none."""
    match = re.match(r"(.*?\.(\d+))\.", name)
    return (match[1], int(match[2])) if match else (None, None)
