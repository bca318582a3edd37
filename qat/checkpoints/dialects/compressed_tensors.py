"""compressed-tensors' own dialect: vLLM, transformers and llm-compressor read it.

Mixed schemes become several groups. transformers quantizes activations in the tensor's own dtype, MX formats under
EVEN. MXFP8 activations beside MXFP4 weights have no name in the file, which then says that activations stay as they
are; vLLM takes them from its command line.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from ...errors import UserError
from ...layers.sites import CONV1D, LINEAR
from ...numerics.codes import as_stored
from ...numerics.formats import E2M1, E4M3, E8M0, INT4, Format, Quantized
from ...schemes.spec import VIEW_DTYPE, Scheme, TensorSpec

CACHE_RULE = "absmax_native"  # of keys and values, in transformers
# What the library calls the layout of weights, and the formats that inputs may have beside them: rows for new schemes.
_LAYOUTS = {
    "mxfp4": "mxfp4-pack-quantized",
    "mxfp8": "mxfp8-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "int4_g32": "pack-quantized",
    "int4_g128": "pack-quantized",
    "fp8_channel": "float-quantized",
}
_INPUTS: dict[str, tuple[str | None, ...]] = {
    "mxfp4": ("mxfp4", "mxfp8", "fp8_token", "fp8_g128", None),
    "mxfp8": ("mxfp8", None),
    "nvfp4": ("nvfp4", None),
    "int4_g32": (None,),
    "int4_g128": (None,),
    "fp8_channel": ("fp8_token",),
}
_INPUT_RULES = {  # by format, in transformers
    "mxfp4": "even", "mxfp8": "even", "fp8_token": "absmax_native", "fp8_g128": "absmax_native",
    "nvfp4": "absmax_native",
}  # fmt: skip
LAYOUT_NAMES = tuple(dict.fromkeys(_LAYOUTS.values()))
WEIGHT_DIVISOR, WEIGHT_SHAPE = "weight_global_scale", "weight_shape"
# Formats of weights and inputs that the file cannot hold together, and the options that tell vLLM the inputs' format.
_ON_THE_COMMAND_LINE: dict[tuple[str, str | None], list[str]] = {
    ("mxfp4", "mxfp8"): [
        "--quantization-config.linear.activation",
        "mxfp8",
        "--quantization-config.moe.activation",
        "mxfp8",
    ],
}


class CompressedTensors:
    """See `Dialect`."""

    name = quant_method = "compressed-tensors"
    packs_fused = False

    def can_hold(self, scheme: Scheme, kind: str = LINEAR.name) -> str | None:
        """See `Dialect.can_hold`."""
        weight, inputs = _key(scheme)
        if kind == CONV1D.name and "weight" in _names(scheme.weight.format):
            return (
                f"is a Conv1D in {scheme.name}: its packed weight has the name of the transposed one, which engines "
                "transpose when they load it; use a scheme of 4 bits, such as MXFP4, for such layers"
            )
        if inputs in _INPUTS.get(weight, ()):
            return None
        return (
            f"has weights in {weight} and inputs in {inputs or 'no format'}, for which {self.name} has no name; use "
            "one of the schemes by name"
        )

    def config(self, sites: Mapping[str, Scheme], rest: list[str], kv_cache: TensorSpec | None = None) -> dict:
        """See `Dialect.config`."""
        _check_options(sites)
        groups: dict[tuple, list[str]] = {}
        schemes = {}
        for name, scheme in sites.items():
            groups.setdefault(_key(scheme), []).append(name)
            schemes[_key(scheme)] = scheme
        single = len(groups) == 1
        return {
            "quant_method": self.quant_method,
            "format": _LAYOUTS[next(iter(groups))[0]] if single else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{i}": {
                    "targets": ["Linear"] if single else names,
                    "format": _LAYOUTS[key[0]],
                    "weights": quantization_args(schemes[key].weight.format, dynamic=False),
                    "input_activations": _input_args(schemes[key]),
                    "output_activations": None,
                }
                for i, (key, names) in enumerate(groups.items())
            },
            "ignore": rest,
            "kv_cache_scheme": None if kv_cache is None else kv_cache_args(kv_cache.format),
        }

    def tensor_names(self, site: str, spec: TensorSpec) -> tuple[str, ...]:
        """See `Dialect.tensor_names`."""
        return tuple(f"{site}.{name}" for name in _names(spec.format))

    def input_rule(self, scheme: Scheme) -> str | None:
        """See `Dialect.input_rule`."""
        return None if scheme.input is None or self.serve_options([scheme]) else _INPUT_RULES[scheme.input.format.name]

    def logits_differ(self, scheme: Scheme) -> str | None:
        """See `Dialect.logits_differ`."""
        return None

    def serve_options(self, schemes: Iterable[Scheme]) -> list[str]:
        """See `Dialect.serve_options`."""
        return next((_ON_THE_COMMAND_LINE[key] for key in map(_key, schemes) if key in _ON_THE_COMMAND_LINE), [])

    def tensors(self, quantized: Quantized, spec: TensorSpec) -> list[torch.Tensor]:
        """See `Dialect.tensors`."""
        return packed_tensors(quantized, spec)

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
        compressor = BaseCompressor.get_value_from_registry(_LAYOUTS[spec.format.name])
        named = dict(zip(_names(spec.format), tensors, strict=True))
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        return compressor.decompress(named, scheme)["weight"].to(VIEW_DTYPE)


def layout_name(fmt: Format) -> str:
    """What the library calls the layout of weights in a format."""
    return _LAYOUTS[fmt.name]


def quantization_args(fmt: Format, dynamic: bool) -> dict:
    """The fields of compressed-tensors' `QuantizationArgs` for a format."""
    args: dict = {"num_bits": fmt.element.bits, "type": "int" if fmt.element == INT4 else "float"}
    if fmt.block is None:
        args |= {"strategy": "token" if dynamic else "channel"}
    else:
        args |= {"strategy": "tensor_group" if fmt.tensor_scale else "group", "group_size": fmt.block}
    if dynamic and fmt.tensor_scale:  # scales of blocks follow from the input, that of the tensor is calibrated
        args |= {"symmetric": True, "dynamic": "local", "observer": "static_minmax"}
    else:
        args |= {"symmetric": True, "dynamic": dynamic}
    stored = {E8M0: "torch.uint8", E4M3: "torch.float8_e4m3fn"}.get(fmt.scale)
    return args | ({"scale_dtype": stored, "zp_dtype": stored} if stored else {})


