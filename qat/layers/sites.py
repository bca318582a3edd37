"""Sites: what can be quantized in a model: linear layers, experts, GPT-2's Conv1D.

A new kind is one more entry of KINDS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from ..schemes.spec import Scheme
from .conv1d import check_conv1d, convert_conv1d, is_conv1d, is_quantconv1d
from .experts import QuantExperts, check_experts, convert_experts, is_quantexperts, layout_of
from .kv_cache import cache_quantizers
from .packed_weight import packed_of
from .quant_linear import check_convertible, convert, is_linear, is_quantlinear


@dataclass(frozen=True)
class Site:
    """A parameter of a module that is quantized, or can be.

    Attributes:
        name: of the module in its model that has the parameter; patterns of a mapping match it.
        module: what quantizes the parameter, with its quantizers: a QuantLinear or an ExpertProjection. Before it is
            quantized, the module that has it.
        parameter: its name in the module that has it.
        kind: of `KINDS`, by name.
        owner: the module that has the parameter.
    """

    name: str
    module: Any  # an nn.Module; nn.Module declares that each of its attributes is a tensor or a module
    parameter: str
    kind: str
    owner: nn.Module

    @property
    def tensor(self) -> str:
        """The name of the parameter in the model and in its checkpoints."""
        return f"{self.name}.{self.parameter}"

    @property
    def label(self) -> str:
        """A name that no other site has: that of the layer, or of the parameter where a module has several."""
        return self.tensor if self.kind == EXPERTS.name else self.name

    @property
    def shape(self) -> tuple[int, int]:
        """Rows N and columns K, which are summed over, of the weight; of each expert's."""
        packed = packed_of(self.module)
        n, k = (self.rows(self.weight) if packed is None else packed).shape[-2:]
        return n, k

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """A tensor in the layout of `weight` as [..., N, K]; a view, and its own inverse."""
        return weight.transpose(-2, -1) if KINDS[self.kind].is_transposed(self.owner) else weight

    @property
    def quantizer_name(self) -> str:
        """The name of `module` in the model, once the site is quantized."""
        return self.name if self.module is self.owner else f"{self.name}.projections.{self.parameter}"

    @property
    def kept(self) -> torch.Tensor:
        """The tensor that is kept of the weight: the parameter, or the codes of a packed one."""
        packed = packed_of(self.module)
        return self.weight if packed is None else packed.codes

    @property
    def weight(self) -> torch.Tensor:
        """The parameter itself; a packed one as the BF16 values that it stands for."""
        return getattr(self.owner, self.parameter)

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
        parameters: those of a module that are quantized.
        quantizing: what quantizes a parameter of a module that is quantized; (module, parameter).
        fits: whether a module has such sites, not yet quantized.
        is_quantized: whether its sites are quantized.
        is_transposed: whether a module keeps its weights as [K, N] in place of [N, K].
        check: raises a ValueError where a module cannot be converted to a scheme; (module, scheme, name).
        convert: turns a module into its quantized form, in place; (module, scheme, name, learns), see
            `quant_linear.convert`.
    """

    name: str
    key: str
    parameters: Callable[[nn.Module], tuple[str, ...]]
    quantizing: Callable[[nn.Module, str], nn.Module]
    fits: Callable[[nn.Module], bool]
    is_quantized: Callable[[nn.Module], bool]
    is_transposed: Callable[[nn.Module], bool]
    check: Callable[[nn.Module, Scheme, str], None]
    convert: Callable[[nn.Module, Scheme, str, bool], nn.Module]


def _is_transposed(module: nn.Module) -> bool:
    layout = layout_of(module)
    return layout is not None and layout.is_transposed


def _expert_parameters(module: nn.Module) -> tuple[str, ...]:
    layout = layout_of(module)
    return () if layout is None else layout.parameters


LINEAR = Kind(
    "linear", "torch.nn.Linear", lambda module: ("weight",), lambda module, parameter: module,
    is_linear, is_quantlinear, lambda module: False, check_convertible, convert,
)  # fmt: skip
EXPERTS = Kind(
    "experts", "torch.nn.Linear",  # stacks of linear layers
    _expert_parameters, lambda module, parameter: cast(QuantExperts, module).projections[parameter],
    lambda module: layout_of(module) is not None and not is_quantexperts(module), is_quantexperts,
    _is_transposed, check_experts, convert_experts,
)  # fmt: skip
CONV1D = Kind(
    "conv1d", "torch.nn.Linear",  # what it is in engines
    lambda module: ("weight",), lambda module, parameter: module, is_conv1d, is_quantconv1d, lambda module: True,
    check_conv1d, convert_conv1d,
)  # fmt: skip
KINDS = {kind.name: kind for kind in (LINEAR, EXPERTS, CONV1D)}


def find_sites(model: nn.Module) -> list[Site]:
    """The sites of a model that are not quantized yet, in its order; those of one module follow each other."""
    return [
        Site(name, module, parameter, kind.name, module)
        for name, module in model.named_modules()
        for kind in KINDS.values()
        if kind.fits(module)
        for parameter in kind.parameters(module)
    ]


def quantized_sites(model: nn.Module) -> list[Site]:
    """The sites of a prepared model that are quantized, in its order; those of one module follow each other."""
    return [
        Site(name, kind.quantizing(module, parameter), parameter, kind.name, module)
        for name, module in model.named_modules()
        for kind in KINDS.values()
        if kind.is_quantized(module)
        for parameter in kind.parameters(module)
    ]


def shared_parameters(model: nn.Module) -> set[int]:
    """The ids of parameters that several modules have."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


@contextmanager
def quantizers_off(model: nn.Module) -> Iterator[None]:
    """Let a prepared model compute without quantization inside; what was off before stays off afterwards."""
    modules = [site.module for site in quantized_sites(model)]
    found = [q for module in modules for q in (module.weight_quantizer, module.input_quantizer)]
    with disabled([*found, *cache_quantizers(model)]):
        yield


@contextmanager
def disabled(quantizers: Iterable[Any]) -> Iterator[None]:
    """Switch quantizers off inside; what was off before stays off afterwards."""
    switched = [quantizer for quantizer in quantizers if quantizer.is_enabled]
    for quantizer in switched:
        quantizer.disable()
    try:
        yield
    finally:
        for quantizer in switched:
            quantizer.enable()
