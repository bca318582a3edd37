"""Children end with their parent, and programs with the signal that asks for it: real processes, really killed."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from processes import fork

from qat.errors import reported_in_one_line
from qat.processes import outlive_first_sigterm, start_worker


def _parent_of_a_worker(path: Path) -> None:
    parent, child = os.getpid(), os.fork()
    if child == 0:
        start_worker(parent)
        path.with_suffix(".partial").write_text(str(os.getpid()))
        path.with_suffix(".partial").rename(path)
    time.sleep(60)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_ends_with_its_parent_however_that_ends(tmp_path, signum):
    parent = fork(_parent_of_a_worker, tmp_path / "pid")
    _wait_until((tmp_path / "pid").exists)
    worker = int((tmp_path / "pid").read_text())
    os.kill(parent.pid, signum)
    parent.join()
    _wait_until(lambda: not _is_alive(worker))


def test_a_worker_whose_parent_has_ended_already_ends_at_once():
    worker = fork(start_worker, 1)
    worker.join()
    assert worker.exitcode == 1


def _program(path: Path, cleans_up_s: float) -> None:
    with path.with_suffix(".log").open("w") as sys.stderr, reported_in_one_line():
        path.touch()
        try:
            time.sleep(60)
        finally:
            time.sleep(cleans_up_s)
            path.unlink()


@pytest.mark.parametrize("signum,status,name", [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")])
def test_a_signal_ends_a_program_with_its_status_in_one_line_once_it_has_cleaned_up(tmp_path, signum, status, name):
    path = tmp_path / "partial"
    program = fork(_program, path, 0)
    _wait_until(path.exists)
    os.kill(program.pid, signum)
    program.join()
    assert program.exitcode == status and not path.exists()
    assert (tmp_path / "partial.log").read_text() == f"ended by {name}\n"


def test_a_second_signal_ends_a_program_at_once(tmp_path):
    program = fork(_program, tmp_path / "partial", 60)
    _wait_until((tmp_path / "partial").exists)
    os.kill(program.pid, signal.SIGINT)
    time.sleep(0.3)
    assert program.is_alive()
    os.kill(program.pid, signal.SIGTERM)
    program.join(10)
    assert program.exitcode == -signal.SIGTERM


def _lasting_worker(path: Path) -> None:
    outlive_first_sigterm()
    path.touch()
    time.sleep(60)


def test_a_reader_of_batches_outlives_the_first_sigterm_and_not_the_second(tmp_path):
    worker = fork(_lasting_worker, tmp_path / "started")
    _wait_until((tmp_path / "started").exists)
    for signum in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, signum)
        time.sleep(0.2)
        assert worker.is_alive()
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(10)
    assert worker.exitcode == -signal.SIGTERM


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _wait_until(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
