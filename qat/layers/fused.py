"""Layers that engines fuse into one matrix: they must have one scheme, and one divisor where a tensor has one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from .sites import LINEAR, quantized_sites

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # by the names that models give them


def fused_groups(names: Iterable[str]) -> Iterator[list[str]]:
    """Those of the layers `names` that engines fuse, group by group; layers that stay alone are not among them."""
    known = set(names)
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in known):
        for group in FUSED:
            found = [name for own in group if (name := f"{parent}.{own}".lstrip(".")) in known]
            if len(found) > 1:
                yield found


def tie_fused(model: nn.Module) -> None:
    """Let the quantized linear layers of a model know with which others they share their divisors.

    Only layers whose weights have the same format share one; engines refuse others anyway.
    """
    layers = {site.name: site.module for site in quantized_sites(model) if site.kind == LINEAR.name}
    for names in fused_groups(layers):
        for spec in {layers[name].weight_quantizer.spec.format.name for name in names}:
            alike = tuple(layers[name] for name in names if layers[name].weight_quantizer.spec.format.name == spec)
            for layer in alike:
                layer.fuse_with(alike)
