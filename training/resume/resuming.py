"""ResumingTrainer: a Trainer that resumes a run as it was, from its newest checkpoint, and finds its best one.

What the run is made of is recorded in each checkpoint (run_record.py), and compared before one is resumed. Weights that
a checkpoint lacks are refused; Trainer would leave those that the run began with.
"""

from __future__ import annotations

import logging
from pathlib import Path

from transformers.trainer_utils import has_length

from qat.errors import UserError
from qat.files.manifest import problems

from .checkpoint_weights import check_loaded
from .checkpointing import CheckpointingTrainer
from .run_record import RunRecord, model_settings
from .written import checkpoints_in

logger = logging.getLogger(__name__)


class ResumingTrainer(CheckpointingTrainer):
    """A Trainer whose runs can be resumed; other arguments are Trainer's own.

    Args:
        data_settings: by name, what decides which samples there are; with other values a run is not resumed.
        learning_settings: by name, what decides what is learned from them; other values are logged.
        start_fingerprint: of the weights that the run began with (backends/fingerprint.py), before they were smoothed;
            a run that began with others is not resumed.
        adapters_fingerprint: the same of adapters and frozen weights as they were at the start.
    """

    def __init__(
        self,
        *args,
        data_settings: dict | None = None,
        learning_settings: dict | None = None,
        start_fingerprint: str | None = None,
        adapters_fingerprint: str | None = None,
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._settings = {"data": data_settings, "learning": {**(learning_settings or {}), **self._given_optimizer()}}
        self._start_fingerprint, self._adapters_fingerprint = start_fingerprint, adapters_fingerprint
        self._progress: dict = {}  # of the checkpoint that is resumed

    @property
    def was_interrupted(self) -> bool:
        """Whether a signal ended the training."""
        return False

    def _given_optimizer(self) -> dict:
        """For the record: an optimizer that the caller made takes the place of --optim."""
        given = type(self.optimizer) if self.optimizer is not None else (self.optimizer_cls_and_kwargs or (None,))[0]
        return {} if given is None else {"optim": f"{given.__module__}.{given.__name__}"}

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        epoch, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        is_stream = not has_length(self.train_dataset)
        steps = None if is_stream else num_update_steps_per_epoch
        samples = self.get_total_train_batch_size(self.args)
        config = getattr(self.accelerator.unwrap_model(self.model), "config", None)
        model = model_settings(config.to_dict() if config is not None else {}, self._start_fingerprint)
        if self._adapters_fingerprint is not None:
            model["adapters and frozen weights at the start, fingerprint"] = self._adapters_fingerprint
        self._record = RunRecord.of(self.args, self.train_dataset, samples, steps, model=model, **self._settings)
        self._progress = {}
        if resume_from_checkpoint is None:
            return epoch, batches
        self._progress = self._record.check(resume_from_checkpoint, self.args.ignore_data_skip)
        self._saved_step = self.state.global_step
        self._find_best_checkpoint(trial)
        if is_stream and "max_steps" in self._progress and not self.args.ignore_data_skip:
            # transformers counts a stream's epochs by max_steps, though it may have begun again before
            epoch = int(self.state.epoch)
            batches_in_epoch = self._progress["max_steps"] * self.args.gradient_accumulation_steps
            batches = round((self.state.epoch - epoch) * batches_in_epoch)
        return epoch, batches

    def _find_best_checkpoint(self, trial) -> None:
        """Find the best checkpoint that the state records; only a folder of this run itself is accepted."""
        if self.state.best_global_step is None:
            self.state.best_model_checkpoint = None
            return
        best = Path(self._get_output_dir(trial), f"checkpoint-{self.state.best_global_step}")
        if best in checkpoints_in(best.parent):
            self.state.best_model_checkpoint = str(best)
            return
        logger.warning("the best checkpoint so far, %s, is gone; the best of the steps to come is kept", best)
        self.state.best_metric = self.state.best_global_step = self.state.best_model_checkpoint = None

    def _load_best_model(self) -> None:
        if (best := self._complete_best()) is not None:
            super()._load_best_model()
            self._weights_were_loaded(best)

    def _complete_best(self) -> Path | None:
        """The best checkpoint, if it is complete and the training ended by itself."""
        if self.was_interrupted:
            return None
        best = Path(self.state.best_model_checkpoint)
        faults = self._writers.gather(problems(best, self._writers.index, self._writers.count))
        if any(faults):
            logger.warning("the best checkpoint is not loaded, the last weights stay: %s: %s", best, sum(faults, []))
            return None
        return best

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except RuntimeError as error:
            if "size mismatch" not in str(error):
                raise
            raise UserError(
                f"cannot resume from {resume_from_checkpoint}: its weights have other shapes than this model's. "
                "Use the same --model_name_or_path, another --output_dir, or --resume_from_checkpoint False"
            ) from error
        self._weights_were_loaded(Path(resume_from_checkpoint))

    def _issue_warnings_after_load(self, load_result) -> None:
        """Refuse what Trainer warns of: weights that the checkpoint lacks keep the values that the run began with."""
        check_loaded(self.accelerator.unwrap_model(self.model), load_result.missing_keys, load_result.unexpected_keys)

    def _weights_were_loaded(self, checkpoint: Path) -> None:
        """What belongs to the weights of a checkpoint and is no tensor is taken from there too."""
