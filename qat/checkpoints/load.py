"""Load a plain causal language model, checked: what a folder lacks is an error, never a random weight."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..errors import UserError
from .fit import check_finite, load_checked
from .folder import CheckpointFolder
from .model_config import check_readable, find_folder, log_left_out, read_config
from .native_mxfp4 import forget_format, is_native, loading_options
from .skeleton import UNTIED, load_skeleton, untie_if_different

logger = logging.getLogger(__name__)

TEACHER_ARGUMENT = "--teacher_model_name_or_path"


def check_loadable(
    name: str | Path,
    argument: str = "--model_name_or_path",
    trust_remote_code: bool = False,
    cache_dir: str | None = None,
) -> None:
    """Raise the UserErrors of `load_plain` that can be known without weights; of a hub id, those about its config.json.

    Nothing is allocated before all names and shapes of a local folder are known to fit.
    """
    where = f"{argument} {str(name)!r}"
    folder = find_folder(name, argument, cache_dir)
    if check_readable(folder, where) and not is_native(folder):
        raise UserError(
            f"{where} is packed; give the unquantized model that it was made of, or a local folder as "
            "--model_name_or_path (download a hub model first)"
        )
    if Path(name).is_dir():
        load_skeleton(CheckpointFolder.open(name, argument), trust_remote_code, where)


def load_plain(
    name: str | Path,
    argument: str = "--model_name_or_path",
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool = False,
    cache_dir: str | None = None,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """The unquantized model in a local folder or of a hub id; one in gpt-oss's native format is dequantized.

    Args:
        argument: by which argument the user named it, for messages.
        dtype: of its weights; "auto" for the one that they are stored in.
        device: of its weights. They are read on the CPU, where buffers are computed, so that these do not depend on the
            device; values are checked on it.

    Raises:
        UserError: there is no such model, it is quantized, its weights are not those of the model that its config.json
            describes, or one of them is stored in integers or holds NaN or infinity.
    """
    where = f"{argument} {str(name)!r}"
    check_loadable(name, argument, trust_remote_code, cache_dir)
    config = read_config(name, where, trust_remote_code, cache_dir)
    model = load_checked(
        lambda: AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=dtype, cache_dir=cache_dir, use_safetensors=True, output_loading_info=True,
            ignore_mismatched_sizes=True, trust_remote_code=trust_remote_code, **loading_options(config),
        ),
        where,
    )  # fmt: skip
    cast(nn.Module, model).to(device)  # transformers' wrapper of `to` has lost its types
    check_finite(model.named_parameters(), where)
    forget_format(model)
    log_left_out(config, model, where)
    if untie_if_different(model):
        logger.warning("%s: %s", where, UNTIED)
    return model
