"""The tensors of a packed folder from those of its source, several at a time, on a GPU or the CPU.

Each tensor is read, quantized and written by one thread (pipeline.py) while others do the same with other tensors, so
disk, memory and device work at once, and only as many tensors as there are threads are in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from ..errors import UserError
from ..layers.rounding import Rounding
from ..numerics import ops
from ..numerics.families import family_of
from ..numerics.formats import Format, Quantized
from ..schemes.spec import VIEW_DTYPE, TensorSpec
from .dialects import Dialect
from .fit import check_finite
from .folder import INDEX_NAME, SINGLE_NAME, CheckpointFolder
from .matrices import Matrix
from .pipeline import CPU, in_parallel, one_at_a_time
from .shard_writer import ShardWriter
from .staging import to_device
from .tensor_scales import added_tensors, weight_divisors

_SLAB_VALUES = 1 << 22  # quantized at a time where there are no kernels; bounds the FP32 temporaries
_WEIGHT = ".weight"


@dataclass
class Packing:
    """The tensors of a checkpoint, being packed into a folder.

    Args:
        checkpoint: the source.
        matrices: what is quantized, by stored tensor, see `matrices_of`.
        dialect: of the packed folder.
        scales: calibrated ones, by their names in the packed folder, see `stored_scales`.
        device: that the weights are quantized on.
    """

    checkpoint: CheckpointFolder
    matrices: Mapping[str, list[Matrix]]
    dialect: Dialect
    scales: Mapping[str, float]
    device: torch.device = CPU
    _divisors: dict[str, torch.Tensor] = field(init=False, default_factory=dict)
    _weight_map: dict[str, str] = field(init=False, default_factory=dict)
    _writers: list[ShardWriter] = field(init=False, default_factory=list)

    def write(self, folder: Path) -> int:
        """Write one packed file for each file of the source, and their index; returns the bytes of all tensors.

        Raises:
            UserError: a tensor holds NaN or infinity.
            OSError: the disk is full.
        """
        checkpoint = self.checkpoint
        self._divisors = weight_divisors(checkpoint, self.matrices, self.device)
        size = checkpoint.size_bytes
        try:
            with tqdm(total=size, unit="B", unit_scale=True, unit_divisor=1024, desc="Packing") as progress:
                for nbytes in in_parallel(self._pack, self._jobs(folder), self.device):
                    progress.update(nbytes)
        finally:
            for writer in self._writers:
                writer.abandon()
        assert not any(writer.places for writer in self._writers), "a tensor was not written"
        total_bytes = sum(writer.nbytes for writer in self._writers)
        if list(checkpoint.shards) != [SINGLE_NAME]:  # a single file may have another name, and an index
            index = {"metadata": {"total_size": total_bytes}, "weight_map": self._weight_map}
            (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return total_bytes

    def _jobs(self, folder: Path) -> Iterator[tuple[ShardWriter, str, torch.Tensor]]:
        """Each stored tensor, memory-mapped, with the file that it goes to."""
        added = added_tensors(self.checkpoint, self.scales, self.matrices)
        for file in self.checkpoint.shards:
            expected = dict(added[file])
            for name, tensor in self.checkpoint.tensors(file):
                expected |= self._expected(name, tensor)
            writer = ShardWriter(folder / file, expected)
            self._writers.append(writer)
            self._weight_map |= dict.fromkeys(expected, file)
            for name, tensor in added[file].items():
                writer.put(name, tensor)
            for name, tensor in self.checkpoint.tensors(file):
                yield writer, name, tensor

    def _expected(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Tensors without values, of the dtypes and shapes that a stored tensor becomes."""
        empty = torch.empty_like(tensor, device="meta")
        if name not in self.matrices:
            return {name: empty.to(exported_dtype(tensor, self.checkpoint.config))}
        found: dict[str, torch.Tensor] = {}
        for matrix in self.matrices[name]:
            quantized = _without_values(matrix.values(empty).shape, matrix.spec.format)
            found |= self._tensors(matrix, quantized)
        return found

    def _pack(self, job: tuple[ShardWriter, str, torch.Tensor]) -> int:
        """Write what a stored tensor becomes; returns its own bytes."""
        writer, name, tensor = job
        if name not in self.matrices:
            check_finite([(name, tensor)], self.checkpoint.path)
            writer.put(name, tensor.to(exported_dtype(tensor, self.checkpoint.config)))
            return tensor.nbytes
        held = to_device(tensor, self.device)
        for matrix in self.matrices[name]:
            quantized = self._quantize(matrix, matrix.values(held))
            for own, packed in self._tensors(matrix, quantized).items():
                writer.put(own, packed)
        return tensor.nbytes

    def _quantize(self, matrix: Matrix, weight: torch.Tensor) -> Quantized:
        fmt, rounding = matrix.spec.format, matrix.site.module.weight_quantizer.rounding
        with one_at_a_time(self.device):
            quantized = pack_weight(weight.contiguous(), matrix.spec, self._divisors.get(matrix.name), rounding)
        if broken := int(family_of(fmt).broken_blocks(quantized, fmt)):
            raise UserError(
                f"{matrix.name}{_WEIGHT} holds NaN or infinity in {broken} blocks; did the training diverge?"
            )
        return quantized

    def _tensors(self, matrix: Matrix, quantized: Quantized) -> dict[str, torch.Tensor]:
        """The tensors of a matrix by their names in the file."""
        spec = matrix.spec
        if matrix.is_fused:
            experts = (matrix.site.weight.shape[0], -1)
            scales = tuple(scale.unflatten(0, experts) for scale in quantized.scales)
            quantized = Quantized(quantized.codes.unflatten(0, experts), scales)
        names, tensors = self.dialect.tensor_names(matrix.name, spec), self.dialect.tensors(quantized, spec)
        return dict(zip(names, tensors, strict=True))


