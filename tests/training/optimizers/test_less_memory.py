"""Trainings with less memory: each resumes exactly, and differs from the plain one in what it says alone."""

from __future__ import annotations

import copy
import importlib.util
import signal

import pytest
import torch
from helpers import make_llama, make_tokenizer
from trainers import make_data
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.optimization import Adafactor

from qat import prepare_qat
from training.arguments.memory import STEPS_ALONE
from training.arguments.parse import parse_arguments
from training.arguments.training import TrainingArguments
from training.backends.masters import to_master_dtype
from training.optimizers.in_backward import StepsInBackward, UpdatedTwiceError
from training.optimizers.muon import Muon, MuonFactory
from training.optimizers.stochastic_adamw import StochasticAdamW
from training.resume.safeguards import NonFiniteError
from training.trainer import QATTrainer

IN_BACKWARD = {"optimizer_in_backward": True, "max_grad_norm": 0.0}
LIBRARIES = {name: importlib.util.find_spec(name) is not None for name in ("torchao", "bitsandbytes")}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def untrained():
    return make_llama(layers=1)


@pytest.fixture
def trained(tmp_path, data, untrained):
    """A trainer of a copy of the model, by the name of its folder; `stop`: the step that SIGTERM ends."""

    def train(folder: str, stop: int | None = None, resume: bool = False, **options):
        model = copy.deepcopy(untrained)
        to_master_dtype(model, getattr(torch, options.get("master_dtype", "float32")))
        learned = {"learn_exponent": True} if options.pop("learn_exponent", False) else {}
        prepare_qat(model, {"torch.nn.Linear": "MXFP4"}, **learned)
        groups = {"weight_exponent_offset": {"lr": 0.5, "weight_decay": 0.0}} if learned else {}
        defaults = {
            "max_steps": 4, "per_device_train_batch_size": 3, "learning_rate": 1e-3, "logging_steps": 1,
            "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "report_to": "none", "weight_decay": 0.1,
        }  # fmt: skip
        args = TrainingArguments(str(tmp_path / folder), **{**defaults, **options})
        trainer = QATTrainer(model=model, args=args, processing_class=make_tokenizer(), parameter_groups=groups, **data)
        if stop is not None:
            plain = trainer.training_step

            def training_step(*inputs, **kwargs):
                if trainer.state.global_step == stop:
                    signal.raise_signal(signal.SIGTERM)
                return plain(*inputs, **kwargs)

            trainer.training_step = training_step
        trainer.train(resume_from_checkpoint=resume or None)
        return trainer

    return train


def same(a: QATTrainer, b: QATTrainer) -> bool:
    """Whether the weights of two trainers are equal bit for bit."""
    pairs = zip(a.model.parameters(), b.model.parameters(), strict=True)
    return all(p.dtype == q.dtype and torch.equal(p, q) for p, q in pairs)


def losses(trainer: QATTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


SETTINGS = [
    {"master_dtype": "bfloat16"},
    {"master_dtype": "bfloat16", "moment_dtype": "float32"},
    {"master_dtype": "bfloat16", "learn_exponent": True, **IN_BACKWARD},
    IN_BACKWARD,
    {**IN_BACKWARD, "optim": "muon", "optim_args": "momentum=0.9,nesterov=false"},
    *({"optim": name} for name in ("adamw_torch_8bit", "adamw_torch_4bit") if LIBRARIES["torchao"]),
    *({"optim": name} for name in ("adamw_bnb_8bit", "paged_adamw_8bit", "ademamix_8bit") if LIBRARIES["bitsandbytes"]),
]  # fmt: skip


@pytest.mark.parametrize("options", SETTINGS, ids=lambda options: "-".join(map(str, options.values())))
def test_a_run_that_was_killed_resumes_with_the_weights_of_one_that_was_not(trained, options):
    whole = trained("whole", **options)
    first = trained("parts", stop=1, **options)
    assert first.was_interrupted and first.state.global_step == 2
    rest = trained("parts", resume=True, **options)
    assert rest.state.global_step == 4 and same(whole, rest)
    assert losses(whole)[-1] < losses(whole)[0]


OPTIMIZERS = {
    "adamw_torch": (torch.optim.AdamW, {}),
    "adamw_torch_fused": (torch.optim.AdamW, {"fused": True}),
    "adafactor": (Adafactor, {"scale_parameter": False, "relative_step": False}),
    "adagrad": (torch.optim.Adagrad, {}),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.9}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "muon": (lambda groups, **options: Muon(groups, betas=(0.9, 0.99), eps=1e-8, **options), {}),
}


