"""benchmarks/random_llama.py measures phases that are there, on checkpoints that are whole."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import phases, random_llama
from benchmarks.clock import Clock


def test_all_functions_that_begin_a_phase_exist():
    for names in phases.FUNCTIONS.values():
        for name in names:
            owner, attribute = phases.owner_of(name)
            assert callable(getattr(owner, attribute))


def test_a_phase_inside_another_one_is_not_counted_twice(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("benchmarks.clock.time", SimpleNamespace(time=lambda: now[0]))
    clock = Clock(99.0, "imports")
    with clock.phase("outer"):
        now[0] += 2
        with clock.phase("inner"):
            now[0] += 5
        now[0] += 3
    clock.begin("end")
    assert clock.seconds == {"imports": 1, "outer": 2 + 3, "inner": 5}


def test_a_replaced_function_still_gives_what_it_gave():
    class Thing:
        @classmethod
        def made(cls, x: int) -> tuple:
            return cls, x

    clock = Clock(time.time(), "imports")
    written = []
    clock.follow(Thing, "made", "made", after=lambda: written.append(dict(clock.intervals)))
    assert Thing.made(3) == (Thing, 3)
    assert "made" in clock.seconds and list(written[0]) == ["made"]


def test_a_phase_has_an_interval_with_what_is_nested_in_it_and_one_of_another_thread_counts_no_seconds():
    clock = Clock(time.time(), "imports")
    clock.end()
    with clock.phase("outer"), clock.phase("inner"), ThreadPoolExecutor(1) as pool:
        pool.submit(_wait_in, clock, "beside").result()
    outer, inner, beside = (clock.intervals[name] for name in ("outer", "inner", "beside"))
    assert outer[0] <= inner[0] <= beside[0] <= beside[1] <= inner[1] <= outer[1]
    assert "beside" not in clock.seconds and clock.seconds["inner"] >= beside[1] - beside[0] >= 0.019
    assert clock.intervals["imports"][1] <= outer[0]


def _wait_in(clock: Clock, name: str) -> None:
    with clock.phase(name):
        time.sleep(0.02)


def test_the_model_is_a_whole_checkpoint_with_finite_random_weights_and_a_tokenizer_of_its_vocabulary(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(random_llama.SHAPES, "small", (64, 96, 2, 2, 1, 32, 600, False))
    monkeypatch.setattr(random_llama, "SHARD_BYTES", 50_000)
    count = random_llama.write_model("small", tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.dtype == torch.bfloat16 and sum(p.numel() for p in model.parameters()) == count
    weights = [p for p in model.parameters() if p.ndim == 2]
    assert all(0.01 < float(p.detach().float().std()) < 0.03 for p in weights)
    assert len({p.flatten()[:8].sum().item() for p in weights}) == len(weights)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert len(tokenizer) == 600
    assert tokenizer.decode(tokenizer("What is 2 plus 3?")["input_ids"]) == "What is 2 plus 3?"
