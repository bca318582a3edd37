"""The estimate of a run's memory: closed forms by hand, a step on fake tensors against a real one."""

from __future__ import annotations

import gc
import itertools
import logging
from dataclasses import replace

import pytest
import torch
from helpers import make_llama, make_mixture, save_llama, write_conversations
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.optimization import Adafactor

import main
from qat import prepare_qat
from training.arguments.parse import parse_arguments
from training.estimate import program
from training.estimate.dry_run import BACKWARD, _EveryToken, dry_run
from training.estimate.optimizers import state_bytes, temporary_bytes
from training.estimate.plan import CACHE, COPY, DDP, FSDP1, FSDP2, ONE, SELF, Backend, Plan, plan_of
from training.estimate.remedies import Available, remedies
from training.estimate.total import (
    BUCKETS,
    GATHERED,
    GRADIENTS,
    OPTIMIZER,
    PARAMETERS,
    STATES,
    TEACHER,
    WORK,
    Estimate,
    Estimator,
)
from training.losses.chunked import attach, find_head
from training.losses.distillation import Objective
from training.teachers.frozen import FrozenTeacher
from training.teachers.load import load_teacher

BLOCK = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96 + 2 * 64  # q and o, k and v, the MLP, two norms
REST = 260 * 64 + 64  # the embedding, which is the head, too, and the last norm
COUNT = 2 * BLOCK + REST
PLAN = Plan(2, 64, device="cpu")
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "vocab_size": 260}  # fmt: skip


def skeleton(scheme: str | None = None, **kwargs) -> LlamaForCausalLM:
    with torch.device("meta"):
        model = make_llama(**kwargs)
    return prepare_qat(model, {nn.Linear: scheme}) if scheme else model


ESTIMATOR_OF = program.estimator_of  # other tests do without, see conftest.py


@pytest.fixture(autouse=True)
def runs_with_estimate(monkeypatch):
    monkeypatch.setattr(program, "estimator_of", ESTIMATOR_OF)


@pytest.fixture(scope="module")
def estimator() -> Estimator:
    return Estimator(skeleton("MXFP4"))


# ---- Closed forms ----


def test_parameters_gradients_and_moments_of_a_tiny_llama_are_those_by_hand(estimator):
    run = dry_run(estimator.student, None, PLAN)
    assert run.peaks[BACKWARD].gradients <= 4 * COUNT
    rows = estimator.estimate(PLAN).rows
    assert (rows[PARAMETERS], rows[STATES]) == (4 * COUNT, 8 * COUNT)
    at_the_step = estimator._rows_of_step(PLAN)
    assert at_the_step == {GRADIENTS: 4 * COUNT, WORK: 0}


def test_an_untied_head_counts_and_a_tied_one_does_not(estimator):
    untied = Estimator(skeleton("MXFP4", tie_word_embeddings=False)).estimate(PLAN).rows[PARAMETERS]
    assert untied - estimator.estimate(PLAN).rows[PARAMETERS] == 4 * 260 * 64


def test_bfloat16_masters_take_half_and_gradients_in_backward_none(estimator):
    plan = replace(PLAN, master_dtype=torch.bfloat16, in_backward=True)
    result = estimator.estimate(plan)
    assert (result.rows[PARAMETERS], result.rows[STATES]) == (2 * COUNT, 4 * COUNT)
    assert result.rows[GRADIENTS] == 0 and estimator._rows_of_step(plan)[GRADIENTS] == 0


def test_a_copied_teacher_takes_two_bytes_a_parameter_and_a_cached_one_none(estimator):
    copied, cached = (estimator.estimate(replace(PLAN, teacher=teacher)) for teacher in (COPY, CACHE))
    assert copied.rows[TEACHER] == 2 * COUNT and TEACHER not in cached.rows
    assert copied.total > cached.total > estimator.estimate(PLAN).total


def test_adapters_take_sixteen_bytes_and_their_base_two_or_its_packed_bits(estimator):
    linear = 2 * (BLOCK - 2 * 64)
    adapters = 2 * 4 * (4 * 64 + (64 + 32 + 32 + 64) + 2 * (64 + 96) + (96 + 64))  # r (K + N) of seven layers, r = 4
    plan = replace(PLAN, lora_r=4, teacher=SELF)
    rows = estimator.estimate(plan).rows
    assert (rows[PARAMETERS], rows[STATES]) == (2 * COUNT + 4 * adapters, 8 * adapters)
    assert estimator._rows_of_step(plan)[GRADIENTS] == 4 * adapters and TEACHER not in rows
    packed = estimator.estimate(replace(plan, base_in_scheme=True)).rows[PARAMETERS]
    assert packed == 2 * (COUNT - linear) + linear * 4.25 / 8 + 4 * adapters
    queries = estimator.estimate(replace(plan, lora_target="q_proj,k_proj")).rows[STATES]
    assert queries == 8 * 2 * 4 * ((64 + 64) + (64 + 32))


