"""What layers learn beside their weights: offsets of exponents or of scales, by the format of the weight.

Checkpoints from which training resumes hold FP32 masters and offsets. What a finished run saves holds neither, see
`finish.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import torch

from ..errors import UserError
from ..numerics.formats import Format
from ..schemes.config import QATConfig
from ..schemes.spec import VIEW_DTYPE, TensorSpec
from . import learned_exponents, learned_scales

KINDS = (learned_exponents, learned_scales)  # each with PARAMETER, SUFFIX, SETTING and FORMATS
SUFFIXES = tuple(kind.SUFFIX for kind in KINDS)  # of parameters that no plain checkpoint has
SETTINGS = tuple(kind.SETTING for kind in KINDS)


def kind_of(fmt: Format) -> ModuleType | None:
    """What weights in a format can learn; None for nothing."""
    return next((kind for kind in KINDS if fmt.name in kind.FORMATS), None)


def check_learnable(spec: TensorSpec, settings: Iterable[str]) -> None:
    """Raise a UserError where none of the given `settings` lets weights of this spec learn.

    Args:
        settings: those of SETTINGS that are True; none of them asks for nothing.
    """
    fmt, kind, settings = spec.format, kind_of(spec.format), tuple(settings)
    if not settings:
        return
    if kind is None or kind.SETTING not in settings:
        remedy = f"give {kind.SETTING}=True for it" if kind else "no scales can be learned for it"
        given = learned_exponents if learned_exponents.SETTING in settings else learned_scales
        needs = "power-of-two scales" if given is learned_exponents else "scales in BF16 or E4M3 for blocks"
        raise UserError(
            f"{given.SETTING}=True needs {needs}, and {fmt.name} has {fmt.scale.name}: {remedy}, choose one of "
            f"{', '.join(given.FORMATS)}, or {given.SETTING}=False"
        )


def learns(config: QATConfig | None) -> bool:
    """Whether the weights of a configuration were trained with something beside them."""
    return config is not None and any(config.training.get(setting) for setting in SETTINGS)


def holds_rounded_values(config: QATConfig | None) -> bool:
    """Whether weights that are not packed were saved as values of their scheme: by GPTQ, or with learned scales."""
    return config is not None and (config.rounded or bool(config.training.get(learned_scales.SETTING)))


def optimizer_settings(exponents: float | None = None, scales: float | None = None) -> dict[str, dict]:
    """Settings of an optimizer for the offsets, by the end of their names; the arguments are their learning rates.

    An Adam step moves an offset by about the learning rate. That of an exponent does something only once it has passed
    0.5; that of a scale, once the scale has reached the next number of its format.
    """
    rates = {learned_exponents.SUFFIX: exponents, learned_scales.SUFFIX: scales}
    return {suffix: {"lr": rate, "weight_decay": 0.0} for suffix, rate in rates.items() if rate is not None}


def check_baked(names: Iterable[str], folder: str | Path) -> None:
    """Raise a UserError if a checkpoint with tensors of these names still needs what was learned."""
    if any(name.endswith(SUFFIXES) for name in names):
        raise UserError(
            f"{folder} is a checkpoint to resume from: its block exponents or scales are learned and lie beside FP32 "
            "masters. Resume the run (--resume_from_checkpoint), or use the folder that the finished run saved"
        )


def check_compute_dtype(config: QATConfig | None, dtype: torch.dtype, saved: torch.dtype | None = None) -> None:
    """Raise a UserError if a run that learns computes or saves in a dtype that weights cannot be baked in.

    Args:
        dtype: that the run computes in.
        saved: that weights are saved in, where it is known.
    """
    if config is None or not learns(config):
        return
    setting = next(setting for setting in SETTINGS if config.training.get(setting))
    if dtype != VIEW_DTYPE:
        raise UserError(
            f"--{setting} True: weights are saved as they are quantized in bfloat16, and this run computes in "
            f"{str(dtype).removeprefix('torch.')}; give --bf16 True, or leave --{setting} out"
        )
    if saved == torch.float16 and config.training.get(learned_scales.SETTING):
        raise UserError(
            f"--{learned_scales.SETTING} True: weights are saved as they are quantized in bfloat16, and the model is "
            f"stored in float16, which does not hold small values of it; save the model in bfloat16 first, or leave "
            f"--{learned_scales.SETTING} out"
        )
