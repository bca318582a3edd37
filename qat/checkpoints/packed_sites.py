"""The sites of a model whose weights the packed layers of a folder make.

Programs pack the matrices of single experts, `...experts.7.gate_proj`; a model keeps all of them in one parameter.
Formats and schemes belong to the module that has the parameter, so its experts must agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import UserError
from ..layers.sites import CONV1D, EXPERTS, Site, find_sites
from ..schemes.config import QAT_CONFIG_NAME
from ..schemes.spec import VIEW_DTYPE
from .layouts import REMEDY, PackedLayer
from .matrices import rows_of_expert
from .settings import Declared
from .stored_names import Place, StoredNames


@dataclass(frozen=True)
class SitePart:
    """What a packed layer is of a model.

    Attributes:
        site: of the model, not prepared.
        place: where the layer lies in its weight.
        stored: the name of the layer's weight in a plain checkpoint.
    """

    site: Site
    place: Place
    stored: str

    @property
    def tensor(self) -> str:
        """What a plain model is loaded from: the layer's weight, or the parameter that single experts are put into."""
        return self.stored if self.place.expert is None else self.site.tensor

    def shape_of(self, layer: PackedLayer) -> tuple[int, ...]:
        """The shape of `tensor`."""
        if self.place.expert is not None:
            return tuple(self.site.weight.shape)
        return layer.shape[::-1] if self.site.kind == CONV1D.name else layer.shape

    def put(self, values: torch.Tensor, plain: dict[str, torch.Tensor]) -> None:
        """Put the values of the layer, BF16, into `tensor` of a plain checkpoint."""
        if self.place.expert is None:
            plain[self.tensor] = values.t().contiguous() if self.site.kind == CONV1D.name else values
            return
        if self.tensor not in plain:
            plain[self.tensor] = torch.empty(self.site.weight.shape, dtype=VIEW_DTYPE)
        self.own_rows(plain[self.tensor]).copy_(values)

    def own_rows(self, weight: torch.Tensor) -> torch.Tensor:
        """The rows [N, K] of an expert's matrix in the weight of its site; a view."""
        assert self.place.expert is not None
        return rows_of_expert(self.site, weight, self.place.expert, self.place.part, self.place.parts)


def weights_of(layers: Mapping[str, PackedLayer]) -> set[str]:
    """The names that the weights of packed layers have in a plain checkpoint."""
    return {layer.weight for layer in layers.values()}


def parts_of_layers(
    model: PreTrainedModel, names: StoredNames, layers: Mapping[str, PackedLayer], where: object
) -> dict[str, SitePart]:
    """What each packed layer is of a model, by the name of the layer.

    Args:
        model: not prepared; may be on the meta device.
        names: of the tensors that a plain checkpoint would have.

    Raises:
        UserError: a layer is no linear layer or expert of the model; or some experts of a module are packed and some
            are not, or in another format, or are missing, or have another shape.
    """
    by_tensor = {site.tensor: site for site in find_sites(model)}
    found = {}
    for name, layer in layers.items():
        place = names.places.get(layer.weight)
        site = None if place is None or not place.is_plain else by_tensor.get(place.parameter)
        if place is None or site is None:
            raise UserError(
                f"{where} packs {name}, which is no linear layer and no expert of {type(model).__name__}; start "
                "from the BF16 checkpoint that it was made of"
            )
        found[name] = SitePart(site, place, layer.weight)
        if place.expert is not None:
            _check_shape(found[name], layer, where)
    experts = {part.site.name for part in found.values() if part.site.kind == EXPERTS.name}
    _check_experts([site for site in by_tensor.values() if site.name in experts], names, layers, where)
    return found


def _check_shape(part: SitePart, layer: PackedLayer, where: object) -> None:
    """Refuse a matrix that is not one of the experts of its parameter."""
    rows = part.site.rows(part.site.weight)
    expected = tuple(part.own_rows(part.site.weight).shape) if (part.place.expert or 0) < len(rows) else None
    if layer.shape != expected:
        raise UserError(
            f"{where} does not fit the model of its config.json: {part.place.layer} is a weight {layer.shape}, and "
            f"{part.site.tensor} has {len(rows)} experts of {tuple(rows.shape[1:])} in {part.place.parts} parts; "
            "copy or save the checkpoint again"
        )


def _check_experts(sites: Iterable[Site], names: StoredNames, layers: Mapping[str, PackedLayer], where: object) -> None:
    """Refuse experts of one module that are missing, packed in part, or in several formats; `sites` are of experts."""
    packed = {layer.weight: layer.format.name for layer in layers.values()}
    first: dict[str, tuple[str, str]] = {}  # a layer of each module, and its format
    for site in sites:
        places = names.of(site.tensor)
        wanted = places[0].parts * len(site.weight) if places and places[0].expert is not None else 1
        if len(places) != wanted:
            raise UserError(
                f"{where} is incomplete: it has {len(places)} tensors of {site.tensor}, which has {wanted}; copy or "
                "pack it again"
            )
        for place in places:
            own = packed.get(place.stored, "no packed format")
            name, expected = first.setdefault(site.name, (place.layer, own))
            if own != expected:
                raise UserError(
                    f"{where}: experts of {site.name} differ: {name} is in {expected}, {place.layer} in {own}; all "
                    f"experts of a layer must be in one format; {REMEDY}"
                )


def schemes_of_modules(parts: Mapping[str, SitePart], said: Mapping[str, Declared], where: object) -> dict[str, str]:
    """The scheme of each quantized module by its name, from what the settings of a folder say of its layers.

    Raises:
        UserError: they say of some experts of a module another scheme than of others.
    """
    schemes: dict[str, str] = {}
    for layer, declared in said.items():
        module = parts[layer].site.name
        if schemes.setdefault(module, declared.scheme) != declared.scheme:
            raise UserError(
                f"{where}: experts of {module} differ: {layer} is in {declared.scheme}, others in {schemes[module]}; "
                f"all experts of a layer must have one scheme; {REMEDY}"
            )
    return schemes


def check_formats(prepared: Iterable[Site], found: Mapping[str, str], folder: Path) -> None:
    """Raise a UserError where qat_config.json and the packed tensors disagree on a module.

    Args:
        prepared: the sites of the model, prepared as qat_config.json says.
        found: the format of each packed module, by its name.
    """
    said = {site.name: site.scheme.weight.format.name for site in prepared}
    for name in sorted({*said, *found}):
        if (own := found.get(name, "no packed format")) != said.get(name, "no packed format"):
            raise UserError(
                f"{folder / QAT_CONFIG_NAME} contradicts the weights in {folder}: {name} is packed in {own}, and it "
                f"says {said.get(name, 'that the layer is not quantized')}; restore the file that was exported, or "
                "remove it to take the formats of the weights"
            )


def by_modules(model: nn.Module, names: StoredNames, tensors: Mapping[str, str]) -> dict[str, str]:
    """`tensors`, named after published modules (`PUBLISHED.k_scale`), by the names of the model's own modules."""
    own = {names.published(name): name for name, _ in model.named_modules()}
    parts = {name: name.rpartition(".") for name in tensors}
    return {f"{own.get(module, module)}.{last}": tensors[name] for name, (module, _, last) in parts.items()}
