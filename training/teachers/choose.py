"""Choose the teacher of a run by its arguments."""

from __future__ import annotations

from torch.utils.data import Dataset
from transformers import PretrainedConfig, PreTrainedModel, TrainingArguments

from qat.errors import UserError

from ..arguments.distillation import DistillationArguments
from .cache import CachedTeacher, make_cached_teacher
from .load import load_teacher


def choose_teacher(
    model: PreTrainedModel, settings: DistillationArguments, cache_dir: str | None, trust_remote_code: bool
) -> PreTrainedModel | str | None:
    """The teacher, before the student is quantized: a frozen model, "self", or None without distillation."""
    if not settings.distill:
        return None
    check_cached_size(model.config, settings)
    if settings.distill_teacher == "self":
        return "self"
    return load_teacher(model, settings.teacher_model_name_or_path, cache_dir, trust_remote_code)


def check_cached_size(config: PretrainedConfig, settings: DistillationArguments) -> None:
    """Refuse a cache of more tokens of each distribution than the model has.

    Raises:
        UserError: it would hold more.
    """
    top_k, samples = settings.distill_top_k, settings.distill_samples
    vocabulary = config.get_text_config().vocab_size
    if settings.distill_teacher == "cache" and top_k + samples > vocabulary:
        raise UserError(
            f"--distill_top_k {top_k} and --distill_samples {samples} are more than the {vocabulary} tokens of the "
            "vocabulary; choose fewer, such as 16 and 16, or --distill_teacher copy"
        )


def cached_where_asked(
    teacher: PreTrainedModel | str | None,
    settings: DistillationArguments,
    args: TrainingArguments,
    data: dict[str, Dataset],
) -> PreTrainedModel | CachedTeacher | str | None:
    """The teacher itself, or with `--distill_teacher cache` its distributions on the sets that this run reads."""
    if settings.distill_teacher != "cache":
        return teacher
    if not args.do_train:
        data = {**data, "train_dataset": None}
    return make_cached_teacher(teacher, args, data, settings.cache_settings, settings.distill_cache_dir)
