"""The frozen weights of adapters, written once where a run changes them before it trains.

Smoothing, GPTQ, and adapters that begin as a part of the weights (PiSSA, OLoRA), leave frozen weights that no published
model has. A run writes them into its folder before the first step, with the adapters as they were then: what the
finished adapters belong to exists, and a resumed run computes with the same bits whatever its machine would smooth or
decompose.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qat.checkpoints.load import load_plain
from qat.errors import UserError
from qat.files.atomic import disk_full_reported, written_atomically
from qat.files.model_folder import CONFIG_NAME
from qat.layers.packed_base import dequantized_base

from ..backends.saved_dtypes import SavedDtypes
from ..resume.written import BASE_FOLDER, check_saved_model
from .files import write_adapter
from .merging import factors_of

logger = logging.getLogger(__name__)

START_FOLDER = "start"  # in the folder of the frozen weights: the adapters that the run began with


def write_base(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtypes: SavedDtypes, has_start: bool
) -> None:
    """Write a model's frozen weights as a plain checkpoint, whole or not at all.

    Args:
        folder: what is there is replaced.
        dtypes: that the model was stored in.
        has_start: whether the adapters add something, and are written beside it.

    Raises:
        UserError: the folder cannot be replaced, or the model could not be loaded again.
        DiskFullError: no space is left.
    """
    state = dequantized_base(model)
    with disk_full_reported(folder, "--output_dir"), written_atomically(folder, overwrite=True) as partial:
        model.save_pretrained(partial, state_dict=dtypes.cast(model, state))
        tokenizer.save_pretrained(partial)
        dtypes.write(partial)
        check_saved_model(partial)
        if has_start:
            write_adapter(partial / START_FOLDER, model, factors_of(model), str(folder))
    logger.info("Wrote the frozen weights to %s: the adapters of this run are for that model", folder)


@torch.no_grad()
def load_base(folder: Path, model: nn.Module, trust_remote_code: bool) -> None:
    """Copy the weights in a folder that `write_base` wrote into a model without adapters.

    Raises:
        UserError: the folder is missing, or holds another model.
    """
    if not (folder / CONFIG_NAME).is_file():
        raise UserError(
            f"cannot resume: {folder} is missing, the frozen weights that --smooth_alpha, --weight_init or --lora_init "
            "changed when the run began. If it began without them, leave them out; else give another --output_dir, or "
            "--resume_from_checkpoint False to start anew"
        )
    saved = load_plain(folder, f"--output_dir ({BASE_FOLDER})", trust_remote_code=trust_remote_code).state_dict()
    own = model.state_dict()
    if own.keys() != saved.keys() or any(own[name].shape != saved[name].shape for name in own):
        raise UserError(f"cannot resume: {folder} holds another model than --model_name_or_path; give the same one")
    for name, tensor in own.items():
        tensor.copy_(saved[name])
    logger.info("Took the frozen weights from %s", folder)
