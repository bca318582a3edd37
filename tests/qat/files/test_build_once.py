"""Of all processes that want a folder one builds it; none sees an incomplete one."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from qat.files.build_once import build_once


def _build_slowly(folder: Path) -> None:
    time.sleep(0.3)
    with (folder.parent / "builds").open("a") as log:
        log.write("x")
    (folder / "data").write_text("whole")


def _build_from_a_process(root: Path) -> None:
    assert (build_once(root, "key", _build_slowly) / "data").read_text() == "whole"


def test_of_several_processes_one_builds_and_the_others_wait(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_build_from_a_process, args=(tmp_path,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "builds").read_text() == "x"


def _die(folder: Path) -> None:
    (folder / "data").write_text("half")
    os._exit(9)  # as if killed: nothing is cleaned up, and the lock is the operating system's to free


def test_a_crash_leaves_no_half_cache_and_the_next_builds_anew(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=build_once, args=(tmp_path, "key", _die))
    process.start()
    process.join()
    assert process.exitcode == 9 and not (tmp_path / "key").exists() and list(tmp_path.glob("key.partial-*"))
    _build_from_a_process(tmp_path)
    assert not list(tmp_path.glob("key.partial-*"))


def test_a_failed_build_leaves_nothing_and_its_error_is_seen(tmp_path):
    def fail(folder: Path) -> None:
        (folder / "data").write_text("half")
        raise ValueError("no such luck")

    with pytest.raises(ValueError, match="no such luck"):
        build_once(tmp_path, "key", fail)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_where_another_machine_was_first_its_folder_is_taken(tmp_path):
    def build(folder: Path) -> None:
        (folder / "data").write_text("ours")
        (tmp_path / "key").mkdir()
        (tmp_path / "key" / "data").write_text("theirs")

    assert (build_once(tmp_path, "key", build) / "data").read_text() == "theirs"
    assert not list(tmp_path.glob("key.partial-*"))
