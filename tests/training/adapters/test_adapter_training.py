"""Adapters trained through QATTrainer's own interface: recomputed, compiled, resumed, with a free teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import make_llama, make_tokenizer
from peft import LoraConfig
from safetensors.torch import load_file
from trainers import make_data, make_trainer
from transformers import PreTrainedModel

from qat import prepare_qat
from qat.errors import UserError
from qat.files.manifest import listed
from training.adapters.inject import add_adapters
from training.adapters.merging import factors_of
from training.arguments.training import TrainingArguments
from training.trainer import QATTrainer

EACH_STEP = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict:
    return make_data(tmp_path_factory.mktemp("data"))


def adapted(layers: int = 2, targets: str = "all-linear", ignore: tuple[str, ...] = ("lm_head",)) -> PreTrainedModel:
    """A BF16 Llama in MXFP4 with adapters, as a user makes it."""
    model = make_llama(layers=layers)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    prepare_qat(model, {torch.nn.Linear: "MXFP4"}, ignore)
    return add_adapters(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))


def trained(
    folder: Path, data: dict, teacher="self", model: PreTrainedModel | None = None, **options
) -> dict[str, torch.Tensor]:
    """The adapters after a few steps."""
    options = {"learning_rate": 1e-2, "max_steps": 3, "distill_ce_weight": 0.5 if teacher else 0.0, **options}
    trainer = make_trainer(folder, model or adapted(), data, teacher, **options)
    trainer.train()
    return factors_of(trainer.accelerator.unwrap_model(trainer.model))


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and any(factor.any() for name, factor in found.items() if "_B" in name)
    assert all(torch.equal(factor, expected[name]) for name, factor in found.items())


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory) -> dict[str, torch.Tensor]:
    return trained(tmp_path_factory.mktemp("plain"), data)


@pytest.mark.parametrize("arguments", [{}, {"use_reentrant": True}, {"use_reentrant": False, "every_n_layers": 2}])
def test_recomputed_activations_give_the_same_adapters(arguments, data, plain, tmp_path):
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": arguments or None}
    assert_same(trained(tmp_path, data, **options), plain)


def test_the_free_teacher_is_a_copy_of_the_model_before_adapters(data, plain, tmp_path):
    copy = make_llama()
    for parameter in copy.parameters():
        parameter.data = parameter.data.bfloat16()
    assert_same(trained(tmp_path, data, copy), plain)


def test_a_run_resumes_bit_for_bit_from_a_checkpoint_of_adapters(data, tmp_path):
    whole = trained(tmp_path / "whole", data, **EACH_STEP)
    checkpoint = tmp_path / "whole" / "out" / "checkpoint-2"
    assert not list(checkpoint.glob("model*")) and "adapter_model.safetensors" in listed(checkpoint)
    trainer = make_trainer(tmp_path, adapted(), data, "self", distill_ce_weight=0.5, **EACH_STEP)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert_same(factors_of(trainer.model), whole)


@pytest.mark.parametrize("has_adapters", [True, False])
def test_checkpoints_of_weights_and_of_adapters_are_told_apart(has_adapters, data, tmp_path):
    def train(model: PreTrainedModel, **options) -> None:
        trainer = make_trainer(tmp_path, model, data, None, save_strategy="steps", save_steps=1, max_steps=1)
        trainer.train(**options)

    models = [prepare_qat(make_llama(), {torch.nn.Linear: "MXFP4"}), adapted()]
    train(models[has_adapters])
    kinds = ("with", "none") if has_adapters else ("without", "some")
    with pytest.raises(UserError, match=f"written by a run {kinds[0]} adapters, and this run has {kinds[1]}"):
        train(models[not has_adapters], resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))


def test_the_best_adapters_are_saved_in_the_end(data, tmp_path):
    """A larger loss counts as better here, so that the last steps, which learn, are not the best ones."""
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    options = EACH_STEP | evaluated | {"metric_for_best_model": "loss", "greater_is_better": True}
    trainer = make_trainer(tmp_path, adapted(), data, None, **options)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-4"
    trainer.save_model()
    saved = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    expected = load_file(best / "adapter_model.safetensors")
    assert saved.keys() == expected.keys() and all(torch.equal(saved[name], expected[name]) for name in saved)


def test_a_full_run_into_the_same_folder_leaves_no_adapter_behind(data, tmp_path):
    for model in (adapted(), make_llama()):
        make_trainer(tmp_path, model, data, None).save_model()
        assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists() == hasattr(model, "lora_config")


def test_each_training_begins_with_new_adapters(data, tmp_path):
    """`model_init`, as a search of hyperparameters calls it; their weights are looked at as they are computed with."""
    args = TrainingArguments(
        str(tmp_path / "out"), report_to="none", use_cpu=True, disable_tqdm=True, max_steps=3, logging_steps=1,
        per_device_train_batch_size=3, save_strategy="no", learning_rate=1e-2,
    )  # fmt: skip
    trainer = QATTrainer(
        model_init=lambda: adapted(), args=args, processing_class=make_tokenizer(), log_quantization=True, **data
    )
    runs = []
    for _ in range(2):
        trainer.train()
        runs.append(factors_of(trainer.model))
    assert_same(*runs)
    assert sum(entry.get("flips/mlp", 0) for entry in trainer.state.log_history) > 0


def test_a_compiled_run_trains_the_same_adapters(data, tmp_path):
    """One step of a layer in which two products are quantized and one has an adapter: tracing is what takes time."""
    folders, found = {"plain": {}, "compiled": {"torch_compile": True, "torch_compile_backend": "eager"}}, []
    for name, options in folders.items():
        model = adapted(1, r".*\.o_proj", ("lm_head", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))
        found.append(trained(tmp_path / name, data, None, model, max_steps=1, **options))
    plain, compiled = found
    assert plain.keys() == compiled.keys() and len(plain) == 2
    for name, factor in compiled.items():
        torch.testing.assert_close(factor, plain[name], rtol=0, atol=1e-4)