def kv_cache_args(fmt: Format) -> dict:
    """The fields of compressed-tensors' `QuantizationArgs` for keys and values: one static scale a tensor."""
    kind = {"num_bits": fmt.element.bits, "type": "float", "strategy": "tensor"}
    return kind | {"symmetric": True, "dynamic": False}


def packed_tensors(quantized: Quantized, spec: TensorSpec) -> list[torch.Tensor]:
    """The tensors of a site in the dtypes that the file holds, in the order of `Dialect.tensor_names`."""
    tensors = [as_stored(quantized.codes, spec.format.element), *quantized.scales]
    if spec.format.element == INT4:
        tensors.append(torch.tensor(spec.format.value_shape(quantized.codes)))
    return tensors


def _names(fmt: Format) -> list[str]:
    """Of the tensors of a packed weight: codes, scales from inner to outer, and the shape where the file has it."""
    names = ["weight_packed" if fmt.element in (E2M1, INT4) else "weight", "weight_scale"]
    if fmt.tensor_scale:
        names.append(WEIGHT_DIVISOR)
    if fmt.element == INT4:
        names.append(WEIGHT_SHAPE)
    return names


def _key(scheme: Scheme) -> tuple[str, str | None]:
    return scheme.weight.format.name, None if scheme.input is None else scheme.input.format.name


def _input_args(scheme: Scheme) -> dict | None:
    if scheme.input is None or _key(scheme) in _ON_THE_COMMAND_LINE:
        return None
    return quantization_args(scheme.input.format, dynamic=True)


def _check_options(sites: Mapping[str, Scheme]) -> None:
    """Refuse layers that vLLM's options for other layers would change: they hold for a whole model.

    Raises:
        UserError: there is one.
    """
    chosen = next((scheme for scheme in sites.values() if _key(scheme) in _ON_THE_COMMAND_LINE), None)
    if chosen is None:
        return
    assert chosen.input is not None
    for name, scheme in sites.items():
        if _key(scheme)[1] != chosen.input.format.name:
            raise UserError(
                f"{name} is in {scheme.name}, other layers in {chosen.name}, whose activations are chosen by vLLM's "
                f"option {' '.join(_ON_THE_COMMAND_LINE[_key(chosen)])} for all layers; use {chosen.name} for all of "
                f"them, or schemes with inputs in {chosen.input.format.name}"
            )
