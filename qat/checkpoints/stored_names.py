"""Stored names: to which parameter of a model each tensor of its checkpoint belongs, and what published names are.

transformers renames tensors when it loads them, and names them back when it saves: `backbone.layers.0` becomes
`model.layers.0`, the matrices of single experts become one parameter. Engines know the published names, so files keep
them. The map is made by transformers' own transforms, those of `from_pretrained`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

_WEIGHT = ".weight"
# The matrices of one expert in files: programs that pack experts one by one name them so, whatever the model does.
_ONE_EXPERT = re.compile(r"(.+)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
_FUSED = "gate_up_proj"
_HALVES = ("gate_proj", "up_proj")


@dataclass(frozen=True)
class Place:
    """Where a stored tensor lies in the model.

    Attributes:
        stored: the name of the tensor in the file.
        parameter: the name of the parameter in the state dict of the model.
        expert: its index in the first dimension of the parameter; None where the tensor holds all experts, or none.
        part, parts: which of how many equal parts of the parameter's rows it is: 0 of 2 for the gate of an expert, 1 of
            2 for its up projection, 0 of 1 for all rows.
        is_plain: whether the tensor has the values of the parameter as they are. If not, transformers splits, permutes
            or joins it in another way, and it cannot be packed by itself.
        is_converted: whether a converter of transformers merges it with others when it loads them.
    """

    stored: str
    parameter: str
    expert: int | None = None
    part: int = 0
    parts: int = 1
    is_plain: bool = True
    is_converted: bool = False

    @property
    def layer(self) -> str:
        """The name under which the tensor is packed: without ".weight"."""
        return self.stored.removesuffix(_WEIGHT)

    @property
    def is_whole(self) -> bool:
        """Whether the tensor is the whole parameter."""
        return self.is_plain and self.expert is None and self.parts == 1

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """The values of this tensor in those of the parameter; a view.

        Args:
            rows: [N, K], or [E, N, K] for experts, the reduction dimension last.

        Returns:
            [N / parts, K] for one expert or a linear layer, else `rows`.
        """
        own = rows if self.expert is None else rows[self.expert]
        return own.chunk(self.parts, dim=-2)[self.part] if self.parts > 1 else own


class StoredNames:
    """The map between the tensors of a checkpoint and the parameters of its model, both ways.

    Args:
        model: as transformers builds it, prepared or not; on any device, also meta.
        names: of the tensors in the files; of packed layers NAME, give "NAME.weight".

    Attributes:
        places: by stored name; a tensor that the model has no place for is not among them.
    """

    def __init__(self, model: PreTrainedModel, names: Iterable[str]) -> None:
        self.names = sorted(names, key=dot_natural_key)  # the order in which transformers merges experts
        self.places = _places(model, self.names)
        self._twins = _twins(model)
        self._by_parameter: dict[str, list[Place]] = {}
        for place in self.places.values():
            self._by_parameter.setdefault(place.parameter, []).append(place)

    def of(self, parameter: str) -> list[Place]:
        """The stored tensors that make a parameter: expert by expert, within an expert gate before up.

        A parameter that is tied to others is stored under one of their names. Empty where the files do not have it.
        """
        for name in (parameter, *self._twins.get(parameter, ())):
            if places := self._by_parameter.get(name):
                return sorted(places, key=lambda place: (place.expert or 0, place.part))
        return []

    @property
    def surplus(self) -> list[str]:
        """Stored tensors that are no part of the model."""
        return [name for name in self.names if name not in self.places]

    def published(self, module: str) -> str:
        """The published name of a module: that under which the files have its tensors, and engines know it."""
        if module in self._modules or not module:
            return self._modules.get(module, module)
        parent, _, own = module.rpartition(".")
        return f"{above}.{own}" if (above := self.published(parent)) else own

    def spellings(self, module: str) -> list[str]:
        """The published name of a module, and that in transformers' model if it differs."""
        return list(dict.fromkeys((self.published(module), module)))

    @cached_property
    def _modules(self) -> dict[str, str]:
        """Published names of modules, as far as tensors of the files tell them."""
        found: dict[str, str] = {}
        for place in self.places.values():
            stored, own = place.stored.split("."), place.parameter.split(".")
            if place.expert is not None:  # PREFIX.7.w1.weight beside MODULE.gate_up_proj
                index = len(stored) - 1 - stored[::-1].index(str(place.expert))
                found.setdefault(".".join(own[:-1]), ".".join(stored[:index]))
                stored, own = stored[:index], own[:-1]
            while stored and own and stored[-1] == own[-1]:
                stored, own = stored[:-1], own[:-1]
                if stored and own:
                    found.setdefault(".".join(own), ".".join(stored))
        return found


