"""Launch main.py as users do, in processes of its own, and say why one failed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
_ERROR = re.compile(r"^error: |\b\w+Error: ")


def launcher(backend: str, processes: int, port: int) -> list[str]:
    """The words of a command line before the script: accelerate with one of the configurations of accelerate_config/"""
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"accelerate_config/{backend}.yaml",
        "--num_processes", str(processes), "--main_process_port", str(port),
    ]  # fmt: skip


def offline(threads: int = 1) -> dict[str, str]:
    """The environment of a run: no hub, and `threads` of a process where OMP_NUM_THREADS does not say how many."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }


def modules_of(root: Path = ROOT) -> str:
    """The value of PYTHONPATH that finds the modules of a copy of the repository, then those of this process."""
    return os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))


def run_logged(command: Sequence[str], log: Path, environment: dict[str, str], timeout: float) -> None:
    """Run `command` in the root of the repository; its output goes to `log`.

    Raises:
        RuntimeError: it failed, or took longer than `timeout` seconds and was killed with its processes. The message
            has the line with the error.
    """
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            code: int | str = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = f"none within {timeout:.0f} s"
        finally:
            if process.poll() is None:
                kill_with_children(process)
    if code != 0:
        raise RuntimeError(f"exit {code}: {last_error(log)}")


def kill_with_children(process: subprocess.Popen) -> None:
    """Kill a launcher and the processes that it started; SIGTERM would have main.py write a checkpoint first."""
    family = [*psutil.Process(process.pid).children(recursive=True), process]
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


def last_error(log: Path) -> str:
    """The first line of a log that is an exception or an error of main.py, else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.search(line) and "ChildFailedError" not in line]
    return (errors[0] if errors else (lines or ["no output"])[-1])[:300]
