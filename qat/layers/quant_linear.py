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
from .lora import LowRankAdapter, MergedRounding, adapter_of, weight_with_adapter
from .operands import Operands, compute_dtype, is_shard
from .packed_weight import as_kept, packed_of
from .rounding import Rounding
from .swapped_class import swapped_class
from .transform import transformed_input

# By name, since qat/layers imports no transformers.
_FALCON_LINEAR = "transformers.models.falcon.modeling_falcon.FalconLinear"


class LinearProduct(Operands):
    """The product of a linear layer, both operands rounded; the parameters are `weight` and `bias`, which may be None.

    Attributes:
        adds_bias_apart: the product is rounded to the dtype of the matmul before the bias is added, too.
        in_fp8: forward products are computed in FP8 where they can, see fp8_matmul.py.
    """

    weight: torch.Tensor
    bias: nn.Parameter  # or None
    fused_with: tuple[LinearProduct, ...]
    adds_bias_apart = False
    in_fp8 = False

    def effective_weight(self) -> torch.Tensor:
        """What is rounded and multiplied by, in the layout of the weight: with an adapter, the merged weight."""
        return weight_with_adapter(self)

    def _parameter(self) -> torch.Tensor:
        return self.weight

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Of a weight that is not sharded."""
        raise NotImplementedError

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features], both operands fake-quantized in the dtype of the matmul.

        Under autocast that is the autocast dtype, so FP32 master weights are seen as the BF16 weights that will be
        saved.
        """
        dtype = compute_dtype(input)
        weight, inputs, adapter = self.weight_quantizer, self.input_quantizer, adapter_of(self)
        bias = None if self.adds_bias_apart else self.bias
        is_transformed = weight.is_transformed and (weight.is_enabled or inputs.is_enabled or weight.is_baked)
        assert adapter is None or not is_transformed  # adapters are added to the plain weight
        is_plain = weight.scale is None and inputs.scale is None
        is_fused = is_plain and (weight.is_enabled or adapter is not None)
        spec = inputs.spec if inputs.is_enabled else None
        if is_fused:
            rounding, learned = as_kept(self, *self._rounding(adapter))
            assert rounding is not None
            kept = self.kept if rounding.is_packed else self.rows(self.kept)
            divisor = self._divisor(input, dtype) if weight.is_enabled else None
            output = quantized_linear(
                input, kept, bias, spec, rounding, dtype, learned, divisor,
                self.input_divisor(input.device), self.fused_id,
                self.in_fp8 and spec is not None and dtype == torch.bfloat16 and rounding.gives_rows,
                is_transformed,
            )  # fmt: skip
        else:
            divisor = self._divisor(input, dtype) if weight.is_enabled else None
            x = input.to(dtype)
            x = inputs(transformed_input(x) if is_transformed else x, self.input_divisor(input.device))
            rows = self.rows(self.effective_weight()).to(dtype)
            if is_transformed and not (weight.is_enabled or weight.is_baked):
                rows = transformed_input(rows)
            output = F.linear(x, weight(rows, divisor), bias)
        if self.adds_bias_apart and self.bias is not None:
            output = output + self.bias.to(output.dtype)
        return self.output_quantizer(output)

    def _rounding(self, adapter: LowRankAdapter | None) -> tuple[Rounding, tuple[torch.Tensor, ...]]:
        """How the weight is rounded, and what is trained beside it."""
        quantizer = self.weight_quantizer
        if adapter is None:
            return quantizer.rounding, quantizer.learned
        return MergedRounding(quantizer.spec if quantizer.is_enabled else None, adapter.scaling), adapter.factors

    def _divisor(self, input: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """That of the weight in formats with a tensor scale: of all layers that engines fuse with this one.

        Raises:
            UserError: another layer has a part of its weight only.
        """
        fmt = self.weight_quantizer.spec.format
        if fmt.tensor_scale is None:
            return None
        weights = [layer.kept for layer in self.fused_with]
        if any(layer.is_sharded for layer in self.fused_with):
            raise UserError(
                f"{self.scheme_name} needs the largest weight of layers that engines fuse (q_proj, k_proj, v_proj; "
                "gate_proj, up_proj), and FSDP shards these one by one; let it wrap whole decoder layers "
                "(fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP)"
            )
        adapters = [adapter_of(layer) for layer in self.fused_with]
        factors = [factor for adapter in adapters if adapter is not None for factor in adapter.factors]
        key = fmt.name, dtype, tuple((id(tensor), tensor._version) for tensor in (*weights, *factors))
        return once_for(input, key, lambda: self._largest(fmt.name, dtype))

    @torch.no_grad()
    def _largest(self, fmt: str, dtype: torch.dtype) -> torch.Tensor:
        """The divisor of what the layers round that engines fuse with this one."""
        return ops.tensor_divisor([layer.effective_weight().detach() for layer in self.fused_with], fmt, dtype)

    @property
    def is_sharded(self) -> bool:
        """Whether this process has a part of the weight only."""
        packed = packed_of(self)
        return is_shard(self.kept, self.weight_shape if packed is None else tuple(packed.codes.shape))

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{super().extra_repr()}, scheme={self.scheme_name}"


class QuantLinear(LinearProduct, nn.Linear):
    """A linear layer under QAT; made from an nn.Linear by `convert`, not constructed."""

    @property
    def weight_shape(self) -> tuple[int, int]:
        """[out_features, in_features]."""
        return self.out_features, self.in_features


class QuantFalconLinear(QuantLinear):
    """The same of a FalconLinear: it adds its bias to the rounded product, as Falcon was trained."""

    adds_bias_apart = True


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer that `convert` takes: an nn.Linear itself, or Falcon's."""
    return type(module) is nn.Linear or is_falcon(module)


def is_falcon(module: nn.Module) -> bool:
    """Whether `module` is a FalconLinear that is not quantized."""
    return f"{type(module).__module__}.{type(module).__qualname__}" == _FALCON_LINEAR


def convert(module: nn.Module, scheme: Scheme, name: str = "", learns: bool = False) -> QuantLinear:
    """Turn `module` into a QuantLinear in place: same object, same Parameters.

    With `learns` its weight quantizer gets the parameter that the weight's format has, see `learned.py`.

    Raises:
        TypeError: `module` is not a plain nn.Linear.
        UserError: the blocks of the scheme's formats do not divide its in_features.
    """
    check_convertible(module, scheme, name)
    module.__class__ = swapped_class(QuantFalconLinear, type(module), "Quant") if is_falcon(module) else QuantLinear
    assert isinstance(module, QuantLinear)  # for type checkers, which do not follow __class__
    module.add_quantizers(scheme)
    if learns:
        module.weight_quantizer.learn(module.weight.shape, module.weight.device)
    return module


def check_convertible(module: nn.Module, scheme: Scheme, name: str = "") -> None:
    """Raise what `convert(module, scheme, name)` would raise, changing nothing."""
    label = name or "the layer"
    if not (isinstance(module, nn.Linear) and is_linear(module)):
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
