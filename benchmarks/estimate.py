"""Compare the estimates of training.estimate with measured peaks.

    python benchmarks/estimate.py --shape small --batch 2 --length 512
    python benchmarks/estimate.py --device cuda --shape llama-8b --batch 2 --length 2048

Each configuration trains three steps in a process of its own. On a GPU the peak is that of the caching allocator; on a
CPU it is the sum of all allocations and frees that PyTorch's profiler reports, which is what the allocator was asked
for. Both leave out the program's own memory. The ratio is estimate over peak.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from transformers import LlamaForCausalLM  # noqa: E402

from benchmarks.arguments import make_parser, use_device  # noqa: E402
from benchmarks.lora import TEACHER, LoraStep, make_base  # noqa: E402
from benchmarks.report import Report  # noqa: E402
from benchmarks.workloads import SHAPES, TrainingStep, make_batch, make_model, prepare  # noqa: E402
from qat.command_line import not_negative, positive  # noqa: E402
from qat.errors import reported_in_one_line  # noqa: E402
from training.estimate.plan import COPY, SELF, Plan  # noqa: E402
from training.estimate.total import Estimator  # noqa: E402
from training.teachers.frozen import FrozenTeacher  # noqa: E402
from training.teachers.load import load_teacher  # noqa: E402

SHAPES["small"] = (512, 1536, 6, 8, 4, 8192, True)
SHAPES["medium"] = (1024, 2816, 4, 16, 8, 16384, False)
STEPS = 3


class Configuration(NamedTuple):
    """A row: the scheme, and how the plan differs from a plain one."""

    scheme: str | None
    changes: dict


CONFIGURATIONS: dict[str, Configuration] = {
    "BF16": Configuration(None, {}),
    "MXFP4": Configuration("MXFP4", {}),
    "MXFP4, twice the batch": Configuration("MXFP4", {"batch": 2}),
    "MXFP4, activation checkpointing": Configuration("MXFP4", {"checkpointing": ()}),
    "MXFP4, distilled": Configuration("MXFP4", {"teacher": COPY}),
    "MXFP4, SGD": Configuration("MXFP4", {"optimizer": "sgd"}),
    "MXFP4, accumulation": Configuration("MXFP4", {"accumulates": True}),
    "BF16, adamw_torch": Configuration(None, {"optimizer": "adamw_torch"}),
    "BF16, Adafactor": Configuration(None, {"optimizer": "adafactor"}),
    "MXFP4A16": Configuration("MXFP4A16", {}),
    "NVFP4": Configuration("NVFP4", {}),
    "MXFP4, adapters": Configuration("MXFP4", {"lora_r": 16}),
    "MXFP4, adapters, distilled from itself": Configuration("MXFP4", {"lora_r": 16, "teacher": SELF}),
}


def plan_for(args: argparse.Namespace, name: str) -> Plan:
    """The plan of a configuration; "batch" is a factor."""
    changes = dict(CONFIGURATIONS[name].changes)
    batch = args.batch * changes.pop("batch", 1)
    return replace(Plan(batch, args.length, device=args.device), **changes)


def estimated(args: argparse.Namespace, name: str) -> int:
    """Bytes."""
    student = make_model(args.shape, CONFIGURATIONS[name].scheme, args.layers, "meta", calibrated=False)
    return Estimator(student).estimate(plan_for(args, name)).total


def optimizer_of(plan: Plan, model: LlamaForCausalLM) -> torch.optim.Optimizer:
    """The optimizer of a plan, with the settings that Trainer gives it."""
    if plan.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(model.parameters(), lr=1e-6, scale_parameter=False, relative_step=False)
    if plan.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=1e-6)
    return torch.optim.AdamW(model.parameters(), lr=1e-6, fused=plan.optimizer.endswith("fused") or None)


def make_step(args: argparse.Namespace, name: str) -> TrainingStep | LoraStep:
    """The step of a configuration."""
    plan, scheme = plan_for(args, name), CONFIGURATIONS[name].scheme
    if plan.lora_r:
        settings = argparse.Namespace(
            rank=plan.lora_r, alpha=32, checkpointing="off", compiled=False, batch=plan.batch, length=plan.length
        )
        kind = f"{scheme}{TEACHER if plan.teacher == SELF else ''}"
        return LoraStep(kind, make_base(args.shape, args.layers, args.device), settings)
    model = make_model(args.shape, None, args.layers, args.device)
    teacher = load_teacher(model, None) if plan.teacher == COPY else None
    model = prepare(model, scheme, plan.checkpoints)
    frozen = None if teacher is None else FrozenTeacher(teacher, torch.device(args.device))
    step = TrainingStep(model, make_batch(model, plan.batch, plan.length), teacher=frozen)
    step.optimizer = optimizer_of(plan, model)
    return step


def train(args: argparse.Namespace, name: str, after_first_step: Callable[[], None]) -> None:
    """A few steps of a configuration."""
    plan, step = plan_for(args, name), make_step(args, name)
    for number in range(STEPS):
        if plan.accumulates:
            step.loss().backward()
        step()
        if number == 0:
            after_first_step()


def print_peak(args: argparse.Namespace) -> None:
    """The child: bytes at the peak of all steps but the first."""
    if args.device == "cuda":
        train(args, args.peak_of, torch.cuda.reset_peak_memory_stats)
        print(torch.cuda.max_memory_allocated())
        return
    from torch.profiler import ProfilerActivity, profile

    use_device()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train(args, args.peak_of, lambda: None)
    changes = [(e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for _, change in sorted(changes, key=lambda each: each[0]):
        live += change
        peak = max(peak, live)
    print(peak)


def measured(args: argparse.Namespace, name: str) -> int:
    """Bytes, from a process of its own."""
    command = [sys.executable, sys.argv[0], "--peak_of", name]
    for argument in ("shape", "layers", "batch", "length", "device"):
        command += [f"--{argument}", str(getattr(args, argument))]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr[-2000:])
    return int(result.stdout.split()[-1])


def main() -> None:
    """Estimate, measure, report."""
    parser = make_parser(__doc__, repeats=1)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--layers", type=not_negative, default=0, help="decoder layers, 0 for all of the shape")
    parser.add_argument("--batch", type=positive, default=2)
    parser.add_argument("--length", type=positive, default=512)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--configurations", help="names with ; between them; default: all")
    parser.add_argument("--peak_of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        return print_peak(args)
    report = Report(f"estimate_{args.device}_{args.shape}", args.device)
    for name in args.configurations.split(";") if args.configurations else CONFIGURATIONS:
        estimate, peak = estimated(args, name), measured(args, name)
        report.add(f"{name}: peak", peak / 2**30, unit="GiB")
        report.add(f"{name}: estimate", estimate / 2**30, unit="GiB")
        report.add(f"{name}: estimate over peak", estimate / peak, "1.00")
    report.write(args.out)


if __name__ == "__main__":
    with reported_in_one_line():
        main()
