"""Remedies: settings of main.py that need less memory, each with the estimate that it leads to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from .plan import CACHE, COPY, FSDP1, FSDP2, ONE, SELF, Plan
from .total import Estimate

_MOST_PROCESSES = 64
_RANK = 16
_ADAMW, _ADAMW_8BIT = ("adamw_torch", "adamw_torch_fused"), "adamw_torch_8bit"


@dataclass(frozen=True)
class Remedy:
    """Settings, and the plan that they lead to."""

    settings: str
    plan: Plan


@dataclass(frozen=True)
class Available:
    """Which settings main.py has.

    Attributes:
        checkpointing: --activation_checkpointing; some models do not support it.
        bfloat16_masters: --master_dtype and --optimizer_in_backward.
        packed_base: --base_in_scheme, for a quantized student.
        accepts: whether main.py takes these settings beside those of the command.
        clips: gradients are clipped, which steps in backward cannot do.
    """

    checkpointing: bool = True
    bfloat16_masters: bool = False
    packed_base: bool = False
    accepts: Callable[[str], bool] = lambda settings: True
    clips: bool = False


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
    if plan.trains and not plan.backend.offloads:
        found += _more_processes(plan, estimate, fits)
    return found


def _singles(plan: Plan, available: Available) -> Iterator[Remedy]:
    yield from (r for r in (*_small(plan, available), *_ways(plan, available)) if available.accepts(r.settings))


def _small(plan: Plan, available: Available) -> Iterator[Remedy]:
    """Those that change nothing of what is trained, and how."""
    if plan.batch > 1:
        smaller = replace(plan, batch=1, masked=False)
        yield Remedy(f"--per_device_{'train' if plan.trains else 'eval'}_batch_size 1", smaller)
    if plan.teacher == COPY:
        yield Remedy("--distill_teacher cache", replace(plan, teacher=CACHE))
    if plan.trains and available.checkpointing and (checkpointed := _checkpointed(plan)) is not None:
        yield checkpointed


def _ways(plan: Plan, available: Available) -> Iterator[Remedy]:
    """Other optimizers, masters, and adapters; each excludes the others."""
    if not plan.trains:
        return
    if plan.lora_r:
        if available.packed_base and not plan.base_in_scheme and not plan.backend.shards:
            yield _packed(plan, "")
        return
    if plan.optimizer in _ADAMW and plan.master_dtype == torch.float32 and not plan.in_backward:
        yield Remedy(f"--optim {_ADAMW_8BIT} (of torchao)", replace(plan, optimizer=_ADAMW_8BIT))
    yield from _of_masters(plan, available)
    yield from _of_adapters(plan, available)


def _checkpointed(plan: Plan) -> Remedy | None:
    if plan.checkpoints:
        return None
    if plan.backend.shards:
        backend = replace(plan.backend, checkpoints=True)
        return Remedy("fsdp_activation_checkpointing: true", replace(plan, backend=backend))
    return Remedy("--activation_checkpointing True", replace(plan, checkpointing=()))


def _of_masters(plan: Plan, available: Available) -> Iterator[Remedy]:
    alone = plan.backend.name in (ONE, FSDP2)
    if not (available.bfloat16_masters and alone and plan.master_dtype == torch.float32 and not plan.accumulates):
        return
    also = " --max_grad_norm 0" if available.clips else ""
    masters = replace(plan, master_dtype=torch.bfloat16, in_backward=True)
    yield Remedy(f"--master_dtype bfloat16 --optimizer_in_backward True{also}", masters)


def _of_adapters(plan: Plan, available: Available) -> Iterator[Remedy]:
    if plan.backend.name == FSDP1 or plan.in_backward or plan.master_dtype != torch.float32:
        return
    settings, adapters = f"--lora_r {_RANK}", replace(plan, lora_r=_RANK)
    free = f"{settings} --distill_teacher self"
    if plan.teacher == COPY and available.accepts(free):
        yield Remedy(free, replace(adapters, teacher=SELF))
    else:
        yield Remedy(settings, adapters)
    if available.packed_base and not plan.backend.shards:
        yield _packed(adapters, f"{settings} ")


def _packed(plan: Plan, settings: str) -> Remedy:
    """A packed base, whose teacher is not the student itself."""
    also = " --distill_teacher cache" if plan.teacher in (COPY, SELF) else ""
    teacher = CACHE if also else plan.teacher
    return Remedy(f"{settings}--base_in_scheme True{also}", replace(plan, base_in_scheme=True, teacher=teacher))


def _together(plan: Plan, available: Available, estimate: Estimates, fits: Fits) -> Found:
    """Add one small remedy after the other, then try each way to train in less beside them, until the run fits."""
    found: Found = []
    settings: list[str] = []
    tried: set[str] = set()
    lowest = estimate(plan).total

    def lowers(remedy: Remedy) -> bool:
        """Whether it needs less beside `settings`; then it is found."""
        together = Remedy(" ".join([*settings, remedy.settings]), remedy.plan)
        if not available.accepts(together.settings) or (result := estimate(remedy.plan)).total >= lowest:
            return False
        if settings:
            found.append((together, result))
        return True

    while step := next((r for r in _small(plan, available) if r.settings not in tried), None):
        tried.add(step.settings)
        if lowers(step):
            settings, plan, lowest = [*settings, step.settings], step.plan, estimate(step.plan).total
            if fits(estimate(plan)):
                return found
    for way in _ways(plan, available) if settings else ():
        if lowers(way) and fits(estimate(way.plan)):
            break
    return found


def _more_processes(plan: Plan, estimate: Estimates, fits: Fits) -> Found:
    """FSDP2 over twice as many processes, and so on, until the run fits."""
    found: Found = []
    if plan.base_in_scheme or plan.optimizer == "muon":  # FSDP does not shard the one, and the other needs whole ones
        return found
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