@pytest.mark.parametrize(
    "name,arguments,make",
    [
        ("adamw_torch", "", torch.optim.AdamW),
        ("sgd", "", torch.optim.SGD),
        ("sgd", "momentum=0.9", lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)),
        ("adagrad", "", torch.optim.Adagrad),
        ("rmsprop", "centered=true", lambda p, lr: torch.optim.RMSprop(p, lr, centered=True)),
        ("adafactor", "", lambda p, lr: Adafactor(p, lr, scale_parameter=False, relative_step=False)),
    ],
)
def test_states_are_those_of_the_optimizer(name, arguments, make):
    shapes = [(12, 20), (7,), (3, 5, 6)]
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = make(parameters, lr=1e-3)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    tensors = [
        t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor) and t.ndim
    ]
    assert state_bytes(name, arguments, shapes, torch.float32, "cpu") == sum(t.nbytes for t in tensors)


def test_quantized_states_have_codes_and_a_scale_a_block():
    of = lambda name, shape: state_bytes(name, "", [shape], torch.float32, "cuda")  # noqa: E731
    assert of("adamw_torch_8bit", (64, 256)) == 2 * (64 * 256 + 4 * 64)
    assert of("adamw_torch_4bit", (64, 256)) == 2 * (64 * 128 + 4 * 128)
    assert of("adamw_bnb_8bit", (100,)) == 8 * 100  # small ones stay FP32
    assert of("paged_adamw_8bit", (64, 256)) == 0
    assert (
        temporary_bytes("adamw_torch", [10, 30], "cuda") == 160
        and temporary_bytes("adamw_torch", [10, 30], "cpu") == 240
    )


# ---- Sharding ----


def test_fsdp_divides_parameters_and_moments_and_gathers_two_layers(estimator):
    for name in (FSDP1, FSDP2):
        rows = estimator.estimate(PLAN.on(name, 4)).rows
        assert rows[PARAMETERS] == 4 * COUNT // 4 and rows[STATES] == 8 * COUNT // 4
        assert rows[GATHERED] == 4 * (2 * BLOCK + REST)
    offloaded = replace(PLAN, backend=Backend(FSDP2, 4, offloads=True))
    rows = estimator.estimate(offloaded).rows
    assert PARAMETERS not in rows and STATES not in rows and rows[GRADIENTS] == 0


def test_ddp_divides_nothing_and_adds_buckets(estimator):
    one, ddp = estimator.estimate(PLAN), estimator.estimate(PLAN.on(DDP, 4))
    assert ddp.total - one.total == ddp.rows[BUCKETS] == 4 * COUNT


