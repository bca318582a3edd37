"""Packed weights: a frozen weight that is kept as codes and scales of its scheme (QLoRA, arXiv:2305.14314).

What stays in memory is what `ops.quantize` made of the weight seen in BF16: 4.25 bits a value in MXFP4, its scales
included. The weight that a layer computes with is those values as BF16 has them. They exist for one product at a time:
the autograd function of the layer keeps the codes, and dequantizes them in the forward and in the backward pass. Then
they are merged with the adapter and rounded, as any other weight is, so that what is exported is what was trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..numerics import ops
from ..numerics.formats import Format, Quantized
from ..schemes.spec import VIEW_DTYPE, TensorSpec
from .lora import MergedRounding
from .rounding import Rounding
from .swapped_class import swapped_class

NAME = "packed"  # of the submodule that has what is kept of the weight


class PackedWeight(nn.Module):
    """What is kept of a weight [..., N, K]: codes and scales, as bytes, which no cast of a model changes.

    Args:
        quantized: of `ops.quantize`, the weight seen in BF16.
        fmt: its format.

    Attributes:
        codes: uint8 [..., N, K * bits / 8].
        scales: those of the blocks, uint8 [..., N, bytes].
        divisor: of the whole tensor, uint8 [1, 4], or [E, 4] of stacked weights; None in formats without.
    """

    codes: nn.Parameter
    scales: nn.Parameter
    divisor: nn.Parameter | None

    def __init__(self, quantized: Quantized, fmt: Format) -> None:
        super().__init__()
        scales, *rest = quantized.scales
        self.format = fmt
        self.codes = _frozen(quantized.codes)
        self.scales = _frozen(scales)
        self.register_parameter("divisor", _frozen(rest[0].reshape(-1, 1)) if rest else None)

    @property
    def kept(self) -> tuple[torch.Tensor, ...]:
        """What is kept beside the codes."""
        return (self.scales,) if self.divisor is None else (self.scales, self.divisor)

    @property
    def shape(self) -> torch.Size:
        """Of the weight: [..., N, K]."""
        return torch.Size(self.format.value_shape(self.codes))

    @property
    def nbytes(self) -> int:
        """That it occupies."""
        return sum(parameter.nbytes for parameter in self.parameters())

    def values(self) -> torch.Tensor:
        """The weight, BF16 [..., N, K], without a gradient."""
        return unpacked(self.format, self.codes, *self.kept)

    def rounding(self, rounding: Rounding | None) -> Rounding:
        """The same rounding, or none, of a weight that is given as its codes, with `kept` behind what it learns."""
        if isinstance(rounding, MergedRounding):
            return PackedMergedRounding(rounding.spec, rounding.scaling, self.format)
        return PackedRounding(None if rounding is None else rounding.spec, self.format)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{list(self.shape)} in {self.format.name}"


def packed_of(module: nn.Module) -> PackedWeight | None:
    """What a module keeps of its weight, if that is packed."""
    packed = module._modules.get(NAME)
    return packed if isinstance(packed, PackedWeight) else None


def as_kept(
    module: nn.Module, rounding: Rounding | None, learned: tuple[torch.Tensor, ...]
) -> tuple[Rounding | None, tuple[torch.Tensor, ...]]:
    """The rounding of a module's weight, and what it learns, as they go with what is kept of the weight."""
    packed = packed_of(module)
    return (rounding, learned) if packed is None else (packed.rounding(rounding), (*learned, *packed.kept))


def unpacked(fmt: Format, codes: torch.Tensor, *kept: torch.Tensor) -> torch.Tensor:
    """The weight that codes and `PackedWeight.kept` stand for, BF16 [..., N, K], without a gradient."""
    scales, *rest = kept
    divisors = [divisor.detach().view(torch.float32).flatten() for divisor in rest]
    quantized = Quantized(codes.detach(), (scales.detach().view(fmt.scale.storage), *divisors))
    return ops.dequantize(quantized, fmt.name, VIEW_DTYPE)


