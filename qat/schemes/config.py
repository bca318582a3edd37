"""QATConfig: what `prepare_qat` did to a model, written beside its weights as `qat_config.json`.

The weights are a plain Hugging Face checkpoint; this file is all that makes them a QAT checkpoint. A folder without it
holds an unquantized model.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ..errors import UserError
from ..version import VERSION

QAT_CONFIG_NAME = "qat_config.json"
_FORMAT_VERSION = 1
_VERSIONS = {"torch": torch.__version__.split("+")[0], "mx-qat": VERSION}


@dataclass(frozen=True)
class QATConfig:
    """A mapping from module types ("torch.nn.Linear") and name globs to schemes, in order of precedence, later wins.

    `scale_rules` spells out, for each scheme in use, the rule of its weights and of its inputs (None where a scheme
    does not quantize inputs). `training` holds the settings by which the weights were trained, where they are not the
    defaults; they change no result of the model.
    """

    mapping: dict[str, str]
    ignore: tuple[str, ...] = ("lm_head",)
    scale_rules: dict[str, dict[str, str | None]] = field(default_factory=dict)
    training: dict[str, str | bool | float] = field(default_factory=dict)
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
        return f"{schemes}; scale rules {rules}{training}"

    def same_training(self, other: QATConfig) -> bool:
        """Whether a run under `other` may resume a run under this one: everything equal but the versions."""
        mine, theirs = asdict(self), asdict(other)
        compared = ("mapping", "ignore", "scale_rules", "training")
        return all(mine[key] == theirs[key] for key in compared) and list(self.mapping) == list(other.mapping)

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
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content.pop("format_version")
            if version != _FORMAT_VERSION:
                raise UserError(f"format_version is {version}, this program reads {_FORMAT_VERSION}")
            return cls(**{**content, "ignore": tuple(content["ignore"])})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is not a QAT configuration that this program can read: {error}") from error
