"""Compare the tensors of a packed folder with those of its source, read by the compressed-tensors library.

That library unpacks codes and scales with code of its own, so a mistake in our packing cannot hide in our unpacking.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from tqdm import tqdm

from ..schemes.spec import VIEW_DTYPE
from .dialects import Dialect
from .dialects.compressed_tensors import WEIGHT_DIVISOR, WEIGHT_SHAPE
from .folder import CheckpointFolder, Reader
from .matrices import Matrix
from .pack_tensors import exported_dtype
from .pipeline import CPU, in_parallel, one_at_a_time
from .staging import to_device
from .tensor_scales import added_tensors, weight_divisors


@dataclass
class WeightCount:
    """What was compared, and what differed."""

    packed_weights: int = 0
    elements_compared: int = 0
    elements_that_differ: int = 0
    other_tensors: int = 0
    packed_bytes: int = 0
    first_difference: str | None = None

    def note(self, name: str, differ: int) -> None:
        """Add `differ` differing elements of tensor `name`."""
        self.elements_that_differ += differ
        if differ and self.first_difference is None:
            self.first_difference = name


def compare_weights(
    packed: CheckpointFolder,
    checkpoint: CheckpointFolder,
    matrices: Mapping[str, list[Matrix]],
    dialect: Dialect,
    scales: Mapping[str, float],
    device: torch.device = CPU,
) -> WeightCount:
    """Compare all tensors of `packed` with those expected from `checkpoint` and the calibrated scales.

    Args:
        matrices: by stored tensor, see `matrices_of`.
        scales: by their names in the packed folder, see `stored_scales`.
        device: that decompresses and compares.
    """
    count, held = WeightCount(), packed.names
    divisors = weight_divisors(checkpoint, matrices, device)
    calibrated = {
        name: tensor
        for together in added_tensors(checkpoint, scales, matrices).values()
        for name, tensor in together.items()
    }

    def names_of(matrix: Matrix) -> tuple[str, ...]:
        return dialect.tensor_names(matrix.name, matrix.spec)

    wanted = (checkpoint.names - set(matrices)) | set(calibrated)
    wanted |= {name for together in matrices.values() for matrix in together for name in names_of(matrix)}
    for name in sorted(wanted ^ held):
        count.note(f"{name} ({'missing' if name in wanted else 'not expected'})", 1)
    for name in sorted(held & set(calibrated)):
        count.other_tensors += 1
        count.note(name, int(_different(packed.read(name)[0], calibrated[name])))

    def jobs(read: Reader) -> Iterator[_Job]:
        for file in checkpoint.shards:
            for name, source in checkpoint.tensors(file):
                complete = [m for m in matrices.get(name, ()) if held.issuperset(names_of(m))]
                found = {m.name: [read(own) for own in names_of(m)] for m in complete}
                is_plain = name in held and name not in matrices and name not in calibrated
                yield _Job(name, source, complete, found, read(name) if is_plain else None)

    def compare(job: _Job) -> list[_Compared]:
        if job.plain is not None:
            expected = to_device(job.source, device).to(exported_dtype(job.source, checkpoint.config))
            return [_Compared(job.name, _different(to_device(job.plain, device), expected))]
        source = to_device(job.source, device) if job.matrices else job.source
        return [
            compared
            for matrix in job.matrices
            for compared in _compare_matrix(matrix, matrix.values(source), job.found[matrix.name], dialect, divisors)
        ]

    compared: list[_Compared] = []
    size = checkpoint.size_bytes
    with (
        packed.reading() as read,
        tqdm(total=size, unit="B", unit_scale=True, unit_divisor=1024, desc="Verifying") as progress,
    ):
        started: deque[_Job] = deque()
        for result in in_parallel(compare, _remembered(jobs(read), started), device):
            job = started.popleft()
            count.other_tensors += job.plain is not None
            count.packed_weights += len(job.matrices)
            count.packed_bytes += sum(tensor.nbytes for found in job.found.values() for tensor in found)
            count.elements_compared += sum(c.elements for c in result if c.is_weight)
            compared += result
            progress.update(job.source.nbytes)
    # Counted on the device, and waited for once.
    for name, differ in zip((c.name for c in compared), _values([c.differ for c in compared]), strict=True):
        count.note(name, differ)
    return count


@dataclass(frozen=True)
class _Job:
    """A stored tensor of the source, the complete matrices in it, what is found of each, and of an unpacked one."""

    name: str
    source: torch.Tensor
    matrices: list[Matrix]
    found: Mapping[str, list[torch.Tensor]]
    plain: torch.Tensor | None


@dataclass(frozen=True)
class _Compared:
    """How many elements of a tensor differ, int64 [], on the device; `elements` of a weight were compared."""

    name: str
    differ: torch.Tensor
    is_weight: bool = False
    elements: int = 0


def _compare_matrix(
    matrix: Matrix,
    source: torch.Tensor,
    tensors: list[torch.Tensor],
    dialect: Dialect,
    divisors: Mapping[str, torch.Tensor],
) -> Iterator[_Compared]:
    spec, divisor = matrix.spec, divisors.get(matrix.name)
    rounding = matrix.site.module.weight_quantizer.rounding
    with one_at_a_time(source.device):
        expected = rounding.values(source.contiguous(), VIEW_DTYPE, divisor=divisor)
    held = [to_device(tensor, source.device) for tensor in tensors]
    for name, tensor in zip(dialect.tensor_names(matrix.name, spec), held, strict=True):
        if name.endswith(WEIGHT_DIVISOR):  # engines that fuse layers need the very same one
            yield _Compared(name, _different(tensor, cast(torch.Tensor, divisor)))
        elif name.endswith(WEIGHT_SHAPE):
            yield _Compared(name, _different(tensor, torch.tensor(source.shape, device=tensor.device)))
    differ = _different(dialect.decompress(held, spec), expected)
    yield _Compared(f"{matrix.name}.weight", differ, True, expected.numel())


def _different(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """How many elements differ, int64 [], on their device: all of them where shape or dtype do."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return torch.tensor(expected.numel())
    return (found != expected).sum()


def _values(counts: list[torch.Tensor]) -> list[int]:
    """Counts on several devices as numbers, each device waited for once."""
    found = [0] * len(counts)
    for device in {count.device for count in counts}:
        places = [i for i, count in enumerate(counts) if count.device == device]
        for i, value in zip(places, torch.stack([counts[i] for i in places]).tolist(), strict=True):
            found[i] = value
    return found


def _remembered(jobs: Iterator[_Job], started: deque[_Job]) -> Iterator[_Job]:
    """The jobs, each kept in `started` when it is taken."""
    for job in jobs:
        started.append(job)
        yield job
