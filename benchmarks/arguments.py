"""Arguments that the benchmarks of training share, and how they are passed on to a process that measures memory."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.report import check_device
from benchmarks.workloads import SHAPES
from qat.command_line import OneLineParser, not_negative, positive
from qat.errors import UserError
from training.backends.cpu_bfloat16 import is_needed, use_fast_bfloat16

RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "131072"}  # glibc: tensors of 128 KiB and more are mapped one by one
_WORKLOAD = ("shape", "layers", "batch", "length", "device", "rank", "checkpointing")


def make_parser(description: str, repeats: int) -> argparse.ArgumentParser:
    """A parser of --repeats, with this default, and --out."""
    parser = OneLineParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=positive, default=repeats)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser


def add_workload(parser: argparse.ArgumentParser) -> None:
    """Model and batch; and --memory_of, which only `peak_memory` gives."""
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--layers", type=not_negative, default=0, help="decoder layers, 0 for all of the shape")
    parser.add_argument("--batch", type=positive, default=4)
    parser.add_argument("--length", type=positive, default=256, help="tokens of a sample")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)


def chosen(argument: str, text: str, known: Iterable[str]) -> list[str]:
    """The names in a list NAME,NAME,...

    Raises:
        UserError: one is not known, or there is none.
    """
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{argument} {text!r}: {unknown[0]!r} is unknown; choose from {', '.join(known)}")
    return names


def use_device(device: str = "cpu") -> None:
    """What main.py does for a CPU without BF16 instructions; a UserError for a GPU that is not there."""
    check_device(device)
    if device == "cpu" and is_needed():
        use_fast_bfloat16()


def peak_memory(args: argparse.Namespace, name: str, environment: dict[str, str] | None = None) -> float:
    """GiB, the last word of a fresh process of this benchmark with the same workload and `--memory_of name`."""
    command = [sys.executable, sys.argv[0], "--memory_of", name]
    for argument in _WORKLOAD:
        if hasattr(args, argument):
            command += [f"--{argument}", str(getattr(args, argument))]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    if result.returncode:
        raise RuntimeError(result.stderr[-2000:])
    return float(result.stdout.split()[-1])
