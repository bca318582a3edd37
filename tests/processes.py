"""main.py in processes of its own that start in an instant: forked from one that has imported everything already.

The fork server of the standard library imports `main` once; each run is then a real process, with an exit status, that
can really be killed.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
SECONDS = 120  # no run of a tiny model takes longer, unless it hangs


@dataclass
class Run:
    """The processes of one run.

    Attributes:
        log: what process 0 wrote to standard output and error; the others' are beside it, with their number.
    """

    processes: list
    log: Path
    began: float

    @property
    def pids(self) -> list[int]:
        """Of each process."""
        return [process.pid for process in self.processes]

    def wait(self, seconds: float = SECONDS) -> list[int]:
        """Exit statuses, negative for a signal; raises TimeoutError, after ending them, if one hangs."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0))
        hung = [process for process in self.processes if process.is_alive()]
        for process in hung:
            process.kill()
            process.join()
        if hung:
            raise TimeoutError(f"{len(hung)} of {len(self.processes)} processes hung, see {self.log}:\n{self.text()}")
        return [process.exitcode for process in self.processes]

    def text(self) -> str:
        """What all processes wrote."""
        return "".join(path.read_text(errors="replace") for path in sorted(self.log.parent.glob(f"{self.log.name}*")))


def start(
    *runs: list[str], log: Path, before: Callable | None = None, count: int = 1, settings: dict | None = None
) -> Run:
    """Start main.main for each of `runs`, one after the other, in `count` processes, connected by gloo if several.

    Errors and signals are reported as those of the program.

    Args:
        runs: the arguments of each.
        before: called in each process with its number, after all imports and before `main`; picklable.
        settings: environment variables.
    """
    context = _context()
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **(settings or {})}
    if count > 1:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
        environment |= {"LOCAL_WORLD_SIZE": str(count), "ACCELERATE_USE_CPU": "true"}
    processes = []
    for rank in range(count):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
        path = log.with_name(log.name + (f".{rank}" if rank else ""))
        process = context.Process(target=_body, args=(runs, str(path), environment | own, before, rank))
        process.start()
        processes.append(process)
    return Run(processes, log, time.monotonic())


def fork(function: Callable, *args) -> multiprocessing.Process:
    """Start `function(*args)`, both picklable, in a process of its own."""
    process = _context().Process(target=function, args=args)
    process.start()
    return process


def _context():
    # The server and its children find modules by PYTHONPATH.
    folders = [str(ROOT), str(ROOT / "tests"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, folders)))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    return context


def _body(runs: Sequence[list[str]], log: str, environment: dict[str, str], before, rank: int) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.update(environment)
    os.chdir(ROOT)
    import no_estimate

    import main
    from qat import errors

    errors._HEAD_START_S = 0  # no launcher ends the other processes
    no_estimate.leave_out()
    if before is not None:
        before(rank)
    with errors.reported_in_one_line():
        for argv in runs:
            main.main(argv)


def free_port() -> int:
    """One that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
