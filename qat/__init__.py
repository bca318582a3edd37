"""Quantization-aware training in MX formats: prepare a model, train it as usual, export what was trained."""

from .config import QATConfig
from .prepare import get_quantization_format, prepare_qat, replace_with_quant_linear
from .quant_linear import QuantLinear, convert, is_quantlinear
from .schemes import SCHEMES, get_scheme
from .tensor_quantizer import TensorQuantizer

__all__ = [
    "QATConfig",
    "QuantLinear",
    "SCHEMES",
    "TensorQuantizer",
    "convert",
    "get_quantization_format",
    "get_scheme",
    "is_quantlinear",
    "prepare_qat",
    "replace_with_quant_linear",
]
