"""Smoothing by training samples: how much of them is read, and where the model is meanwhile."""

import os

import pytest
import torch
from helpers import make_llama

from data.collating import SupervisedCollator
from qat import prepare_qat
from training import calibration
from training.calibration import smooth_with_data

CPU, ELSEWHERE = torch.device("cpu"), torch.device("meta")  # "meta" stands for a GPU


def make_data(samples: int = 3, tokens: int = 20) -> dict:
    ids = torch.randint(0, 50, (samples, tokens), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"input_ids": row, "labels": row, "length": tokens} for row in ids]
    return {"train_dataset": rows, "data_collator": SupervisedCollator(0)}


def make_model():
    model = make_llama()
    prepare_qat(model, {torch.nn.Linear: "MXFP4"})
    return model


def smoothed(data: dict) -> dict[str, torch.Tensor]:
    model = make_model()
    smooth_with_data(model, data, 0.7, CPU)
    return model.state_dict()


def test_no_more_than_the_beginning_of_each_sample_is_read(monkeypatch):
    monkeypatch.setattr(calibration, "TOKENS", 8)
    whole, short = make_data(), make_data()
    short["train_dataset"] = [{k: v[:8] for k, v in row.items() if k != "length"} for row in short["train_dataset"]]
    ours, expected = smoothed(whole), smoothed(short)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    monkeypatch.setattr(calibration, "TOKENS", 20)
    assert any(not torch.equal(value, ours[name]) for name, value in smoothed(whole).items())


@pytest.fixture
def sharded(monkeypatch):
    """As in the first process under FSDP, with a device beside the CPU; yields where the model was moved."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    moves = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: moves.append(device) or self)
    return moves


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_to_be_sharded_computes_where_it_fits_and_comes_back(sharded, monkeypatch, fails):
    monkeypatch.setattr(calibration, "_free_bytes", lambda device: 1 << 30)
    data = make_data(samples=0) if fails else make_data()  # without samples there is nothing to smooth by
    model = make_model()
    before = list(model.parameters())
    if fails:
        with pytest.raises(IndexError):
            smooth_with_data(model, data, 0.7, ELSEWHERE)
    else:
        smooth_with_data(model, data, 0.7, ELSEWHERE)
    assert sharded == [ELSEWHERE, CPU]
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))


def test_a_model_that_does_not_fit_is_smoothed_on_the_cpu_with_all_cores_and_a_warning(sharded, monkeypatch, caplog):
    seen = []
    monkeypatch.setattr(calibration, "_free_bytes", lambda device: 0)
    monkeypatch.setattr(calibration, "smooth", lambda *_args: seen.append(torch.get_num_threads()))
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        smooth_with_data(make_model(), make_data(), 0.7, ELSEWHERE)
        assert (seen, torch.get_num_threads(), sharded) == ([3], 1, [CPU])
    finally:
        torch.set_num_threads(threads)
    assert "smoothing runs on the CPU and may take long" in caplog.text and "--smooth_alpha 0" in caplog.text


def test_flash_attention_is_replaced_while_smoothing_computes_in_fp32(monkeypatch):
    model, seen = make_model(), []
    model.config._attn_implementation = "flash_attention_2"
    monkeypatch.setattr(calibration, "smooth", lambda model, *_args: seen.append(model.config._attn_implementation))
    monkeypatch.setattr(
        type(model), "set_attn_implementation", lambda self, name: setattr(self.config, "_attn_implementation", name)
    )
    smooth_with_data(model, make_data(), 0.7, CPU)
    assert (seen, model.config._attn_implementation) == (["sdpa"], "flash_attention_2")
