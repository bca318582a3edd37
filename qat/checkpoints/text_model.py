"""Text model: the language model inside a multimodal one, written as a causal language model of its own.

Where transformers has no causal language model of a multimodal folder, this makes one: the same weights under the names
that such a model has. Its logits of a text are those of the multimodal model, which is checked.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from ..errors import UserError
from ..files.atomic import check_target, disk_full_reported, written_atomically
from .companions import OF_TEXT, copy_companions
from .fit import load_checked
from .folder import CheckpointFolder
from .model_config import read_any_config, text_config_of

logger = logging.getLogger(__name__)

_TOKENS = 32


def extract_text_model(source: str | Path, target: str | Path) -> Path:
    """Write the language model inside the multimodal model in `source` into the new folder `target`.

    Args:
        source: a folder of transformers' files whose class is an image-text-to-text model.
        target: it has the weights in their own dtype, the tokenizer and the chat template.

    Raises:
        UserError: the source has no language model that transformers knows as a causal one; its weights are not those
            of its config.json; or the logits of a text are not those of the multimodal model.
    """
    checkpoint = CheckpointFolder.open(source, "SRC")
    if checkpoint.is_packed:
        raise UserError(f"SRC {str(source)!r} is quantized ({checkpoint.quantizer}); give the unquantized model")
    check_target(Path(target), False)
    where = f"SRC {str(source)!r}"
    config = text_config_of(read_any_config(checkpoint.path, where, local_files_only=True))
    if config is None:
        raise UserError(f"{where} has no language model inside that transformers has a causal language model for")
    whole = load_checked(
        lambda: AutoModelForImageTextToText.from_pretrained(
            checkpoint.path, dtype="auto", output_loading_info=True, local_files_only=True, use_safetensors=True,
            ignore_mismatched_sizes=True,
        ),
        where,
    )  # fmt: skip
    text = text_model_of(whole, config)
    if (difference := _difference(whole, text)) > 0:
        raise UserError(
            f"{where}: the logits of its language model as {type(text).__name__} differ by up to {difference} from "
            "those of the multimodal model, so it is another function; nothing is written"
        )
    with disk_full_reported(Path(target)), written_atomically(Path(target), False) as folder:
        text.save_pretrained(folder)
        copy_companions(checkpoint.path, folder, OF_TEXT)
    logger.info("%s: wrote the language model, %s, into %s", where, type(text).__name__, target)
    return Path(target)


def text_model_of(whole: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """The causal language model of `config` with the weights of the language model and the head in `whole`."""
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    state = {f"{empty.base_model_prefix}.{name}": tensor for name, tensor in whole.get_decoder().state_dict().items()}
    head, own = whole.get_output_embeddings(), empty.get_output_embeddings()
    name = next(name for name, module in empty.named_modules() if module is own)
    state |= {f"{name}.{key}": tensor for key, tensor in head.state_dict().items()}
    config.dtype = whole.dtype
    config.tie_word_embeddings = head.weight is whole.get_input_embeddings().weight

    def load() -> Any:
        return type(empty).from_pretrained(
            None, config=config, state_dict=state, dtype=whole.dtype, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip

    return load_checked(load, "the language model", strict=True)


@torch.no_grad()
def _difference(whole: PreTrainedModel, text: PreTrainedModel) -> float:
    """The largest difference of the two models' logits of a few tokens."""
    ids = torch.arange(_TOKENS)[None] * 37 % text.config.vocab_size
    logits = [model.eval()(input_ids=ids, use_cache=False).logits.float() for model in (whole, text)]
    return float((logits[0] - logits[1]).abs().max())
