"""main.py --base_in_scheme True: what is trained on a packed base is what is saved, packed, resumed and proven."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import make_llama, make_mixture, make_tokenizer, save_llama, write_conversations
from safetensors.torch import load_file
from tiny_families import logits_in_this_process

import main
from qat import get_scheme, prepare_qat
from qat.files.model_folder import ADAPTER_WEIGHTS_NAME
from qat.layers.names import original_name
from qat.layers.packed_base import pack_base
from qat.numerics import ops
from training.losses.chunked import find_head
from training.teachers.itself import SelfTeacher

SPEC = get_scheme("MXFP4").weight


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed_base")
    save_llama(folder / "model")
    write_conversations(folder / "data.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        logits_in_this_process(patch, folder)
        train(folder, "whole", "--export_format", "compressed-tensors")
    return folder


def train(workspace: Path, output: str, *flags: str, model: str = "model") -> dict[str, torch.Tensor]:
    """A run of 4 steps on attention alone, and the weights that it saved."""
    main.main(
        [
            "--model_name_or_path", str(workspace / model), "--dataset", str(workspace / "data.jsonl"),
            "--eval_size", "6", "--per_device_train_batch_size", "2", "--learning_rate", "1e-1", "--disable_tqdm",
            "True", "--report_to", "none", "--report", "False", "--export_format", "none",
            "--output_dir", str(workspace / output),
            "--do_train", "True", "--max_steps", "4", "--save_steps", "2", "--logging_steps", "1", "--lora_r", "2",
            "--lora_target", "q_proj", "o_proj", "--base_in_scheme", "True", "--quant_scheme", "MXFP4",
            "--lr_scheduler_type", "constant", *flags,
        ]
    )  # fmt: skip
    return load_file(workspace / output / "model.safetensors")


def test_experts_that_are_packed_have_the_adapters_that_are_asked_for(workspace):
    make_mixture("qwen3_moe", layers=1).to(torch.bfloat16).save_pretrained(workspace / "mixture")
    make_tokenizer().save_pretrained(workspace / "mixture")
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    train(workspace, "experts", "--lora_target_parameters", *parameters, "--max_steps", "1", model="mixture")
    factors = load_file(workspace / "experts" / "adapter" / ADAPTER_WEIGHTS_NAME)
    trained = [factor for name, factor in factors.items() if ".experts." in name and ".lora_B." in name]
    assert len(trained) == 2 and all(factor.any() for factor in trained)


def test_saved_weights_are_those_of_the_rounded_base_merged_under_the_names_and_dtypes_of_the_model(workspace):
    before, after = (load_file(workspace / name / "model.safetensors") for name in ("model", "whole"))
    factors = load_file(workspace / "whole" / "adapter" / ADAPTER_WEIGHTS_NAME)
    assert after.keys() == before.keys() and {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    moved = 0
    for name, weight in before.items():
        if "proj" not in name:
            assert torch.equal(after[name], weight)
            continue
        expected = ops.fake_quantize(weight, SPEC.format.name, SPEC.rule, torch.bfloat16)
        a, b = (factors.get(f"base_model.model.{name.removesuffix('weight')}lora_{f}.weight") for f in "AB")
        if a is not None:
            unmerged, expected = expected, ops.merge(expected, a, b, 16.0)
            moved += not torch.equal(unmerged, expected)
        assert torch.equal(after[original_name(name)], expected)
    assert moved == 4


def test_the_adapter_names_a_base_that_exists_and_holds_the_packed_values(workspace):
    named = json.loads((workspace / "whole" / "adapter" / "adapter_config.json").read_text())
    assert Path(named["base_model_name_or_path"]) == workspace / "whole" / "base"
    before, base = (load_file(workspace / name / "model.safetensors") for name in ("model", "whole/base"))
    assert base.keys() == before.keys()
    for name, weight in before.items():
        expected = weight
        if "proj" in name:
            expected = ops.fake_quantize(weight, SPEC.format.name, SPEC.rule, torch.bfloat16)
        assert torch.equal(base[name], expected)


def test_the_packed_model_is_proven(workspace):
    proof = json.loads((workspace / "whole" / "MXFP4" / "verification.json").read_text())
    assert proof["verified"] and proof["weights"]["elements_compared"] == 61440 and proof["logits"]["bit_equal"]


def test_checkpoints_hold_adapters_alone_and_a_resumed_run_ends_with_the_same_bits(workspace):
    (checkpoint,) = (workspace / "whole").glob("checkpoint-2")
    assert not [path.name for path in checkpoint.glob("model*")]
    (workspace / "resumed").mkdir()
    shutil.copytree(checkpoint, workspace / "resumed" / "checkpoint-2")
    resumed = train(workspace, "resumed")
    whole = load_file(workspace / "whole" / "model.safetensors")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_run_is_not_resumed_on_the_other_base(workspace, capsys):
    with pytest.raises(ValueError, match="base_in_scheme True, and this run has False"):
        train(workspace, "whole", "--base_in_scheme", "False", "--max_steps", "6")


def test_a_teacher_is_the_model_before_it_was_rounded(workspace):
    """Adapters that add nothing leave PTQ, whose divergence from that model does not depend on how the base is kept."""
    flags = ("--distill", "True", "--distill_teacher", "copy", "--do_eval", "True", "--learning_rate", "1e-12")
    found = []
    for kept in ("True", "False"):
        train(workspace, f"taught-{kept}", *flags, "--base_in_scheme", kept)
        found.append(json.loads((workspace / f"taught-{kept}" / "all_results.json").read_text())["eval_kl"])
    assert found[0] > 1e-4 and found[0] == pytest.approx(found[1], rel=1e-6)


def test_a_packed_model_is_not_its_own_teacher():
    model = pack_base(prepare_qat(make_llama().bfloat16(), {"torch.nn.Linear": "MXFP4"}))
    with pytest.raises(ValueError, match="rounded base"):
        SelfTeacher(model, find_head(model))


def test_a_packed_model_gets_the_same_base_back(workspace):
    """Adapters that add nothing yet, on a model that this project has packed."""
    train(workspace, "again", "--learning_rate", "1e-12", model="whole/MXFP4")
    source = load_file(workspace / "whole" / "model.safetensors")
    for name, weight in load_file(workspace / "again" / "model.safetensors").items():
        if "proj" in name:
            own, packed = (
                ops.fake_quantize(tensor, SPEC.format.name, SPEC.rule, torch.bfloat16)
                for tensor in (weight, source[name])
            )
            assert torch.equal(own, packed) and ("q_proj" in name or "o_proj" in name or torch.equal(weight, packed))
