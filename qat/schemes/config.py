"""QATConfig: what `prepare_qat` did to a model, written beside its weights as `qat_config.json`.

The weights are a plain Hugging Face checkpoint; this file is all that makes them a QAT checkpoint. A folder without it
holds an unquantized model.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..files.json_file import read_object, shown
from ..version import VERSION
from .patterns import check_patterns
from .presets import check_transform, get_kv_cache_scheme, get_scheme

QAT_CONFIG_NAME = "qat_config.json"
TRAINING = {"learn_exponent": bool, "learn_scale": bool}  # what `QATConfig.training` may hold, and the types
_FORMAT_VERSION = 1
_OLD_KINDS = ("linear",)  # all that there was when files did not name the kinds of sites
_VERSIONS = {"torch": torch.__version__.split("+")[0], "mx-qat": VERSION}


@dataclass(frozen=True)
class QATConfig:
    """A mapping from module types ("torch.nn.Linear") and name globs to schemes, in order of precedence, later wins.

    `scale_rules` spells out, for each scheme in use, the rule of its weights and of its inputs (None where a scheme
    does not quantize inputs). `training` holds the settings by which the weights were trained, where they are not the
    defaults; with `learn_scale` the weights of a finished model are quantized values already. `calibrated_scales` holds
    the scales that do not follow from weights, by the names of their tensors in a packed checkpoint
    ("model.layers.0.mlp.down_proj.input_global_scale"): FP32 values, exactly. `kv_cache_scheme` is that of keys and
    values in the cache; None: they are not quantized. `left_alone` holds the layers that a default rule left alone,
    with its reason; `kinds` the kinds of sites that the training quantized (None: all that the mapping covers).
    `input_transforms` names the transforms of inputs by pattern, see layers/transform.py. `rounded` tells of weights
    that are rounded values although nothing was trained: those that GPTQ chose.
    """

    mapping: dict[str, str]
    ignore: tuple[str, ...] = ("lm_head",)
    scale_rules: dict[str, dict[str, str | None]] = field(default_factory=dict)
    training: dict[str, str | bool | float] = field(default_factory=dict)
    calibrated_scales: dict[str, float] = field(default_factory=dict)
    kv_cache_scheme: str | None = None
    left_alone: dict[str, str] = field(default_factory=dict)
    kinds: tuple[str, ...] | None = None
    input_transforms: dict[str, str] = field(default_factory=dict)
    rounded: bool = False
    versions: dict[str, str] = field(default_factory=lambda: dict(_VERSIONS))

    @property
    def summary(self) -> str:
        """One line for messages: the schemes by key, and the scale rules in force."""
        schemes = ", ".join(f"{key}: {scheme}" for key, scheme in self.mapping.items())
        rules = ", ".join(
            f"{name} weights {rule['weight']}, inputs {rule['input'] or 'not quantized'}"
            for name, rule in self.scale_rules.items()
        )
        training = "".join(f", {name} {value}" for name, value in self.training.items())
        cache = "" if self.kv_cache_scheme is None else f", key/value cache {self.kv_cache_scheme}"
        transforms = "".join(
            f", {name} inputs of {_shown([key for key, own in self.input_transforms.items() if own == name])}"
            for name in dict.fromkeys(self.input_transforms.values())
        )
        return f"{schemes}; scale rules {rules}{training}{cache}{transforms}"

    def same_training(self, other: QATConfig) -> bool:
        """Whether a run under `other` may resume a run under this one: versions and calibrated scales may differ."""
        mine, theirs = asdict(self), asdict(other)
        compared = ["mapping", "ignore", "scale_rules", "training", "kv_cache_scheme", "input_transforms"]
        if self.kinds is not None and other.kinds is not None:
            compared.append("kinds")
        same = all(mine[key] == theirs[key] for key in compared) and list(self.mapping) == list(other.mapping)
        return same and set(self.left_alone) == set(other.left_alone)

    def save(self, folder: str | Path) -> None:
        """Write `qat_config.json` into `folder`."""
        content = {"format_version": _FORMAT_VERSION, **asdict(self)}
        Path(folder, QAT_CONFIG_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> QATConfig | None:
        """Read the config of `folder`, or None where there is none.

        Raises:
            UserError: the file is damaged, or written by a newer version.
        """
        path = Path(folder, QAT_CONFIG_NAME)
        if not path.exists():
            return None
        content = read_object(path)
        try:
            _check(content)
        except UserError as error:
            raise UserError(f"{path} is not a QAT configuration that this program can read: {error}") from error
        del content["format_version"]
        kinds = content.get("kinds", _OLD_KINDS)
        return cls(**{**content, "ignore": tuple(content["ignore"]), "kinds": None if kinds is None else tuple(kinds)})


def _shown(patterns: list[str], most: int = 8) -> str:
    """Patterns as part of a line, the first of many."""
    rest = len(patterns) - most
    return ", ".join(patterns[:most]) + (f" and {rest} more" if rest > 0 else "")


def _check(content: dict[str, Any]) -> None:
    """Raise a UserError for a content of qat_config.json that is not what `QATConfig.save` writes."""
    if (version := content.get("format_version")) != _FORMAT_VERSION:
        raise UserError(f"format_version is {version!r}, this program reads {_FORMAT_VERSION}")
    known = {"format_version", *(f.name for f in fields(QATConfig))}
    if unknown := sorted(set(content) - known):
        raise UserError(f"it has the unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")
    if lacking := sorted({"mapping", "ignore"} - set(content)):
        raise UserError(f"it lacks {lacking[0]!r}")
    mapping, ignore = content["mapping"], content["ignore"]
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(name, str) for name in mapping.values()):
        raise UserError(f"mapping is {shown(mapping)}, not an object of layers and their schemes")
    if not isinstance(ignore, list) or not all(isinstance(pattern, str) for pattern in ignore):
        raise UserError(f"ignore is {shown(ignore)}, not a list of patterns")
    check_patterns([*mapping, *ignore])
    for name in mapping.values():
        get_scheme(name)
    _check_rules(content.get("scale_rules", {}))
    _check_entries("training", content.get("training", {}), TRAINING)
    _check_scales(content.get("calibrated_scales", {}))
    left_alone, kinds = content.get("left_alone", {}), content.get("kinds")
    _check_entries("left_alone", left_alone, dict.fromkeys(left_alone, str) if isinstance(left_alone, dict) else {})
    if kinds is not None and not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        raise UserError(f"kinds is {shown(kinds)}, not a list of kinds of layers")
    if content.get("kv_cache_scheme") is not None:
        get_kv_cache_scheme(content["kv_cache_scheme"])
    if not isinstance(content.get("rounded", False), bool):
        raise UserError(f"rounded is {shown(content['rounded'])}, not true or false")
    transforms = content.get("input_transforms", {})
    _check_entries("input_transforms", transforms, dict.fromkeys(transforms, str))
    for pattern, name in transforms.items():
        check_transform(name, f"input_transforms of {pattern}")
    versions = content.get("versions", {})
    _check_entries("versions", versions, dict.fromkeys(versions, str))


def _check_rules(rules: Any) -> None:
    if not isinstance(rules, dict):
        raise UserError(f"scale_rules is {shown(rules)}, not an object")
    for name, chosen in rules.items():
        if not isinstance(chosen, dict) or set(chosen) != {"weight", "input"}:
            raise UserError(f'scale_rules of {name} is {shown(chosen)}, not {{"weight": RULE, "input": RULE}}')
        if not all(rule is None or isinstance(rule, str) for rule in chosen.values()):
            raise UserError(f"scale_rules of {name} is {shown(chosen)}; rules are texts")
        get_scheme(name).with_rules(**chosen)


def _check_scales(scales: Any) -> None:
    if not isinstance(scales, dict):
        raise UserError(f"calibrated_scales is {shown(scales)}, not an object")
    for name, value in scales.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"calibrated_scales of {name} is {shown(value)}, not a positive number; calibrate again")


def _check_entries(field_name: str, entries: Any, types: Any) -> None:
    if not isinstance(entries, dict):
        raise UserError(f"{field_name} is {shown(entries)}, not an object")
    for name, value in entries.items():
        if name not in types:
            raise UserError(f"{field_name} has the unknown setting {name!r}; known are {', '.join(types)}")
        if not isinstance(value, types[name]):
            raise UserError(f"{field_name}.{name} is {shown(value)}, not of type {types[name].__name__}")
