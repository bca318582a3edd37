"""The kernels: dequantize the weight exactly, quantize the input as the checkpoint says, multiply.

The weight is dequantized when it is loaded, into the dtype the model computes in: exact, and as fast as an unquantized
model from then on, at the memory of one. The input is fake-quantized with the operator of the training.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn import Parameter
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.kernels.linear.mxfp4.base import MxFp4LinearKernel
from vllm.model_executor.kernels.linear.mxfp8.Mxfp8LinearKernel import Mxfp8LinearKernel
from vllm.model_executor.kernels.linear.nvfp4.base import NvFp4LinearKernel, NvFp4LinearLayerConfig
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsW4A4Fp4
from vllm.model_executor.layers.quantization.utils.quant_utils import kMxfp8Dynamic
from vllm.platforms import PlatformEnum, current_platform

from qat.numerics import ops
from qat.numerics.formats import Quantized

from .formats import input_format, rule_for

logger = init_logger(f"vllm.{__name__}")


class _ExactKernel:
    """What all kernels do; `fmt` is the name of the weight's format in `qat.numerics`."""

    fmt: str
    inputs: str | None = None  # the format of the inputs, once the weights are loaded
    rule: str | None = None

    def __init__(self, config) -> None:
        super().__init__(config)
        self.option = activation_option("linear")

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    @classmethod
    def can_implement(cls, config) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Codes uint8 [N, K / 2] or float8_e4m3fn [N, K] and scales [N, K / block] -> [N, K] in the model's dtype."""
        inputs = self.option or input_format(layer, self.fmt)
        self.rule = None if inputs is None else rule_for(inputs)
        self.inputs = None if self.rule is None else inputs
        codes, scales = layer.weight.data.contiguous().view(torch.uint8), self.scales(layer)
        weight = ops.dequantize(Quantized(codes, scales), self.fmt, layer.params_dtype)
        layer.weight = Parameter(weight, requires_grad=False)
        activations = f"{self.inputs} under {self.rule.upper()}" if self.rule else "not quantized"
        logger.info_once("mx-qat: weights in %s, activations %s", self.fmt, activations)

    def scales(self, layer: torch.nn.Module) -> tuple[torch.Tensor, ...]:
        """Those of the weight, inner to outer."""
        return (layer.weight_scale.data.contiguous(),)

    def input_divisor(self, layer: torch.nn.Module) -> torch.Tensor | None:
        """That of the input, FP32 [1], in formats with a tensor scale."""
        return None

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] -> [..., N], x on the grid of its format first."""
        if self.inputs is not None:
            x = ops.fake_quantize(x.contiguous(), self.inputs, self.rule, x.dtype, self.input_divisor(layer))
        return F.linear(x, layer.weight.to(x.dtype), bias)


class ExactMxfp4LinearKernel(_ExactKernel, MxFp4LinearKernel):
    """MXFP4 weights; inputs in MXFP4, MXFP8, FP8 or not quantized, as the checkpoint says."""

    fmt = "mxfp4"


class ExactMxfp8LinearKernel(_ExactKernel, Mxfp8LinearKernel):
    """MXFP8 weights; inputs in MXFP8 or not quantized, as the checkpoint says."""

    fmt = "mxfp8"


class ExactNvfp4LinearKernel(_ExactKernel, NvFp4LinearKernel):
    """NVFP4 weights; inputs in NVFP4 or not quantized, as the checkpoint says."""

    fmt = "nvfp4"

    def scales(self, layer: torch.nn.Module) -> tuple[torch.Tensor, ...]:
        """Block scales, and the divisor that the file has."""
        return layer.weight_scale.data.contiguous(), layer.weight_divisor

    def input_divisor(self, layer: torch.nn.Module) -> torch.Tensor | None:
        """The calibrated one."""
        return layer.input_global_scale_inv.data.reshape(1)


class Nvfp4Scheme(CompressedTensorsW4A4Fp4):
    """vLLM's reader of NVFP4, which keeps what an exact kernel needs.

    vLLM keeps the reciprocal of the weight's divisor, from which the divisor does not follow exactly; and its kernels
    for checkpoints without input scales are a fixed list (vLLM 0.32).
    """

    platforms: tuple[PlatformEnum, ...] = ()  # where the exact kernel serves

    def __init__(self, use_a16: bool = False) -> None:
        if not (use_a16 and current_platform._enum in self.platforms):
            super().__init__(use_a16)
            return
        self.use_a16, self.group_size = True, 16
        self.kernel = ExactNvfp4LinearKernel(NvFp4LinearLayerConfig())
        logger.info_once("Using %s for NVFP4 GEMM", ExactNvfp4LinearKernel.__name__)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """vLLM's own, with the divisor of the file kept as `weight_divisor`, FP32 [1]."""
        layer.weight_divisor = layer.weight_global_scale.data.max().float().reshape(1)
        super().process_weights_after_loading(layer)


def activation_option(kind: str) -> str | None:
    """The format of vLLM's option --quantization-config.KIND.activation; None where it is not given.

    Args:
        kind: "linear" or "moe".

    Raises:
        ValueError: a format other than MXFP8.
    """
    config = get_current_vllm_config_or_none()
    args = None if config is None else config.model_config.quantization_config
    spec = None if args is None else getattr(args, kind)
    key = None if spec is None else spec.activation
    if key not in (None, kMxfp8Dynamic):
        raise ValueError(f"--quantization-config.{kind}.activation: the plugin of mx-qat knows mxfp8, not {key}")
    return None if key is None else "mxfp8"


KERNELS = ((ExactMxfp4LinearKernel, "mxfp4"), (ExactMxfp8LinearKernel, "mxfp8"), (ExactNvfp4LinearKernel, "nvfp4"))
