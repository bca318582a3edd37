"""OVERRIDES: the private parts of transformers and accelerate that the trainers here override, call or write to.

They may change in any release without notice. Each stands here with the signature that it was written for; a test
compares it with the installed one, and finds private overrides that are missing here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

TRANSFORMERS = "5.23.0"
ACCELERATE = "1.15.0"


@dataclass(frozen=True)
class Override:
    """A private method of transformers.Trainer that a trainer here overrides.

    Attributes:
        name: of the method. signature: names and defaults of its parameters, without types.
        reason: why it is overridden.
        version: of transformers, whose signature that is.
    """

    name: str
    signature: str
    reason: str
    version: str = TRANSFORMERS


@dataclass(frozen=True)
class Internal:
    """A private attribute or function of another package that is read, written or called here.

    Attributes:
        owner: module, and class or function, whose source names it ("transformers.trainer.Trainer").
        name: of the attribute or function.
        reason: what it is used for, and where.
        signature: of a function; None for an attribute.
        version: of the package.
    """

    owner: str
    name: str
    reason: str
    signature: str | None = None
    version: str = TRANSFORMERS


OVERRIDES: tuple[Override, ...] = (
    Override(
        "_finalize_training",
        "(self, trial, num_train_samples, start_time)",
        "A resumed run reports the mean loss of all steps, and the newest checkpoint is not deleted at the end.",
    ),
    Override(
        "_get_grad_norm",
        "(self, model, grad_norm=None)",
        "StepGuard sees the norm of the gradient before the optimizer does.",
    ),
    Override(
        "_get_output_dir",
        "(self, trial)",
        "While a checkpoint is written, it lies in a temporary folder.",
    ),
    Override(
        "_get_train_sampler",
        "(self, train_dataset=None)",
        "The order of samples is a function of the seed and the epoch alone (EpochSampler).",
    ),
    Override(
        "_init_training_state",
        "(self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial)",
        "Compare the run with the record in the checkpoint (RunRecord); place a stream where it was.",
    ),
    Override(
        "_issue_warnings_after_load",
        "(self, load_result)",
        "A checkpoint that lacks weights of the model is refused; Trainer warns and continues.",
    ),
    Override(
        "_load_best_model",
        "(self)",
        "The best checkpoint is loaded only if its manifest finds it complete.",
    ),
    Override(
        "_load_from_checkpoint",
        "(self, resume_from_checkpoint, model=None)",
        "Calibrated scales are those of the checkpoint, as its weights are.",
    ),
    Override(
        "_load_optimizer_and_scheduler",
        "(self, checkpoint)",
        "accelerate loads a sharded FSDP1 optimizer into tensors that must exist already.",
    ),
    Override(
        "_maybe_log_save_evaluate",
        "(self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=None)",
        "A signal ends an evaluation; the run is saved and stops. An epoch that it ends early is not logged as one.",
    ),
    Override(
        "_push_from_checkpoint",
        "(self, checkpoint_folder)",
        "A checkpoint is uploaded once it has its name, not from the temporary folder.",
    ),
    Override(
        "_run_epoch",
        "(self, model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, "
        "ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch)",
        "Trainer would train a step too many when it resumes at the last one; accelerate loses the sampler behind "
        "skipped batches, so the epoch is given to it here.",
    ),
    Override(
        "_save",
        "(self, output_dir=None, state_dict=None)",
        "The final model is written in its original dtype with what layers learned in its weights, a checkpoint under "
        "the model's own names, and the training arguments as JSON in place of a pickle.",
    ),
    Override(
        "_save_checkpoint",
        "(self, model, trial)",
        "A checkpoint keeps FP32 masters and appears whole or not at all.",
    ),
    Override(
        "_save_optimizer_and_scheduler",
        "(self, output_dir)",
        "Under FSDP, Trainer writes the whole model beside the optimizer; a checkpoint of adapters has no model. The "
        "tensors get no CRC32 of their own.",
    ),
)

INTERNALS: tuple[Internal, ...] = (
    Internal(
        "transformers.trainer.Trainer",
        "_evaluate",
        "An evaluation that was cut short is repeated as Trainer does it while training.",
        "(self, trial, ignore_keys_for_eval, skip_scheduler=False)",
    ),
    Internal(
        "transformers.trainer.Trainer",
        "_determine_best_metric",
        "Whether that evaluation is the best so far.",
        "(self, metrics, trial)",
    ),
    Internal("transformers.trainer.Trainer", "self._tr_loss", "Losses not yet logged, kept in a checkpoint."),
    Internal("transformers.trainer.Trainer", "self._total_loss_scalar", "Sum of logged losses, kept in a checkpoint."),
    Internal("transformers.trainer.Trainer", "self._globalstep_last_logged", "Step of the last log, kept likewise."),
    Internal("transformers.trainer.Trainer", "self._initial_global_step", "First step that the mean loss counts."),
    Internal(
        "transformers.trainer.Trainer",
        "_get_num_items_in_batch",
        "Count the labelled tokens of generic text in a step as Trainer counts all of them.",
        "(self, batch_samples, device)",
    ),
    Internal("transformers.trainer.Trainer", "self._signature_columns", "Keep the mark of generic text in rows."),
    Internal(
        "transformers.trainer.Trainer",
        "_set_signature_columns_if_needed",
        "Find the other columns that are kept.",
        "(self)",
    ),
    Internal(
        "accelerate.utils.fsdp_utils",
        "fsdp2_prepare_model",
        "Shard a frozen teacher, which Accelerator refuses without an optimizer.",
        "(accelerator, model)",
        ACCELERATE,
    ),
    Internal(
        "accelerate.accelerator.Accelerator",
        "_original_forward",
        "A model's forward pass without autocast, to recognize its head.",
        version=ACCELERATE,
    ),
    Internal(
        "accelerate.accelerator.Accelerator",
        "_prepare_fsdp2",
        "Shard BF16 parameters as they are, where there are no FP32 masters.",
        "(self, *args)",
        ACCELERATE,
    ),
    Internal(
        "accelerate.state.AcceleratorState",
        "_mixed_precision",
        "Switched off while it does so, or accelerate would make FP32 masters.",
        version=ACCELERATE,
    ),
    Internal(
        "accelerate.utils.dataclasses.FullyShardedDataParallelPlugin",
        "mixed_precision_policy",
        "Gather FP32 parameters and reduce FP32 gradients.",
        version=ACCELERATE,
    ),
)


def signature_of(function: Callable) -> str:
    """Names and defaults of a function's parameters, without types: "(self, model, grad_norm=None)"."""
    signature = inspect.signature(function)
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))
