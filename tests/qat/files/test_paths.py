"""Folders to write to: tried before any work, and not left behind by what comes to nothing."""

from __future__ import annotations

import pytest

from qat.errors import UserError
from qat.files.paths import check_writable, made_writable


def test_a_folder_that_was_made_is_removed_with_its_parents_where_nothing_was_written(tmp_path):
    with pytest.raises(KeyError), made_writable("--out", tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_what_was_there_before_or_was_written_to_stays(tmp_path):
    (tmp_path / "old").mkdir()
    with pytest.raises(KeyError), made_writable("--out", tmp_path / "old"):
        raise KeyError
    with pytest.raises(KeyError), made_writable("--out", tmp_path / "a" / "new"):
        (tmp_path / "a" / "new" / "log").touch()
        raise KeyError
    with made_writable("--out", tmp_path / "kept"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"old", "a", "kept"} and (tmp_path / "a/new/log").exists()


def test_a_check_makes_nothing_and_refuses_what_could_not_be_made(tmp_path):
    check_writable("--cache", tmp_path / "a" / "b")
    check_writable("--cache", tmp_path)
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "in", tmp_path / ("x" * 300), "a\0b", "/proc/no", " "):
        with pytest.raises(UserError, match="^--cache "):
            check_writable("--cache", folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
