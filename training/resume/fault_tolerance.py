"""FaultTolerantTrainer: a Trainer that loses at most the steps since the last checkpoint in any fault.

* Checkpoints and the final model appear whole or not at all (checkpointing.py); a run resumes from the newest complete
  one.
* A resumed run has the same samples, losses, learning rates and weights as one that was never interrupted:
  the order of samples depends on seed and epoch alone (sampling.py), evaluation does not use the random numbers
  of training, and sums not yet logged are kept. Settings that would break this are refused (resuming.py).
* SIGTERM, Ctrl-C, and non-finite losses and gradients end a run between two steps, and an evaluation between two
  batches (safeguards.py). An evaluation that was cut short is repeated when the run is resumed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.data import DataLoader, Sampler
from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from qat.processes import Signalled, name_of, status_of

from .checkpoints import find_checkpoint
from .resuming import ResumingTrainer
from .safeguards import StepGuard
from .sampling import EpochSampler, InterleavingSampler, lengths_of
from .steps import check_steps, check_trained
from .uncalled import UncalledLayers
from .workers import with_lasting_workers

logger = logging.getLogger(__name__)


class FaultTolerantTrainer(ResumingTrainer):
    """A Trainer that can be killed at any moment; arguments are those of ResumingTrainer."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._evaluation_is_due = False
        self._train_sampler: Sampler | None = None
        self._guard = StepGuard(
            getattr(self.args, "max_nan_steps", 0), getattr(self.args, "optimizer_in_backward", False)
        )
        self.add_callback(UncalledLayers())  # before the guard, which may take the gradients away
        self.add_callback(self._guard)
        self.add_callback(_ProgressRestorer(self))

    @property
    def was_interrupted(self) -> bool:
        """Whether SIGTERM or Ctrl-C ended the training; there is a checkpoint of its last step then."""
        return self._guard.interrupted

    @property
    def exit_status(self) -> int:
        """Of a program whose training was interrupted: 143 after SIGTERM, 130 after Ctrl-C; otherwise 0."""
        return status_of(self._guard.signum) if self.was_interrupted else 0

    # ---- Training ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """Trainer's own; True resumes from the newest complete checkpoint.

        Raises:
            UserError: there is no step to train, see steps.py.
        """
        if resume_from_checkpoint is True:
            model = self.accelerator.unwrap_model(self.model)
            config = getattr(model, "qat_config", None)
            resume_from_checkpoint = find_checkpoint(
                self.args.output_dir, "True", config, self._writers, self.has_adapters
            )
        check_steps(self.args, self.train_dataset)
        self._ended, self._saved_step, self._evaluation_is_due = None, 0, False
        with self._guard.listening():
            result = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.was_interrupted:
            self._log_interruption()
        else:
            check_trained(self.state.global_step)
        return result

    def _log_interruption(self) -> None:
        logger.warning(
            "%s: saved at step %d; the same command continues from there",
            name_of(self._guard.signum),
            self.state.global_step,
        )

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        """Trainer's own, whose loss the guard sees."""
        loss = super().training_step(*args, **kwargs)
        self._guard.see(loss)
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not self.args.fp16:  # there the gradient scaler skips steps that overflow, as it should
            self._guard.see(norm)
        return norm

    def _get_train_sampler(self, train_dataset=None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        strategy = self.args.train_sampling_strategy
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if dataset is None or not has_length(dataset) or strategy not in ("random", "group_by_length"):
            sampler = super()._get_train_sampler(train_dataset)
            if strategy == "batch_rebalance" and sampler is not None:
                sampler.seed = seed  # transformers 5.23 shuffles by 42, whatever the arguments say
            return sampler
        interleave = getattr(dataset, "interleave", None)  # a MixedDataset: its domain is what an epoch counts
        rows = dataset if interleave is None else dataset.domain
        lengths = lengths_of(rows, self.args.length_column_name) if strategy == "group_by_length" else None
        group = self.get_total_train_batch_size(self.args)
        self._train_sampler = EpochSampler(len(rows), seed, lengths, group)
        if interleave is not None:
            self._train_sampler = InterleavingSampler(self._train_sampler, interleave, len(dataset))
        return self._train_sampler

    def get_train_dataloader(self) -> DataLoader:
        """Trainer's own; its workers outlive a SIGTERM to all processes, so that the step can end."""
        return with_lasting_workers(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """Trainer's own; see `get_train_dataloader`."""
        return with_lasting_workers(super().get_eval_dataloader(eval_dataset))

    def get_test_dataloader(self, test_dataset) -> DataLoader:
        """Trainer's own; see `get_train_dataloader`."""
        return with_lasting_workers(super().get_test_dataloader(test_dataset))

    def _run_epoch(self, model, epoch, *args, **kwargs) -> None:
        self._evaluate_if_due(kwargs.get("trial"), kwargs.get("ignore_keys_for_eval"))
        if self.state.global_step >= self.state.max_steps:  # transformers 5.23 would train a step too many
            self.control.should_training_stop = True
        if self.control.should_training_stop:
            return
        if self._train_sampler is not None:  # accelerate 1.15 loses it behind skipped batches of several processes
            self._train_sampler.set_epoch(epoch)
        super()._run_epoch(model, epoch, *args, **kwargs)

    # ---- Evaluation ----

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Trainer's own; training draws the same random numbers whether and how often it is called.

        Raises:
            Signalled: a SystemExit, after SIGTERM or Ctrl-C and at most one more batch. What was trained since the last
                checkpoint is saved before.
        """
        kind = self.args.device.type
        devices = [] if kind == "cpu" else [torch.accelerator.current_device_index()]
        with self._ended_by_signals(), torch.random.fork_rng(devices, device_type="cuda" if kind == "cpu" else kind):
            return super().evaluate(*args, **kwargs)

    def predict(self, *args, **kwargs):
        """Trainer's own; signals end it as they end `evaluate`."""
        with self._ended_by_signals():
            return super().predict(*args, **kwargs)

    @contextmanager
    def _ended_by_signals(self) -> Iterator[None]:
        with self._guard.listening(waits=True):
            try:
                self._guard.check_evaluation(self.args)
                yield
            except Signalled:
                if not self.is_in_train:  # else _maybe_log_save_evaluate saves
                    self._save_what_was_trained()
                raise

    def _save_what_was_trained(self) -> None:
        """A checkpoint of the last step, if this process trained and none is there (--save_strategy no or best)."""
        holds_best = self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None
        if self._ended is None or self._saved_step == self.state.global_step or holds_best:
            return
        self._save_checkpoint(self.model_wrapped, None)
        self._log_interruption()

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, epoch, *args, **kwargs) -> None:
        """Trainer's own. An evaluation that a signal ends is due when the run is resumed."""
        is_saved = self.was_interrupted and self._saved_step == self.state.global_step
        if is_saved and self.state.epoch < epoch + 1:
            return  # Trainer ends the epoch early: what belongs to its end is done when it has really ended
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, epoch, *args, **kwargs)
        except Signalled:
            if not self._guard.interrupted:
                raise
            self._evaluation_is_due = True
            self.control.should_evaluate = self.control.should_save = False
            self.control.should_training_stop = True
            self._save_checkpoint(model, trial)

    def _evaluate_if_due(self, trial, ignore_keys_for_eval) -> None:
        """Repeat the evaluation that was cut short when the checkpoint was written."""
        if not self._progress.pop("evaluation_is_due", False):
            return
        metrics = self._evaluate(trial, ignore_keys_for_eval)
        self._determine_best_metric(metrics, trial)
        self._find_best_checkpoint(trial)

    # ---- The end, and what a checkpoint has of the way to it ----

    def _finalize_training(self, *args, **kwargs):
        """Trainer's own, over all steps of the run, and without deleting the newest checkpoint."""
        self._evaluate_if_due(args[0] if args else kwargs.get("trial"), None)
        self._ended = self._progress_now()
        counted_from = getattr(self, "_initial_global_step", 0)  # transformers 5.17 counts all steps itself
        first = 0 if self._progress else counted_from
        if first != counted_from:
            total = self._total_loss_scalar + self._tr_loss.item()
            mean = total / max(self.state.global_step - first, 1)
            self._tr_loss.zero_()
            self._total_loss_scalar = mean * max(self.state.global_step - counted_from, 0.001)
        wants_best = self.args.load_best_model_at_end and not self.was_interrupted
        if wants_best and self.state.best_model_checkpoint is None:
            logger.warning("there is no best checkpoint to load, the last weights stay")
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _progress_now(self) -> dict:
        """Sums that the log has not shown yet, and counts."""
        return {
            "tr_loss": self._writers.gather(self._tr_loss.item()), "total_loss": self._total_loss_scalar,
            "last_logged_step": self._globalstep_last_logged, "nan_steps": self._guard.nan_steps,
            "max_steps": self.state.max_steps, "evaluation_is_due": self._evaluation_is_due,
        }  # fmt: skip


class _ProgressRestorer(TrainerCallback):
    def __init__(self, trainer: FaultTolerantTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        trainer, progress = self.trainer, self.trainer._progress
        if progress:
            losses = progress["tr_loss"]  # of each process
            same = len(losses) == args.world_size
            trainer._tr_loss += losses[args.process_index] if same else sum(losses) / len(losses)
            trainer._total_loss_scalar = progress["total_loss"]
            trainer._globalstep_last_logged = progress["last_logged_step"]
            trainer._guard.nan_steps = progress["nan_steps"]
