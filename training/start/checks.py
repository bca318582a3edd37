"""What a stage starts from: an unquantized model, one that was trained for a scheme, or a packed one."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from qat import QATConfig
from qat.checkpoints.unpack import is_packed

from ..arguments.distillation import DistillationArguments
from ..arguments.model import ModelArguments
from ..arguments.quantization import QuantizationArguments


def saved_config(model: PreTrainedModel, folder: str) -> QATConfig | None:
    """How the model of a folder was packed, or what it was trained for; None for an unquantized one."""
    packed = getattr(model, "packed_qat_config", None)
    return QATConfig.load(folder) if packed is None and Path(folder).is_dir() else packed


def check_start(
    model_args: ModelArguments, quant_args: QuantizationArguments, distill_args: DistillationArguments
) -> None:
    """Refuse what would learn from, or smooth, a model that is quantized already; reads no weights.

    Raises:
        ValueError: the teacher would be such a model; smoothing would undo the rounding of a packed one; or a setting
            of quantization has no effect, because nothing is quantized.
    """
    folder = model_args.model_name_or_path
    packed, trained = is_packed(folder), QATConfig.load(folder)
    if packed or trained is not None:
        _check_teacher(folder, packed, trained, distill_args)
    elif quant_args.quant_scheme is None and quant_args.quant_mapping is None:
        quant_args.check_unused()
    if packed and quant_args.smooth_alpha:
        raise ValueError(
            f"--smooth_alpha {quant_args.smooth_alpha} would undo the rounding that --model_name_or_path {folder!r} "
            "was packed with; give --smooth_alpha 0, or start from the unquantized model"
        )


def _check_teacher(folder: str, packed: bool, trained: QATConfig | None, distill_args: DistillationArguments) -> None:
    """A copy of weights that were trained for a scheme is not the model that they came from. The student with its
    quantizers off is none either if its weights are quantized values: packed, or baked (qat/bake.py)."""
    if not distill_args.distill or distill_args.teacher_model_name_or_path is not None:
        return
    remedy = "name the unquantized model that it came from with --teacher_model_name_or_path"
    values = packed or bool(trained.training.get("learn_exponent"))
    if distill_args.distill_teacher == "self":
        if values:
            raise ValueError(
                f"--distill_teacher self: the weights of --model_name_or_path {folder!r} are quantized values, with "
                f"its quantizers off, too; leave --distill_teacher out and {remedy}"
            )
        return
    how = "packed" if trained is None else trained.summary
    raise ValueError(
        f"--distill True: the teacher would be a copy of --model_name_or_path {folder!r}, which is quantized already "
        f"or was trained to be ({how}); {remedy}"
    )


def check_vocabulary(model: PreTrainedModel, distill_args: DistillationArguments) -> None:
    """Refuse a cache of more tokens of each distribution than the model has.

    Raises:
        ValueError: as said.
    """
    top_k, samples = distill_args.distill_top_k, distill_args.distill_samples
    vocabulary = model.config.get_text_config().vocab_size
    if distill_args.distill_teacher == "cache" and top_k + samples > vocabulary:
        raise ValueError(
            f"--distill_top_k {top_k} and --distill_samples {samples} are more than the {vocabulary} tokens of the "
            "vocabulary; choose fewer, such as 16 and 16, or --distill_teacher copy"
        )
