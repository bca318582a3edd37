"""Teachers: a frozen copy, a cache of samples from its distributions, the student itself."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from helpers import make_llama
from torch import nn
from trainers import make_data, make_trainer, other_llama
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from data.sets.packing import PackedDataset
from qat import prepare_qat
from training.arguments.distillation import CacheSettings, DistillationArguments
from training.losses.distillation import forward_kl, labelled_rows
from training.teachers import cache as teacher_cache
from training.teachers.cache import TeacherCache, make_cached_teacher
from training.teachers.frozen import FrozenTeacher
from training.teachers.load import load_teacher
from training.teachers.sample_keys import samples_of
from training.teachers.sampled_tokens import as_rows, sample_rows
from training.trainer import QATTrainer

CPU = SimpleNamespace(local_process_index=0, world_size=1, device=torch.device("cpu"))


# ---- Copies ----


def test_a_copy_has_bfloat16_weights_tied_as_before_and_exact_frequencies():
    model = make_llama()
    teacher = load_teacher(model, None)
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16} and teacher.lm_head.weight is (
        teacher.model.embed_tokens.weight
    )
    assert not any(p.requires_grad for p in teacher.parameters()) and all(p.requires_grad for p in model.parameters())
    assert torch.equal(teacher.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    weight = model.model.norm.weight
    with torch.no_grad():
        weight.add_(1)
    assert torch.equal(teacher.model.norm.weight, (weight - 1).bfloat16())


def make_minimax() -> PreTrainedModel:
    """Linear attention whose decays are FP32 buffers that BF16 values are multiplied by."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "max_position_embeddings": 64}
    layers = {"layer_types": ["linear_attention", "full_attention"]}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("minimax", **sizes, **heads, **layers))


def test_a_copy_with_buffers_in_fp32_computes_under_autocast_and_others_as_they_are():
    model, ids = make_minimax(), torch.randint(2, 260, (2, 12))
    teacher = FrozenTeacher(load_teacher(model, None), CPU.device)
    assert (
        teacher.autocasts
        and teacher.head is not None
        and not FrozenTeacher(load_teacher(make_llama(), None), CPU.device).autocasts
    )
    rows = teacher.rows({"input_ids": ids, "labels": ids})
    logits, expected = rows.head(rows.hidden).float(), labelled_rows(model(ids).logits, ids)
    assert (logits - expected).norm() < 0.02 * expected.norm()  # BF16


def test_a_teacher_that_computes_in_no_way_is_refused_in_one_line(monkeypatch):
    def fail(self, *args, **kwargs):
        raise RuntimeError("expected m1 and m2 to have the same dtype")

    teacher = load_teacher(make_minimax(), None)
    monkeypatch.setattr(type(teacher), "forward", fail)
    with pytest.raises(ValueError, match="the teacher, a MiniMaxForCausalLM in BF16, cannot compute: expected m1"):
        FrozenTeacher(teacher, CPU.device)


# ---- Caches ----


def test_cached_samples_estimate_the_whole_distribution_and_its_gradient_without_bias():
    torch.manual_seed(0)
    logits, student = torch.randn(1, 40) * 2, torch.randn(1, 40)
    generator = torch.Generator().manual_seed(0)
    settings = CacheSettings(top_k=4, samples=3, temperature=2.0)
    repeats = 20_000
    said = sample_rows(logits.expand(repeats, -1), settings, generator)
    rows = as_rows(said)
    torch.testing.assert_close(rows.weights.sum(-1), torch.ones(repeats))
    mean = torch.zeros(40).index_add_(0, rows.ids.flatten(), rows.weights.flatten() / repeats)
    q = (logits[0] / 2.0).softmax(-1)
    rest = 1 - said["top_probabilities"][0].float().sum()
    error = (q * rest / settings.samples / repeats).sqrt()  # standard deviation of the mean of a sampled token's weight
    assert ((mean - q).abs() < 5 * error + 1e-4).all()  # 1e-4: FP16 probabilities
    leaves = [student.clone().requires_grad_() for _ in range(2)]
    estimate = rows.divergence(leaves[0].expand(repeats, -1), slice(None), 2.0).mean()
    exact = forward_kl(leaves[1], logits, 2.0).mean()
    estimate.backward(), exact.backward()
    torch.testing.assert_close(estimate, exact, rtol=0, atol=0.02)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=0, atol=5e-3)


