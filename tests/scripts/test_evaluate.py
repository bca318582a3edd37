"""The local lm_eval tasks, and folders side by side."""

from __future__ import annotations

import json
import logging
import logging.config
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, make_tokenizer, save_llama, save_qat
from tiny_families import save_family
from torch.utils import collect_env
from transformers import AutoModelForCausalLM, AutoTokenizer

from qat.checkpoints.pack import export_checkpoint
from qat.errors import UserError

SCRIPTS = ROOT / "scripts"
sys.path[:0] = [str(SCRIPTS), str(SCRIPTS / "tasks")]

import evaluate  # noqa: E402
import local_data  # noqa: E402
import vllm_log  # noqa: E402

# As vLLM 0.32 wrote them, on a CPU: the second kernel is the plugin's.
LINES = {
    "INT4_G32": [
        "Using max model len 128",
        "Using CPUWNA16LinearKernel for mixed-precision linear",
        "Using CPUWNA16LinearKernel for CompressedTensorsWNA16",
        "Using LBHNC KV cache layout.",
    ],
    "MXFP4": ["Using ExactMxfp4LinearKernel for MXFP4 GEMM"],
    "FP8": ["Selected ChannelWiseTorchFP8ScaledMMLinearKernel for CompressedTensorsW8A8Fp8"],
    "none": ["Using max model len 128", "Using LBHNC KV cache layout."],
}


@pytest.fixture(autouse=True)
def nothing_asked_of_the_machine(monkeypatch):
    """lm_eval adds to each result what `pip list`, `lscpu` and ten other programs say."""
    monkeypatch.setattr(collect_env, "get_pretty_env_info", lambda: "not asked")


@pytest.fixture
def log_configuration(monkeypatch):
    """The environment as it was, and the logger of vLLM without the handlers that a test gave it."""
    monkeypatch.setenv(vllm_log.CONFIG_VARIABLE, "")
    yield
    for handler in list(logging.getLogger("vllm").handlers):
        logging.getLogger("vllm").removeHandler(handler)
        handler.close()


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


def test_a_packed_folder_whose_inputs_are_transformed_is_evaluated_with_the_transforms(tmp_path, monkeypatch):
    qat = save_qat(tmp_path / "qat", {"torch.nn.Linear": "MXFP4"}, input_transforms={"*.down_proj": "hadamard"})
    packed = export_checkpoint(qat, tmp_path / "packed")
    (tmp_path / "text.txt").write_text("Explicit is better than implicit.\n" * 3)
    flags = ["--tasks", "local_text", "--text", str(tmp_path / "text.txt"), "--output", str(tmp_path / "r.json")]
    evaluate.main([str(qat), str(packed), *flags])
    results = json.loads((tmp_path / "r.json").read_text())
    assert "inputs transformed by compressed-tensors" in results[str(packed)]["model"]
    evaluate.main([str(qat), *flags, "--input_rule", "even"])  # that of transformers
    results |= json.loads((tmp_path / "r.json").read_text())
    assert len({result["results"]["local_text"]["bits_per_byte"] for result in results.values()}) == 1
    evaluate.main([str(packed), *flags, "--input_rule", "even"])  # by this program's operators
    (own,) = json.loads((tmp_path / "r.json").read_text()).values()
    assert own["results"]["local_text"] == results[str(packed)]["results"]["local_text"]
    monkeypatch.setattr(evaluate, "_import_vllm_model", lambda: lambda **options: options["pretrained"])
    args = evaluate.parse([str(packed), "--backend", "vllm"])
    assert evaluate.make_vllm(str(packed), args) == ("packed, in vLLM", str(packed))


