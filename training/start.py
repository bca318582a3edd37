"""What a stage starts from: an unquantized model, one that was trained for a scheme, or a packed one."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from qat import QATConfig

from .arguments import ModelArguments, QuantizationArguments
from .distillation_arguments import DistillationArguments


def saved_config(model: PreTrainedModel, folder: str) -> QATConfig | None:
    """How the model of a folder was packed, or what it was trained for; None for an unquantized one."""
    packed = getattr(model, "packed_qat_config", None)
    return QATConfig.load(folder) if packed is None and Path(folder).is_dir() else packed


def check_start(
    model: PreTrainedModel,
    model_args: ModelArguments,
    quant_args: QuantizationArguments,
    distill_args: DistillationArguments,
) -> None:
    """Refuse what would learn from, or smooth, a model that is quantized already.

    Raises:
        ValueError: the teacher would be a copy of such a model; smoothing would undo the rounding of a packed one; or a
            cache would hold more tokens than there are.
    """
    folder = model_args.model_name_or_path
    saved = saved_config(model, folder)
    copies = distill_args.distill and distill_args.distill_teacher != "self"
    if saved is not None and copies and distill_args.teacher_model_name_or_path is None:
        raise ValueError(
            f"--distill True: the teacher would be a copy of --model_name_or_path {folder!r}, which is quantized "
            f"already ({saved.summary}); name the unquantized model that it came from with --teacher_model_name_or_path"
        )
    if getattr(model, "packed_qat_config", None) is not None and quant_args.smooth_alpha:
        raise ValueError(
            f"--smooth_alpha {quant_args.smooth_alpha} would undo the rounding that --model_name_or_path {folder!r} "
            "was packed with; give --smooth_alpha 0, or start from the unquantized model"
        )
    vocabulary = model.config.get_text_config().vocab_size
    if distill_args.distill_teacher == "cache" and distill_args.distill_top_k > vocabulary:
        raise ValueError(
            f"--distill_top_k {distill_args.distill_top_k} is more than the {vocabulary} tokens of the vocabulary; "
            "choose fewer, such as 16"
        )
