"""The quantization operators: one interface for all formats and devices.

Registered with `torch.library`, they have fake (meta) kernels for torch.compile and FSDP's meta tensors. Behind them
stands the fastest implementation that the tensor's device has for the format: a module of `kernels`, else the plain
functions of the format's family, to which every kernel is bit-equal.

Formats and rules travel by name, because operator schemas know no Python objects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import e4m3_rows, fp8, hadamard, low_rank
from .e4m3_rows import Rows
from .families import family_of, get_format
from .formats import Format, Quantized
from .kernels import E4M3_ROWS, HADAMARD, KERNELS, MERGING
from .registered import registered

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _module(verb: str, device: str, fmt: Format) -> Any:
    """What has the function called `verb` that serves tensors on a type of device: kernels, or the family."""
    for kernels in KERNELS.get(device, ()):
        if fmt.name in kernels.SERVES and hasattr(kernels, verb) and kernels.is_available():
            return kernels
    return family_of(fmt)


def _function(verb: str, x: torch.Tensor, fmt: Format) -> Callable:
    """The function called `verb` that serves `x`: a kernel's, or the family's own."""
    return getattr(_module(verb, x.device.type, fmt), verb)


def _transforming(module: Any, **transforms: bool) -> dict[str, bool]:
    """Those of the transforms asked for which the functions of a module do themselves."""
    return {name: True for name, asked in transforms.items() if asked and getattr(module, "TRANSFORMS", False)}


def has_kernels(x: torch.Tensor, fmt: str) -> bool:
    """Whether kernels serve `x`'s device; else it is plain PyTorch, which needs several times the memory of `x`."""
    format_ = get_format(fmt)
    return _function("quantize", x, format_) is not family_of(format_).quantize


@registered("fake_quantize")
def fake_quantize(
    x: torch.Tensor,
    fmt: str,
    rule: str,
    dtype: torch.dtype,
    divisor: torch.Tensor | None = None,
    hadamard: bool = False,
    back: bool = False,
) -> torch.Tensor:
    """x [..., K] -> its nearest values in the format, [..., K] in `dtype`: first `x.to(dtype)`, then rounding.

    The gradient passes straight through (Bengio et al., arXiv:1308.3432), in x's dtype.

    Args:
        divisor: of the whole tensor, FP32 [1], in formats with a tensor scale; [E] for x [E, N, K], stacked weights;
            default: that of x.
        hadamard: round `transform(x, dtype)`, in formats without a tensor scale; the gradient is transformed, too.
        back: return `transform(values, dtype)` of the rounded values; the gradient is transformed, too. With both,
            values are near x itself, and the gradient passes straight through.
    """
    format_ = get_format(fmt)
    kernels = _module("fake_quantize", x.device.type, format_)
    if asked := _transforming(kernels, hadamard=hadamard, back=back):
        return kernels.fake_quantize(x, format_, rule, dtype, **asked)
    x = transform.function(x, dtype) if hadamard else x
    values = kernels.fake_quantize(x, format_, rule, dtype, *_given(divisor))
    return transform.function(values, dtype) if back else values


