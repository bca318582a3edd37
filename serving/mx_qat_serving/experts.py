"""Mixtures of experts: weights dequantized exactly when they are loaded, inputs quantized as the checkpoint says.

vLLM's own methods for quantized experts need a GPU, or a CPU with AMX. These compute as the training does: each token's
input is quantized once, what the gate puts out again before the second product, and products are those of
`qat.layers.expert_function`. The router is vLLM's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn import Parameter
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, FusedMoeWeightScaleSupported, MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.utils import set_weight_attrs

from qat.layers.expert_function import Routing, grouped_product
from qat.numerics import ops
from qat.numerics.families import get_format
from qat.numerics.formats import E2M1, INT4, Format, Quantized

from .formats import rule_for

logger = init_logger(f"vllm.{__name__}")

PRODUCTS = ("w13", "w2")  # vLLM's names: gate and up together, then down
_GROUP, _CHANNEL, _TENSOR = (
    {"quant_method": kind.value}
    for kind in (
        FusedMoeWeightScaleSupported.GROUP,
        FusedMoeWeightScaleSupported.CHANNEL,
        FusedMoeWeightScaleSupported.TENSOR,
    )
)


class ExactExperts(FusedMoEMethodBase):
    """Experts in any of the library's formats, from compressed-tensors' files."""

    def __init__(self, moe: FusedMoEConfig, weights: str, inputs: str | None) -> None:
        """Choose the rule of the inputs.

        Args:
            weights, inputs: names of formats; None: inputs are not quantized.

        Raises:
            ValueError: the experts have an activation that the plugin lacks, or are spread over processes; or the
                chosen rules have none for the inputs.
        """
        super().__init__(moe)
        self.format = get_format(weights)
        self.rule = None if inputs is None else rule_for(inputs)
        self.inputs = None if self.rule is None else inputs
        self.gate = gate_of(moe)
        if moe.moe_parallel_config.use_ep:
            raise ValueError("the plugin of mx-qat does not serve experts in parallel; leave --enable-expert-parallel")
        activations = f"{self.inputs} under {self.rule.upper()}" if self.rule else "not quantized"
        logger.info_once("Using %s for %s MoE", type(self).__name__, weights.upper())
        logger.info_once("mx-qat: experts in %s, activations %s", weights, activations)

    def create_weights(
        self,
        layer: torch.nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **attributes,
    ) -> None:
        """Register what the file has, [E, N, ...] each, for vLLM's loader of experts."""
        shards = self.moe.w13_num_shards
        shapes = {
            "w13": (num_experts, shards * intermediate_size_per_partition, hidden_size),
            "w2": (num_experts, hidden_size, intermediate_size_per_partition),
        }
        for product, shape in shapes.items():
            _check_columns(self.format, shape[-1])
            each = (shards,) if product == "w13" else ()
            tensors = packed_tensors(self.format, shape, each, self.inputs is not None, params_dtype)
            if self.moe.has_bias:
                tensors["bias"] = torch.zeros(shape[:2], dtype=params_dtype), {}
            for name, (tensor, own) in tensors.items():
                parameter = Parameter(tensor, requires_grad=False)
                layer.register_parameter(f"{product}_{self.stored_name(name)}", parameter)
                set_weight_attrs(parameter, attributes | own)
        layer.params_dtype = params_dtype

    def stored_name(self, name: str) -> str:
        """What the layer calls a tensor of the file."""
        return name

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Codes and scales -> `w13_weight` [E, shards * I, H] and `w2_weight` [E, H, I] in the model's dtype."""
        names = list(packed_tensors(self.format, (1, 1, self.format.block or 1), (), True, torch.bfloat16))
        for product in PRODUCTS:
            stored = {}
            for name in names:
                own = f"{product}_{self.stored_name(name)}"
                if hasattr(layer, own):
                    stored[name] = getattr(layer, own).data
                    delattr(layer, own)
            weight = dequantized(stored, self.format, layer.params_dtype)
            layer.register_parameter(f"{product}_weight", Parameter(weight, requires_grad=False))
            divisors = stored.get("input_global_scale")
            if divisors is not None and self.inputs is not None:
                layer.register_buffer(f"{product}_input_divisor", shared_divisor(divisors), persistent=False)

    def get_fused_moe_quant_config(self, layer: torch.nn.Module) -> None:
        """None: vLLM's kernels are not used."""
        return None

    def apply(self, layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input) -> torch.Tensor:
        """The weighted sum over each token's experts, [T, H] in the dtype of x.

        Args:
            x: [T, H].
            topk_weights, topk_ids: the router's choice, [T, k].
        """
        weights = topk_weights.reshape(-1)
        values = x
        if layer.apply_router_weight_on_input:  # of one expert a token
            values, weights = x * topk_weights.to(x.dtype), torch.ones_like(weights)
        routing, order = Routing.of(topk_ids.long(), layer.w13_weight.shape[0])
        y = self.gate(self._product(layer, "w13", values, routing))
        y = self._product(layer, "w2", y, routing) * weights[order].unsqueeze(-1)
        return y[routing.inverse].view(*topk_ids.shape, -1).sum(1).to(x.dtype)

    def _product(self, layer: torch.nn.Module, product: str, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """x, a row for each token (w13) or for each token and expert (w2) -> [S, N], rows by expert."""
        if self.inputs is not None:
            divisor = getattr(layer, f"{product}_input_divisor", None)
            x = ops.fake_quantize(x.contiguous(), self.inputs, self.rule, x.dtype, divisor)
        weight = getattr(layer, f"{product}_weight")
        y = grouped_product(x, weight, routing, x.dtype, gather=product == "w13")
        bias = getattr(layer, f"{product}_bias", None)
        return y if bias is None else y + bias[routing.experts].to(y.dtype)


class ExactGptOssExperts(ExactExperts):
    """gpt-oss as published: MXFP4 in its own format (`"quant_method": "mxfp4"`), which says nothing of inputs."""

    weight_dtype = "gpt_oss_mxfp4"  # by which vLLM's loader of gpt-oss knows the file's layout

    def stored_name(self, name: str) -> str:
        """See `ExactExperts.stored_name`."""
        return "weight" if name == "weight_packed" else name


def packed_tensors(
    fmt: Format, shape: tuple[int, ...], shards: tuple[int, ...], has_inputs: bool, dtype: torch.dtype
) -> dict[str, tuple[torch.Tensor, dict]]:
    """Empty tensors of experts' weights [E, N, K], by the file's names, with what vLLM's loader asks of them.

    Args:
        shards: () for one divisor an expert, or the number of matrices that are stacked along N.
        has_inputs: inputs are quantized, so formats with a tensor scale have a divisor for them too.
        dtype: of scales that have no format of their own.
    """
    packed = fmt.element in (E2M1, INT4)
    rows, columns = shape[:-1], shape[-1] * fmt.element.bits // (8 * fmt.element.storage.itemsize)
    codes = torch.empty((*rows, columns), dtype=fmt.element.storage)
    by_dtype = fmt.scale.storage in (torch.bfloat16, torch.float32)
    scales = torch.empty(fmt.scale_shape(shape), dtype=dtype if by_dtype else fmt.scale.storage)
    tensors = {
        "weight_packed" if packed else "weight": (codes, {}),
        "weight_scale": (scales, _CHANNEL if fmt.block is None else _GROUP),
    }
    if fmt.element == INT4:
        tensors["weight_shape"] = torch.empty((shape[0], 2), dtype=torch.int64), {}
    if fmt.tensor_scale is not None:
        for name in ("weight_global_scale", "input_global_scale")[: 1 + has_inputs]:
            tensors[name] = torch.empty((shape[0], *shards), dtype=torch.float32), _TENSOR
    return tensors


def dequantized(stored: dict[str, torch.Tensor], fmt: Format, dtype: torch.dtype) -> torch.Tensor:
    """The tensors of `packed_tensors` -> values [E, N, K] in `dtype`."""
    codes = stored["weight_packed" if "weight_packed" in stored else "weight"].contiguous().view(torch.uint8)
    scales = stored["weight_scale"].to(fmt.scale.storage)
    if fmt.tensor_scale is None:
        flat = Quantized(codes.flatten(0, 1), (scales.flatten(0, 1),))
        return ops.dequantize(flat, fmt.name, dtype).unflatten(0, codes.shape[:2])
    divisors = stored["weight_global_scale"].reshape(-1, 1)  # of each matrix
    matrices = (tensor.reshape(len(divisors), -1, tensor.shape[-1]) for tensor in (codes, scales))
    each = zip(*matrices, divisors, strict=True)
    values = [ops.dequantize(Quantized(own, (scale, divisor)), fmt.name, dtype) for own, scale, divisor in each]
    return torch.stack(values).view(*codes.shape[:2], -1)


def shared_divisor(divisors: torch.Tensor) -> torch.Tensor:
    """One divisor for the inputs of all experts, FP32 [1]: the smallest, under which no input of any is clipped."""
    smallest = divisors.float().min().reshape(1)
    if bool((divisors != smallest).any()):
        logger.warning_once("mx-qat: experts differ in their scale of inputs; the largest range is taken for all")
    return smallest


def gate_of(moe: FusedMoEConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function between both products, [S, shards * I] -> [S, I].

    Raises:
        ValueError: the plugin has none for the activation.
    """
    gate = _GATES.get(moe.activation)
    if gate is None or (moe.swiglu_limit is not None and moe.activation is not MoEActivation.SWIGLUOAI):
        names = ", ".join(activation.value for activation in _GATES)
        limit = "" if moe.swiglu_limit is None else f" with a limit of {moe.swiglu_limit}"
        raise ValueError(f"the plugin of mx-qat has no experts with {moe.activation.value}{limit}, only {names}")
    return gate


def _gated(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def gate(y: torch.Tensor) -> torch.Tensor:
        first, up = y.chunk(2, dim=-1)
        return function(first) * up

    return gate


def _clamped_swiglu(y: torch.Tensor, alpha: float = 1.702, limit: float = 7.0) -> torch.Tensor:
    """gpt-oss: columns of gate and up take turns."""
    gate, up = y[..., ::2].clamp(max=limit), y[..., 1::2].clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))


def _gelu_tanh(y: torch.Tensor) -> torch.Tensor:
    return F.gelu(y, approximate="tanh")


_GATES = {
    MoEActivation.SILU: _gated(F.silu),
    MoEActivation.GELU: _gated(F.gelu),
    MoEActivation.GELU_TANH: _gated(_gelu_tanh),
    MoEActivation.SWIGLUOAI: _clamped_swiglu,
    MoEActivation.SILU_NO_MUL: F.silu,
    MoEActivation.GELU_NO_MUL: F.gelu,
    MoEActivation.GELU_TANH_NO_MUL: _gelu_tanh,
    MoEActivation.RELU2_NO_MUL: lambda y: F.relu(y).square(),
}


def _check_columns(fmt: Format, columns: int) -> None:
    """Raise a ValueError unless the blocks of a format divide what is summed over."""
    if not fmt.fits(columns):
        raise ValueError(
            f"experts sum over {columns} values in each process, which is no multiple of the block size {fmt.block} "
            f"of {fmt.name}; choose another --tensor-parallel-size"
        )
