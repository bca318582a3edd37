"""Choose the layers that get the wider scheme within a budget of bits per weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from qat.errors import UserError
from qat.layers.fused import FUSED
from qat.layers.sites import quantized_sites
from qat.schemes.spec import Scheme

from ..monitoring.layer_groups import block_of


@dataclass
class Unit:
    """Layers that must have one scheme, because engines fuse them into one matrix, or that shall have one.

    Attributes:
        name: of the unit, for people.
        layers: full names; all experts of a layer are one, "model.layers.3.mlp.experts".
        weights: how many values all their weights have.
        kl: by scheme, the divergence per token that quantizing this unit alone causes, in nats.
    """

    name: str
    layers: tuple[str, ...]
    weights: int
    kl: dict[str, float]


def find_units(model: nn.Module, by_block: bool = False) -> list[Unit]:
    """The units of a prepared model, in its order: projections, fused ones together, or whole numbered blocks."""
    members: dict[str, dict[str, int]] = {}
    for site in quantized_sites(model):
        key = (block_of(site.name)[0] or site.name) if by_block else _fused_name(model, site.name)
        sizes = members.setdefault(key, {})
        sizes[site.name] = sizes.get(site.name, 0) + site.weight.numel()
    return [Unit(name, tuple(sizes), sum(sizes.values()), {}) for name, sizes in members.items()]


def nominal_bits(scheme: Scheme) -> float:
    """Bits per weight, scales included: 4.25 or 8.25 in MX formats."""
    return scheme.weight.format.nominal_bits


def propose(units: Sequence[Unit], narrow: Scheme, wide: Scheme, budget: float) -> list[Unit]:
    """The units that shall have the wide scheme: greedily those that save most divergence for each additional bit.

    Divergences of single units are taken to add up. A unit that does not fit is skipped for smaller ones; one that
    the wide scheme does not help stays narrow.

    Raises:
        UserError: the budget is less than the narrow scheme needs.
    """
    low, high = nominal_bits(narrow), nominal_bits(wide)
    if budget < low:
        raise UserError(f"--bits_budget {budget} is less than the {low} bits a weight that {narrow.name} needs")
    gain = {unit.name: (unit.kl[narrow.name] - unit.kl[wide.name]) / unit.weights for unit in units}
    left = (budget - low) / (high - low) * sum(unit.weights for unit in units)
    chosen = []
    for unit in sorted(units, key=lambda unit: -gain[unit.name]):
        if gain[unit.name] > 0 and unit.weights <= left:
            chosen.append(unit)
            left -= unit.weights
    return chosen


def average_bits(units: Sequence[Unit], chosen: Sequence[Unit], narrow: Scheme, wide: Scheme) -> float:
    """Bits of the average weight, scales included, when the chosen units are wide."""
    share = sum(unit.weights for unit in chosen) / sum(unit.weights for unit in units)
    return nominal_bits(narrow) * (1 - share) + nominal_bits(wide) * share


def _fused_name(model: nn.Module, name: str) -> str:
    parent, _, own = name.rpartition(".")
    for group in FUSED:
        if own in group:
            together = [other for other in group if hasattr(model.get_submodule(parent), other)]
            return f"{parent}.{'+'.join(together)}"
    return name
