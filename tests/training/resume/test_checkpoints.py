"""Which checkpoint is continued from, and what makes a run another one."""

from __future__ import annotations

import errno
import json
import logging
import os
from pathlib import Path

import pytest
import torch
from helpers import make_llama, make_tokenizer, write_conversations
from torch import nn
from trainers import make_data, make_trainer

from qat import QATConfig, prepare_qat
from qat.errors import DiskFullError, UserError
from qat.files.manifest import describe, problems, write_manifest
from training.arguments.training import TrainingArguments
from training.backends.writers import Writers
from training.resume.checkpoints import check_resumable, find_checkpoint
from training.resume.output import OutputFolder
from training.resume.run_record import RunRecord, model_settings
from training.resume.sampling import EpochSampler
from training.resume.written import checkpoints_in, delete_older_checkpoints, model_written_whole
from utils import make_supervised_data_module


def make_checkpoint(output: Path, step: int) -> Path:
    folder = output / f"checkpoint-{step}"
    (folder / "optimizer_0").mkdir(parents=True)
    for name in ("model.safetensors", "trainer_state.json", "optimizer_0/a.distcp"):
        (folder / name).write_text(f"{name} of step {step}")
    write_manifest(folder, describe(folder))
    return folder


def test_processes_share_the_reading_and_find_every_fault_once(tmp_path):
    folder = make_checkpoint(tmp_path, 2)
    parts = [describe(folder, i, 2) for i in range(2)]
    assert {**parts[0], **parts[1]} == describe(folder) and not parts[0].keys() & parts[1].keys()
    (folder / "model.safetensors").write_text("model.safetensors of step 3")
    (folder / "trainer_state.json").write_text("short")
    (folder / "optimizer_0" / "a.distcp").unlink()
    found = problems(folder, 0, 2) + problems(folder, 1, 2)
    assert len(found) == 3 and set(found) == set(problems(folder))
    assert any("model.safetensors has changed" in p for p in found) and any("5 bytes instead of" in p for p in found)


