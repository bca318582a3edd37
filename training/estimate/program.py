"""Estimate the memory of a command of main.py, and print the settings that would make it fit.

    python -m training.estimate --config recipes/mxfp4.yaml --model_name_or_path M --dataset D --output_dir OUT
    python -m training.estimate ... --device_memory 80GiB --backend fsdp2 --processes 8

No weights are read, only config.json. The first form is for the devices of this machine and for the processes that
`accelerate launch` has started; the second asks for GPUs that need not be here.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from qat import QATConfig
from qat.checkpoints.fit import first_line
from qat.checkpoints.load import TEACHER_ARGUMENT
from qat.checkpoints.model_config import read_config
from qat.command_line import OneLineParser, positive
from qat.errors import UserError
from qat.files.model_folder import check_model_folder

from ..adapters.begin import Adapters
from ..adapters.inject import config_of
from ..arguments.lora import BASE_UNDER_FSDP, check_with_adapters
from ..arguments.model import ModelArguments
from ..arguments.parse import Arguments, parse_arguments
from ..start.loading import without_weights
from ..start.skeleton import check_autocast, check_length, skeleton_of
from ..start.start import Start
from .plan import BACKENDS, DDP, FSDP1, FSDP2, ONE, Backend, Plan, plan_of
from .remedies import Available, remedies
from .total import Estimate, Estimator

GIB = 1 << 30
USABLE = 0.95  # of a device's memory: the rest is its context and what the allocator cannot use
_UNITS = {"GIB": GIB, "MIB": 1 << 20, "GB": 10**9, "MB": 10**6}
_OWN = """arguments beside those of main.py:
  --device_memory 80GiB   of one GPU; default: that of this machine's GPU, else its main memory
  --processes 8           one GPU each; default: those that accelerate launch has started, else 1
  --backend fsdp2         one, ddp, fsdp1 or fsdp2; default: that of accelerate launch, else fsdp2 for several processes
"""


@dataclass(frozen=True)
class Device:
    """What a run computes on: "cuda" or "cpu", its memory in bytes, and what it is called."""

    kind: str
    memory: int
    name: str

    def fits(self, estimate: Estimate) -> bool:
        """Whether a run fits."""
        return estimate.total <= USABLE * self.memory


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, estimate, print."""
    backend, device, rest = _parse(list(sys.argv[1:] if argv is None else argv))
    arguments = parse_arguments(rest)
    check_model_folder(arguments.model.model_name_or_path)
    start = start_of(arguments.model, arguments.training.cache_dir)
    start.is_frozen = arguments.lora.is_on
    start.check(arguments.quantization, arguments.distillation, arguments.training.do_train)
    student = prepared(arguments, start)
    plan = plan_of(arguments, backend, device.kind, _rank(student))
    _check_backend(plan)
    estimator = estimator_of(arguments, student)
    estimate = estimator.estimate(plan)
    print("\n".join(table(student, plan, estimate, device)))
    if not device.fits(estimate):
        print("\nSettings that need less:")
        found = remedies(plan, available(arguments, student), estimator.estimate, device.fits)
        for remedy, result in found:
            print(f"{_gib(result.total)}  {'fits' if device.fits(result) else '    '}  {remedy.settings}")


# ---- The command ----


def _parse(argv: list[str]) -> tuple[Backend, Device, list[str]]:
    """Backend and device, and main.py's words."""
    parser = OneLineParser(prog="training.estimate", add_help=False)
    parser.add_argument("--device_memory")
    parser.add_argument("--processes", type=positive)
    parser.add_argument("--backend", choices=BACKENDS)
    if {"-h", "--help"} & set(argv):
        print(f"{__doc__}\n{_OWN}\nArguments of main.py follow.\n")
    own, rest = parser.parse_known_args(argv)
    launched = Backend.of_environment()
    elsewhere = own.device_memory is not None or own.processes is not None or own.backend is not None
    processes = own.processes or launched.processes
    default = launched.name if processes == launched.processes else FSDP2 if processes > 1 else ONE
    name = own.backend or default
    if name == ONE and processes > 1:
        parser.error(f"--backend one with {processes} processes: give ddp, fsdp1 or fsdp2, or --processes 1")
    if name == DDP and processes == 1:
        parser.error(
            "--backend ddp with 1 process: DDP copies the model to several; give --processes, or --backend one"
        )
    backend = launched if (name, processes) == (launched.name, launched.processes) else Backend(name, processes)
    device = device_here()
    if elsewhere:
        memory = device.memory if own.device_memory is None else _bytes_of(own.device_memory, parser)
        kind = "a GPU" if own.device_memory or device.kind == "cpu" else device.name
        device = Device("cuda", memory, kind)
    return backend, device, rest


def _bytes_of(text: str, parser: OneLineParser) -> int:
    number = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GiB|MiB|GB|MB)", text.strip(), re.IGNORECASE)
    if number is None or float(number[1]) == 0:
        parser.error(f"--device_memory {text!r} is no size; give a number and GiB, MiB, GB or MB, such as 80GiB")
    return int(float(number[1]) * _UNITS[number[2].upper()])