def _given(divisor: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """The argument that only families with a tensor scale take."""
    return () if divisor is None else (divisor,)


@fake_quantize.register_fake
def _(x, fmt, rule, dtype, divisor=None, hadamard=False, back=False):
    return x.new_empty(x.shape, dtype=dtype)


@registered("merge")
def merge(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """W [..., N, K] with the low-rank adapter A [..., r, K] and B [..., N, r] added: see `low_rank.merge`.

    Raises:
        ValueError: A and B do not belong to the weight.
    """
    low_rank.check_factors(weight, a, b)
    return _merging(weight)(weight, a, b, scaling)


@merge.register_fake
def _(weight, a, b, scaling):
    return weight.new_empty(weight.shape)


@registered("fake_quantize_merged")
def fake_quantize_merged(
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    fmt: str,
    rule: str,
    dtype: torch.dtype,
    divisor: torch.Tensor | None = None,
) -> torch.Tensor:
    """`fake_quantize(merge(weight, a, b, scaling), fmt, rule, dtype, divisor)`; where a kernel does both, in one pass.

    Without a gradient.

    Raises:
        ValueError: A and B do not belong to the weight.
    """
    low_rank.check_factors(weight, a, b)
    format_ = get_format(fmt)
    kernels = MERGING.get(weight.device.type)
    if kernels is not None and format_.name in getattr(kernels, "SERVES", ()) and kernels.is_available():
        return kernels.fake_quantize_merged(weight, a, b, scaling, format_, rule, dtype)
    merged = _merging(weight)(weight, a, b, scaling)
    return _function("fake_quantize", merged, format_)(merged, format_, rule, dtype, *_given(divisor))


@fake_quantize_merged.register_fake
def _(weight, a, b, scaling, fmt, rule, dtype, divisor=None):
    return weight.new_empty(weight.shape, dtype=dtype)


def _merging(weight: torch.Tensor) -> Callable:
    kernels = MERGING.get(weight.device.type)
    return kernels.merge if kernels is not None and kernels.is_available() else low_rank.merge


def _remember_dtype(ctx, inputs, output):
    ctx.input_dtype = inputs[0].dtype


def _remember_rounding(ctx, inputs, output):
    ctx.input_dtype, ctx.transforms = inputs[0].dtype, inputs[5] != inputs[6]  # both: T T = 1


def _straight_through(ctx, grad):
    grad = transform(grad, grad.dtype) if ctx.transforms else grad
    return grad.to(ctx.input_dtype), None, None, None, None, None, None


fake_quantize.register_autograd(_straight_through, setup_context=_remember_rounding)


@registered("fake_quantize_static")
def fake_quantize_static(x: torch.Tensor, scale: torch.Tensor, rule: str, dtype: torch.dtype) -> torch.Tensor:
    """Keys or values x -> their nearest values in FP8 under a static scale, FP32 [1], in `dtype`.

    The gradient passes straight through, in x's dtype.
    """
    return fp8.fake_quantize_static(x, scale, rule, dtype)


@fake_quantize_static.register_fake
def _(x, scale, rule, dtype):
    return torch.empty_like(x, dtype=dtype)  # elementwise: the strides of x, which may be transposed


def _straight_through_static(ctx, grad):
    return grad.to(ctx.input_dtype), None, None, None


fake_quantize_static.register_autograd(_straight_through_static, setup_context=_remember_dtype)


def quantize(
    x: torch.Tensor,
    fmt: str,
    rule: str,
    dtype: torch.dtype,
    divisor: torch.Tensor | None = None,
    hadamard: bool = False,
) -> Quantized:
    """x [..., K], seen in `dtype` -> codes and scales (see `formats.Quantized`); the rest as in `fake_quantize`."""
    codes, *scales = _quantize(x, fmt, rule, dtype, divisor, hadamard)
    return Quantized(codes, (*scales, *_given(divisor)))


@registered("tensor_divisor")
def tensor_divisor(tensors: Sequence[torch.Tensor], fmt: str, dtype: torch.dtype) -> torch.Tensor:
    """The divisor, FP32 [1], that tensors share, seen in `dtype`, in a format with a tensor scale."""
    largest = [_largest_magnitude(x) if x.numel() else x.new_zeros(()) for x in tensors]
    amax = torch.stack(largest).max().to(dtype)  # after the maximum: rounding keeps the order
    return family_of(get_format(fmt)).tensor_divisor(amax)


def _largest_magnitude(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of x, NaN where it holds one; on a CPU `aminmax` takes a 25th of the norm's time."""
    if x.device.type != "cpu":
        return torch.linalg.vector_norm(x, torch.inf)
    smallest, largest = torch.aminmax(x)
    return torch.maximum(-smallest, largest)


@tensor_divisor.register_fake
def _(tensors, fmt, dtype):
    return tensors[0].new_empty((1,), dtype=torch.float32)


@registered("quantize")
def _quantize(
    x: torch.Tensor, fmt: str, rule: str, dtype: torch.dtype, divisor: torch.Tensor | None, hadamard: bool
) -> list[torch.Tensor]:
    """Codes and the scales that are not given: an operator must not return what it was given."""
    format_ = get_format(fmt)
    kernels = _module("quantize", x.device.type, format_)
    if asked := _transforming(kernels, hadamard=hadamard):
        return kernels.quantize(x, format_, rule, dtype, **asked).tensors
    x = transform.function(x, dtype) if hadamard else x
    tensors = kernels.quantize(x, format_, rule, dtype, *_given(divisor)).tensors
    return tensors if divisor is None else tensors[:-1]


@_quantize.register_fake
def _(x, fmt, rule, dtype, divisor, hadamard):
    format_ = get_format(fmt)
    codes = x.new_empty(format_.code_shape(x.shape), dtype=torch.uint8)
    tensors = [codes, x.new_empty(format_.scale_shape(x.shape), dtype=format_.scale.storage)]
    if format_.tensor_scale is not None and divisor is None:
        tensors.append(x.new_empty((1,), dtype=torch.float32))
    return tensors


def dequantize(quantized: Quantized, fmt: str, dtype: torch.dtype, back: bool = False) -> torch.Tensor:
    """Inverse of `quantize`: [..., K] in `dtype`; `back` as in `fake_quantize`."""
    return _dequantize(quantized.codes, list(quantized.scales), fmt, dtype, back)


@registered("dequantize")
def _dequantize(
    codes: torch.Tensor, scales: list[torch.Tensor], fmt: str, dtype: torch.dtype, back: bool
) -> torch.Tensor:
    format_, quantized = get_format(fmt), Quantized(codes, tuple(scales))
    kernels = _module("dequantize", codes.device.type, format_)
    if asked := _transforming(kernels, back=back):
        return kernels.dequantize(quantized, format_, dtype, **asked)
    values = kernels.dequantize(quantized, format_, dtype)
    return transform.function(values, dtype) if back else values


@_dequantize.register_fake
def _(codes, scales, fmt, dtype, back):
    return codes.new_empty(get_format(fmt).value_shape(codes), dtype=dtype)


@registered("quantize_to_scale")
def quantize_to_scale(
    x: torch.Tensor, scale: torch.Tensor, fmt: str, dtype: torch.dtype, divisor: torch.Tensor | None = None
) -> torch.Tensor:
    """Codes, as of `quantize`, of x [..., K], seen in `dtype`, under given scales of its blocks.

    Args:
        divisor: as in `fake_quantize`.
    """
    format_ = get_format(fmt)
    return _function("quantize_to_scale", x, format_)(x, scale, format_, dtype, *_given(divisor))


@quantize_to_scale.register_fake
def _(x, scale, fmt, dtype, divisor=None):
    return x.new_empty(get_format(fmt).code_shape(x.shape), dtype=torch.uint8)


@registered("product_in_fp32")
def product_in_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [M, T] times b [T, N], both BF16 on a GPU, with its FP32 sums as they are: [M, N]. Without a gradient."""
    return torch.mm(a, b, out_dtype=torch.float32)


@product_in_fp32.register_fake
def _(a, b):
    return a.new_empty((a.shape[0], b.shape[1]), dtype=torch.float32)


@registered("transform")
def transform(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x [..., K], seen in `dtype`, times a Hadamard matrix in blocks of 32 -> [..., K] in `dtype`: see hadamard.py.

    The gradient is transformed in the same way, in its own dtype: the matrix is symmetric.
    """
    kernels = HADAMARD.get(x.device.type)
    is_served = kernels is not None and kernels.is_available() and x.dtype in _FLOATS and dtype in _FLOATS
    return (kernels if kernels is not None and is_served else hadamard).transform(x, dtype)


@transform.register_fake
def _(x, dtype):
    return x.new_empty(x.shape, dtype=dtype)


def _transformed_back(ctx, grad):
    return transform(grad, grad.dtype).to(ctx.input_dtype), None


transform.register_autograd(_transformed_back, setup_context=_remember_dtype)


# ---- Products in FP8, see e4m3_rows.py ----

_lost: dict[torch.device, torch.Tensor] = {}


def lost_rows(device: torch.device) -> torch.Tensor:
    """How many rows `to_rows` has found on a device that E4M3 does not hold; int64 [1], counted without a wait."""
    if device not in _lost:
        _lost[device] = torch.zeros(1, dtype=torch.int64, device=device)
    return _lost[device]


def to_rows(
    x: torch.Tensor, fmt: str, rule: str, dtype: torch.dtype, with_codes: bool = False, hadamard: bool = False
) -> tuple[Rows, Quantized | None]:
    """x [..., K], seen in `dtype` -> its nearest values in the format as E4M3 rows; and what `quantize` gives.

    Args:
        fmt: of `e4m3_rows.MX_FORMATS` or `FP8_FORMATS`.
        with_codes: False gives None for the latter.
        hadamard: as in `fake_quantize`.
    """
    matrix = x.detach() if x.dim() == 2 else x.detach().reshape(-1, x.shape[-1])
    if fmt in e4m3_rows.FP8_FORMATS:
        quantized = quantize(x, fmt, rule, dtype, None, hadamard)
        rows = Rows(*e4m3_rows.from_fp8(quantized), None, matrix, fmt, rule, hadamard)
        return rows, quantized if with_codes else None
    values, scale, lost, *kept = _to_rows(x, fmt, rule, dtype, with_codes, hadamard)
    rows = Rows(values, scale, lost, matrix, fmt, rule, hadamard)
    return rows, Quantized(kept[0], (kept[1],)) if with_codes else None


@registered("to_rows")
def _to_rows(
    x: torch.Tensor, fmt: str, rule: str, dtype: torch.dtype, with_codes: bool, hadamard: bool
) -> list[torch.Tensor]:
    """Of `Rows` values, scale and lost rows; then codes and scales of blocks, in the shape of x."""
    format_, count = get_format(fmt), lost_rows(x.device)
    kernels = E4M3_ROWS.get(x.device.type)
    if kernels is not None and kernels.is_available():
        return kernels.to_rows(x, format_, rule, dtype, with_codes, count, hadamard)
    x = transform.function(x, dtype) if hadamard else x
    quantized = _function("quantize", x, format_)(x, format_, rule, dtype)
    rows = e4m3_rows.from_mx(x.to(dtype), quantized, format_)
    count += rows[2].sum()
    return [*rows, *(quantized.tensors if with_codes else ())]


@_to_rows.register_fake
def _(x, fmt, rule, dtype, with_codes, hadamard):
    rows, columns = x.numel() // x.shape[-1], x.shape[-1]
    tensors = [
        x.new_empty((rows, columns), dtype=torch.float8_e4m3fn),
        x.new_empty((rows, 1), dtype=torch.float32),
        x.new_empty((rows,), dtype=torch.uint8),
    ]
    if with_codes:
        shapes = get_format(fmt).code_shape(x.shape), get_format(fmt).scale_shape(x.shape)
        tensors += [x.new_empty(shape, dtype=torch.uint8) for shape in shapes]
    return tensors


def rows_product(x: Rows, weight: Rows, bias: torch.Tensor | None) -> torch.Tensor:
    """x [R, K] times weight [N, K] transposed, and the bias [N], in BF16 [R, N], from E4M3 values and FP32 sums.

    What a lost row takes part in is computed from BF16 values in place of E4M3's.
    """
    return _rows_product(*x[:4], *weight[:4], x.fmt, x.rule, x.hadamard, weight.fmt, weight.rule, weight.hadamard, bias)


@registered("rows_product")
def _rows_product(
    x_values: torch.Tensor,
    x_scale: torch.Tensor,
    x_lost: torch.Tensor | None,
    x_source: torch.Tensor,
    weight_values: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_lost: torch.Tensor | None,
    weight_source: torch.Tensor,
    x_fmt: str,
    x_rule: str,
    x_hadamard: bool,
    weight_fmt: str,
    weight_rule: str,
    weight_hadamard: bool,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    x = Rows(x_values, x_scale, x_lost, x_source, x_fmt, x_rule, x_hadamard)
    weight = Rows(weight_values, weight_scale, weight_lost, weight_source, weight_fmt, weight_rule, weight_hadamard)
    kernels = E4M3_ROWS.get(x_values.device.type)
    if kernels is None or not kernels.is_available():
        return e4m3_rows.product(x, weight, bias)
    out = torch._scaled_mm(  # fast accumulation adds an error of its own where values differ much in size
        x.values, weight.values.t(), scale_a=x.scale, scale_b=weight.scale.t(), bias=bias, out_dtype=torch.bfloat16,
        use_fast_accum=False,
    )  # fmt: skip
    kernels.repair(out, x, weight, bias)
    return out


@_rows_product.register_fake
def _(x_values, x_scale, x_lost, x_source, weight_values, *others):
    return x_values.new_empty((x_values.shape[0], weight_values.shape[0]), dtype=torch.bfloat16)
