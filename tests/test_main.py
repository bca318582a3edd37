"""main.py as a user runs it, on a tiny Llama."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import make_llama, make_tokenizer, save_llama, write_conversations
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TrainingArguments

import main
from qat import QATConfig, prepare_qat
from qat.errors import UserError
from training.arguments.model import ModelArguments
from training.backends.saved_dtypes import SavedDtypes
from training.losses.distillation import labelled_rows
from training.start.start import Start
from utils import QATTrainer, make_supervised_data_module


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("main")
    save_llama(folder / "model")
    write_conversations(folder / "data.jsonl")
    return folder


def run(workspace: Path, output: str, *flags: str, model: str = "model") -> dict:
    """Run main.py; returns the metrics it wrote."""
    main.main(
        [
            "--model_name_or_path", str(workspace / model), "--dataset", str(workspace / "data.jsonl"),
            "--eval_size", "6", "--per_device_train_batch_size", "4", "--learning_rate", "1e-2",
            "--output_dir", str(workspace / output), "--disable_tqdm", "True", "--report_to", "none",
            "--report", "False", "--logging_steps", "1", "--export_format", "none", *flags,
        ]
    )  # fmt: skip
    results = sorted((workspace / output).rglob("all_results.json"), key=lambda p: p.stat().st_mtime)
    return json.loads(results[-1].read_text())


TRAIN = ("--do_train", "True", "--do_eval", "True", "--max_steps", "4")


@pytest.fixture(scope="module")
def bf16_stage(workspace) -> dict:
    return run(workspace, "bf16", *TRAIN, "--report_to", "tensorboard")


def test_bf16_stage_learns_and_saves_in_the_original_dtype(workspace, bf16_stage):
    assert bf16_stage["eval_loss"] < 0.95 * math.log(260)
    assert bf16_stage["eval_perplexity"] == pytest.approx(math.exp(bf16_stage["eval_loss"]))
    config = json.loads((workspace / "bf16" / "config.json").read_text())
    assert config["use_cache"] is True  # as in the model's own, though training switches it off
    assert config["dtype"] == "bfloat16" and QATConfig.load(workspace / "bf16") is None
    with safe_open(workspace / "bf16" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}  # noqa: SIM118
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    before, after = (load_file(workspace / f / "model.safetensors") for f in ("model", "bf16"))
    assert before.keys() == after.keys() and any(not torch.equal(before[k], after[k]) for k in before)


def test_perplexity_reaches_tensorboard(workspace, bf16_stage):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values = []
    for event_file in (workspace / "bf16").rglob("events.out.tfevents*"):
        events = EventAccumulator(str(event_file))
        events.Reload()
        if "eval/perplexity" in events.Tags()["scalars"]:
            values += [event.value for event in events.Scalars("eval/perplexity")]
    assert values == [pytest.approx(bf16_stage["eval_perplexity"], rel=1e-6)]


def test_quantization_figures_reach_tensorboard_and_the_settings_that_shaped_training_the_config(workspace, bf16_stage):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ("--learn_exponent", "True", "--report_to", "tensorboard")
    run(workspace, "figures", *TRAIN, "--quant_scheme", "MXFP4", *flags, model="bf16")
    event_files = sorted((workspace / "figures").rglob("events.out.tfevents*"))
    events = EventAccumulator(str(event_files[0]))  # of the training; evaluation writes another
    events.Reload()
    kinds = ("flips", "oscillation", "saturation_weights", "saturation_inputs")
    for tag in (f"train/{kind}/{group}" for kind in kinds for group in ("attention", "mlp")):
        values = [event.value for event in events.Scalars(tag)]
        assert len(values) == 4 and all(0 <= value <= 1 for value in values), tag
    assert events.Scalars("train/flips/mlp")[0].value > 0
    history = json.loads((workspace / "figures" / "trainer_state.json").read_text())["log_history"]
    assert "oscillation/mlp" in history[0]
    assert QATConfig.load(workspace / "figures").training == {"learn_exponent": True}


def test_ptq_evaluation_overwrites_nothing_and_quantizes(workspace, bf16_stage):
    before = {p: p.read_bytes() for p in (workspace / "bf16").rglob("*") if p.is_file()}
    ptq = run(workspace, "bf16", "--quant_scheme", "MXFP4", "--do_eval", "True", model="bf16")
    plain = run(workspace, "bf16", "--do_eval", "True", model="bf16")
    assert ptq["eval_loss"] != plain["eval_loss"] == pytest.approx(bf16_stage["eval_loss"], rel=1e-3)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert {p.name for p in (workspace / "bf16").iterdir() if p.name.startswith("eval")} == {
        "eval_results.json", "evaluation-1", "evaluation-2",
    }  # fmt: skip


def test_qat_stage_restores_its_scheme_when_loaded_again(workspace, bf16_stage):
    qat = run(workspace, "qat", *TRAIN, "--quant_scheme", "mxfp4", model="bf16")
    assert QATConfig.load(workspace / "qat").mapping == {"torch.nn.Linear": "MXFP4"}
    again = run(workspace, "again", "--do_eval", "True", model="qat")
    assert again["eval_loss"] == qat["eval_loss"]  # what was evaluated is what was saved
    plain = AutoModelForCausalLM.from_pretrained(workspace / "qat")
    assert plain.dtype == torch.bfloat16 and type(plain.model.layers[0].mlp.up_proj) is torch.nn.Linear


class _PowerCut(BaseException):
    pass


@pytest.mark.parametrize("scheme", [(), ("--quant_scheme", "MXFP4")], ids=["bf16", "mxfp4"])
def test_interrupted_and_resumed_equals_uninterrupted(workspace, monkeypatch, scheme):
    name = "resumed-" + "".join(scheme[1:])
    flags = ("--do_train", "True", "--max_steps", "6", "--save_steps", "2", *scheme)
    run(workspace, f"whole{name}", *flags)
    step = QATTrainer.training_step

    def cut_the_power(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise _PowerCut
        return step(self, *args, **kwargs)

    monkeypatch.setattr(QATTrainer, "training_step", cut_the_power)
    with pytest.raises(_PowerCut):
        run(workspace, name, *flags)
    monkeypatch.undo()
    assert (workspace / name / "checkpoint-4").is_dir() and not (workspace / name / "model.safetensors").exists()
    run(workspace, name, *flags)
    whole, resumed = (load_file(workspace / f / "model.safetensors") for f in (f"whole{name}", name))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    logs = [json.loads((workspace / f / "trainer_state.json").read_text()) for f in (f"whole{name}", name)]
    losses = [{e["step"]: e["loss"] for e in log["log_history"] if "loss" in e} for log in logs]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_smoothing_changes_what_is_quantized_but_not_the_model(workspace, bf16_stage):
    mxfp8 = ("--do_eval", "True", "--quant_scheme", "MXFP8")
    plain, smoothed = (run(workspace, "smooth", *mxfp8, *f, model="bf16") for f in ((), ("--smooth_alpha", "0.7")))
    assert plain["eval_loss"] != smoothed["eval_loss"] == pytest.approx(bf16_stage["eval_loss"], rel=0.02)


@pytest.fixture(scope="module")
def qat_stage(workspace) -> dict:
    return run(workspace, "qat-stage", "--quant_scheme", "MXFP4", *TRAIN)


@pytest.mark.parametrize(
    "flags",
    [
        ("--gradient_checkpointing", "True"),
        ("--gradient_checkpointing", "True", "--gradient_checkpointing_kwargs", '{"use_reentrant": true}'),
    ],
)
def test_checkpointed_activations_train_the_same_model(workspace, qat_stage, flags):
    plain = qat_stage
    other = run(workspace, f"with{len(flags)}{flags[0]}", "--quant_scheme", "MXFP4", *TRAIN, *flags)
    assert other["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-3)
    assert other["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-3)


def test_a_compiled_run_trains_the_same_model(tmp_path):
    """Two steps, two quantized products: tracing takes longer than training. test_linear_function.py has Inductor."""
    save_llama(tmp_path / "model", layers=1)
    write_conversations(tmp_path / "data.jsonl")
    ignored = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    flags = ("--quant_scheme", "MXFP4", "--ignore", *ignored, "--do_train", "True", "--max_steps", "2")
    plain = run(tmp_path, "plain", *flags)
    compiled = run(tmp_path, "compiled", *flags, "--torch_compile", "True", "--torch_compile_backend", "eager")
    assert compiled["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-4)


def test_resuming_another_stage_or_scheme_is_refused(workspace, bf16_stage):
    with pytest.raises(ValueError, match="cannot resume .*run without quantization.*this run is a QAT run .*MXFP4"):
        run(workspace, "bf16", *TRAIN, "--quant_scheme", "MXFP4")
    run(workspace, "mxfp8", *TRAIN, "--quant_scheme", "MXFP8")
    with pytest.raises(ValueError, match="MXFP8.*this run is a QAT run .*MXFP4"):
        run(workspace, "mxfp8", *TRAIN, "--quant_scheme", "MXFP4")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        run(workspace, "nothing", *TRAIN, "--resume_from_checkpoint", "True")
    with pytest.raises(ValueError, match="no trainer_state.json"):
        run(workspace, "nothing", *TRAIN, "--resume_from_checkpoint", str(workspace / "model"))


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_a_single_file_of_arguments_works(workspace, suffix):
    content = {
        "model_name_or_path": str(workspace / "model"), "dataset": str(workspace / "data.jsonl"), "eval_size": 6,
        "output_dir": str(workspace / suffix), "do_eval": True, "report_to": "none", "quant_scheme": "MXFP8",
    }  # fmt: skip
    (workspace / f"arguments.{suffix}").write_text(json.dumps(content))  # JSON is YAML
    main.main([str(workspace / f"arguments.{suffix}")])
    assert "eval_perplexity" in json.loads((workspace / suffix / "all_results.json").read_text())


@pytest.mark.parametrize(
    "flags,message",
    [
        (("--quant_scheme", "MXFP5"), "--quant_scheme 'MXFP5' is unknown; choose one of MXFP4, MXFP8"),
        (("--model_max_length", "1"), "--model_max_length 1"),
        (("--weight_scale_rule", "even"), "--weight_scale_rule even has no effect without --quant_scheme or"),
        (("--input_scale_rule", "even"), "--input_scale_rule even has no effect without --quant_scheme or"),
        (("--quant_mapping", "none.json"), "mapping file 'none.json' cannot be read"),
        (("--quant_scheme", "MXFP4", "--quant_mapping", "m.json"), "give either it or --quant_scheme"),
        (("--exponent_learning_rate", "0"), "--exponent_learning_rate 0"),
        (("--distill_teacher", "self", "--do_train", "True"), "--distill_teacher self is for evaluation"),
        (("--quant_scheme", "MXFP4", "--input_scale_rule", "search"), "--input_scale_rule 'search'"),
        (("--distill_temperature", "0"), "--distill_temperature 0"),
        (("--distill_ce_weight", "2"), "--distill_ce_weight 2"),
        (("--distill", "True", "--distill_ce_weight", "1"), "--distill_ce_weight 1.0 must lie between"),
        (("--distill_ce_weight", "0.2"), "--distill_ce_weight 0.2 has no effect without --distill True"),
        (("--distill", "True", "--distill_temperature", "inf"), "--distill_temperature inf must be"),
        (("--distill", "True", "--distill_temperature", "nan"), "--distill_temperature nan must be"),
        (("--distill_temperature", "2"), "--distill_temperature 2.0 has no effect without --distill True"),
        (("--distill_samples", "8"), "--distill_samples 8 has no effect without --distill_teacher cache"),
        (("--distill_cache_dir", "d"), "--distill_cache_dir d has no effect without --distill_teacher cache"),
        (("--exponent_learning_rate", "inf", "--learn_exponent", "True"), "--exponent_learning_rate inf must be"),
        (("--exponent_learning_rate", "nan", "--learn_exponent", "True"), "--exponent_learning_rate nan must be"),
        (("--exponent_learning_rate", "0.1"), "0.1 has no effect without --learn_exponent True"),
        (
            ("--distill", "True", "--distill_top_k", "8"),
            "--distill_top_k 8 has no effect without --distill_teacher cache",
        ),
        (("--metric_for_best_model", "kl"), "--metric_for_best_model kl is the divergence from a teacher"),
        (("--learn_exponent", "True", "--bf16", "False"), "--learn_exponent True: weights are saved"),
        (("--gguf_file", "no.gguf"), "--gguf_file 'no.gguf'"),
        (("--eval_strategy", "sometimes"), "eval_strategy"),
        (("missing.yaml",), "missing.yaml"),
        (("--no_such_flag", "1"), "no_such_flag"),
    ],
)
def test_wrong_arguments_are_named(workspace, capsys, flags, message):
    with pytest.raises((SystemExit, ValueError)) as error:
        main.parse_arguments([*flags] if len(flags) == 1 else ["--output_dir", str(workspace / "x"), *flags])
    assert message in capsys.readouterr().err + str(error.value)


def test_every_argument_has_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main.parse_arguments(["--help"])
    assert stop.value.code == 0
    options = capsys.readouterr().out.partition("options:")[2]
    flags = re.split(r"\n  (?=--)", options)[1:]
    undocumented = [flag.split()[0] for flag in flags if len(re.sub(r"--\S+|[A-Z_]+|[,{}]", "", flag).split()) < 3]
    assert len(flags) > 100 and not undocumented


def test_a_gguf_file_loads_dequantized(tmp_path, workspace):
    from gguf_files import write_gguf

    weights = write_gguf(tmp_path / "tiny.gguf", make_llama())
    start = Start.read(ModelArguments(str(tmp_path), gguf_file="tiny.gguf"))
    model = start.load_model()
    assert model.dtype == torch.float32 and start.dtypes.main == torch.bfloat16
    for name, weight in weights.items():
        assert torch.equal(model.state_dict()[name], weight.bfloat16().float()), name
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())


def make_trainer(folder: Path, model, teacher=None, **kwargs) -> QATTrainer:
    module = make_supervised_data_module(str(write_conversations(folder / "c.jsonl")), make_tokenizer(), eval_size=7)
    args = TrainingArguments(
        str(folder / "out"), report_to="none", use_cpu=True, per_device_eval_batch_size=4, disable_tqdm=True, **kwargs
    )
    return QATTrainer(model=model, teacher=teacher, args=args, processing_class=make_tokenizer(), **module)


def test_save_model_accepts_every_calling_form_and_mixed_dtypes(tmp_path):
    model = prepare_qat(make_llama(), {torch.nn.Linear: "MXFP4"})
    by_name = dict.fromkeys(model.state_dict(), torch.bfloat16) | {"model.norm.weight": torch.float32}
    trainer = make_trainer(tmp_path, model)
    trainer.saved_dtypes = SavedDtypes(torch.bfloat16, by_name)
    trainer.save_model()
    trainer.save_model(str(tmp_path / "a"))
    trainer.save_model(output_dir=str(tmp_path / "b"))
    for folder in ("out", "a", "b"):
        saved = load_file(tmp_path / folder / "model.safetensors")
        assert saved["model.norm.weight"].dtype == torch.float32
        assert saved["model.embed_tokens.weight"].dtype == torch.bfloat16 and "lm_head.weight" not in saved
        assert QATConfig.load(tmp_path / folder) == model.qat_config
        assert json.loads((tmp_path / folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_evaluation_uses_every_sample_though_training_drops_the_last_batch(tmp_path):
    trainer = make_trainer(tmp_path, make_llama(), dataloader_drop_last=True)
    assert sum(len(batch["labels"]) for batch in trainer.get_eval_dataloader()) == 7
    assert trainer.args.dataloader_drop_last
    whole = trainer.evaluate()["eval_loss"]
    trainer.args.per_device_eval_batch_size = 1
    assert trainer.evaluate()["eval_loss"] == pytest.approx(whole, rel=1e-6)


def test_distillation_lowers_the_divergence_and_reports_both_losses(workspace, bf16_stage):
    teacher = ("--teacher_model_name_or_path", str(workspace / "model"))  # untrained: the student has a way to go
    flags = ("--quant_scheme", "MXFP4", "--weight_scale_rule", "search", *teacher)
    before = run(workspace, "distill-0", "--do_eval", "True", *flags, model="bf16")
    after = run(workspace, "distill", *TRAIN, *flags, "--max_steps", "12", model="bf16")
    assert 0 < after["eval_kl"] < before["eval_kl"] and "eval_perplexity" in after
    rules = QATConfig.load(workspace / "distill").scale_rules
    assert rules == {"MXFP4": {"weight": "search", "input": "floor"}}
    again = run(workspace, "distill-again", "--do_eval", "True", model="distill")
    assert again["eval_loss"] == pytest.approx(after["eval_loss"], rel=1e-3)


def test_a_run_from_a_cached_teacher_reads_it_again_and_ends_in_a_report(workspace, bf16_stage, caplog):
    flags = (
        "--distill_teacher",
        "cache",
        "--distill_cache_dir",
        str(workspace / "teachers"),
        "--quant_scheme",
        "MXFP4",
    )
    first = run(workspace, "cached", *TRAIN, *flags, "--report", "True", model="bf16")
    folders = sorted((workspace / "teachers").glob("*/about.json"))
    again = run(workspace, "cached-again", *TRAIN, *flags, model="bf16")
    assert sorted((workspace / "teachers").glob("*/about.json")) == folders and len(folders) == 2
    assert again["eval_kl"] == first["eval_kl"] and again["train_loss"] == first["train_loss"]
    report = (workspace / "cached" / "report.md").read_text()
    assert "| eval_kl |" in report and "`torch.nn.Linear: MXFP4" in report and "| distill_teacher | `cache` |" in report
    assert (workspace / "cached" / "report.png").stat().st_size > 10_000
    assert not (workspace / "cached-again" / "report.md").exists()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_distillation_loss_is_a_mean_over_the_tokens_of_the_whole_step(tmp_path, accumulation):
    model, teacher = make_llama(), make_llama(tie_word_embeddings=False)
    trainer = make_trainer(
        tmp_path, model, teacher=teacher, max_steps=1, per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation, learning_rate=0.0, logging_steps=1, lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer.train()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    labels = batch.pop("labels")
    rows = [labelled_rows(m(**batch).logits, labels).float().log_softmax(-1) for m in (model, teacher)]
    expected = F.kl_div(*rows, log_target=True, reduction="sum") / len(rows[0])
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(("flags", "sets"), [((), 1), (("--ptq", "True"), 1), (("--do_train", "True"), 2)])
def test_a_cached_teacher_computes_the_sets_that_the_run_reads(workspace, tmp_path, flags, sets):
    words = ("--distill", "True", "--distill_teacher", "cache", "--distill_cache_dir", str(tmp_path / "cache"))
    words = (*words, "--do_eval", "True", "--quant_scheme", "MXFP4", "--max_steps", "1", *flags)
    found = run(workspace, str(tmp_path / "out"), *words)
    assert "eval_kl" in found
    assert len(list((tmp_path / "cache").glob("*/about.json"))) == sets


@pytest.mark.parametrize("weight_init", ["none", "gptq"])
def test_post_training_quantization_packs_what_it_evaluates_and_trains_nothing(workspace, weight_init):
    """The packed model, evaluated as engines compute it, has the loss of the run that packed it."""
    name = f"ptq-{weight_init}"
    scheme = ("--quant_scheme", "MXFP4", "--weight_scale_rule", "search", "--input_transform", "hadamard")
    quantized = (*scheme, "--smooth_alpha", "0.5", "--weight_init", weight_init)
    found = run(
        workspace, name, "--ptq", "True", "--do_eval", "True", *quantized, "--export_format", "compressed-tensors",
        "--report", "True", "--weight_decay", "0.0",
    )  # fmt: skip
    folder = workspace / name
    assert "train_loss" not in found and not list(folder.glob("checkpoint-*"))
    assert (folder / "MXFP4" / "verification.json").exists()
    packed = run(workspace, f"{name}-packed", "--do_eval", "True", model=f"{name}/MXFP4")
    assert packed["eval_loss"] == pytest.approx(found["eval_loss"], rel=1e-6)
    report = (folder / "report.md").read_text()
    assert report.startswith("# Post-training quantization\n\n## Figures") and not (folder / "report.png").exists()
    assert ("weight_init" in report) is (weight_init != "none") and "learning_rate" not in report
    plain = run(workspace, f"{name}-plain", "--do_eval", "True")
    assert found["eval_loss"] != plain["eval_loss"]
    is_rounded = weight_init == "gptq"
    assert QATConfig.load(folder).rounded is is_rounded
    again = ("--ptq", "True", "--do_eval", "True", *quantized)
    if is_rounded:
        with pytest.raises(UserError, match="would undo the rounding that --model_name_or_path .* was saved with"):
            run(workspace, f"{name}-again", *again, model=name)
    else:
        run(workspace, f"{name}-again", *again, model=name)


@pytest.mark.parametrize("flags", [("--ptq", "True"), ("--do_train", "True", "--max_steps", "1")])
@pytest.mark.parametrize("holds", ["another program's model", "a packed model"])
def test_a_model_that_no_training_wrote_is_not_replaced(workspace, tmp_path, flags, holds):
    (tmp_path / "model.safetensors").touch()
    config = {} if holds != "a packed model" else {"quantization_config": {"quant_method": "compressed-tensors"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if holds == "a packed model":
        (tmp_path / "qat_config.json").touch()
    before = sorted(path.name for path in tmp_path.iterdir())
    message = "is a packed folder" if holds == "a packed model" else r"no training here wrote \(model.safetensors\)"
    with pytest.raises(UserError, match=f"--output_dir '{tmp_path}' .*{message}.*; give another"):
        run(workspace, str(tmp_path), *flags, "--quant_scheme", "MXFP4")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_checkpoints_of_a_model_of_other_shapes_are_refused_in_one_line(workspace, tmp_path):
    words = ("--do_train", "True", "--do_eval", "True", "--save_strategy", "steps", "--save_steps", "1")
    run(workspace, str(tmp_path), *words, "--max_steps", "1")
    config = make_llama().config
    config.intermediate_size = 128
    LlamaForCausalLM(config).save_pretrained(workspace / "wide")
    make_tokenizer().save_pretrained(workspace / "wide")
    with pytest.raises(UserError, match="cannot resume from .*checkpoint-1: its weights have other shapes"):
        run(workspace, str(tmp_path), *words, "--max_steps", "2", model="wide")


def test_files_of_a_tokenizer_that_was_there_do_not_stay_beside_another_model(workspace, tmp_path):
    """A chat template would be read with a model that was trained, and evaluated, without it."""
    (tmp_path / "trainer_state.json").write_text("{}")
    stale = ("chat_template.jinja", "added_tokens.json", "merges.txt", "additional_chat_templates/tool.jinja")
    (tmp_path / "additional_chat_templates").mkdir()
    for name in stale:
        (tmp_path / name).write_text("of another model")
    run(workspace, str(tmp_path), "--ptq", "True", "--do_eval", "True", "--quant_scheme", "MXFP4")
    texts = [(tmp_path / name).read_text() for name in stale if (tmp_path / name).exists()]
    assert "of another model" not in texts


def test_rounded_values_are_no_teacher_and_trained_ones_are_rounded_no_longer(workspace, caplog):
    ptq = ("--ptq", "True", "--do_eval", "True", "--quant_scheme", "MXFP4A16", "--weight_init", "gptq")
    run(workspace, "rounded", *ptq)
    message = "its weights were rounded before they were saved"
    of_hub = workspace / "hub" / "models--somebody--rounded"
    shutil.copytree(workspace / "rounded", of_hub / "snapshots" / "0123")
    (of_hub / "refs").mkdir()
    (of_hub / "refs" / "main").write_text("0123")
    for teacher in (str(workspace / "rounded"), "somebody/rounded"):
        with pytest.raises(UserError, match=message):
            run(
                workspace, "taught", "--do_eval", "True", "--distill", "True", "--quant_scheme", "MXFP4",
                "--teacher_model_name_or_path", teacher, "--cache_dir", str(workspace / "hub"),
            )  # fmt: skip
    with pytest.raises(UserError, match="--distill_teacher self: the weights of .* are quantized values"):
        run(workspace, "itself", "--do_eval", "True", "--distill", "True", "--distill_teacher", "self", model="rounded")
    run(workspace, "trained-on", "--do_train", "True", "--max_steps", "1", model="rounded")
    assert "holds values that --ptq True rounded" in caplog.text
    assert QATConfig.load(workspace / "rounded").rounded and not QATConfig.load(workspace / "trained-on").rounded


def test_a_packed_model_is_proven_no_longer_when_its_source_is_replaced(workspace, tmp_path, monkeypatch):
    """A run that is killed before it has packed leaves the packed model of the run before."""
    ptq = ("--ptq", "True", "--do_eval", "True", "--quant_scheme", "MXFP4", "--export_format", "compressed-tensors")
    run(workspace, str(tmp_path), *ptq)
    verdict = tmp_path / "MXFP4" / "verification.json"
    assert json.loads(verdict.read_text())["verified"]

    def killed(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("training.resume.output.export_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        run(workspace, str(tmp_path), *ptq, "--smooth_alpha", "0.5")
    assert not json.loads(verdict.read_text())["verified"]


@pytest.mark.parametrize("left", ["checkpoints", "a model"])
def test_post_training_quantization_does_not_replace_a_trained_model(workspace, bf16_stage, tmp_path, left):
    if left == "a model":
        folder = workspace / "bf16"
    else:
        folder = tmp_path
        (folder / "checkpoint-3").mkdir()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(UserError, match=f"--ptq True: --output_dir '{folder}' has a model that was trained"):
        run(workspace, str(folder), "--ptq", "True", "--quant_scheme", "MXFP4")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize(
    "flags", [("--ptq", "True"), ("--do_train", "True", "--max_steps", "1", "--save_strategy", "no")]
)
def test_figures_of_the_model_that_was_there_are_not_those_of_the_one_that_replaces_it(
    workspace, tmp_path, caplog, flags
):
    """A packed model's card publishes what all_results.json has. A packed folder stays, and is named."""
    for name in ("all_results.json", "eval_results.json"):
        (tmp_path / name).write_text('{"eval_loss": 1.25, "other": 1}')
    (tmp_path / "report.md").write_text("the model before")
    for name in ("MXFP4", "MXFP8"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"quantization_config": {"quant_method": "compressed-tensors"}}')
    words = (*flags, "--do_eval", "True", "--quant_scheme", "MXFP8", "--export_format", "compressed-tensors")
    found = run(workspace, str(tmp_path), *words)
    stays = [record.getMessage() for record in caplog.records if "was packed before this run" in record.getMessage()]
    assert stays == [f"{tmp_path / 'MXFP4'} was packed before this run, from another model than this run's; it stays"]
    assert not (tmp_path / "report.md").exists()
    assert "other" not in found and found["eval_loss"] > 2
    assert json.loads((tmp_path / "eval_results.json").read_text())["eval_loss"] == found["eval_loss"]
    card = (tmp_path / "MXFP8" / "README.md").read_text()
    assert f"{found['eval_loss']:.4f}" in card and "1.2500" not in card


