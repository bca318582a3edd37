"""The two kernels: dequantize the weight exactly, quantize the input under the chosen rule, multiply.

The weight is dequantized when it is loaded, into the dtype the model computes in: exact, and as fast as an unquantized
model from then on, at the memory of one. The input is fake-quantized with the operator of the training.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch.nn import Parameter
from vllm.logger import init_logger
from vllm.model_executor.kernels import linear as vllm_linear
from vllm.model_executor.kernels.linear.mxfp4.base import MxFp4LinearKernel
from vllm.model_executor.kernels.linear.mxfp8.Mxfp8LinearKernel import Mxfp8LinearKernel
from vllm.platforms import PlatformEnum

from qat.numerics import ops
from qat.numerics.formats import Quantized

logger = init_logger(f"vllm.{__name__}")

RULE_VARIABLE, PLATFORMS_VARIABLE = "MX_QAT_ACTIVATION_RULE", "MX_QAT_PLATFORMS"
ACTIVATION_RULES = ("floor", "even", "rceil", "none")
PLATFORMS = {"cpu": PlatformEnum.CPU, "cuda": PlatformEnum.CUDA}


class _ExactKernel:
    """What both kernels do; `fmt` is the format's name in `qat.numerics`."""

    fmt: str

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    @classmethod
    def can_implement(cls, config) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Codes uint8 [N, K / 2] or float8_e4m3fn [N, K], scales uint8 [N, K / 32] -> [N, K] in the model's dtype."""
        codes, scale = layer.weight.data.contiguous().view(torch.uint8), layer.weight_scale.data.contiguous()
        dtype = getattr(layer, "params_dtype", torch.bfloat16)
        weight = ops.dequantize(Quantized(codes, (scale,)), self.fmt, dtype)
        layer.weight = Parameter(weight, requires_grad=False)
        layer.weight_scale = Parameter(scale, requires_grad=False)

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] -> [..., N], x on the MX grid first."""
        rule = activation_rule()
        if rule != "none":
            x = ops.fake_quantize(x.contiguous(), self.fmt, rule, x.dtype)
        return F.linear(x, layer.weight.to(x.dtype), bias)


class ExactMxfp4LinearKernel(_ExactKernel, MxFp4LinearKernel):
    """MXFP4 weights; inputs in MXFP4 unless the rule is "none"."""

    fmt = "mxfp4"


class ExactMxfp8LinearKernel(_ExactKernel, Mxfp8LinearKernel):
    """MXFP8 weights; inputs in MXFP8 unless the rule is "none"."""

    fmt = "mxfp8"


def activation_rule() -> str:
    """The rule named by the environment.

    Raises:
        ValueError: it is unknown.
    """
    rule = os.environ.get(RULE_VARIABLE, "even").lower()
    if rule not in ACTIVATION_RULES:
        raise ValueError(f"{RULE_VARIABLE}={rule!r} is unknown; choose one of {', '.join(ACTIVATION_RULES)}")
    return rule


def register_kernels() -> None:
    """Add both kernels to vLLM's list, on GPUs at its head; doing it twice changes nothing."""
    rule = activation_rule()
    for name in os.environ.get(PLATFORMS_VARIABLE, "cpu").lower().split(","):
        if name not in PLATFORMS:
            raise ValueError(f"{PLATFORMS_VARIABLE} names {name!r}; choose among {', '.join(PLATFORMS)}")
        for kernel, kind in ((ExactMxfp4LinearKernel, "mxfp4"), (ExactMxfp8LinearKernel, "mxfp8")):
            _register_first(kernel, PLATFORMS[name], kind)
    logger.info("MX kernels of mx-qat registered: activations under %s", rule.upper())


def _register_first(kernel: type, platform: PlatformEnum, kind: str) -> None:
    # vLLM tries kernels in order and appends new ones, so to come first a kernel must be moved. vLLM 0.32 has no public
    # way to do that; this goes when `register_linear_kernel` takes a priority.
    kernels = getattr(vllm_linear, f"_POSSIBLE_{kind.upper()}_KERNELS")
    if kernel in kernels.get(platform, ()):
        return
    vllm_linear.register_linear_kernel(kernel, platform, kind)
    kernels[platform].insert(0, kernels[platform].pop())