@pytest.mark.parametrize(
    "environment,expected",
    [
        ({}, Backend()),
        ({"WORLD_SIZE": "4"}, Backend(DDP, 4)),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, Backend(FSDP1, 2)),
        (
            {"WORLD_SIZE": "8", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true",
             "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            Backend(FSDP2, 8, keeps_gathered=True, offloads=True, checkpoints=True),
        ),
        (
            {"ACCELERATE_USE_FSDP": "1", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"},
            Backend(FSDP2, 1),
        ),
    ],
)  # fmt: skip
def test_the_backend_is_that_of_accelerate_launch(environment, expected):
    assert Backend.of_environment(environment) == expected


# ---- Against real steps ----


def kept_by_hooks(model: LlamaForCausalLM, ids: torch.Tensor) -> int:
    """Bytes of what autograd saves and of the hidden states themselves, every storage once, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()} | {ids.untyped_storage().data_ptr()}
    own |= {buffer.untyped_storage().data_ptr() for buffer in model.buffers()}
    found: dict[int, int] = {}
    alive = []

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor.detach()

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(remember, lambda t: t):
        remember(model.base_model(input_ids=ids).last_hidden_state)
    return sum(found.values())


@pytest.mark.parametrize("scheme", [None, "MXFP4", "MXFP4A16", "MXFP8"])
def test_what_is_kept_for_the_backward_pass_is_what_hooks_count(scheme):
    model = make_llama()
    if scheme:
        prepare_qat(model, {nn.Linear: scheme})
    model.config.use_cache = False
    real = kept_by_hooks(model.train(), torch.arange(128).view(2, 64))
    assert Estimator(skeleton(scheme)).estimate(PLAN).kept == pytest.approx(real, rel=0.01)


def test_transformed_inputs_are_estimated_as_they_are_computed():
    prepared = {
        "mapping": {nn.Linear: "MXFP4"},
        "input_transforms": {"*.down_proj": "hadamard", "*.o_proj": "hadamard"},
    }
    model = prepare_qat(make_llama().train(), **prepared)
    model.config.use_cache = False
    with torch.device("meta"):
        student = prepare_qat(make_llama(), **prepared)
    result = Estimator(student).estimate(PLAN)
    assert not result.rougher
    assert result.kept == pytest.approx(kept_by_hooks(model, torch.arange(128).view(2, 64)), rel=0.02)


def test_the_experts_of_a_mixture_are_estimated_and_their_layers_keep_what_hooks_count():
    model = prepare_qat(make_mixture().train(), {nn.Linear: "MXFP4"})
    model.config.use_cache = False
    with torch.device("meta"):
        student = prepare_qat(make_mixture(), {nn.Linear: "MXFP4"})
    result = Estimator(student).estimate(PLAN)
    assert not result.rougher
    assert result.kept == pytest.approx(kept_by_hooks(model, torch.arange(128).view(2, 64)), rel=0.02)


def peak_of_steps(scheme: str | None, distilled: bool, checkpointing: bool) -> int:
    """Bytes at the peak of two steps, as the CPU's allocator was asked for them."""
    gc.collect()  # tensors that earlier tests left in cycles would be freed, and so subtracted, during the steps
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = make_llama()
        teacher = FrozenTeacher(load_teacher(model, None), torch.device("cpu")) if distilled else None
        if scheme:
            prepare_qat(model, {nn.Linear: scheme})
        model.config.use_cache = False
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        attach(model.train(), find_head(model))
        ids = torch.arange(512).view(4, 128) % 260
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                rows = None if teacher is None else teacher.rows({"input_ids": ids, "labels": ids})
                objective = Objective(ids, rows, {"kl": 1.0} if distilled else {"ce": 1.0})
                loss = model(input_ids=ids, objective=objective)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    events = [(e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for _, change in sorted(events, key=lambda event: event[0]):
        live += change
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize(
    "scheme,distilled,checkpointing",
    [(None, False, False), ("MXFP4", False, False), ("MXFP4", True, False), ("MXFP4", False, True)],
)
def test_the_estimate_is_the_peak_of_a_real_step(scheme, distilled, checkpointing):
    plan = Plan(
        4, 128, device="cpu", teacher=COPY if distilled else "none", checkpointing=() if checkpointing else None
    )
    total = Estimator(skeleton(scheme)).estimate(plan).total
    assert total == pytest.approx(peak_of_steps(scheme, distilled, checkpointing), rel=0.05)


def test_two_parts_of_the_loss_have_the_peak_of_all(monkeypatch):
    plan = Plan(4, 1024, device="cpu", teacher=COPY)
    found = Estimator(skeleton(None)).estimate(plan)
    monkeypatch.delattr(_EveryToken, "parts")
    assert found.when == "loss" and found.total == pytest.approx(
        Estimator(skeleton(None)).estimate(plan).total, rel=1e-3
    )


def test_packed_rows_have_no_mask_of_tokens_by_tokens_but_for_sliding_windows_and_compilers(estimator):
    plan = Plan(1, 512, device="cpu")
    packed, masked = replace(plan, packed=True), replace(plan, packed=True, masked=True)
    kept = {p: dry_run(estimator.student, None, p).kept for p in (plan, packed, masked)}
    assert kept[packed] == kept[plan] and kept[masked] - kept[plan] >= 512 * 512
    assert estimator.estimate(packed).total < estimator.estimate(masked).total
    with torch.device("meta"):
        windows = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=128))
        whole = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=None))
    assert dry_run(windows, None, packed).kept - dry_run(whole, None, packed).kept >= 512 * 512
    two = remedies(replace(masked, batch=2), Available(False), lambda p: estimator.estimate(p), lambda _: True)
    (smaller,) = (remedy.plan for remedy, _ in two if "batch_size 1" in remedy.settings)
    assert smaller.masked and smaller.batch == 1


