"""RunRecord: the settings of the run that wrote a checkpoint, which a resumed run compares with its own.

Some settings decide which samples come next: another value is refused. Others change what is learned from them:
another value is logged. The record lies in each checkpoint as `run.json`, with the sums that the log had not shown yet.
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
_WITHOUT_EFFECT = ("data_cache_dir", "preprocessing_num_workers")
_ORDER = ("seed", "data_seed", "train_sampling_strategy", "dataloader_drop_last", "model_max_length")
# The optimizer's state brings its own learning rate, betas and weight decay along, whatever the arguments are.
_KEPT = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
_LEARNING = (
    *_KEPT, "lr_scheduler_type", "warmup_steps", "max_steps", "num_train_epochs", "optim", "max_grad_norm", "bf16",
    "fp16", "optim_args", "lr_scheduler_kwargs", "label_smoothing_factor", "neftune_noise_alpha",
)  # fmt: skip


@dataclass(frozen=True)
class RunRecord:
    """Settings by the name of their argument, as JSON values.

    Attributes:
        order: what decides which samples come next.
        learning: what decides what is learned from them.
        processes: how many there were; the order of sums depends on it, nothing else.
    """

    order: dict = field(default_factory=dict)
    learning: dict = field(default_factory=dict)
    processes: int = 1

    @classmethod
    def of(
        cls,
        args: TrainingArguments,
        dataset: Dataset,
        samples_per_step: int,
        steps_per_epoch: int | None,
        data: Mapping | None = None,
        learning: Mapping | None = None,
    ) -> RunRecord:
        """The record of a run about to begin.

        Args:
            samples_per_step: over all processes and accumulated batches.
            steps_per_epoch: None for a stream.
            data, learning: further settings by name.
        """
        order = {**_without(data or {}, _WITHOUT_EFFECT), **_some(args, _ORDER), "training data": digest(dataset)}
        order |= {"samples per step": samples_per_step, "steps per epoch": steps_per_epoch}
        if steps_per_epoch is None:
            order |= _sharing(args, dataset)
        return cls(_as_json(order), _as_json({**_some(args, _LEARNING), **(learning or {})}), args.world_size)

    def save(self, folder: str | Path, progress: dict) -> None:
        """Write the record, and `progress` beside it, to `folder`."""
        content = {"format_version": _FORMAT_VERSION, **asdict(self), "progress": progress}
        Path(folder, RECORD_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def check(self, checkpoint: str | Path, ignore_data_skip: bool = False) -> dict:
        """Compare with the run that wrote `checkpoint`; returns the progress kept there, empty if there is none.

        Raises:
            UserError: the next samples would not be those of the run that is resumed.
        """
        path = Path(checkpoint, RECORD_NAME)
        if not path.is_file():
            logger.warning("%s is missing, so whether data and settings are the same is not known", path)
            return {}
        content = json.loads(path.read_text(encoding="utf-8"))
        if differing := _differences(content["order"], self.order):
            complaint = f"{checkpoint} was written with other data or another order of it: {'; '.join(differing)}"
            if not ignore_data_skip:
                raise UserError(
                    f"{complaint}. Give the same values; or --ignore_data_skip True, to resume from the checkpoint's "
                    "weights at the beginning of the data; or another --output_dir, to start anew"
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
    """One line for each name that both know and whose values differ."""
    return [
        f"{name}: {saved[name]!r} in the checkpoint, {current[name]!r} now"
        for name in current
        if name in saved and saved[name] != current[name]
    ]
