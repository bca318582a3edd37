"""main.py through `accelerate launch`, in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from helpers import save_llama, write_conversations

ROOT = Path(__file__).parent.parent


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
    assert json.loads((tmp_path / "out" / "all_results.json").read_text())["eval_perplexity"] > 1
