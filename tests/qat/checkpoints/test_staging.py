"""Copies to and from a GPU through a buffer that is smaller than what is copied."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from qat.checkpoints import staging

SHAPES = [(), (0,), (1,), (63,), (7, 1001), (3, 5, 64)]
DTYPES = [torch.float32, torch.bfloat16, torch.uint8, torch.float8_e4m3fn, torch.int64]


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    random = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return random.view(dtype).view(shape)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return b"".join(bytes(piece) for piece in staging.pieces(tensor))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_pieces_of_a_tensor_are_its_bytes(shape, dtype):
    tensor = values(shape, dtype)
    assert bytes_of(tensor) == tensor.flatten().view(torch.uint8).numpy().tobytes()


def test_a_transposed_tensor_is_written_in_the_order_of_its_elements():
    tensor = values((5, 3), torch.float32).t()
    assert bytes_of(tensor) == tensor.contiguous().numpy().tobytes()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_goes_to_a_gpu_and_comes_back_is_the_same_from_every_thread_and_stream(monkeypatch):
    monkeypatch.setattr(staging, "_BYTES", 1000)
    device = torch.device("cuda", torch.cuda.current_device())

    def there_and_back(seed: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream(device)):
            tensors = [values(shape, dtype, seed) for shape in SHAPES for dtype in DTYPES]
            return all(bytes_of(staging.to_device(tensor, device)) == bytes_of(tensor) for tensor in tensors)

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(there_and_back, range(48)))


def test_pinned_memory_is_counted_by_powers_of_two_and_twice_for_each_size():
    on_gpu = [SimpleNamespace(nbytes=nbytes, is_cuda=True) for nbytes in (4, 4, 3, 5, 8, 1 << 20, 0)]
    assert staging.pinned_bytes([*on_gpu, torch.zeros(1000)]) == 2 * (4 + 8 + (1 << 20))
    assert staging.pinned_bytes([torch.zeros(1000)]) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_pinned_memory_stays_once_it_is_freed():
    device = torch.device("cuda", torch.cuda.current_device())
    staging.free_pinned(device)
    before = torch.cuda.host_memory_stats()["allocated_bytes.current"]  # buffers that threads keep
    held = torch.empty(1 << 20, pin_memory=True)
    assert torch.cuda.host_memory_stats()["allocated_bytes.current"] >= before + held.nbytes
    del held
    staging.free_pinned(device)
    assert torch.cuda.host_memory_stats()["allocated_bytes.current"] == before
