"""main.py in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, make_llama, make_tokenizer, save_llama, write_conversations
from processes import start


def test_accelerate_launch_trains_on_the_cpu(tmp_path):
    save_llama(tmp_path / "model", layers=1)
    write_conversations(tmp_path / "data.jsonl")
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_config/cpu.yaml", "main.py",
        "--model_name_or_path", str(tmp_path / "model"), "--dataset", str(tmp_path / "data.jsonl"),
        "--quant_scheme", "MXFP4", "--do_train", "True", "--do_eval", "True", "--max_steps", "2",
        "--output_dir", str(tmp_path / "out"), "--report_to", "none", "--save_strategy", "no",
    ]  # fmt: skip
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "7 linear layers in MXFP4" in result.stdout
    verdict = json.loads((tmp_path / "out" / "MXFP4" / "verification.json").read_text())  # of two fresh processes
    assert verdict["verified"] and verdict["logits"]["bit_equal"] and verdict["logits"]["tokens"] > 0
    assert json.loads((tmp_path / "out" / "all_results.json").read_text())["eval_perplexity"] > 1


def test_two_processes_distil_as_one_does(tmp_path):
    save_llama(tmp_path / "model", dtype=torch.float32, layers=1)
    teacher = make_llama(layers=1)
    for parameter in teacher.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    teacher.save_pretrained(tmp_path / "teacher")
    make_tokenizer().save_pretrained(tmp_path / "teacher")
    write_conversations(tmp_path / "data.jsonl")
    logs = []
    for processes in (1, 2):
        arguments = [
            "--use_cpu", "True", "--bf16", "False", "--report_to", "none", "--report", "False",
            "--save_strategy", "no", "--eval_size", "6",
            "--model_name_or_path", str(tmp_path / "model"), "--dataset", str(tmp_path / "data.jsonl"),
            "--teacher_model_name_or_path", str(tmp_path / "teacher"), "--distill_ce_weight", "0.2",
            "--do_train", "True", "--do_eval", "True",
            "--max_steps", "2", "--logging_steps", "1", "--gradient_accumulation_steps", "2",
            "--per_device_train_batch_size", str(4 // processes), "--train_sampling_strategy", "sequential",
            "--data_cache_dir", str(tmp_path / "cache"), "--output_dir", str(tmp_path / f"out-{processes}"),
        ]  # fmt: skip
        run = start(arguments, log=tmp_path / f"{processes}.log", count=processes)
        assert run.wait() == [0] * processes, run.text()
        state = json.loads((tmp_path / f"out-{processes}" / "trainer_state.json").read_text())
        names = ("loss", "grad_norm", "kl", "ce", "perplexity", "labelled_tokens", "eval_loss", "eval_kl")
        logs.append([entry[name] for entry in state["log_history"] for name in names if name in entry])
    assert len(logs[0]) == 14 and logs[1] == pytest.approx(logs[0], rel=1e-4)
