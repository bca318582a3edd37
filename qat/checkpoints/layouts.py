"""Layouts: the tensors in which programs store a packed weight, and the values that they stand for.

A layout is told by the names and dtypes of a layer's tensors, so folders of all programs are read alike. N rows
(output channels) and K columns:

    format      codes                    scales                      besides
    MXFP4       weight_packed U8         weight_scale U8 [N, K/32]
    MXFP8       weight E4M3              weight_scale U8 [N, K/32]
    NVFP4       weight_packed U8         weight_scale E4M3 [N, K/16] weight_global_scale, a divisor: s / g
                weight U8                the same                    weight_scale_2, a multiplier (Model-Optimizer)
    INT4        weight_packed I32        weight_scale [N, K/g]       weight_shape
                qweight I32 [K/8, N]     scales [K/g, N]             qzeros, which must be 8 (GPTQ, AutoRound)
    FP8         weight E4M3              weight_scale [N, 1], [N] or of the whole tensor, [1] or []
    MXFP4       X_blocks U8              X_scales U8 [E, N, K/32]    gpt-oss's native format, X all experts' weight

A value is its element times its scale, in the dtype of the scale, rounded to BF16: what the program's own library
computes. A multiplier is never turned into a divisor, whose reciprocal would round.
"""  # fmt: skip

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch

from ..errors import UserError
from ..layers.calibration import DIVISOR
from ..numerics import mx, ops
from ..numerics.codes import decode
from ..numerics.families import get_format
from ..numerics.formats import E8M0, Format, Quantized
from ..schemes.spec import VIEW_DTYPE
from .dialects.compressed_tensors import WEIGHT_DIVISOR, WEIGHT_SHAPE
from .dialects.mxfp4 import BLOCKS, SCALES
from .dialects.mxfp4 import FORMAT as NATIVE
from .fit import check_finite, is_finite
from .folder import Stored

Tensors = Mapping[str, torch.Tensor]  # of a layer, by the last part of their names

_FLOATS = ("BF16", "F16", "F32")
_INT4 = ("int4_g32", "int4_g128")
_SYMMETRIC_ZEROS = 0x77777777  # eight zero points in a word, each stored less 1: 8 is the middle of 0 to 15
_SLAB_VALUES = 1 << 22  # dequantized at a time in plain PyTorch; bounds its temporaries
_INPUT_MULTIPLIER = "input_scale"
_POSITIVE = (WEIGHT_DIVISOR, "weight_scale_2", DIVISOR, _INPUT_MULTIPLIER)
REMEDY = "start from the BF16 checkpoint that it was made of"
# Tensors that change what a layer computes, in formats that are not read.
_REFUSED = {
    "weight_zero_point": "zero points (asymmetric quantization)",
    "input_zero_point": "zero points of inputs (asymmetric quantization)",
    "weight_g_idx": "another order of its columns (act-order)",
    "weight_scale_inv": "a scale for each square block of FP8 values",
    "pre_quant_scale": "factors that inputs are multiplied by (AWQ)",
    "bitmask": "the mask of a sparse weight",
}


@dataclass(frozen=True)
class Layout:
    """One row of the table above.

    Attributes:
        codes, codes_dtype: the last part of the tensor's name, and its dtype as safetensors writes it.
        scale, scale_dtypes: of the scales, likewise.
        formats: whose scales may have these shapes; the first that fits.
        values: of the tensors of a layer in a format: BF16 [N, K].
        others: dtypes of further tensors that must be there.
        optional: dtypes of those that may be.
        is_transposed: codes and scales have columns first.
    """

    codes: str
    codes_dtype: str
    scale: str
    scale_dtypes: tuple[str, ...]
    formats: tuple[str, ...]
    values: Callable[[Tensors, Format], torch.Tensor]
    others: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    optional: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    is_transposed: bool = False


@dataclass(frozen=True)
class PackedLayer:
    """A layer whose weight is stored in codes and scales.

    Attributes:
        layout: in which.
        weight: the name of its weight in a plain checkpoint.
        tensors: full names by their last parts, the scale of its inputs among them.
        format: of the weight.
        shape: of the weight, (N, K); of gpt-oss's experts as their parameters are, (E, K, N).
    """

    layout: Layout
    weight: str
    tensors: dict[str, str]
    format: Format
    shape: tuple[int, ...]

    @property
    def input_scale(self) -> str | None:
        """The full name of the calibrated scale of its inputs; None where there is none."""
        return self.tensors.get(DIVISOR, self.tensors.get(_INPUT_MULTIPLIER))


# ---- Which layout a layer has ----