@pytest.mark.parametrize("name", STEPS_ALONE)
def test_an_optimizer_that_may_step_in_backward_takes_the_steps_that_it_takes_after_it(name):
    results = []
    for in_backward in (False, True):
        torch.manual_seed(0)
        layers = torch.nn.Sequential(torch.nn.Linear(40, 50), torch.nn.Linear(50, 3))
        matrices, vectors = ([p for p in layers.parameters() if p.ndim == n] for n in (2, 1))
        make, options = OPTIMIZERS[name]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        groups[0] |= {"muon": True} if name == "muon" else {}
        optimizer, steps = make(groups, lr=1e-2, **options, weight_decay=0.0), StepsInBackward()
        if in_backward:
            steps.attach(optimizer)
        norms = []
        for _ in range(3):
            layers(torch.randn(8, 40)).square().sum().backward()
            norms.append(float(steps.take_norm()) if in_backward else float(get_total_norm(layers)))
            if not in_backward:
                optimizer.step()
                optimizer.zero_grad()
            assert all(p.grad is None for p in layers.parameters())
        results.append((list(layers.parameters()), norms))
    assert all(torch.equal(p, q) for p, q in zip(results[0][0], results[1][0], strict=True))
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-5)


def get_total_norm(model: torch.nn.Module) -> torch.Tensor:
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])


def test_a_trainer_whose_optimizer_steps_in_backward_trains_as_without(trained):
    together = trained("together", max_grad_norm=0.0, lr_scheduler_type="cosine", max_steps=3)
    alone = trained("alone", lr_scheduler_type="cosine", max_steps=3, **IN_BACKWARD)
    assert same(together, alone)
    norms = [[e["grad_norm"] for e in t.state.log_history if "grad_norm" in e] for t in (together, alone)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5) and min(norms[0]) > 0


def test_a_run_resumes_with_steps_in_backward_that_began_without(trained):
    whole = trained("whole", **IN_BACKWARD)
    trained("parts", stop=1, max_grad_norm=0.0)
    assert same(whole, trained("parts", resume=True, **IN_BACKWARD))


@pytest.mark.parametrize("settings,message", [
    ({"WORLD_SIZE": "2"}, "--optimizer_in_backward True under DDP"),
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "--optimizer_in_backward True under FSDP1"),
])  # fmt: skip
def test_steps_in_backward_are_refused_where_gradients_are_reduced_later(monkeypatch, settings, message):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        TrainingArguments("out", use_cpu=True, **IN_BACKWARD)


def test_what_fsdp_cannot_shard_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="--optim muon: it needs whole matrices"):
        TrainingArguments("out", use_cpu=True, optim="muon")
    with pytest.raises(ValueError, match="--master_dtype bfloat16 under FSDP1"):
        TrainingArguments("out", use_cpu=True, master_dtype="bfloat16")
    monkeypatch.setenv("FSDP_VERSION", "2")
    flags = ["--output_dir", "out", "--do_train", "True", "--quant_scheme", "MXFP4", "--learn_exponent", "True"]
    with pytest.raises(SystemExit):
        parse_arguments([*flags, "--master_dtype", "bfloat16"])
    assert "--learn_exponent True with --master_dtype bfloat16 under FSDP" in capsys.readouterr().err


def test_a_model_whose_weights_are_stored_in_fp32_is_rounded_with_a_warning(untrained, caplog):
    model = copy.deepcopy(untrained)
    to_master_dtype(model, torch.bfloat16)
    assert "rounds the weights of model.embed_tokens.weight and 10 more" in caplog.text
    assert {p.dtype for p in model.parameters()} == {
        torch.bfloat16
    } and model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, untrained.lm_head.weight.bfloat16())


def test_without_masters_steps_in_backward_are_the_steps_after_it(trained):
    together = trained("together", master_dtype="bfloat16", max_grad_norm=0.0)
    alone = trained("alone", master_dtype="bfloat16", **IN_BACKWARD)
    assert same(together, alone)


