"""The load-balancing loss of routers: transformers' own value, beside cross-entropy, divergence and quantization."""

from __future__ import annotations

import logging

import pytest
import torch
from helpers import make_llama, make_mixture
from torch import nn
from trainers import make_data, make_trainer

from qat import prepare_qat
from qat.errors import UserError
from training.losses.chunked import attach, find_head
from training.losses.distillation import Objective
from training.losses.router_loss import UnknownRouterLoss, find_router_loss

FACTOR = 0.3
ROUTED = {"output_router_logits": True, "router_aux_loss_coef": FACTOR}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 260, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("scheme", [None, "MXFP4"])
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_value_and_gradients_are_those_of_transformers(kind, scheme):
    models = [make_mixture(kind, **ROUTED) for _ in range(2)]
    if scheme:
        models = [prepare_qat(model, {nn.Linear: scheme}) for model in models]
    own, chunked = models
    inputs = batch()
    outputs = own(**inputs, labels=inputs["input_ids"])
    outputs.loss.backward()
    attach(chunked, find_head(chunked), loss := find_router_loss(chunked))
    losses = chunked.train()(**inputs, objective=Objective(inputs["input_ids"]))
    (losses["loss"] / 22 + loss.factor * losses["aux_loss"]).backward()
    assert torch.equal(losses["aux_loss"], outputs.aux_loss) and loss.factor == FACTOR
    for (name, parameter), other in zip(own.named_parameters(), chunked.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("teacher", [False, True])
def test_a_step_adds_its_mean_over_accumulated_batches(tmp_path, data, teacher, checkpointing):
    model = prepare_qat(make_mixture(**ROUTED), {nn.Linear: "MXFP4"})
    trainer = make_trainer(
        tmp_path, model, data, make_mixture() if teacher else None, distill_ce_weight=0.25,
        gradient_accumulation_steps=3, max_steps=1, per_device_train_batch_size=1, bf16=False,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    seen = []
    compute = trainer.compute_loss

    def compute_loss(model, inputs, **kwargs):
        plain = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            seen.append(model.eval()(**plain).aux_loss.item())
        return compute(model.train(), inputs, **kwargs)

    trainer.compute_loss = compute_loss
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    plain = 0.25 * entry["ce"] + 0.75 * entry["kl"] if teacher else entry["ce"]
    assert len(seen) == 3 and entry["loss"] == pytest.approx(plain + FACTOR * sum(seen) / 3, rel=1e-5)
    assert min(seen) < entry["aux_loss"] < max(seen)


def test_gradients_of_routers_are_the_same_with_recomputed_layers(tmp_path, data):
    gradients = []
    for checkpointing in (False, True):
        model = prepare_qat(make_mixture(**ROUTED), {nn.Linear: "MXFP4"})
        trainer = make_trainer(tmp_path, model, data, None, gradient_checkpointing=checkpointing, max_steps=1)
        trainer.create_optimizer = lambda model=None, trainer=trainer: setattr(
            trainer, "optimizer", torch.optim.SGD(trainer.model.parameters(), lr=1e-2)
        )
        trainer.train()
        gradients.append({name: p.detach().clone() for name, p in model.named_parameters()})
    before = dict(make_mixture(**ROUTED).named_parameters())
    for name, value in gradients[0].items():
        assert torch.equal(value, gradients[1][name]), name
        assert "gate.weight" not in name or not torch.equal(value, before[name])


def test_a_way_of_recomputing_layers_that_drops_its_gradient_is_refused(tmp_path, data):
    trainer = make_trainer(
        tmp_path, make_mixture(**ROUTED), data, None, gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
    )  # fmt: skip
    with pytest.raises(UserError, match="reaches no parameter: .* use_reentrant drops it"):
        trainer.train()


def test_it_is_added_to_smoothed_labels_and_not_to_an_evaluation(tmp_path, data):
    losses, evaluated = {}, {}
    for factor in (0.0, FACTOR):
        model = make_mixture(output_router_logits=True, router_aux_loss_coef=factor)
        trainer = make_trainer(tmp_path, model, data, None, label_smoothing_factor=0.1, bf16=False)
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        losses[factor] = trainer.compute_loss(model.train(), dict(inputs)).item()
        with torch.no_grad():
            aux_loss = model(**{name: inputs[name] for name in ("input_ids", "attention_mask")}).aux_loss.item()
        evaluated[factor] = trainer.evaluate()["eval_loss"]
    assert losses[FACTOR] == pytest.approx(losses[0.0] + FACTOR * aux_loss, rel=1e-6)
    assert evaluated[FACTOR] == evaluated[0.0]


def test_a_loss_that_is_not_known_is_left_to_transformers_and_refused_with_a_teacher(tmp_path, data, caplog):
    model = make_llama()
    assert find_router_loss(model) is None and find_router_loss(nn.Linear(1, 1)) is None
    model.config.output_router_logits = True
    with pytest.raises(UnknownRouterLoss, match="no load-balancing loss is known of a LlamaForCausalLM"):
        find_router_loss(model)
    with caplog.at_level(logging.WARNING):
        assert not make_trainer(tmp_path, model, data, None)._computes_loss()
    assert "losses are those of transformers, from the logits of a whole batch" in caplog.text
    with pytest.raises(UserError, match='set "output_router_logits": false'):
        make_trainer(tmp_path, model, data, make_llama())