SUM = "0" * 32
DAMAGED = {
    "empty": "",
    "another form": "[]",
    "no list": "{}",
    "no file": '{"format_version": 1, "files": {}}',
    "another version": json.dumps({"format_version": 2, "files": {"x": {"bytes": 1, "xxh3_128": SUM}}}),
    "nested": "[" * 100_000,
    "twice": '{"format_version": 1, "files": {"x": {"bytes": 1, "xxh3_128": "a"}, "x": {"bytes": 1, "xxh3_128": "a"}}}',
    "huge number": '{"format_version": 1, "files": {"x": {"bytes": %s, "xxh3_128": "a"}}}' % ("9" * 10_000),
    **{
        f"name {name!r}": json.dumps({"format_version": 1, "files": {name: {"bytes": 1, "xxh3_128": SUM}}})
        for name in ("../x", "/etc/passwd", "a/../../x", "", ".", "a//b", "a\0b", "a\nb", "a\\b", "\ud800")
    },
    **{
        f"entry {entry!r}": json.dumps({"format_version": 1, "files": {"x": entry}})
        for entry in (
            None, 1, [], {}, {"bytes": -1, "xxh3_128": SUM}, {"bytes": "1", "xxh3_128": SUM}, {"bytes": 1},
            {"bytes": True, "xxh3_128": SUM}, {"bytes": 1.0, "xxh3_128": SUM}, {"bytes": 1, "xxh3_128": "x"},
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_manifest_vouches_for_nothing_and_the_checkpoint_before_is_taken(tmp_path, caplog, content):
    older, folder = make_checkpoint(tmp_path, 2), make_checkpoint(tmp_path, 4)
    (folder / "manifest.json").write_text(content)
    assert "manifest.json is damaged" in problems(folder)[0]
    assert find_checkpoint(str(tmp_path), None, None) == str(older) and "skipping" in caplog.text


@pytest.mark.parametrize("damaged", ["{", '{"format_version": 2}', None], ids=["no JSON", "other content", "missing"])
def test_a_damaged_configuration_of_the_newest_checkpoint_is_no_reason_to_end(tmp_path, caplog, damaged):
    older, folder = (make_checkpoint(tmp_path, step) for step in (2, 4))
    config = prepare_qat(make_llama(layers=1), {nn.Linear: "MXFP4"}).qat_config
    for each in (older, folder):
        config.save(each)
        write_manifest(each, describe(each))
    assert check_resumable(str(tmp_path), None, config) == str(folder)
    path = folder / "qat_config.json"
    path.write_text(damaged) if damaged else path.unlink()
    assert check_resumable(str(tmp_path), None, config) is None
    assert find_checkpoint(str(tmp_path), None, config) == str(older) and "skipping" in caplog.text
    said = "qat_config.json" if damaged else "a run without quantization"
    with pytest.raises(UserError, match=said):  # that one was asked for
        check_resumable(str(tmp_path), str(folder), config)


def test_a_manifest_that_leaves_out_what_resuming_reads_is_not_complete_and_other_files_may_lie_there(tmp_path):
    folder = make_checkpoint(tmp_path, 2)
    (folder / "notes.txt").write_text("somebody else's")
    assert find_checkpoint(str(tmp_path), None, None) == str(folder)
    files = describe(folder)
    write_manifest(folder, {name: entry for name, entry in files.items() if name != "model.safetensors"})
    with pytest.raises(ValueError, match="does not list model.safetensors"):
        find_checkpoint(str(tmp_path), None, None)


def test_what_is_no_file_is_not_read(tmp_path):
    folder = make_checkpoint(tmp_path, 2)
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    assert problems(folder) == ["model.safetensors is not a file"]


def test_the_newest_complete_checkpoint_is_taken_and_the_others_are_named(tmp_path, caplog):
    for step in (4, 8, 12, 16):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-16" / "manifest.json").unlink()
    (tmp_path / "checkpoint-12" / "model.safetensors").write_text("")
    assert find_checkpoint(str(tmp_path), None, None) == str(tmp_path / "checkpoint-8")
    assert "checkpoint-16: it has no manifest.json" in caplog.text
    assert "checkpoint-12: model.safetensors has 0 bytes" in caplog.text
    with pytest.raises(ValueError, match="checkpoint-12.*is not complete: model.safetensors has 0 bytes"):
        find_checkpoint(str(tmp_path), str(tmp_path / "checkpoint-12"), None)


def test_a_run_does_not_start_anew_in_silence_where_no_checkpoint_is_complete(tmp_path):
    (make_checkpoint(tmp_path, 4) / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="none of the 1 checkpoints.*--resume_from_checkpoint False"):
        find_checkpoint(str(tmp_path), None, None)
    assert find_checkpoint(str(tmp_path), "False", None) is None


def test_other_scale_rules_are_refused_naming_both_sides(tmp_path):
    folder = make_checkpoint(tmp_path, 4)
    configs = [
        QATConfig({"Linear": "MXFP4"}, scale_rules={"MXFP4": {"weight": r, "input": "even"}})
        for r in ("floor", "search")
    ]
    configs[0].save(folder)
    write_manifest(folder, describe(folder))
    with pytest.raises(ValueError, match="weights floor, inputs even.*this run is .*weights search, inputs even"):
        find_checkpoint(str(tmp_path), None, configs[1])


def test_rotation_keeps_the_newest_the_best_and_at_most_the_limit(tmp_path):
    folders = [make_checkpoint(tmp_path, step) for step in (2, 4, 10, 12)]
    for no_limit in (None, 0, -1):  # as in transformers
        delete_older_checkpoints(tmp_path, no_limit, {folders[3]})
        assert checkpoints_in(tmp_path) == folders
    delete_older_checkpoints(tmp_path, 2, {folders[3], folders[0]})
    assert checkpoints_in(tmp_path) == [folders[0], folders[3]]
    delete_older_checkpoints(tmp_path, 1, {folders[3]})
    assert checkpoints_in(tmp_path) == [folders[3]] and len(list(tmp_path.iterdir())) == 1


def test_a_checkpoint_that_cannot_be_deleted_is_logged_and_ends_nothing(tmp_path, caplog, monkeypatch):
    folders = [make_checkpoint(tmp_path, step) for step in (2, 4)]

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    delete_older_checkpoints(tmp_path, 1, {folders[1]})
    assert checkpoints_in(tmp_path) == folders and "checkpoint-2 stays" in caplog.text


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_anywhere_in_a_run_is_one_error_and_leaves_no_half_of_a_result(tmp_path, number):
    with (
        pytest.raises(DiskFullError, match="the disk is full .*--output_dir"),
        OutputFolder(tmp_path, Writers()).held(),
    ):
        (tmp_path / "eval_results.json").write_text('{"eval')
        (tmp_path / "all_results.json").write_text("{}")
        raise OSError(number, os.strerror(number))
    assert [path.name for path in tmp_path.iterdir()] == ["all_results.json"]


def test_what_killed_runs_left_is_cleared_and_what_they_were_replacing_is_given_back(tmp_path):
    make_checkpoint(tmp_path, 4).rename(tmp_path / ".checkpoint-4.replaced")
    for name in (".checkpoint-6.partial", ".checkpoint-2.deleted", ".model.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / "all_results.json").write_text('{"eval')
    with OutputFolder(tmp_path, Writers()).held():
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
    assert find_checkpoint(str(tmp_path), None, None) == str(tmp_path / "checkpoint-4")


def test_a_model_replaces_another_whole_or_not_at_all(tmp_path):
    for name in ("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "qat_config.json"):
        (tmp_path / name).write_text("old")
    make_checkpoint(tmp_path, 4)
    old = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(ZeroDivisionError), model_written_whole(tmp_path, True) as aside:
        (aside / "config.json").write_text("new")
        raise ZeroDivisionError
    assert {path.name for path in tmp_path.iterdir()} == old and (tmp_path / "config.json").read_text() == "old"
    with model_written_whole(tmp_path, True) as aside:
        for name in ("config.json", "model.safetensors"):
            (aside / name).write_text("new")
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "checkpoint-4"}
    assert (tmp_path / "config.json").read_text() == "new"


def test_a_model_whose_saved_files_lack_a_tensor_is_not_said_to_be_saved(tmp_path):
    model = make_llama()
    trainer = make_trainer(tmp_path, model, make_data(tmp_path), None)
    trainer.save_model()
    assert (tmp_path / "out" / "config.json").is_file()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    model._keys_to_ignore_on_save = {"model.norm.weight"}  # what transformers does not write
    with pytest.raises(
        UserError, match="the model was not saved.* lacks 1 tensors of LlamaForCausalLM, e.g. model.norm"
    ):
        trainer.save_model()
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def make_record(
    folder: Path, count: int = 40, samples_per_step: int = 4, data=None, learning=None, model=None, **kwargs
) -> RunRecord:
    path = write_conversations(folder / f"{count}.jsonl", count)
    dataset = make_supervised_data_module(str(path), make_tokenizer(), eval_size=4)["train_dataset"]
    args = TrainingArguments(str(folder / "out"), use_cpu=True, report_to="none", **kwargs)
    return RunRecord.of(args, dataset, samples_per_step, 9, data or {"dataset": "a"}, learning or {}, model)


def test_other_data_another_batch_or_another_seed_is_refused_by_name(tmp_path, caplog):
    record = make_record(tmp_path)
    record.save(tmp_path, {"tr_loss": [0.5]})
    assert record.check(tmp_path) == {"tr_loss": [0.5]}
    for other, message in (
        (make_record(tmp_path, seed=7), "seed: 42 in the checkpoint, 7 now"),
        (make_record(tmp_path, samples_per_step=8), "samples per step: 4 in the checkpoint, 8 now"),
        (make_record(tmp_path, data={"dataset": "b"}), "dataset: 'a' in the checkpoint, 'b' now"),
        (make_record(tmp_path, count=41), "training data: '36 samples, checksum"),
    ):
        with pytest.raises(ValueError, match=message):
            other.check(tmp_path)
        other.check(tmp_path, ignore_data_skip=True)
        assert message in caplog.text


CONFIG = {"rope_parameters": {"rope_theta": 1e4}, "attention_dropout": 0.0, "_name_or_path": "a", "dtype": "bfloat16"}
BEGAN = {"model": model_settings(CONFIG, "f1"), "learning": {"smooth_alpha": 0.5, "model_name_or_path": "M"}}
OTHER_START = {
    "configuration rope_parameters.rope_theta: 10000.0 in the checkpoint, 5000.0 now.*--model_name_or_path 'M'": {
        "model": model_settings({**CONFIG, "rope_parameters": {"rope_theta": 5e3}}, "f1")
    },
    "configuration attention_dropout: 0.0 in the checkpoint, 0.1 now": {
        "model": model_settings({**CONFIG, "attention_dropout": 0.1}, "f1")
    },
    "weights, fingerprint: 'f1' in the checkpoint, 'f2' now": {"model": model_settings(CONFIG, "f2")},
    "--smooth_alpha 0.5, and this run has 0.0": {"learning": {"smooth_alpha": 0.0}},
    "--optim adamw_torch_fused, and this run has adafactor": {"optim": "adafactor"},
    "--optim adamw_torch_fused, and this run has torch.optim.sgd.SGD": {"learning": {"optim": "torch.optim.sgd.SGD"}},
}


@pytest.mark.parametrize("message", OTHER_START)
def test_another_model_another_kind_of_optimizer_and_other_smoothing_are_refused(tmp_path, message):
    make_record(tmp_path, **BEGAN).save(tmp_path, {})
    other = make_record(tmp_path, **{**BEGAN, **OTHER_START[message]})
    for ignore_data_skip in (False, True):
        with pytest.raises(ValueError, match=message):
            other.check(tmp_path, ignore_data_skip)


def test_a_copy_of_the_model_and_a_record_without_one_are_accepted(tmp_path, caplog):
    make_record(tmp_path, **BEGAN).save(tmp_path, {})
    copy = model_settings({**CONFIG, "_name_or_path": "b", "dtype": "float32"}, "f1")
    learning = {"smooth_alpha": 0.5, "model_name_or_path": "N"}
    make_record(tmp_path, model=copy, learning=learning, optim="adamw_torch").check(tmp_path)
    assert "another model_name_or_path: 'M' in the checkpoint, 'N' now" in caplog.text and "optim:" in caplog.text
    content = json.loads((tmp_path / "run.json").read_text())
    del content["model"], content["learning"]["smooth_alpha"]  # of an earlier version of this program
    (tmp_path / "run.json").write_text(json.dumps(content))
    make_record(tmp_path, **BEGAN).check(tmp_path)
    make_record(tmp_path, model=model_settings(CONFIG, None)).check(tmp_path)  # of a process without weights


@pytest.mark.parametrize("content", ["", "[]", "{}", "[" * 100_000, '{"order": 1, "learning": {}, "processes": 1}'])
def test_a_damaged_record_is_an_error_with_its_name(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match="run.json is damaged"):
        make_record(tmp_path).check(tmp_path)


def test_what_else_is_learned_is_said_by_name(tmp_path, caplog):
    make_record(tmp_path).save(tmp_path, {})
    make_record(tmp_path, learning_rate=0.5, max_steps=7, label_smoothing_factor=0.3, neftune_noise_alpha=5.0).check(
        tmp_path
    )
    assert "label_smoothing_factor: 0.0 in the checkpoint, 0.3 now" in caplog.text
    assert "neftune_noise_alpha: None in the checkpoint, 5.0 now" in caplog.text
    assert "learning_rate: 5e-05 in the checkpoint, 0.5 now (the optimizer's state keeps" in caplog.text
    assert "max_steps: -1 in the checkpoint, 7 now" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        make_record(tmp_path).check(tmp_path)
    assert not caplog.text


def test_the_order_of_samples_depends_on_seed_and_epoch_alone():
    lengths = [i * 7 % 50 for i in range(400)]
    for kwargs in ({}, {"lengths": lengths, "group": 4}):
        one, other = EpochSampler(400, 3, **kwargs), EpochSampler(400, 3, **kwargs)
        first, _ = list(one), torch.rand(5)
        one.set_epoch(2)
        other.set_epoch(2)
        assert list(one) == list(other) != first and sorted(first) == list(range(400))
        assert first != list(EpochSampler(400, 4, **kwargs))
    groups = [[lengths[i] for i in first[start : start + 4]] for start in range(0, 400, 4)]
    assert sum(max(group) - min(group) for group in groups) / 100 < 5  # of lengths up to 50
