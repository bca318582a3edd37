"""Logits of one model in a process of its own: `python -m qat.checkpoints.verify_logits packed|fake-quantized ...`.

`verify.py` starts it twice, once for the packed folder as transformers loads it and once for the fake-quantized model,
and compares what they write. Nothing of the exporting process can leak into either.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..layers.quant_linear import is_quantlinear
from ..layers.restore import prepare_as_saved, set_scale_rules
from ..processes import start_worker
from ..schemes.config import QATConfig

_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def packed_logits(folder: Path, input_ids: torch.Tensor) -> torch.Tensor:
    """What transformers computes with a packed checkpoint, on the CPU, in a fresh process.

    Args:
        folder: the packed checkpoint.
        input_ids: int64 [batch, time].

    Returns:
        BF16 [batch, time, vocabulary].
    """
    return _in_fresh_process(["packed", "--folder", str(folder)], input_ids)["logits"]


def fake_quantized_logits(
    source: Path, qat_config_folder: Path, input_ids: torch.Tensor, engine_rules: dict[str, str | None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the fake-quantized model computes, on the CPU, in a fresh process.

    Args:
        source: the BF16 checkpoint.
        qat_config_folder: where the `qat_config.json` in force lies.
        input_ids: int64 [batch, time].
        engine_rules: by scheme, the rule under which the engine quantizes activations.

    Returns:
        BF16 [batch, time, vocabulary], with activations under the engine's rule and under that of the training.
    """
    rules = [f"{scheme}={rule}" for scheme, rule in engine_rules.items() if rule is not None]
    command = ["fake-quantized", "--folder", str(source), "--qat_config", str(qat_config_folder), "--rules", *rules]
    result = _in_fresh_process(command, input_ids)
    return result["logits"], result["logits_as_trained"]


def _in_fresh_process(arguments: list[str], input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder, "inputs.safetensors"), Path(folder, "outputs.safetensors")
        save_file({"input_ids": input_ids}, inputs)
        environment = {k: v for k, v in os.environ.items() if k not in _LAUNCHER_VARIABLES}
        root = str(Path(__file__).resolve().parents[2])
        environment |= {"PYTHONPATH": os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))}
        command = [
            sys.executable,
            "-m",
            "qat.checkpoints.verify_logits",
            *arguments,
            "--inputs",
            str(inputs),
            "--outputs",
            str(outputs),
            "--parent",
            str(os.getpid()),
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
        return {name: tensor.clone() for name, tensor in load_file(outputs).items()}


def main(argv: list[str] | None = None) -> None:
    """Load one model, compute its logits for the token ids in a file, write them to another."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("packed", "fake-quantized"))
    parser.add_argument("--folder", required=True)
    parser.add_argument("--qat_config")
    parser.add_argument("--rules", nargs="*", default=())
    parser.add_argument("--inputs", required=True)
    parser.add_argument("--outputs", required=True)
    parser.add_argument("--parent", type=int, help="the process whose end ends this one")
    args = parser.parse_args(argv)
    if args.parent is not None:
        start_worker(args.parent)
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.bfloat16, local_files_only=True).eval()
    input_ids = load_file(args.inputs)["input_ids"]
    if args.what == "fake-quantized":
        config = QATConfig.load(args.qat_config)
        assert config is not None, args.qat_config
        prepare_as_saved(model, config)
        result = {"logits_as_trained": _logits(model, input_ids)}
        set_scale_rules(model, {scheme: {"input": rule} for scheme, rule in (r.split("=") for r in args.rules)})
    else:
        assert not any(is_quantlinear(module) for module in model.modules())
        result = {}
    save_file(result | {"logits": _logits(model, input_ids)}, args.outputs)


@torch.no_grad()
def _logits(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids, use_cache=False).logits.contiguous()


if __name__ == "__main__":
    main()
