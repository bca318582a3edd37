"""Compare the tensors of a packed folder with those of its source, read by the compressed-tensors library.

That library unpacks codes and scales with code of its own, so a mistake in our packing cannot hide in our unpacking.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from tqdm import tqdm

from ..schemes.spec import VIEW_DTYPE
from .dialects import Dialect
from .dialects.compressed_tensors import WEIGHT_DIVISOR, WEIGHT_SHAPE
from .folder import CheckpointFolder
from .matrices import Matrix
from .pack import exported_dtype
from .tensor_scales import calibrated_tensors, weight_divisors


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
) -> WeightCount:
    """Compare all tensors of `packed` with those expected from `checkpoint` and the calibrated scales.

    Args:
        matrices: by stored tensor, see `matrices_of`.
        scales: by their names in the packed folder, see `stored_scales`.
    """
    count, held = WeightCount(), packed.names
    divisors = weight_divisors(checkpoint, matrices)
    calibrated = {
        name: scale for scales in calibrated_tensors(checkpoint, scales).values() for name, scale in scales.items()
    }

    def names_of(matrix: Matrix) -> tuple[str, ...]:
        return dialect.tensor_names(matrix.name, matrix.spec)

    wanted = (checkpoint.names - set(matrices)) | set(calibrated)
    wanted |= {name for together in matrices.values() for matrix in together for name in names_of(matrix)}
    for name in sorted(wanted ^ held):
        count.note(f"{name} ({'missing' if name in wanted else 'not expected'})", 1)
    for name in sorted(held & set(calibrated)):
        count.other_tensors += 1
        _compare(count, name, packed.read(name)[0], calibrated[name])
    size = checkpoint.size_bytes
    with (
        packed.reading() as read,
        tqdm(total=size, unit="B", unit_scale=True, unit_divisor=1024, desc="Verifying") as progress,
    ):
        for file in checkpoint.shards:
            for name, source in checkpoint.tensors(file):
                for matrix in matrices.get(name, ()):
                    if held.issuperset(names_of(matrix)):
                        tensors = [read(own) for own in names_of(matrix)]
                        _compare_matrix(count, matrix, matrix.values(source), tensors, dialect, divisors)
                if name in held and name not in matrices and name not in calibrated:
                    count.other_tensors += 1
                    _compare(count, name, read(name), source.to(exported_dtype(source, checkpoint.config)))
                progress.update(source.nbytes)
    return count


def _compare_matrix(
    count: WeightCount,
    matrix: Matrix,
    source: torch.Tensor,
    tensors: list[torch.Tensor],
    dialect: Dialect,
    divisors: Mapping[str, torch.Tensor],
) -> None:
    spec, divisor = matrix.spec, divisors.get(matrix.name)
    rounding = matrix.site.module.weight_quantizer.rounding
    expected = rounding.values(source.contiguous(), VIEW_DTYPE, divisor=divisor)
    count.packed_weights += 1
    count.elements_compared += expected.numel()
    count.packed_bytes += sum(tensor.nbytes for tensor in tensors)
    for name, tensor in zip(dialect.tensor_names(matrix.name, spec), tensors, strict=True):
        if name.endswith(WEIGHT_DIVISOR):  # engines that fuse layers need the very same one
            _compare(count, name, tensor, cast(torch.Tensor, divisor))
        elif name.endswith(WEIGHT_SHAPE):
            _compare(count, name, tensor, torch.tensor(source.shape))
    _compare(count, f"{matrix.name}.weight", dialect.decompress(tensors, spec), expected)


def _compare(count: WeightCount, name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        count.note(name, expected.numel())
    else:
        count.note(name, int((found != expected).sum()))
