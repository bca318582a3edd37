"""Loadable: whether transformers can load a packed folder that is good, told from its model and config.json alone.

vLLM reads some folders at which transformers' own loader stops. Each cause is looked for where it lies:

* `_init_weights` of some models reads the weights of linear layers, and packed layers have none.
* GPT-2's Conv1D keeps its weight transposed, and what is packed is the weight of the torch.nn.Linear that engines use.
* Tied weights are looked up by their names, and packed layers have others.
* What a converter of the model merges, such as experts, passes through `CompressedTensorsDequantize`. It knows one
  scheme for all of it, and of that not all formats; under a scheme of 4 bits it drops what is not packed.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.compressed_tensors import get_experts_scheme
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

from ..layers.sites import CONV1D, EXPERTS, LINEAR, Site, quantized_sites
from ..numerics.formats import E8M0
from .stored_names import StoredNames, expert_layers

_LOADER = "transformers' CompressedTensorsDequantize"
_INIT = "_init_weights"
_WEIGHT = ".weight"


def why_not_loadable(model: PreTrainedModel, names: StoredNames, config: Mapping[str, Any]) -> str | None:
    """Why transformers cannot load the packed model, in one line; None where no reason is known.

    Args:
        model: prepared; its parameters are on the meta device.
        names: of its source.
        config: the quantization_config of the packed folder.
    """
    return next(_reasons(model, names, config), None)


def runs_as_linear(module: nn.Module, quant_method: str) -> bool:
    """Whether transformers replaces an experts module by linear layers of each expert when the folder is packed."""
    classes = [base.__name__ for base in type(module).__mro__]
    patched: Mapping[str, Any] = MODULES_TO_PATCH_FOR_QUANTIZATION
    return any(quant_method in patched[name]["quantization_methods"] for name in classes if name in patched)


def _reasons(model: PreTrainedModel, names: StoredNames, config: Mapping[str, Any]) -> Iterator[str]:
    sites, method = quantized_sites(model), str(config.get("quant_method"))
    yield from _initializes_weights(model, [site for site in sites if site.kind == LINEAR.name])
    yield from _ties(sites)
    yield from (f"{site.name} is a Conv1D there, and it reads packed weights of torch.nn.Linear only"
                for site in sites if site.kind == CONV1D.name)  # fmt: skip
    if "config_groups" not in config:  # another program's
        return
    experts = [s for s in sites if s.kind == EXPERTS.name and not runs_as_linear(s.owner, method)]
    yield from _places(model, experts, names)
    yield from _formats(experts)
    yield from _drops(sites, names, config)
    for name, module in model.named_modules():
        if runs_as_linear(module, method) and not any(site.owner is module for site in sites):
            yield f"it replaces {name} by linear layers for each expert, and the file has them unquantized and fused"


@torch.no_grad()
def _initializes_weights(model: PreTrainedModel, sites: list[Site]) -> Iterator[str]:
    """Let each model inside initialize its modules while the packed layers have no weight, as transformers does."""
    weights = {site.owner: site.owner._parameters.pop("weight") for site in sites}
    try:
        with torch.random.fork_rng(devices=[]):
            _initialize(model, model, set())
    except AttributeError as error:
        yield f"{_raised_in(error)} reads the weight of a layer that is packed"
    finally:
        for module, weight in weights.items():
            module._parameters["weight"] = weight


def _initialize(module: nn.Module, model: PreTrainedModel, seen: set) -> None:
    for child in module.children():
        _initialize(child, child if isinstance(child, PreTrainedModel) else model, seen)
    lacking = tuple(name for name, child in module.named_children() if "weight" not in child._parameters)
    kind = type(model), type(module), lacking
    if kind not in seen:
        seen.add(kind)
        model._init_weights(module)


def _raised_in(error: BaseException) -> str:
    """The function of transformers that raised, such as "_init_weights in modeling_mamba2.py"."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name == _INIT]
    return f"{_INIT} in {Path(frames[-1].filename).name}" if frames else _INIT


def _ties(sites: list[Site]) -> Iterator[str]:
    seen: dict[int, str] = {}
    for site in sites:
        if (other := seen.setdefault(id(site.weight), site.label)) != site.label:
            yield f"{site.label} shares its weight with {other}, and transformers does not tie packed weights"


def _places(model: PreTrainedModel, experts: list[Site], names: StoredNames) -> Iterator[str]:
    """Experts are packed one by one; the model must have a converter that merges them again."""
    for site in experts:
        places = names.of(site.tensor)
        if any(place.is_whole for place in places):  # they are split, and come back under the names of one expert each
            single = expert_layers(names.published(site.name), site.parameter, 1)
            places = list(StoredNames(model, [f"{name}{_WEIGHT}" for name, *_ in single]).places.values())
        if not all(place.is_converted for place in places):
            yield f"it reads the experts in {site.name} from fused tensors only, and they are packed one by one"
            return


def _formats(experts: list[Site]) -> Iterator[str]:
    for site in experts:
        fmt = site.scheme.weight.format
        if fmt.tensor_scale is not None:
            yield f"{_LOADER} does not read weight_global_scale of experts ({site.name} in {fmt.name})"
        if fmt.scale == E8M0 and fmt.element.bits == 8:
            yield f"{_LOADER} multiplies experts in {fmt.name} by the bytes of their scales ({site.name})"
    if len({site.scheme.weight.format.name for site in experts}) > 1:
        formats = ", ".join(dict.fromkeys(f"{site.name} in {site.scheme.weight.format.name}" for site in experts))
        yield f"{_LOADER} knows one scheme for all experts, and they have several ({formats})"


def _drops(sites: list[Site], names: StoredNames, config: Mapping[str, Any]) -> Iterator[str]:
    """What is not packed and passes through the converters."""
    groups = {
        key: SimpleNamespace(targets=group["targets"], weights=group["weights"], format=group.get("format"))
        for key, group in config["config_groups"].items()
    }
    weights = get_experts_scheme(SimpleNamespace(config_groups=groups)).weights
    if weights["type"] == "float" and weights["num_bits"] == 8:
        return
    packed = {place.stored for site in sites for place in names.of(site.tensor)}
    for name, place in names.places.items():
        if place.is_converted and name not in packed and name.endswith(_WEIGHT):
            yield f"{_LOADER} drops what is not packed beside layers of {weights['num_bits']} bits ({name})"
            return
