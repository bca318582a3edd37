"""What a run's record holds of a stream, and of generic text that a recipe has now and the run had not."""

from __future__ import annotations

from types import SimpleNamespace

import datasets
import pytest

from training.resume.run_record import RunRecord


def record(files: int, processes: int, workers: int) -> RunRecord:
    stream = datasets.Dataset.from_dict({"x": range(12)}).to_iterable_dataset(num_shards=files)
    return RunRecord.of(SimpleNamespace(world_size=processes, dataloader_num_workers=workers), stream, 4, None)


@pytest.mark.parametrize("files,processes,workers", [(1, 2, 3), (3, 1, 1), (4, 8, 0)])
def test_where_all_processes_read_all_files_a_stream_is_the_same(files, processes, workers):
    assert record(files, processes, workers).order == record(files, 1, 0).order


@pytest.mark.parametrize("processes,workers", [(2, 0), (1, 2)])
def test_processes_and_workers_that_share_files_change_the_order_of_a_stream(tmp_path, processes, workers):
    record(3, 1, 0).save(tmp_path, {})
    with pytest.raises(ValueError, match="that share the files: 1 in the checkpoint, 2 now"):
        record(3, processes, workers).check(tmp_path)


@pytest.mark.parametrize("began_with,remedy", [(None, True), ("book.txt", False)])
def test_a_run_that_began_without_generic_text_is_told_how_to_resume_without(tmp_path, began_with, remedy):
    args, rows = SimpleNamespace(world_size=1), datasets.Dataset.from_dict({"input_ids": [[1]], "labels": [[1]]})
    before, now = (RunRecord.of(args, rows, 4, 1, {"distill_generic": name}) for name in (began_with, "teacher:2000"))
    before.save(tmp_path, {})
    with pytest.raises(ValueError, match="distill_generic: .* in the checkpoint, 'teacher:2000' now") as refused:
        now.check(tmp_path)
    assert ("--distill_generic none: the run began without" in str(refused.value)) == remedy