def device_here(use_cpu: bool = False) -> Device:
    """The GPU of this machine, else its CPU."""
    if torch.cuda.is_available() and not use_cpu:
        return Device("cuda", torch.cuda.get_device_properties(0).total_memory, torch.cuda.get_device_name(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("cpu", memory, "this machine's main memory")


# ---- The model ----


def start_of(model_args: ModelArguments, cache_dir: str | None) -> Start:
    """What the run starts from; a folder may have no weights, only config.json."""
    folder = Path(model_args.model_name_or_path)
    if (folder / "config.json").is_file() and not any(folder.glob("*.safetensors*")) and not model_args.gguf_file:
        return Start(model_args, cache_dir, qat_config=QATConfig.load(folder))
    return Start.read(model_args, cache_dir)


def prepared(arguments: Arguments, start: Start) -> PreTrainedModel:
    """The model without weights, prepared for its schemes, with its adapters.

    Raises:
        UserError: it cannot be trained as it is asked for.
    """
    skeleton = skeleton_of(start)
    check_autocast(arguments.training, skeleton.config)
    check_length(arguments.training.model_max_length, type(arguments.training).model_max_length, skeleton.config)
    with contextlib.redirect_stdout(io.StringIO()):
        start.quantize(skeleton, arguments.quantization)
    if arguments.lora.is_on:
        Adapters(arguments.lora, start).check(skeleton)
        if arguments.training.do_train and getattr(skeleton, "qat_config", None) is None:
            arguments.distillation.check_unquantized()
    return skeleton


def _check_backend(plan: Plan) -> None:
    """Refuse adapters on a backend that need not be here, where FSDP does not shard what they are attached to."""
    if plan.lora_r and plan.backend.shards:
        check_with_adapters(version=1 if plan.backend.name == FSDP1 else 2)
        if plan.base_in_scheme:
            raise UserError(BASE_UNDER_FSDP)


def _rank(student: PreTrainedModel) -> int:
    config = config_of(student)
    return 0 if config is None else config.r


def estimator_of(arguments: Arguments, student: PreTrainedModel) -> Estimator:
    """For the student and, where another model teaches, for that one."""
    name = arguments.distillation.teacher_model_name_or_path
    if name is None:
        return Estimator(student)
    cache_dir, trust = arguments.training.cache_dir, arguments.model.trust_remote_code
    config = read_config(name, f"{TEACHER_ARGUMENT} {name!r}", trust, cache_dir)
    if config.get_text_config().vocab_size != student.config.get_text_config().vocab_size:
        raise UserError(f"{TEACHER_ARGUMENT} {name!r} has another vocabulary than the student")
    return Estimator(student, without_weights(ModelArguments(name, trust_remote_code=trust), cache_dir))


def available(arguments: Arguments, student: PreTrainedModel) -> Available:
    """The settings that need less memory and work for this model."""
    return Available(
        checkpointing=student.supports_gradient_checkpointing,
        packed_base=getattr(student, "qat_config", None) is not None,
        own_teacher=arguments.distillation.teacher_model_name_or_path is None,
    )


# ---- What is printed ----


def table(student: PreTrainedModel, plan: Plan, estimate: Estimate, device: Device) -> list[str]:
    """The estimate as lines of text."""
    lines = [title(student, plan), ""]
    lines += [f"{_gib(size)}  {name}" for name, size in estimate.rows.items() if size]
    verdict = "fits into" if device.fits(estimate) else "does not fit into"
    each = " a process" if plan.backend.processes > 1 else ""
    where = f"{verdict} {_short(device.memory)} of {device.name}"
    lines.append(f"{_gib(estimate.total)}  in all{each}, in the {estimate.when}; {where}")
    if plan.trains:
        lines.append(f"{_gib(estimate.kept)}  of activations are kept for the backward pass")
    return lines + [f"Rougher than usual: {reason}" for reason in estimate.rougher]


def title(student: PreTrainedModel, plan: Plan) -> str:
    """What is estimated, in one line."""
    count = sum(p.numel() for p in student.parameters())
    config = getattr(student, "qat_config", None)
    scheme = "no scheme" if config is None else ", ".join(dict.fromkeys(config.mapping.values()))
    who = "one process" if plan.backend.processes == 1 and plan.backend.name == ONE else (
        f"{plan.backend.processes} processes, {plan.backend.name}"
    )  # fmt: skip
    teacher = f", teacher: {plan.teacher}" if plan.teaches else ""
    teacher = f", adapters of rank {plan.lora_r}{teacher}" if plan.lora_r else teacher
    return (
        f"{type(student).__name__}, {count / 1e9:.3g} billion parameters, {scheme}{teacher}; "
        f"{plan.batch} x {plan.length} tokens; {who}"
    )


def short_form(arguments: Arguments, student: PreTrainedModel) -> str:
    """The estimate of a run of main.py in one line, or why there is none: it must not end a run that could go well."""
    device = device_here(arguments.training.use_cpu)
    plan = plan_of(arguments, Backend.of_environment(), device.kind, _rank(student))
    try:
        estimate = estimator_of(arguments, student).estimate(plan)
    except Exception as error:  # code of models may do anything with tensors that have no values
        return f"No estimate of the peak memory: {type(error).__name__}: {first_line(error)}"
    what = ", ".join(f"{name} {_short(size)}" for name, size in estimate.rows.items() if size)
    rougher = " (rougher than usual)" if estimate.rougher else ""
    line = f"Estimated peak memory of a process: {_short(estimate.total)}{rougher} of {_short(device.memory)}: {what}"
    if not device.fits(estimate):
        line += "; python -m training.estimate with the same arguments names settings that need less"
    return line


def _gib(size: int) -> str:
    return f"{size / GIB:9.2f} GiB"


def _short(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / (1 << 20):.0f} MiB"
