"""Files out of pinned packages of the package index that pip is configured for, without installing them."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qat.errors import UserError


class UnreachableError(UserError):
    """A package that the package index does not give: no network, or the version is gone."""


@contextmanager
def downloaded(requirement: str, folder: Path, source: bool = False) -> Iterator[Path]:
    """The file of `requirement` ("name==version"), a wheel or with `source` an archive; removed afterwards.

    Raises:
        UnreachableError: pip cannot download it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "-q"]
        command += ["--no-binary" if source else "--only-binary", ":all:", "-d", temporary, requirement]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or [result.stderr.strip()]
            raise UnreachableError(
                f"the package {requirement} cannot be downloaded ({lines[-1][:200]}); see `pip config`"
            )
        (path,) = Path(temporary).iterdir()
        yield path


def members(package: Path, beginning: str, ending: str) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a wheel's or archive's files, by name, without an archive's first folder."""
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as wheel:
            for name in sorted(wheel.namelist()):
                if name.startswith(beginning) and name.endswith(ending):
                    yield name, wheel.read(name)
        return
    with tarfile.open(package) as archive:
        files = {member.name.partition("/")[2]: member for member in archive if member.isfile()}
        for name in sorted(files):
            if name.startswith(beginning) and name.endswith(ending):
                file = archive.extractfile(files[name])
                assert file is not None
                yield name, file.read()


def check_sha256(path: Path, wanted: str) -> None:
    """Raise a UserError for a file with another content."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wanted:
        raise UserError(f"{path} has the SHA-256 {found}, not {wanted}: it is damaged, or not this version; remove it")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    partial.rename(path)
