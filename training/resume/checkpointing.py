"""CheckpointingTrainer: a Trainer whose checkpoints and models appear whole or not at all.

While a checkpoint is written, Trainer's output folder is a temporary one (written.py). The files of the model and of
the optimizer are written beside each other, and they are flushed to disk meanwhile (qat/files/sealing.py). The next
step begins when all of them are on disk and the folder has its name.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from torch.utils.serialization import config
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from qat.checkpoints.device import free_host_bytes
from qat.checkpoints.staging import free_pinned, pinned_bytes

from ..backends.writers import Writers
from .checkpoint_weights import own_names
from .run_record import RunRecord
from .safeguards import check_weights
from .written import (
    Content,
    check_saved_model,
    checkpoint_written_whole,
    checkpoints_in,
    delete_older_checkpoints,
    model_written_whole,
)

_SAVE = {"save.compute_crc32": False}  # the manifest has one of the whole file; `torch.load` does not look at these
_PINNED = {"save.use_pinned_memory_for_d2h": True}  # to which a GPU copies many times as fast
_PINNED_PART = 4  # pinned at most: one part in so many of the free memory, since the system cannot take it back


class CheckpointingTrainer(Trainer):
    """A Trainer that writes into temporary folders, and gives them their names when they are complete and on disk."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._writers = Writers.of(self.args)
        self._content: Content | None = None  # of the checkpoint that is being written
        self._record: RunRecord | None = None
        self._ended: dict | None = None  # the progress at the end of a training in this process
        self._saved_step = 0

    @property
    def has_adapters(self) -> bool:
        """Whether checkpoints hold adapters in place of a model."""
        return False

    def _progress_now(self) -> dict:
        """What a run that resumes from a checkpoint needs beside the state of Trainer."""
        return {}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model to `output_dir` (default: `args.output_dir`), whole or not at all."""
        if self._content is not None:  # which is itself written to a temporary folder
            self._save_weights(output_dir, _internal_call)
            return
        with model_written_whole(output_dir or self.args.output_dir, self.args.should_save) as partial:
            super().save_model(str(partial), _internal_call=True)
            if self.args.should_save:
                check_saved_model(partial)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_weights(self, output_dir: str | None, internal: bool) -> None:
        """The model's part of a checkpoint, on a thread where no other process takes part in it."""
        write = super().save_model
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            write(output_dir, internal)
            return

        def write_completely(content: Content) -> None:
            write(output_dir, internal)
            content.complete("model*.safetensors")

        self._content.beside(write_completely, self._content)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Trainer's own, with `torch.save` through pinned memory if there is enough; none stays pinned."""
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled  # and not written by `torch.save`
        states = () if is_sharded else getattr(self.optimizer, "state", {}).values()
        tensors = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        pinned = 0 < pinned_bytes(tensors) <= free_host_bytes() // _PINNED_PART
        try:
            with config.patch(_SAVE | (_PINNED if pinned else {})):
                super()._save_optimizer_and_scheduler(output_dir)
        finally:
            if pinned:
                free_pinned(self.args.device)

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self._content is None else str(self._content.folder)

    def _save_checkpoint(self, model, trial) -> None:
        check_weights(self.model, self.args)
        target = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        best = self._best_of(target)
        progress = self._progress_now() if self._ended is None else self._ended
        try:
            with checkpoint_written_whole(target, self._writers) as self._content:
                super()._save_checkpoint(model, trial)
                self.state.best_model_checkpoint = None if best is None else str(best)
                if self.args.should_save:
                    self.state.save_to_json(str(self._content.folder / target.name / TRAINER_STATE_NAME))
                    if self._record is not None:
                        self._record.save(self._content.folder / target.name, progress)
        finally:
            self._content = None
        self._saved_step = self.state.global_step
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(target))
        if self._writers.leads:
            delete_older_checkpoints(target.parent, self.args.save_total_limit, {target} | ({best} if best else set()))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._content is None:  # else it is called again once the folder has its name
            super()._push_from_checkpoint(checkpoint_folder)

    def _best_of(self, target: Path) -> Path | None:
        """The best checkpoint once `target` is there."""
        best = target.with_name(f"checkpoint-{self.state.best_global_step}")
        return best if best == target or best in checkpoints_in(target.parent) else None

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Trainer's own; a checkpoint has the model's own names, and the arguments are written as JSON, not pickled."""
        with own_names(self.model) if self._content is not None else nullcontext():
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            pickled = Path(output_dir or self.args.output_dir, TRAINING_ARGS_NAME)
            pickled.unlink(missing_ok=True)
            pickled.with_suffix(".json").write_text(self.args.to_json_string() + "\n", encoding="utf-8")
