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
from qat.processes import end_by_parent_alone, start_worker


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


def test_a_second_ctrl_c_ends_a_program_at_once_and_a_second_sigterm_does_not(tmp_path):
    program = fork(_program, tmp_path / "partial", 60)
    _wait_until((tmp_path / "partial").exists)
    for signum in (signal.SIGTERM, signal.SIGTERM):
        os.kill(program.pid, signum)
        time.sleep(0.2)
        assert program.is_alive()
    os.kill(program.pid, signal.SIGINT)
    program.join(30)
    assert program.exitcode == -signal.SIGINT


def _reader_of_batches(path: Path, parent: int) -> None:
    end_by_parent_alone(parent)
    path.touch()
    time.sleep(60)


def test_a_reader_of_batches_is_ended_by_its_parent_alone(tmp_path):
    ours, others = (fork(_reader_of_batches, tmp_path / str(pid), pid) for pid in (os.getpid(), 1))
    for pid in (os.getpid(), 1):
        _wait_until((tmp_path / str(pid)).exists)
    for worker in (ours, others):
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    ours.join(30)
    assert ours.exitcode == 0 and others.is_alive()
    others.kill()


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
