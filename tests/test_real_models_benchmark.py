"""benchmarks/real_models.py: a small table from end to end, in pieces that resume."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import make_llama, make_tokenizer, write_conversations

from benchmarks import real_models, real_quantized, real_report, real_rows, real_training, training_data
from benchmarks.real_rows import ALL, MAIN, is_row, row_of
from benchmarks.tasks.divergence import kl_on_answers
from benchmarks.tasks.generation import answers, as_chat
from main import parse_arguments
from qat import prepare_qat
from qat.checkpoints.pack import export_checkpoint
from qat.errors import UserError
from qat.layers.sites import quantized_sites
from training.arguments.model import ModelArguments
from training.start.loading import load_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{{ '<assistant>' if add_generation_prompt }}"
)

SHORT = "mxfp4-2"  # a row that is soon trained


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A tiny model, problems, texts and questions; the teacher answers at once."""
    model, tokenizer = make_llama(), make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    rows = [{"generator": "gcd", "question": f"What is {number}?", "answer": str(number)} for number in range(40)]
    for name in (*real_models.TASKS, "training"):
        (tasks / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("text_mixed", "text_never"):
        (tasks / f"{name}.txt").write_text("Readability counts. " * 40)
    answered = [0]

    def generate(model, tokenizer, questions, max_new_tokens, batch_size, seed=None):
        answered[0] += len(questions)
        return [(question[8:-1].split("?")[0], True) for question in questions]

    monkeypatch.setattr(training_data, "generate", generate)
    monkeypatch.setattr(training_data, "read_python_docs", list)
    monkeypatch.setattr(training_data, "requests", list)
    monkeypatch.setattr(
        real_models, "answers", lambda model, tokenizer, questions, *_: [f"{q[8:10]}" for q in questions]
    )
    monkeypatch.setitem(real_models.TASKS, "gsm8k", replace(real_models.TASKS["gsm8k"], max_new_tokens=8))
    return tmp_path, answered


def test_a_table_from_the_model_to_the_csv(folders, capsys):
    root, answered = folders
    words = ["--model", str(root / "model"), "--out", str(root / "out"), "--tasks", str(root / "tasks")]
    words += ["--rows", f"bf16,mxfp4-rtn,mxfp4-rtn-smoothed,{SHORT}", "--figures", "gsm8k,text_never,gsm8k_answers"]
    words += ["--limit", "3"]
    words += ["--length", "128", "--batch_size", "2", "--train_batch_size", "1"]
    real_models.main([*words, "--minutes", "0.0001"])
    said = capsys.readouterr().out
    assert "give the same command again, with --minutes 4 or more, which a training needs" in said and answered[0] <= 40
    real_models.main(words)
    output = capsys.readouterr().out
    assert "all is done" in output and "Baseline: " in output
    with (root / "out" / "real_models.csv").open() as file:
        lines = {(line["row"], line["figure"]): line for line in csv.DictReader(file)}
    assert len(lines) == 12 and float(lines["mxfp4-rtn", "gsm8k_answers"]["kl"]) > 0
    (data,) = (root / "out" / "training").glob("*.jsonl")
    assert {(row == "bf16", line["data"]) for (row, _), line in lines.items()} == {(True, ""), (False, data.stem)}
    assert (
        lines["bf16", "gsm8k_answers"]["value"] == "0"
        and lines[SHORT, "gsm8k"]["value"] == "1"
        and lines[SHORT, "gsm8k"]["count"] == "3"
    )
    assert lines["bf16", "text_never"]["kl"] == "0" and float(lines["mxfp4-rtn", "text_never"]["kl"]) > 0
    assert lines["mxfp4-rtn", "text_never"]["kl"] != lines["mxfp4-rtn-smoothed", "text_never"]["kl"]
    assert int(lines[SHORT, "text_never"]["tokens"]) > 0 and lines[SHORT, "text_never"]["steps"] == "2"
    assert not (root / "out" / "rows" / SHORT / "trained").exists()  # measured, so it is removed
    assert "2 steps, " in output and " minutes\n" in output
    count = answered[0]
    real_models.main(words)
    assert answered[0] == count and len((root / "out" / "real_models.csv").read_text().splitlines()) == 13


@pytest.mark.parametrize(
    "key",
    [
        *(key for key in ALL if row_of(key).recipe),
        "mxfp4-600+chat+kl+all+x4~3e-6@4",
        "mxfp4fp8-2+hadamard+auto",
        "mxfp4-9+plain+half-ce",
    ],
)
def test_the_arguments_of_every_trained_row_parse(key, folders):
    root, _ = folders
    (root / "data.jsonl").write_text("{}\n")

    args = SimpleNamespace(learning_rate=5e-5, train_batch_size=4, length=64)
    words = real_training.flags(key, root / "model", root / "rows" / key / "trained", root / "data.jsonl", args)
    arguments = parse_arguments(words)
    row = row_of(key)
    assert arguments.training.max_steps == row.steps and arguments.training.seed == row.seed
    assert arguments.training.learning_rate == (1e-5 if "reference" in key else 3e-6 if "~3e-6" in key else 5e-5)
    assert arguments.quantization.quant_scheme == key.split("-")[0].upper()
    assert arguments.distillation.distill == ("reference" not in key)
    assert arguments.quantization.weight_init == ("gptq" if "gptq" in key else "none")
    assert arguments.training.gradient_accumulation_steps == (4 if "x4" in key else 1)
    assert (arguments.distillation.distill_ce_weight == 0) == ("+kl" in key or "reference" in key)
    sampled = (None, None)  # the recipe's are no part of another row
    for variant, name in (("samples", "teacher:500"), ("chat", "chat:1000")):
        sampled = (name, 64) if variant in key else sampled
    assert (arguments.distillation.distill_generic, arguments.distillation.distill_generic_length) == sampled


@pytest.mark.parametrize(
    "key",
    [
        "mxfp4-rtn~1e-5",
        "bf16@3",
        "mxfp4-150@3~1e-5",
        "mxfp4-150~0",
        "mxfp4-150~1e5",
        "mxfp4",
        "mxfp4-0",
        "mxfp4-9+no",
        "mxfp4-09",
        "mxfp4-9@2",
        "mxfp4-9+gptq+gptq",
        "mxfp4-9+samples+chat",
        "mxfp4-9+plain+auto",
        "mxfp4-rtn+gptq",
        "nosuch",
    ],
)
def test_a_key_without_a_row_is_refused(key):
    assert not is_row(key)


def test_the_divergence_on_answers_is_that_of_the_teachers_own_tokens_behind_the_question():
    torch.manual_seed(1)
    tokenizer, teacher, model = make_tokenizer(), make_llama().eval(), make_llama(layers=1).eval()
    tokenizer.chat_template, tokenizer.pad_token = TEMPLATE, "</s>"
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(3)
    questions = ["How many legs have 3 ants?", "Write a function."]
    texts, expected = answers(teacher, tokenizer, questions, 9, 2), []
    assert kl_on_answers(teacher, teacher, tokenizer, questions, texts)["value"] == 0
    found = kl_on_answers(model, teacher, tokenizer, questions, texts)
    for question, text in zip(questions, texts, strict=True):
        prompt = tokenizer(as_chat(tokenizer, question), add_special_tokens=False)["input_ids"]
        ids = torch.tensor([prompt + tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            p, q = (m(ids).logits[0, len(prompt) - 1 : -1].double().softmax(-1) for m in (teacher, model))
        expected.append((p * (p / q).log()).sum(-1).mean().item())
    assert found["value"] == pytest.approx(sum(expected) / 2, rel=1e-4)
    assert found["error"] == pytest.approx(abs(expected[0] - expected[1]) / 2, rel=1e-3)


def test_figures_of_other_settings_are_not_taken_for_those_of_a_row(folders):
    root, _ = folders
    out = root / "out"
    words = ["--model", str(root / "model"), "--out", str(out), "--tasks", str(root / "tasks"), "--figures", "gsm8k"]
    table = real_models.Table(real_models.parse([*words, "--rows", f"{MAIN},bf16"]))
    for key in (MAIN, "bf16", MAIN):
        table.check_settings(key)
    (out / "rows" / "mxfp4-300").mkdir()
    (out / "rows" / "mxfp4-300" / "gsm8k.json").write_text("{}")
    with pytest.raises(UserError, match="mxfp4-300 was measured with another row: not noted"):
        table.check_settings("mxfp4-300")
    table.args.learning_rate = 3e-4
    table.check_settings("bf16")
    with pytest.raises(UserError, match=rf"{MAIN} was measured with another learning_rate: 1e-05, not 0.0003; remove"):
        table.check_settings(MAIN)
    table.check_settings("mxfp4-150~3e-6")  # whose rate is its own
    table.args.learning_rate = 3e-5
    table.check_settings("mxfp4-150~3e-6")
    table.check_settings("mxfp4-ptq")
    table.args.questions = 8  # of the text that smooths it
    with pytest.raises(UserError, match="mxfp4-ptq was measured with another questions: None, not 8; remove"):
        table.check_settings("mxfp4-ptq")
    table.args.questions, table.args.written = None, 2
    with pytest.raises(UserError, match="mxfp4-ptq was measured with another written: None, not 2; remove"):
        table.check_settings("mxfp4-ptq")


def test_a_recipe_that_was_changed_is_another_row(tmp_path, monkeypatch):
    before = real_rows.settings_text(MAIN)
    recipe = (real_rows._RECIPES / "mxfp4.yaml").read_text()
    monkeypatch.setattr(real_rows, "_RECIPES", tmp_path)
    (tmp_path / "mxfp4.yaml").write_text("# a comment more\n" + recipe)
    assert real_rows.settings_text(MAIN) == before
    (tmp_path / "mxfp4.yaml").write_text(recipe.replace("distill_ce_weight: 0.2", "distill_ce_weight: 0.1"))
    assert real_rows.settings_text(MAIN) != before


def test_a_figure_more_of_a_row_whose_model_was_removed_is_an_error_with_a_remedy(folders):
    root, _ = folders
    words = ["--model", str(root / "model"), "--out", str(root / "out"), "--tasks", str(root / "tasks")]
    table = real_models.Table(real_models.parse([*words, "--rows", MAIN, "--figures", "gsm8k"]))
    with pytest.raises(UserError, match=rf"{MAIN}/trained was removed .* remove .*{MAIN} to train .* with --rows"):
        table.model_of(MAIN)


def test_a_quick_try_leaves_nothing_that_a_full_call_would_take_for_its_own(folders):
    root, answered = folders
    words = ["--model", str(root / "model"), "--out", str(root / "out"), "--tasks", str(root / "tasks")]
    words += ["--length", "128", "--figures", "gsm8k"]
    real_models.main([*words, "--rows", "bf16", "--limit", "3", "--batch_size", "2"])
    with pytest.raises(UserError, match="bf16 was measured with another limit: 3, not None; remove the folder"):
        real_models.main([*words, "--rows", "bf16"])
    tables = [real_models.Table(real_models.parse([*words, "--questions", count])) for count in ("3", "5")]
    for table in tables:
        table.write_base()
    files = [table.training_file() for table in tables]
    assert files[0] != files[1] and answered[0] == 8 and tables[0].training_file() == files[0]


def test_questions_of_other_kinds_make_another_training_file(folders, monkeypatch):
    root, _ = folders
    words = ["--model", str(root / "model"), "--out", str(root / "out"), "--tasks", str(root / "tasks")]
    problem = "Mara has 12 red beads and buys 3 bags of 7 blue beads. How many beads has she got?"

    def generate(model, tokenizer, questions, *_):
        return [(q[8:-1].split("?")[0] if q.startswith("What is") else problem, True) for q in questions]

    monkeypatch.setattr(training_data, "generate", generate)
    row = {"request": "Write a problem.", "kind": "number"}
    monkeypatch.setattr(training_data, "requests", lambda times=0: [row] * times)
    all_kinds, written = (
        real_models.Table(real_models.parse([*words, "--questions", "2", *more])) for more in ([], ["--written", "2"])
    )
    all_kinds.write_base()
    written.write_base()
    asked = [json.loads(row)["messages"][0]["content"] for row in written.training_file().read_text().splitlines()]
    assert [problem in question for question in asked] == [True]  # no question twice
    assert "What is" in all_kinds.training_file().read_text()
    with pytest.raises(UserError, match="--questions 3 are more than the 2 .*; give a larger --written, or leave out"):
        real_models.parse([*words, "--rows", "mxfp4-ptq", "--questions", "3", "--written", "2"])
    assert written.training_file() != all_kinds.training_file() and written.training_file_is_there()


def test_answers_in_pieces_of_another_batch_size_are_given_again(folders):
    root, _ = folders
    words = ["--model", str(root / "model"), "--out", str(root / "out"), "--tasks", str(root / "tasks")]
    words += ["--rows", "bf16", "--figures", "gsm8k", "--batch_size"]
    piece = root / "out" / "rows" / "bf16" / "gsm8k"
    table = real_models.Table(real_models.parse([*words, "32"]))
    table.run()
    (piece.with_suffix(".json")).unlink()
    (piece / "000032.json").unlink()
    table = real_models.Table(real_models.parse([*words, "16"]))
    table.run()
    assert len(json.loads(piece.with_suffix(".json").read_text())["right"]) == 40


def test_a_folder_of_another_model_is_refused(folders):
    root, _ = folders
    words = ["--out", str(root / "out"), "--tasks", str(root / "tasks"), "--rows", "bf16", "--figures", "gsm8k"]
    real_models.main(["--model", str(root / "model"), *words])
    shutil.copytree(root / "model", root / "other")
    with pytest.raises(UserError, match="is of another model, .*model, and not of .*other; give another folder"):
        real_models.main(["--model", str(root / "other"), *words])


@pytest.mark.parametrize("key", [key for key in ALL if row_of(key).quantized and not row_of(key).iterations])
def test_every_row_without_training_quantizes_a_model(key, folders):
    root, _ = folders
    data = root / "data.jsonl"
    write_conversations(data, 4)
    tokenizer = real_models.load_tokenizer(real_models.ModelArguments(str(root / "model")), 128)
    ids, plain = torch.arange(2, 66)[None], real_models.trained(root / "model", "cpu")
    model = real_models.prepared(row_of(key).quantized, root / "model", data, tokenizer, "cpu")
    with torch.no_grad():
        error = (model(ids).logits - plain(ids).logits).norm() / plain(ids).logits.norm()
    assert 0 < error < 0.5


# main.py as far as `train` sees it: it waits for SIGTERM, keeps what it has, and goes on with it the next time.
STUB = """
import json, pathlib, signal, sys, time
out = pathlib.Path(sys.argv[1])
if not (out / "checkpoint").exists():
    def stop(*_):
        out.mkdir()
        (out / "checkpoint").touch()
        sys.exit(143)
    signal.signal(signal.SIGTERM, stop)
    (out.parent / "started").touch()
    time.sleep(60)
    sys.exit(1)
history = [{"labelled_tokens": 5, "generic_tokens": 2}, {"x": 1}]
(out / "trainer_state.json").write_text(json.dumps({"log_history": history}))
"""


@pytest.mark.parametrize("ended_by", ["deadline", "SIGTERM"])
def test_a_training_that_is_ended_goes_on_in_the_next_call_and_its_minutes_add_up(ended_by, tmp_path, monkeypatch):
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.setattr(real_training, "MAIN", tmp_path / "stub.py")
    monkeypatch.setattr(real_training, "_SAVING_S", 0)
    folder, handler = tmp_path / "row", signal.getsignal(signal.SIGTERM)

    def end():
        while not (folder / "started").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    def once(seconds):
        real_training.train(MAIN, folder, lambda _: [str(folder / "trained")], time.monotonic() + seconds)

    killer = threading.Thread(target=end)
    if ended_by == "SIGTERM":
        killer.start()
    with pytest.raises(real_training.OutOfTime):
        once(1.5 if ended_by == "deadline" else 50)
    assert not (folder / "trained.json").exists() and signal.getsignal(signal.SIGTERM) is handler
    once(50)
    figures, seconds = json.loads((folder / "trained.json").read_text()), (folder / "seconds.txt").read_text().split()
    assert len(seconds) == 2 and figures["train_minutes"] == pytest.approx(sum(map(float, seconds)) / 60)
    assert figures["tokens"] == 7 and figures["steps"] == row_of(MAIN).steps


def test_the_table_has_what_is_recovered_minutes_and_the_spread_of_seeds(tmp_path):
    def write(key, name, content):
        (tmp_path / "rows" / key).mkdir(parents=True, exist_ok=True)
        (tmp_path / "rows" / key / f"{name}.json").write_text(json.dumps(content))

    for key, value in {"bf16": 0.6, "mxfp4-rtn": 0.4, MAIN: 0.5, f"{MAIN}@3": 0.54}.items():
        write(key, "gsm8k", {"value": value, "error": 0.01})
    write(MAIN, "trained", {"steps": 150, "train_minutes": 2.5, "tokens": 12345})
    table = real_report.lines(tmp_path, [MAIN, f"{MAIN}@3", "mxfp8-150"], ["gsm8k", "text_never"])
    title = row_of(MAIN).title
    assert table == [
        f"{title}: gsm8k 50.0 +- 1.0 / 50%; 150 steps, 12,345 tokens, 2.5 minutes",
        f"{title}, seed 3: gsm8k 54.0 +- 1.0 / 70%",
        f"{row_of('mxfp8-150').title}: not measured",
        f"{title}, mean and standard deviation over seeds: gsm8k 52.0 +- 2.8 (2 seeds)",
    ]


@pytest.mark.parametrize(
    ("scheme", "transform"),
    [("MXFP4", None), ("MXFP4", "hadamard"), ("MXFP4FP8", None), ("MXFP8", None), ("INT4_G32", None)],
)
def test_a_model_with_rounded_weights_computes_the_same(scheme, transform):
    model = make_llama(layers=1).to(torch.bfloat16).eval()
    with torch.no_grad():
        plain = model(torch.arange(2, 66)[None]).logits
        prepare_qat(model, {torch.nn.Linear: scheme}, input_transforms=transform)
        wanted = model(torch.arange(2, 66)[None]).logits
        assert not torch.equal(wanted, plain)
        assert torch.equal(real_quantized.round_weights(model)(torch.arange(2, 66)[None]).logits, wanted)


def test_processes_that_share_the_questions_make_the_file_that_one_makes(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(training_data, "PIECE", 2)
    model, rows = make_llama(layers=1), [{"question": f"What is {n}?", "answer": str(n)} for n in range(7)]
    files = [training_data.make(model, None, rows, tmp_path / "one", 2, avoided=set())]
    files += [
        training_data.make(model, None, rows, tmp_path / "two", 2, share=(number, 3), avoided=set())
        for number in (2, 0, 1)
    ]
    assert files[1:3] == [None, None]
    assert files[0].read_bytes() == files[3].read_bytes() and len(files[0].read_text().splitlines()) == 7


def test_a_folder_of_a_row_that_is_no_more_does_not_stop_the_table(tmp_path):
    for key in ("mxfp4-rtn", "gone"):
        (tmp_path / "rows" / key).mkdir(parents=True)
        (tmp_path / "rows" / key / "gsm8k.json").write_text(json.dumps({"value": 0.5, "error": 0.1}))
    real_report.write_csv(tmp_path, ["gsm8k"])
    lines = (tmp_path / "real_models.csv").read_text().splitlines()
    assert len(lines) == 2 and lines[1].startswith("mxfp4-rtn,")


def test_autoround_ends_at_the_deadline(tmp_path):
    began = time.monotonic()
    with pytest.raises(UserError, match="AutoRound did not end within the 0.005 minutes left"):
        real_quantized._status([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log", 0.3)
    assert time.monotonic() - began < 20
    assert real_quantized._status([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log", 60) == 3


def test_the_training_is_there_before_its_checkpoint_goes(tmp_path, monkeypatch):
    stub = "import json, pathlib, sys; out = pathlib.Path(sys.argv[1]); (out / 'checkpoint-2').mkdir(parents=True); "
    stub += "(out / 'trainer_state.json').write_text(json.dumps({'log_history': []}))"
    (tmp_path / "stub.py").write_text(stub)
    monkeypatch.setattr(real_training, "MAIN", tmp_path / "stub.py")
    seen = []
    monkeypatch.setattr(
        real_training.shutil,
        "rmtree",
        lambda path: seen.append((path.name, (path.parents[1] / "trained.json").exists())),
    )
    real_training.train(MAIN, tmp_path / "row", lambda _: [str(tmp_path / "row" / "trained")], time.monotonic() + 900)
    assert seen == [("checkpoint-2", True)]


def test_recovered_is_the_part_of_the_way_back():
    assert real_report.recovered(0.5, 0.4, 0.6) == pytest.approx(0.5)
    assert real_report.recovered(1.2, 1.4, 1.0) == pytest.approx(0.5)  # bits per byte: less is better


def test_the_row_of_autoround_computes_with_its_weights_and_even_inputs(folders, monkeypatch):
    root, _ = folders
    row, asked = row_of("mxfp4-autoround"), []
    rows = [{"role": "user", "content": "What is 1?"}, {"role": "assistant", "content": "1, of course"}]
    (root / "data.jsonl").write_text((json.dumps({"messages": rows}) + "\n") * 40)
    tokenizer = load_tokenizer(ModelArguments(str(root / "model")), 64)

    def run(words, log, seconds):  # AutoRound rounds to nearest here
        asked.append(words)
        source, target = words[words.index("--model") + 1], Path(words[words.index("--output_dir") + 1])
        export_checkpoint(source, target / "smoothed-w4", "auto_round", scheme="MXFP4_RCEIL")
        return 0

    monkeypatch.setattr(real_quantized, "_status", run)
    arguments = (row, root / "model", root / "row", root / "data.jsonl", tokenizer)
    with pytest.raises(real_training.OutOfTime):
        real_quantized.autorounded(*arguments, time.monotonic() + 10)
    model = real_quantized.autorounded(*arguments, time.monotonic() + 600)
    assert {site.module.input_quantizer.spec.rule for site in quantized_sites(model)} == {"even"}
    assert all(site.module.weight_quantizer.is_baked for site in quantized_sites(model))
    assert asked[0][asked[0].index("--iters") + 1] == "200"
    real_quantized.autorounded(*arguments, time.monotonic())  # it is there
    assert len(asked) == 1
