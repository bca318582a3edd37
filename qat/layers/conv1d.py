"""QuantConv1D: GPT-2's Conv1D, a linear layer whose weight is kept as [in, out], with its operands rounded.

As with a QuantLinear, the Parameters and the state dict stay what they are; blocks lie along the dimension that is
summed over, the first one of the parameter.
"""

from __future__ import annotations

import torch
from torch import nn

from ..errors import UserError
from ..schemes.spec import Scheme
from .quant_linear import LinearProduct
from .swapped_class import swapped_class

_CLASS = "transformers.pytorch_utils.Conv1D"  # by name, since qat/layers imports no transformers


class QuantConv1D(LinearProduct):
    """A Conv1D under QAT; made from one by `convert_conv1d`, not constructed.

    Attributes:
        nx, nf: how many values a row of the input and of the output has.
    """

    nx: int
    nf: int

    @property
    def weight_shape(self) -> tuple[int, int]:
        """[nx, nf]."""
        return self.nx, self.nf

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """See `Operands.rows`: [nx, nf] -> [nf, nx]."""
        return weight.t()

    def from_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """See `Operands.from_rows`."""
        return rows.t()

    def __repr__(self) -> str:
        return f"QuantConv1D(nf={self.nf}, nx={self.nx}, scheme={self.scheme_name})"


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is a Conv1D that is not quantized."""
    return f"{type(module).__module__}.{type(module).__qualname__}" == _CLASS


def is_quantconv1d(module: nn.Module) -> bool:
    """Whether `module` is a QuantConv1D."""
    return isinstance(module, QuantConv1D)


def check_conv1d(module: nn.Module, scheme: Scheme, name: str = "") -> None:
    """Raise what `convert_conv1d(module, scheme, name)` would raise, changing nothing."""
    label = name or "the layer"
    if not is_conv1d(module):
        raise TypeError(f"{label} is a {type(module).__name__}; only a Conv1D of transformers can be converted")
    width = module.get_parameter("weight").shape[0]
    for spec in filter(None, (scheme.weight, scheme.input)):
        if not spec.format.fits(width):
            raise UserError(
                f"{label} has nx={width}, which is not a multiple of the block size {spec.format.block} of "
                f'{spec.format.name}; add {name!r} to `ignore` (--ignore, or "ignore" in a mapping file) to leave it '
                "unquantized"
            )


def convert_conv1d(module: nn.Module, scheme: Scheme, name: str = "", learns: bool = False) -> QuantConv1D:
    """Turn a Conv1D into a QuantConv1D in place: same object, same Parameters; see `quant_linear.convert`.

    Raises:
        TypeError: `module` is no Conv1D.
        UserError: the blocks of the scheme's formats do not divide its inputs.
    """
    check_conv1d(module, scheme, name)
    module.__class__ = swapped_class(QuantConv1D, type(module), "Quant")
    assert isinstance(module, QuantConv1D)  # for type checkers, which do not follow __class__
    module.add_quantizers(scheme)
    if learns:
        module.weight_quantizer.learn(module.rows(module.weight).shape, module.weight.device)
    return module
