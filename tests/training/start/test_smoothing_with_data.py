"""Smoothing by training samples: how much of them is read, and where the model is meanwhile."""

import os
from types import SimpleNamespace

import pytest
import torch
from helpers import make_llama

from data.sets.collating import SupervisedCollator
from data.sets.mixing import MixedDataset
from qat import prepare_qat
from qat.transforms.smoothing import smooth
from training.backends.masters import to_master_dtype
from training.start import samples, smoothing
from training.start.smoothing import smooth_with_data

CPU, ELSEWHERE = torch.device("cpu"), torch.device("meta")  # "meta" stands for a GPU


def make_data(count: int = 3, tokens: int = 20) -> dict:
    ids = torch.randint(0, 50, (count, tokens), generator=torch.Generator().manual_seed(0)).tolist()
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
    monkeypatch.setattr(samples, "TOKENS", 8)
    whole, short = make_data(), make_data()
    short["train_dataset"] = [{k: v[:8] for k, v in row.items() if k != "length"} for row in short["train_dataset"]]
    ours, expected = smoothed(whole), smoothed(short)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    monkeypatch.setattr(samples, "TOKENS", 20)
    assert any(not torch.equal(value, ours[name]) for name, value in smoothed(whole).items())


def test_of_text_that_is_mixed_in_its_share_of_the_samples_is_read():
    domain, text = make_data(20), make_data(20, 12)
    mixed = MixedDataset(domain["train_dataset"], text["train_dataset"], 0.25)
    batches = list(samples.first_samples(domain | {"train_dataset": mixed}, CPU, 8))
    assert [batch["input_ids"].shape[1] for batch in batches] == [20, 20, 20, 12, 20, 20, 20, 12]
    assert all("generic" not in batch for batch in batches)


@pytest.mark.parametrize("alpha", [0.7, "auto"])
def test_weights_without_fp32_masters_are_smoothed_in_fp32_and_rounded_once(alpha):
    """In BF16 the logits would move by 0.003 of the largest, and all would be left as it is."""
    model, expected = make_model(), make_model()
    for each in (model, expected):
        to_master_dtype(each, torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected.float()
    smooth(expected, list(samples.first_samples(make_data(), CPU)), alpha)
    smooth_with_data(model, make_data(), alpha, CPU)
    found = model.state_dict()
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in expected.state_dict().items())
    assert sum(not torch.equal(tensor, found[name]) for name, tensor in before.items()) > 8
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("loads_alone", [False, True])
def test_processes_take_the_strengths_of_the_first_one_where_it_is_not_alone(monkeypatch, loads_alone):
    def broadcast(objects):
        objects[0] = [0.4] * len(objects[0])

    monkeypatch.setattr(smoothing, "PartialState", lambda: SimpleNamespace(num_processes=2))
    monkeypatch.setattr(smoothing, "first_process_loads", lambda: loads_alone)
    monkeypatch.setattr(smoothing, "broadcast_object_list", broadcast)
    assert smoothing._of_first_process([0.1, 0.9]) == ([0.1, 0.9] if loads_alone else [0.4, 0.4])
    model, expected = make_model(), make_model()
    smooth_with_data(model, make_data(), "auto", CPU)
    smooth(expected, list(samples.first_samples(make_data(), CPU)), "auto", smoothing._of_first_process)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in expected.state_dict().items())


@pytest.fixture
def sharded(monkeypatch):
    """As under FSDP, with a device beside the CPU; yields where the model was moved. Each move gives its tensors new
    memory, as a move to a GPU does."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    moves = []

    def move(self, device):
        moves.append(device)
        return self._apply(torch.clone)

    monkeypatch.setattr(torch.nn.Module, "to", move)
    return moves


def bytes_needed() -> int:
    tensors = [*make_llama().parameters(), *make_llama().buffers()]
    return 2 * 1024**3 + sum(4 * tensor.numel() for tensor in tensors)


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_to_be_sharded_computes_where_it_fits_and_comes_back(sharded, monkeypatch, fails):
    monkeypatch.setattr(samples, "_free_bytes", lambda device: bytes_needed())
    data, model = make_data(), make_model()
    before, addresses = list(model.parameters()), [p.data_ptr() for p in model.parameters()]
    if fails:
        data["train_dataset"] = [{"input_ids": [10**6] * 3, "labels": [0] * 3}]  # tokens that the model does not have
        with pytest.raises(IndexError):
            smooth_with_data(model, data, 0.7, ELSEWHERE)
    else:
        smooth_with_data(model, data, 0.7, ELSEWHERE)
        expected = make_model()
        smooth(expected, list(samples.first_samples(data, CPU)), 0.7)
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in expected.state_dict().items())
    assert sharded == [ELSEWHERE, CPU]
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert addresses != [p.data_ptr() for p in model.parameters()]


@pytest.mark.parametrize("processes,loads_alone,cores", [("1", False, 3), ("2", True, 3), ("2", False, 1)])
def test_a_model_that_does_not_fit_is_smoothed_on_the_cpu_with_a_warning_and_all_cores_that_are_free(
    sharded, monkeypatch, caplog, processes, loads_alone, cores
):
    seen = []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    monkeypatch.setattr(samples, "first_process_loads", lambda: loads_alone)
    monkeypatch.setattr(samples, "_free_bytes", lambda device: bytes_needed() - 1)
    monkeypatch.setattr(smoothing, "smooth", lambda *_args: seen.append(torch.get_num_threads()))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 2, 5}, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        smooth_with_data(make_model(), make_data(), 0.7, ELSEWHERE)
        assert (seen, torch.get_num_threads()) == ([cores], 1) and ELSEWHERE not in sharded
    finally:
        torch.set_num_threads(threads)
    assert f"smoothing runs on the CPU, on {cores} cores" in caplog.text and "2.0 GiB free" in caplog.text
    assert "raise --ddp_timeout" in caplog.text and "--smooth_alpha 0" in caplog.text


def test_flash_attention_is_replaced_while_smoothing_computes_in_fp32(monkeypatch):
    model, seen = make_model(), []
    model.config._attn_implementation = "flash_attention_2"
    monkeypatch.setattr(smoothing, "smooth", lambda model, *_args: seen.append(model.config._attn_implementation))
    monkeypatch.setattr(
        type(model), "set_attn_implementation", lambda self, name: setattr(self.config, "_attn_implementation", name)
    )
    smooth_with_data(model, make_data(), 0.7, CPU)
    assert (seen, model.config._attn_implementation) == (["sdpa"], "flash_attention_2")
