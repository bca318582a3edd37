"""Weights are converted, compared and quantized on the device that trains them, where they fit it as they are read."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers import save_llama
from torch import nn

import qat.checkpoints.load
from training.arguments.model import ModelArguments
from training.start.loading import device_of_weights
from training.start.start import Start

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


def arguments(**changed) -> SimpleNamespace:
    given = {"do_train": True, "bf16_full_eval": False, "fp16_full_eval": False, "fsdp": None, "deepspeed": None}
    return SimpleNamespace(**given | changed, device=GPU)


def test_it_is_the_device_of_the_run(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    assert device_of_weights(arguments(), packs_base=False) == GPU


def test_it_is_the_cpu_for_other_accelerators(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    args = arguments()
    args.device = torch.device("mps")
    assert device_of_weights(args, packs_base=False) == CPU


@pytest.mark.parametrize("switch", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_it_is_the_cpu_where_weights_are_sharded(monkeypatch, switch):
    monkeypatch.setenv(switch, "true")
    assert device_of_weights(arguments(), packs_base=False) == CPU


@pytest.mark.parametrize("argument", [{"fsdp": "full_shard"}, {"deepspeed": "zero3.json"}])
def test_it_is_the_cpu_where_an_argument_asks_for_shards(monkeypatch, argument):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    assert device_of_weights(arguments(**argument), packs_base=False) == CPU


def test_it_is_the_cpu_where_weights_get_smaller_before_they_are_moved():
    assert device_of_weights(arguments(), packs_base=True) == CPU
    args = arguments()
    args.do_train, args.bf16_full_eval = False, True
    assert device_of_weights(args, packs_base=False) == CPU


def test_a_model_is_moved_as_it_is_stored_before_its_values_are_looked_at(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(qat.checkpoints.load, "check_finite", lambda tensors, where: seen.extend(tensors))
    start = Start.read(ModelArguments(str(save_llama(tmp_path / "model"))))
    start.device = torch.device("meta")  # the only other device of every machine
    model = start.load_model()
    assert {(p.device.type, p.dtype) for _, p in seen} == {("meta", torch.float32)}  # converted in place, later
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert start.dtypes.main == torch.bfloat16 and set(start.dtypes.by_name.values()) == {torch.bfloat16}


def test_the_fingerprint_does_not_depend_on_where_masters_are_made(tmp_path):
    folder = save_llama(tmp_path / "model")
    start = Start.read(ModelArguments(str(folder)))
    start.load_model()
    plain = qat.checkpoints.load.load_plain(folder)
    assert isinstance(plain, nn.Module) and plain.dtype == torch.bfloat16
    from training.backends.fingerprint import fingerprint

    assert fingerprint(plain) == start.fingerprint
