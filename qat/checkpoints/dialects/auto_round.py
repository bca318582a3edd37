"""AutoRound's dialect of the MX formats and NVFP4 (`packing_format` "auto_round:llm_compressor").

Its tensors are compressed-tensors'. In the MX formats the file names the rule under which transformers quantizes
activations, FLOOR or RCEIL; that of the weights is not named, since their scales are in the file.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping

from ...errors import UserError
from ...layers.sites import CONV1D, LINEAR
from ...numerics import mx, nvfp4
from ...schemes.patterns import EXPRESSION
from ...schemes.spec import Scheme, TensorSpec
from .compressed_tensors import CompressedTensors

_INPUT_RULES = ("floor", "rceil")
_PAIRS = {(name, name) for name in (*mx.FORMATS, *nvfp4.FORMATS)}  # weights and inputs, of AutoRound's backends
_STATIC_NVFP4 = "nv_fp4_with_static_gs"  # inputs with a calibrated divisor


class AutoRound(CompressedTensors):
    """See `Dialect`; tensors, and so their names and their decompression, are compressed-tensors'."""

    name, quant_method = "auto_round", "auto-round"

    def can_hold(self, scheme: Scheme, kind: str = LINEAR.name) -> str | None:
        """See `Dialect.can_hold`."""
        if kind == CONV1D.name:
            return "is a Conv1D, whose weight AutoRound's format transposes; use the export format compressed-tensors"
        if kind != LINEAR.name:
            return (
                "holds experts, for which AutoRound's format has no names that engines agree on; use the export format "
                "compressed-tensors"
            )
        weight, inputs = scheme.weight, scheme.input
        if inputs is None or (weight.format.name, inputs.format.name) not in _PAIRS:
            return (
                f"is quantized in {scheme.name}, for which AutoRound has no layout of these tensors (its own of INT4 "
                "is GPTQ's, and its FP4 backends quantize inputs in the weights' format); use the export format "
                "compressed-tensors"
            )
        if inputs.format.name in mx.FORMATS and inputs.rule not in _INPUT_RULES:
            return (
                f"quantizes its input under rule {inputs.rule!r}, which AutoRound's format cannot hold: it knows "
                f"{', '.join(_INPUT_RULES)}; use the export format compressed-tensors"
            )
        return None

    def config(self, sites: Mapping[str, Scheme], rest: list[str], kv_cache: TensorSpec | None = None) -> dict:
        """See `Dialect.config`."""
        if kv_cache is not None:
            raise UserError(
                "the key/value cache is quantized, which AutoRound's format cannot hold; use the export format "
                "compressed-tensors"
            )
        if experts := next((name for name in rest if name.startswith(EXPRESSION)), None):
            raise UserError(
                f"AutoRound's format cannot leave experts alone ({experts}): its loader takes them apart and packs "
                "their routers as well; use the export format compressed-tensors"
            )
        settings = {name: _settings(scheme) for name, scheme in sites.items()}
        # The scheme of most layers is the file's, the others are exceptions by name.
        common = Counter(tuple(sorted(setting.items())) for setting in settings.values()).most_common(1)[0][0]
        blocks = _block_prefix([name for name, setting in settings.items() if tuple(sorted(setting.items())) == common])
        extra = {
            name: setting
            for name, setting in settings.items()
            if tuple(sorted(setting.items())) != common or not name.startswith(f"{blocks}.")
        }
        plain = {"bits": 16, "act_bits": 16}
        extra |= {name: dict(plain) for name in rest if name.startswith(f"{blocks}.")}
        config = {"quant_method": self.quant_method, "packing_format": "auto_round:llm_compressor", **dict(common)}
        config["block_name_to_quantize"] = blocks
        return config | ({"extra_config": extra} if extra else {})

    def input_rule(self, scheme: Scheme) -> str | None:
        """See `Dialect.input_rule`."""
        if scheme.input is None:
            return None
        # NVFP4 is computed in FP32, whatever the dtype of the activations.
        return scheme.input.rule if scheme.input.format.tensor_scale is None else "absmax"

    def logits_differ(self, scheme: Scheme) -> str | None:
        """See `Dialect.logits_differ`."""
        if scheme.weight.format.tensor_scale is None:
            return None
        return "AutoRound's NVFP4 layers multiply by rounded reciprocals of the scales where NVFP4 divides by them"


def _settings(scheme: Scheme) -> dict:
    weight, inputs = scheme.weight, scheme.input
    assert inputs is not None, f"{scheme.name} passed can_hold"
    static = inputs.format.tensor_scale is not None
    return {
        "data_type": weight.format.data_type, "bits": weight.bits, "group_size": weight.block_size, "sym": True,
        "act_data_type": _STATIC_NVFP4 if static else inputs.data_type, "act_bits": inputs.bits,
        "act_group_size": inputs.block_size, "act_sym": True, "act_dynamic": True,
    }  # fmt: skip


def _block_prefix(names: list[str]) -> str:
    """What the names of layers in numbered blocks begin with: "model.layers" for "model.layers.0.mlp.up_proj"."""
    numbered = (re.match(r"(.+?)\.\d+\.", name) for name in names)
    common = os.path.commonprefix([match[1].split(".") for match in numbered if match])
    if not common:
        raise UserError(
            "AutoRound's format needs layers in numbered blocks such as model.layers.0, and this model has none; "
            "use the export format compressed-tensors"
        )
    return ".".join(common)
