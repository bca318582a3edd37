"""The model that a stage starts from without its weights: what cannot be done with it is found before they are read."""

from __future__ import annotations

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel

from qat.checkpoints.fit import first_line
from qat.errors import UserError

from ..arguments.training import TrainingArguments
from .loading import without_weights
from .start import Start

_FAIL_UNDER_AUTOCAST = ("dbrx", "xlstm", "xmod")  # their code in transformers adds or multiplies BF16 and FP32


def skeleton_of(start: Start) -> PreTrainedModel:
    """The model with its parameters on the meta device, unquantized.

    Raises:
        UserError: its configuration cannot be read, or is not of a causal language model.
    """
    try:
        return without_weights(start.model_args, start.cache_dir)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--model_name_or_path {start.model_args.model_name_or_path!r} is no causal language model: "
            f"{first_line(error)[:300]}"
        ) from error


def check_loads_again(start: Start, config: PretrainedConfig) -> None:
    """Refuse a model that transformers makes of a larger one and cannot load once it is saved.

    Raises:
        UserError: as described.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not hasattr(config, "auto_map"):
        raise UserError(
            f"--model_name_or_path {start.model_args.model_name_or_path!r}: transformers trains the language model "
            f"inside, {config.model_type!r}, and AutoModelForCausalLM could not load it again"
        )


def check_autocast(args: TrainingArguments, config: PretrainedConfig) -> None:
    """Refuse families whose code fails under autocast.

    Raises:
        UserError: as described.
    """
    if config.model_type in _FAIL_UNDER_AUTOCAST and (args.bf16 or args.fp16):
        raise UserError(
            f"--{'bf16' if args.bf16 else 'fp16'} True: transformers' code of {config.model_type} does not run under "
            "autocast, since it adds or multiplies tensors of two dtypes; give --bf16 False --fp16 False"
        )


def check_length(max_length: int, default: int, config: PretrainedConfig) -> None:
    """Refuse samples longer than the model has positions for; the default is no such wish.

    Raises:
        UserError: as described.
    """
    limit = positions_of(config)
    if limit is not None and max_length > limit and max_length != default:
        raise UserError(
            f"--model_max_length {max_length} is more than the {limit} positions of the model; give at most {limit}, "
            "or raise max_position_embeddings in its config.json if it can take more"
        )


def positions_of(config: PretrainedConfig) -> int | None:
    """The tokens that a model has positions for, scaled ones included; None where its configuration does not say."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:  # XLNet has -1
        return None
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings") or limit
    return max(limit, int(original * factor)) if factor else limit
