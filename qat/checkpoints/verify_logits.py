"""Logits of one model in a process of its own.

`logits_proof.py` starts it twice, once for the packed folder as transformers loads it and once for the fake-quantized
model, and compares what they write. Nothing of the exporting process can leak into either.
"""

from __future__ import annotations

import argparse
import errno
import gc
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..errors import DISK_FULL, DiskFullError, UserError
from ..files.atomic import disk_full_reported, means_full
from ..layers.kv_cache import set_cache_rule
from ..layers.restore import prepare_as_saved, set_scale_rules
from ..layers.sites import EXPERTS, quantized_sites
from ..processes import name_of, start_worker
from ..schemes.config import QATConfig
from .dialects.compressed_tensors import CACHE_RULE
from .fit import load_checked
from .input_transforms import accept, apply_stored, is_matrix
from .model_config import read_config
from .native_mxfp4 import loading_options
from .pipeline import CPU

logger = logging.getLogger(__name__)

_DISK_FULL = errno.ENOSPC  # status of a process that has no space for its result
_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class VerificationError(UserError):
    """A packed checkpoint is not the model it was made of, or its engine cannot load it."""


class NotLoadableError(VerificationError):
    """transformers cannot load a packed checkpoint."""


@dataclass(frozen=True)
class Expected:
    """What the fake-quantized model computes.

    Attributes:
        logits: BF16 [batch, time, vocabulary], with activations under the engine's rule.
        as_trained: the same under the rule of the training.
        reads_matrices: whether a layer with one scale for each token read a matrix without a batch: compressed-tensors
            takes one scale for the whole of it.
    """

    logits: torch.Tensor
    as_trained: torch.Tensor
    reads_matrices: bool


def begin_packed(
    processes: ExitStack,
    folder: Path,
    input_ids: torch.Tensor,
    device: torch.device,
    trust_remote_code: bool = False,
) -> Callable[[], torch.Tensor]:
    """Begin to compute the logits of a packed checkpoint, as transformers loads it, in a fresh process.

    Args:
        processes: ends the process with its block.
        folder: the packed checkpoint.
        input_ids: int64 [batch, time].
        device: that computes.
        trust_remote_code: run Python code that comes with the checkpoint.

    Returns:
        What waits for the process and gives BF16 [batch, time, vocabulary], on the CPU; it raises NotLoadableError
        where transformers cannot load the checkpoint, another VerificationError where memory is short, and
        DiskFullError where no space is left for the logits.
    """
    arguments = ["packed", "--folder", str(folder), "--device", str(device), *_trusted(trust_remote_code)]
    finish = _begin(processes, arguments, input_ids)
    return lambda: finish()["logits"]


def begin_fake_quantized(
    processes: ExitStack,
    source: Path,
    qat_config_folder: Path,
    input_ids: torch.Tensor,
    engine_rules: dict[str, str | None],
    device: torch.device,
    trust_remote_code: bool = False,
    experts_as_linear: bool = False,
) -> Callable[[], Expected]:
    """Begin to compute the logits of the fake-quantized model in a fresh process; see `begin_packed`.

    Args:
        source: the BF16 checkpoint.
        qat_config_folder: where the `qat_config.json` in force lies.
        engine_rules: by scheme, the rule under which the engine quantizes activations; None: it does not.
        experts_as_linear: whether these rules hold for experts as well; else the engine leaves their inputs alone.

    Returns:
        What waits for the process and gives its logits, on the CPU; it raises a VerificationError where they cannot be
        computed.
    """
    rules = [f"{scheme}={rule or ''}" for scheme, rule in engine_rules.items()]
    arguments = ["fake-quantized", "--folder", str(source), "--qat_config", str(qat_config_folder), "--rules", *rules]
    arguments += ["--experts_as_linear"] if experts_as_linear else []
    finish = _begin(processes, [*arguments, "--device", str(device), *_trusted(trust_remote_code)], input_ids)

    def expected() -> Expected:
        result = finish()
        return Expected(result["logits"], result["logits_as_trained"], bool(result["reads_matrices"]))

    return expected


