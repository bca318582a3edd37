"""A proof that does not come to its end: what it says, and what it leaves."""

from __future__ import annotations

import errno
import json
import resource
import shutil
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from helpers import save_qat
from safetensors.torch import save_file

from qat.checkpoints import verify
from qat.checkpoints import verify_logits as logits
from qat.checkpoints.pack import export_checkpoint
from qat.checkpoints.pipeline import CPU
from qat.checkpoints.verdict import recorded_source, write_verdict
from qat.checkpoints.verify_logits import NotLoadableError, VerificationError
from qat.errors import DiskFullError, RunFault, UserError


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """A source and its packed folder."""
    source = save_qat(tmp_path_factory.mktemp("stopped") / "source", {"torch.nn.Linear": "MXFP4"})
    return source, export_checkpoint(source, source / "packed")


@contextmanager
def files_of_at_most(size_bytes: int):
    """A limit of file sizes, which processes started inside inherit: to them the disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_process_without_space_for_its_logits_ends_with_the_status_of_a_full_disk(pair, tmp_path, capsys):
    inputs, outputs = str(tmp_path / "inputs.safetensors"), str(tmp_path / "outputs.safetensors")
    save_file({"input_ids": torch.arange(32)[None]}, inputs)
    with files_of_at_most(2048):
        status = logits._run(["packed", "--folder", str(pair[1]), "--inputs", inputs, "--outputs", outputs])
    error = logits._failure(["packed", "--folder", "f"], status, capsys.readouterr().err)
    assert status == errno.ENOSPC and isinstance(error, DiskFullError) and isinstance(error, RunFault)
    assert "f is not proven: the disk is full" in str(error) and "os error 27" in str(error)


def test_a_disk_without_space_for_the_tokens_is_said_to_be_full(pair):
    with ExitStack() as processes, files_of_at_most(64), pytest.raises(DiskFullError, match="give another TMPDIR"):
        logits.begin_packed(processes, pair[1], torch.arange(32)[None], CPU)


@pytest.mark.parametrize(
    ("status", "errors", "kind", "said"),
    [
        (
            1,
            "OSError: [Errno 28] No space left on device: '/cache/x'",
            DiskFullError,
            "the disk is full .*cache/x",
        ),
        (28, "", DiskFullError, "the disk is full"),
        (-9, "", VerificationError, "SIGKILL ended the process .* memory is short"),
        (1, "torch.OutOfMemoryError: CUDA out of memory. Tried", VerificationError, "too little memory"),
        (1, "Traceback\nMemoryError", VerificationError, "too little memory"),
        (1, "Traceback\nqat.errors.UserError: no weight x", NotLoadableError, "cannot load it: no weight x"),
        (3, "", NotLoadableError, "cannot load it: its process ended with status 3"),
    ],
)
def test_each_way_in_which_a_process_of_the_proof_fails_has_its_own_words(status, errors, kind, said):
    with pytest.raises(kind, match=said) as error:
        raise logits._failure(["packed", "--folder", "f"], status, errors)
    assert type(error.value) is kind


def test_a_proof_that_stops_early_leaves_the_source_and_no_verdict(pair, tmp_path, monkeypatch):
    source, packed = pair
    copy = Path(shutil.copytree(packed, tmp_path / "copy"))
    verify.verify(copy, source, with_logits=False)

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(verify, "compare_weights", stop)
        verify.verify(copy, with_logits=False)
    left = json.loads((copy / "verification.json").read_text())
    assert left["verified"] is False and "did not come to its end" in left["why_not_verified"]
    assert verify.verify(copy, with_logits=False)["verified"]  # no source is given: it is still known
    assert "why_not_verified" not in json.loads((copy / "verification.json").read_text())


def test_a_first_proof_that_stops_leaves_the_source_too(pair, tmp_path, monkeypatch):
    source, packed = pair
    copy = Path(shutil.copytree(packed, tmp_path / "copy", ignore=shutil.ignore_patterns("verification.json")))
    monkeypatch.setattr(verify, "compare_weights", lambda *args: (_ for _ in ()).throw(UserError("stopped")))
    with pytest.raises(UserError, match="stopped"):
        verify.verify(copy, source, with_logits=False)
    assert recorded_source(copy) == source


def test_a_verdict_that_cannot_be_written_leaves_the_record_of_the_source(tmp_path):
    write_verdict(tmp_path, {"verified": False, "source": ".."})
    with files_of_at_most(1024), pytest.raises(DiskFullError, match="verification.json"):
        write_verdict(tmp_path, {"verified": True, "source": "..", "left": "x" * 4096})
    assert json.loads((tmp_path / "verification.json").read_text()) == {"verified": False, "source": ".."}
    assert len(list(tmp_path.iterdir())) == 1
