"""scripts/export.py: the command line around export and verify."""

from __future__ import annotations

import importlib.util
import os
import signal

import pytest
from helpers import ROOT, save_llama, write_conversations
from safetensors import safe_open
from safetensors.torch import save_file

from qat import QATConfig
from qat.errors import UserError
from qat.processes import ended_by_signals
from training.arguments.quantization import QuantizationArguments
from training.start.samples import SAMPLES

SCRIPT = ROOT / "scripts" / "export.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("export_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_any_bf16_checkpoint_is_packed_verified_and_verified_again(script, tmp_path):
    source, target = str(save_llama(tmp_path / "source")), str(tmp_path / "packed")
    assert script.main([source, target, "--quant_scheme", "mxfp4", "--weights_only"]) == 0
    assert script.main(["--verify", target, "--weights_only"]) == 0  # the source is recorded


def test_the_number_of_samples_is_that_of_a_run(script):
    assert script.SAMPLES == SAMPLES == QuantizationArguments().calibration_samples


def test_a_plain_checkpoint_is_calibrated_on_a_dataset(script, tmp_path):
    source, target = str(save_llama(tmp_path / "source", layers=1)), tmp_path / "packed"
    write_conversations(tmp_path / "data.jsonl")
    flags = ["--quant_scheme", "nvfp4", "--dataset", str(tmp_path / "data.jsonl"), "--weights_only"]
    assert script.main([source, str(target), *flags, "--calibration_samples", "3"]) == 0
    with safe_open(target / "model.safetensors", "pt") as file:
        scales = {n: float(file.get_tensor(n)) for n in file.keys() if n.endswith(".input_global_scale")}  # noqa: SIM118
    assert len(scales) == 7 and scales == QATConfig.load(target).calibrated_scales


def test_a_mistake_is_an_error_of_the_user_and_a_failed_proof_is_exit_status_1(script, tmp_path, capsys):
    source, target = str(save_llama(tmp_path / "source")), tmp_path / "packed"
    with pytest.raises(UserError, match="no qat_config.json, so it has no scheme; give --quant_scheme"):
        script.main([source, str(target)])
    assert not target.exists()
    assert script.main([source, str(target), "--quant_scheme", "MXFP4", "--no_verify"]) == 0
    with safe_open(target / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["model.layers.0.mlp.up_proj.weight_packed"][0, 0] ^= 1
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    assert script.main(["--verify", str(target), "--source", source, "--weights_only"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_a_terminated_export_removes_what_it_had_written(script, tmp_path, monkeypatch):
    source = str(save_llama(tmp_path / "source"))
    monkeypatch.setattr("qat.processes._CLEAN_UP_S", 3600.0)  # after which the process would be ended
    monkeypatch.setattr("qat.checkpoints.shard_writer.ShardWriter.put", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stopped, ended_by_signals():
        script.main([source, str(tmp_path / "deep" / "packed"), "--quant_scheme", "mxfp4"])
    assert stopped.value.code == 143 and [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("argv", [[], ["only-source"], ["source", "target", "--verify", "target"]])
def test_half_a_command_is_refused(script, argv, capsys):
    with pytest.raises(SystemExit):
        script.parse(argv)
    assert "give SRC and DST to export, or --verify DIR" in capsys.readouterr().err
