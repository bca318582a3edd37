"""How a teacher in BF16 computes: as it is, or under autocast where FP32 buffers would meet BF16 weights."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import PreTrainedModel

from qat.errors import UserError

_EXACT = "inv_freq"  # ends the names of frequencies of rotary embeddings, which models convert themselves


def needs_autocast(model: PreTrainedModel, accelerator: Accelerator | None) -> bool:
    """Whether `model` computes under autocast only, agreed with the first process, whose weights are always loaded.

    Most models compute as they are, and autocast would change their numbers: LayerNorm would put out FP32. Tried, on
    two tokens, are only those with a buffer of a dtype that no parameter has, such as MiniMax's decays in FP32.

    Raises:
        UserError: it computes in neither way.
    """
    if not _has_other_buffers(model):
        return False
    found: list[bool | str | None] = [False, None]
    if accelerator is None or accelerator.is_main_process:
        errors = [error for autocast in (False, True) if (error := _error(model, autocast)) is not None]
        found = [len(errors) == 1, str(errors[1]) if len(errors) == 2 else None]
    if accelerator is not None and accelerator.num_processes > 1:
        broadcast_object_list(found)
    if found[1] is not None:
        raise UserError(
            f"the teacher, a {type(model).__name__} in BF16, cannot compute: {found[1]}; choose another one with "
            "--teacher_model_name_or_path, or --distill False"
        )
    return bool(found[0])


def _has_other_buffers(model: nn.Module) -> bool:
    dtypes = {parameter.dtype for parameter in model.parameters()}
    return any(
        buffer.is_floating_point() and buffer.dtype not in dtypes and not name.endswith(_EXACT)
        for name, buffer in model.named_buffers()
    )


@torch.no_grad()
def _error(model: PreTrainedModel, autocast: bool) -> RuntimeError | None:
    """What PyTorch says of two tokens; None if they are computed."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    try:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
            model(input_ids=ids, use_cache=False)
    except RuntimeError as error:
        return error
    return None
