"""Oscillation damping: pull weights towards the values they are quantized to, so that they stop crossing borders.

Nagel et al. (arXiv:2203.11086) add lambda * (w - q(w))^2 to the loss and let lambda grow. As with AdamW's weight decay,
such a term does better outside of the optimizer's normalization: after each step the weight moves a fraction of its way
to q(w), a fraction that grows linearly over the training from 0 to `--oscillation_damping`.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import TrainerCallback

from qat import gradients, is_quantlinear, ops

from .layer_groups import local_rows
from .safeguards import StepGuard


class OscillationDamping(TrainerCallback):
    """After each step that was applied, w += strength * progress * (q(w) - w), for all quantized weights in training.

    Args:
        model: prepared by `prepare_qat`.
        strength: the fraction at the end of the training, between 0 and 1.
        dtype: that the forward pass sees weights in.
        guard: knows which steps are not applied, if any.
    """

    def __init__(self, model: nn.Module, strength: float, dtype: torch.dtype, guard: StepGuard | None = None) -> None:
        self.layers = [m for m in model.modules() if is_quantlinear(m) and m.weight.requires_grad]
        self.strength, self.dtype, self.guard = strength, dtype, guard

    def on_train_begin(self, args, state, control, **kwargs):
        """Check that there are whole rows to work on."""
        if any(local_rows(layer.weight) is None for layer in self.layers):
            raise ValueError(
                "--oscillation_damping needs whole rows of weights, which FSDP1 does not keep; "
                "use accelerate_config/fsdp2.yaml, or --oscillation_damping 0"
            )

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        """Pull all weights a little, unless the guard, or under FP16 the gradient scaler, has withheld the step."""
        withheld = self.guard is not None and self.guard.withholds
        if withheld or getattr(optimizer, "step_was_skipped", False):
            return
        fraction = self.strength * min(1.0, (state.global_step + 1) / max(1, state.max_steps))
        for layer in self.layers:
            weight, offset = local_rows(layer.weight), local_rows(layer.weight_quantizer.exponent_offset)
            spec = layer.weight_quantizer.spec
            codes = gradients.quantize(weight, spec, self.dtype, offset)
            weight.lerp_(ops.dequantize(*codes, spec.format_name, weight.dtype), fraction)
