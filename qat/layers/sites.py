"""Sites: what can be quantized in a model. Today linear layers; a new kind is one more entry of KINDS."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..schemes.spec import Scheme
from .kv_cache import cache_quantizers
from .quant_linear import check_convertible, convert, is_quantlinear


@dataclass(frozen=True)
class Site:
    """A parameter of a module that is quantized, or can be.

    Attributes:
        name: of the module in its model; patterns of a mapping match it.
        module: that has the parameter.
        parameter: its name in the module.
        kind: of `KINDS`, by name.
    """

    name: str
    module: Any  # an nn.Module; nn.Module declares that each of its attributes is a tensor or a module
    parameter: str
    kind: str

    @property
    def owner(self) -> nn.Module:
        """The module that has the parameter."""
        return self.module

    @property
    def tensor(self) -> str:
        """The name of the parameter in the model and in its checkpoints."""
        return f"{self.name}.{self.parameter}"

    @property
    def weight(self) -> torch.Tensor:
        """The parameter itself."""
        return getattr(self.module, self.parameter)

    @property
    def scheme(self) -> Scheme:
        """Of a site that is quantized."""
        return self.module.scheme


@dataclass(frozen=True)
class Kind:
    """A kind of site.

    Attributes:
        name: of the kind.
        key: what a mapping calls all sites of the kind.
        parameter: that is quantized.
        fits: whether a module is such a site, not yet quantized.
        is_quantized: whether it is one that is quantized.
        check: raises a ValueError where a module cannot be converted to a scheme; (module, scheme, name).
        convert: turns a module into its quantized form, in place; (module, scheme, name, learns), see
            `quant_linear.convert`.
    """

    name: str
    key: str
    parameter: str
    fits: Callable[[nn.Module], bool]
    is_quantized: Callable[[nn.Module], bool]
    check: Callable[[nn.Module, Scheme, str], None]
    convert: Callable[[nn.Module, Scheme, str, bool], nn.Module]


LINEAR = Kind(
    "linear", "torch.nn.Linear", "weight", lambda module: type(module) is nn.Linear, is_quantlinear, check_convertible,
    convert,
)  # fmt: skip
KINDS = {kind.name: kind for kind in (LINEAR,)}


def find_sites(model: nn.Module) -> list[Site]:
    """The sites of a model that are not quantized yet, in its order."""
    return [site for name, module in model.named_modules() for site in _sites_of(name, module, "fits")]


def quantized_sites(model: nn.Module) -> list[Site]:
    """The sites of a prepared model that are quantized, in its order."""
    return [site for name, module in model.named_modules() for site in _sites_of(name, module, "is_quantized")]


def _sites_of(name: str, module: nn.Module, predicate: str) -> Iterator[Site]:
    for kind in KINDS.values():
        if getattr(kind, predicate)(module):
            yield Site(name, module, kind.parameter, kind.name)


@contextmanager
def quantizers_off(model: nn.Module) -> Iterator[None]:
    """Let a prepared model compute without quantization inside; what was off before stays off afterwards."""
    modules = [site.module for site in quantized_sites(model)]
    found = [q for module in modules for q in (module.weight_quantizer, module.input_quantizer)]
    quantizers = [quantizer for quantizer in (*found, *cache_quantizers(model)) if quantizer.is_enabled]
    for quantizer in quantizers:
        quantizer.disable()
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.enable()
