"""What a checkpoint has on disk, and what is left of one that could not be written."""

from __future__ import annotations

import errno
import time
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import make_llama
from safetensors.torch import load_file
from torch.utils.serialization import config
from trainers import make_data, make_trainer
from transformers.trainer import TRAINING_ARGS_NAME

from qat.errors import DiskFullError
from qat.files.manifest import describe, listed, problems
from training.resume import checkpointing
from training.resume.safeguards import NonFiniteError, check_weights


@pytest.fixture
def trained(tmp_path):
    trainer = make_trainer(tmp_path, make_llama(), make_data(tmp_path), None, max_steps=1)
    trainer.train()
    return trainer


def test_a_checkpoint_has_the_weights_and_the_moments_bit_for_bit_in_files_that_trainer_reads(trained, tmp_path):
    trained._save_checkpoint(trained.model, None)
    checkpoint = tmp_path / "out" / "checkpoint-1"
    assert not problems(checkpoint) and listed(checkpoint) == set(describe(checkpoint)) > {"trainer_state.json"}
    state = trained.model.state_dict()
    weights = load_file(checkpoint / "model.safetensors")
    assert weights.keys() <= state.keys() and all(value.equal(state[name]) for name, value in weights.items())
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    own = trained.optimizer.state_dict()
    assert saved["param_groups"] == own["param_groups"] and saved["state"].keys() == own["state"].keys()
    for number, moments in own["state"].items():
        assert all(saved["state"][number][name].equal(value) for name, value in moments.items())
    with zipfile.ZipFile(checkpoint / "optimizer.pt") as archive:
        assert {record.CRC for record in archive.infolist() if "/data/" in record.filename} == {0}
    assert config.save.compute_crc32 and not config.save.use_pinned_memory_for_d2h


@pytest.mark.parametrize(("free", "is_pinned"), [(400, True), (396, False), (0, False)])
def test_a_checkpoint_pins_a_part_of_the_free_memory_and_gives_it_back(trained, monkeypatch, free, is_pinned):
    seen = []
    monkeypatch.setattr(checkpointing, "pinned_bytes", lambda tensors: 100 if len(list(tensors)) > 9 else 0)
    monkeypatch.setattr(checkpointing, "free_host_bytes", lambda: free)
    monkeypatch.setattr(checkpointing, "free_pinned", lambda device: seen.append(("freed", None)))
    save = torch.save

    def see(value, file):
        if (name := Path(file).name) != TRAINING_ARGS_NAME:  # which the thread of the weights writes, at any moment
            seen.append((name, config.save.use_pinned_memory_for_d2h))
        save(value, file)

    monkeypatch.setattr(torch, "save", see)
    trained._save_checkpoint(trained.model, None)
    freed = [("freed", None)] if is_pinned else []
    states = [("optimizer.pt", is_pinned), ("scheduler.pt", is_pinned)]
    assert seen == [*states, *freed, ("rng_state.pth", False)]
    assert not config.save.use_pinned_memory_for_d2h


def test_a_disk_that_is_full_where_the_weights_are_written_is_one_error_and_leaves_nothing(
    trained, tmp_path, monkeypatch
):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        monkeypatch.context() as patched,
        pytest.raises(DiskFullError, match="incomplete at .*checkpoint-1 .*--output_dir"),
    ):
        patched.setattr(type(trained.model), "save_pretrained", full)
        trained._save_checkpoint(trained.model, None)
    assert not list((tmp_path / "out").glob("*checkpoint*"))
    trained._save_checkpoint(trained.model, None)
    assert not problems(tmp_path / "out" / "checkpoint-1")


def test_a_disk_that_is_full_where_the_optimizer_is_written_leaves_nothing_of_the_weights(
    trained, tmp_path, monkeypatch
):
    written = []

    def write_slowly(model, folder, **_):
        time.sleep(0.3)
        Path(folder, "model.safetensors").write_text("late")
        written.append(folder)

    def full(*_, **__):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(type(trained.model), "save_pretrained", write_slowly)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(DiskFullError):
        trained._save_checkpoint(trained.model, None)
    assert written and not list((tmp_path / "out").glob("*checkpoint*"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_nan_and_infinity_are_found_wherever_they_are_and_the_largest_numbers_pass(dtype):
    model = torch.nn.Module()
    model.empty = torch.nn.Parameter(torch.empty(0, dtype=dtype))
    model.weight = torch.nn.Parameter(torch.full((129,), torch.finfo(dtype).max, dtype=dtype))
    args = type("args", (), {"world_size": 1})
    check_weights(model, args)
    for value in (float("nan"), float("inf"), -float("inf")):
        for place in (0, 77, 128):
            model.weight.data.fill_(-1)[place] = value
            with pytest.raises(NonFiniteError, match="weight .*have become NaN"):
                check_weights(model, args)
