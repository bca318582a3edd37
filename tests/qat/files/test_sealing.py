"""Files that are flushed and described while they are written."""

from __future__ import annotations

import errno
import time
from pathlib import Path

import pytest
import xxhash

from qat.files import sealing
from qat.files.manifest import describe, names_in, problems, write_manifest
from qat.files.sealing import Sealing


def wait_for(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def flushed(monkeypatch):
    """The paths that were flushed, with the size that each had."""
    paths: list[tuple[Path, int]] = []
    flush = sealing.flush_path
    monkeypatch.setattr(sealing, "flush_path", lambda path: (paths.append((path, path.stat().st_size)), flush(path)))
    monkeypatch.setattr(sealing, "_GROWTH_BYTES", 1000)
    return paths


def test_each_file_has_the_checksum_of_its_bytes_and_is_flushed_once_it_is_complete(tmp_path, flushed):
    (tmp_path / "sub").mkdir()
    contents = {"a": b"", "b": b"b" * 999, "sub/c": bytes(range(256)) * 9000}
    with Sealing(tmp_path) as seal:
        for name, content in contents.items():
            (tmp_path / name).write_bytes(content)
        entries = seal.entries(names_in(tmp_path))
        for name, content in contents.items():
            assert (tmp_path / name, len(content)) in flushed
    for name, content in contents.items():
        assert entries[name] == {"bytes": len(content), "xxh3_128": xxhash.xxh3_128(content).hexdigest()}
    assert entries == describe(tmp_path)
    write_manifest(tmp_path, entries)
    assert not problems(tmp_path) and names_in(tmp_path) == ["a", "b", "sub/c"]


def test_a_file_is_flushed_while_it_grows_by_the_process_that_follows_it(tmp_path, flushed):
    names = [f"file-{index}" for index in range(8)]
    with Sealing(tmp_path, 0, 2), Sealing(tmp_path, 1, 2):
        for name in names:
            (tmp_path / name).write_bytes(b"x" * 1500)
        (tmp_path / "small").write_bytes(b"x" * 900)
        wait_for(lambda: len(flushed) == 8)
        with (tmp_path / names[0]).open("ab") as file:
            file.write(b"x" * 1100)
        wait_for(lambda: len(flushed) == 9)
    assert sorted(path.name for path, _ in flushed[:8]) == names and flushed[8] == (tmp_path / names[0], 2600)


def test_a_file_that_was_called_complete_and_changed_is_read_again(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"old" * 1000)
    with Sealing(tmp_path) as seal:
        seal.begin(["weights"])
        wait_for(lambda: seal._sealed["weights"][1].done())
        path.write_bytes(b"new" * 1001)
        assert seal.entries(["weights"]) == describe(tmp_path)


@pytest.mark.parametrize("size", [10, 2000])
def test_a_flush_that_failed_once_is_an_error_in_the_end(tmp_path, monkeypatch, flushed, size):
    """The kernel reports a failed write once; a later flush of the same file succeeds."""
    path, failed = tmp_path / "weights", []

    def fail_once(path: Path) -> None:
        if not failed:
            failed.append(path)
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sealing, "flush_path", fail_once)
    with Sealing(tmp_path) as seal:
        path.write_bytes(b"x" * size)
        if size < 1000:
            seal.begin(["weights"])
        wait_for(lambda: failed)
        path.write_bytes(b"y" * (size + 1))
        with pytest.raises(OSError, match="Input/output error"):
            seal.entries(["weights"])
