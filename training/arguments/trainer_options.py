"""TRAINER_OPTIONS: which options of transformers.TrainingArguments work here, and why the others are refused.

The table has a row for every field of transformers.TrainingArguments (5.23); a test compares the two, so a new release
of transformers fails that test until someone has read what its new options do here. An option is refused where it fails
late, or where it would succeed without doing what was asked. docs/trainer_options.md is the table, written by
`python -m training.arguments.trainer_options`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

import transformers

Condition = Callable[[Any, Any], bool]  # (value of the option, all arguments) -> whether the value is refused


@dataclass(frozen=True)
class Refusal:
    """Values of an option that are refused.

    Attributes:
        reason: what would happen. remedy: what to do in place of it.
        values: the refused values in words, for the documentation.
        applies: whether a value, other than the default, is one of them.
        variable: an environment variable with which `accelerate launch` asks for the same.
    """

    reason: str
    remedy: str
    values: str = ""
    applies: Condition = lambda value, args: True
    variable: str | None = None


@dataclass(frozen=True)
class Option:
    """An option of transformers.TrainingArguments.

    Attributes:
        name: of the argument. group: heading in the documentation.
        note: what is particular here, for one that works.
        refusals: empty if every value works.
        works: False if every value but the default is refused.
    """

    name: str
    group: str
    note: str = ""
    refusals: tuple[Refusal, ...] = ()
    works: bool = True


def _works(group: str, *names: str, **notes: str) -> list[Option]:
    """Options all of whose values work: by name alone, or with a note."""
    return [Option(name, group) for name in names] + [Option(name, group, note) for name, note in notes.items()]


def _partly(group: str, name: str, *refusals: Refusal, note: str = "") -> Option:
    return Option(name, group, note, refusals)


def _refused(group: str, reason: str, remedy: str, *names: str, variable: str | None = None) -> list[Option]:
    refusal = Refusal(reason, remedy, variable=variable)
    return [Option(name, group, refusals=(refusal,), works=False) for name in names]


# ---- Conditions ----

# optimizer -> the keys of --optim_args that transformers reads for it; it ignores all other keys
_OPTIM_ARGS: dict[str, frozenset[str] | None] = {
    "sgd": frozenset({"momentum", "dampening", "weight_decay", "nesterov"}),
    "adagrad": frozenset({"lr_decay", "weight_decay", "eps"}),
    "rmsprop": frozenset({"momentum", "alpha", "eps", "weight_decay", "centered"}),
    **dict.fromkeys(
        ("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"),
        frozenset({"beta1", "beta2", "beta3", "alpha", "eps", "t_alpha", "t_beta3"}),
    ),
}
_TORCH = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")
_TORCHAO = ("adamw_torch_8bit", "adamw_torch_4bit")
_BITSANDBYTES = (
    "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "ademamix", "ademamix_8bit",
    "paged_ademamix_32bit", "paged_ademamix_8bit", "lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit",
    "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
)  # fmt: skip
OPTIMIZERS = (*_TORCH, *_BITSANDBYTES, *_TORCHAO)
_IN_BACKWARD = ("lomo", "adalomo", *(f"galore_{kind}_layerwise" for kind in ("adamw", "adamw_8bit", "adafactor")))
_IN_BACKWARD += ("apollo_adamw_layerwise",)
_SCHEDULE_FREE = ("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd")
_UNTESTED = tuple(
    name.value
    for name in transformers.training_args.OptimizerNames
    if name.value not in (*OPTIMIZERS, *_IN_BACKWARD, *_SCHEDULE_FREE)
)
_OTHER_OPTIMIZER = "choose another, such as adamw_torch_fused or adamw_bnb_8bit; docs/trainer_options.md lists them"


def _among(names: tuple[str, ...]) -> Condition:
    return lambda value, args: _plain(value) in names


def _ignored_optim_args(value: str, args) -> bool:
    keys = {pair.partition("=")[0].strip() for pair in value.split(",")}
    return not keys <= _OPTIM_ARGS.get(_plain(args.optim), frozenset())


def _accelerator_setting(name: str, refused: Any) -> Condition:
    def applies(value, args) -> bool:
        try:
            if isinstance(value, str):
                value = json.loads(value if value.startswith("{") else Path(value).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False  # transformers names the file
        setting = value.get(name) if isinstance(value, dict) else getattr(value, name, None)
        return setting is not None and bool(setting) is refused

    return applies


def _another_rank(value: int, args) -> bool:
    return str(value) != os.environ.get("LOCAL_RANK", "-1")


def _on_tpu(value, args) -> bool:
    return "tpu_metrics_debug" in (value if isinstance(value, str) else [_plain(v) for v in value])


def _not_masked(value: str, args) -> bool:
    return value != "<HUB_TOKEN>"  # in place of a token, in every training_args.json


# ---- The table ----

_UPLOAD = "upload the folder when the run has ended: hf upload REPOSITORY FOLDER"
_ONE_SAMPLE = "leave it out: evaluation keeps one sum and one count for each sample, so there is nothing to save"
_FULL_EVAL = (
    "Trainer would cast the FP32 master weights themselves, in place, so that what is saved afterwards, and scales "
    "that were learned, would be rounded"
)
_ACCELERATE = "start with accelerate launch --config_file accelerate_config/fsdp2.yaml"

_RUN = "The run"
_OPTIMIZER = "Optimizer and schedule"
_LOSS = "Batches, loss and gradients"
_PRECISION = "Precision, speed and memory"
_DATA = "Data"
_EVALUATION = "Evaluation"
_LOGGING = "Logging"
_CHECKPOINTS = "Checkpoints"
_HUB = "Uploading"
_DEVICES = "Several devices"

TRAINER_OPTIONS: tuple[Option, ...] = (
    # The run
    *_works(
        _RUN,
        "do_train",
        "do_eval",
        "num_train_epochs",
        "max_steps",
        "seed",
        output_dir="One run at a time writes there; see docs/faults.md.",
        use_cpu="Set by itself where there is no accelerator.",
        full_determinism="torch raises an error where an operation has no deterministic implementation.",
        data_seed="Of the order of samples; --seed where it is not given.",
    ),  # fmt: skip
    *_refused(
        _RUN,
        "there is no test set, and main.py writes no predictions: nothing would happen",
        "evaluate with --do_eval True, or score tasks with scripts/evaluate.py",
        "do_predict",
    ),  # fmt: skip
    _partly(
        _RUN,
        "debug",
        Refusal(
            "it prints the counters of a TPU, which no kernel here runs on",
            "leave it out",
            "tpu_metrics_debug",
            _on_tpu,
        ),
        note="underflow_overflow works.",
    ),  # fmt: skip
    # Optimizer and schedule
    *_works(
        _OPTIMIZER,
        "learning_rate",
        "lr_scheduler_kwargs",
        "warmup_steps",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        lr_scheduler_type="Every schedule; reduce_lr_on_plateau and greedy need --eval_strategy.",
    ),  # fmt: skip
    _partly(
        _OPTIMIZER,
        "optim",
        Refusal(
            "it updates weights while gradients are computed: steps with NaN would be applied, gradients could not be "
            "accumulated, and --exponent_learning_rate would have no effect",
            _OTHER_OPTIMIZER,
            ", ".join(_IN_BACKWARD),
            _among(_IN_BACKWARD),
        ),
        Refusal(
            "it trains other weights than those it evaluates, and a run would save the former: checkpoints and the "
            "rounding before the last evaluation know one set of weights only",
            _OTHER_OPTIMIZER,
            ", ".join(_SCHEDULE_FREE),
            _among(_SCHEDULE_FREE),
        ),
        Refusal(
            "whether it trains FP32 master weights, withholds steps with NaN and resumes exactly has not been tested",
            _OTHER_OPTIMIZER,
            ", ".join(_UNTESTED),
            _among(_UNTESTED),
        ),
        note=f"{', '.join(_TORCH)}; with bitsandbytes: {', '.join(_BITSANDBYTES)}; with torchao: {', '.join(_TORCHAO)}."
        " The last two groups were tried in one process (bitsandbytes 0.50.2, torchao 0.18.0), not under FSDP.",
    ),
    _partly(
        _OPTIMIZER,
        "optim_args",
        Refusal(
            "transformers ignores arguments that this optimizer does not take",
            "give arguments of --optim sgd (momentum, dampening, weight_decay, nesterov), adagrad (lr_decay, "
            "weight_decay, eps), rmsprop (momentum, alpha, eps, weight_decay, centered) or ademamix (beta1, beta2, "
            "beta3, alpha, eps, t_alpha, t_beta3); AdamW has --adam_beta1, --adam_beta2 and --adam_epsilon",
            "arguments that --optim ignores",
            _ignored_optim_args,
        ),
    ),
    *_refused(
        _OPTIMIZER,
        "only GaLore and APOLLO read it, and neither is supported; every other optimizer ignores it",
        "leave it out",
        "optim_target_modules",
    ),
    # Batches, loss and gradients
    *_works(
        _LOSS,
        "per_device_train_batch_size",
        "max_grad_norm",
        gradient_accumulation_steps="The loss is a mean over the labelled tokens of the whole step.",
        average_tokens_across_devices="False weights each process alike, whatever its number of labelled tokens.",
        neftune_noise_alpha="Noise on the student's embeddings; the teacher has none.",
        label_smoothing_factor="transformers' loss takes the place of the loss in chunks; evaluation is not smoothed. "
        "With a teacher it is refused, since its loss has no smoothing.",
    ),
    *_refused(
        _LOSS,
        "after an out-of-memory error Trainer begins again at step 0 with the weights trained so far and fewer samples "
        "in a step: another run than the seed and the arguments describe, which no checkpoint resumes exactly",
        "give a smaller --per_device_train_batch_size and more --gradient_accumulation_steps: the samples of a step, "
        "and so the training, stay the same",
        "auto_find_batch_size",
    ),  # fmt: skip
    # Precision, speed and memory
    *_works(
        _PRECISION,
        "tf32",
        "torch_compile_backend",
        "torch_compile_mode",
        "torch_empty_cache_steps",
        bf16="Default: linear layers compute in BF16 over FP32 master weights, on CPUs too.",
        fp16="On GPUs; no test covers it. The loss scaler skips steps whose gradient overflows; they do not count "
        "for --max_nan_steps.",
        torch_compile="Losses are computed outside of the compiled graph; inputs are not monitored.",
        activation_checkpointing="Not together with fsdp_activation_checkpointing.",
        activation_checkpointing_kwargs="every_n_layers works everywhere, offload needs a GPU.",
        gradient_checkpointing="Older name of --activation_checkpointing.",
        gradient_checkpointing_kwargs="Older name of --activation_checkpointing_kwargs.",
        use_cache="Keeps keys and values in memory that training does not read; stands in the saved config.json.",
    ),
    *_refused(
        _PRECISION, _FULL_EVAL, "leave it out; --bf16 True computes in BF16, also in evaluations", "bf16_full_eval"
    ),
    *_refused(
        _PRECISION, _FULL_EVAL, "leave it out; --fp16 True computes in FP16, also in evaluations", "fp16_full_eval"
    ),
    *_refused(
        _PRECISION,
        "Liger Kernel replaces the model's forward pass when training begins, and with it the loss in chunks and the "
        "divergence from a teacher; an evaluation before training would use other kernels",
        "leave it out; losses are computed in chunks already, so that logits of a whole batch never exist",
        "use_liger_kernel",
        "liger_kernel_config",
    ),  # fmt: skip
    # Data
    *_works(
        _DATA,
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_persistent_workers",
        "dataloader_prefetch_factor",
        "dataloader_multiprocessing_context",
        dataloader_drop_last="Default: True. Evaluation uses every sample.",
        remove_unused_columns="Samples hold input_ids and labels only.",
        train_sampling_strategy="random, sequential or group_by_length; --group_by_length True is the last of these. A "
        "stream comes in its own order.",
        length_column_name="Read where a dataset has that column; else tokens are counted.",
        ignore_data_skip="Accepts a checkpoint of other data and begins with the first sample.",
    ),
    *_refused(
        _DATA,
        "batches would come in the order in which workers finish, so no run could be repeated or resumed exactly",
        "leave it out",
        "dataloader_in_order",
    ),  # fmt: skip
    *_refused(
        _DATA, "samples have one column of labels, labels, and losses read no other", "leave it out", "label_names"
    ),
    # Evaluation
    *_works(
        _EVALUATION,
        "eval_strategy",
        "eval_steps",
        "eval_delay",
        "eval_on_start",
        "per_device_eval_batch_size",
        "eval_accumulation_steps",
        prediction_loss_only="Changes nothing: evaluation never keeps logits.",
    ),  # fmt: skip
    *_refused(
        _EVALUATION,
        "loss and perplexity are computed from the sums of all batches together",
        _ONE_SAMPLE,
        "batch_eval_metrics",
    ),  # fmt: skip
    *_refused(
        _EVALUATION,
        "loss and perplexity are computed from one array of all samples",
        _ONE_SAMPLE,
        "eval_do_concat_batches",
    ),  # fmt: skip
    *_refused(
        _EVALUATION,
        "several processes would gather lists, from which no loss is computed",
        _ONE_SAMPLE,
        "eval_use_gather_object",
    ),
    *_refused(
        _EVALUATION,
        "loss and perplexity read neither inputs nor Trainer's own losses",
        _ONE_SAMPLE,
        "include_for_metrics",
    ),  # fmt: skip
    # Logging
    *_works(
        _LOGGING,
        "logging_strategy",
        "logging_steps",
        "logging_first_step",
        "logging_nan_inf_filter",
        "log_on_each_node",
        "disable_tqdm",
        "run_name",
        "project",
        "trackio_space_id",
        "trackio_bucket_id",
        "trackio_static_space_id",
        "include_num_input_tokens_seen",
        "skip_memory_metrics",
        log_level="Of messages of transformers.",
        log_level_replica="Of messages of transformers in other processes.",
        report_to="Any tracker that Trainer knows.",
    ),
    # Checkpoints
    *_works(
        _CHECKPOINTS,
        "save_steps",
        "load_best_model_at_end",
        "greater_is_better",
        save_strategy="SIGTERM saves a checkpoint whatever it says.",
        save_total_limit="Never deletes the newest checkpoint nor the best.",
        save_on_each_node="For machines that share no storage.",
        metric_for_best_model="loss, perplexity, with a teacher kl; of a named evaluation set NAME_loss.",
        restore_callback_states_from_checkpoint="For callbacks of your own; those of main.py keep no state.",
        resume_from_checkpoint="A folder; True: the newest, which is the default; False: start anew.",
    ),
    *_refused(
        _CHECKPOINTS,
        "checkpoints would lack the optimizer's state, so a run that SIGTERM or a fault ended could not be resumed",
        "bound the space that checkpoints take with --save_total_limit 1, or write none with --save_strategy no",
        "save_only_model",
    ),
    *_refused(
        _CHECKPOINTS,
        "its handler of SIGTERM is replaced while training, and comes back afterwards: then SIGTERM would neither save "
        "nor end the program",
        "leave it out; SIGTERM saves a checkpoint after the step in every run (docs/faults.md)",
        "enable_jit_checkpoint",
    ),  # fmt: skip
    # Uploading
    *_refused(
        _HUB,
        "Trainer copies FP32 masters of each checkpoint over the model in --output_dir, and uploads that folder before "
        "the packed model is written and verified",
        _UPLOAD,
        "push_to_hub",
    ),  # fmt: skip
    *_refused(
        _HUB,
        "a run uploads nothing",
        _UPLOAD,
        "hub_model_id",
        "hub_strategy",
        "hub_private_repo",
        "hub_always_push",
        "hub_revision",
    ),  # fmt: skip
    Option("hub_token", _HUB, "", (Refusal("a run uploads nothing", _UPLOAD, applies=_not_masked),), works=False),
    # Several devices
    *_works(
        _DEVICES,
        "ddp_backend",
        "ddp_timeout",
        "ddp_bucket_cap_mb",
        "ddp_broadcast_buffers",
        "ddp_find_unused_parameters",
    ),  # fmt: skip
    _partly(
        _DEVICES,
        "ddp_static_graph",
        Refusal(
            "torch 2.13 fails in the first backward pass when gradients are accumulated",
            "leave it out, or give --gradient_accumulation_steps 1",
            "with --gradient_accumulation_steps",
            lambda value, args: bool(value) and args.gradient_accumulation_steps > 1,
        ),
    ),  # fmt: skip
    _partly(
        _DEVICES,
        "local_rank",
        Refusal(
            "a process takes its number from the environment variable LOCAL_RANK",
            "start with accelerate launch",
            "other numbers than LOCAL_RANK",
            _another_rank,
        ),
    ),  # fmt: skip
    *_refused(
        _DEVICES,
        "only the settings in accelerate_config/ are tested: given here, every process would read all weights, and "
        "main.py would not know of FSDP before the model is loaded",
        _ACCELERATE,
        "fsdp",
        "fsdp_config",
    ),  # fmt: skip
    *_refused(
        _DEVICES,
        "DeepSpeed keeps master weights, their rounding and the optimizer's files in forms of its own: the model could "
        "not be rounded before it is evaluated, and its checkpoints would not count as complete when resuming",
        f"FSDP shards weights, gradients and optimizer: {_ACCELERATE}",
        "deepspeed",
        variable="ACCELERATE_USE_DEEPSPEED",
    ),  # fmt: skip
    *_refused(
        _DEVICES,
        "quantized layers hold whole rows of weights, and losses whole sequences of labels: neither tensor nor context "
        "nor sequence parallelism is implemented",
        f"FSDP shards weights: {_ACCELERATE}",
        "parallelism_config",
        variable="ACCELERATE_USE_PARALLELISM_CONFIG",
    ),  # fmt: skip
    _partly(
        _DEVICES,
        "accelerator_config",
        Refusal(
            "a step would have fewer samples than the order of samples and the record of the run count",
            "give the batch size of one process: --per_device_train_batch_size",
            "split_batches: true",
            _accelerator_setting("split_batches", True),
        ),
        Refusal(
            "the main process would join batches of all processes, which are padded to different lengths",
            "leave it out: each process reads its own batches",
            "dispatch_batches: true",
            _accelerator_setting("dispatch_batches", True),
        ),
        Refusal(
            "processes would evaluate different numbers of batches and wait for each other for ever",
            "leave it out",
            "even_batches: false",
            _accelerator_setting("even_batches", False),
        ),
        Refusal(
            "accelerate's sampler is not used: the order of samples depends on seed and epoch alone already",
            "leave it out",
            "use_seedable_sampler: false",
            _accelerator_setting("use_seedable_sampler", False),
        ),
        note="non_blocking, gradient_accumulation_kwargs.",
    ),  # fmt: skip
)


# ---- Checking ----


def check_trainer_options(args: transformers.TrainingArguments) -> None:
    """Refuse what does not work here. Call it before transformers reads the arguments, or after.

    Args:
        args: with the options as attributes; those that are missing have their default.

    Raises:
        ValueError: an option has a value that is refused. The message names the argument, its value, the reason and
            the remedy.
    """
    defaults = _defaults()
    for option in TRAINER_OPTIONS:
        value = _plain(getattr(args, option.name, defaults[option.name]))
        is_default = value == defaults[option.name] or value in (None, "", [], {})
        for refusal in option.refusals:
            if not is_default and refusal.applies(value, args):
                shown = "" if option.name == "hub_token" else f" {value}"
                raise ValueError(f"--{option.name}{shown}: {refusal.reason}; {refusal.remedy}")
            if refusal.variable and os.environ.get(refusal.variable, "").lower() in ("true", "1"):
                raise ValueError(
                    f"--{option.name}, asked for by accelerate launch ({refusal.variable}): {refusal.reason}; "
                    f"{refusal.remedy}"
                )


def check_with_teacher(args: transformers.TrainingArguments) -> None:
    """Refuse what a loss against a teacher's distributions would ignore.

    Raises:
        ValueError: labels are to be smoothed.
    """
    if args.label_smoothing_factor:
        raise ValueError(
            f"--label_smoothing_factor {args.label_smoothing_factor} has no effect with a teacher: its distributions "
            "take the place of labels; leave it out, or train without --distill True"
        )


def _defaults() -> dict[str, Any]:
    """The default of each option, as transformers has it."""
    return {
        f.name: _plain(f.default if f.default is not MISSING else f.default_factory())
        for f in fields(transformers.TrainingArguments)
    }


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


# ---- The documentation ----

_HEAD = """# Options of Trainer

