"""Operands: how the weight and the input of a matrix product are quantized; what all kinds of sites have in common."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import UserError
from ..schemes.spec import Scheme
from .packed_weight import packed_of
from .tensor_quantizer import TensorQuantizer


class Operands(nn.Module):
    """A module with one product of inputs and a weight, whose quantizers say in which formats both are computed with.

    The specs of its quantizers define how it is quantized; `scheme` is made of them, and `set_scheme` changes them.

    Attributes:
        fused_with: modules, itself among them, that engines fuse into one matrix.
        fused_id: the same number for all of them.
    """

    weight_quantizer: TensorQuantizer
    input_quantizer: TensorQuantizer
    output_quantizer: TensorQuantizer
    scheme_name: str
    fused_with: tuple[Operands, ...]
    fused_id: int

    def add_quantizers(self, scheme: Scheme) -> None:
        """Give the module the quantizers of a scheme."""
        self.weight_quantizer = TensorQuantizer.of(scheme.weight)
        self.input_quantizer = TensorQuantizer.of(scheme.input or scheme.weight)
        self.output_quantizer = TensorQuantizer.of(scheme.weight, if_quant=False)
        self.fuse_with((self,))
        self.set_scheme(scheme)

    def fuse_with(self, modules: tuple[Operands, ...]) -> None:
        """Remember the modules that engines fuse with this one, itself among them."""
        # Past nn.Module, which would make them submodules. The number is kept since torch.compile knows no id().
        self.__dict__ |= {"fused_with": modules, "fused_id": id(modules)}

    @property
    def scheme(self) -> Scheme:
        """What the product is quantized to; whether its quantizers are enabled does not matter."""
        inputs = self.input_quantizer
        return Scheme(self.scheme_name, self.weight_quantizer.spec, inputs.spec if inputs.if_quant else None)

    def set_scheme(self, scheme: Scheme) -> None:
        """Quantize under `scheme` from now on."""
        self.scheme_name = scheme.name
        self.weight_quantizer.spec = scheme.weight
        self.input_quantizer.spec = scheme.input or scheme.weight
        self.input_quantizer.if_quant = scheme.input is not None

    @property
    def kept(self) -> torch.Tensor:
        """The tensor that is kept of the weight: the parameter itself, or the codes of a packed one."""
        packed = packed_of(self)
        return self._parameter() if packed is None else packed.codes

    def _parameter(self) -> torch.Tensor:
        raise NotImplementedError

    def effective_weight(self) -> torch.Tensor:
        """What is rounded and multiplied by, in the layout of the parameter. An adapter adds its product here."""
        raise NotImplementedError

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """A tensor in the layout of the parameter as [..., N, K], the dimension that is summed over last; a view."""
        return weight

    def from_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The inverse of `rows`; a view."""
        return rows

    def input_divisor(self, device: torch.device) -> torch.Tensor | None:
        """The calibrated one of the input in formats with a tensor scale, FP32 [1] on `device`; else None.

        Raises:
            UserError: it has not been calibrated.
        """
        inputs = self.input_quantizer
        if not (inputs.is_enabled and inputs.needs_divisor):
            return None
        if inputs.divisor is None:
            raise UserError(
                f"a layer in {self.scheme_name} has no calibrated scale for its input; run "
                "qat.layers.calibration.calibrate_inputs on some samples first"
            )
        return inputs.divisor_on(device)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that a product of x is computed in: under autocast its, else that of x."""
    device_type = x.device.type
    if device_type == "meta":  # shapes only; autocast knows no meta device
        return x.dtype
    if torch.is_autocast_enabled(device_type) and x.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return torch.get_autocast_dtype(device_type)
    return x.dtype


def is_shard(weight: torch.Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a weight of FSDP1 (of another shape) or of FSDP2 (a DTensor) is not gathered."""
    return hasattr(weight, "placements") or tuple(weight.shape) != shape
