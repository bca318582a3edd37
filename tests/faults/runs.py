"""The runs that faults are injected into: a tiny model, trained for some steps, and what must come out."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from helpers import make_llama, make_tokenizer, write_conversations
from processes import Run, start
from safetensors.torch import load_file

STEPS = 8


def make_workspace(folder: Path) -> Path:
    """A model with dropout, so that random numbers matter, and data of unequal lengths."""
    model = make_llama()
    model.config.attention_dropout = 0.1
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    write_conversations(folder / "data.jsonl", 44)
    return folder


@dataclass
class Job:
    """One command line, and where its output goes.

    Args:
        workspace: of `make_workspace`.
        name: of the output folder.
        flags: further arguments of main.py; the last of each wins.
        count: processes.
    """

    workspace: Path
    name: str
    flags: tuple[str, ...] = ()
    count: int = 1
    root: Path | None = None
    attempts: int = field(default=0, init=False)

    @property
    def output(self) -> Path:
        """The output folder."""
        return (self.root or self.workspace) / self.name

    def start(self, fault=None, *flags: str) -> Run:
        """Run main.py once."""
        self.attempts += 1
        argv = [
            "--model_name_or_path", str(self.workspace / "model"), "--dataset", str(self.workspace / "data.jsonl"),
            "--data_cache_dir", str(self.workspace / "cache"), "--eval_size", "6", "--learning_rate", "1e-2",
            "--per_device_train_batch_size", str(4 // self.count), "--gradient_accumulation_steps", "2",
            "--do_train", "True", "--do_eval", "True", "--max_steps", str(STEPS), "--save_steps", "2",
            "--save_total_limit", "2", "--logging_steps", "3", "--report_to", "none", "--report", "False",
            "--disable_tqdm", "True", "--export_format", "none", "--ddp_timeout", "60",
            "--output_dir", str(self.output), *self.flags, *flags,
        ]  # fmt: skip
        if "cache" in self.flags and "--distill_cache_dir" not in self.flags:
            argv += ["--distill_cache_dir", str(self.workspace / "teachers")]
        log = self.workspace / f"{self.name}.{self.attempts}.log"
        return start(argv, log=log, before=fault, count=self.count)

    def finish(self, *flags: str) -> str:
        """Run main.py to its end; returns what it wrote."""
        run = self.start(None, *flags)
        statuses = run.wait()
        assert statuses == [0] * self.count, f"exit statuses {statuses}:\n{run.text()}"
        return run.text()

    @property
    def checkpoints(self) -> list[Path]:
        """Folders named checkpoint-N, by N."""
        return sorted(self.output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def difference(one: Path, other: Path) -> str | None:
    """What differs between the results of two runs: weights bit for bit, losses, learning rates; None if nothing."""
    weights = [load_file(folder / "model.safetensors") for folder in (one, other)]
    if weights[0].keys() != weights[1].keys():
        return "the names of the weights"
    for name, tensor in weights[0].items():
        if not torch.equal(tensor, weights[1][name]):
            return f"{name} by {(tensor.float() - weights[1][name].float()).abs().max():.1e}"
    logs = [_log(folder) for folder in (one, other)]
    if logs[0] != logs[1]:
        return f"the log: {logs}"
    for packed in one.glob("MX*/model.safetensors"):
        folder = other / packed.parent.name
        if not json.loads((folder / "verification.json").read_text())["verified"]:
            return f"the proof of {folder}"
        if packed.read_bytes() != (folder / packed.name).read_bytes():
            return f"the packed weights of {folder}"
    leftovers = [p.name for p in other.iterdir() if p.name.startswith(".")]
    return f"leftovers: {leftovers}" if leftovers else None


def _log(folder: Path) -> list:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    keys = ("step", "loss", "grad_norm", "learning_rate", "eval_loss")
    return [{k: entry[k] for k in keys if k in entry} for entry in history if "loss" in entry or "eval_loss" in entry]
