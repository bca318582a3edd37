"""QuantLinear: an nn.Linear that computes with its weight and its input rounded to the MX grid.

It *is* an nn.Linear: the same Parameters under the same names, so tied weights stay tied, the state dict stays the
Hugging Face one, and PEFT, FSDP and exporters see what they expect. Only `forward` differs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..numerics.formats import BLOCK_SIZE
from ..schemes.spec import LayerScheme
from .linear_function import quantized_linear
from .tensor_quantizer import TensorQuantizer


class QuantLinear(nn.Linear):
    """A linear layer under QAT; made from an nn.Linear by `convert`, not constructed."""

    weight_quantizer: TensorQuantizer
    input_quantizer: TensorQuantizer
    output_quantizer: TensorQuantizer
    scheme: LayerScheme

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features], both operands fake-quantized in the dtype of the matmul.

        Under autocast that is the autocast dtype, so FP32 master weights are seen as the BF16 weights that will be
        saved.
        """
        dtype = _compute_dtype(input)
        if self._is_plain_w_and_a():
            output = quantized_linear(
                input, self.weight, self.bias, self.scheme.input, self.scheme.weight, dtype,
                self.weight_quantizer.exponent_offset,
            )  # fmt: skip
            return self.output_quantizer(output)
        weight = self.weight_quantizer(self.weight.to(dtype))
        output = F.linear(self.input_quantizer(input.to(dtype)), weight, self.bias)
        return self.output_quantizer(output)

    def _is_plain_w_and_a(self) -> bool:
        """Weight and input are both quantized, by their scheme: the case that the fused function covers."""
        weight, input_ = self.weight_quantizer, self.input_quantizer
        return weight.is_enabled and input_.is_enabled and weight.scale is None and input_.scale is None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scheme={self.scheme.name}"


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    device_type = x.device.type
    if device_type == "meta":  # shapes only; autocast knows no meta device
        return x.dtype
    if torch.is_autocast_enabled(device_type) and x.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return torch.get_autocast_dtype(device_type)
    return x.dtype


def convert(module: nn.Linear, scheme: LayerScheme, name: str = "", learn_exponent: bool = False) -> QuantLinear:
    """Turn `module` into a QuantLinear in place: same object, same Parameters.

    With `learn_exponent` its weight quantizer gets a parameter of its own, see `TensorQuantizer`.

    Raises:
        TypeError: `module` is no plain nn.Linear.
        ValueError: its in_features are not a multiple of the block size.
    """
    check_convertible(module, name)
    module.__class__ = QuantLinear
    module.scheme = scheme
    module.weight_quantizer = _make_quantizer(scheme.weight)
    if learn_exponent:
        module.weight_quantizer.learn_exponents(module.weight.shape, module.weight.device)
    module.input_quantizer = _make_quantizer(scheme.input)
    module.output_quantizer = _make_quantizer(scheme.input, if_quant=False)
    return module


def check_convertible(module: nn.Module, name: str = "") -> None:
    """Raise what `convert(module, ..., name)` would raise, changing nothing."""
    label = name or "the layer"
    if type(module) is not nn.Linear:
        raise TypeError(f"{label} is a {type(module).__name__}; only a plain torch.nn.Linear can be converted")
    if module.in_features % BLOCK_SIZE:
        raise ValueError(
            f"{label} has in_features={module.in_features}, which is not a multiple of the MX block size {BLOCK_SIZE}; "
            f"add {name!r} to `ignore` to leave it unquantized"
        )


def is_quantlinear(module: nn.Module) -> bool:
    """Whether `module` is a QuantLinear."""
    return isinstance(module, QuantLinear)


def _make_quantizer(spec, if_quant: bool = True) -> TensorQuantizer:
    return TensorQuantizer(spec.data_type, spec.bits, spec.block_size, spec.sym, if_quant)