def test_post_training_quantization_by_gptq_in_int4_keeps_unrounded_weights_and_says_so(workspace, tmp_path):
    words = ("--ptq", "True", "--do_eval", "True", "--quant_scheme", "INT4_G32", "--weight_init", "gptq")
    run(workspace, str(tmp_path), *words)
    assert QATConfig.load(tmp_path).rounded is False


def test_post_training_quantization_over_a_damaged_state_is_refused_in_one_line(workspace, tmp_path):
    (tmp_path / "trainer_state.json").write_text("[]")
    with pytest.raises(UserError, match="trainer_state.json"):
        run(workspace, str(tmp_path), "--ptq", "True", "--quant_scheme", "MXFP4")


def test_post_training_quantization_takes_one_process(workspace, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 2))
    with pytest.raises(SystemExit, match="2"):
        run(workspace, str(tmp_path), "--ptq", "True", "--quant_scheme", "MXFP4")
    assert "--ptq True with 2 processes" in capsys.readouterr().err


def test_a_tokenizer_that_was_put_beside_a_model_saved_without_one_stays(workspace, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(workspace / "model")
    (tmp_path / "tokenizer.json").write_text("of the program")
    QATTrainer(model=model, args=TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)).save_model()
    assert (tmp_path / "config.json").exists()
    assert (tmp_path / "tokenizer.json").read_text() == "of the program"
