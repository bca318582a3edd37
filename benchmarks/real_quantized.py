"""The models of the table of real models, as they are served, in BF16: trained, prepared alone, and by AutoRound."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from benchmarks.accuracy import prepare
from benchmarks.accuracy_rows import Row
from benchmarks.launch import kill_with_children
from benchmarks.real_rows import RealRow
from benchmarks.real_training import OutOfTime, forwarded
from data.supervised import make_supervised_data_module
from qat.checkpoints.load import load_plain
from qat.checkpoints.unpack import load_packed
from qat.errors import UserError
from qat.layers.restore import prepare_as_saved, set_input_rule
from qat.layers.sites import quantized_sites
from qat.schemes.config import QATConfig

_SAMPLES, _LENGTH = 128, 256  # of AutoRound's calibration, as in scripts/ptq_autoround.sh
_LEAST_S = 240.0  # of a call that AutoRound begins in: it does not resume


def trained(folder: Path, device: str) -> nn.Module:
    """The model of a folder, fake-quantized where a training says so."""
    model, saved = load_plain(str(folder), "--model", torch.bfloat16), QATConfig.load(folder)
    if saved is not None:
        prepare_as_saved(model, saved)
    return round_weights(model.to(device)).eval()


def prepared(row: Row, base: Path, data: Path, tokenizer: PreTrainedTokenizerBase, device: str) -> nn.Module:
    """The model of `base`, quantized as in `row` without training; `data` smooths and calibrates."""
    return round_weights(_quantized(row, base, data, tokenizer, device).bfloat16()).eval()


def _quantized(row: Row, base: Path, data: Path, tokenizer: PreTrainedTokenizerBase, device: str) -> nn.Module:
    model = load_plain(str(base), "--model", torch.float32).to(device)
    module = make_supervised_data_module(
        str(data), tokenizer, eval_dataset="none", evaluate=False, on_bad_sample="skip"
    )
    prepare(model, row, module)
    return model


def autorounded(
    row: RealRow, base: Path, folder: Path, data: Path, tokenizer: PreTrainedTokenizerBase, deadline: float
) -> nn.Module:
    """The model of `base`, smoothed as in `row` and rounded by AutoRound, whose folder is `folder/autoround`.

    AutoRound does not resume, so it begins only where minutes are left.

    Raises:
        OutOfTime: too few are left before `deadline`.
        UserError: AutoRound failed, or did not end before `deadline`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert row.quantized is not None and row.quantized.inputs is not None
    target, work = folder / "autoround", folder / "autoround-work"
    if not target.exists():
        if deadline - time.monotonic() < _LEAST_S:
            raise OutOfTime
        shutil.rmtree(work, ignore_errors=True)
        smoothed = _quantized(row.quantized, base, data, tokenizer, device).bfloat16()
        smoothed.save_pretrained(work / "smoothed")  # type: ignore[operator]
        tokenizer.save_pretrained(work / "smoothed")
        del smoothed
        _write_texts(data, tokenizer, work / "texts.jsonl")
        _run(row, work, max(1.0, deadline - time.monotonic()))
        (config,) = (work / "packed").rglob("config.json")
        config.parent.rename(target)
        shutil.rmtree(work)
    model, saved = load_packed(target, "AutoRound's folder", rounds_again=False)
    prepare_as_saved(model, saved, keeps_values=True)
    set_input_rule(model, row.quantized.inputs)
    return model.to(device).eval()


def _write_texts(data: Path, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """The training conversations as texts, which AutoRound calibrates on."""
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    texts = (tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def _run(row: RealRow, work: Path, seconds: float) -> None:
    """AutoRound as a program, from `work/smoothed` to `work/packed`."""
    assert row.quantized is not None
    command = [
        sys.executable, "-m", "auto_round", "--model", work / "smoothed", "--scheme", row.quantized.scheme,
        "--iters", row.iterations, "--format", "auto_round", "--output_dir", work / "packed",
        "--dataset", work / "texts.jsonl", "--seqlen", _LENGTH, "--nsamples", _SAMPLES,
        "--enable_alg_ext",  # a loss without the largest differences, those of first tokens (LOG.md)
    ]  # fmt: skip
    log = work.with_name("autoround.txt")
    if status := _status([str(word) for word in command], log, seconds):
        raise UserError(f"AutoRound ended with status {status}; see {log}")


def _status(command: list[str], log: Path, seconds: float) -> int:
    """How a program ends, which ends with this one.

    Raises:
        UserError: it takes longer than `seconds`.
    """
    with log.open("w") as file:
        child = subprocess.Popen(command, stdout=file, stderr=file)
        with forwarded(child):
            try:
                return child.wait(seconds)
            except subprocess.TimeoutExpired:
                raise UserError(
                    f"AutoRound did not end within the {seconds / 60:.1g} minutes left of this call, and does not "
                    "resume; give more --minutes, or leave its row out with --rows"
                ) from None
            finally:
                if child.poll() is None:
                    kill_with_children(child)


@torch.no_grad()
def round_weights(model: nn.Module) -> nn.Module:
    """Replace weights in BF16 by their quantized values, which layers then compute with as they are.

    Nothing changes but the time: a layer would round its weight again for each token.
    """
    for site in quantized_sites(model):
        module, quantizer = site.module, site.module.weight_quantizer
        assert quantizer.spec.format.tensor_scale is None and not quantizer.learned
        values = quantizer.rounding.values(module.rows(module.weight).contiguous(), torch.bfloat16)
        module.weight.copy_(module.from_rows(values))
        quantizer.is_baked = True
    return model
