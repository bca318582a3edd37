"""compressed-tensors' own dialect: vLLM, transformers and llm-compressor read it.

Mixed schemes become several groups. transformers quantizes activations in the tensor's own dtype, MX formats under
EVEN.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...numerics.codes import as_stored
from ...numerics.formats import E2M1, E8M0, Format, Quantized
from ...schemes.spec import VIEW_DTYPE, Scheme, TensorSpec

# What the library calls a pair of formats of weights and inputs: the row that a new scheme adds.
_FORMATS = {
    ("mxfp4", "mxfp4"): "mxfp4-pack-quantized",
    ("mxfp8", "mxfp8"): "mxfp8-quantized",
    ("fp8_channel", "fp8_token"): "float-quantized",
}
_INPUT_RULES = {"mxfp4": "even", "mxfp8": "even", "fp8_token": "absmax_native"}  # by format, in transformers


class CompressedTensors:
    """See `Dialect`."""

    name = quant_method = "compressed-tensors"

    def can_hold(self, scheme: Scheme) -> str | None:
        """See `Dialect.can_hold`."""
        if _key(scheme) in _FORMATS:
            return None
        weight, inputs = _key(scheme)
        return (
            f"has weights in {weight} and inputs in {inputs or 'no format'}, for which {self.name} has no name; use "
            "one of the schemes by name"
        )

    def config(self, sites: Mapping[str, Scheme], rest: list[str]) -> dict:
        """See `Dialect.config`."""
        groups: dict[tuple, list[str]] = {}
        schemes = {}
        for name, scheme in sites.items():
            groups.setdefault(_key(scheme), []).append(name)
            schemes[_key(scheme)] = scheme
        single = len(groups) == 1
        return {
            "quant_method": self.quant_method,
            "format": _FORMATS[next(iter(groups))] if single else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{i}": {
                    "targets": ["Linear"] if single else names,
                    "format": _FORMATS[key],
                    "weights": quantization_args(schemes[key].weight.format, dynamic=False),
                    "input_activations": _input_args(schemes[key]),
                    "output_activations": None,
                }
                for i, (key, names) in enumerate(groups.items())
            },
            "ignore": rest,
            "kv_cache_scheme": None,
        }

    def tensor_names(self, site: str, spec: TensorSpec) -> tuple[str, ...]:
        """See `Dialect.tensor_names`."""
        return f"{site}.{_codes_name(spec.format)}", f"{site}.weight_scale"

    def input_rule(self, scheme: Scheme) -> str | None:
        """See `Dialect.input_rule`."""
        return None if scheme.input is None else _INPUT_RULES[scheme.input.format.name]

    def decompress(self, tensors: list[torch.Tensor], spec: TensorSpec) -> torch.Tensor:
        """See `Dialect.decompress`.

        Raises:
            ImportError: compressed-tensors is not installed.
        """
        try:
            from compressed_tensors.compressors import BaseCompressor
            from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        except ImportError as error:
            raise ImportError("verification needs a library: pip install compressed-tensors") from error
        weights = QuantizationArgs(**quantization_args(spec.format, dynamic=False))
        name = next(name for (weight, _), name in _FORMATS.items() if weight == spec.format.name)
        compressor = BaseCompressor.get_value_from_registry(name)
        named = dict(zip((_codes_name(spec.format), "weight_scale"), tensors, strict=True))
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        return compressor.decompress(named, scheme)["weight"].to(VIEW_DTYPE)


def quantization_args(fmt: Format, dynamic: bool) -> dict:
    """The fields of compressed-tensors' `QuantizationArgs` for a format."""
    args: dict = {"num_bits": fmt.element.bits, "type": "float"}
    if fmt.block is None:
        args |= {"strategy": "token" if dynamic else "channel"}
    else:
        args |= {"strategy": "group", "group_size": fmt.block}
    args |= {"symmetric": True, "dynamic": dynamic}
    return args | ({"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"} if fmt.scale == E8M0 else {})


def packed_tensors(quantized: Quantized, spec: TensorSpec) -> list[torch.Tensor]:
    """Codes and scales in the dtypes that the file holds."""
    return [as_stored(quantized.codes, spec.format.element), *quantized.scales]


def _codes_name(fmt: Format) -> str:
    return "weight_packed" if fmt.element == E2M1 else "weight"


def _key(scheme: Scheme) -> tuple[str, str | None]:
    return scheme.weight.format.name, None if scheme.input is None else scheme.input.format.name


def _input_args(scheme: Scheme) -> dict | None:
    return None if scheme.input is None else quantization_args(scheme.input.format, dynamic=True)