class _Process:
    """This module as a program; it ends with the block of `processes`, and its files go."""

    def __init__(self, processes: ExitStack) -> None:
        self.folder = Path(processes.enter_context(tempfile.TemporaryDirectory()))
        self.errors = self.folder / "errors.txt"
        self._processes = processes

    def begin(self, arguments: list[str]) -> None:
        """Start it with the arguments of `main`."""
        environment = {k: v for k, v in os.environ.items() if k not in _LAUNCHER_VARIABLES}
        root = str(Path(__file__).resolve().parents[2])
        environment |= {"PYTHONPATH": os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))}
        command = [sys.executable, "-m", "qat.checkpoints.verify_logits", str(os.getpid()), *arguments]
        with self.errors.open("w") as file:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=file
            )
        self._processes.callback(self._end)

    def status(self) -> int:
        """The status that it ends with."""
        return self.process.wait()

    def _end(self) -> None:
        """End it, if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def _begin(
    processes: ExitStack, arguments: list[str], input_ids: torch.Tensor
) -> Callable[[], Mapping[str, torch.Tensor]]:
    """Run this module as a program in a process; returns what waits for it and gives what it wrote."""
    process = _Process(processes)
    inputs, outputs = process.folder / "inputs.safetensors", process.folder / "outputs.safetensors"
    with disk_full_reported(inputs, "TMPDIR"):
        save_file({"input_ids": input_ids}, inputs)
    process.begin([*arguments, "--inputs", str(inputs), "--outputs", str(outputs)])

    def finish() -> Mapping[str, torch.Tensor]:
        if status := process.status():
            said = process.errors.read_text(encoding="utf-8", errors="replace")
            logger.debug("%s failed:\n%s", " ".join(arguments), said)
            raise _failure(arguments, status, said)
        return {name: tensor.clone() for name, tensor in load_file(outputs).items()}

    return finish


def _trusted(trust_remote_code: bool) -> list[str]:
    return ["--trust_remote_code"] if trust_remote_code else []


def _failure(arguments: list[str], status: int, errors: str) -> Exception:
    """What is wrong where a process failed, in one line, from its status and what it wrote."""
    what, folder = arguments[0], arguments[2]
    said = [line.strip() for line in errors.splitlines() if re.match(r"[\w.]*(Error|Exception)(: |$)", line.strip())]
    reason = said[-1].removeprefix("qat.errors.UserError: ") if said else f"its process ended with status {status}"
    if status == _DISK_FULL or any(os.strerror(number) in reason for number in DISK_FULL):
        return DiskFullError(
            f"{folder} is not proven: the disk is full where the proof writes logits, most likely that of the "
            f"temporary folder {tempfile.gettempdir()!r} ({reason}); free some space or set TMPDIR, and verify again"
        )
    if status < 0:
        return VerificationError(
            f"{folder} is not proven: {name_of(-status)} ended the process that computes the logits of the {what} "
            "model, as the system does where memory is short; verify it again with more"
        )
    if "out of memory" in reason or "MemoryError" in reason or "can't allocate memory" in reason:
        return VerificationError(
            f"{folder} is not proven: there is too little memory for the logits of the {what} model ({reason})"
        )
    if what == "packed":
        return NotLoadableError(f"{folder} is not proven: transformers cannot load it: {reason}")
    return VerificationError(
        f"{folder}: the logits of the fake-quantized model cannot be computed, so nothing is proven: {reason}"
    )


def main(argv: list[str] | None = None) -> None:
    """Load one model, compute its logits for the token ids in a file, write them to another."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("packed", "fake-quantized"))
    parser.add_argument("--folder", required=True)
    parser.add_argument("--qat_config")
    parser.add_argument("--rules", nargs="*", default=())
    parser.add_argument("--experts_as_linear", action="store_true")
    parser.add_argument("--trust_remote_code", action="store_true")
    parser.add_argument("--device", type=torch.device, default=CPU)
    parser.add_argument("--inputs", required=True)
    parser.add_argument("--outputs", required=True)
    args = parser.parse_args(argv)
    model = load_for_logits(args.folder, args.trust_remote_code, args.device).eval()
    input_ids = load_file(args.inputs)["input_ids"].to(args.device)
    if args.what == "fake-quantized":
        config = QATConfig.load(args.qat_config)
        assert config is not None, args.qat_config
        prepare_as_saved(model, config)
        model.config._is_quantized = True  # Jamba and Falcon-Mamba compute dt_proj in another order then
        with _matrices_noticed(model, args.experts_as_linear) as noticed:
            result = {"logits_as_trained": _logits(model, input_ids)}
        result["reads_matrices"] = torch.tensor(bool(noticed))
        compute_as_engine(model, dict(rule.split("=") for rule in args.rules), args.experts_as_linear)
    else:
        assert not quantized_sites(model)
        result = {}
    set_cache_rule(model, CACHE_RULE)
    save_file(result | {"logits": _logits(model, input_ids)}, args.outputs)


