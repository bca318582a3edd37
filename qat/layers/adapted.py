"""Layers with adapters: how one is attached, and the layers that are not quantized and have one all the same."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import UserError
from ..numerics.low_rank import check_factors
from .conv1d import is_conv1d
from .experts import ExpertParameter, ExpertProjection, Experts, compute_in_autocast_dtype, layout_of
from .linear_function import quantized_linear
from .lora import NAME, LowRankAdapter, MergedRounding, adapter_of, weight_with_adapter
from .operands import Operands, compute_dtype
from .quant_linear import is_falcon, is_linear
from .swapped_class import swapped_class


class AdaptedLinear(nn.Module):
    """A linear layer that computes with its merged weight, not quantized; made by `attach`, not constructed.

    Attributes:
        adds_bias_apart: see `LinearProduct`.
    """

    weight: torch.Tensor
    bias: nn.Parameter  # or None
    adds_bias_apart = False

    def effective_weight(self) -> torch.Tensor:
        """The merged weight, in the layout of the parameter."""
        return weight_with_adapter(self)

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """See `Operands.rows`."""
        return weight

    def from_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """See `Operands.from_rows`."""
        return rows

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features], in the dtype of autocast."""
        dtype, adapter, bias = compute_dtype(input), adapter_of(self), self.bias
        rows, within = self.rows(self.weight), None if self.adds_bias_apart else bias
        if adapter is None:
            output = F.linear(input.to(dtype), rows.to(dtype), None if within is None else within.to(dtype))
        else:
            rounding = MergedRounding(None, adapter.scaling)
            output = quantized_linear(input, rows, within, None, rounding, dtype, adapter.factors)
        return output + bias if self.adds_bias_apart and bias is not None else output


class AdaptedFalconLinear(AdaptedLinear):
    """The same of a FalconLinear."""

    adds_bias_apart = True  # in its own dtype, as FalconLinear does


class AdaptedConv1D(AdaptedLinear):
    """The same of a Conv1D, whose weight is kept as [in, out]."""

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """See `Operands.rows`: [in, out] -> [out, in]."""
        return weight.t()

    def from_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """See `Operands.from_rows`."""
        return rows.t()


def attach(module: nn.Module, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float, name: str = "") -> nn.Module:
    """Give a linear layer, quantized or not, an adapter in place; its own parameters are frozen.

    Args:
        lora_a, lora_b: A [r, in_features] and B [out_features, r].
        scaling: factor of their product.

    Raises:
        UserError: the layer is of another kind, has an adapter, or learns scales or exponents.
        ValueError: A and B do not belong to its weight.
    """
    label = name or "the layer"
    if NAME in module._modules:
        raise UserError(f"{label} has an adapter already")
    if isinstance(module, Operands):
        _check_quantizer(module, label)
    else:
        module.__class__ = _adapted_class(module, label)
    layer: Any = module
    check_factors(layer.rows(layer.weight), lora_a, lora_b)
    module.requires_grad_(False)
    setattr(module, NAME, LowRankAdapter(lora_a, lora_b, scaling))
    return module


def attach_to_experts(
    module: nn.Module, parameter: str, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float, name: str = ""
) -> nn.Module:
    """Give one of the fused parameters of an experts module, quantized or not, an adapter in place.

    Args:
        lora_a, lora_b: A [E, r, K] and B [E, N, r], whatever the layout of the parameter.

    Returns:
        What has the adapter: `module.projections[parameter]`.

    Raises:
        UserError: the module has no such experts, the parameter has an adapter, or it learns scales or exponents.
        ValueError: A and B do not belong to the parameter.
    """
    label = f"{name or 'the module'}.{parameter}"
    layout = layout_of(module)
    if layout is None or parameter not in layout.parameters:
        raise UserError(
            f"{label} is no weight of experts in fused parameters; name those, such as mlp.experts.gate_up_proj and "
            "mlp.experts.down_proj, in --lora_target_parameters"
        )
    if not isinstance(module, Experts):
        compute_in_autocast_dtype(module)
    assert isinstance(module, Experts)
    if "projections" not in module._modules:
        module.projections = nn.ModuleDict()
    if parameter not in module.projections:
        module.projections[parameter] = ExpertParameter(module, parameter)
    projection = module.projections[parameter]
    assert isinstance(projection, ExpertParameter)
    if isinstance(projection, ExpertProjection):
        _check_quantizer(projection, label)
    if NAME in projection._modules:
        raise UserError(f"{label} has an adapter already")
    check_factors(projection.rows(projection.weight), lora_a, lora_b)
    module.requires_grad_(False)
    for other in module.projections.values():
        if NAME in other._modules:
            other.get_submodule(NAME).requires_grad_(True)
    setattr(projection, NAME, LowRankAdapter(lora_a, lora_b, scaling))
    return projection


def _check_quantizer(module: Operands, label: str) -> None:
    """Raise a UserError where a weight has no rounding that goes with an adapter."""
    if module.weight_quantizer.learned:
        raise UserError(
            f"{label} learns the scales of its weight, which is frozen with an adapter; leave --learn_exponent and "
            "--learn_scale out, or --lora_r"
        )
    module.weight_quantizer.rounding.check_trainable()


def _adapted_class(module: nn.Module, label: str) -> type[nn.Module]:
    if is_falcon(module):
        kind: type[nn.Module] = AdaptedFalconLinear
    elif is_conv1d(module):
        kind = AdaptedConv1D
    elif is_linear(module):
        kind = AdaptedLinear
    else:
        raise UserError(
            f"{label} is a {type(module).__name__}; adapters are for linear layers (torch.nn.Linear, Conv1D): name "
            "others in --lora_target"
        )
    return swapped_class(kind, type(module), "Adapted")