@dataclass(frozen=True)
class PackedRounding(Rounding):
    """The rounding of a packed weight without an adapter.

    Its functions take the codes for `weight`, and what is kept beside them for `learned`, although it is not trained.

    Args:
        spec: None for values that are not rounded again.
        format: of the codes.
    """

    spec: TensorSpec | None  # type: ignore[assignment]  # that of Rounding is always there
    format: Format
    is_packed = True

    def shape_of(self, weight: torch.Tensor) -> torch.Size:
        """See `Rounding.shape_of`."""
        return torch.Size(self.format.value_shape(weight))

    def values(
        self, weight: torch.Tensor, dtype: torch.dtype, *learned: torch.Tensor, divisor: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `Rounding.values`, of the weight that the codes stand for."""
        values = unpacked(self.format, weight, *learned)
        return values.to(dtype) if self.spec is None else super().values(values, dtype, divisor=divisor)

    @property
    def gives_rows(self) -> bool:
        """See `Rounding.gives_rows`."""
        return self.spec is not None

    def rounded_from(self, weight: torch.Tensor, *learned: torch.Tensor) -> torch.Tensor:
        """See `Rounding.rounded_from`."""
        return unpacked(self.format, weight, *learned)


@dataclass(frozen=True)
class PackedMergedRounding(MergedRounding):
    """The rounding of a packed weight with an adapter: `learned` are A, B and what is kept beside the codes.

    Args:
        format: of the codes.
    """

    format: Format
    is_packed = True

    def shape_of(self, weight: torch.Tensor) -> torch.Size:
        """See `Rounding.shape_of`."""
        return torch.Size(self.format.value_shape(weight))

    def values(
        self, weight: torch.Tensor, dtype: torch.dtype, *learned: torch.Tensor, divisor: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `MergedRounding.values`, of the weight that the codes stand for."""
        a, b, *kept = learned
        return super().values(unpacked(self.format, weight, *kept), dtype, a, b, divisor=divisor)

    def rounded_from(self, weight: torch.Tensor, *learned: torch.Tensor) -> torch.Tensor:
        """See `Rounding.rounded_from`."""
        a, b, *kept = learned
        return super().rounded_from(unpacked(self.format, weight, *kept), a, b)

    def gradients(
        self, grad: torch.Tensor, values: torch.Tensor, *learned: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        """Those of A and B; what is packed has none."""
        a, b, *kept = learned
        return (*super().gradients(grad, values, a, b), *[None] * len(kept))


class PackedParameters(nn.Module):
    """A module whose weights are packed; made from another one by `packs`, not constructed.

    A weight is still an attribute under its name: a BF16 tensor without a gradient, dequantized whenever it is read.
    """

    packed_in: dict[str, nn.Module]  # by the weight's name: the module that has the PackedWeight

    def __getattr__(self, name: str) -> Any:
        holder = self.__dict__.get("packed_in", {}).get(name)
        if holder is None:
            return super().__getattr__(name)
        packed = packed_of(holder)
        assert packed is not None
        return holder.from_rows(packed.values())


@torch.no_grad()
def pack_parameter(owner: nn.Module, name: str, module: nn.Module, quantized: Quantized, fmt: Format) -> None:
    """Keep codes in place of a weight, in place.

    Args:
        owner: the module that has the parameter `name`.
        module: what quantizes it; the same, or a projection of experts.
    """
    if not isinstance(owner, PackedParameters):
        owner.__class__ = swapped_class(PackedParameters, type(owner), "Packed")
        owner.__dict__["packed_in"] = {}  # past nn.Module, which has a say in tensors and modules only
    del owner._parameters[name]
    setattr(module, NAME, PackedWeight(quantized, fmt))
    owner.__dict__["packed_in"][name] = module


@torch.no_grad()
def unpack_parameter(owner: nn.Module, name: str, module: nn.Module) -> None:
    """The inverse of `pack_parameter`; of its arguments see there."""
    value = getattr(owner, name)
    delattr(module, NAME)
    del owner.__dict__["packed_in"][name]
    owner.register_parameter(name, nn.Parameter(value, requires_grad=False))
    if not owner.__dict__["packed_in"]:
        del owner.__dict__["packed_in"]
        owner.__class__ = type(owner).__bases__[1]


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().contiguous().view(torch.uint8), requires_grad=False)
