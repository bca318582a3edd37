"""TensorQuantizer: fake quantization of one tensor, which can be switched on and off."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import UserError
from ..numerics import ops
from ..numerics.codes import as_stored
from ..schemes.spec import TensorSpec
from .baked_values import BakedValues
from .learned import SETTINGS, check_learnable, kind_of
from .learned_exponents import LearnedExponents
from .learned_scales import LearnedScales
from .rounding import Rounding
from .transform import BakedTransformed, TransformedRounding


class TensorQuantizer(nn.Module):
    """Fake-quantizes a tensor along its last dimension, with straight-through gradients.

    Its `spec` is the only place that defines how a layer's tensor is quantized.

    Args:
        data_type: as in `TensorSpec.of`: AutoRound's name, with the scale rule as suffix ("mx_fp", "mx_fp_rceil").
        bits: of a value. Default: what `data_type` names, else 8.
        block_size: values that share a scale; -1 for a whole row. Default: the format's.
        sym: these formats are symmetric; False is refused.
        if_quant: False makes a quantizer that never quantizes (the output quantizer of a QuantLinear).
        learn_exponent: train the block exponents of a weight: the parameter `exponent_offset` (FP32 [N, K / 32], zero
            at first) is rounded and added to the scale rule's exponent; see learned_exponents.py. Needs `scale_shape`.
        scale_shape: shape (N, K) of a weight whose scales shall be kept in the buffer `scale` at every forward pass
            (MX: uint8 [N, K / 32], exponent + 127) and saved with the model.
        device: where they live.
        learn_scale: train the block scales of a weight in INT4 or NVFP4: the parameter `scale_offset` (FP32
            [N, K / block], zero at first) moves the scale rule's scale; see learned_scales.py. Needs `scale_shape`.

    Attributes:
        is_baked: whether the tensor is a weight that holds quantized values already, see baked_values.py.
        is_transformed: whether the tensor is a weight that is transformed before it is rounded, see transform.py.

    Raises:
        UserError: an argument that no format has.
    """

    exponent_offset: nn.Parameter | None
    scale_offset: nn.Parameter | None
    scale: torch.Tensor | None
    # Of inputs in formats with a tensor scale, FP32 [1]: calibrated. No buffer, since FSDP empties those of a model on
    # the meta device; QATConfig keeps it.
    divisor: torch.Tensor | None

    def __init__(
        self,
        data_type: str = "mx_fp",
        bits: int | None = None,
        block_size: int | None = None,
        sym: bool = True,
        if_quant: bool = True,
        learn_exponent: bool = False,
        scale_shape: tuple[int, int] | None = None,
        device: torch.device | str | None = None,
        learn_scale: bool = False,
    ) -> None:
        super().__init__()
        settings = [name for name, on in zip(SETTINGS, (learn_exponent, learn_scale), strict=True) if on]
        if settings and scale_shape is None:
            raise UserError(f"{settings[0]}=True needs the shape of a weight; give scale_shape=(N, K)")
        self.spec = TensorSpec.of(data_type, bits, block_size, sym)
        self.if_quant = if_quant
        self.is_baked = False
        self.is_transformed = False
        self._enabled = True
        self.register_parameter("exponent_offset", None)
        self.register_parameter("scale_offset", None)
        if settings:
            assert scale_shape is not None
            check_learnable(self.spec, settings)
            self.learn(scale_shape, device)
        scale = None
        if scale_shape is not None:
            fmt = self.spec.format
            scale = torch.zeros(fmt.scale_shape(scale_shape), dtype=fmt.scale.storage, device=device)
        self.register_buffer("scale", scale)
        self.divisor = None

    @classmethod
    def of(cls, spec: TensorSpec, if_quant: bool = True) -> TensorQuantizer:
        """A quantizer for a spec."""
        quantizer = cls(if_quant=if_quant)
        quantizer.spec = spec
        return quantizer

    def learn(self, shape: tuple[int, ...], device: torch.device | str | None = None) -> None:
        """From now on train the block exponents or scales, as the format has them, of a weight of this shape (N, K)."""
        kind, fmt = kind_of(self.spec.format), self.spec.format
        assert kind is not None, fmt.name
        offset = torch.zeros(fmt.scale_shape(shape), dtype=torch.float32, device=device)
        setattr(self, kind.PARAMETER, nn.Parameter(offset))

    @property
    def learn_exponent(self) -> bool:
        """Whether block exponents are trained."""
        return self.exponent_offset is not None

    @property
    def learn_scale(self) -> bool:
        """Whether block scales are trained."""
        return self.scale_offset is not None

    @property
    def rounding(self) -> Rounding:
        """How the tensor gets its values; `learned` are its parameters."""
        if self.is_baked:
            return BakedTransformed(self.spec) if self.is_transformed else BakedValues(self.spec)
        if self.is_transformed:
            return TransformedRounding(self.spec)
        if self.learn_exponent:
            return LearnedExponents(self.spec)
        return LearnedScales(self.spec) if self.learn_scale else Rounding(self.spec)

    @property
    def learned(self) -> tuple[torch.Tensor, ...]:
        """Parameters that are trained beside the tensor."""
        exponents, scales = self.exponent_offset, self.scale_offset  # asked for in each forward pass
        return (*(() if exponents is None else (exponents,)), *(() if scales is None else (scales,)))

    @property
    def data_type(self) -> str:
        """AutoRound's name of the kind of format and its scale rule."""
        return self.spec.data_type

    @property
    def bits(self) -> int:
        """Of a value."""
        return self.spec.bits

    @property
    def block_size(self) -> int:
        """Values that share a scale; -1 for a whole row."""
        return self.spec.block_size

    @property
    def sym(self) -> bool:
        """Whether there is no zero point."""
        return self.spec.sym

    @property
    def needs_divisor(self) -> bool:
        """Whether it quantizes inputs in a format with a tensor scale, which has to be calibrated."""
        return self.if_quant and self.spec.format.tensor_scale is not None

    def divisor_on(self, device: torch.device) -> torch.Tensor | None:
        """The calibrated divisor, FP32 [1], on the device of the input; None before calibration."""
        if self.divisor is not None and self.divisor.device != device:
            self.divisor = self.divisor.to(device)
        return self.divisor

    @property
    def is_enabled(self) -> bool:
        """Whether `forward` quantizes."""
        return self.if_quant and self._enabled

    def enable(self) -> None:
        """Quantize in `forward` (unless the quantizer was made with `if_quant=False`)."""
        self._enabled = True

    def disable(self) -> None:
        """Return inputs untouched in `forward`."""
        self._enabled = False

    def forward(self, x: torch.Tensor, divisor: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] (float32, bfloat16 or float16) -> the same shape and dtype, on the format's grid.

        Args:
            divisor: FP32 [1], in formats with a tensor scale; default: that of x.
        """
        if not self.is_enabled:
            return x
        if self.scale is not None:
            scale = self.rounding.quantize(x.detach(), x.dtype, *self.learned, divisor=divisor).scales[0]
            self.scale.copy_(scale.view_as(self.scale))
        return self.rounding.fake_quantize(x, x.dtype, *self.learned, divisor=divisor)

    def weight_pack(self, weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight on the grid of `scale` -> the bytes that engines load.

        Args:
            weight: [N, K], any float dtype; rounded to the grid when it does not lie on it.
            scale: as in `Quantized.scales` (MX: E8M0 codes, uint8 [N, K / 32], exponent + 127).

        Returns:
            MXFP4: uint8 [N, K / 2], element 2i in the low nibble; MXFP8 and FP8: float8_e4m3fn [N, K]. And the scale,
            unchanged.

        Raises:
            UserError: a scale of another shape or dtype, or a format with a tensor scale.
        """
        fmt = self.spec.format
        if fmt.tensor_scale is not None:
            raise UserError(
                f"weight_pack gives no tensor scale, which {fmt.name} has; use qat.checkpoints.pack.pack_weight"
            )
        fmt.check_scales(weight.shape, scale)
        return as_stored(ops.quantize_to_scale(weight, scale, fmt.name, weight.dtype), fmt.element), scale

    def extra_repr(self) -> str:
        """For `print(model)`."""
        if not self.is_enabled:
            return "disabled"
        learned = ", learned exponents" if self.learn_exponent else ", learned scales" if self.learn_scale else ""
        learned += ", baked" if self.is_baked else ""
        learned += ", transformed" if self.is_transformed else ""
        return f"{self.spec.format.name}, rule={self.spec.rule}{learned}"