`main.py` takes the options of transformers' `TrainingArguments`. Each works as transformers documents it, or is refused
before the model is loaded with the reason and the remedy. The table is `training/arguments/trainer_options.py`; a test
compares it with the installed transformers (5.23). This page is written by

```bash
python -m training.arguments.trainer_options > docs/trainer_options.md
```

The program's own options stand in `python main.py --help`.
"""


def document() -> str:
    """The text of docs/trainer_options.md."""
    parts = [_HEAD]
    for group in dict.fromkeys(option.group for option in TRAINER_OPTIONS):
        parts.append(f"\n## {group}\n\n| option | verdict | what is particular |\n|---|---|---|\n")
        parts += [_row(option) for option in TRAINER_OPTIONS if option.group == group]
    return "".join(parts)


def _row(option: Option) -> str:
    verdict = "refused" if not option.works else "works, with exceptions" if option.refusals else "works"
    notes = [option.note] if option.note else []
    for refusal in option.refusals:
        values = f"Refused: {refusal.values}. " if refusal.values else ""
        notes.append(f"{values}{refusal.reason[0].upper()}{refusal.reason[1:]}. Remedy: {refusal.remedy}.")
    return f"| `{option.name}` | {verdict} | {' '.join(notes)} |\n"


if __name__ == "__main__":
    print(document(), end="")
