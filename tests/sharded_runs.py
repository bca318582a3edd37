"""Runs of main.py in real processes that share one gloo group, and what came out of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from faults.injected import AtStep
from helpers import ROOT
from processes import free_port, start
from safetensors.torch import load_file


class Workspace:
    """A folder with models and data, into which runs are launched."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def launch(self, config: str, runs: dict[str, dict], *flags: str) -> None:
        """Run main.py once for each entry of `runs`, by `accelerate launch` with accelerate_config/CONFIG.yaml.

        Args:
            runs: arguments by the name of the output folder.
            flags: of `accelerate launch`.
        """
        command = [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"accelerate_config/{config}.yaml",
            "--num_processes", "2", "--main_process_port", str(free_port()), *flags,
            "tests/fsdp_on_cpu.py", *(str(self.write(name, arguments)) for name, arguments in runs.items()),
        ]  # fmt: skip
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-6000:]

    def run(
        self, config: str, runs: dict[str, dict], *flags: str, processes: int = 2, killed_at: int | None = None
    ) -> None:
        """The same in forked processes, which need not import anything, under the variables that the launcher sets.

        Args:
            killed_at: the batch of all runs together in which every process is killed, counted from 1.
        """
        files = [[str(self.write(name, arguments))] for name, arguments in runs.items()]
        log = self.folder / f"{next(iter(runs))}.log"
        command = ["--config_file", f"accelerate_config/{config}.yaml", "--num_processes", str(processes), *flags]
        settings = launcher_variables([*command, "main.py"])
        if processes == 1 and "ACCELERATE_USE_FSDP" in settings:  # torchrun makes a group of one process, too
            settings |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "ACCELERATE_USE_CPU": "true"}
            settings |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        run = start(*files, log=log, before=Before(killed_at), count=processes, settings=settings)
        statuses = run.wait()
        expected = 0 if killed_at is None else -signal.SIGKILL
        assert statuses == [expected] * processes, run.text()[-6000:]

    def losses(self, name: str) -> list[float]:
        return self.logged(name, "loss")

    def logged(self, name: str, figure: str) -> list[float]:
        """The values of a figure in the log of a run."""
        history = json.loads((self.folder / name / "trainer_state.json").read_text())["log_history"]
        return [entry[figure] for entry in history if figure in entry]

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / name / "model.safetensors")

    def write(self, name: str, arguments: dict) -> Path:
        """The file of arguments of a short run on the workspace's model and data, into a folder of its name."""
        defaults = {
            "model_name_or_path": str(self.folder / "model"), "dataset": str(self.folder / "data.jsonl"),
            "eval_size": 6, "output_dir": str(self.folder / name), "do_train": True, "max_steps": 10,
            "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no",
            "disable_tqdm": True, "report_to": "none", "report": False, "export_format": "none", "ddp_timeout": 60,
            "data_cache_dir": str(self.folder / "cache"),
        }  # fmt: skip
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(defaults | arguments))
        return path


def launcher_variables(command: list[str]) -> dict[str, str]:
    """The environment variables that `accelerate launch` sets for the arguments `command`."""
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    if args.multi_gpu or args.use_fsdp:
        variables = prepare_multi_gpu_env(args)
    else:
        _, variables = prepare_simple_launcher_cmd_env(args)
    return {name: value for name, value in variables.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


@dataclass(frozen=True)
class Before:
    """Called in each process."""

    killed_at: int | None = None

    def __call__(self, rank: int) -> None:
        import fsdp_on_cpu

        fsdp_on_cpu.enable()
        if self.killed_at is not None:
            AtStep(self.killed_at, rank=rank)(rank)
