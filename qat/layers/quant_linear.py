"""QuantLinear: an nn.Linear that computes with its weight and its input rounded to their formats.

It *is* an nn.Linear: the same Parameters under the same names, so tied weights stay tied, the state dict stays the
Hugging Face one, and PEFT, FSDP and exporters see what they expect. Only `forward` differs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import UserError
from ..numerics import ops
from ..schemes.spec import Scheme
from .linear_function import once_for, quantized_linear
from .operands import Operands, compute_dtype, is_shard


class QuantLinear(Operands, nn.Linear):
    """A linear layer under QAT; made from an nn.Linear by `convert`, not constructed."""

    fused_with: tuple[QuantLinear, ...]

    def effective_weight(self) -> torch.Tensor:
        """What is rounded and multiplied by: [out_features, in_features]. An adapter adds its product here."""
        return self.weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features], both operands fake-quantized in the dtype of the matmul.

        Under autocast that is the autocast dtype, so FP32 master weights are seen as the BF16 weights that will be
        saved.
        """
        dtype = compute_dtype(input)
        weight, inputs = self.weight_quantizer, self.input_quantizer
        if weight.is_enabled and weight.scale is None and inputs.scale is None:
            spec = inputs.spec if inputs.is_enabled else None
            output = quantized_linear(
                input, self.effective_weight(), self.bias, spec, weight.rounding, dtype, weight.learned,
                self._divisor(input, dtype), self.input_divisor(input.device), id(self.fused_with),
            )  # fmt: skip
        else:
            divisor = self._divisor(input, dtype) if weight.is_enabled else None
            x = inputs(input.to(dtype), self.input_divisor(input.device))
            output = F.linear(x, weight(self.effective_weight().to(dtype), divisor), self.bias)
        return self.output_quantizer(output)

    def _divisor(self, input: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """That of the weight in formats with a tensor scale: of all layers that engines fuse with this one.

        Raises:
            UserError: another layer has a part of its weight only.
        """
        fmt = self.weight_quantizer.spec.format
        if fmt.tensor_scale is None:
            return None
        weights = [layer.effective_weight() for layer in self.fused_with]
        shapes = [(layer.out_features, layer.in_features) for layer in self.fused_with]
        if any(map(is_shard, weights, shapes)):
            raise UserError(
                f"{self.scheme_name} needs the largest weight of layers that engines fuse (q_proj, k_proj, v_proj; "
                "gate_proj, up_proj), and FSDP shards these one by one; let it wrap whole decoder layers "
                "(fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP)"
            )
        key = fmt.name, dtype, tuple((id(weight), weight._version) for weight in weights)
        return once_for(input, key, lambda: ops.tensor_divisor([w.detach() for w in weights], fmt.name, dtype))

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{super().extra_repr()}, scheme={self.scheme_name}"


def convert(module: nn.Module, scheme: Scheme, name: str = "", learns: bool = False) -> QuantLinear:
    """Turn `module` into a QuantLinear in place: same object, same Parameters.

    With `learns` its weight quantizer gets the parameter that the weight's format has, see `learned.py`.

    Raises:
        TypeError: `module` is not a plain nn.Linear.
        UserError: the blocks of the scheme's formats do not divide its in_features.
    """
    check_convertible(module, scheme, name)
    module.__class__ = QuantLinear
    assert isinstance(module, QuantLinear)  # for type checkers, which do not follow __class__
    module.add_quantizers(scheme)
    if learns:
        module.weight_quantizer.learn(module.weight.shape, module.weight.device)
    return module


def check_convertible(module: nn.Module, scheme: Scheme, name: str = "") -> None:
    """Raise what `convert(module, scheme, name)` would raise, changing nothing."""
    label = name or "the layer"
    if type(module) is not nn.Linear:
        raise TypeError(f"{label} is a {type(module).__name__}; only a plain torch.nn.Linear can be converted")
    for spec in filter(None, (scheme.weight, scheme.input)):
        if not spec.format.fits(module.in_features):
            raise UserError(
                f"{label} has in_features={module.in_features}, which is not a multiple of the block size "
                f"{spec.format.block} of {spec.format.name}; add {name!r} to `ignore` "
                '(--ignore, or "ignore" in a mapping file) to leave it unquantized'
            )


def is_quantlinear(module: nn.Module) -> bool:
    """Whether `module` is a QuantLinear."""
    return isinstance(module, QuantLinear)
