"""RunRecord: the settings of the run that wrote a checkpoint, which a resumed run compares with its own.

Some settings decide which samples come next, and some what the checkpoint's state belongs to (the model, the kind of
optimizer, smoothing): another value is refused. Others change what is learned: another value is logged. The record lies
in each checkpoint as `run.json`, with the sums that the log had not shown yet.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch.utils.data import Dataset, IterableDataset
from transformers import TrainingArguments

from qat.errors import UserError

logger = logging.getLogger(__name__)

RECORD_NAME = "run.json"
_FORMAT_VERSION = 1
_DIGEST_SAMPLES = 64
_WITHOUT_EFFECT = (
    "data_cache_dir", "preprocessing_num_workers", "distill_cache_dir", "log_quantization", "export_format",
)  # fmt: skip
_ORDER = ("seed", "data_seed", "train_sampling_strategy", "dataloader_drop_last", "model_max_length")
# The optimizer's state brings its own learning rate, betas and weight decay along, whatever the arguments are.
_KEPT = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args")
_LEARNING = (
    *_KEPT, "lr_scheduler_type", "warmup_steps", "max_steps", "num_train_epochs", "optim", "max_grad_norm", "bf16",
    "fp16", "lr_scheduler_kwargs", "label_smoothing_factor", "neftune_noise_alpha", "master_dtype", "moment_dtype",
)  # fmt: skip
# What cannot change though it decides how to learn, and why.
_FIXED = {
    "optim": "the state of one optimizer is of no use to another",
    "master_dtype": "the state belongs to weights of that dtype",
    "moment_dtype": "the optimizer's state has that dtype",
    "smooth_alpha": "the model was smoothed when the run began",
    "weight_init": "the weights were changed when the run began",
    "base_in_scheme": "its adapters are for the one base, rounded or not",
    "lora_init": "adapters and frozen weights were made when the run began",
}
_SAME_OPTIMIZER = {"adamw_torch", "adamw_torch_fused"}
# Of a model's configuration: where it came from and how it is run, not what it computes.
_NOT_COMPUTED = {
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures", "id2label",
    "label2id", "quantization_config",
}  # fmt: skip


@dataclass(frozen=True)
class RunRecord:
    """Settings by the name of their argument, as JSON values.

    Attributes:
        order: what decides which samples come next.
        learning: what decides what is learned from them.
        model: the configuration and the weights that the run began with.
        processes: how many there were; the order of sums depends on it, nothing else.
    """

    order: dict = field(default_factory=dict)
    learning: dict = field(default_factory=dict)
    processes: int = 1
    model: dict = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        args: TrainingArguments,
        dataset: Dataset,
        samples_per_step: int,
        steps_per_epoch: int | None,
        data: Mapping | None = None,
        learning: Mapping | None = None,
        model: Mapping | None = None,
    ) -> RunRecord:
        """The record of a run about to begin.

        Args:
            samples_per_step: over all processes and accumulated batches.
            steps_per_epoch: None for a stream.
            data, learning: further settings by name.
            model: what the run began with, by name; see `model_settings`.
        """
        order = {**_without(data or {}, _WITHOUT_EFFECT), **_some(args, _ORDER), "training data": digest(dataset)}
        order |= {"samples per step": samples_per_step, "steps per epoch": steps_per_epoch}
        if steps_per_epoch is None:
            order |= _sharing(args, dataset)
        learning = {**_some(args, _LEARNING), **_without(learning or {}, _WITHOUT_EFFECT)}
        return cls(_as_json(order), _as_json(learning), args.world_size, _as_json(dict(model or {})))

    def save(self, folder: str | Path, progress: dict) -> None:
        """Write the record, and `progress` beside it, to `folder`."""
        content = {"format_version": _FORMAT_VERSION, **asdict(self), "progress": progress}
        Path(folder, RECORD_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def check(self, checkpoint: str | Path, ignore_data_skip: bool = False) -> dict:
        """Compare with the run that wrote `checkpoint`; returns the progress kept there, empty if there is none.

        Raises:
            UserError: the next samples would not be those of the run that is resumed, its state would belong to another
                model or optimizer, or the record is damaged.
        """
        path = Path(checkpoint, RECORD_NAME)
        if not path.is_file():
            logger.warning("%s is missing, so whether data and settings are the same is not known", path)
            return {}
        content = _read(path)
        self._check_fixed(checkpoint, content)
        if differing := _differences(content["order"], self.order):
            complaint = f"{checkpoint} was written with other data or another order of it: {'; '.join(differing)}"
            if not ignore_data_skip:
                began_without = self.order.get("distill_generic") and not content["order"].get("distill_generic")
                none = " (--distill_generic none: the run began without generic text)" if began_without else ""
                raise UserError(
                    f"{complaint}. Give the same values{none}; or --ignore_data_skip True, to resume from the "
                    "checkpoint's weights at the beginning of the data; or another --output_dir, to start anew"
                )
            logger.warning("%s; --ignore_data_skip True: the run resumes at the beginning of the data", complaint)
        for difference in _differences(content["learning"], self.learning):
            kept = difference.partition(":")[0] in _KEPT
            logger.warning("resuming with another %s%s", difference, _KEPT_NOTE if kept else "")
        if content["processes"] != self.processes:
            logger.warning(
                "resuming with %d processes a run that %d began: samples and their order stay the same, sums are added "
                "in another order, and dropout, if the model has any, draws other masks",
                self.processes, content["processes"],
            )  # fmt: skip
        return content.get("progress", {})

    def _check_fixed(self, checkpoint: str | Path, content: dict) -> None:
        """Refuse what the state in the checkpoint does not belong to."""
        for name, reason in _FIXED.items():
            saved, current = content["learning"].get(name), self.learning.get(name)
            if name in content["learning"] and name in self.learning and saved != current:
                if name == "optim" and {saved, current} <= _SAME_OPTIMIZER:
                    continue
                raise UserError(
                    f"{checkpoint} was written with --{name} {saved}, and this run has {current}: {reason}. Give --"
                    f"{name} {saved}; or another --output_dir, to start anew"
                )
        if differing := _differences(content.get("model", {}), self.model):
            began = content["learning"].get("model_name_or_path")
            which = "the model that the run began with" if began is None else repr(began)
            raise UserError(
                f"{checkpoint} was written by a run of another model: {'; '.join(differing)}. Give "
                f"--model_name_or_path {which}, as it was then; or another --output_dir, to start anew"
            )


def model_settings(config: Mapping, weights: str | None) -> dict:
    """What a run began with: its model's configuration, one entry for each value, and the weights' fingerprint."""
    return {**_flat(config, "configuration "), "weights, fingerprint": weights}


def _flat(values: Mapping, prefix: str) -> dict:
    flat: dict = {}
    for name, value in values.items():
        if name in _NOT_COMPUTED:
            continue
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _read(path: Path) -> dict:
    """The content of a record.

    Raises:
        UserError: it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(content[name], dict) for name in ("order", "learning")) and "processes" in content:
            return content
        raise TypeError("it has not the form of a record")
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}); give another checkpoint "
            "(--resume_from_checkpoint PATH)"
        ) from error