def load_for_logits(folder: str, trust_remote_code: bool, device: torch.device = CPU) -> PreTrainedModel:
    """The model in `folder`, plain or packed, as transformers loads it in BF16; an error where weights do not fit.

    Transforms of inputs, which transformers passes over, are applied by compressed-tensors' code.
    """
    config = read_config(folder, folder, trust_remote_code, local_files_only=True)
    accept(config)
    # Straight to a GPU; transformers asks for accelerate to do that.
    place = {"device_map": {"": device}} if device != CPU and find_spec("accelerate") else {}

    def load() -> tuple[PreTrainedModel, dict]:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=torch.bfloat16, local_files_only=True, use_safetensors=True,
            output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=trust_remote_code,
            **loading_options(config), **place,
        )  # fmt: skip
        model, report = loaded
        unexpected = [name for name in report["unexpected_keys"] if not is_matrix(name)]
        return model, {**report, "unexpected_keys": unexpected}

    model = load_checked(load, folder)
    apply_stored(model, folder)
    return model if device == CPU else model.to(device)  # type: ignore[arg-type]


def compute_as_engine(model: PreTrainedModel, rules: Mapping[str, str], experts_as_linear: bool = False) -> None:
    """Let layers of each scheme quantize their inputs under the rule of that scheme; "" for not at all.

    Args:
        experts_as_linear: the same for experts; else their inputs are not quantized.
    """
    set_scale_rules(model, {scheme: {"input": rule} for scheme, rule in rules.items() if rule})
    for site in quantized_sites(model):
        if not rules[site.scheme.name] or (site.kind == EXPERTS.name and not experts_as_linear):
            site.module.input_quantizer.disable()


@contextmanager
def _matrices_noticed(model: PreTrainedModel, experts_as_linear: bool) -> Iterator[list[str]]:
    """The labels of sites inside that quantize inputs of two dimensions under one scale for each row."""
    noticed: list[str] = []

    def hook(label: str) -> Callable:
        return lambda module, inputs: noticed.append(label) if inputs[0].ndim == 2 else None

    sites = [site for site in quantized_sites(model) if experts_as_linear or site.kind != EXPERTS.name]
    by_row = [s for s in sites if s.scheme.input is not None and s.scheme.input.format.block is None]
    handles = [site.module.register_forward_pre_hook(hook(site.label)) for site in by_row]
    try:
        yield noticed
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _logits(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids, use_cache=False).logits.contiguous().cpu()


def _run(argv: list[str]) -> int:
    """`main`, and the status that the process ends with."""
    try:
        main(argv)
    except (OSError, SafetensorError) as error:
        if not means_full(error):
            raise
        with suppress(OSError):  # what is said has no space either
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return _DISK_FULL
    return 0


if __name__ == "__main__":
    gc.freeze()  # what was imported stays to the end: the program's exit does not look at a million objects again
    start_worker(parent=int(sys.argv[1]))
    sys.exit(_run(sys.argv[2:]))