def pack_weight(
    weight: torch.Tensor, spec: TensorSpec, divisor: torch.Tensor | None = None, rounding: Rounding | None = None
) -> Quantized:
    """Codes and scales of a weight [N, K] of any float dtype, on its device; its BF16 view is quantized.

    Args:
        divisor: FP32 [1], in formats with a tensor scale; default: that of this weight.
        rounding: of a layer; default: that of the spec.
    """
    rounding = rounding or Rounding(spec)
    if divisor is None and spec.format.tensor_scale is not None:
        divisor = ops.tensor_divisor([weight], spec.format.name, VIEW_DTYPE)
    step = weight.shape[0] if ops.has_kernels(weight, spec.format.name) else max(1, _SLAB_VALUES // weight.shape[1])
    slabs = [rounding.quantize(slab, VIEW_DTYPE, divisor=divisor) for slab in weight.split(step)]
    if len(slabs) == 1:
        return slabs[0]
    codes = torch.cat([slab.codes for slab in slabs])
    block_scales = torch.cat([slab.scales[0] for slab in slabs])
    return Quantized(codes, (block_scales, *slabs[0].scales[1:]))  # the rest is of the whole tensor


def exported_dtype(tensor: torch.Tensor, config: dict) -> torch.dtype:
    """The dtype that an unquantized tensor is exported in: its own, but BF16 for the main dtype of a wider model."""
    main = config.get("dtype") or config.get("torch_dtype") or "float32"
    return VIEW_DTYPE if tensor.dtype == getattr(torch, main) and tensor.is_floating_point() else tensor.dtype


def _without_values(shape: torch.Size, fmt: Format) -> Quantized:
    codes = torch.empty(fmt.code_shape(shape), dtype=torch.uint8, device="meta")
    scales = [torch.empty(fmt.scale_shape(shape), dtype=fmt.scale.storage, device="meta")]
    if fmt.tensor_scale is not None:
        scales.append(torch.empty(1, dtype=torch.float32, device="meta"))
    return Quantized(codes, tuple(scales))
