"""The share of a model's linear weights that is quantized, and what is left, in words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ..schemes.config import QATConfig
from ..schemes.patterns import matches
from ..schemes.spec import VIEW_DTYPE
from .left_alone import ANOTHER_KIND, NO_KEY, Defaults, output_head
from .lora import LowRankAdapter
from .packed_weight import PackedWeight, packed_of
from .sites import EXPERTS, LINEAR, Site, find_sites, quantized_sites
from .tensor_quantizer import TensorQuantizer

_NOT_LINEAR = nn.Embedding, TensorQuantizer, LowRankAdapter, PackedWeight
ENOUGH = 0.9  # a smaller share is worth a warning


def linear_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """All weights with two or more dimensions by name, without embeddings, the output head and their tied copies.

    Weights of convolutions and of layers that cannot be quantized are among them; biases, adapters and what quantizers
    learn are not. Shared weights are there once; of packed ones there is the shape, on the meta device.
    """
    head = output_head(model)
    not_linear = [m for m in model.modules() if isinstance(m, _NOT_LINEAR) or m is head]
    known = {id(parameter) for module in not_linear for parameter in module.parameters()}
    found: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) not in known and parameter.ndim >= 2 and not name.endswith("bias"):
            found[name] = parameter
    for site in quantized_sites(model):
        if (packed := packed_of(site.module)) is not None:
            found[site.tensor] = torch.empty(packed.shape, dtype=VIEW_DTYPE, device="meta")
    return found


def quantized_share(model: nn.Module) -> float:
    """Which fraction of a model's linear weights is quantized, from 0 to 1; counted in elements.

    Linear weights are all weights with two or more dimensions but embeddings and the output head.
    """
    weights = linear_weights(model)
    sites = quantized_sites(model)
    quantized, packed = {id(site.kept) for site in sites}, {s.tensor for s in sites if packed_of(s.module) is not None}
    total = sum(weight.numel() for weight in weights.values())
    found = (w.numel() for name, w in weights.items() if id(w) in quantized or name in packed)
    return sum(found) / total if total else 0.0


def percent(share: float) -> str:
    """For example "99.9 %", rounded down: "100.0 %" is all."""
    return f"{math.floor(1000 * share + 1e-6) / 10:.1f} %"


def describe_sites(sites: Iterable[Site]) -> str:
    """For example "8 linear layers and the experts of 2 layers in MXFP4, 4 linear layers in MXFP8"."""
    return ", ".join(f"{layers} in {scheme}" for scheme, layers in layers_by_scheme(sites).items())


def layers_by_scheme(sites: Iterable[Site]) -> dict[str, str]:
    """How many layers each scheme has, in words: {"MXFP4": "8 linear layers and the experts of 2 layers"}."""
    counts: dict[str, Counter[str]] = {}
    for scheme, kind, _ in dict.fromkeys((site.scheme.name, site.kind, site.name) for site in sites):
        counts.setdefault(scheme, Counter())[EXPERTS.name if kind == EXPERTS.name else LINEAR.name] += 1
    return {scheme: " and ".join(map(_in_words, counted.items())) for scheme, counted in counts.items()}


def _in_words(counted: tuple[str, int]) -> str:
    kind, count = counted
    plural = "" if count == 1 else "s"
    return f"the experts of {count} layer{plural}" if kind == EXPERTS.name else f"{count} linear layer{plural}"


def left_unquantized(model: nn.Module, config: QATConfig) -> dict[str, str]:
    """{name: reason} of the modules of a prepared model that have matrices and are not quantized."""
    quantized = {site.name for site in quantized_sites(model)}
    kinds = {site.name: site.kind for site in find_sites(model)}
    defaults = Defaults(model, config.ignore)
    return {
        name: _reason(name, module, config, defaults, kinds.get(name))
        for name, module in model.named_modules()
        if name not in quantized and has_matrix(module)
    }


def has_matrix(module: nn.Module) -> bool:
    """Whether a module itself has a matrix: neither an embedding, nor an adapter or what quantizers learn."""
    return not isinstance(module, _NOT_LINEAR) and _size(module) > 0


def _reason(name: str, module: nn.Module, config: QATConfig, defaults: Defaults, kind: str | None) -> str:
    if name in config.left_alone:
        return config.left_alone[name]
    if kind is None:
        return defaults.reason(name, module) or not_a_site(module)
    if pattern := next((pattern for pattern in config.ignore if matches(name, pattern)), None):
        return f"ignored by {pattern!r}"
    return NO_KEY if config.kinds is None or kind in config.kinds else ANOTHER_KIND


def not_a_site(module: nn.Module) -> str:
    """Why a module of a class that is not known cannot be quantized."""
    kind = "a subclass of torch.nn.Linear" if isinstance(module, nn.Linear) else "not a torch.nn.Linear"
    return f"{type(module).__name__} is {kind}"


def describe_left(model: nn.Module, left_alone: Mapping[str, str]) -> list[str]:
    """A line for each reason for which modules, {name: reason}, are left unquantized, the largest first."""
    sizes = {name: _size(model.get_submodule(name)) for name in left_alone}
    groups: dict[str, list[str]] = {}
    for name, reason in left_alone.items():
        groups.setdefault(reason, []).append(name)
    ordered = sorted(groups.items(), key=lambda group: -sum(map(sizes.__getitem__, group[1])))
    return [
        f"{len(names)} module{'s' * (len(names) > 1)} with {sum(map(sizes.__getitem__, names)):,} weights ({reason}), "
        f"e.g. {names[0]}"
        for reason, names in ordered
    ]


def _size(module: nn.Module) -> int:
    named = module.named_parameters(recurse=False)
    return sum(parameter.numel() for name, parameter in named if parameter.ndim >= 2 and not name.endswith("bias"))
