"""ShardWriter: files that safetensors reads, written in any order; and the order of a pipeline's results."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from safetensors.torch import load_file

from qat.checkpoints import shard_writer
from qat.checkpoints.pipeline import CPU, in_parallel
from qat.checkpoints.shard_writer import ShardWriter

TENSORS = {
    "a.codes": torch.arange(7, dtype=torch.uint8),
    "b.weight": torch.linspace(-3, 3, 15).bfloat16().view(3, 5),
    "c.shape": torch.tensor([3, 5]),
    "d.divisor": torch.tensor([0.125]),
    "e.elements": torch.linspace(-9, 9, 6).to(torch.float8_e4m3fn).view(2, 3),
    "f.empty": torch.zeros(0, 4),
    "g.scalar": torch.tensor(2.5),
    "h.rows": torch.arange(12, dtype=torch.int32).view(3, 4).T,
    "ä.mask": torch.tensor([True, False]),
}


@pytest.mark.parametrize("order", [1, -1])
def test_safetensors_reads_what_was_put_in_any_order(tmp_path, order):
    path = tmp_path / "model.safetensors"
    writer = ShardWriter(path, {name: torch.empty_like(tensor, device="meta") for name, tensor in TENSORS.items()})
    for name, tensor in list(TENSORS.items())[::order]:
        writer.put(name, tensor)
    found = load_file(path)
    assert set(found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert path.stat().st_size == writer.begin + writer.nbytes and writer.begin % 8 == 0
    assert writer.nbytes == sum(tensor.nbytes for tensor in TENSORS.values())


def test_a_file_is_flushed_while_it_is_written_and_at_its_end(tmp_path, monkeypatch):
    flushed, flush = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: (flushed.append(os.fstat(descriptor).st_size), flush(descriptor))
    )
    monkeypatch.setattr(shard_writer, "_FLUSH_BYTES", 64)
    tensors = {str(i): torch.full((8,), i, dtype=torch.int64) for i in range(3)}
    writer = ShardWriter(tmp_path / "model.safetensors", tensors)
    for name, tensor in tensors.items():
        writer.put(name, tensor)
    assert flushed == [writer.begin + 64, writer.begin + 128, writer.begin + 192]


def test_a_write_that_the_system_cuts_short_is_continued(tmp_path, monkeypatch):
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, values, offset: write(descriptor, values[:3], offset))
    tensors = {"x": torch.arange(100), "y": torch.arange(9).float()}
    writer = ShardWriter(tmp_path / "model.safetensors", tensors)
    for name, tensor in tensors.items():
        writer.put(name, tensor)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(tmp_path / "model.safetensors").items())


def test_a_tensor_of_another_shape_or_dtype_than_expected_is_not_written(tmp_path):
    writer = ShardWriter(tmp_path / "model.safetensors", {"x": torch.zeros(2)})
    with pytest.raises(AssertionError):
        writer.put("x", torch.zeros(3))
    writer.abandon()


def test_results_come_in_the_order_of_the_items_though_the_first_takes_longest():
    second_is_done = threading.Event()

    def work(item: int) -> int:
        if item == 0:
            assert second_is_done.wait(10)
        else:
            second_is_done.set()
        return item * item

    assert list(in_parallel(work, range(5), CPU, threads=2)) == [0, 1, 4, 9, 16]


def test_few_items_are_taken_ahead_and_none_after_an_error():
    taken = []

    def items():
        for i in range(100):
            taken.append(i)
            yield i

    def work(item: int) -> int:
        if item == 3:
            raise ValueError("the fourth")
        return item

    with pytest.raises(ValueError, match="the fourth"):
        for result in in_parallel(work, items(), CPU, threads=2):
            assert len(taken) <= result + 3
    assert len(taken) <= 7
