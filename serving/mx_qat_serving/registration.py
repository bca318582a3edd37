"""Registration: kernels join vLLM's list; experts and the reader of NVFP4 have none in vLLM 0.32.

So vLLM's choice of a method for quantized experts is wrapped, and its reader replaced. Its method for transformed
inputs, which takes no bias, is wrapped, too.
"""

from __future__ import annotations

import os

import torch
from vllm.logger import init_logger
from vllm.model_executor.kernels import linear as vllm_linear
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors as vllm_reader
from vllm.model_executor.layers.quantization.compressed_tensors.transform.linear import (
    CompressedTensorsLinearTransformMethod as TransformMethod,
)
from vllm.model_executor.layers.quantization.compressed_tensors.transform.module import HadamardTransform
from vllm.model_executor.layers.quantization.mxfp4 import GptOssMxfp4Config
from vllm.platforms import PlatformEnum, current_platform

from .experts import ExactExperts, ExactGptOssExperts
from .formats import chosen_rules, format_of, known_format
from .kernels import KERNELS, Nvfp4Scheme, activation_option

logger = init_logger(f"vllm.{__name__}")

PLATFORMS_VARIABLE = "MX_QAT_PLATFORMS"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PLATFORMS = {"cpu": PlatformEnum.CPU, "cuda": PlatformEnum.CUDA}


def register_all() -> None:
    """Offer kernels, on GPUs before vLLM's own, and experts; doing it twice changes nothing.

    Raises:
        ValueError: a variable of the environment has no meaning.
    """
    rules, platforms = chosen_rules(), chosen_platforms()
    for kernel, kind in KERNELS:
        for platform in platforms:
            _register_first(kernel, platform, kind)
    Nvfp4Scheme.platforms = platforms
    vllm_reader.CompressedTensorsW4A4Fp4 = Nvfp4Scheme  # has no registry in vLLM 0.32
    _register_experts(platforms)
    # vLLM 0.32 multiplies by the matrix of a transform as by any unquantized weight, and forgets that its gemm for CPUs
    # is one that loading leaves with the layer.
    HadamardTransform.cpu_linear = staticmethod(torch.nn.functional.linear)
    _take_biases()
    logger.info("mx-qat kernels registered: activations under %s", ", ".join(rules).upper() or "their default rules")


def chosen_platforms() -> tuple[PlatformEnum, ...]:
    """Where the environment wants the plugin to serve.

    Raises:
        ValueError: a platform is unknown.
    """
    names = os.environ.get(PLATFORMS_VARIABLE, "cpu").lower().split(",")
    for name in names:
        if name not in PLATFORMS:
            raise ValueError(f"{PLATFORMS_VARIABLE} names {name!r}; choose among {', '.join(PLATFORMS)}")
    return tuple(PLATFORMS[name] for name in names)


def _register_first(kernel: type, platform: PlatformEnum, kind: str) -> None:
    # vLLM tries kernels in order and appends new ones, so to come first a kernel must be moved. vLLM 0.32 has no public
    # way to do that; this goes when `register_linear_kernel` takes a priority.
    kernels = getattr(vllm_linear, f"_POSSIBLE_{kind.upper()}_KERNELS")
    if kernel in kernels.get(platform, ()):
        return
    vllm_linear.register_linear_kernel(kernel, platform, kind)
    kernels[platform].insert(0, kernels[platform].pop())


def _take_biases() -> None:
    # vLLM 0.32 asserts that layers with transforms have no bias, which a transform of the input does not touch.
    if not hasattr(TransformMethod, "stock_apply"):
        TransformMethod.stock_apply = TransformMethod.apply

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if bias is None or self.input_transform is None or self.output_transform is not None:
            return self.stock_apply(layer, x, bias)
        return self.quant_method.apply(layer, self.input_transform(x), bias)

    TransformMethod.apply = apply


def _register_experts(platforms: tuple[PlatformEnum, ...]) -> None:
    reader = vllm_reader.CompressedTensorsMoEMethod
    if not hasattr(reader, "stock_moe_method"):
        reader.stock_moe_method = reader.get_moe_method
        GptOssMxfp4Config.stock_moe_method = GptOssMxfp4Config._make_moe_method

    def get_moe_method(quant_config, layer, layer_name: str) -> FusedMoEMethodBase:
        own = None
        if is_served(layer.moe_config, platforms):
            own = exact_method(quant_config, layer, layer_name)
        return own or reader.stock_moe_method(quant_config, layer, layer_name)

    def make_moe_method(self, moe: FusedMoEConfig) -> FusedMoEMethodBase:
        if is_served(moe, platforms):
            return ExactGptOssExperts(moe, "mxfp4", activation_option("moe"))
        return self.stock_moe_method(moe)

    if current_platform._enum in platforms:  # vLLM's own kernels for gpt-oss compute in BF16 only
        GptOssMxfp4Config.get_supported_act_dtypes = classmethod(lambda cls: list(DTYPES))
    reader.get_moe_method = staticmethod(get_moe_method)
    GptOssMxfp4Config._make_moe_method = make_moe_method


def is_served(moe: FusedMoEConfig, platforms: tuple[PlatformEnum, ...]) -> bool:
    """Whether the plugin serves experts: on its platforms, unless the user chose one of vLLM's backends for them."""
    return current_platform._enum in platforms and moe.moe_backend == "auto"


def exact_method(quant_config, layer, layer_name: str) -> ExactExperts | None:
    """The method for the experts of a layer; None for those that vLLM must serve, or refuse.

    vLLM asks for the schemes of the first expert's matrices, under the names that the model's files have.

    Raises:
        ValueError: see `ExactExperts`; or inputs are in a format that the library does not have.
    """
    quant_config._add_fused_moe_to_target_scheme_map()
    names = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
    scheme, *others = [quant_config.get_scheme_dict(layer, f"{layer_name}.0.{name}") for name in names]
    if scheme is None or any(other != scheme for other in others):
        return None
    weights, inputs = scheme["weights"] and known_format(scheme["weights"]), scheme["input_activations"]
    if weights is None:
        return None
    option = activation_option("moe")
    if inputs is None and option is None and activation_option("linear") is not None:
        logger.warning_once(
            "mx-qat: activations of linear layers are quantized by an option, those of experts are not; add "
            "--quantization-config.moe.activation mxfp8 where they were trained so"
        )
    return ExactExperts(layer.moe_config, weights, option or (inputs and format_of(inputs)))
