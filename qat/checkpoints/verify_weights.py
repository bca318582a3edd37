"""Compare the tensors of a packed folder with those of its source, read by the compressed-tensors library.

That library unpacks codes and scales with code of its own, so a mistake in our packing cannot hide in our unpacking.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tqdm import tqdm

from ..numerics import ops
from ..numerics.formats import BLOCK_SIZE
from ..schemes.spec import LayerScheme
from .folder import CheckpointFolder
from .pack import VIEW_DTYPE, exported_dtype, packed_name

_CT_FORMATS = {4: "mxfp4-pack-quantized", 8: "mxfp8-quantized"}


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
    packed: CheckpointFolder, checkpoint: CheckpointFolder, layers: dict[str, LayerScheme]
) -> WeightCount:
    """Compare all tensors of `packed` with what `checkpoint` says they must be."""
    count, held, by_weight = WeightCount(), packed.names, {f"{name}.weight": name for name in layers}
    wanted = {
        name
        for key in checkpoint.names
        for name in (_packed_names(by_weight[key], layers[by_weight[key]]) if key in by_weight else (key,))
    }
    for name in sorted(wanted ^ held):
        count.note(f"{name} ({'missing' if name in wanted else 'not expected'})", 1)
    with tqdm(total=checkpoint.size_bytes, unit="B", unit_scale=True, unit_divisor=1024, desc="Verifying") as progress:
        for file in checkpoint.shards:
            for name, tensor in checkpoint.tensors(file):
                layer = by_weight.get(name)
                needed = _packed_names(layer, layers[layer]) if layer else (name,)
                if held.issuperset(needed):
                    _compare(count, name, tensor, packed.read(*needed), layer and layers[layer], checkpoint.config)
                progress.update(tensor.nbytes)
    return count


def _compare(count: WeightCount, name, source, tensors, scheme: LayerScheme | None, config: dict) -> None:
    if scheme is None:
        expected, found = source.to(exported_dtype(source, config)), tensors[0]
        count.other_tensors += 1
    else:
        weight = scheme.weight
        expected = ops.fake_quantize(source, weight.format_name, weight.scale_rule, VIEW_DTYPE)
        found = decompress(tensors[0], tensors[1], weight.bits)
        count.packed_weights += 1
        count.elements_compared += expected.numel()
        count.packed_bytes += sum(tensor.nbytes for tensor in tensors)
    if found.shape != expected.shape or found.dtype != expected.dtype:
        count.note(name, expected.numel())
    else:
        count.note(name, int((found != expected).sum()))


def decompress(codes: torch.Tensor, scale_e8m0_biased: torch.Tensor, bits: int) -> torch.Tensor:
    """Packed weight -> BF16 [N, K], by the compressed-tensors library.

    Raises:
        ImportError: compressed-tensors is not installed.
    """
    try:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    except ImportError as error:
        raise ImportError("verification needs a library: pip install compressed-tensors") from error
    args = QuantizationArgs(
        num_bits=bits, type="float", strategy="group", group_size=BLOCK_SIZE, symmetric=True, dynamic=False,
        scale_dtype=torch.uint8, zp_dtype=torch.uint8,
    )  # fmt: skip
    compressor = BaseCompressor.get_value_from_registry(_CT_FORMATS[bits])
    tensors = {"weight_packed" if bits == 4 else "weight": codes, "weight_scale": scale_e8m0_biased}
    weight = compressor.decompress(tensors, QuantizationScheme(targets=["Linear"], weights=args))["weight"]
    return weight.to(VIEW_DTYPE)


def _packed_names(layer: str, scheme: LayerScheme) -> tuple[str, str]:
    return packed_name(layer, scheme.weight), f"{layer}.weight_scale"
