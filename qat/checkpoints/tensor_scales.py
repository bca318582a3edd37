"""Scales of whole tensors: those of weights, shared by layers that engines fuse, and those that were calibrated.

A format with a second level of scales (NVFP4) has a divisor for each weight, and one for each input. Engines fuse
layers such as q, k and v into one matrix with one divisor, so these share theirs, in training and here. Their weights
may lie in different shards, and are read a group at a time, memory-mapped.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..errors import UserError
from ..layers.calibration import DIVISOR
from ..layers.sites import Site
from ..numerics import ops
from ..schemes.spec import VIEW_DTYPE
from .folder import CheckpointFolder
from .input_transforms import stored_matrices
from .matrices import Matrix, by_divisor
from .pipeline import CPU, in_parallel
from .staging import to_device
from .stored_names import StoredNames


def weight_divisors(
    checkpoint: CheckpointFolder,
    matrices: Mapping[str, list[Matrix]],
    device: torch.device = CPU,
) -> dict[str, torch.Tensor]:
    """The divisors of weights in formats with a tensor scale, FP32 [1], by the names of the matrices.

    Layers that engines fuse share one, and gate and up of one expert; each expert has its own.

    Args:
        device: that computes them, and that they are on.
    """
    groups = [group for group in by_divisor(matrices) if group[0].spec.format.tensor_scale is not None]
    with checkpoint.reading() as read:
        stored = ([read(matrix.stored) for matrix in group] for group in groups)

        def divisor_of(job: tuple[list[Matrix], list[torch.Tensor]]) -> torch.Tensor:
            values = [matrix.values(to_device(tensor, device)) for matrix, tensor in zip(*job, strict=True)]
            return ops.tensor_divisor(values, job[0][0].spec.format.name, VIEW_DTYPE)

        found = in_parallel(divisor_of, zip(groups, stored, strict=True), device)
        return {matrix.name: divisor for group, divisor in zip(groups, found, strict=True) for matrix in group}


def check_calibrated(sites: list[Site]) -> None:
    """Refuse inputs that are quantized under a calibrated scale which they do not have, or share with fused layers.

    Raises:
        UserError: there is one; the message names its layer.
    """
    for site in sites:
        if not site.module.input_quantizer.needs_divisor:
            continue
        fused = (layer.input_quantizer for layer in site.module.fused_with)  # some may quantize weights only
        quantizers = [quantizer for quantizer in fused if quantizer.needs_divisor]
        if any(quantizer.divisor is None for quantizer in quantizers):
            raise UserError(
                f"{site.label} is in {site.scheme.name}, whose inputs need a calibrated scale, and has none; give "
                "--dataset to scripts/export.py (calibrated_scales to export_checkpoint), or choose a weight-only "
                "scheme such as NVFP4A16"
            )
        divisors = {float(quantizer.divisor) for quantizer in quantizers}
        if len(divisors) > 1:
            raise UserError(
                f"{site.label} and the layers that engines fuse with it have different scales for the same input "
                f"({', '.join(map(str, sorted(divisors)))}); calibrate again"
            )


def stored_scales(
    scales: Mapping[str, float], matrices: Mapping[str, list[Matrix]], names: StoredNames
) -> dict[str, float]:
    """Calibrated scales by their names in the packed folder: that of an input once for each matrix that reads it."""
    by_site: dict[str, list[str]] = {}
    for matrix in (matrix for held in matrices.values() for matrix in held):
        by_site.setdefault(matrix.site.label, []).append(matrix.name)
    stored: dict[str, float] = {}
    for name, value in scales.items():
        module, _, scale = name.rpartition(".")
        layers = by_site.get(module) if scale == DIVISOR else None
        stored |= dict.fromkeys([f"{layer}.{scale}" for layer in layers or [names.published(module)]], value)
    return stored


def added_tensors(
    checkpoint: CheckpointFolder, scales: Mapping[str, float], matrices: Mapping[str, list[Matrix]]
) -> dict[str, dict[str, torch.Tensor]]:
    """What a packed folder has beside its weights, by file and name: each beside the first tensor of its module.

    Calibrated scales are FP32 [1]; matrices of transforms are BF16 [32, 32].

    Args:
        scales: by their names in the packed folder, see `stored_scales`.
        matrices: by stored tensor, see `matrices_of`.
    """
    added = {name: torch.tensor([value], dtype=torch.float32) for name, value in scales.items()}
    added |= stored_matrices(matrices)
    files: dict[str, str] = {}
    for file, names in checkpoint.shards.items():
        for name in names:
            while name := name.rpartition(".")[0]:
                files.setdefault(name, file)
    placed: dict[str, dict[str, torch.Tensor]] = {file: {} for file in checkpoint.shards}
    first = next(iter(checkpoint.shards))
    for name, tensor in added.items():
        module = name.rpartition(".")[0]
        while module and module not in files:
            module = module.rpartition(".")[0]
        placed[files.get(module, first)][name] = tensor
    return placed
