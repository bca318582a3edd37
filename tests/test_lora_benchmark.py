"""What benchmarks/lora.py writes out of peft, for machines without it, is what peft computes."""

from __future__ import annotations

import torch
from helpers import make_llama
from peft import LoraConfig, get_peft_model

from benchmarks.lora import ReferenceLora, linear_layers


def saved_and_results(model, ids):
    """Bytes that autograd keeps, the loss and the gradients of all factors."""
    saved, trained = [], {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    keep = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t)
    with torch.autocast("cpu", torch.bfloat16), keep:
        loss = model(ids, labels=ids).loss
    loss.backward()
    return sum(saved), loss, {name: p.grad for name, p in trained.items()}


def test_the_layer_of_the_benchmark_computes_and_keeps_what_pefts_does():
    ids, results = torch.arange(40).view(2, 20), []
    for by_peft in (True, False):
        model = make_llama().bfloat16().requires_grad_(False)
        if by_peft:
            model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")).base_model.model
        else:
            for name, layer in linear_layers(model).items():
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, ReferenceLora(layer, 4, 2.0))
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0, 0.1, generator=generator)
                assert parameter.dtype == torch.float32
        results.append(saved_and_results(model, ids))
    (saved, loss, grads), (expected_saved, expected, expected_grads) = results
    assert saved == expected_saved and torch.equal(loss, expected) and grads.keys() == expected_grads.keys()
    assert all(torch.equal(grads[name], expected_grads[name]) for name in grads)
