"""Mixtures of experts: weights dequantized exactly when they are loaded, inputs quantized as the checkpoint says.

vLLM's own methods for these experts need a GPU, or a CPU with AMX. These compute as the training does: each token's
input is quantized once, what the gate puts out again before the second product. The router is vLLM's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn import Parameter
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, FusedMoeWeightScaleSupported
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.utils import set_weight_attrs

from qat.layers.expert_function import Routing
from qat.numerics import ops
from qat.numerics.families import get_format

from .formats import rule_for
from .gates import gate_of
from .packed_experts import INPUT_DIVISOR, check_columns, dequantized, packed_tensors, shared_divisor

logger = init_logger(f"vllm.{__name__}")

PRODUCTS = ("w13", "w2")  # vLLM's names: gate and up together, then down


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
        self.gate = gate_of(moe.activation.value, moe.swiglu_limit)
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
            check_columns(self.format, shape[-1])
            each = (shards,) if product == "w13" else ()
            tensors = packed_tensors(self.format, shape, each)
            if self.moe.has_bias:
                tensors["bias"] = torch.zeros(shape[:2], dtype=params_dtype), None
            for name, (tensor, kind) in tensors.items():
                parameter = Parameter(tensor, requires_grad=False)
                layer.register_parameter(f"{product}_{self.stored_name(name)}", parameter)
                own = {} if kind is None else {"quant_method": FusedMoeWeightScaleSupported(kind).value}
                set_weight_attrs(parameter, attributes | own)
        layer.params_dtype = params_dtype

    def stored_name(self, name: str) -> str:
        """What the layer calls a tensor of the file."""
        return name

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Codes and scales -> `w13_weight` [E, shards * I, H] and `w2_weight` [E, H, I] in the model's dtype."""
        for product in PRODUCTS:
            stored = {}
            for name in packed_tensors(self.format, (1, 1, self.format.block or 1)):
                own = f"{product}_{self.stored_name(name)}"
                stored[name] = getattr(layer, own).data
                delattr(layer, own)
            weight = dequantized(stored, self.format, layer.params_dtype)
            layer.register_parameter(f"{product}_weight", Parameter(weight, requires_grad=False))
            if self.inputs is not None and get_format(self.inputs).tensor_scale is not None:
                layer.register_buffer(f"{product}_divisor", shared_divisor(stored[INPUT_DIVISOR]), persistent=False)

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
            divisor = getattr(layer, f"{product}_divisor", None)
            x = ops.fake_quantize(x.contiguous(), self.inputs, self.rule, x.dtype, divisor)
        rows = x[routing.tokens] if product == "w13" else x
        y = multiply_by_expert(rows, getattr(layer, f"{product}_weight"), routing.offsets)
        bias = getattr(layer, f"{product}_bias", None)
        return y if bias is None else y + bias[routing.experts].to(y.dtype)


class ExactGptOssExperts(ExactExperts):
    """gpt-oss as published: MXFP4 in its own format (`"quant_method": "mxfp4"`), which says nothing of inputs."""

    weight_dtype = "gpt_oss_mxfp4"  # by which vLLM's loader of gpt-oss knows the file's layout

    def stored_name(self, name: str) -> str:
        """See `ExactExperts.stored_name`."""
        return "weight" if name == "weight_packed" else name


@torch.library.custom_op("mx_qat::multiply_by_expert", mutates_args=())
def multiply_by_expert(rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Each row times the weight of its expert, as in the training: [S, N].

    An operator, because torch 2.13 computes grouped products in FP32 on CPUs and refuses to trace them.

    Args:
        rows: [S, K], sorted by expert.
        weight: [E, N, K].
        offsets: the end of each expert's rows, int32 [E].
    """
    return F.grouped_mm(rows, weight.transpose(1, 2), offs=offsets)


@multiply_by_expert.register_fake
def _(rows, weight, offsets):
    return rows.new_empty((rows.shape[0], weight.shape[1]))
