"""The local lm_eval tasks, and folders side by side."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from helpers import ROOT, save_llama, save_qat
from transformers import AutoModelForCausalLM, AutoTokenizer

from qat.checkpoints.pack import export_checkpoint

SCRIPTS = ROOT / "scripts"
sys.path[:0] = [str(SCRIPTS), str(SCRIPTS / "tasks")]

import evaluate  # noqa: E402
import local_data  # noqa: E402


def test_choices_hold_the_answer_once_and_are_the_same_every_time():
    rows = local_data.choices()["test"]
    assert len(rows) == local_data.HELD_OUT and rows.to_list() == local_data.choices()["test"].to_list()
    answers = {question: " ".join(answer.split())[:160] for question, answer in local_data._held_out()}
    for row in rows:
        assert len(row["choices"]) == 4 and row["choices"][row["label"]] == answers[row["question"]]
    assert {row["label"] for row in rows} == {0, 1, 2, 3}


def test_calibration_samples_are_those_that_the_tasks_do_not_hold_out(tmp_path):
    local_data.write_calibration(tmp_path / "calibration.jsonl")
    texts = [json.loads(line)["text"] for line in (tmp_path / "calibration.jsonl").read_text().splitlines()]
    held_out = {f"{question}\n{answer}" for question, answer in local_data._held_out()}
    assert len(texts) > 1000 and held_out.isdisjoint(texts)


def test_bits_per_byte_of_a_text_is_what_the_models_own_likelihood_says(tmp_path):
    folder = save_llama(tmp_path / "model")
    text = "Simple is better than complex.\n"
    (tmp_path / "text.txt").write_text(text)
    flags = ["--tasks", "local_text", "--text", str(tmp_path / "text.txt"), "--output", str(tmp_path / "r.json")]
    evaluate.main([str(folder), *flags])
    found = json.loads((tmp_path / "r.json").read_text())[str(folder)]["results"]["local_text"]["bits_per_byte"]

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(tokenizer.bos_token + text, return_tensors="pt").input_ids
    log_probabilities = model(ids).logits[0, :-1].float().log_softmax(-1)
    nats = -log_probabilities.gather(-1, ids[0, 1:, None]).sum().item()
    assert found == pytest.approx(nats / math.log(2) / len(text), rel=1e-2)


def test_folders_of_three_kinds_stand_side_by_side(tmp_path, capsys):
    plain = save_llama(tmp_path / "plain")
    qat = save_qat(tmp_path / "qat", {"torch.nn.Linear": "MXFP4"})
    packed = export_checkpoint(qat, tmp_path / "packed")
    (tmp_path / "text.txt").write_text("Explicit is better than implicit.\n" * 3)
    flags = ["--tasks", "local_text", "--text", str(tmp_path / "text.txt"), "--output", str(tmp_path / "r.json")]
    evaluate.main([str(plain), str(qat), str(packed), *flags])
    table, results = capsys.readouterr().out, json.loads((tmp_path / "r.json").read_text())
    for folder, said in ((plain, "BF16"), (qat, "fake-quantized"), (packed, "packed, in transformers")):
        assert f"{folder}" in table and said in table and said in results[str(folder)]["model"]

    evaluate.main([str(qat), str(packed), *flags, "--input_rule", "even"])
    under_even = json.loads((tmp_path / "r.json").read_text())
    values = {r["results"]["local_text"]["bits_per_byte"] for r in under_even.values()}
    assert len(values) == 1  # the packed folder is the fake-quantized model
    assert values == {results[str(packed)]["results"]["local_text"]["bits_per_byte"]}  # and transformers applies EVEN


@pytest.mark.parametrize(
    ("flags", "message"),
    [(("nowhere",), "not a checkpoint folder"), (("{qat}", "--backend", "vllm"), "vLLM would run it in BF16")],
)
def test_what_cannot_be_evaluated_is_refused(tmp_path, capsys, flags, message):
    qat = save_qat(tmp_path / "qat", {"torch.nn.Linear": "MXFP4"})
    with pytest.raises(SystemExit):
        evaluate.parse([flag.format(qat=qat) for flag in flags])
    assert message in capsys.readouterr().err


def test_a_missing_text_is_named():
    with pytest.raises(ValueError, match="--text 'nowhere.txt' is not a file"):
        local_data.text("nowhere.txt")
    assert torch.tensor([len(document) for document in local_data._cut("line\n" * 2000)]).max() <= 4004


def test_what_vllm_would_load_is_checked_before(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(evaluate, "_import_vllm_model", lambda: lambda **options: made.append(options))
    plain = save_llama(tmp_path / "plain")
    packed = export_checkpoint(plain, tmp_path / "packed", scheme="MXFP4")
    for folder in (plain, packed):
        args = evaluate.parse([str(folder), "--backend", "vllm"])
        evaluate.make_vllm(str(folder), args)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
        with pytest.raises(ValueError, match="lacks 9 tensors of LlamaForCausalLM"):
            evaluate.make_vllm(str(folder), args)
    assert [options["trust_remote_code"] for options in made] == [False, False]
