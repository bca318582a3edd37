"""Learned exponents of weights: the exponent of a block is that of the scale rule plus a trained offset, rounded.

As in LSQ (Esser et al., arXiv:1902.08153) rounding passes gradients straight through, also that of the offset; with
v = 2^e q(w / 2^e)

    dv/de = ln 2 * (v - w), or ln 2 * v where w saturates,

summed over the block and multiplied by 1 / sqrt(block * largest element), LSQ's gradient scale. (AutoRound tunes a
factor on the block's maximum, before the rule takes its logarithm; an offset of the exponent is the logarithm of such a
factor.)

A finished run saves *baked* weights, so that a checkpoint needs no tensor that others would not know. A baked weight is
the quantized one that the forward pass computed with: a multiple of a power of two, exact in BF16. Rounding it again
must give it back, whatever exponents it was made with, and under the rule RCEIL it does: RCEIL takes the finest scale
under which a block's maximum does not saturate, so the learned scale or a finer one, on whose grid all values of the
block lie as well. (FLOOR may read a maximum of 240 as 480 of the next finer scale, which saturates at 448.) Hence a
baked checkpoint is plain: Hugging Face names, exact export by the usual code, and a `qat_config.json` that names RCEIL
as the rule of its weights. Checkpoints from which training resumes are not baked: they hold FP32 masters and offsets.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch.autograd.function import once_differentiable

from ..errors import UserError
from ..numerics import mx, ops
from ..numerics.formats import Format, Quantized
from ..schemes.config import QATConfig
from ..schemes.spec import VIEW_DTYPE, TensorSpec
from .rounding import Rounding

PARAMETER = "exponent_offset"  # of a weight quantizer, FP32 [N, K / block]
SUFFIX = f".weight_quantizer.{PARAMETER}"  # of its name in a state dict
SETTING = "learn_exponent"  # in QATConfig.training
BAKED_RULE = "rceil"


class LearnedRounding(Rounding):
    """`Rounding` with an offset of the exponents as its one parameter."""

    def quantize(
        self, weight: torch.Tensor, dtype: torch.dtype, *learned: torch.Tensor, divisor: torch.Tensor | None = None
    ) -> Quantized:
        """As `Rounding.quantize`, under the moved exponents."""
        (offset,) = learned
        (scale,) = super().quantize(weight, dtype).scales
        moved = (scale.int() + offset.round().int()).clamp(0, mx.E8M0_NAN - 1).to(torch.uint8)
        scale = torch.where((scale == mx.E8M0_NAN) | offset.isnan(), mx.E8M0_NAN, moved)
        return Quantized(ops.quantize_to_scale(weight, scale, self.spec.format.name, dtype), (scale,))

    def values(
        self, weight: torch.Tensor, dtype: torch.dtype, *learned: torch.Tensor, divisor: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `Rounding.values`, under the moved exponents."""
        return ops.dequantize(self.quantize(weight, dtype, *learned), self.spec.format.name, dtype)

    def fake_quantize(
        self, weight: torch.Tensor, dtype: torch.dtype, *learned: torch.Tensor, divisor: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`values`, with gradients for the weight and the offset."""
        return _FakeQuantize.apply(weight, *learned, self, dtype)

    def learned_gradients(
        self, grad: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, *learned: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """The gradient of the offset, FP32 [N, K / block]."""
        quantized, fmt = self.quantize(weight, dtype, *learned), self.spec.format
        assert fmt.block is not None, fmt.name
        values = ops.dequantize(quantized, fmt.name, torch.float32)
        viewed = weight.to(dtype).float()
        slope = torch.where(mx.saturates(viewed, quantized, fmt), values, values - viewed)
        blocks = (grad.float() * slope).unflatten(-1, (grad.shape[-1] // fmt.block, fmt.block))
        return (blocks.sum(-1) * (math.log(2) / math.sqrt(fmt.block * fmt.element.largest)),)


class _FakeQuantize(torch.autograd.Function):
    """For quantizers that are called by themselves, outside of the fused linear function."""

    @staticmethod
    def forward(ctx, weight, offset, rounding, dtype):
        ctx.settings = rounding, dtype
        ctx.save_for_backward(weight, offset)
        return rounding.values(weight, dtype, offset)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (weight, offset), (rounding, dtype) = ctx.saved_tensors, ctx.settings
        return grad.to(weight.dtype), *rounding.learned_gradients(grad, weight, dtype, offset), None, None


def optimizer_settings(learning_rate: float) -> dict[str, dict]:
    """Settings of an optimizer for the offsets, by the end of their names.

    An offset does something only once it has passed 0.5, and an Adam step moves it by about the learning rate.
    """
    return {SUFFIX: {"lr": learning_rate, "weight_decay": 0.0}}


def check_learnable(fmt: Format) -> None:
    """Raise a UserError for a format whose scales are not exponents."""
    if fmt.name not in mx.FORMATS:
        raise UserError(
            f"learn_exponent=True needs power-of-two scales, and {fmt.name} has {fmt.scale.name}; choose one of "
            f"{', '.join(mx.FORMATS)}, or learn_exponent=False"
        )


# ---- What a finished run saves ----


@torch.no_grad()
def bake(
    state_dict: dict[str, torch.Tensor], specs: dict[str, TensorSpec], dtypes: dict[str, torch.dtype]
) -> dict[str, torch.Tensor]:
    """`state_dict` with each weight whose exponents were learned replaced by its quantized values.

    Args:
        state_dict: complete tensors; those of offsets do not come back.
        specs: of the weights, by the names of their layers.
        dtypes: in which weights are going to be saved; they are rounded to these before they are quantized.

    Returns:
        A new dict; baked weights have the dtype they had before. Without learned exponents, `state_dict` as it was.
    """
    offsets = {name: tensor for name, tensor in state_dict.items() if name.endswith(SUFFIX)}
    if not offsets:
        return state_dict
    result = {name: tensor for name, tensor in state_dict.items() if name not in offsets}
    for name, offset in offsets.items():
        layer = name.removesuffix(SUFFIX)
        weight, rounding = result[f"{layer}.weight"], LearnedRounding(specs[layer])
        viewed = weight.to(dtypes.get(f"{layer}.weight", weight.dtype))
        quantized = rounding.quantize(viewed, VIEW_DTYPE, offset)
        result[f"{layer}.weight"] = ops.dequantize(quantized, rounding.spec.format.name, weight.dtype)
    return result


def baked_config(config: QATConfig) -> QATConfig:
    """The configuration to save beside baked weights."""
    if not config.training.get(SETTING):
        return config
    rules = {name: {**rule, "weight": BAKED_RULE} for name, rule in config.scale_rules.items()}
    return replace(config, scale_rules=rules)


def check_baked(names: Iterable[str], folder: str | Path) -> None:
    """Raise a UserError if a checkpoint with tensors of these names still needs its learned exponents."""
    if any(name.endswith(SUFFIX) for name in names):
        raise UserError(
            f"{folder} is a checkpoint to resume from: its block exponents are learned and lie beside FP32 masters. "
            "Resume the run (--resume_from_checkpoint), or use the folder that the finished run saved"
        )


def check_compute_dtype(config: QATConfig | None, dtype: torch.dtype) -> None:
    """Raise a UserError if a run that learns exponents computes in another dtype than weights are baked in."""
    if config is not None and config.training.get(SETTING) and dtype != VIEW_DTYPE:
        raise UserError(
            f"--learn_exponent True: weights are saved as they are quantized in bfloat16, and this run computes in "
            f"{str(dtype).removeprefix('torch.')}; give --bf16 True, or leave --learn_exponent out"
        )
