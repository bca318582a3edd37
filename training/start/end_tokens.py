"""The tokens that end generation: those that the data teaches the model to end its answers with."""

from __future__ import annotations

import logging

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.sets.ends import ends_of_answers, is_special

logger = logging.getLogger(__name__)


def stop_where_answers_end(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data_module: dict) -> None:
    """Add the special tokens that end the answers of the evaluation set to those that end generation.

    A base model whose tokenizer ends text with one token, trained with a template that ends turns with another
    (ChatML), would learn to write the latter, and generation would not stop there. The ids go into the generation
    configuration, which `generate` and vLLM read, and into the model's configuration.

    Args:
        data_module: from `make_supervised_data_module`.
    """
    ends = ends_of_answers(data_module, tokenizer.model_max_length)
    text_config = model.config.get_text_config()
    known = _ids(model.generation_config.eos_token_id) or _ids(getattr(text_config, "eos_token_id", None))
    new = [token for token, _ in ends.most_common() if token not in known and is_special(token, tokenizer)]
    if not new:
        return
    for config in (
        model.generation_config,
        *{id(c): c for c in (model.config, text_config)}.values(),
    ):
        config.eos_token_id = [*dict.fromkeys([*known, *new])]
    logger.info(
        "answers end with %s: added to the tokens that end generation (eos_token_id %s)",
        " and ".join(repr(tokenizer.convert_ids_to_tokens(token)) for token in new),
        model.generation_config.eos_token_id,
    )


def _ids(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)
