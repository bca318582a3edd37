"""Two runs never write to the same folder."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time

import pytest
from processes import fork

from qat.files import lock as output_lock
from qat.files.lock import LOCK_NAME
from training.backends.writers import Writers
from training.resume.output import OutputFolder, unused_folder


def hold(folder: str, began) -> None:
    """Hold `folder` with a child that would outlive this process, as a worker that loads data."""
    os.setsid()
    with OutputFolder(folder, Writers()).held():
        if os.fork():
            began.send(None)
        time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds `tmp_path`."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = fork(hold, str(tmp_path), sender)
    receiver.recv()
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.join()


def test_a_second_run_is_refused_and_touches_nothing(tmp_path, holder):
    (tmp_path / ".checkpoint-2.partial").mkdir()  # which the holder is writing
    with pytest.raises(ValueError) as error, OutputFolder(tmp_path, Writers()).held():
        pass
    for part in (f"--output_dir '{tmp_path}'", f"process {holder.pid} on", "wait for its end", "another --output_dir"):
        assert part in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".checkpoint-2.partial", LOCK_NAME]


def test_a_killed_run_leaves_the_folder_free_and_a_finished_one_leaves_it_clean(tmp_path, holder):
    holder.kill()
    holder.join()
    assert (tmp_path / LOCK_NAME).exists()
    assert unused_folder(tmp_path) == tmp_path
    with OutputFolder(tmp_path, Writers()).held():
        assert str(os.getpid()) in (tmp_path / LOCK_NAME).read_text()
    assert not list(tmp_path.iterdir())


def test_a_run_whose_lock_was_taken_away_leaves_that_of_its_successor(tmp_path):
    with OutputFolder(tmp_path, Writers()).held():
        (tmp_path / LOCK_NAME).unlink()
        (tmp_path / LOCK_NAME).write_text("another run")
    assert (tmp_path / LOCK_NAME).read_text() == "another run"


def test_processes_that_do_not_lead_hold_nothing_and_are_refused_with_the_one_that_does(tmp_path, holder, monkeypatch):
    follower = Writers(index=1, count=2, leads=False)
    with OutputFolder(tmp_path, follower).held():
        pass
    monkeypatch.setattr(Writers, "gather", lambda self, item: ["in use by another run", item])
    with pytest.raises(ValueError, match="in use by another run"), OutputFolder(tmp_path, follower).held():
        pass


def test_without_locks_a_run_goes_on_aloud(tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(output_lock.fcntl, "lockf", refuse)
    with OutputFolder(tmp_path, Writers()).held():
        pass
    assert "has no locks (No locks available)" in caplog.text and str(tmp_path) in caplog.text
