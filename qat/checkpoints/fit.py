"""Do weights fit the model that they are loaded into? transformers' own loading report, made into errors.

transformers fills what a checkpoint lacks with random values and passes over what a model does not have; it only logs
that. Here both are errors, apart from what transformers itself leaves out on purpose: tied weights, and names that a
model class ignores. So are weights stored as integers, and weights that are NaN or infinite.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..errors import UserError
from ..files.model_folder import CONFIG_NAME
from .folder import Stored

logger = logging.getLogger(__name__)

_PACKED_SUFFIXES = (".weight_packed", ".weight_scale", ".weight_scale_inv", ".qweight", ".weight_global_scale")
_REMEDY = "copy or save the checkpoint again"
_LOGGERS = ("modeling_utils", "quantizers.quantizer_mxfp4")
# What transformers logs of a model that is in order: ties, and gpt-oss dequantized, as it was asked to be.
_NOISE = ("tied weights mapping", "We will dequantize the model to bf16")


@dataclass
class Loading:
    """What a call of `from_pretrained` logged: its table of problems, which it raises without.

    Attributes:
        tables: the text of each table.
    """

    tables: list[str] = field(default_factory=list)

    def conversion_error(self) -> str | None:
        """The tensor that could not be converted, and why."""
        for table in self.tables:
            if match := re.search(r"^([^\n]+?)\s*\|\s*CONVERSION\b.*?^(Error\b.*?)$", table, re.M | re.S):
                return f"{match[1]} ({match[2]})"
        return None


def load_checked(load: Callable[[], Any], where: object, strict: bool = False) -> PreTrainedModel:
    """The model that `load` gives, a call of `from_pretrained` with `output_loading_info=True`.

    Args:
        load: should pass `ignore_mismatched_sizes=True`, so that the report has the names.
        where: the folder or hub id, for messages.
        strict: see `check_report`.

    Raises:
        UserError: the weights do not fit the model, or the files cannot be read.
    """
    with fitting(where):
        model, report = load()
    check_report(report, model, where, strict)
    return model


@contextmanager
def fitting(where: object) -> Iterator[None]:
    """Turn what transformers raises while it builds or loads a model into UserErrors; keep its progress and tables."""
    with _quiet_transformers() as loading:
        try:
            yield
        except MemoryError:
            raise
        except Exception as error:  # whatever transformers and a config.json's values end in
            if isinstance(error, UserError) or "allocate" in str(error) or "out of memory" in str(error):
                raise
            if "trust_remote_code" in str(error):
                raise code_error(where) from error
            reason = loading.conversion_error() or f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"{where} does not fit the model of its {CONFIG_NAME}: {reason}; {_REMEDY}") from error


def check_report(report: Mapping[str, Iterable], model: PreTrainedModel, where: object, strict: bool = False) -> None:
    """Raise a UserError for what a loading report says is missing, of another shape, or has no place in `model`.

    Tensors of other towers and heads, outside of the layers of `model`, are logged; with `strict` they are errors too.
    """
    name = type(model).__name__
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if packed := [key for key in unexpected if key.endswith(_PACKED_SUFFIXES)]:
        raise UserError(
            f"{where} holds packed weights (e.g. {packed[0]}), which its {CONFIG_NAME} does not describe: the "
            f"quantization_config was lost or is another's; {_REMEDY}"
        )
    if missing:
        raise UserError(f"{where} lacks {len(missing)} tensors of {name}, e.g. {missing[0]}; {_REMEDY}")
    for key, found, expected in sorted(report["mismatched_keys"]):
        raise UserError(
            f"{where} does not fit the model of its {CONFIG_NAME}: {key} has the shape {tuple(found)} and not "
            f"{tuple(expected)}; {_REMEDY}"
        )
    modules = dict(model.named_modules())

    def is_foreign(key: str) -> bool:
        return strict or any(_is_inside(spelling, model, modules) for spelling in _spellings(key, model))

    if foreign := [key for key in unexpected if is_foreign(key)]:
        raise UserError(
            f"{where} has {len(foreign)} tensors that {name} has no place for, e.g. {foreign[0]}: its {CONFIG_NAME} "
            f"describes another model, or another program left them; {_REMEDY}"
        )
    if unexpected:
        logger.warning("%s: %d tensors are no part of %s, e.g. %s", where, len(unexpected), name, unexpected[0])


def check_dtypes(stored: Mapping[str, Stored], model: PreTrainedModel, where: object) -> None:
    """Raise a UserError for a floating-point weight of `model` that is stored in integers."""
    parameters = {name for name, p in model.named_parameters(remove_duplicate=False) if p.is_floating_point()}
    own = set(model.state_dict())
    for name, tensor in stored.items():
        if _is_float(tensor.dtype):
            continue
        spellings = _spellings(name, model)
        if spellings & parameters or (name.endswith(".weight") and not spellings & own):
            raise UserError(
                f"{where} stores {name} in {tensor.dtype}, and the model has floating-point weights; {_REMEDY}"
            )


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], where: object) -> None:
    """Raise a UserError that names the first of some floating-point tensors that holds a NaN or an infinity."""
    for name, tensor in tensors:
        if not is_finite(tensor):
            raise UserError(f"{where}: {name} holds NaN or infinity; did the training diverge? Use another checkpoint")


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values of a floating-point tensor are finite; one pass without temporaries."""
    if tensor.is_meta or tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    if tensor.element_size() == 1:  # FP8 has no reductions; NaN is 0x7F or 0xFF in E4M3, 0x7C and above in E5M2
        least = 0x7F if tensor.dtype == torch.float8_e4m3fn else 0x7C
        return int((tensor.view(torch.uint8) & 0x7F).amax()) < least
    return all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor.detach()))


