"""The bytes of packed weights: some written down by hand, and all of them those of compressed-tensors' compressor."""

from __future__ import annotations

import pytest
import torch

from qat import get_scheme
from qat.checkpoints.dialects.compressed_tensors import CompressedTensors, packed_tensors, quantization_args
from qat.checkpoints.pack_tensors import pack_weight
from qat.numerics.families import get_format
from qat.schemes.spec import TensorSpec

E4M3, I32, BF16 = torch.float8_e4m3fn, torch.int32, torch.bfloat16


def row(*values: float, to: int) -> list[float]:
    """`values`, then zeros."""
    return [*values, *[0.0] * (to - len(values))]


def words(first: int, count: int) -> list[int]:
    """32-bit words of INT4 codes: `first`, then zeros, whose codes are 8."""
    return [word - 2**32 for word in (first, *[0x88888888] * (count - 1))]


FP8_VALUES = (448, -448, 1.0, 1.5, 2.0**-9, -(2.0**-11), 1.0625, 0.9375)  # 1.0625 is a tie between 1 and 1.125
FP8_CODES = [0x7E, 0xFE, 0x38, 0x3C, 0x01, 0x80, 0x38, 0x37]
# Format, rule, rows of the weight, and its tensors in the order of their names, as (dtype, bytes or numbers).
GOLDEN = [
    (
        # The largest is 24 = 1.5 * 2^4, so the scale is 2^(4 - 2), its byte 127 + 2. The values over 4 are .5 -1 6 3,
        # ties that go to the even code (2.5 -> 2, -5 -> -4, .25 -> 0) and -.25, which becomes negative zero.
        "mxfp4", "floor", [row(2, -4, 24, 12, 10, -20, 1, -1, to=32)],
        [(torch.uint8, [0xA1, 0x57, 0xE4, 0x80, *[0] * 12]), (torch.uint8, [129])],
    ),
    (
        "mxfp8", "floor", [row(*FP8_VALUES, to=32)],
        [(E4M3, [*FP8_CODES, *[0] * 24]), (torch.uint8, [127])],
    ),
    (
        # The largest of all is 6, so the divisor is 448. Rows have the scales e4m3(448 * amax / 6): 448, 112, and 0.125
        # for zeros. The second row over 112 / 448 is 6 -3 1 .5.
        "nvfp4", "absmax", [row(6, -6, 0.5, 4, to=16), row(1.5, -0.75, 0.25, 0.125, to=16), row(to=16)],
        [(torch.uint8, [0xF7, 0x61, *[0] * 6, 0xD7, 0x12, *[0] * 14]), (E4M3, [0x7E, 0x6E, 0x20]),
         (torch.float32, [448.0])],
    ),
    (
        # amax / 7.5 = 1; ties to even, 8 ends at 7: 7 -8 1 0 2 0 -1 2, plus 8, the first in the lowest bits.
        "int4_g32", "absmax", [row(7.5, -7.5, 1, 0.5, 1.5, -0.5, -1, 2.5, to=32)],
        [(I32, words(0xA78A890F, 4)), (BF16, [1.0]), (torch.int64, [1, 32])],
    ),
    (
        "int4_g128", "absmax", [row(7.5, -7.5, 1, 0.5, 1.5, -0.5, -1, 2.5, to=128) + row(-15, 14, 2, to=128)],
        [(I32, words(0xA78A890F, 16) + words(0x888889F0, 16)), (BF16, [1.0, 2.0]), (torch.int64, [1, 256])],
    ),
    (
        "fp8_channel", "absmax", [FP8_VALUES, [2 * value for value in FP8_VALUES]],
        [(E4M3, FP8_CODES * 2), (BF16, [1.0, 2.0])],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("fmt", "rule", "rows", "expected"), GOLDEN, ids=[row[0] for row in GOLDEN])
def test_tensors_of_a_weight_written_down_by_hand(fmt, rule, rows, expected):
    spec = TensorSpec(get_format(fmt), rule)
    tensors = packed_tensors(pack_weight(torch.tensor(rows), spec), spec)
    found = [(t.dtype, (t.view(torch.uint8) if t.dtype == E4M3 else t).flatten().tolist()) for t in tensors]
    assert found == expected


def weights() -> torch.Tensor:
    """[24, 256] FP32, each a BF16 number: many magnitudes, zeros, a huge outlier, subnormals, negative zeros."""
    x = torch.randn(24, 256, generator=torch.Generator().manual_seed(2)) * torch.logspace(-6, 3, 24)[:, None]
    x[3], x[4], x[5, 3], x[6], x[7, ::3], x[8, :128], x[9, 1::5] = 0.0, -0.0, 1e5, 1e-39, -0.0, 0.0, -1e-39
    return x.bfloat16().float()


ROWS = [
    ("mxfp4", "even"),
    ("mxfp8", "even"),
    *((n, "absmax") for n in ("nvfp4", "int4_g32", "int4_g128", "fp8_channel")),
]


@pytest.mark.parametrize(("fmt", "rule"), ROWS)
def test_bytes_of_fp32_weights_equal_those_of_the_librarys_compressor(fmt, rule):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    x, spec = weights(), TensorSpec(get_format(fmt), rule)
    x = x + 0.0 if fmt == "mxfp8" else x  # the library keeps the sign of a zero there, and this program does not
    args = QuantizationArgs(**quantization_args(spec.format, dynamic=False))
    blocks = x.unflatten(-1, (-1, spec.format.block or x.shape[-1]))
    divisor = generate_gparam(x.min(), x.max()) if spec.format.tensor_scale else None
    scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, divisor)
    if spec.format.scale.storage == BF16:  # the dtype of the model's weights, which the library keeps scales in
        scale = scale.bfloat16().float()
    state = {"weight": x, "weight_scale": scale} | ({} if divisor is None else {"weight_global_scale": divisor})
    layout = CompressedTensors().config({"a": get_scheme(_scheme_of(fmt))}, [])["format"]
    compressor = BaseCompressor.get_value_from_registry(layout)
    theirs = compressor.compress(state, QuantizationScheme(targets=["Linear"], weights=args))
    names = [name.removeprefix("a.") for name in CompressedTensors().tensor_names("a", spec)]
    ours = dict(zip(names, packed_tensors(pack_weight(x, spec), spec), strict=True))
    assert set(ours) == set(theirs)
    # Blocks of zeros, and of numbers so small that their scale were subnormal, are zero under a scale of ours.
    is_free = (blocks.abs().amax(-1) < 1e-37) & torch.tensor(spec.format.scale.storage == BF16)
    for name, tensor in ours.items():
        expected = theirs[name].to(tensor.dtype)
        assert tensor.shape == expected.shape and (name == "weight_scale" or tensor.dtype == theirs[name].dtype)
        same = tensor.view(torch.uint8) == expected.contiguous().view(torch.uint8)
        if name == names[0]:
            same = same.unflatten(-1, (blocks.shape[1], -1)) | is_free[..., None]
        elif name == "weight_scale":
            same = (tensor == expected) | is_free if spec.format.scale.storage == BF16 else same
        assert same.all(), name


def _scheme_of(fmt: str) -> str:
    return {"nvfp4": "NVFP4A16", "fp8_channel": "FP8"}.get(fmt, f"{fmt.upper()}{'A16' if fmt[:2] == 'mx' else ''}")


@pytest.mark.parametrize(("fmt", "rule"), ROWS)
@pytest.mark.parametrize("rows", [1, 5])
def test_slabs_change_nothing(monkeypatch, fmt, rule, rows):
    from qat.checkpoints import pack_tensors as pack

    spec = TensorSpec(get_format(fmt), rule)
    whole = pack_weight(weights(), spec)
    monkeypatch.setattr(pack, "_SLAB_VALUES", rows * 256)
    monkeypatch.setattr(pack.ops, "has_kernels", lambda *_: False)
    slabs = pack_weight(weights(), spec)
    for ours, theirs in zip(slabs.tensors, whole.tensors, strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
