"""Run programs that a language model wrote, each in a process of its own with little of everything."""

from __future__ import annotations

import functools
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_CHILD = Path(__file__).with_name("sandbox_child.py")
SECONDS, MEMORY_MIB = 10, 1024


def succeeds(program: str, seconds: int = SECONDS, memory_mib: int = MEMORY_MIB) -> bool:
    """Whether a program ends without an exception within its limits; see sandbox_child.py for what it may not do.

    Args:
        program: Python source; the standard library is all that it can import.
        seconds: of processor time; twice as many by the clock.
        memory_mib: of address space.
    """
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_CHILD), str(seconds), str(memory_mib)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=folder, env={},
            start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = child.communicate(f"{token}\n{program}".encode("utf-8", "replace"), timeout=2 * seconds)
        except subprocess.TimeoutExpired:
            output = b""
        finally:
            _end(child)
    return output == token.encode()


def _end(child: subprocess.Popen) -> None:
    """End the child and what it may have started."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
    child.communicate()


@functools.cache
def warn_of_network() -> None:
    """Print a warning, once, where the system does not take the network away from a program: the hook alone remains."""
    child = [sys.executable, "-I", "-S", str(_CHILD), "--isolated"]
    if subprocess.run(child, stderr=subprocess.DEVNULL).returncode:
        print(
            "WARNING: this system does not let programs of HumanEval run without a network (unshare is refused); only "
            "a hook in Python keeps them from it",
            file=sys.stderr, flush=True,
        )  # fmt: skip


def all_succeed(programs: list[str], workers: int | None = None) -> list[bool]:
    """`succeeds` of each program, several at a time."""
    warn_of_network()
    with ThreadPoolExecutor(workers or min(16, os.cpu_count() or 1)) as pool:
        return list(pool.map(succeeds, programs))
