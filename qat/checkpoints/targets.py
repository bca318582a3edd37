"""Targets: what config.json says is quantized and what is left alone, in the spellings that engines ask for.

vLLM asks by published names, and of experts by those of their matrices, such as "...mlp.experts.0.gate_proj". Then
transformers asks by the names of modules of its own class. Where the two differ, both are written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from ..layers.experts import layout_of
from ..layers.quant_linear import is_quantlinear
from ..layers.sites import LINEAR, Site
from ..schemes.patterns import EXPRESSION
from ..schemes.spec import Scheme
from .folder import Stored
from .stored_names import StoredNames

_WEIGHT = ".weight"
_EXPERT = re.compile(r"(.*\bexperts)\.\d+\..+")


def experts_pattern(module: str) -> str:
    """What matches the names of all matrices of an experts module: "re:model[.]layers[.]0[.]mlp[.]experts[.].*"."""
    return f"{EXPRESSION}{module.replace('.', '[.]')}[.].*"


def target_schemes(sites: Iterable[Site], names: StoredNames) -> dict[str, Scheme]:
    """The schemes of a model's sites by what config.json calls them."""
    found: dict[str, Scheme] = {}
    for site in sites:
        spellings = names.spellings(site.name)
        targets = spellings if site.kind == LINEAR.name else map(experts_pattern, spellings)
        found |= dict.fromkeys(targets, site.scheme)
    return found


def left_alone(
    model: nn.Module, sites: Iterable[Site], names: StoredNames, stored: Mapping[str, Stored] | None = None
) -> list[str]:
    """What config.json says is not quantized: linear layers, routers, experts, and matrices of other parts.

    Args:
        stored: what the headers of the files say; default: only the model is looked at.
    """
    quantized = {site.name for site in sites}
    modules = dict(model.named_modules())
    experts = [name for name in experts_modules(model) if name not in quantized]
    linear = [n for n, module in modules.items() if isinstance(module, nn.Linear) and not is_quantlinear(module)]
    linear = [name for name in linear if not any(name.startswith(f"{parent}.") for parent in experts)]
    found = [spelling for name in linear for spelling in names.spellings(name)]
    found += [experts_pattern(spelling) for name in experts for spelling in names.spellings(name)]
    found += sorted(_other_matrices(modules, quantized, names, stored or {}))
    return list(dict.fromkeys(found))


def experts_modules(model: nn.Module) -> list[str]:
    """The names of the modules that hold the experts of a layer in fused parameters, quantized or not."""
    return [name for name, module in model.named_modules() if layout_of(module) is not None or _holds_3d(name, module)]


def _other_matrices(
    modules: Mapping[str, nn.Module], quantized: set[str], names: StoredNames, stored: Mapping[str, Stored]
) -> Iterator[str]:
    """Routers, and what is copied without being a part of the model; experts of those as one pattern."""
    for name, tensor in stored.items():
        if not name.endswith(_WEIGHT) or len(tensor.shape) < 2:
            continue
        place = names.places.get(name)
        if place is None:
            match = _EXPERT.fullmatch(name)
            yield experts_pattern(match[1]) if match else name.removesuffix(_WEIGHT)
        elif place.is_whole and place.parameter.endswith(_WEIGHT):
            module = place.parameter.removesuffix(_WEIGHT)
            if module not in quantized and not isinstance(modules[module], nn.Embedding | nn.modules.conv._ConvNd):
                yield from (place.layer, module)


def _holds_3d(name: str, module: nn.Module) -> bool:
    own = module.parameters(recurse=False)
    return name.rpartition(".")[2] == "experts" and any(parameter.ndim == 3 for parameter in own)