def code_error(where: object) -> UserError:
    """What to say of a model that needs Python code from its folder, without leave to run it."""
    return UserError(
        f"{where} needs Python code that comes with it (auto_map in its configuration), which is not run without "
        "--trust_remote_code; it can do all that you can, so read it first"
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says something, without the colours of a terminal."""
    lines = (re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


def _is_float(dtype: str) -> bool:
    return dtype.startswith(("F", "BF", "C"))


def _spellings(name: str, model: PreTrainedModel) -> set[str]:
    """A tensor's name, and what transformers makes of it where a checkpoint is of the model without its head."""
    prefix = f"{model.base_model_prefix}."
    return {name, prefix + name, name.removeprefix(prefix)}


def _is_inside(key: str, model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a tensor that `model` lacks would lie in one of its layers: then another model was stored.

    Not so for other towers and heads, and for the layers that predict several tokens ahead, which follow the last one.
    """
    parts = key.split(".")
    end = next(i for i in range(len(parts), -1, -1) if ".".join(parts[:i]) in modules)
    parent = modules[".".join(parts[:end])]
    if isinstance(parent, nn.ModuleList) and end < len(parts) and parts[end].isdigit():
        ahead = getattr(model.config.get_text_config(), "num_nextn_predict_layers", 0) or 0
        return int(parts[end]) >= len(parent) + ahead
    return end > 0 and parent is not model.base_model


@contextmanager
def _quiet_transformers() -> Iterator[Loading]:
    """Keep transformers from showing progress, and its tables, which become our errors."""
    loading = Loading()
    sources = [logging.getLogger(f"transformers.{name}") for name in _LOGGERS]

    def keep(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if is_table := "LOAD REPORT" in text:
            loading.tables.append(text)
        return not (is_table or any(words in text for words in _NOISE))

    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    for source in sources:
        source.addFilter(keep)
    try:
        yield loading
    finally:
        for source in sources:
            source.removeFilter(keep)
        if bars:
            transformers_logging.enable_progress_bar()
