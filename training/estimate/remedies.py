"""Remedies: settings of main.py that need less memory, each with the estimate that it leads to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from .plan import CACHE, COPY, DDP, FSDP1, FSDP2, SELF, Plan
from .total import Estimate

_MOST_PROCESSES = 64
_RANK = 16
_ADAMW, _ADAMW_8BIT = ("adamw_torch_fused", "adamw_torch"), "adamw_torch_8bit"
_WHOLE = ("adafactor", "muon")  # they do not know sharded weights


@dataclass(frozen=True)
class Remedy:
    """Settings, and the plan that they lead to."""

    settings: str
    plan: Plan


@dataclass(frozen=True)
class Available:
    """Which settings work for a model.

    Attributes:
        checkpointing: --activation_checkpointing.
        packed_base: --base_in_scheme, which is for a quantized student.
        own_teacher: a copy that teaches is the student's own, not a model that the user named.
    """

    checkpointing: bool = True
    packed_base: bool = False
    own_teacher: bool = True


Estimates = Callable[[Plan], Estimate]
Fits = Callable[[Estimate], bool]
Found = list[tuple[Remedy, Estimate]]


def remedies(plan: Plan, available: Available, estimate: Estimates, fits: Fits) -> Found:
    """Each remedy that lowers the peak, with its estimate: single ones, combinations, more processes.

    Args:
        fits: whether an estimate fits into the memory of a device. Combinations and processes grow until one does.
    """
    before = estimate(plan).total
    singles = [(remedy, estimate(remedy.plan)) for remedy in _singles(plan, available)]
    found = [(remedy, result) for remedy, result in singles if result.total < before]
    if not any(fits(result) for _, result in found):
        found += _together(plan, available, estimate, fits)
    if plan.trains and not plan.backend.offloads and not plan.base_in_scheme and plan.optimizer not in _WHOLE:
        found += _more_processes(plan, estimate, fits)
    return found


def _singles(plan: Plan, available: Available) -> Iterator[Remedy]:
    """Those that main.py takes beside the settings of the plan; what excludes each other is refused there."""
    if plan.batch > 1:
        smaller = replace(plan, batch=1, masked=plan.masked and plan.packed)
        yield Remedy(f"--per_device_{'train' if plan.trains else 'eval'}_batch_size 1", smaller)
    if plan.teacher == COPY:
        yield Remedy("--distill_teacher cache", replace(plan, teacher=CACHE))
    if not plan.trains:
        return
    if available.checkpointing and (checkpointed := _checkpointed(plan)) is not None:
        yield checkpointed
    if not plan.lora_r:
        if plan.optimizer in _ADAMW and plan.master_dtype == torch.float32 and not plan.in_backward:
            yield Remedy(f"--optim {_ADAMW_8BIT} (of torchao)", replace(plan, optimizer=_ADAMW_8BIT))
        yield from _of_masters(plan)
        yield from _of_adapters(plan, available)
    elif available.packed_base and not plan.base_in_scheme and not plan.backend.shards:
        yield _packed(Remedy("", plan))


def _checkpointed(plan: Plan) -> Remedy | None:
    if plan.checkpoints:
        return None
    if plan.backend.shards:
        backend = replace(plan.backend, checkpoints=True)
        return Remedy("fsdp_activation_checkpointing: true", replace(plan, backend=backend))
    return Remedy("--activation_checkpointing True", replace(plan, checkpointing=()))


def _of_masters(plan: Plan) -> Iterator[Remedy]:
    if plan.master_dtype != torch.float32 or plan.compute_dtype != torch.bfloat16 or plan.backend.name == FSDP1:
        return
    optimizer = plan.optimizer if plan.optimizer in _ADAMW else _ADAMW[0]
    settings = "" if optimizer == plan.optimizer else f"--optim {optimizer} "
    settings += "--master_dtype bfloat16"
    masters = replace(plan, master_dtype=torch.bfloat16, optimizer=optimizer)
    yield Remedy(settings, masters)
    if not (plan.accumulates or plan.compiled or plan.backend.name == DDP or plan.in_backward):
        settings += " --optimizer_in_backward True --max_grad_norm 0"
        yield Remedy(settings, replace(masters, in_backward=True))


def _of_adapters(plan: Plan, available: Available) -> Iterator[Remedy]:
    if plan.backend.name == FSDP1 or plan.gather_dtype != torch.float32:
        return
    settings, teacher = f"--lora_r {_RANK}", plan.teacher
    if plan.master_dtype == torch.bfloat16:
        settings += " --master_dtype float32"
    if plan.in_backward:
        settings += " --optimizer_in_backward False"
    if teacher == COPY and available.own_teacher:
        settings, teacher = f"{settings} --distill_teacher self", SELF
    adapters = Remedy(
        settings, replace(plan, lora_r=_RANK, teacher=teacher, master_dtype=torch.float32, in_backward=False)
    )
    yield adapters
    if available.packed_base and not plan.backend.shards:
        yield _packed(adapters)


def _packed(remedy: Remedy) -> Remedy:
    """The same with a packed base, which cannot be its own teacher."""
    settings, plan = remedy.settings, replace(remedy.plan, base_in_scheme=True)
    if plan.teacher == SELF:
        settings = settings.replace(" --distill_teacher self", "") + " --distill_teacher cache"
        plan = replace(plan, teacher=CACHE)
    return Remedy(f"{settings} --base_in_scheme True".strip(), plan)


def _together(plan: Plan, available: Available, estimate: Estimates, fits: Fits) -> Found:
    """Add one remedy after the other, those that change least first, until the run fits."""
    found: Found = []
    settings: list[str] = []
    tried: set[str] = set()
    lowest = estimate(plan).total
    while step := next((r for r in _singles(plan, available) if r.settings not in tried), None):
        tried.add(step.settings)
        result = estimate(step.plan)
        if result.total >= lowest:
            continue
        settings, plan, lowest = [*settings, step.settings], step.plan, result.total
        if len(settings) > 1:
            found.append((Remedy(" ".join(settings), plan), result))
            if fits(result):
                break
    return found


def _more_processes(plan: Plan, estimate: Estimates, fits: Fits) -> Found:
    """FSDP2 over twice as many processes, and so on, until the run fits."""
    found: Found = []
    processes = 2 * plan.backend.processes
    while processes <= _MOST_PROCESSES:
        sharded = _sharded(plan, processes)
        found.append((Remedy(f"accelerate_config/fsdp2.yaml on {processes} GPUs", sharded), estimate(sharded)))
        if fits(found[-1][1]):
            break
        processes *= 2
    return found


def _sharded(plan: Plan, processes: int) -> Plan:
    return plan.on(plan.backend.name if plan.backend.shards else FSDP2, processes)