def packed_layers(stored: Mapping[str, Stored], where: object, method: str) -> dict[str, PackedLayer]:
    """The packed layers of a folder by name, from the headers of its files.

    Args:
        method: that packed it, as config.json has it.

    Returns:
        By the names of modules; in gpt-oss's native format by those of parameters.

    Raises:
        UserError: there is none, or one is incomplete, in no layout of the table, or has tensors whose meaning is not
            in it (zero points, another order of columns); the message has the name and the reason.
    """
    for name in sorted(stored):
        if reason := _REFUSED.get(name.rpartition(".")[2]):
            raise UserError(f"{where} has {name}: {reason}, which this program does not read; {REMEDY}")
    if method == NATIVE:
        return _native_layers(stored, where)
    scales = {layout.scale for layout in LAYOUTS}
    marks = scales | {layout.codes for layout in LAYOUTS if layout.codes != "weight"}
    names = sorted({layer for name in stored for layer, _, last in [name.rpartition(".")] if last in marks})
    if not names:
        raise UserError(f"{where} has a quantization_config, but no packed tensor (weight_scale)")
    return {name: _layer(name, stored, where) for name in names}


def _layer(name: str, stored: Mapping[str, Stored], where: object) -> PackedLayer:
    known = {part for row in LAYOUTS for part in (row.codes, row.scale, *row.others, *row.optional)}
    own = {part: stored[f"{name}.{part}"] for part in known if f"{name}.{part}" in stored}
    layout = _layout(name, own, where)
    rows, columns = _shape(layout, own[layout.codes].shape)
    fmt = _format(layout, (rows, columns), own[layout.scale].shape, f"{where}: {name}")
    for part, dtypes in {**layout.others, **layout.optional}.items():
        _check_other(f"{where}: {name}.{part}", own.get(part), dtypes, part in layout.others)
    own = {part: found for part, found in own.items() if part in _parts(layout)}
    return PackedLayer(layout, f"{name}.weight", {part: f"{name}.{part}" for part in own}, fmt, (rows, columns))


def _native_layers(stored: Mapping[str, Stored], where: object) -> dict[str, PackedLayer]:
    """The packed parameters of a folder in gpt-oss's native format."""
    names = {name.removesuffix(end) for name in stored for end in (BLOCKS, SCALES) if name.endswith(end)}
    if not names:
        raise UserError(f"{where} has the quant_method {NATIVE}, but no packed tensor (experts.down_proj{BLOCKS})")
    fmt, layers = get_format(_NATIVE.formats[0]), {}
    for name in sorted(names):
        tensors = {part: f"{name}{part}" for part in (BLOCKS, SCALES)}
        if lacking := [tensor for tensor in tensors.values() if tensor not in stored]:
            raise UserError(f"{where} is incomplete: {lacking[0]} is missing; copy or pack it again")
        blocks, scales = (stored[tensor] for tensor in tensors.values())
        is_u8, is_3d = (blocks.dtype, scales.dtype) == ("U8", "U8"), len(scales.shape) == 3
        if not (is_u8 and is_3d and blocks.shape == (*scales.shape, 16)):
            raise UserError(
                f"{where}: {name} has blocks in {blocks.dtype} {blocks.shape} and scales in {scales.dtype} "
                f"{scales.shape}; they must be U8 (E, N, K / 32, 16) and U8 (E, N, K / 32); copy or pack it again"
            )
        experts, rows, count = scales.shape
        layers[name] = PackedLayer(_NATIVE, name, tensors, fmt, (experts, count * cast(int, fmt.block), rows))
    return layers


def _parts(layout: Layout) -> set[str]:
    return {layout.codes, layout.scale, *layout.others, *layout.optional}


def _layout(name: str, own: Mapping[str, Stored], where: object) -> Layout:
    """The row that the tensors of a layer are in, or whose tensors some are missing of."""
    codes = next((part for part in ("weight_packed", "qweight", "weight") if part in own), None)
    is_gptq = "scales" in own or codes == "qweight"
    scale = "scales" if is_gptq else "weight_scale"
    if codes is None or scale not in own:
        lacking = codes or ("qweight" if is_gptq else "weight_packed" if WEIGHT_SHAPE in own else "weight")
        raise UserError(f"{where} is incomplete: {name}.{lacking} or its {scale} is missing")
    stored, scales = own[codes], own[scale]
    for row in LAYOUTS:
        is_alike = (row.codes, row.codes_dtype, row.scale) == (codes, stored.dtype, scale)
        if is_alike and scales.dtype in row.scale_dtypes and len(stored.shape) == 2:
            return row
    raise UserError(
        f"{where}: {name} has {codes} in {stored.dtype} {stored.shape} and scales in {scales.dtype}: no layout of "
        f"MXFP4, MXFP8, NVFP4, INT4 or FP8 that is read; {REMEDY}"
    )


