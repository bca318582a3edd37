"""Every option of transformers.TrainingArguments works, or is refused with its reason and its remedy."""

from __future__ import annotations

import copy
import signal
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import transformers
from helpers import ROOT, make_llama, make_tokenizer, write_conversations
from transformers.trainer_pt_utils import AcceleratorConfig

import main
from qat import prepare_qat
from training.arguments import option_conditions, option_table, trainer_options
from training.arguments.option_table import OPTIMIZERS, TRAINER_OPTIONS
from training.arguments.trainer_options import check_trainer_options, document
from training.arguments.training import TrainingArguments
from utils import QATTrainer, make_supervised_data_module


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict:
    path = write_conversations(tmp_path_factory.mktemp("data") / "data.jsonl")
    return make_supervised_data_module(str(path), make_tokenizer(), eval_size=6)


@pytest.fixture(scope="module")
def untrained():
    return prepare_qat(make_llama(layers=1), {"torch.nn.Linear": "MXFP4"})


def make_trainer(folder: Path, data: dict, model, teacher=None, **options) -> QATTrainer:
    """A trainer of a copy of `model` for three steps."""
    defaults = {
        "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "bf16": False,
        "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    args = TrainingArguments(str(folder), **{**defaults, **options})
    return QATTrainer(model=copy.deepcopy(model), teacher=teacher, args=args, processing_class=make_tokenizer(), **data)


@pytest.fixture
def trainer_with(tmp_path, data, untrained):
    return lambda folder="out", **options: make_trainer(tmp_path / folder, data, untrained, **options)


def losses(trainer: QATTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# ---- The table ----


def test_every_option_of_the_installed_transformers_stands_in_the_table_once():
    names = [field.name for field in fields(transformers.TrainingArguments)]
    assert Counter(option.name for option in TRAINER_OPTIONS) == Counter(names)


def test_the_documentation_is_the_table():
    assert (ROOT / "docs/trainer_options.md").read_text(encoding="utf-8") == document()


def test_defaults_are_accepted_before_and_after_transformers_read_them():
    args = TrainingArguments("out", use_cpu=True)
    check_trainer_options(args)
    check_trainer_options(transformers.TrainingArguments("out", use_cpu=True))


REFUSED: list[tuple] = [  # option, value, other options
    ("do_predict", True), ("debug", "tpu_metrics_debug"), ("optim", "lomo"), ("optim", "galore_adamw_layerwise"),
    ("optim", "schedule_free_adamw"), ("optim", "grokadamw"), ("optim_args", "beta1=0.8"),
    ("optim_args", "momentum", {"optim": "sgd"}), ("optim_args", "momentum=x", {"optim": "sgd"}),
    ("optim_target_modules", "all-linear"), ("auto_find_batch_size", True), ("bf16_full_eval", True),
    ("fp16_full_eval", True), ("use_liger_kernel", True), ("liger_kernel_config", {"rope": True}),
    ("dataloader_in_order", False), ("label_names", ["labels", "others"]), ("batch_eval_metrics", True),
    ("eval_do_concat_batches", False), ("eval_use_gather_object", True), ("include_for_metrics", ["loss"]),
    ("save_only_model", True), ("enable_jit_checkpoint", True), ("push_to_hub", True), ("hub_model_id", "me/model"),
    ("hub_strategy", "end"), ("hub_private_repo", True), ("hub_always_push", True), ("hub_revision", "dev"),
    ("hub_token", "secret"), ("local_rank", 3), ("fsdp", "full_shard"), ("fsdp_config", {"min_num_params": 1}),
    ("deepspeed", {"zero_optimization": {"stage": 3}}), ("parallelism_config", "tp"),
    ("accelerator_config", {"split_batches": True}), ("accelerator_config", '{"dispatch_batches": true}'),
    ("accelerator_config", AcceleratorConfig(even_batches=False)),
    ("accelerator_config", {"use_seedable_sampler": False}), ("accelerator_config", {"no_such_setting": True}),
    ("num_train_epochs", 0), ("max_steps", 0), ("data_seed", 7, {"train_sampling_strategy": "sequential"}),
    ("lr_scheduler_type", "cosine_with_min_lr"), ("lr_scheduler_kwargs", {"no_such": 1}),
    ("lr_scheduler_kwargs", '{"no_such": 1}', {"lr_scheduler_type": "constant"}),
    ("warmup_steps", 3, {"lr_scheduler_type": "constant"}), ("adam_beta1", 0.5, {"optim": "sgd"}),
    ("adam_beta2", 0.5, {"optim": "adagrad"}), ("adam_epsilon", 1e-3, {"optim": "rmsprop"}),
    ("optim_args", "weight_decay=0.1", {"optim": "sgd"}), ("per_device_train_batch_size", 0),
    ("per_device_eval_batch_size", 0), ("gradient_accumulation_steps", 0), ("max_grad_norm", -1.0),
    ("average_tokens_across_devices", False), ("fp16", True), ("use_cache", True), ("torch_compile_backend", "no_such"),
    ("torch_compile_mode", "no_such"), ("torch_compile_mode", "default", {"torch_compile_backend": "eager"}),
    ("activation_checkpointing_kwargs", {"use_reentrant": False}),
    ("activation_checkpointing_kwargs", {"no_such": 1}, {"activation_checkpointing": True}),
    ("activation_checkpointing_kwargs", {"every_n_layers": 0}, {"activation_checkpointing": True}),
    ("gradient_checkpointing_kwargs", {"offload": True}, {"gradient_checkpointing": True}),
    ("dataloader_persistent_workers", True), ("dataloader_multiprocessing_context", "spawn"), ("eval_steps", -1),
    ("logging_steps", -1), ("report_to", "no_such"), ("run_name", "mine", {"report_to": "tensorboard"}),
    ("project", "mine"), ("trackio_space_id", "me/mine"), ("trackio_bucket_id", "me/mine"),
    ("trackio_static_space_id", False), ("save_steps", 0), ("save_strategy", "best"),
    ("save_strategy", "best", {"eval_strategy": "steps"}), ("load_best_model_at_end", True, {"save_strategy": "no"}),
    ("resume_from_checkpoint", "True"), ("ddp_backend", "gloo"),
    ("ddp_static_graph", True, {"gradient_accumulation_steps": 2}), ("seed", -1), ("seed", 2**32), ("data_seed", -1),
    ("num_train_epochs", float("inf")), ("max_steps", -5), ("learning_rate", -1.0), ("learning_rate", float("nan")),
    ("weight_decay", -0.1), ("warmup_steps", -1), ("adam_beta1", 1.0), ("adam_beta2", -0.1), ("adam_epsilon", -1e-8),
    ("neftune_noise_alpha", -4.0), ("label_smoothing_factor", 2.0), ("torch_empty_cache_steps", 0),
    ("dataloader_num_workers", -1), ("dataloader_num_workers", 100_000), ("dataloader_prefetch_factor", 2),
    ("dataloader_prefetch_factor", 0, {"dataloader_num_workers": 1}), ("eval_accumulation_steps", 0),
    ("dataloader_multiprocessing_context", "thread", {"dataloader_num_workers": 1}), ("eval_delay", -1.0),
    ("ddp_timeout", 0), ("ddp_bucket_cap_mb", 0),
]  # fmt: skip


@pytest.mark.parametrize("name,value,others", [(*row, {})[:3] for row in REFUSED], ids=lambda v: f"{v}"[:32])
def test_a_refused_option_is_named_with_its_value_reason_and_remedy(name, value, others):
    option = next(option for option in TRAINER_OPTIONS if option.name == name)
    with pytest.raises(ValueError) as error:
        TrainingArguments("out", use_cpu=True, **{name: value}, **others)
    message = str(error.value)
    assert message.startswith(f"--{name}: " if name == "hub_token" else f"--{name} {value}: ")
    assert any(f": {refusal.reason}; {refusal.remedy}" in message for refusal in option.refusals)
    assert "secret" not in message


def test_every_refusal_is_tried():
    assert {option.name for option in TRAINER_OPTIONS if option.refusals} == {row[0] for row in REFUSED}


ACCEPTED = [
    {"ddp_static_graph": True}, {"warmup_steps": 3, "lr_scheduler_type": "constant_with_warmup"},
    {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr_rate": 0.1}'},
    {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 100}},
    {"num_train_epochs": 0, "max_steps": 5}, {"max_grad_norm": 0.0}, {"save_total_limit": 0}, {"save_total_limit": -1},
    {"resume_from_checkpoint": "False"}, {"resume_from_checkpoint": "True", "do_train": True},
    {"report_to": "all"}, {"report_to": ["tensorboard"]}, {"torch_compile_mode": "max-autotune"},
    {"accelerator_config": '{"non_blocking": true}'}, {"optim": "rmsprop", "optim_args": "alpha = 0.9, centered=true"},
    {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}, {"save_strategy": "best",
     "eval_strategy": "steps", "metric_for_best_model": "loss"},
]  # fmt: skip


@pytest.mark.parametrize("options", ACCEPTED, ids=str)
def test_other_values_of_options_that_are_refused_in_part_are_accepted(options):
    check_trainer_options(TrainingArguments("out", use_cpu=True, **options))


@pytest.mark.parametrize("library,name", [("bitsandbytes", "adamw_bnb_8bit"), ("torchao", "adamw_torch_8bit")])
def test_an_optimizer_whose_library_is_missing_is_refused_before_anything_is_loaded(monkeypatch, library, name):
    monkeypatch.setattr(option_conditions.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"--optim {name}: {library} is not installed; pip install {library}"):
        TrainingArguments("out", use_cpu=True, optim=name)


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(transformers.integrations, "get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(ValueError, match="--report_to wandb: its library is not installed"):
        TrainingArguments("out", use_cpu=True, report_to="wandb")


def test_adafactor_is_refused_under_fsdp(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="--optim adafactor: .* does not know sharded weights"):
        TrainingArguments("out", use_cpu=True, optim="adafactor")


def test_an_option_that_an_older_transformers_does_not_have_is_passed_over(monkeypatch):
    newer = option_table.Option("of_a_later_release", "", refusals=(option_table.Refusal("", ""),))
    monkeypatch.setattr(trainer_options, "TRAINER_OPTIONS", (newer,))
    TrainingArguments("out", use_cpu=True)


@pytest.mark.parametrize(
    "flags,message",
    [
        ((), "nothing is asked for: give --do_train True, --do_eval True, or both"),
        (("--metric_for_best_model", "accuracy"), "accuracy is not measured here; choose one of loss, perplexity, kl"),
        (("--metric_for_best_model", "loss", "--greater_is_better", "True"), "loss is better when it is lower"),
        (("--streaming", "True", "--group_by_length", "True"), "group_by_length has no effect with --streaming True"),
        (
            ("--group_by_length", "True", "--train_sampling_strategy", "sequential"),
            "--group_by_length True and --train_sampling_strategy sequential ask for two orders of samples",
        ),
    ],
)
def test_options_that_exclude_each_other_are_refused(capsys, tmp_path, flags, message):
    with pytest.raises(SystemExit):
        main.parse_arguments(["--output_dir", str(tmp_path), *flags])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "variable,name",
    [("ACCELERATE_USE_DEEPSPEED", "deepspeed"), ("ACCELERATE_USE_PARALLELISM_CONFIG", "parallelism_config")],
)
def test_what_accelerate_launch_asks_for_is_refused_too(monkeypatch, variable, name):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match=f"--{name}, asked for by accelerate launch .*{variable}"):
        TrainingArguments("out", use_cpu=True)


def test_a_refused_option_ends_the_program_with_one_line(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main.parse_arguments(["--output_dir", str(tmp_path), "--use_liger_kernel", "True"])
    assert "error: --use_liger_kernel True: Liger Kernel replaces" in capsys.readouterr().err


def test_smoothed_labels_are_refused_with_a_teacher(capsys, tmp_path, trainer_with):
    flags = ["--output_dir", str(tmp_path), "--label_smoothing_factor", "0.1", "--distill", "True"]
    with pytest.raises(SystemExit):
        main.parse_arguments(flags)
    assert "--label_smoothing_factor 0.1 has no effect with a teacher" in capsys.readouterr().err
    with pytest.raises(ValueError, match="has no effect with a teacher"):
        trainer_with(teacher=make_llama(layers=1), label_smoothing_factor=0.1)


def test_every_optimizer_is_one_that_transformers_knows():
    known = [name.value for name in transformers.training_args.OptimizerNames]
    assert set(OPTIMIZERS) < set(known)


# ---- What works, tried ----


@pytest.fixture(scope="module")
def plain_losses(tmp_path_factory, data, untrained) -> list[float]:
    trainer = make_trainer(tmp_path_factory.mktemp("plain"), data, untrained)
    trainer.train()
    return losses(trainer)


CHANGES_NOTHING = {
    "memory": {"torch_empty_cache_steps": 1, "activation_checkpointing": True,
               "activation_checkpointing_kwargs": {"every_n_layers": 1}, "skip_memory_metrics": False},
    "evaluation": {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 1, "eval_delay": 1,
                   "eval_accumulation_steps": 1, "per_device_eval_batch_size": 2, "prediction_loss_only": True},
    "data": {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 2, "remove_unused_columns": False,
             "dataloader_multiprocessing_context": "fork", "data_seed": 42},
    "others": {"debug": "underflow_overflow", "optim": "adamw_torch",
               "accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 1}}, "ddp_static_graph": True},
}  # fmt: skip


@pytest.mark.parametrize("group", CHANGES_NOTHING)
def test_options_that_must_not_change_training_do_not(trainer_with, plain_losses, group):
    trainer = trainer_with(**CHANGES_NOTHING[group])
    trainer.train()
    assert losses(trainer) == pytest.approx(plain_losses, rel=1e-5)
    assert trainer.evaluate()["eval_loss"] < plain_losses[0]


CHANGES_TRAINING = [
    {"neftune_noise_alpha": 5.0}, {"label_smoothing_factor": 0.1}, {"optim": "adafactor"}, {"optim": "adagrad"},
    {"optim": "rmsprop", "optim_args": "alpha=0.5"}, {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=true"},
    {"lr_scheduler_type": "greedy", "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5}, "eval_strategy": "steps",
     "eval_steps": 1},
]  # fmt: skip


@pytest.mark.parametrize("options", CHANGES_TRAINING, ids=lambda options: "-".join(map(str, options.values())))
def test_an_option_of_training_changes_it_and_a_run_ended_by_sigterm_resumes_exactly(
    trainer_with, plain_losses, options
):
    whole = trainer_with("whole", **options)
    whole.train()
    assert losses(whole) != pytest.approx(plain_losses, rel=1e-6)
    first = trainer_with("parts", **options)
    _send_sigterm(first, step=1)
    first.train()
    assert first.was_interrupted
    rest = trainer_with("parts", **options)
    rest.train(resume_from_checkpoint=True)
    weights = zip(whole.model.parameters(), rest.model.parameters(), strict=True)
    assert all(torch.equal(expected, actual) for expected, actual in weights)


def _send_sigterm(trainer: QATTrainer, step: int) -> None:
    """While the given step, counted from 0, is computed."""
    plain = trainer.training_step

    def training_step(*args, **kwargs):
        if trainer.state.global_step == step:
            signal.raise_signal(signal.SIGTERM)
        return plain(*args, **kwargs)

    trainer.training_step = training_step


def test_sigterm_saves_though_only_the_best_is_to_be_saved(trainer_with, tmp_path):
    trainer = trainer_with(
        save_strategy="best", eval_strategy="steps", eval_steps=1, metric_for_best_model="loss", greater_is_better=True
    )
    _send_sigterm(trainer, step=1)
    trainer.train()
    assert (tmp_path / "out" / "checkpoint-2").is_dir()


def test_the_best_model_is_loaded_at_the_end(trainer_with):
    trainer = trainer_with(
        save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="perplexity", greater_is_better=True, save_total_limit=1,
    )  # fmt: skip
    trainer.train()
    first = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(first, rel=1e-5)  # the worst, as asked


def test_callbacks_are_restored_and_the_run_does_not_stop_again(trainer_with):
    first = trainer_with(save_strategy="steps", save_steps=1)
    _send_sigterm(first, step=1)
    first.train()
    second = trainer_with(save_strategy="steps", save_steps=1, restore_callback_states_from_checkpoint=True)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 3


def test_a_missing_best_checkpoint_is_logged(trainer_with, caplog):
    trainer_with(
        save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, eval_delay=9,
        load_best_model_at_end=True,
    ).train()  # fmt: skip
    assert "there is no best checkpoint to load, the last weights stay" in caplog.text


def test_smoothed_labels_are_those_of_the_next_token_also_where_fsdp2_renamed_the_class(trainer_with):
    plain, renamed = (trainer_with(name, label_smoothing_factor=0.1, max_steps=1) for name in ("plain", "renamed"))
    renamed.model.__class__ = type("FSDPLlamaForCausalLM", (type(renamed.model),), {})
    for trainer in (plain, renamed):
        trainer.train()
    assert losses(plain) == losses(renamed)


def test_rebalanced_batches_come_in_an_order_of_the_seed(trainer_with):
    def order(**seeds) -> list[list[int]]:
        return list(trainer_with(train_sampling_strategy="batch_rebalance", **seeds)._get_train_sampler())

    assert order(seed=1) == order(seed=2, data_seed=1) != order(seed=2)


def test_tokens_are_counted(trainer_with):
    trainer = trainer_with(include_num_input_tokens_seen="non_padding")
    trainer.train()
    assert 0 < trainer.state.num_input_tokens_seen < 3 * 4 * 64


def test_full_determinism_is_in_force_and_changes_nothing(trainer_with, plain_losses):
    try:
        trainer = trainer_with(full_determinism=True)
        assert torch.are_deterministic_algorithms_enabled()
        trainer.train()
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses(trainer) == plain_losses
