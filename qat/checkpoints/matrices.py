"""Matrices: what is packed, one by one: the weight of a linear layer, or a matrix of one expert.

Each has a name in the packed folder, the published one, and lies in a stored tensor of the source: as a tensor of its
own, or in one that holds all experts of a layer. Those are packed expert by expert, under the names that engines ask
for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from ..errors import UserError
from ..layers.experts import layout_of
from ..layers.sites import EXPERTS, Site
from ..schemes.spec import TensorSpec
from .stored_names import Place, StoredNames, expert_layers


@dataclass(frozen=True)
class Matrix:
    """A matrix that is packed.

    Attributes:
        name: of the layer in the packed folder, such as "model.layers.0.block_sparse_moe.experts.7.w1".
        stored: the tensor of the source that has its values.
        site: that it belongs to.
        expert: None for a linear layer.
        part, parts: as in `Place`: gate is 0 of 2, up 1 of 2.
        is_alone: whether the stored tensor holds nothing else.
        is_fused: whether it is the matrices of all experts, one below the other: [E * N, K].
    """

    name: str
    stored: str
    site: Site
    expert: int | None = None
    part: int = 0
    parts: int = 1
    is_alone: bool = True
    is_fused: bool = False

    @property
    def spec(self) -> TensorSpec:
        """How it is quantized."""
        return self.site.scheme.weight

    def values(self, tensor: torch.Tensor) -> torch.Tensor:
        """The values [N, K] of this matrix in its stored tensor; a view, where the tensor has its rows."""
        if self.is_fused:
            return self.site.rows(tensor).flatten(0, 1)
        if self.expert is None:
            return self.site.rows(tensor)
        return tensor if self.is_alone else rows_of_expert(self.site, tensor, self.expert, self.part, self.parts)


def matrices_of(
    names: StoredNames, sites: list[Site], where: object, packs_fused: bool = False
) -> dict[str, list[Matrix]]:
    """All matrices that are packed, by the stored tensors that hold them.

    Args:
        where: the folder, for messages.
        packs_fused: whether a tensor that holds all experts is packed as a whole.

    Raises:
        UserError: a weight is not in the files, or not as it is in the model; or layers that share one weight differ in
            scheme.
    """
    found: dict[str, list[Matrix]] = {}
    for site in sites:
        for place in _places_of(names, site, where):
            if place.stored in found:  # of another layer, which shares its weight
                other = found[place.stored][0].site
                if other.scheme != site.scheme:
                    raise UserError(
                        f"{site.name} shares its weight with {other.name}, and they differ in scheme "
                        f"({site.scheme.name}, {other.scheme.name}); give them one"
                    )
                continue
            if packs_fused and site.kind == EXPERTS.name and place.expert is None:
                found[place.stored] = [Matrix(place.stored, place.stored, site, is_fused=True)]
            else:
                found[place.stored] = list(_matrices(names, site, place))
    return found


def rows_of_expert(site: Site, weight: torch.Tensor, expert: int, part: int, parts: int) -> torch.Tensor:
    """The matrix [N, K] of an expert, or its gate or up, in a tensor that holds all experts of `site`; a view.

    Args:
        part, parts: as in `Place`.
    """
    layout = layout_of(site.owner)
    assert layout is not None and parts in (1, 2)
    rows = site.rows(weight)[expert]
    return rows if parts == 1 else layout.half(rows, part)


def by_divisor(matrices: Mapping[str, list[Matrix]]) -> Iterator[list[Matrix]]:
    """Matrices that share a divisor of their weights: of layers that engines fuse; gate and up of one expert."""
    linear: dict[int, Matrix] = {}
    experts: dict[tuple[int, int], list[Matrix]] = {}
    for matrix in (matrix for held in matrices.values() for matrix in held):
        if matrix.expert is None:
            linear[id(matrix.site.module)] = matrix
        else:
            experts.setdefault((id(matrix.site.module), matrix.expert), []).append(matrix)
    seen: set[int] = set()
    for own, matrix in linear.items():
        if own not in seen:
            together = [id(layer) for layer in matrix.site.module.fused_with] or [own]
            seen.update(together)
            yield [linear[layer] for layer in together if layer in linear]
    yield from experts.values()


def _places_of(names: StoredNames, site: Site, where: object) -> list[Place]:
    """The stored tensors of a site's weight, all of them usable."""
    places = names.of(site.tensor)
    if not places:
        raise UserError(
            f"{where} has no tensor {names.published(site.name)}.{site.parameter}, the weight of a quantized layer; "
            "load and save it with transformers, so that its tensors have the model's names, or make a folder of the "
            "language model inside a multimodal one: python scripts/text_model.py SRC DST"
        )
    if odd := next((place for place in places if not place.is_plain), None):
        raise UserError(
            f"{where} stores {odd.stored} in another form than the model has it ({site.name}), so it cannot be packed; "
            f"add {site.name!r} to `ignore`"
        )
    return places


def _matrices(names: StoredNames, site: Site, place: Place) -> Iterator[Matrix]:
    if place.expert is not None or site.kind != EXPERTS.name:
        yield Matrix(place.layer, place.stored, site, place.expert, place.part, place.parts)
        return
    experts = site.weight.shape[0]
    for name, expert, part, parts in expert_layers(names.published(site.name), site.parameter, experts):
        yield Matrix(name, place.stored, site, expert, part, parts, is_alone=False)