@pytest.mark.parametrize(
    ("words", "masked", "packed"),
    [
        ("--packing True", False, True),
        ("--packing True --torch_compile True", True, True),
        ("--per_device_train_batch_size 1", False, False),
        ("--per_device_train_batch_size 2 --torch_compile True", True, False),
    ],
)
def test_the_mask_of_a_plan_is_that_of_the_run(words, masked, packed):
    arguments = parse_arguments(["--model_name_or_path", "m", "--dataset", "d", "--do_train", "True", *words.split()])
    plan = plan_of(arguments, Backend(), "cpu")
    assert (plan.masked, plan.packed) == (masked, packed)


def test_accumulated_gradients_exist_while_activations_are_kept(estimator):
    plain, accumulated = (estimator.estimate(replace(PLAN, batch=8, accumulates=a)) for a in (False, True))
    assert accumulated.rows[GRADIENTS] == 4 * COUNT and accumulated.total > plain.total


def test_checkpointing_and_offload_keep_less(estimator):
    plans = [replace(PLAN, checkpointing=c) for c in (None, (), (("offload", True),))]
    plain, checkpointed, offloaded = (estimator.estimate(plan).kept for plan in plans)
    hidden = 2 * 64 * 64 * 4
    assert plain > checkpointed == offloaded + hidden  # that of the last layer comes back first


# ---- What cannot be run ----


class Peeking(LlamaForCausalLM):
    """A model whose code looks at values."""

    def forward(self, *args, **kwargs):
        raise AssertionError("the base model is called")

    @property
    def base_model(self):
        def peek(input_ids):
            if int(input_ids.sum()) > 0:
                raise AssertionError("fake tensors have no values")

        return peek


def test_a_model_that_looks_at_values_gets_a_rougher_estimate():
    student = skeleton("MXFP4")
    exact = Estimator(student).estimate(PLAN)
    student.__class__ = Peeking
    rough = Estimator(student).estimate(PLAN)
    assert "does not run without values" in rough.rougher[0] and not exact.rougher
    assert rough.rows[PARAMETERS] == exact.rows[PARAMETERS]
    assert 0.5 < rough.total / exact.total < 2


def test_an_unknown_optimizer_is_taken_for_adamw_and_said_so(estimator):
    result = estimator.estimate(replace(PLAN, optimizer="novel"))
    assert result.rows[STATES] == 8 * COUNT and "--optim novel" in result.rougher[0]


def test_the_skeleton_is_not_changed(estimator):
    before = {name: (p.dtype, p.device.type) for name, p in estimator.student.named_parameters()}
    estimator.estimate(replace(PLAN, checkpointing=(), master_dtype=torch.bfloat16))
    assert before == {name: (p.dtype, p.device.type) for name, p in estimator.student.named_parameters()}


# ---- Remedies and the program ----


def test_each_remedy_lowers_the_peak_and_the_last_one_fits(estimator):
    plan = replace(PLAN, batch=4, teacher=COPY)
    before, limit = estimator.estimate(plan).total, 15 * COUNT
    found = remedies(plan, Available(packed_base=True), estimator.estimate, lambda e: e.total <= limit)
    settings = [remedy.settings for remedy, _ in found]
    assert {"--per_device_train_batch_size 1", "--distill_teacher cache", "--activation_checkpointing True"} <= {
        *settings
    }
    assert all(result.total < before for remedy, result in found if "GPUs" not in remedy.settings)
    assert any(result.total <= limit for _, result in found)
    assert found[-1][0].plan.backend.name == FSDP2


def test_settings_that_do_not_exist_are_not_proposed(estimator):
    found = remedies(replace(PLAN, lora_r=4), Available(False), estimator.estimate, lambda e: False)
    assert not any(word in remedy.settings for remedy, _ in found for word in ("base_in", "master", "checkpointing"))


@pytest.mark.parametrize("change", [{}, {"teacher": SELF, "lora_r": 4}, {"in_backward": True}])
@pytest.mark.parametrize("backend", [Backend(), Backend(FSDP2, 2)])
def test_main_takes_what_is_proposed(monkeypatch, backend, change):
    words = "--model_name_or_path m --dataset d --do_train True --output_dir o --quant_scheme MXFP4 --distill True"
    words = [*words.split(), "--max_grad_norm", "0"]
    own = {"lora_r": ["--lora_r", "4"], "in_backward": ["--optimizer_in_backward", "True"]}
    words += [word for name in change for word in own.get(name, ())]
    if backend.shards:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "2")
    plan = replace(PLAN, **{"teacher": COPY, **change}, backend=backend)
    totals = itertools.count(10**6, -1)
    found = remedies(plan, Available(packed_base=True), lambda p: Estimate({"": next(totals)}, "", 0), lambda e: False)
    assert len(found) > 3
    for remedy, _ in found:
        if not any(word in remedy.settings for word in ("torchao", "fsdp")):  # not always installed; of accelerate
            parsed = parse_arguments([*words, *remedy.settings.split()])
            assert parsed.lora.base_in_scheme == remedy.plan.base_in_scheme
            assert parsed.distillation.distill_teacher == remedy.plan.teacher