def test_a_cache_that_holds_every_token_trains_as_the_teacher_itself(tmp_path):
    data, histories = make_data(tmp_path), []
    settings = CacheSettings(top_k=260, samples=1)
    for cached in (False, True):
        model, teacher = make_llama(), load_teacher(other_llama(), None)
        if cached:
            teacher = make_cached_teacher(teacher, CPU, data, settings, str(tmp_path / "teachers"))
        trainer = make_trainer(tmp_path, model, data, teacher, bf16=False, max_steps=3)
        trainer.train()
        histories.append(
            [e["loss"] for e in trainer.state.log_history if "loss" in e] + [trainer.evaluate()["eval_kl"]]
        )
    assert histories[1] == pytest.approx(histories[0], rel=2e-3)


def test_a_run_without_an_evaluation_set_caches_the_training_set_alone(tmp_path):
    data = {**make_data(tmp_path), "eval_dataset": None}
    teacher = make_cached_teacher(load_teacher(other_llama(), None), CPU, data, CacheSettings(), str(tmp_path / "t"))
    make_trainer(tmp_path, make_llama(), data, teacher, bf16=False, max_steps=1).train()
    assert list(teacher.caches) == ["train"]


def test_a_cache_is_built_once_and_never_stale(tmp_path, monkeypatch):
    data, teacher = make_data(tmp_path), load_teacher(make_llama(), None)
    built = []
    build = teacher_cache._build
    monkeypatch.setattr(teacher_cache, "_build", lambda *args, **kwargs: (built.append(1), build(*args, **kwargs)))

    def folders(teacher=teacher, data=data, **settings):
        cached = make_cached_teacher(teacher, CPU, data, CacheSettings(**settings), str(tmp_path / "teachers"))
        return [cache.folder for cache in cached.caches.values()]

    first = folders()
    assert folders() == first and len(built) == 2  # the sets for training and for evaluation
    (tmp_path / "more").mkdir()
    others = [
        folders(top_k=8)[0], folders(samples=3)[0], folders(temperature=2.0)[0], folders(seed=1)[0],
        folders(teacher=load_teacher(other_llama(), None))[0], folders(data=make_data(tmp_path / "more", 15))[0],
    ]  # fmt: skip
    assert len({*others, *first}) == 8
    with pytest.raises(ValueError, match="not in the teacher's cache .* the data of this run"):
        TeacherCache(first[0]).rows(samples_of({"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}))


def test_packed_and_single_samples_share_what_was_cached(tmp_path):
    data, teacher = make_data(tmp_path), load_teacher(make_llama(), None)
    cached = make_cached_teacher(teacher, CPU, data, CacheSettings(top_k=2, samples=2), str(tmp_path / "teachers"))
    packed = PackedDataset(data["train_dataset"], 120)
    again = make_cached_teacher(
        teacher, CPU, {**data, "train_dataset": packed}, CacheSettings(top_k=2, samples=2), str(tmp_path / "teachers")
    )
    assert again.caches["train"].folder == cached.caches["train"].folder
    batch = cached.collate(data["data_collator"], "train")([packed[0], packed[1]])
    expected = sum(int((torch.tensor(packed[i]["labels"])[1:] != -100).sum()) for i in range(2))
    assert len(batch["teacher_ids"]) == expected == len(labelled_rows(batch["labels"][..., None], batch["labels"]))
    said = FrozenTeacher(teacher, CPU.device).rows(
        {"input_ids": batch["input_ids"], "labels": batch["labels"], "position_ids": batch["position_ids"]}
    )
    assert torch.equal(batch["teacher_ids"][:, 0].long(), said.head(said.hidden).argmax(-1))


# ---- The student itself ----


def test_the_student_with_its_quantizers_off_is_the_unquantized_model_in_evaluation(tmp_path):
    data, model = make_data(tmp_path), make_llama()
    reference = copy.deepcopy(model)
    prepare_qat(model, {nn.Linear: "MXFP4"})
    trainers = (make_trainer(tmp_path, model, data, teacher, bf16=False) for teacher in ("self", reference))
    kl = [trainer.evaluate()["eval_kl"] for trainer in trainers]
    assert kl[0] > 1e-5 and kl[0] == pytest.approx(kl[1], rel=1e-4)
    assert all(layer.self_attn.q_proj.weight_quantizer.is_enabled for layer in model.model.layers)


def test_the_student_is_no_teacher_in_training_nor_without_quantized_layers(tmp_path):
    data = make_data(tmp_path)
    model = prepare_qat(make_llama(), {nn.Linear: "MXFP4"})
    with pytest.raises(ValueError, match="--distill_teacher self is for evaluation.*Choose --distill_teacher copy"):
        make_trainer(tmp_path, model, data, "self").train()
    with pytest.raises(ValueError, match="no quantized layer"):
        make_trainer(tmp_path, make_llama(), data, "self")


# ---- The Trainer ----


def test_load_best_model_at_end_selects_by_divergence(tmp_path):
    data, model = make_data(tmp_path), make_llama()
    trainer = make_trainer(
        tmp_path, model, data, load_teacher(other_llama(), None), max_steps=3, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="kl",
        learning_rate=0.3, lr_scheduler_type="constant",
    )  # fmt: skip
    assert trainer.args.greater_is_better is False
    trainer.train()
    divergences = {e["step"]: e["eval_kl"] for e in trainer.state.log_history if "eval_kl" in e}
    best = min(divergences, key=divergences.get)
    assert len(divergences) == 3 and best < 3  # so large a learning rate does not end at its best
    assert trainer.state.best_metric == divergences[best]
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert trainer.evaluate()["eval_kl"] == pytest.approx(divergences[best], rel=1e-5)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_cross_entropy_training_equals_that_of_transformers(tmp_path, monkeypatch, accumulation):
    data, results = make_data(tmp_path), []
    for own in (True, False):
        monkeypatch.setattr(QATTrainer, "_is_plain_cross_entropy", lambda self, own=own: own)
        model = make_llama()
        trainer = make_trainer(
            tmp_path, model, data, None, bf16=False, per_device_train_batch_size=3 // accumulation,
            gradient_accumulation_steps=accumulation, optim="sgd", learning_rate=0.1,
        )  # fmt: skip
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results.append((losses, dict(model.named_parameters())))
        assert trainer.state.log_history[1]["labelled_tokens"] > trainer.state.log_history[0]["labelled_tokens"] > 0
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-6)


class _WithoutKwargs(LlamaForCausalLM):
    """A model whose forward takes no `num_items_in_batch`, as some of remote code do not."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, labels=None, use_cache=None):
        return super().forward(input_ids, attention_mask, position_ids, labels=labels, use_cache=use_cache)


def test_a_model_that_takes_no_loss_arguments_counts_the_tokens_of_the_whole_step(tmp_path):
    data, results = make_data(tmp_path), []
    rows = data["train_dataset"].select(range(4)).to_list()
    for row, labelled in zip(rows, (1, 9, 3, 5), strict=True):
        row["labels"] = [-100] * (len(row["labels"]) - labelled) + row["input_ids"][-labelled:]
    data["train_dataset"] = Dataset.from_list(rows)
    for batch in (1, 2, 4):
        model = make_llama()
        model.__class__ = _WithoutKwargs
        trainer = make_trainer(
            tmp_path, model, data, None, bf16=False, max_steps=1, optim="sgd", learning_rate=0.1, max_grad_norm=0.0,
            per_device_train_batch_size=batch, gradient_accumulation_steps=4 // batch,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        trainer.train()
        assert trainer.state.log_history[0]["labelled_tokens"] == trainer.labelled_tokens == 18
        results.append((trainer.state.log_history[0]["loss"], dict(model.named_parameters())))
    whole = make_llama()
    batch = data["data_collator"](rows)
    loss = whole(**batch).loss  # transformers' own, of one big batch
    loss.backward()
    assert [logged for logged, _ in results] == pytest.approx([loss.item()] * 3, rel=1e-5)
    stepped = {name: (p - 0.1 * p.grad).detach() for name, p in whole.named_parameters()}
    for _, parameters in results:
        torch.testing.assert_close({n: p.detach() for n, p in parameters.items()}, stepped, rtol=1e-4, atol=1e-6)


def test_a_model_that_takes_no_loss_arguments_is_evaluated_by_metrics_of_the_user(tmp_path):
    data, losses = make_data(tmp_path), []
    for own in (True, False):
        model = make_llama()
        model.__class__ = _WithoutKwargs
        trainer = make_trainer(tmp_path, model, data, None, bf16=False, per_device_eval_batch_size=1)
        if not own:
            trainer._own_metrics, trainer.compute_metrics = False, lambda p: {"rows": len(p.predictions)}
        losses.append(trainer.evaluate())
    assert losses[1]["eval_rows"] == 3 and losses[1]["eval_loss"] == pytest.approx(losses[0]["eval_loss"], rel=0.02)


def test_a_head_of_unknown_form_gives_the_same_loss_from_whole_logits(tmp_path, caplog):
    data, losses = make_data(tmp_path), []
    for known in (True, False):
        model = make_llama()
        if not known:
            model.base_model_prefix = "nowhere"
        trainer = make_trainer(tmp_path, model, data, load_teacher(other_llama(), None), bf16=False)
        assert (trainer.head is not None) == known
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert "the logits of a whole batch will be held in memory" in caplog.text


class _Wrapper(nn.Module):
    """In place of a PeftModel: passes on what it is asked, and is no PreTrainedModel."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, labels=None, **kwargs):
        return self.model(input_ids, attention_mask, position_ids, labels=labels, **kwargs)


def test_a_wrapped_model_distils_from_whole_logits_and_says_so_once(tmp_path, caplog):
    data, losses = make_data(tmp_path), []
    for wrap in (lambda model: model, _Wrapper):
        trainer = make_trainer(tmp_path, wrap(make_llama()), data, load_teacher(other_llama(), None), bf16=False)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    said = [record.getMessage() for record in caplog.records if "logits of a whole batch" in record.getMessage()]
    assert len(said) == 1 and "tokens x vocabulary x 4 bytes" in said[0] and "the head of a _Wrapper is not" in said[0]
    with pytest.raises(ValueError, match="_Wrapper's is not; choose copy"):
        make_trainer(tmp_path, _Wrapper(prepare_qat(make_llama(), {nn.Linear: "MXFP4"})), data, "self")


def test_a_backend_that_needs_whole_logits_is_named(tmp_path, caplog):
    trainer = make_trainer(tmp_path, make_llama(), make_data(tmp_path), None)
    assert trainer.head is not None and "whole batch" not in caplog.text
    trainer.is_deepspeed_enabled = True
    assert trainer._attach_head(trainer.model) is None and "DeepSpeed wraps the model; FSDP" in caplog.text


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"distill_teacher": "friend"}, "--distill_teacher 'friend' is unknown; choose one of copy, cache, self"),
        ({"distill_teacher": "cache", "distill_samples": 0}, "--distill_samples 0: at least 1"),
        ({"distill_teacher": "cache", "distill_top_k": -1}, "--distill_top_k -1 is negative"),
        ({"distill_teacher": "self", "teacher_model_name_or_path": "m"}, "name two teachers"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        DistillationArguments(**arguments)


def test_streamed_data_cannot_be_cached(tmp_path):
    stream = {"train_dataset": iter([]), "eval_dataset": []}
    with pytest.raises(ValueError, match="--streaming False"):
        make_cached_teacher(load_teacher(make_llama(), None), CPU, stream, CacheSettings(), str(tmp_path))