def _shape(layout: Layout, codes: tuple[int, ...]) -> tuple[int, int]:
    """Of the weight [N, K] in codes of this shape."""
    per_code = {"I32": 8, "U8": 2, "F8_E4M3": 1}[layout.codes_dtype]
    rows, columns = reversed(codes) if layout.is_transposed else codes
    return rows, columns * per_code


def _format(layout: Layout, shape: tuple[int, int], scales: tuple[int, ...], where: str) -> Format:
    """The first format of the layout whose scales have this shape."""
    rows, columns = shape
    scales = tuple(reversed(scales)) if layout.is_transposed else scales
    formats = [get_format(name) for name in layout.formats]
    if formats[0].block is None and scales in ((), (1,), (1, 1), (rows,)):
        return formats[0]
    for fmt in formats:
        if fmt.fits(columns) and tuple(fmt.scale_shape(shape)) == scales:
            return fmt
    expected = " or ".join(f"{tuple(fmt.scale_shape(shape))} in {fmt.name}" for fmt in formats)
    found = f"scales {scales} for a weight {shape}"
    if len(scales) == 2 and scales[0] == rows and scales[1] and columns % scales[1] == 0:
        per_channel = "a scale for each row (per channel)"
        found += f", {per_channel if scales[1] == 1 else f'a scale for {columns // scales[1]} values'}"
    raise UserError(f"{where} has {found}; they must be {expected}")


def _check_other(name: str, found: Stored | None, dtypes: tuple[str, ...], is_required: bool) -> None:
    if found is None:
        if is_required:
            raise UserError(f"{name} is missing, so the folder is incomplete; copy or pack it again")
        return
    if found.dtype not in dtypes:
        raise UserError(f"{name} is stored in {found.dtype}, and it must be in {' or '.join(dtypes)}; pack it again")
    part = name.rpartition(".")[2]
    if part in _POSITIVE and math.prod(found.shape) != 1:
        raise UserError(f"{name} has the shape {found.shape}, and it must be one number; pack it again")
    if part == WEIGHT_SHAPE and found.shape != (2,):
        raise UserError(f"{name} has the shape {found.shape}, and it must be (2,); pack it again")


# ---- Values ----


