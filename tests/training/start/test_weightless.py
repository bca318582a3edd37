"""Under FSDP the first process alone reads weights."""

import pytest
import torch
from helpers import save_llama

from qat import prepare_qat
from training.arguments.model import ModelArguments
from training.backends.weightless import give_storage
from training.start import start as loading


@pytest.fixture
def waiting(monkeypatch):
    monkeypatch.setattr(loading, "waits_for_weights", lambda: True)


def test_a_process_that_waits_for_weights_has_the_names_shapes_and_buffers_of_one_that_read_them(tmp_path, monkeypatch):
    arguments = ModelArguments(str(save_llama(tmp_path)))
    full = loading.load_model(arguments)
    monkeypatch.setattr(loading, "waits_for_weights", lambda: True)
    empty = loading.load_model(arguments)
    shapes = [{name: (p.shape, p.dtype) for name, p in model.named_parameters()} for model in (full, empty)]
    assert shapes[0] == shapes[1] and all(parameter.is_meta for parameter in empty.parameters())
    assert empty.lm_head.weight is empty.model.embed_tokens.weight
    buffers = [dict(model.named_buffers()) for model in (full, empty)]
    assert buffers[0].keys() == buffers[1].keys() and buffers[0]
    assert all(torch.equal(buffers[0][name], buffers[1][name]) for name in buffers[0])


def test_a_model_without_weights_is_prepared_like_one_with_them(tmp_path, waiting):
    model = prepare_qat(loading.load_model(ModelArguments(str(save_llama(tmp_path)))), {torch.nn.Linear: "MXFP4"})
    assert sum(hasattr(module, "weight_quantizer") for module in model.modules()) == 14


def test_storage_given_for_an_optimizer_keeps_ties_and_buffers_and_tells_parameters_apart(tmp_path, waiting):
    model = loading.load_model(ModelArguments(str(save_llama(tmp_path))))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    give_storage(model)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    assert 0 not in addresses and len(set(addresses)) == len(addresses)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