def test_gradients_do_not_exist_together(trained, monkeypatch):
    seen = []
    plain = StochasticAdamW._update

    def update(self, parameter, group):
        model_parameters = [p for g in groups(self) for p in g["params"]]
        seen.append(sum(p.grad is not None for p in model_parameters))
        plain(self, parameter, group)

    def groups(optimizer):
        return optimizer.param_groups if len(optimizer._numbers) < 2 else [{"params": list(optimizer._numbers)}]

    monkeypatch.setattr(StochasticAdamW, "_update", update)
    trained("out", master_dtype="bfloat16", max_steps=1, **IN_BACKWARD)
    assert len(seen) == 11 and set(seen) == {1}


def test_without_masters_weights_are_bf16_and_what_is_saved_is_what_was_trained(trained, tmp_path):
    trainer = trained("out", master_dtype="bfloat16")
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, StochasticAdamW) and optimizer.seed == trainer.args.seed
    assert {s["exp_avg_sq"].dtype for s in optimizer.state.values()} == {torch.bfloat16}
    trainer.save_model()
    saved = type(trainer.model).from_pretrained(tmp_path / "out", dtype="auto")
    assert all(torch.equal(p, q) for p, q in zip(saved.parameters(), trainer.model.parameters(), strict=True))


def test_the_seed_decides_how_weights_are_rounded(trained):
    runs = [trained(f"run{seed}", master_dtype="bfloat16", seed=seed, data_seed=1) for seed in (1, 1, 2)]
    assert same(*runs[:2]) and not same(*runs[1:])


def test_training_in_bf16_stays_near_to_training_with_masters(trained):
    exact, rounded = (losses(trained(d, master_dtype=d, max_steps=8)) for d in ("float32", "bfloat16"))
    assert rounded == pytest.approx(exact, rel=0.02) and exact[-1] < 0.97 * exact[0]


def test_muon_updates_hidden_matrices_and_adamw_the_rest(trained):
    trainer = trained("out", optim="muon", max_steps=1)
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    groups = trainer.optimizer.optimizer.param_groups
    hidden = {names[id(p)] for group in groups if group["muon"] for p in group["params"]}
    assert hidden == {n for n in names.values() if n.endswith("proj.weight")} and len(hidden) == 7
    assert sum(len(g["params"]) for g in groups) == len(names)
    assert {g["weight_decay"] for g in groups if not g["muon"]} == {0.1, 0.0}


def test_a_step_of_muon_is_that_of_torch(untrained):
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    ours, theirs = copy.deepcopy(untrained), copy.deepcopy(untrained)
    optimizer = MuonFactory()(
        ours, {"model.norm.weight", "model.layers.0.mlp.up_proj.weight"}, betas=(0.9, 0.99), eps=1e-8, **settings
    )
    weight = theirs.model.layers[0].mlp.up_proj.weight
    for model in (ours, theirs):
        for number, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
    optimizer.step()
    torch.optim.Muon([weight], **settings, adjust_lr_fn="match_rms_adamw").step()
    norm = theirs.model.norm.weight
    torch.optim.AdamW([norm], betas=(0.9, 0.99), eps=1e-8, **settings).step()
    assert torch.equal(ours.model.layers[0].mlp.up_proj.weight, weight)
    assert torch.equal(ours.model.norm.weight, norm)


def test_a_non_finite_gradient_in_backward_ends_the_run(trained, monkeypatch):
    plain = QATTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = plain(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 2 else loss

    monkeypatch.setattr(QATTrainer, "compute_loss", compute_loss)
    with pytest.raises(NonFiniteError, match="step 3: .*gradients were applied before that was seen.*checkpoint-2"):
        trained("out", save_strategy="steps", save_steps=1, **IN_BACKWARD)


def test_a_gradient_in_two_parts_ends_the_run():
    weight = torch.nn.Parameter(torch.ones(2, 3))
    steps = StepsInBackward()
    steps.attach(torch.optim.SGD([weight], lr=0.1))
    weight.sum().backward()
    with pytest.raises(UpdatedTwiceError, match=r"shape \[2, 3\] came in two parts"):
        weight.sum().backward()
    assert float(steps.take_norm()) == pytest.approx(6**0.5)


def test_weights_whose_layers_are_not_called_are_refused_in_backward_too(trained, monkeypatch):
    def forward(self, x):
        return torch.nn.functional.linear(self.act_fn(self.gate_proj(x)) * self.up_proj(x), self.down_proj.weight)

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    with pytest.raises(ValueError, match="down_proj without calling it"):
        trained("out", **IN_BACKWARD)
