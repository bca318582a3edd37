"""What a device did in a step, kernel by kernel, with the operators and modules that asked for it.

torch.profiler's trace names a kernel and the call that launched it. The call lies within operators, autograd nodes and
`record_function` ranges of its thread, which are its stack here, outermost first. A node of the backward pass is linked
to the operator of the forward pass that made it, whose stack says which module it belongs to. On a CPU an operator
stands for a kernel, with the time outside of those that it calls.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from qat.numerics.registered import Operator

MODULE = "module: "  # before the class of a module in the name of its range
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_HOST = ("cpu_op", "user_annotation")
_LAUNCH = ("cuda_runtime", "cuda_driver")


@dataclass(frozen=True)
class Kernel:
    """One kernel; times in microseconds.

    Attributes:
        operators: names around its launch, outermost first.
        shapes: of the tensors that the innermost operator with tensors took.
        modules: classes of the modules around it, outermost first; in backward those of the forward operator.
        is_backward: whether an autograd node launched it, recomputation of a forward pass not counted.
    """

    name: str
    start: float
    duration: float
    operators: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    modules: tuple[str, ...]
    is_backward: bool

    @property
    def end(self) -> float:
        """When it was done."""
        return self.start + self.duration


def trace(step: Callable[[], None], device: str, steps: int = 1) -> list[Kernel]:
    """The kernels of `steps` calls of `step`, in the order in which they started."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        with profile(activities=activities, record_shapes=True) as profiler:
            for _ in range(steps):
                step()
            if device == "cuda":
                torch.cuda.synchronize()
        profiler.export_chrome_trace(str(path))
        return kernels_of(json.loads(path.read_text())["traceEvents"], device)


def kernels_of(events: list[dict], device: str) -> list[Kernel]:
    """The kernels in the events of a Chrome trace."""
    host = [e for e in events if e["ph"] == "X" and e.get("cat") in _HOST and not e["name"].startswith("ProfilerStep")]
    flows = [e for e in events if e.get("cat") == "fwdbwd"]
    made_by = {e["id"]: e for e in flows if e["ph"] == "s"}
    forward_of = {(e["tid"], e["ts"]): made_by[e["id"]] for e in flows if e["ph"] == "f" and e["id"] in made_by}
    if device == "cuda":
        launches = {
            e["args"]["correlation"]: e for e in events if e.get("cat") in _LAUNCH and "correlation" in e["args"]
        }
        work = [e for e in events if e.get("cat") in _DEVICE]
        points = [launches.get(e["args"].get("correlation"), {"tid": None, "ts": 0.0}) for e in work]
    else:
        work = points = _operators(host)
    wanted = {(p["tid"], p["ts"]) for p in points} | {(e["tid"], e["ts"]) for e in made_by.values()}
    stacks = _stacks(host, wanted)
    kernels = [_kernel(e, (p["tid"], p["ts"]), stacks, forward_of) for e, p in zip(work, points, strict=True)]
    return sorted(kernels, key=lambda kernel: kernel.start)


def _kernel(event: dict, point: tuple, stacks: dict, forward_of: dict) -> Kernel:
    stack = stacks[point]
    names = tuple(e["name"] for e in stack)
    nodes = [i for i, e in enumerate(stack) if e["name"].startswith("autograd::engine")]
    modules = [i for i, name in enumerate(names) if name.startswith(MODULE)]
    is_backward = bool(nodes) and not any(i > nodes[-1] for i in modules)
    if is_backward:
        starts = [forward_of[key] for e in stack if (key := (e["tid"], e["ts"])) in forward_of]
        around = [e["name"] for e in stacks[starts[-1]["tid"], starts[-1]["ts"]]] if starts else []
    else:
        around = list(names)
    inside = tuple(name.removeprefix(MODULE) for name in around if name.startswith(MODULE))
    shapes: tuple = ()
    for e in reversed(stack):
        dims = [tuple(d) for d in e["args"].get("Input Dims", []) if d and isinstance(d[0], int)]
        if dims:
            shapes = tuple(dims)
            break
    return Kernel(event["name"], event["ts"], event["dur"], names, shapes, inside, is_backward)


def _operators(host: list[dict]) -> list[dict]:
    """Operators, each with the time that it spends outside of the operators that it calls."""
    result = []
    for events in _by_thread(host).values():
        open_: list[dict] = []
        for event in events:
            if event["cat"] == "user_annotation" and not event["name"].startswith("mx_qat::"):
                continue
            open_ = [e for e in open_ if e["ts"] + e["dur"] > event["ts"]]
            own = dict(event)
            if open_:
                open_[-1]["self"] -= event["dur"]
            own["self"] = event["dur"]
            open_.append(own)
            result.append(own)
    return [{**event, "dur": max(event["self"], 0.0)} for event in result]


def _stacks(host: list[dict], points: set[tuple]) -> dict[tuple, list[dict]]:
    """(thread, time) -> the host events around that time, outermost first."""
    stacks: dict[tuple, list[dict]] = {point: [] for point in points}
    threads = _by_thread(host)
    for tid in {tid for tid, _ in points}:
        events, times, open_ = threads.get(tid, []), sorted(ts for t, ts in points if t == tid), []
        position = 0
        for ts in times:
            while position < len(events) and events[position]["ts"] <= ts:
                event = events[position]
                open_ = [e for e in open_ if e["ts"] + e["dur"] > event["ts"]] + [event]
                position += 1
            stacks[tid, ts] = [e for e in open_ if e["ts"] + e["dur"] >= ts]
    return stacks


def _by_thread(host: list[dict]) -> dict[int, list[dict]]:
    """Events of each thread by start, an outer one before those that it contains."""
    threads: dict[int, list[dict]] = {}
    for event in sorted(host, key=lambda e: (e["ts"], -e["dur"])):
        threads.setdefault(event["tid"], []).append(event)
    return threads


def busy(kernels: list[Kernel]) -> float:
    """Microseconds in which at least one of `kernels`, sorted by start, ran."""
    total, end = 0.0, float("-inf")
    for kernel in kernels:
        total += max(0.0, kernel.end - max(kernel.start, end))
        end = max(end, kernel.end)
    return total


# ---- Ranges ----


def annotate(model: nn.Module) -> None:
    """Give the forward pass of every module a range of its class, that of the output embedding the name "head"."""
    head = model.get_output_embeddings()
    for module in model.modules():
        name = "head" if module is head else type(module).__name__
        module.forward = _in_range(module.forward, f"{MODULE}{name}")


def _in_range(function: Callable, name: str) -> Callable:
    @functools.wraps(function)
    def run(*args, **kwargs):
        with record_function(name):
            return function(*args, **kwargs)

    return run


@contextmanager
def named_operators() -> Iterator[None]:
    """Our operators show in a trace where they are called past the dispatcher, too."""
    plain = Operator.__call__

    def call(self, *args, **kwargs):
        with record_function(f"mx_qat::{self.function.__name__}"):
            return plain(self, *args, **kwargs)

    with patch.object(Operator, "__call__", call):
        yield