def check_tensor(part: str, tensor: torch.Tensor, layer: PackedLayer, where: object) -> None:
    """Raise a UserError for a tensor of a layer whose values are broken or mean what is not read.

    Args:
        part: the last part of its name.
    """
    name = layer.tensors[part]
    if part == layer.layout.scale:
        broken = int(tensor.max()) == mx.E8M0_NAN if layer.format.scale == E8M0 else not is_finite(tensor)
        if broken:
            raise UserError(
                f"{where}: {name} holds scales that are NaN or infinite; export or copy the checkpoint again"
            )
    elif part in _POSITIVE and not 0 < float(tensor) < math.inf:
        raise UserError(f"{where}: {name} is {float(tensor)}, not a positive number; export or copy it again")
    elif part == WEIGHT_SHAPE and tuple(tensor.tolist()) != layer.shape:
        raise UserError(f"{where}: {name} is {tensor.tolist()}, and the codes are of a weight {list(layer.shape)}")
    elif part == "qzeros" and bool((tensor != _SYMMETRIC_ZEROS).any()):
        raise UserError(f"{where}: {name} has zero points other than 8 (asymmetric quantization); {REMEDY}")
    elif part == "g_idx" and not torch.equal(tensor.long(), torch.arange(layer.shape[1]) // (layer.format.block or 1)):
        raise UserError(f"{where}: {name} has another order of its columns (act-order); {REMEDY}")
    else:
        check_finite([(name, tensor)], where)


def dequantize(layer: PackedLayer, tensors: Tensors) -> torch.Tensor:
    """The weight of a layer as a plain checkpoint has it, from its tensors by the last parts of their names.

    Returns:
        BF16 [N, K]; of gpt-oss's experts [E, K, N].
    """
    values = layer.layout.values(tensors, layer.format)
    return values.transpose(1, 2).contiguous() if layer.layout is _NATIVE else values


def dequantized_rows(layer: PackedLayer, tensors: Tensors) -> torch.Tensor:
    """The same as rows whose blocks share scales, BF16 [N, K]; of gpt-oss's experts [E * N, K]."""
    return layer.layout.values(tensors, layer.format).flatten(0, -2)


def input_divisor(layer: PackedLayer, tensor: torch.Tensor) -> float:
    """The calibrated divisor of a layer's inputs, an FP32 value, from the tensor that `layer.input_scale` names.

    The reciprocal of a multiplier is what vLLM's kernels divide by, too.
    """
    value = tensor.float().reshape(())
    return float(value if DIVISOR in layer.tensors else value.reciprocal())


def engines_divisor(layer: PackedLayer, divisors: list[float]) -> float:
    """What engines take where layers that they fuse have several: the largest divisor, or the largest multiplier."""
    return max(divisors) if DIVISOR in layer.tensors else min(divisors)


def _of_operators(codes: torch.Tensor, fmt: Format, *scales: torch.Tensor) -> torch.Tensor:
    return ops.dequantize(Quantized(codes.view(torch.uint8), scales), fmt.name, VIEW_DTYPE)


def _in_dtype_of(scale: torch.Tensor, codes: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Elements times scales, in the dtype of the scales; then BF16."""
    if scale.dtype == fmt.scale.storage:
        return _of_operators(codes, fmt, scale.contiguous())
    bytes_, slabs = codes.view(torch.uint8), []
    step = max(1, _SLAB_VALUES // (bytes_.shape[1] * 2))
    for some, scales in zip(bytes_.split(step), scale.split(step), strict=True):
        elements = decode(some, fmt.element).to(scale.dtype)
        repeated = scales if fmt.block is None else scales.repeat_interleave(fmt.block, dim=-1)
        slabs.append((elements * repeated).to(VIEW_DTYPE))
    return torch.cat(slabs)


def _mx(tensors: Tensors, fmt: Format) -> torch.Tensor:
    codes = tensors.get("weight_packed", tensors.get("weight"))
    assert codes is not None
    return _of_operators(codes, fmt, tensors["weight_scale"])


def _nvfp4(tensors: Tensors, fmt: Format) -> torch.Tensor:
    scales = tensors["weight_scale"], tensors[WEIGHT_DIVISOR].reshape(1)
    return _of_operators(tensors["weight_packed"], fmt, *scales)


def _nvfp4_of_multiplier(tensors: Tensors, fmt: Format) -> torch.Tensor:
    scale = tensors["weight_scale"].float() * tensors["weight_scale_2"].reshape(1)
    return _in_dtype_of(scale, tensors["weight"], fmt)


def _int4(tensors: Tensors, fmt: Format) -> torch.Tensor:
    return _in_dtype_of(tensors["weight_scale"], tensors["weight_packed"], fmt)


def _int4_of_gptq(tensors: Tensors, fmt: Format) -> torch.Tensor:
    """A column of words holds a row of the weight; with zero points of 8 its codes are those of `weight_packed`."""
    return _in_dtype_of(tensors["scales"].t().contiguous(), tensors["qweight"].t().contiguous(), fmt)


def _fp8(tensors: Tensors, fmt: Format) -> torch.Tensor:
    codes, scale = tensors["weight"], tensors["weight_scale"]
    return _in_dtype_of(scale.reshape(-1, 1).expand(codes.shape[0], 1), codes, fmt)


def _native(tensors: Tensors, fmt: Format) -> torch.Tensor:
    return _of_operators(tensors[BLOCKS].flatten(-2), fmt, tensors[SCALES])


_OF_INPUTS = {DIVISOR: ("F32",)}
_MULTIPLIER = {_INPUT_MULTIPLIER: _FLOATS}
LAYOUTS = (
    Layout("weight_packed", "U8", "weight_scale", ("U8",), ("mxfp4",), _mx),
    Layout("weight", "F8_E4M3", "weight_scale", ("U8",), ("mxfp8",), _mx),
    Layout(
        "weight_packed", "U8", "weight_scale", ("F8_E4M3",), ("nvfp4",), _nvfp4, {WEIGHT_DIVISOR: ("F32",)},
        _OF_INPUTS,
    ),
    Layout(
        "weight", "U8", "weight_scale", ("F8_E4M3",), ("nvfp4",), _nvfp4_of_multiplier, {"weight_scale_2": ("F32",)},
        _MULTIPLIER,
    ),
    Layout("weight_packed", "I32", "weight_scale", _FLOATS, _INT4, _int4, {WEIGHT_SHAPE: ("I64", "I32")}),
    Layout("weight", "F8_E4M3", "weight_scale", _FLOATS, ("fp8_channel",), _fp8, {}, _MULTIPLIER),
    Layout(
        "qweight", "I32", "scales", _FLOATS, _INT4, _int4_of_gptq, {"qzeros": ("I32",)}, {"g_idx": ("I32",)}, True,
    ),
)  # fmt: skip
_NATIVE = Layout(BLOCKS, "U8", SCALES, ("U8",), ("mxfp4",), _native)
