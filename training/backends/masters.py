"""The dtype of the weights that an optimizer updates: FP32 masters, or BF16 without masters."""

from __future__ import annotations

import logging

import torch
from torch import nn

logger = logging.getLogger(__name__)


def to_master_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert the parameters of `model` in place: all tensors to FP32, or its floating-point parameters to BF16.

    Without masters, buffers keep the dtypes that transformers loaded them in: its models compute in BF16 with those.
    """
    if dtype == torch.float32:
        model.float()
        return
    wide = {name: p for name, p in model.named_parameters() if p.dtype == torch.float32}
    if wide:
        logger.warning(
            "--master_dtype bfloat16 rounds the weights of %s to BF16, which the model stores in FP32",
            next(iter(wide)) if len(wide) == 1 else f"{next(iter(wide))} and {len(wide) - 1} more",
        )
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
