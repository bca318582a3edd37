"""Learned scales from training to the packed file: what is saved, packed and evaluated is what was trained."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import make_llama, save_llama, write_conversations
from safetensors.torch import load_file
from torch import nn

import main
from qat import QATConfig, prepare_qat
from qat.checkpoints.pack import export_checkpoint
from qat.checkpoints.verify import verify
from qat.layers.finish import finished_config, finished_weights
from qat.layers.learned_scales import SUFFIX
from qat.layers.restore import check_trainable, prepare_as_saved


def trained(scheme: str) -> nn.Module:
    """A prepared model as a run leaves it: FP32 masters, and scales that have moved."""
    model = prepare_qat(make_llama(), {nn.Linear: scheme}, learn_scale=True)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(SUFFIX):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


@pytest.mark.parametrize("scheme", ["INT4_G32", "NVFP4A16"])
@torch.no_grad()
def test_a_finished_model_computes_what_the_trained_one_did(scheme):
    model, ids = trained(scheme), torch.arange(24)[None]
    state = model.state_dict()
    dtypes = {name: torch.bfloat16 for name in state if not name.endswith(SUFFIX)}
    with torch.autocast("cpu", torch.bfloat16):
        for name, parameter in model.named_parameters():
            parameter.copy_(parameter.to(dtypes.get(name, torch.float32)))
        expected = model(ids).logits
    weights, config = finished_weights(model, model.state_dict(), dtypes), finished_config(model.qat_config)
    assert config.training == {"learn_scale": True} and not any(name.endswith(SUFFIX) for name in weights)
    plain = make_llama().eval()
    plain.load_state_dict({name: tensor.to(dtypes[name]) for name, tensor in weights.items()})
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain(ids).logits, expected)  # weight-only: the plain model is the trained one
    again = prepare_as_saved(plain, config)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(again(ids).logits, expected)
    with pytest.raises(ValueError, match="cannot be trained further"):
        check_trainable(again)


def run(folder, output: str, *flags: str, model: str = "model") -> dict:
    main.main(
        [
            "--model_name_or_path", str(folder / model), "--dataset", str(folder / "data.jsonl"), "--eval_size", "6",
            "--per_device_train_batch_size", "4", "--output_dir", str(folder / output), "--disable_tqdm", "True",
            "--report_to", "none", "--report", "False", "--logging_steps", "1", "--export_format", "none", *flags,
        ]
    )  # fmt: skip
    results = sorted((folder / output).rglob("all_results.json"), key=lambda p: p.stat().st_mtime)
    return json.loads(results[-1].read_text())


@pytest.mark.parametrize("scheme", ["INT4_G32", "NVFP4A16"])
def test_a_run_with_learned_scales_resumes_exports_and_is_verified(tmp_path, scheme):
    save_llama(tmp_path / "model")
    write_conversations(tmp_path / "data.jsonl")
    flags = (
        "--do_train", "True", "--do_eval", "True", "--max_steps", "4", "--save_steps", "2", "--learning_rate", "1e-2",
        "--quant_scheme", scheme, "--learn_scale", "True", "--scale_learning_rate", "0.05", "--weight_decay", "0.1",
    )  # fmt: skip
    whole = run(tmp_path, "whole", *flags)
    offsets = load_file(tmp_path / "whole/checkpoint-4/model.safetensors")
    moved = [t.abs().max().item() for name, t in offsets.items() if name.endswith(SUFFIX)]
    assert len(moved) == 14 and min(moved) > 0.05
    # Saved: plain names; packed and proven, with no element that differs; evaluated as trained.
    assert set(load_file(tmp_path / "whole/model.safetensors")) == set(load_file(tmp_path / "model/model.safetensors"))
    export_checkpoint(tmp_path / "whole", tmp_path / "whole/packed")
    verdict = verify(tmp_path / "whole/packed", tmp_path / "whole", with_logits=False)
    assert verdict["verified"] and verdict["weights"]["elements_that_differ"] == 0
    assert QATConfig.load(tmp_path / "whole").training == {"learn_scale": True}
    for folder in ("whole", "whole/packed"):
        again = run(tmp_path, "again", "--do_eval", "True", model=folder)
        assert again["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-6)

    # Resumed from the middle, the run ends where the uninterrupted one did.
    (tmp_path / "whole/checkpoint-2").rename(tmp_path / "checkpoint-2")
    run(tmp_path, "resumed", *flags, "--resume_from_checkpoint", str(tmp_path / "checkpoint-2"))
    ends = [load_file(tmp_path / f / "model.safetensors") for f in ("whole", "resumed")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])

    # Nothing unfinished is taken for a model, and quantized values are not trained as if they were none.
    with pytest.raises(ValueError, match="checkpoint-2 is a checkpoint to resume from"):
        export_checkpoint(tmp_path / "checkpoint-2", tmp_path / "other")
    for more in ((), ("--learn_scale", "True")):
        with pytest.raises(ValueError, match="cannot be trained further .*--quant_scheme"):
            run(tmp_path, "more", "--do_train", "True", "--max_steps", "1", *more, model="whole")
    with pytest.raises(ValueError, match="--smooth_alpha 0.5 would undo the rounding"):
        run(tmp_path, "smooth", "--do_eval", "True", "--smooth_alpha", "0.5", model="whole")
