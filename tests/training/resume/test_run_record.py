"""What a run's record holds of a stream."""

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
