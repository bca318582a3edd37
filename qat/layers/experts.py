"""QuantExperts: the experts of a layer, which transformers keeps in fused 3-D parameters, with rounded products.

It *is* the experts module that it was made of: the same Parameters under the same names and the same state dict, its
own activation and gate. Only the two products differ: each token's input is rounded once, before its experts read it,
what the gate puts out is rounded before the second product, and all weights are rounded along the dimension that is
summed over, bit-equal to rounding the matrices of each expert alone. The router is not touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from ..numerics import nvfp4, ops
from ..schemes.spec import Scheme
from . import expert_function
from .expert_function import Routing, grouped_product
from .lora import LowRankAdapter, MergedRounding, adapter_of, weight_with_adapter
from .operands import Operands, compute_dtype
from .packed_weight import as_kept
from .rounding import Rounding
from .swapped_class import swapped_class

_INTERFACE = ("has_gate", "has_bias", "is_transposed", "is_concatenated")  # of transformers' experts
_UNROUTED = "Llama4TextExperts"  # takes rows that are sorted by expert, as many for each


@dataclass(frozen=True)
class ExpertsLayout:
    """How a module keeps its experts.

    Attributes:
        parameters: of the first product and of the second.
        is_transposed: [E, K, N] in place of [E, N, K].
        is_interleaved: rows of gate and up take turns, where there is a gate; else gate comes first.
        has_gate: the first product is of gate and up together.
        has_bias: both products have a bias, in parameters ending in "_bias".
        is_routed: the module is given the router's choice; else rows that are sorted by expert.
    """

    parameters: tuple[str, str]
    is_transposed: bool
    is_interleaved: bool
    has_gate: bool
    has_bias: bool
    is_routed: bool

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """A parameter as [E, N, K], the dimension that is summed over last; a view, and its own inverse."""
        return weight.transpose(-2, -1) if self.is_transposed else weight

    def half(self, rows: torch.Tensor, part: int) -> torch.Tensor:
        """The rows of gate (part 0) or up (part 1) in those of both: [..., 2 * I, K] -> [..., I, K]; a view."""
        return rows[..., part::2, :] if self.is_interleaved else rows.chunk(2, dim=-2)[part]


def layout_of(module: nn.Module) -> ExpertsLayout | None:
    """The layout of an experts module; None for every other module."""
    if isinstance(module, Experts):
        return module.layout  # under FSDP1 its parameters are flat
    if any(base.__name__ == _UNROUTED for base in type(module).__mro__):
        layout = ExpertsLayout(("gate_up_proj", "down_proj"), True, False, True, False, False)
    elif all(hasattr(module, name) for name in _INTERFACE):
        own: Any = module
        first = "gate_up_proj" if own.has_gate else "up_proj"
        layout = ExpertsLayout(
            (first, "down_proj"), own.is_transposed, own.has_gate and not own.is_concatenated, own.has_gate,
            own.has_bias, True,
        )  # fmt: skip
    else:
        return None
    parameters = dict(module.named_parameters(recurse=False))
    return layout if all(n in parameters and parameters[n].ndim == 3 for n in layout.parameters) else None


class Experts(nn.Module):
    """Experts whose products are computed in the dtype of autocast, as those of linear layers are.

    transformers' own grouped products do not follow autocast: with FP32 masters they are computed in FP32. Made from an
    experts module by `compute_in_autocast_dtype`, not constructed.
    """

    layout: ExpertsLayout
    projections: nn.ModuleDict  # of QuantExperts, and where a parameter has an adapter

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The sum over each token's experts, as transformers computes it on its `grouped_mm` path.

        Args:
            hidden_states: [T, H]; of layouts that are not routed [E * T, H], sorted by expert.
            top_k_index: the experts of each token, int64 [T, k].
            top_k_weights: their weights [T, k].

        Returns:
            [T, H] in the dtype of `hidden_states`; of layouts that are not routed [E * T, H].
        """
        first, second = self.layout.parameters
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        if not self.layout.is_routed:
            routing = Routing.even(x.shape[0], self._count(first), x.device)
            return self._product(second, self._gated(self._product(first, x, routing)), routing)
        assert top_k_index is not None and top_k_weights is not None
        own: Any = self
        if getattr(own, "_is_expert_parallel", False):
            raise UserError("expert parallelism of transformers is not supported; leave the tensor-parallel plan out")
        routing, order = Routing.of(top_k_index, own.num_experts)
        y = self._gated(self._with_bias(first, self._product(first, x, routing), routing))
        y = self._with_bias(second, self._product(second, y, routing), routing)
        if getattr(own, "has_post_expert_norm", False):
            y = own.post_expert_norm(y)
        y = y * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        y = y[routing.inverse].view(*top_k_index.shape, y.shape[-1]).sum(1)  # an order of sums that does not change
        return y.to(hidden_states.dtype).view(hidden_states.shape)

    def _count(self, parameter: str) -> int:
        return self.get_parameter(parameter).shape[0]

    def _product(self, parameter: str, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        weight, is_first = getattr(self, parameter), parameter == self.layout.parameters[0]
        adapter = self._adapter(parameter)
        rounding, factors = (None, ()) if adapter is None else (MergedRounding(None, adapter.scaling), adapter.factors)
        return grouped_product(
            x, weight, routing, compute_dtype(x), None, rounding, factors, is_transposed=self.layout.is_transposed,
            gather=is_first and routing.tokens is not None,
        )  # fmt: skip

    def _adapter(self, parameter: str) -> LowRankAdapter | None:
        projections = self._modules.get("projections")
        has_own = isinstance(projections, nn.ModuleDict) and parameter in projections
        return adapter_of(projections[parameter]) if has_own else None  # type: ignore[index]

    def _with_bias(self, parameter: str, y: torch.Tensor, routing: Routing) -> torch.Tensor:
        if not self.layout.has_bias:
            return y
        return y + getattr(self, f"{parameter}_bias")[routing.experts].to(y.dtype)  # gradients sum in its own dtype

    def _gated(self, y: torch.Tensor) -> torch.Tensor:
        """[S, 2 * I] -> [S, I]: the module's own gate, else its activation."""
        own: Any = self
        if not self.layout.has_gate:
            return own.act_fn(y)
        if hasattr(self, "_apply_gate"):
            return own._apply_gate(y)
        gate, up = y.chunk(2, dim=-1)
        return up * own.act_fn(gate)


class QuantExperts(Experts):
    """Experts under QAT; made from an experts module by `convert_experts`, not constructed.

    Attributes:
        projections: what quantizes each product, by the name of its parameter.
    """

    projections: nn.ModuleDict

    def _count(self, parameter: str) -> int:
        projection: Any = self.projections[parameter]
        return projection.kept.shape[0]

    def _product(self, parameter: str, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        return self.projections[parameter](x, routing)


class ExpertParameter(nn.Module):
    """A fused parameter of an experts module, which may have an adapter; the parameter stays in that module.

    Attributes:
        owner: the module that has the parameter.
        parameter: its name there.
    """

    owner: Experts
    parameter: str

    def __init__(self, owner: Experts, parameter: str) -> None:
        super().__init__()
        self.__dict__["owner"] = owner  # past nn.Module, which would make it a submodule
        self.parameter = parameter

    @property
    def weight(self) -> torch.Tensor:
        """The parameter itself: [E, N, K], or [E, K, N] in transposed layouts."""
        return getattr(self.owner, self.parameter)

    def _parameter(self) -> torch.Tensor:
        return getattr(self.owner, self.parameter)

    def effective_weight(self) -> torch.Tensor:
        """What is rounded and multiplied by, in the layout of the parameter: with an adapter, the merged weight."""
        return weight_with_adapter(self)

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """See `Operands.rows`: [E, N, K]."""
        return self.owner.layout.rows(weight)

    def from_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """See `Operands.from_rows`."""
        return self.owner.layout.rows(rows)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return self.parameter


class ExpertProjection(ExpertParameter, Operands):
    """How one product of an experts module is quantized."""

    def __init__(self, owner: QuantExperts, parameter: str, scheme: Scheme) -> None:
        super().__init__(owner, parameter)
        self.add_quantizers(scheme)

    def forward(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """The product of each row with the weight of its expert, both rounded: [S, N].

        Args:
            x: of the first product [T, K], a row for each token (rows sorted by expert where each is a token of its
                own); of the second [S, K].
            routing: of the rows.
        """
        dtype, is_on, inputs = compute_dtype(x), self.weight_quantizer.is_enabled, self.input_quantizer
        layout, adapter = self.owner.layout, adapter_of(self)
        rounding, learned = as_kept(self, *self._rounding(adapter))
        output = grouped_product(
            x, self.kept, routing, dtype, inputs.spec if inputs.is_enabled else None, rounding, learned,
            self._own_divisors(dtype, adapter) if is_on else None, self.input_divisor(x.device),
            layout.is_transposed, gather=self.parameter == layout.parameters[0] and routing.tokens is not None,
        )  # fmt: skip
        return self.output_quantizer(output)

    def _own_divisors(self, dtype: torch.dtype, adapter: LowRankAdapter | None) -> torch.Tensor | None:
        if self.weight_quantizer.spec.format.tensor_scale is None:
            return None  # a packed weight is not dequantized for nothing
        return self.divisors(self.weight, dtype, adapter)

    def _rounding(self, adapter: LowRankAdapter | None) -> tuple[Rounding | None, tuple[torch.Tensor, ...]]:
        """How the weights are rounded, and what is trained beside them."""
        quantizer = self.weight_quantizer
        if adapter is not None:
            return MergedRounding(quantizer.spec if quantizer.is_enabled else None, adapter.scaling), adapter.factors
        return (quantizer.rounding, quantizer.learned) if quantizer.is_enabled else (None, ())

    @torch.no_grad()
    def divisors(
        self, weight: torch.Tensor, dtype: torch.dtype, adapter: LowRankAdapter | None = None
    ) -> torch.Tensor | None:
        """The divisor of each expert's weight, FP32 [E], in formats with a tensor scale; gate and up share theirs."""
        fmt = self.weight_quantizer.spec.format
        if fmt.tensor_scale is None:
            return None
        amax = _largest(weight) if adapter is None else self._largest_merged(weight, adapter)
        return nvfp4.tensor_divisor(amax.to(dtype))

    def _largest_merged(self, weight: torch.Tensor, adapter: LowRankAdapter) -> torch.Tensor:
        """The largest magnitude of each expert's merged weight [E]; some experts are merged at a time."""
        step = max(1, expert_function.CHUNK_BYTES // weight[0].nbytes)
        parts = zip(*(t.detach().split(step) for t in (self.rows(weight), *adapter.factors)), strict=True)
        return torch.cat([_largest(ops.merge(*part, adapter.scaling)) for part in parts])

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{self.parameter}, scheme={self.scheme_name}"


def _largest(weight: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each expert's weight [E]."""
    smallest, largest = torch.aminmax(weight.detach().flatten(1), dim=1)
    return torch.maximum(-smallest, largest)


def is_quantexperts(module: nn.Module) -> bool:
    """Whether `module` is a QuantExperts."""
    return isinstance(module, QuantExperts)


def compute_in_autocast_dtype(model: nn.Module) -> nn.Module:
    """Let all experts of a model compute in the dtype of autocast, in place; see `Experts`."""
    for module in list(model.modules()):
        if not isinstance(module, Experts) and (layout := layout_of(module)) is not None:
            module.__class__ = swapped_class(Experts, type(module), "Autocast")
            module.layout = layout  # type: ignore[assignment]  # nn.Module declares tensors and modules only
    return model


def convert_experts(module: nn.Module, scheme: Scheme, name: str = "", learns: bool = False) -> QuantExperts:
    """Turn an experts module into a QuantExperts in place: same object, same Parameters; see `quant_linear.convert`.

    Raises:
        TypeError: `module` has no experts.
        UserError: the blocks of the scheme's formats do not divide what is summed over.
    """
    check_experts(module, scheme, name)
    layout = layout_of(module)
    assert layout is not None
    original = next(base for base in type(module).__mro__ if not issubclass(base, Experts))
    module.__class__ = swapped_class(QuantExperts, original, "Quant")
    assert isinstance(module, QuantExperts)  # for type checkers, which do not follow __class__
    module.layout = layout
    module.projections = nn.ModuleDict({own: ExpertProjection(module, own, scheme) for own in layout.parameters})
    if learns:
        for projection in module.projections.values():
            assert isinstance(projection, ExpertProjection)
            weight = projection.effective_weight()
            projection.weight_quantizer.learn(projection.rows(weight).shape, weight.device)
    return module


def check_experts(module: nn.Module, scheme: Scheme, name: str = "") -> None:
    """Raise what `convert_experts(module, scheme, name)` would raise, changing nothing."""
    label, layout = name or "the module", layout_of(module)
    if layout is None or isinstance(module, QuantExperts):
        raise TypeError(f"{label} is a {type(module).__name__}, which has no experts that can be converted")
    if "projections" in module._modules:
        raise UserError(f"{label} has adapters already; prepare a model for a scheme before it gets adapters")
    for parameter in layout.parameters:
        columns = module.get_parameter(parameter).shape[1 if layout.is_transposed else 2]
        for spec in filter(None, (scheme.weight, scheme.input)):
            if not spec.format.fits(columns):
                raise UserError(
                    f"{label}.{parameter} sums over {columns} values, which is not a multiple of the block size "
                    f"{spec.format.block} of {spec.format.name}; add {name!r} to `ignore` "
                    '(--ignore, or "ignore" in a mapping file) to leave it unquantized'
                )