_KEPT_NOTE = " (the optimizer's state keeps the checkpoint's value, which stays in force)"


def digest(dataset: Dataset) -> str | None:
    """Number of samples and a checksum of 64 evenly spaced ones; None for a stream, which cannot be read twice."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        return None
    count, content = len(dataset), hashlib.blake2b(digest_size=8)
    for i in range(min(count, _DIGEST_SAMPLES)):
        sample = dataset[i * count // min(count, _DIGEST_SAMPLES)]
        content.update(repr([(key, list(sample[key])) for key in ("input_ids", "labels") if key in sample]).encode())
    return f"{count} samples, checksum {content.hexdigest()}"


def _sharing(args: TrainingArguments, stream: Dataset) -> dict:
    """How processes and their workers share the files of a stream: which sample comes next depends on it.

    With fewer files than processes, all processes read all files (accelerate 1.15).
    """
    files = getattr(stream, "num_shards", 1)
    processes = args.world_size if files >= args.world_size else 1
    workers = min(max(args.dataloader_num_workers, 1), max(files // processes, 1))
    return {"processes that share the files": processes, "workers that share the files": workers}


def _some(args, names: tuple[str, ...]) -> dict:
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def _without(values: Mapping, names: tuple[str, ...]) -> dict:
    return {name: value for name, value in values.items() if name not in names}


def _as_json(values: dict) -> dict:
    return json.loads(json.dumps(values, default=str))


def _differences(saved: dict, current: dict) -> list[str]:
    """One line for each name that both know and whose values differ. A fingerprint of None is not known."""
    return [
        f"{name}: {saved[name]!r} in the checkpoint, {current[name]!r} now"
        for name in current
        if name in saved
        and saved[name] != current[name]
        and not (name.endswith("fingerprint") and None in (saved[name], current[name]))
    ]