def saved_names(model: PreTrainedModel) -> StoredNames:
    """The names that transformers would save a model under, where there is no file: those of its published files.

    Args:
        model: on the meta device; nothing is computed.
    """
    return StoredNames(model, revert_weight_conversion(model, model.state_dict()))


def expert_layers(prefix: str, parameter: str, experts: int) -> list[tuple[str, int, int, int]]:
    """The names under which the matrices of a fused tensor are packed one by one, as engines ask for them.

    Args:
        prefix: the published name of the experts module.
        parameter: "gate_up_proj", "up_proj" or "down_proj".
        experts: their number.

    Returns:
        Name, expert, part and parts of each, as in `Place`.
    """
    halves = _HALVES if parameter == _FUSED else (parameter,)
    return [
        (f"{prefix}.{expert}.{half}", expert, part, len(halves))
        for expert in range(experts)
        for part, half in enumerate(halves)
    ]


def _places(model: PreTrainedModel, names: list[str]) -> dict[str, Place]:
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    own, prefix = model.state_dict(keep_vars=True), model.base_model_prefix
    counts: dict[tuple[str, str], int] = {}  # how many experts of a parameter have come
    places: dict[str, Place] = {}
    for name in names:
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, own)
        if renamed not in own and name in own:  # as in `convert_and_load_state_dict_in_model`
            renamed, pattern = rename_source_key(name, [], [], prefix, own)
        if renamed in own and pattern is None:
            places[name] = Place(name, renamed)
        elif renamed in own:
            assert pattern is not None
            index = counts[renamed, pattern] = counts.get((renamed, pattern), -1) + 1
            places[name] = _converted(name, renamed, by_pattern[pattern], pattern, index)
        elif (place := _one_expert(name, renamed, own)) is not None:
            places[name] = place
    return places


def _converted(name: str, parameter: str, converter: WeightConverter, pattern: str, index: int) -> Place:
    """The place of a tensor that transformers merges with others."""
    operations = [type(operation) for operation in converter.operations]
    part, parts = converter.source_patterns.index(pattern), len(converter.source_patterns)
    joins_rows = parts == 1 or getattr(converter.operations[-1], "dim", None) == 1  # of [E, N, K]
    if operations[:1] == [MergeModulelist] and len(operations) <= 2 and joins_rows:
        return Place(name, parameter, index, part, parts, is_converted=True)
    return Place(name, parameter, None, part, parts, is_plain=False, is_converted=True)


def _one_expert(name: str, renamed: str, own: Mapping[str, torch.Tensor]) -> Place | None:
    """The place of one expert's matrix in a model that transformers loads from fused tensors only."""
    if (match := _ONE_EXPERT.fullmatch(renamed)) is None:
        return None
    module, expert, projection = match[1], int(match[2]), match[3]
    if projection in _HALVES and f"{module}.{_FUSED}" in own:
        return Place(name, f"{module}.{_FUSED}", expert, _HALVES.index(projection), len(_HALVES))
    return Place(name, f"{module}.{projection}", expert) if f"{module}.{projection}" in own else None


def _twins(model: PreTrainedModel) -> dict[str, list[str]]:
    """The names of parameters that are one tensor, by each of them."""
    by_tensor: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_tensor.setdefault(id(parameter), []).append(name)
    return {name: names for names in by_tensor.values() if len(names) > 1 for name in names}
