"""A folder with a tiny random model of a family, its weights perturbed so that a dropped tensor shows."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers import make_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from .configs import small_config
from .entries import has_vision

LARGEST = 2_500_000  # parameters


class TooLarge(Exception):
    """A configuration that is not tiny: one of its fields has the size of a real model."""


def save_tiny(entry: str, folder: Path) -> None:
    """Save the model of `entry` in BF16 safetensors, with the byte tokenizer.

    Raises:
        TooLarge: its configuration has a size that neither SMALL nor OVERRIDES makes small.
    """
    config = small_config(entry)
    auto = AutoModelForImageTextToText if has_vision(entry) else AutoModelForCausalLM
    with torch.device("meta"):
        parameters = dict(auto.from_config(config).named_parameters())
    if sum(parameter.numel() for parameter in parameters.values()) > LARGEST:
        name, largest = max(parameters.items(), key=lambda item: item[1].numel())
        raise TooLarge(f"{name} has the shape {tuple(largest.shape)}: add its sizes to SMALL or OVERRIDES")
    torch.manual_seed(0)
    model = auto.from_config(small_config(entry)).bfloat16()
    perturb(model)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


@torch.no_grad()
def perturb(model: PreTrainedModel) -> None:
    """Make every parameter and saved buffer one that no default equals, with channels that differ in size.

    Small models start with weights of 0.02 that leave the residual almost as it is; larger ones let each layer count.
    """
    saved = set(model.state_dict())
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape[:1] + (1,) * (parameter.dim() - 1))
        scale = 4 if parameter.dim() > 1 and parameter.float().std() < 0.05 else 1
        parameter.copy_(scale * parameter.float() * (0.4 * noise).exp() + 0.03 * torch.randn(parameter.shape))
    for name, buffer in model.named_buffers():
        if name in saved and buffer.is_floating_point():
            buffer.copy_(buffer.float() * (1 + 0.1 * torch.rand(buffer.shape)) + 0.02 * torch.rand(buffer.shape))
