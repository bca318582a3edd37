"""TensorQuantizer: fake quantization of one tensor, which can be switched on and off."""

from __future__ import annotations

import torch
from torch import nn

from ..numerics.codes import encode
from ..numerics.formats import get_format
from ..numerics.mx import round_to_scale
from ..schemes.spec import TensorSpec
from . import learned_scales as gradients


class TensorQuantizer(nn.Module):
    """Fake-quantizes a tensor along its last dimension, with straight-through gradients.

    Args:
        data_type: AutoRound's name, "mx_fp", with the scale rule as suffix ("mx_fp_rceil", "mx_fp_even",
        "mx_fp_search"). bits: 4 (MXFP4, E2M1) or 8 (MXFP8, E4M3).
        block_size: values that share a scale, 32 in every MX format.
        sym: MX formats are symmetric; False is refused.
        if_quant: False makes a quantizer that never quantizes (the output quantizer of a QuantLinear).
        learn_exponent: train the block exponents of a weight: the parameter `exponent_offset` (FP32 [N, K / 32], zero
            at first) is rounded and added to what the scale rule says; see gradients.py. Needs `scale_shape`.
        scale_shape: shape (N, K) of a weight whose E8M0 scales shall be kept in the buffer `scale`
            (uint8 [N, K / block_size], exponent + 127) at every forward pass and saved with the model.
        device: where they live.

    Raises:
        ValueError: an argument has no meaning in MX formats.
    """

    def __init__(
        self,
        data_type: str = "mx_fp",
        bits: int = 8,
        block_size: int = 32,
        sym: bool = True,
        if_quant: bool = True,
        learn_exponent: bool = False,
        scale_shape: tuple[int, int] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if learn_exponent and scale_shape is None:
            raise ValueError("learn_exponent=True needs the shape of a weight; give scale_shape=(N, K)")
        self.spec = TensorSpec(data_type, bits, block_size, sym)
        self.if_quant = if_quant
        self._enabled = True
        self.register_parameter("exponent_offset", None)
        if learn_exponent:
            self.learn_exponents(scale_shape, device)
        scale = None
        if scale_shape is not None:
            rows, columns = scale_shape
            scale = torch.zeros(rows, columns // block_size, dtype=torch.uint8, device=device)
        self.register_buffer("scale", scale)

    def learn_exponents(self, shape: tuple[int, int], device: torch.device | str | None = None) -> None:
        """From now on train the block exponents of a weight of this shape (N, K)."""
        rows, columns = shape
        self.exponent_offset = nn.Parameter(
            torch.zeros(rows, columns // self.block_size, dtype=torch.float32, device=device)
        )

    @property
    def learn_exponent(self) -> bool:
        """Whether block exponents are trained."""
        return self.exponent_offset is not None

    @property
    def data_type(self) -> str:
        return self.spec.data_type

    @property
    def bits(self) -> int:
        return self.spec.bits

    @property
    def block_size(self) -> int:
        return self.spec.block_size

    @property
    def sym(self) -> bool:
        return self.spec.sym

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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] (float32, bfloat16 or float16, K a multiple of 32) -> the same shape and dtype, on the MX grid."""
        if not self.is_enabled:
            return x
        if self.scale is not None:
            _, scale_e8m0_biased = gradients.quantize(x.detach(), self.spec, x.dtype, self.exponent_offset)
            self.scale.copy_(scale_e8m0_biased.view_as(self.scale))
        return gradients.fake_quantize(x, self.spec, x.dtype, self.exponent_offset)

    def weight_pack(self, weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight on the grid of `scale` -> the bytes that engines load.

        Args:
            weight: [N, K], any float dtype; rounded to the grid when it does not lie on it.
            scale: E8M0 codes, uint8 [N, K / 32], exponent + 127.

        Returns:
            MXFP4: uint8 [N, K / 2], element 2i in the low nibble; MXFP8: float8_e4m3fn [N, K]. And the scale,
            unchanged.
        """
        if scale.dtype != torch.uint8 or scale.shape != (*weight.shape[:-1], weight.shape[-1] // self.block_size):
            raise ValueError(
                f"scale is {scale.dtype} {tuple(scale.shape)}; it must hold biased E8M0 codes, uint8 "
                f"{(*weight.shape[:-1], weight.shape[-1] // self.block_size)}, one for {self.block_size} values"
            )
        fmt = get_format(self.spec.format_name)
        packed = encode(round_to_scale(weight, scale, fmt).nan_to_num(0.0), fmt)
        return packed.view(torch.float8_e4m3fn) if fmt.bits == 8 else packed, scale

    def extra_repr(self) -> str:
        if not self.is_enabled:
            return "disabled"
        learned = ", learned exponents" if self.learn_exponent else ""
        return f"{self.spec.format_name}, rule={self.spec.scale_rule}, block_size={self.block_size}{learned}"