def test_moments_without_masters_have_the_dtype_that_is_asked_for(estimator):
    narrow = replace(PLAN, master_dtype=torch.bfloat16)
    wide = replace(narrow, moment_dtype=torch.float32)
    assert [estimator.estimate(plan).rows[STATES] for plan in (narrow, wide)] == [4 * COUNT, 8 * COUNT]


def test_muon_keeps_one_moment_of_hidden_matrices_and_adamw_two_of_the_rest(estimator):
    norms = 2 * 2 * 64
    states = estimator.estimate(replace(PLAN, optimizer="muon")).rows[STATES]
    assert states == 4 * (2 * BLOCK - norms) + 8 * (REST + norms)


def test_a_packed_base_has_all_quantized_weights_with_an_adapter_or_without(estimator):
    linear = 2 * (BLOCK - 2 * 64)
    plan = replace(PLAN, lora_r=4, lora_target="q_proj", base_in_scheme=True)
    adapters = 4 * 2 * 4 * (64 + 64)
    assert estimator.estimate(plan).rows[PARAMETERS] == 2 * (COUNT - linear) + linear * 4.25 / 8 + adapters


def test_the_program_needs_config_json_alone_and_names_what_would_fit(tmp_path, capsys):
    make_llama().config.save_pretrained(tmp_path / "model")
    words = ["--model_name_or_path", str(tmp_path / "model"), "--dataset", "none.jsonl", "--do_train", "True"]
    words += ["--output_dir", str(tmp_path / "out"), "--quant_scheme", "MXFP4", "--model_max_length", "64"]
    program.main([*words, "--device_memory", "66MiB"])  # the workspaces of cuBLAS take 64
    text = capsys.readouterr().out
    assert "does not fit into 66 MiB of a GPU" in text and "Settings that need less" in text
    assert "accelerate_config/fsdp2.yaml on 2 GPUs" in text
    program.main([*words, "--device_memory", "80GiB", "--processes", "8"])
    text = capsys.readouterr().out
    assert "8 processes, fsdp2" in text and "fits into 80.0 GiB" in text and "need less" not in text
    assert not (tmp_path / "out").exists()


def test_the_device_is_this_machine_s_unless_another_is_asked_for():
    backend, device, rest = program._parse(["--max_steps", "2"])
    assert (backend.name, rest) == (ONE, ["--max_steps", "2"]) and device == program.device_here()
    backend, device, _ = program._parse(["--device_memory", "1.5 GB", "--backend", "fsdp1"])
    assert (backend, device.kind, device.memory) == (Backend(FSDP1, 1), "cuda", 1_500_000_000)


def test_main_logs_the_estimate_of_a_run(tmp_path, caplog):
    model, data = save_llama(tmp_path / "model"), write_conversations(tmp_path / "data.jsonl")
    words = (
        f"--model_name_or_path {model} --dataset {data} --output_dir {tmp_path / 'out'} --do_train True --max_steps 1"
    )
    with caplog.at_level(logging.INFO, logger="main"):
        main.main(f"{words} --eval_size 6 --report_to none --report False --model_max_length 64".split())
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Estimated peak memory of a process")]
    assert len(lines) == 1 and "optimizer states" in lines[0]


def test_the_phase_of_the_peak_is_named(estimator):
    assert estimator.estimate(replace(PLAN, batch=1, length=2)).when in (OPTIMIZER, BACKWARD)
    assert estimator.estimate(replace(PLAN, batch=8)).when == "loss"


def test_main_trains_where_no_estimate_can_be_made(monkeypatch):
    def fail(*args):
        raise AttributeError("'Config' object has no attribute 'hidden_size'\nsecond line")

    words = ["--model_name_or_path", "m", "--dataset", "d", "--do_train", "True", "--output_dir", "o"]
    monkeypatch.setattr(program, "estimator_of", fail)
    line = program.short_form(parse_arguments(words), make_llama())
    assert line == "No estimate of the peak memory: AttributeError: 'Config' object has no attribute 'hidden_size'"
