"""QATTrainer: Hugging Face's Trainer, extended for QAT, distillation and exact evaluation.

* Evaluation sums losses over tokens, so perplexity depends on neither batch size nor padding nor processes. With a
  teacher it reports both the divergence from its distribution and the usual cross-entropy.
* Losses are those of losses/trainer.py, what is saved is in saving.py, adapters in adapters/checkpoints.py, and what
  survives a fault in resume/fault_tolerance.py.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping

import torch
from accelerate.utils import AutocastKwargs, DynamoBackend
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, Trainer

from data.conversations.formatting import IGNORE_INDEX
from data.sets.mixing import COLUMN, MixedDataset
from qat.errors import UserError
from qat.layers.learned import check_compute_dtype
from qat.layers.restore import check_trainable

from .adapters.inject import config_of
from .arguments.lora import check_with_adapters
from .arguments.trainer_options import check_trainer_options, check_with_generic, check_with_teacher
from .arguments.training import TrainingArguments
from .backends.cuda_attention import attention_without_cudnn
from .backends.fingerprint import fingerprint
from .backends.parameter_groups import separate
from .backends.saved_dtypes import SavedDtypes
from .backends.sharding import (
    initialize_state,
    keep_dtypes,
    set_precision,
)
from .backends.weightless import give_storage
from .losses.chunked import attach
from .losses.distillation import Objective
from .losses.metrics import loss_over_tokens, sum_by_sample
from .losses.router_loss import NAME as ROUTER_LOSS
from .losses.router_loss import find_router_loss
from .losses.term_means import TermMeans
from .losses.trainer import LossTrainer
from .monitoring.monitor import QuantizationMonitor
from .optimizers.choose import own_optimizer
from .optimizers.in_backward import StepsInBackward
from .resume.run_record import model_settings
from .saving import SavingTrainer
from .teachers.cache import CachedTeacher
from .teachers.frozen import agreed_head
from .teachers.protocol import Teacher, as_teacher

logger = logging.getLogger(__name__)


_PLAIN = inspect.signature(Trainer.__init__)
_FLAGS_OF_PROGRAMS = ("do_predict", "resume_from_checkpoint")  # Trainer itself does not read them
_FOR_METRICS = ("batch_eval_metrics", "eval_do_concat_batches", "eval_use_gather_object", "include_for_metrics")


class QATTrainer(LossTrainer, SavingTrainer):
    """A Trainer for plain and for prepared (`qat.prepare_qat`) causal language models; arguments are Trainer's own and
    those of FaultTolerantTrainer. Models with adapters (adapters/inject.py) train these alone.

    Without `compute_metrics`, evaluation keeps no logits. `eval_loss` is the mean cross-entropy of a token, also with
    smoothed labels and with a loss of the caller's own; `predict` gives the sums of losses as predictions, FP32 [n] for
    n samples ([n, 2] with a teacher: cross-entropy, divergence), and the numbers of labelled tokens as label_ids,
    int64 [n]. With `compute_metrics` both are as in Trainer.

    Args:
        teacher: a model, which is frozen; a Teacher; or "self", the model itself with its quantizers off.
        distill_temperature: of both distributions in the training loss; evaluation reports the divergence at 1.
        distill_ce_weight: fraction of the training loss that is cross-entropy with the data's tokens.
        generic_eval_dataset: evaluated after each evaluation of `eval_dataset`, as "eval_generic_kl" and so on.
        log_quantization: log metrics of quantization, see monitoring/monitor.py.
        parameter_groups: optimizer settings by the ends of parameter names.
        saved_dtypes: in which the final model is saved; default: those in memory.

    Raises:
        UserError: an option of `args` that does not work here (docs/trainer_options.md), or a teacher that cannot be
            used.
    """

    _is_constructed = False

    def __init__(
        self,
        *args,
        teacher: PreTrainedModel | Teacher | str | None = None,
        distill_temperature: float = 1.0,
        distill_ce_weight: float = 0.0,
        generic_eval_dataset: Dataset | None = None,
        log_quantization: bool = False,
        parameter_groups: Mapping[str, dict] | None = None,
        saved_dtypes: SavedDtypes | None = None,
        **kwargs,
    ) -> None:
        own = {name: kwargs.pop(name) for name in _PLAIN.parameters if name in kwargs}
        kwargs |= _PLAIN.bind_partial(None, *args, **own).arguments
        kwargs.pop("self")
        self._own_metrics = kwargs.get("compute_metrics") is None
        _check_options(kwargs.get("args"), self._own_metrics)
        if self._own_metrics:
            kwargs["compute_metrics"] = loss_over_tokens
            if kwargs.pop("preprocess_logits_for_metrics", None) is not None:
                logger.warning(
                    "preprocess_logits_for_metrics is not called: it prepares logits for compute_metrics, and without "
                    "one evaluation keeps none"
                )
        super().__init__(**kwargs)
        self._in_backward = StepsInBackward() if getattr(self.args, "optimizer_in_backward", False) else None
        if self._in_backward is not None:
            self.add_callback(self._in_backward)
        self._labelled_tokens, self._generic_tokens = 0, 0
        self.parameter_groups, self.saved_dtypes = parameter_groups or {}, saved_dtypes or SavedDtypes()
        self.monitor: QuantizationMonitor | None = None
        self._log_quantization = log_quantization
        self.distill_temperature, self.distill_ce_weight = distill_temperature, distill_ce_weight
        self.generic_eval_dataset = generic_eval_dataset
        self._take(self.model)
        self.teacher: Teacher | None = None
        self._collators = {"train": self.data_collator, "eval": self.data_collator}
        if teacher is not None:
            check_with_teacher(self.args)
            find_router_loss(self.accelerator.unwrap_model(self.model))  # refused if it cannot be added to a divergence
            self._settings["learning"] |= _teacher_settings(teacher)
            self.teacher = as_teacher(teacher, self.model, self.head, self.accelerator)
            self._collators = {which: self.teacher.collate(self.data_collator, which) for which in self._collators}
            self.data_collator = self._collators["train"]
        self._check_mixed()
        ce_weight = 1.0 if teacher is None else distill_ce_weight
        self._term_weights, terms = {"ce": ce_weight, "kl": 1 - ce_weight}, []
        if self._computes_loss():
            self.model_accepts_loss_kwargs = True  # whatever its forward takes: our loss counts a whole step's tokens
            terms = [name for name, weight in self._term_weights.items() if weight]
            terms += [ROUTER_LOSS] if self.router_loss is not None else []
        self._term_means = TermMeans(terms, self.accelerator, self.args.logging_nan_inf_filter)
        self._generic_means = TermMeans(("generic_kl",), self.accelerator, self.args.logging_nan_inf_filter)
        self._is_constructed = True

    @property
    def _is_mixed(self) -> bool:
        """Whether generic text is mixed into the training."""
        return isinstance(self.train_dataset, MixedDataset)

    def _check_mixed(self) -> None:
        """Refuse generic text without a teacher, and in an order that is not ours; else keep the mark of its rows."""
        if not self._is_mixed:
            return
        if self.teacher is None:
            raise UserError("a MixedDataset has generic text, of which a divergence is learned; give a teacher")
        check_with_generic(self.args)
        self._set_signature_columns_if_needed()
        self._signature_columns.append(COLUMN)

    def call_model_init(self, trial=None) -> torch.nn.Module:
        """Trainer's own; the model of a new training or trial takes the place of the one before."""
        model = super().call_model_init(trial)
        if self._is_constructed:
            model.config.use_cache = self.args.use_cache
            self._take(model)
        return model

    def _take(self, model: torch.nn.Module) -> None:
        """Monitor the model that is trained from now on, and teach its head to compute losses."""
        if self.monitor is not None:
            self.remove_callback(self.monitor)
            self.monitor = None
        if self._log_quantization and getattr(self.accelerator.unwrap_model(model), "qat_config", None) is not None:
            self.monitor = QuantizationMonitor(model, self._compute_dtype, watch_inputs=not self.args.torch_compile)
            self.add_callback(self.monitor)
        if self.accelerator.is_fsdp2:
            give_storage(model)
        self.router_loss = self._find_router_loss(model)
        self.head = self._attach_head(model)

    @property
    def _compute_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else torch.float32

    def create_optimizer(self, model=None):
        """Trainer's own optimizer, with `parameter_groups` in groups of their own."""
        created = self.optimizer is None
        if created and self.optimizer_cls_and_kwargs is None:
            trained = self.model if model is None else model
            decays = self.get_decay_parameter_names(trained)
            self.optimizer_cls_and_kwargs = own_optimizer(self.args, trained, decays)
        optimizer = super().create_optimizer(model)
        if created:
            separate(optimizer, self.model if model is None else model, self.parameter_groups)
        return optimizer

    def _get_grad_norm(self, model, grad_norm=None):
        if self._in_backward is not None:  # the gradients are gone
            grad_norm = self._in_backward.take_norm().to(self.args.device)
        return super()._get_grad_norm(model, grad_norm)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled:
            if config_of(self.model) is not None:
                version = self.accelerator.state.fsdp_plugin.fsdp_version
                check_with_adapters(getattr(self.args, "fsdp_gather_dtype", "float32"), version)
            set_precision(self.accelerator.state.fsdp_plugin, getattr(self.args, "fsdp_gather_dtype", "float32"))
        if self.accelerator.is_fsdp2 and getattr(self.args, "master_dtype", "float32") == "bfloat16":
            keep_dtypes(self.accelerator)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True):
        """accelerate wraps a model's forward pass in autocast on every backend but FSDP2; there it is done here."""
        if self.accelerator.is_fsdp2:  # no cache: it would keep a BF16 copy of each gathered weight until the end
            return self.accelerator.autocast(AutocastKwargs(cache_enabled=False))
        return super().autocast_smart_context_manager(cache_enabled)

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2 and checkpoint is not None:
            initialize_state(getattr(self.optimizer, "optimizer", self.optimizer))
        super()._load_optimizer_and_scheduler(checkpoint)

    def _attach_head(self, model: torch.nn.Module):
        """The model's head, taught to compute losses; None where a batch's logits are needed after all."""
        if reason := self._why_whole_logits(model):
            if self.accelerator.is_main_process:
                logger.warning(
                    "losses are computed from the logits of a whole batch, several tensors of tokens x vocabulary x 4 "
                    "bytes, because %s",
                    reason,
                )
            return None
        head = agreed_head(model, self.accelerator)
        if head is not None:
            attach(model, head, self.router_loss)
        return head

    def _why_whole_logits(self, model: torch.nn.Module) -> str | None:
        """What keeps losses from being computed in chunks, and the remedy; None if nothing does."""
        if not isinstance(model, PreTrainedModel):
            return f"the head of a {type(model).__name__} is not known: it is not a transformers.PreTrainedModel"
        if self.is_deepspeed_enabled:
            return "DeepSpeed wraps the model; FSDP (accelerate_config) shards it with losses in chunks"
        return None

    def train(self, *args, **kwargs):
        """Trainer's own, refused where the teacher cannot teach or what is trained could not be saved."""
        if self.teacher is not None:
            self.teacher.check(trains=True)
        check_compute_dtype(self.qat_config, self._compute_dtype, self.saved_dtypes.main)
        check_trainable(self.accelerator.unwrap_model(self.model))
        self._labelled_tokens, self._generic_tokens = None, 0
        self._term_means.clear(), self._generic_means.clear()
        return super().train(*args, **kwargs)

    @property
    def labelled_tokens(self) -> int:
        """Those trained on so far, on all processes, those before a restart included."""
        return round(float(self._labelled_tokens or 0))

    @property
    def generic_tokens(self) -> int:
        """The same of generic text, which `labelled_tokens` leaves out."""
        return round(float(self._generic_tokens))

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Trainer's own; counts the labelled tokens of a step, on all processes, without waiting for the device."""
        if self._labelled_tokens is None:  # a resumed run has those of its checkpoint
            self._labelled_tokens = self._progress.get("labelled_tokens", 0)
            self._generic_tokens = self._progress.get("generic_tokens", 0)
            for name, means in (("loss_terms", self._term_means), ("generic_terms", self._generic_means)):
                if sums := self._progress.get(name):
                    means.restore(sums)
        if num_items_in_batch is not None:
            batches, generic = self.current_gradient_accumulation_steps, self._generic_items
            self._labelled_tokens = self._labelled_tokens + (num_items_in_batch - generic) / batches
            self._generic_tokens = self._generic_tokens + generic / batches
        compiled = self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO
        with attention_without_cudnn(inputs["labels"].shape[-1], compiled):
            return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log; beside each training loss its terms, the labelled tokens so far and figures of quantization.

        Training losses are logged by all processes together, as Trainer does: the terms are summed over them.
        """
        if "loss" in logs:
            tokens = {"labelled_tokens": self.labelled_tokens} if self._labelled_tokens else {}
            figures = self.monitor.metrics() if self.monitor is not None else {}
            if self._is_mixed:
                tokens |= {**self._generic_means.take(), "generic_tokens": self.generic_tokens}
            logs = {**logs, **self._term_means.take(), **tokens, **figures}
        super().log(logs, start_time)

    # ---- Evaluation ----

    def evaluate(self, eval_dataset=None, *args, **kwargs) -> dict[str, float]:
        """Trainer's own, and after the evaluation set the generic text, as figures of their own."""
        metrics = super().evaluate(eval_dataset, *args, **kwargs)
        is_whole = eval_dataset is None and not args and "metric_key_prefix" not in kwargs
        if is_whole and self.generic_eval_dataset is not None:
            own, self.eval_dataset = self.eval_dataset, {"generic": self.generic_eval_dataset}
            try:  # by name, under which Trainer keeps its data loader apart
                metrics |= super().evaluate("generic", metric_key_prefix="eval_generic", **kwargs)
            finally:
                self.eval_dataset = own
        return metrics

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """The loader of every evaluation sample; `dataloader_drop_last` applies to training only."""
        before = self.args.dataloader_drop_last, self.data_collator
        self.args.dataloader_drop_last, self.data_collator = False, self._collators["eval"]
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last, self.data_collator = before

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Per sample, the summed loss as prediction and the number of labelled tokens as label."""
        if not self._own_metrics:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            teacher = self._teacher_rows(model, inputs)
            labels = inputs.pop("labels")
            terms = {"ce": 1.0} if teacher is None else {"ce": 1.0, "kl": 1.0}
            losses, _ = self._losses(model, inputs, Objective(labels, teacher, terms))
            sums = torch.stack([sum_by_sample(column, labels) for column in losses["token_losses"].unbind(-1)], -1)
        return None, sums.squeeze(-1), (labels[:, 1:] != IGNORE_INDEX).sum(-1)

    def _progress_now(self) -> dict:
        counted = {
            "loss_terms": self._writers.gather(self._term_means.state()),
            "labelled_tokens": self.labelled_tokens,
        }
        if self._is_mixed:
            generic = self._writers.gather(self._generic_means.state())
            counted |= {"generic_terms": generic, "generic_tokens": self.generic_tokens}
        return {**super()._progress_now(), **counted}


def _check_options(args, own_metrics: bool) -> None:
    """Refuse what does not work here; TrainingArguments of main.py have checked themselves."""
    if args is not None and not isinstance(args, TrainingArguments):
        check_trainer_options(args, _FLAGS_OF_PROGRAMS if own_metrics else _FLAGS_OF_PROGRAMS + _FOR_METRICS)


def _teacher_settings(teacher: PreTrainedModel | Teacher | str) -> dict:
    """For the record of the run: the teacher's configuration and a fingerprint."""
    if isinstance(teacher, CachedTeacher):
        cache = teacher.caches.get("train")  # which a run that trains nothing lacks
        return {} if cache is None else {"teacher's fingerprint": cache.folder.name}
    if not isinstance(teacher, PreTrainedModel):
        return {}
    settings = model_settings(teacher.config.to_dict(), fingerprint(teacher))
    return {f"teacher's {name}": value for name, value in settings.items()}
