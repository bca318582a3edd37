"""Baked values: weights that are saved as their quantized values, where no rule gives their scales again.

A layer computes with such values as they are. Codes and scales are needed by an export only. They are found by search:
a block's largest magnitude is an element of the format times the scale, rounded to BF16, so each element gives a
candidate for the scale, together with its two neighbours. The first candidate under which all values of the block come
back bit for bit is taken. The scale that the values were made with is among the candidates, so there is one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..errors import UserError
from ..numerics import ops
from ..numerics.codes import decode
from ..numerics.formats import Format, Quantized
from ..schemes.spec import VIEW_DTYPE
from .rounding import Rounding

NOT_TRAINABLE = (
    "the weights are quantized values with learned scales, which cannot be trained further as they are; resume the run "
    "that saved them (--resume_from_checkpoint), or name a scheme (--quant_scheme) to start from them under its rule"
)
_SLAB_BLOCKS = 1 << 16  # looked at together
_BITS = {1: torch.uint8, 2: torch.int16}  # by bytes of a scale


class BakedValues(Rounding):
    """The rounding of a weight whose values are quantized already."""

    def quantize(
        self, weight: torch.Tensor, dtype: torch.dtype, *learned: torch.Tensor, divisor: torch.Tensor | None = None
    ) -> Quantized:
        """Codes and scales that give the values back, bit for bit; blocks with NaN or infinity have the NaN scale.

        Raises:
            UserError: there are none for some block.
        """
        return find_scales(weight.to(dtype), self.spec.format, divisor)

    def values(
        self, weight: torch.Tensor, dtype: torch.dtype, *learned: torch.Tensor, divisor: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The values as they are."""
        return weight.to(dtype)

    @property
    def gives_rows(self) -> bool:
        """See `Rounding.gives_rows`."""
        return False

    def fake_quantize(
        self, weight: torch.Tensor, dtype: torch.dtype, *learned: torch.Tensor, divisor: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The values as they are."""
        if torch.is_grad_enabled() and weight.requires_grad:
            self.check_trainable()
        return weight.to(dtype)

    def check_trainable(self) -> None:
        """Raise a UserError: after a step the values would not be quantized any more."""
        raise UserError(NOT_TRAINABLE)


@torch.no_grad()
def find_scales(values: torch.Tensor, fmt: Format, divisor: torch.Tensor | None = None) -> Quantized:
    """Codes and scales [N, K / block] that give `values` [N, K], seen in BF16, back bit for bit.

    Args:
        divisor: FP32 [1], in formats with a tensor scale; default: that of `values`.

    Raises:
        UserError: there are none for some block, so it does not hold quantized values.
    """
    if fmt.tensor_scale is not None and divisor is None:
        divisor = ops.tensor_divisor([values], fmt.name, VIEW_DTYPE)
    assert fmt.block is not None, fmt.name
    blocks = values.to(VIEW_DTYPE).reshape(-1, fmt.block)
    scale = torch.cat([_scales(slab, fmt, divisor) for slab in blocks.split(_SLAB_BLOCKS)]).view(
        fmt.scale_shape(values.shape)
    )
    codes = ops.quantize_to_scale(values, scale, fmt.name, VIEW_DTYPE, divisor)
    return Quantized(codes, (scale,) if divisor is None else (scale, divisor))


def _scales(blocks: torch.Tensor, fmt: Format, divisor: torch.Tensor | None) -> torch.Tensor:
    """The scales [M, 1] of blocks [M, block]."""
    found = ops.quantize(blocks, fmt.name, fmt.rules[0], VIEW_DTYPE, divisor).scales[0]
    is_open = ~(_is_exact(blocks, found, fmt, divisor) | found.isnan().squeeze(-1))
    bits = _BITS[found.element_size()]
    for candidate in _candidates(blocks, fmt, divisor):
        if not is_open.any():
            break
        rows = is_open.nonzero().squeeze(-1)
        scale = candidate[rows]
        exact = _is_exact(blocks[rows], scale, fmt, divisor)
        found.view(bits)[rows[exact]] = scale.view(bits)[exact]
        is_open[rows[exact]] = False
    if is_open.any():
        raise UserError(
            f"{int(is_open.sum())} blocks do not hold values of {fmt.name} under any scale: these weights are not "
            "those that a run with learned scales saved; name a scheme (--quant_scheme) to round them under its rule"
        )
    return found


def _is_exact(blocks: torch.Tensor, scale: torch.Tensor, fmt: Format, divisor: torch.Tensor | None) -> torch.Tensor:
    """Whether all values of a block come back under its scale: bool [M]."""
    codes = ops.quantize_to_scale(blocks, scale, fmt.name, VIEW_DTYPE, divisor)
    scales = (scale,) if divisor is None else (scale, divisor)
    return (ops.dequantize(Quantized(codes, scales), fmt.name, VIEW_DTYPE) == blocks).all(-1)


def _candidates(blocks: torch.Tensor, fmt: Format, divisor: torch.Tensor | None) -> Iterator[torch.Tensor]:
    """Scales [M, 1] under which the largest magnitude of a block is an element: the largest elements first."""
    amax = blocks.abs().amax(-1, keepdim=True).float()
    bits = _BITS[torch.empty((), dtype=fmt.scale.storage).element_size()]
    smallest, largest = 1, int(torch.tensor(fmt.scale.largest).to(fmt.scale.storage).view(bits))
    for element in _magnitudes(fmt):
        nearest = (amax / element if divisor is None else amax / element * divisor).clamp(max=fmt.scale.largest)
        for step in (0, 1, -1):
            code = nearest.to(fmt.scale.storage).view(bits).int() + step
            yield code.clamp(smallest, largest).to(bits).view(fmt.scale.storage)


def _magnitudes(fmt: Format) -> list[float]:
    """The magnitudes of the elements but zero, the largest first."""
    magnitudes = decode(torch.arange(256, dtype=torch.uint8), fmt.element).abs().unique()
    return magnitudes[magnitudes > 0].tolist()[::-1]
