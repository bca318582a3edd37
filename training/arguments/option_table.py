"""The table of options of transformers.TrainingArguments: which work here, and why the others are refused.

It has a row for every field of transformers.TrainingArguments (5.23); a test compares the two, so a new release of
transformers fails that test until someone has read what its new options do here. An option is refused where it fails
late, or where it would succeed without doing what was asked. `trainer_options.py` checks arguments by the table, and
writes it as docs/trainer_options.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import transformers

from . import option_conditions as when
from .option_conditions import Condition, plain


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


# ---- Optimizers and trackers ----

# optimizer -> the keys of --optim_args that have an effect on it. transformers ignores all other keys; Trainer's own
# groups of parameters have their --weight_decay, which wins over one in --optim_args.
_OPTIM_ARGS: dict[str, frozenset[str]] = {
    "sgd": frozenset({"momentum", "dampening", "nesterov"}),
    "adagrad": frozenset({"lr_decay", "eps"}),
    "rmsprop": frozenset({"momentum", "alpha", "eps", "centered"}),
    "muon": frozenset({"momentum", "nesterov", "ns_steps"}),
    **dict.fromkeys(
        ("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"),
        frozenset({"beta1", "beta2", "beta3", "alpha", "eps", "t_alpha", "t_beta3"}),
    ),
}
_TORCH = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")
_TORCHAO = ("adamw_torch_8bit", "adamw_torch_4bit")
_RMSPROP_BNB = ("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit")
_LION = ("lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit")
_BITSANDBYTES = (
    "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "ademamix", "ademamix_8bit",
    "paged_ademamix_32bit", "paged_ademamix_8bit", *_LION, *_RMSPROP_BNB,
)  # fmt: skip
MUON = "muon"  # our own: transformers has no name for torch's
OPTIMIZERS = (*_TORCH, *_BITSANDBYTES, *_TORCHAO)
_WITHOUT_BETAS = ("sgd", "adagrad", "rmsprop", "adafactor", *_RMSPROP_BNB)
_IN_BACKWARD = ("lomo", "adalomo", *(f"galore_{kind}_layerwise" for kind in ("adamw", "adamw_8bit", "adafactor")))
_IN_BACKWARD += ("apollo_adamw_layerwise",)
_SCHEDULE_FREE = ("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd")
_UNTESTED = tuple(
    name.value
    for name in transformers.training_args.OptimizerNames
    if name.value not in (*OPTIMIZERS, *_IN_BACKWARD, *_SCHEDULE_FREE)
)
_OTHER_OPTIMIZER = "choose another, such as adamw_torch_fused or adamw_bnb_8bit; docs/trainer_options.md lists them"
_NAMED_RUNS = ("wandb", "trackio", "mlflow", "comet_ml", "swanlab")
METRICS = ("loss", "perplexity", "kl")
_WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")


WORKERS_OF_A_CORE, MOST_WORKERS = 4, 64  # processes that read or tokenize data: more would only wait for each other

# ---- The table ----

_SEED = Refusal(
    "it is no seed of NumPy's generator", "give a whole number from 0 to 2^32 - 1", "others than 0 to 2^32 - 1",
    when.outside(0, 2**32),
)  # fmt: skip
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
        output_dir="One run at a time writes there; see docs/faults.md. Refused: the folder of the model, the teacher "
        "or the data, one that contains it, and one inside.",
        use_cpu="Set by itself where there is no accelerator.",
        full_determinism="torch raises an error where an operation has no deterministic implementation.",
    ),  # fmt: skip
    _partly(_RUN, "seed", _SEED, note="Of the order of a stream (--streaming True), too."),
    _partly(
        _RUN,
        "data_seed",
        Refusal(
            "samples come in the order of the data set",
            "leave it out",
            "with --train_sampling_strategy sequential",
            lambda value, args: plain(args.train_sampling_strategy) == "sequential",
        ),
        _SEED,
        note="Of the order of samples, those of a stream, too; --seed where it is not given.",
    ),
    _partly(
        _RUN,
        "num_train_epochs",
        Refusal(
            "nothing would be trained",
            "give a positive number, or leave --do_train out",
            "0 or less, or infinite, without --max_steps",
            when.no_epochs,
        ),
    ),
    _partly(
        _RUN,
        "max_steps",
        Refusal(
            "nothing would be trained",
            "give a positive number; or leave it out, and --num_train_epochs counts",
            "0",
            lambda value, args: value == 0,
        ),
        Refusal(
            "it is no number of steps",
            "give a positive number; or leave it out, and --num_train_epochs counts",
            "negative numbers but -1",
            when.negative_but(-1),
        ),
    ),
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
            when.on_tpu,
        ),
        note="underflow_overflow works.",
    ),  # fmt: skip
    # Optimizer and schedule
    *(
        _partly(
            _OPTIMIZER,
            name,
            Refusal(
                "no optimizer takes it",
                f"give a finite number, such as {example}",
                "negative, infinite or NaN",
                when.not_finite_or_negative,
            ),
            note=note,
        )
        for name, example, note in (
            (
                "learning_rate",
                "1e-5",
                "0 is refused for a training, unless --learn_exponent or --learn_scale True trains these alone.",
            ),
            ("weight_decay", "0", ""),
        )
    ),  # fmt: skip
    _partly(
        _OPTIMIZER,
        "lr_scheduler_type",
        Refusal(
            "the schedule needs arguments that are not given, or does not know one that is",
            "give --lr_scheduler_kwargs what the schedule takes: cosine_with_min_lr and cosine_warmup_with_min_lr need "
            "min_lr or min_lr_rate, warmup_stable_decay needs num_decay_steps",
            "with other --lr_scheduler_kwargs than the schedule takes",
            when.schedule_cannot_be_made,
        ),
        note="Every schedule; reduce_lr_on_plateau and greedy need --eval_strategy.",
    ),
    _partly(
        _OPTIMIZER,
        "lr_scheduler_kwargs",
        Refusal(
            "transformers ignores arguments of this schedule",
            "choose another --lr_scheduler_type, or leave them out",
            "with constant or constant_with_warmup",
            when.with_schedules(("constant", "constant_with_warmup")),
        ),
        Refusal(
            "the schedule does not take one of these arguments, or needs another",
            "give what the schedule takes, see get_scheduler in the documentation of transformers",
            "what --lr_scheduler_type does not take",
            when.schedule_cannot_be_made,
        ),
    ),
    _partly(
        _OPTIMIZER,
        "warmup_steps",
        Refusal(
            "this schedule has no warmup",
            "leave it out, or choose another --lr_scheduler_type, such as constant_with_warmup",
            f"with {', '.join(_WITHOUT_WARMUP)}",
            when.with_schedules(_WITHOUT_WARMUP),
        ),
        Refusal(
            "it is no number of steps",
            "give a number of steps, or a fraction of all steps between 0 and 1",
            "negative, infinite or NaN",
            when.not_finite_or_negative,
        ),
    ),
    *(
        _partly(
            _OPTIMIZER,
            name,
            Refusal(
                "this optimizer does not read it",
                "leave it out; some optimizers have --optim_args",
                f"with {', '.join(optimizers)}",
                when.with_optimizers(optimizers),
            ),
            Refusal("no optimizer takes it", f"give a number {numbers}", f"numbers not {numbers}", condition),
        )
        for name, optimizers, numbers, condition in (
            ("adam_beta1", _WITHOUT_BETAS, "from 0 to below 1", when.outside(0, 1)),
            ("adam_beta2", _WITHOUT_BETAS, "from 0 to below 1", when.outside(0, 1)),
            ("adam_epsilon", _WITHOUT_BETAS + _LION, "of at least 0, and finite", when.not_finite_or_negative),
        )
    ),  # fmt: skip
    _partly(
        _OPTIMIZER,
        "optim",
        Refusal(
            "it updates weights while gradients are computed: steps with NaN would be applied, gradients could not be "
            "accumulated, and --exponent_learning_rate would have no effect",
            _OTHER_OPTIMIZER,
            ", ".join(_IN_BACKWARD),
            when.among(_IN_BACKWARD),
        ),
        Refusal(
            "it trains other weights than those it evaluates, and a run would save the former: checkpoints and the "
            "rounding before the last evaluation know one set of weights only",
            _OTHER_OPTIMIZER,
            ", ".join(_SCHEDULE_FREE),
            when.among(_SCHEDULE_FREE),
        ),
        Refusal(
            "whether it trains FP32 master weights, withholds steps with NaN and resumes exactly has not been tested",
            _OTHER_OPTIMIZER,
            ", ".join(_UNTESTED),
            when.among(_UNTESTED),
        ),
        Refusal(
            "transformers' Adafactor does not know sharded weights: its steps would be others under FSDP1, and under "
            "FSDP2 they would fail",
            "choose another, such as adamw_torch_fused",
            "adafactor under FSDP",
            when.fsdp_with(("adafactor",)),
        ),
        Refusal(
            "it needs whole matrices, and FSDP gives each process some of their rows",
            "choose another, such as adamw_torch_fused, or start without FSDP",
            "muon under FSDP",
            when.fsdp_with((MUON,)),
        ),
        Refusal(
            "this torch has no torch.optim.Muon",
            "install torch 2.9 or later, or choose another, such as adamw_torch_fused",
            "muon where torch has none",
            when.without_muon,
        ),
        *(
            Refusal(
                f"{library} is not installed",
                f"pip install {library}, or choose one of torch's optimizers, such as adamw_torch_fused",
                f"those of {library} where it is not installed",
                when.needs(library, names),
            )
            for library, names in (("bitsandbytes", _BITSANDBYTES), ("torchao", _TORCHAO))
        ),
        note=f"{', '.join(_TORCH)}; {MUON} (training/optimizers/muon.py: torch.optim.Muon for the matrices of hidden "
        f"layers, AdamW for the rest); with bitsandbytes: {', '.join(_BITSANDBYTES)}; with torchao: "
        f"{', '.join(_TORCHAO)}. The last two groups were tried in one process (bitsandbytes 0.50.2, torchao 0.18.0), "
        "not under FSDP.",
    ),
    _partly(
        _OPTIMIZER,
        "optim_args",
        Refusal(
            "it is no list of names and values",
            "give such as momentum=0.9,nesterov=true",
            "texts that are not name=value,name=value, each value a number, true or false",
            when.malformed_arguments,
        ),
        Refusal(
            "it has an argument without effect on this optimizer",
            "give arguments of --optim sgd (momentum, dampening, nesterov), adagrad (lr_decay, eps), rmsprop "
            "(momentum, alpha, eps, centered), muon (momentum, nesterov, ns_steps) or ademamix (beta1, beta2, beta3, "
            "alpha, eps, t_alpha, t_beta3); AdamW has --adam_beta1, --adam_beta2 and --adam_epsilon, and all "
            "have --weight_decay",
            "arguments that --optim ignores",
            when.arguments_outside(_OPTIM_ARGS),
        ),
    ),
    *_refused(
        _OPTIMIZER,
        "only GaLore and APOLLO read it, and neither is supported; every other optimizer ignores it",
        "leave it out",
        "optim_target_modules",
    ),
    # Batches, loss and gradients
    _partly(
        _LOSS,
        "neftune_noise_alpha",
        Refusal(
            "it is no size of noise",
            "give a positive number, such as 5",
            "negative, infinite or NaN",
            when.not_finite_or_negative,
        ),
        note="Noise on the student's embeddings; the teacher has none.",
    ),
    _partly(
        _LOSS,
        "label_smoothing_factor",
        Refusal(
            "it is the fraction of a label's probability that other tokens get",
            "give a number from 0 to below 1, such as 0.1",
            "numbers not from 0 to below 1",
            when.outside(0, 1),
        ),
        note="transformers' loss takes the place of the loss in chunks; evaluation is not smoothed. "
        "With a teacher it is refused, since its loss has no smoothing.",
    ),
    *(
        _partly(
            _LOSS,
            name,
            Refusal("nothing would be trained", "give a positive number", "0 or less", when.below(1)),
            note=note,
        )
        for name, note in (
            ("per_device_train_batch_size", ""),
            ("gradient_accumulation_steps", "The loss is a mean over the labelled tokens of the whole step."),
        )
    ),
    _partly(
        _LOSS,
        "max_grad_norm",
        Refusal(
            "gradients would not be clipped at all",
            "give a positive number, or 0 for no clipping",
            "negative numbers",
            when.below(0),
        ),
    ),
    *_refused(
        _LOSS,
        "the loss is a mean over the labelled tokens of all processes; each process's own mean would depend on the "
        "number of processes, and the labelled tokens in the log would be those of one process",
        "leave it out",
        "average_tokens_across_devices",
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
        bf16="Default: linear layers compute in BF16 over FP32 master weights, on CPUs too.",
        torch_compile="Losses are computed outside of the compiled graph; inputs are not monitored.",
        activation_checkpointing="Not together with fsdp_activation_checkpointing.",
        gradient_checkpointing="Older name of --activation_checkpointing.",
    ),
    _partly(
        _PRECISION,
        "torch_empty_cache_steps",
        Refusal("it is no number of steps", "give a positive number, or leave it out", "0 or less", when.below(1)),
    ),
    _partly(
        _PRECISION,
        "fp16",
        Refusal(
            "accelerate computes in FP32 on a CPU",
            "leave it out to compute in BF16, or ask for FP32 with --bf16 False",
            "on CPUs",
            when.on_cpu,
        ),
        note="On GPUs; no test covers it. The loss scaler skips steps whose gradient overflows; they do not count for "
        "--max_nan_steps. Together with --bf16 True it is refused.",
    ),
    _partly(
        _PRECISION,
        "torch_compile_backend",
        Refusal(
            "accelerate has no such backend",
            "choose inductor, eager, aot_eager or another of accelerate.utils.DynamoBackend",
            "unknown names",
            when.unknown_compile_backend,
        ),
    ),
    _partly(
        _PRECISION,
        "torch_compile_mode",
        Refusal(
            "this backend has no modes",
            "leave it out, or choose --torch_compile_backend inductor",
            "with another backend than inductor",
            when.without_inductor,
        ),
        Refusal(
            "inductor has no such mode",
            "choose default, reduce-overhead, max-autotune or max-autotune-no-cudagraphs",
            "unknown names",
            when.unknown_compile_mode,
        ),
    ),
    *(
        _partly(
            _PRECISION,
            name,
            Refusal(
                "it has no effect without activation checkpointing",
                "give --activation_checkpointing True too, or leave it out",
                "without --activation_checkpointing True",
                when.without_checkpointing,
            ),
            Refusal(
                "activations are in the CPU's memory already",
                "leave offload out",
                "offload on CPUs",
                when.offload_on_cpu,
            ),
            Refusal(
                "activation checkpointing does not take one of these arguments",
                "give every_n_layers (at least 1), offload, use_reentrant, preserve_rng_state, determinism_check, "
                "debug or early_stop",
                "unknown arguments",
                when.unknown_checkpointing,
            ),
            note=note,
        )
        for name, note in (
            ("activation_checkpointing_kwargs", ""),
            ("gradient_checkpointing_kwargs", "Older name of --activation_checkpointing_kwargs."),
        )
    ),
    *_refused(
        _PRECISION,
        "training reads no cache of keys and values, and with one transformers builds no mask between packed samples",
        "leave it out; generation_config.json of the saved model says whether generation uses a cache",
        "use_cache",
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
        "dataloader_pin_memory",
        dataloader_drop_last="Default: True. Evaluation uses every sample.",
        remove_unused_columns="Samples hold input_ids and labels only.",
        train_sampling_strategy="random, sequential, group_by_length (as --group_by_length True) or batch_rebalance. A "
        "stream comes in its own order, so --streaming True refuses any but random.",
        length_column_name="Read where a dataset has that column; else tokens are counted.",
        ignore_data_skip="Accepts a checkpoint of other data and begins with the first sample.",
    ),
    _partly(
        _DATA,
        "dataloader_num_workers",
        Refusal("it is no number of processes", "give 0 or a positive number", "negative numbers", when.below(0)),
        Refusal(
            "it is more processes than this machine can run",
            f"give at most {WORKERS_OF_A_CORE} for each core",
            f"more than {MOST_WORKERS} and {WORKERS_OF_A_CORE} for each core",
            when.more_workers_than(WORKERS_OF_A_CORE, MOST_WORKERS),
        ),
    ),
    *(
        _partly(
            _DATA,
            name,
            Refusal(
                "it is about worker processes, and there are none",
                "give --dataloader_num_workers too, or leave it out",
                "without --dataloader_num_workers",
                when.without("dataloader_num_workers"),
            ),
            *others,
        )
        for name, others in (
            ("dataloader_persistent_workers", ()),
            (
                "dataloader_multiprocessing_context",
                (
                    Refusal(
                        "torch starts processes in no such way",
                        "choose fork, spawn or forkserver",
                        "unknown names",
                        lambda value, args: value not in ("fork", "spawn", "forkserver"),
                    ),
                ),
            ),
            (
                "dataloader_prefetch_factor",
                (Refusal("it is no number of batches", "give a positive number", "0 or less", when.below(1)),),
            ),
        )
    ),  # fmt: skip
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
        "eval_on_start",
        prediction_loss_only="Changes nothing: evaluation never keeps logits.",
    ),  # fmt: skip
    _partly(
        _EVALUATION,
        "per_device_eval_batch_size",
        Refusal("nothing would be evaluated", "give a positive number", "0 or less", when.below(1)),
    ),
    _partly(
        _EVALUATION,
        "eval_accumulation_steps",
        Refusal("it is no number of batches", "give a positive number, or leave it out", "0 or less", when.below(1)),
    ),
    _partly(
        _EVALUATION,
        "eval_delay",
        Refusal(
            "it is no number of steps or epochs",
            "give 0 or a positive number",
            "negative, infinite or NaN",
            when.not_finite_or_negative,
        ),
    ),
    _partly(
        _EVALUATION,
        "eval_steps",
        Refusal(
            "nothing would be evaluated while training",
            "give a positive number, or leave --eval_strategy out",
            "negative numbers",
            when.below(0),
        ),
        note="Read with --eval_strategy steps.",
    ),
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
        "logging_first_step",
        "log_on_each_node",
        "disable_tqdm",
        "skip_memory_metrics",
        logging_nan_inf_filter="Of training losses. An evaluation with such a loss says so.",
        include_num_input_tokens_seen="True counts all input tokens. The command line takes True and False only.",
        log_level="Of messages of transformers.",
        log_level_replica="Of messages of transformers in other processes.",
    ),
    _partly(
        _LOGGING,
        "logging_steps",
        Refusal(
            "nothing would be logged while training",
            "give a positive number, or --logging_strategy no",
            "negative numbers",
            when.below(0),
        ),
    ),
    _partly(
        _LOGGING,
        "report_to",
        Refusal(
            "transformers knows no such tracker",
            "give tensorboard, wandb, trackio, mlflow, comet_ml, swanlab, clearml, or another that the documentation "
            "of transformers lists; all; or none",
            "unknown names",
            when.unknown_tracker,
        ),
        Refusal(
            "its library is not installed",
            "install it with pip, or leave the tracker out",
            "trackers that are not installed",
            when.missing_tracker,
        ),
    ),
    *(
        _partly(
            _LOGGING,
            name,
            Refusal(
                f"only {', '.join(trackers)} read it" if len(trackers) > 1 else f"only {trackers[0]} reads it",
                f"give --report_to {trackers[0]} too, or leave it out",
                f"without --report_to {' or '.join(trackers)}",
                when.without_trackers(trackers),
            ),
        )
        for name, trackers in (
            ("run_name", _NAMED_RUNS),
            ("project", ("trackio",)),
            ("trackio_space_id", ("trackio",)),
            ("trackio_bucket_id", ("trackio",)),
            ("trackio_static_space_id", ("trackio",)),
        )
    ),  # fmt: skip
    # Checkpoints
    *_works(
        _CHECKPOINTS,
        save_total_limit="Never deletes the newest checkpoint nor the best. 0 and negative numbers keep all.",
        save_on_each_node="For machines that share no storage.",
        metric_for_best_model="loss, perplexity, or with a teacher kl; with --eval_generic also generic_kl, "
        "generic_loss and generic_perplexity.",
        greater_is_better="main.py refuses True: each of its metrics is better when it is lower.",
        restore_callback_states_from_checkpoint="For callbacks of your own; those of main.py keep no state.",
    ),
    _partly(
        _CHECKPOINTS,
        "save_steps",
        Refusal(
            "no checkpoint would be written",
            "give a positive number, or --save_strategy no",
            "0 or less",
            when.not_positive,
        ),
    ),
    _partly(
        _CHECKPOINTS,
        "save_strategy",
        Refusal(
            "checkpoints are compared when they are evaluated, and none would be: none would be saved",
            "give --eval_strategy steps or epoch too",
            "best without --eval_strategy",
            when.best_without_evaluation,
        ),
        Refusal(
            "no metric says which checkpoint is best",
            "give --metric_for_best_model loss, perplexity, or with a teacher kl",
            "best without --metric_for_best_model",
            when.best_of_what,
        ),
        note="SIGTERM saves a checkpoint whatever it says.",
    ),
    _partly(
        _CHECKPOINTS,
        "load_best_model_at_end",
        Refusal(
            "no checkpoint would be evaluated, so none would be the best",
            "give --eval_strategy steps or epoch too",
            "without --eval_strategy",
            when.without_evaluation,
        ),
    ),
    _partly(
        _CHECKPOINTS,
        "resume_from_checkpoint",
        Refusal(
            "only training resumes from a checkpoint; it would not be read",
            "give --do_train True too, or evaluate it: --model_name_or_path FOLDER",
            "without --do_train True",
            when.not_training,
        ),
        note="A folder; True: the newest, which is the default; False: start anew.",
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
    Option("hub_token", _HUB, "", (Refusal("a run uploads nothing", _UPLOAD, applies=when.not_masked),), works=False),
    # Several devices
    *_works(
        _DEVICES,
        "ddp_broadcast_buffers",
        "ddp_find_unused_parameters",
    ),  # fmt: skip
    *(
        _partly(_DEVICES, name, Refusal(f"it is no {what}", "give a positive number", "0 or less", when.below(1)))
        for name, what in (("ddp_timeout", "number of seconds"), ("ddp_bucket_cap_mb", "size"))
    ),
    _partly(
        _DEVICES,
        "ddp_backend",
        Refusal(
            "a single process has no others to connect with",
            "start several with accelerate launch, or leave it out",
            "in a single process",
            when.single_process,
        ),
    ),
    _partly(
        _DEVICES,
        "ddp_static_graph",
        Refusal(
            "torch 2.13 fails in the first backward pass when gradients are accumulated",
            "leave it out, or give --gradient_accumulation_steps 1",
            "with --gradient_accumulation_steps",
            when.static_graph_fails,
        ),
    ),  # fmt: skip
    _partly(
        _DEVICES,
        "local_rank",
        Refusal(
            "a process takes its number from the environment variable LOCAL_RANK",
            "start with accelerate launch",
            "other numbers than LOCAL_RANK",
            when.another_rank,
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
            when.accelerator_setting("split_batches", True),
        ),
        Refusal(
            "the main process would join batches of all processes, which are padded to different lengths",
            "leave it out: each process reads its own batches",
            "dispatch_batches: true",
            when.accelerator_setting("dispatch_batches", True),
        ),
        Refusal(
            "processes would evaluate different numbers of batches and wait for each other for ever",
            "leave it out",
            "even_batches: false",
            when.accelerator_setting("even_batches", False),
        ),
        Refusal(
            "accelerate's sampler is not used: the order of samples depends on seed and epoch alone already",
            "leave it out",
            "use_seedable_sampler: false",
            when.accelerator_setting("use_seedable_sampler", False),
        ),
        Refusal(
            "it has a setting that transformers does not know",
            "give non_blocking or gradient_accumulation_kwargs",
            "unknown settings",
            when.unknown_accelerator_setting,
        ),
        note="non_blocking, gradient_accumulation_kwargs.",
    ),  # fmt: skip
)
