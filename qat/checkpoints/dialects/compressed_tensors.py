"""The `quantization_config` of a packed checkpoint: how config.json tells an engine which layers are packed, and how.

Two dialects hold MX formats: compressed-tensors' own and AutoRound's. The tensors are the same in both. They differ in
the rule under which the engine quantizes activations: transformers applies EVEN to compressed-tensors checkpoints, and
to AutoRound's the rule that the file names, FLOOR or RCEIL.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping

from ...numerics.formats import BLOCK_SIZE
from ...schemes.spec import LayerScheme

EXPORT_FORMATS = ("compressed-tensors", "auto_round")
_CT_FORMATS = {4: "mxfp4-pack-quantized", 8: "mxfp8-quantized"}
_AUTO_ROUND_RULES = {"floor": "mx_fp", "rceil": "mx_fp_rceil"}


def check_export_format(export_format: str) -> None:
    """Raise a ValueError unless `export_format` is one of `EXPORT_FORMATS`."""
    if export_format not in EXPORT_FORMATS:
        raise ValueError(f"export format {export_format!r} is unknown; choose one of {', '.join(EXPORT_FORMATS)}")


def export_format_of(quantization_config: dict | None, where: object) -> str:
    """Which of `EXPORT_FORMATS` the quantization_config of a checkpoint is in.

    Raises:
        ValueError: none of them; `where` is named.
    """
    method = (quantization_config or {}).get("quant_method")
    names = {"compressed-tensors": "compressed-tensors", "auto-round": "auto_round"}
    if method not in names:
        raise ValueError(f"{where} is no packed checkpoint: its quant_method is {method!r}, not one of {list(names)}")
    return names[method]


def engine_input_rule(export_format: str, layer: LayerScheme) -> str:
    """The scale rule that transformers applies to the inputs of `layer` when it loads the packed checkpoint."""
    return "even" if export_format == "compressed-tensors" else layer.input.scale_rule


def make_quantization_config(export_format: str, layers: Mapping[str, LayerScheme], unquantized: list[str]) -> dict:
    """The `quantization_config` for packed `layers` (schemes by module name) and linear layers left `unquantized`.

    Raises:
        ValueError: the format cannot hold one of the schemes.
    """
    check_export_format(export_format)
    make = _compressed_tensors if export_format == "compressed-tensors" else _auto_round
    return make(layers, unquantized)


def _compressed_tensors(layers, unquantized) -> dict:
    by_bits: dict[int, list[str]] = {}
    for name, scheme in layers.items():
        if scheme.weight.bits != scheme.input.bits:
            raise ValueError(
                f"{name} has weights of {scheme.weight.bits} and inputs of {scheme.input.bits} bits; engines compute "
                "with one width for both, so use one of the schemes by name"
            )
        by_bits.setdefault(scheme.weight.bits, []).append(name)
    single = len(by_bits) == 1
    groups = {
        f"group_{i}": {
            "targets": ["Linear"] if single else names,
            "format": _CT_FORMATS[bits],
            "weights": _ct_tensor(bits, dynamic=False),
            "input_activations": _ct_tensor(bits, dynamic=True),
            "output_activations": None,
        }
        for i, (bits, names) in enumerate(by_bits.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": _CT_FORMATS[next(iter(by_bits))] if single else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": unquantized,
        "kv_cache_scheme": None,
    }


def _ct_tensor(bits: int, dynamic: bool) -> dict:
    return {
        "num_bits": bits, "type": "float", "strategy": "group", "group_size": BLOCK_SIZE, "symmetric": True,
        "dynamic": dynamic, "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8",
    }  # fmt: skip


def _auto_round(layers, unquantized) -> dict:
    schemes = {name: _auto_round_scheme(name, scheme) for name, scheme in layers.items()}
    # The scheme of most layers is the file's, the others are exceptions by name.
    common = Counter(tuple(sorted(scheme.items())) for scheme in schemes.values()).most_common(1)[0][0]
    blocks = _block_prefix([name for name, scheme in schemes.items() if tuple(sorted(scheme.items())) == common])
    extra = {
        name: scheme
        for name, scheme in schemes.items()
        if tuple(sorted(scheme.items())) != common or not name.startswith(f"{blocks}.")
    }
    plain = {"bits": 16, "act_bits": 16}
    extra |= {name: dict(plain) for name in unquantized if name.startswith(f"{blocks}.")}
    config = {"quant_method": "auto-round", "packing_format": "auto_round:llm_compressor", **dict(common)}
    config["block_name_to_quantize"] = blocks
    return config | ({"extra_config": extra} if extra else {})


def _auto_round_scheme(name: str, scheme: LayerScheme) -> dict:
    if scheme.input.scale_rule not in _AUTO_ROUND_RULES:
        raise ValueError(
            f"{name} quantizes its input under rule {scheme.input.scale_rule!r}, which AutoRound's format cannot hold: "
            f"it knows {', '.join(_AUTO_ROUND_RULES)}; use the export format compressed-tensors"
        )
    # The rule of the weights is not named: their scales are in the file.
    return {
        "data_type": "mx_fp", "bits": scheme.weight.bits, "group_size": BLOCK_SIZE, "sym": True,
        "act_data_type": _AUTO_ROUND_RULES[scheme.input.scale_rule], "act_bits": scheme.input.bits,
        "act_group_size": BLOCK_SIZE, "act_sym": True, "act_dynamic": True,
    }  # fmt: skip


def _block_prefix(names: list[str]) -> str:
    """What the names of layers in numbered blocks begin with: "model.layers" for "model.layers.0.mlp.up_proj"."""
    numbered = (re.match(r"(.+?)\.\d+\.", name) for name in names)
    common = os.path.commonprefix([match[1].split(".") for match in numbered if match])
    if not common:
        raise ValueError(
            "AutoRound's format needs layers in numbered blocks such as model.layers.0, and this model has none; "
            "use the export format compressed-tensors"
        )
    return ".".join(common)
