"""Quantization-aware training: prepare a model, train it as usual, export what was trained."""

from .layers.prepare import get_quantization_format, prepare_qat, replace_with_quant_linear
from .layers.quant_linear import QuantLinear, convert, is_quantlinear
from .layers.share import quantized_share
from .layers.tensor_quantizer import TensorQuantizer
from .schemes.config import QATConfig
from .schemes.presets import SCHEMES, get_scheme
from .version import VERSION as __version__

__all__ = [
    "QATConfig",
    "QuantLinear",
    "SCHEMES",
    "TensorQuantizer",
    "__version__",
    "convert",
    "get_quantization_format",
    "get_scheme",
    "is_quantlinear",
    "prepare_qat",
    "quantized_share",
    "replace_with_quant_linear",
]
