"""Targets: what config.json says is quantized and what is left alone, in the spellings that engines ask for.

vLLM asks by published names, and of experts by those of their matrices, such as "...mlp.experts.0.gate_proj". Then
transformers asks by the names of modules of its own class. Where the two differ, both are written.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from ..layers.experts import layout_of
from ..layers.quant_linear import is_quantlinear
from ..layers.sites import EXPERTS, Site
from ..schemes.patterns import EXPRESSION
from ..schemes.spec import Scheme
from .folder import Stored
from .stored_names import StoredNames

_WEIGHT = ".weight"
_EXPERT = re.compile(r"(.*\bexperts)\.\d+\..+")


def target_schemes(model: nn.Module, sites: Iterable[Site], names: StoredNames) -> dict[str, Scheme]:
    """The schemes of a model's sites by what config.json calls them."""
    patterns = _patterns(model, names)
    found: dict[str, Scheme] = {}
    for site in sites:
        targets = patterns[site.name] if site.kind == EXPERTS.name else names.spellings(site.name)
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
    experts = {name: found for name, found in _patterns(model, names).items() if name not in quantized}
    linear = [n for n, module in modules.items() if isinstance(module, nn.Linear) and not is_quantlinear(module)]
    linear = [name for name in linear if not any(name.startswith(f"{parent}.") for parent in experts)]
    found = [spelling for name in linear for spelling in names.spellings(name)]
    found += [pattern for patterns in experts.values() for pattern in patterns]
    found += sorted(_other_matrices(modules, quantized, names, stored or {}))
    return list(dict.fromkeys(found))


def _patterns(model: nn.Module, names: StoredNames) -> dict[str, list[str]]:
    """What matches the names of all matrices of each experts module, such as "re:(.+[.])?layers[.]0[.]mlp[.]experts".

    vLLM maps names in config.json to those of its own modules ("model.language_model." to "language_model.model."), but
    no expressions; so these begin at the numbered block. Where two modules end alike, they have the whole name.
    """
    spellings = {name: names.spellings(name) for name in _experts_modules(model)}
    tails = Counter(_tail(spelling) for found in spellings.values() for spelling in set(map(_tail, found)))
    return {
        name: list(dict.fromkeys(_pattern(s, tails[_tail(s)] == 1) for s in found)) for name, found in spellings.items()
    }


def _pattern(module: str, from_block: bool = False) -> str:
    tail = _tail(module) if from_block else module
    begin = "(.+[.])?" if tail != module else ""
    return f"{EXPRESSION}{begin}{tail.replace('.', '[.]')}[.].*"


def _tail(module: str) -> str:
    """A name from its first numbered block on: "layers.0.mlp.experts"."""
    parts = module.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), 1)
    return ".".join(parts[max(first - 1, 0) :])


def _experts_modules(model: nn.Module) -> list[str]:
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
            yield _pattern(match[1]) if match else name.removesuffix(_WEIGHT)
        elif place.is_whole and place.parameter.endswith(_WEIGHT):
            module = place.parameter.removesuffix(_WEIGHT)
            if module not in quantized and not isinstance(modules[module], nn.Embedding | nn.modules.conv._ConvNd):
                yield from (place.layer, module)


def _holds_3d(name: str, module: nn.Module) -> bool:
    own = module.parameters(recurse=False)
    return name.rpartition(".")[2] == "experts" and any(parameter.ndim == 3 for parameter in own)
