"""The share of a model's linear weights that is quantized, and what is left, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from torch import nn

from .left_alone import output_head
from .sites import EXPERTS, LINEAR, Site, quantized_sites
from .tensor_quantizer import TensorQuantizer

ENOUGH = 0.9  # a smaller share is worth a warning


def linear_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """All weights with two or more dimensions by name, without embeddings, the output head and their tied copies.

    Weights of convolutions and of layers that cannot be quantized are among them; biases and what quantizers learn are
    not. Shared weights are there once.
    """
    head = output_head(model)
    not_linear = [m for m in model.modules() if isinstance(m, nn.Embedding | TensorQuantizer) or m is head]
    known = {id(parameter) for module in not_linear for parameter in module.parameters()}
    found = {}
    for name, parameter in model.named_parameters():
        if id(parameter) not in known and parameter.ndim >= 2 and not name.endswith("bias"):
            found[name] = parameter
    return found


def quantized_share(model: nn.Module) -> float:
    """Which fraction of a model's linear weights is quantized, from 0 to 1; counted in elements.

    Linear weights are all weights with two or more dimensions but embeddings and the output head.
    """
    weights = linear_weights(model)
    quantized = {id(site.weight) for site in quantized_sites(model)}
    total = sum(weight.numel() for weight in weights.values())
    return sum(w.numel() for w in weights.values() if id(w) in quantized) / total if total else 0.0


def describe_sites(sites: Iterable[Site]) -> str:
    """For example "8 linear layers and the experts of 2 layers in MXFP4, 4 linear layers in MXFP8"."""
    counts: dict[str, Counter[str]] = {}
    for scheme, kind, _ in dict.fromkeys((site.scheme.name, site.kind, site.name) for site in sites):
        counts.setdefault(scheme, Counter())[EXPERTS.name if kind == EXPERTS.name else LINEAR.name] += 1
    return ", ".join(f"{' and '.join(map(_in_words, c.items()))} in {scheme}" for scheme, c in counts.items())


def _in_words(counted: tuple[str, int]) -> str:
    kind, count = counted
    plural = "" if count == 1 else "s"
    return f"the experts of {count} layer{plural}" if kind == EXPERTS.name else f"{count} linear layer{plural}"


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
