"""Conditions under which a value of one of Trainer's options is refused; each takes the value and all arguments.

The arguments are as a user gave them or as transformers has read them: "steps" or IntervalStrategy.STEPS, JSON or a
dict. Only values other than the default are asked about.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import DynamoBackend, get_int_from_env
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import SchedulerType

Condition = Callable[[Any, Any], bool]  # (value of the option, all arguments) -> whether the value is refused

_LOCAL_RANKS = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
_CHECKPOINTING_KEYS = {
    "every_n_layers", "offload", "use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop",
}  # fmt: skip
_PAIR = re.compile(r"\w+=([+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|true|false)", re.IGNORECASE)


# ---- Values ----


def plain(value: Any) -> Any:
    """The value of an enumeration's member; any other value as it is."""
    return value.value if isinstance(value, Enum) else value


def as_dict(value: Any) -> dict:
    """A dict, JSON text, the path of a JSON file, or an object, as a dict; {} where it cannot be read."""
    if value is None or isinstance(value, dict):
        return value or {}
    if not isinstance(value, str):
        return vars(value)
    try:
        return json.loads(value if value.startswith("{") else Path(value).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # transformers names the file


def as_list(value: Any) -> list:
    """A list of plain values; one value is a list of one."""
    return [plain(item) for item in (value if isinstance(value, list | tuple) else [value])]


def uses_cpu(args) -> bool:
    """Whether the run computes on a CPU."""
    return bool(args.use_cpu) or not torch.accelerator.is_available()


# ---- Conditions of one option ----


def among(names: tuple[str, ...]) -> Condition:
    """The value is one of `names`."""
    return lambda value, args: value in names


def below(limit: float) -> Condition:
    """The value is smaller than `limit`, or NaN."""
    return lambda value, args: not value >= limit


def not_positive(value: float, args) -> bool:
    """The value is 0, negative or NaN."""
    return not value > 0


def not_finite_or_negative(value: float, args) -> bool:
    """The value is negative, infinite or NaN."""
    return not 0 <= value < math.inf


def outside(low: float, high: float) -> Condition:
    """The value is not in the half-open interval [low, high), or is NaN."""
    return lambda value, args: not low <= value < high


def negative_but(exception: float) -> Condition:
    """The value is negative and not the one that means "not given"."""
    return lambda value, args: value < 0 and value != exception


def more_workers_than(factor: int, at_least: int) -> Condition:
    """The value is more than `factor` processes for each core of the machine, and more than `at_least`."""
    return lambda value, args: value > max(at_least, factor * (os.cpu_count() or 1))


def on_tpu(value: str | list, args) -> bool:
    """Among the debug options is one for TPUs."""
    return "tpu_metrics_debug" in (value if isinstance(value, str) else as_list(value))


def not_masked(value: str, args) -> bool:
    """The token is not the text that stands for it in every training_args.json."""
    return value != "<HUB_TOKEN>"


def another_rank(value: int, args) -> bool:
    """The rank is not the one in the environment."""
    return str(value) != os.environ.get("LOCAL_RANK", "-1")


def single_process(value: str, args) -> bool:
    """No launcher has started this process."""
    return get_int_from_env(_LOCAL_RANKS, -1) == -1


def unknown_compile_backend(value: str, args) -> bool:
    """accelerate has no such backend."""
    return value.upper() not in {backend.value for backend in DynamoBackend}


def unknown_compile_mode(value: str, args) -> bool:
    """Inductor has no such mode."""
    return value not in torch._inductor.list_mode_options()


def without_inductor(value: str, args) -> bool:
    """Another backend than inductor compiles."""
    return (args.torch_compile_backend or "inductor") != "inductor"


def accelerator_setting(name: str, refused: bool) -> Condition:
    """The setting `name` of an accelerator_config is `refused`."""

    def applies(value, args) -> bool:
        setting = as_dict(value).get(name)
        return setting is not None and bool(setting) is refused

    return applies


def unknown_accelerator_setting(value, args) -> bool:
    """accelerator_config has a setting that transformers does not know."""
    return isinstance(value, str | dict) and not as_dict(value).keys() <= vars(AcceleratorConfig()).keys()


# ---- Conditions of several options ----


def on_cpu(value, args) -> bool:
    """The run computes on a CPU."""
    return uses_cpu(args)


def without(name: str) -> Condition:
    """The option `name` is off, 0 or not given."""
    return lambda value, args: not getattr(args, name)


def without_evaluation(value, args) -> bool:
    """Training is not interrupted by evaluations."""
    return plain(args.eval_strategy) == "no"


def best_without_evaluation(value: str, args) -> bool:
    """Only the best checkpoint is to be saved, and none is evaluated."""
    return value == "best" and without_evaluation(value, args)


def best_of_what(value: str, args) -> bool:
    """Only the best checkpoint is to be saved, and no metric is named."""
    return value == "best" and args.metric_for_best_model is None and not args.load_best_model_at_end


def not_training(value: str, args) -> bool:
    """A checkpoint is named, and nothing is trained."""
    return str(value).lower() != "false" and not args.do_train


def no_epochs(value: float, args) -> bool:
    """There is no finite number of epochs to train, and no number of steps."""
    return not 0 < value < math.inf and args.max_steps <= 0


def with_schedules(names: tuple[str, ...]) -> Condition:
    """The schedule is one of `names`."""
    return lambda value, args: plain(args.lr_scheduler_type) in names


def schedule_cannot_be_made(value, args) -> bool:
    """The schedule does not take the given arguments, or needs others; an unknown schedule is left to transformers."""
    name = plain(args.lr_scheduler_type)
    if name not in {schedule.value for schedule in SchedulerType}:
        return False
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    arguments = as_dict(args.lr_scheduler_kwargs)
    try:
        transformers.get_scheduler(name, optimizer, 1, 1_000_000, scheduler_specific_kwargs=arguments)
    except (TypeError, ValueError):
        return True
    return False


def with_optimizers(names: tuple[str, ...]) -> Condition:
    """The optimizer is one of `names`."""
    return lambda value, args: plain(args.optim) in names


def needs(library: str, names: tuple[str, ...]) -> Condition:
    """The optimizer is one of `names`, and their library is not installed."""
    return lambda value, args: value in names and importlib.util.find_spec(library) is None


def fsdp_with(names: tuple[str, ...]) -> Condition:
    """The optimizer is one of `names`, and `accelerate launch` asks for FSDP."""

    def applies(value, args) -> bool:
        return value in names and os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1")

    return applies


def without_muon(value, args) -> bool:
    """The optimizer is Muon, and torch has none."""
    return value == "muon" and not hasattr(torch.optim, "Muon")


def arguments_outside(known: dict[str, frozenset[str]]) -> Condition:
    """Among the optimizer's arguments ("a=1,b=2") is one that is not in `known` for it."""

    def applies(value: str, args) -> bool:
        keys = {pair.partition("=")[0].strip() for pair in value.split(",")}
        return not keys <= known.get(plain(args.optim), frozenset())

    return applies


def malformed_arguments(value: str, args) -> bool:
    """Among the optimizer's arguments ("a=1,b=2") is one that is not a name, an equals sign, and a number or bool."""
    return not all(_PAIR.fullmatch(pair) for pair in value.replace(" ", "").split(","))


def static_graph_fails(value: bool, args) -> bool:
    """A static graph is to accumulate gradients."""
    return bool(value) and args.gradient_accumulation_steps > 1


def without_checkpointing(value, args) -> bool:
    """Activations are not recomputed."""
    return not (getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing)


def unknown_checkpointing(value, args) -> bool:
    """torch and transformers know no such argument of activation checkpointing."""
    arguments = as_dict(value)
    return not arguments.keys() <= _CHECKPOINTING_KEYS or arguments.get("every_n_layers", 1) < 1


def offload_on_cpu(value, args) -> bool:
    """Activations are to be moved to the CPU, where they are already."""
    return bool(as_dict(value).get("offload")) and uses_cpu(args)


# ---- Trackers ----


def unknown_tracker(value, args) -> bool:
    """transformers knows no such tracker."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    return not _trackers(value) <= INTEGRATION_TO_CALLBACK.keys()


def missing_tracker(value, args) -> bool:
    """A tracker's library is not installed; flyte and azure_ml look for theirs themselves."""
    from transformers.integrations import get_available_reporting_integrations

    available = {*get_available_reporting_integrations(), "flyte", "azure_ml"}
    return not unknown_tracker(value, args) and not _trackers(value) <= available


def without_trackers(names: tuple[str, ...]) -> Condition:
    """None of the trackers in `names` is reported to."""
    return lambda value, args: not set(names) & {*as_list(args.report_to), *_all(args.report_to)}


def _trackers(value) -> set[str]:
    return set(as_list(value)) - {None, "all", "none"}


def _all(value) -> list[str]:
    from transformers.integrations import get_available_reporting_integrations

    return get_available_reporting_integrations() if "all" in as_list(value) else []