@pytest.mark.parametrize(
    ("flags", "message"),
    [(("nowhere",), "not a checkpoint folder"), (("{qat}", "--backend", "vllm"), "vLLM would run it in BF16")],
)
def test_what_cannot_be_evaluated_is_refused(tmp_path, capsys, flags, message):
    qat = save_qat(tmp_path / "qat", {"torch.nn.Linear": "MXFP4"})
    with pytest.raises(SystemExit):
        evaluate.parse([flag.format(qat=qat) for flag in flags])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("scheme,remedy", [("MXFP4", "vllm, or --input_rule"), ("MXFP4A16", "vllm$")])
def test_a_good_folder_that_transformers_cannot_load_is_not_called_damaged(tmp_path, scheme, remedy):
    packed = export_checkpoint(save_family("granitemoe", tmp_path / "source"), tmp_path / "packed", scheme=scheme)
    make_tokenizer().save_pretrained(packed)
    message = f"cannot load it, though it is in order: it reads the experts in .* --backend {remedy}"
    with pytest.raises(UserError, match=message):
        evaluate.main([str(packed), "--tasks", "local_text", "--limit", "1"])


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


@pytest.mark.parametrize(
    ("lines", "kernels"),
    [
        (LINES["INT4_G32"], "CPUWNA16LinearKernel"),
        (LINES["INT4_G32"] + LINES["MXFP4"], "CPUWNA16LinearKernel, ExactMxfp4LinearKernel"),
        (LINES["FP8"], "ChannelWiseTorchFP8ScaledMMLinearKernel"),
        (["Using MarlinExperts for MXFP4 MoE"], "MarlinExperts"),
        (["Using ExactExperts for MXFP4 MoE"], "ExactExperts"),
        (LINES["none"], "not found in vLLM's log"),
    ],
)
def test_kernels_are_found_in_recorded_lines_of_vllms_log(lines, kernels):
    head = "(EngineCore pid=7) INFO 11-26 14:41:38 [__init__.py:923] "
    assert vllm_log.kernels_in("".join(f"{head}{line}\n" for line in lines)) == kernels


def test_the_kernel_of_each_folder_stands_beside_its_figures(tmp_path, monkeypatch, capsys, log_configuration):
    plain = save_llama(tmp_path / "plain")
    folders = {name: export_checkpoint(plain, tmp_path / name, scheme="MXFP4") for name in ("MXFP4", "none")}

    def fake_vllm(pretrained, **_):
        """vLLM's own way: a process configures its log from the file that the environment names."""
        logging.config.dictConfig(json.loads(Path(os.environ[vllm_log.CONFIG_VARIABLE]).read_text()))
        for line in LINES.get(Path(pretrained).name, []):
            logging.getLogger("vllm.model_executor.kernels.linear").info(line)

    def fake_lm_eval(**_):
        return {"results": {"local_text": {"bits_per_byte,none": 1.5}}}

    monkeypatch.setattr(evaluate, "_import_vllm_model", lambda: fake_vllm)
    monkeypatch.setattr(evaluate, "check", lambda args: None)
    monkeypatch.setattr("lm_eval.simple_evaluate", fake_lm_eval)
    words = [str(folders["MXFP4"]), str(folders["none"]), str(plain)]
    evaluate.main([*words, "--backend", "vllm", "--tasks", "local_text", "--output", str(tmp_path / "r.json")])
    results = json.loads((tmp_path / "r.json").read_text())
    found = [results[word]["kernel"] for word in words]
    assert found == ["ExactMxfp4LinearKernel", "not found in vLLM's log", "not quantized"]
    title, *rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("folder", str(tmp_path)))]
    assert "evaluated as     kernel" in title and "bits_per_byte" in title
    assert [kernel in row for kernel, row in zip(found, rows, strict=True)] == [True] * 3


def test_a_log_that_the_user_configured_stays_as_it_is(monkeypatch, caplog):
    monkeypatch.setenv(vllm_log.CONFIG_VARIABLE, "own.json")
    assert vllm_log.kernels_in(vllm_log.VllmLog().new_lines()) == vllm_log.NOT_FOUND
    assert os.environ[vllm_log.CONFIG_VARIABLE] == "own.json" and "own.json configures vLLM's log" in caplog.text
