"""Generic text in distillation: the loss by hand, its figures, continuations of a teacher, and runs of main.py."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from faults.runs import difference
from helpers import ROOT, make_llama, make_tokenizer, save_llama, write_conversations
from sharded_runs import Workspace
from torch.nn import functional
from trainers import make_data, make_trainer, other_llama

import main
from data.sets.mixing import MixedDataset
from data.sets.packing import PackedDataset
from training.arguments.data import DataArguments
from training.arguments.distillation import CacheSettings, DistillationArguments
from training.arguments.parse import parse_arguments
from training.teachers import continuations, generic
from training.teachers.cache import make_cached_teacher
from training.teachers.continuations import sample, sample_continuations
from training.teachers.generic import describe
from training.teachers.load import load_teacher
from training.teachers.turns import Opening, of_conversations, of_text

BOS = Opening((1,))
CPU = SimpleNamespace(local_process_index=0, world_size=1, device=torch.device("cpu"), bf16=False)


def text(count: int = 5, length: int = 12, vocabulary: int = 250) -> Dataset:
    """Rows of pseudo-random tokens, all of which are learned."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(2, vocabulary, (length - i % 3,), generator=generator).tolist() for i in range(count)]
    return Dataset.from_dict(
        {"input_ids": ids, "labels": [[-100, *row[1:]] for row in ids], "length": [len(row) for row in ids]}
    )


def mixed_data(folder, share: float = 0.5, packing: bool = False) -> dict:
    data = make_data(folder)
    sets = data["train_dataset"], text()
    if packing:
        sets = tuple(PackedDataset(rows, 120) for rows in sets)
    return {**data, "train_dataset": MixedDataset(*sets, share, 42)}


def by_hand(model, teacher, rows: list[dict], ce_weight: float) -> dict[str, torch.Tensor]:
    """A step's terms, one sample at a time: the mean cross-entropy of the domain, the mean divergence of all."""
    ce, kl, generic_kl = [], [], []
    for row in rows:
        positions = row.get("position_ids", list(range(len(row["input_ids"]))))
        starts = [i for i, position in enumerate(positions) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(positions)], strict=True):
            ids, labels = (torch.tensor(row[name][start:end]) for name in ("input_ids", "labels"))
            log_p, log_q = (m(ids[None]).logits[0, :-1].float().log_softmax(-1) for m in (model, teacher))
            labelled = labels[1:] != -100
            divergence = (log_q.exp() * (log_q - log_p)).sum(-1)[labelled]
            (generic_kl if row["generic"][0] else kl).append(divergence)
            if not row["generic"][0]:
                ce.append(functional.nll_loss(log_p[labelled], labels[1:][labelled], reduction="none"))
    ce, kl, generic_kl = torch.cat(ce), torch.cat(kl), torch.cat(generic_kl)
    loss = ce_weight * ce.mean() + (1 - ce_weight) * torch.cat([kl, generic_kl]).mean()
    return {"loss": loss, "ce": ce.mean(), "kl": kl.mean(), "generic_kl": generic_kl.mean(),
            "labelled_tokens": len(kl), "generic_tokens": len(generic_kl)}  # fmt: skip


@pytest.mark.parametrize("packing,batch,accumulation", [(False, 6, 1), (False, 1, 6), (False, 2, 3), (True, 2, 1)])
def test_a_step_is_cross_entropy_of_the_domain_and_divergence_of_all_in_whatever_batches(
    tmp_path, packing, batch, accumulation
):
    data, model, teacher = mixed_data(tmp_path, packing=packing), make_llama(), other_llama().eval()
    teacher.config.use_cache = False  # as load_teacher sets it, without which packed samples see each other
    reference = make_llama()
    trainer = make_trainer(
        tmp_path, model, data, teacher, bf16=False, max_steps=1, optim="sgd", learning_rate=0.1, max_grad_norm=0.0,
        distill_ce_weight=0.3, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        lr_scheduler_type="constant",
    )  # fmt: skip
    order = list(trainer._get_train_sampler())[: batch * accumulation]
    rows = [data["train_dataset"][i] for i in order]
    assert sum(row["generic"][0] for row in rows) == len(rows) // 2
    trainer.train()
    expected = by_hand(reference, teacher, rows, 0.3)
    entry = trainer.state.log_history[0]
    for name, value in expected.items():
        assert entry[name] == pytest.approx(torch.as_tensor(value).item(), rel=1e-5), name
    assert (trainer.labelled_tokens, trainer.generic_tokens) == (entry["labelled_tokens"], entry["generic_tokens"])
    expected["loss"].backward()
    stepped = {name: (p - 0.1 * p.grad).detach() for name, p in reference.named_parameters()}
    found = {name: p.detach() for name, p in model.named_parameters()}
    torch.testing.assert_close(found, stepped, rtol=1e-4, atol=1e-6)


def test_without_cross_entropy_the_step_is_the_divergence_of_all_tokens(tmp_path):
    data, teacher = mixed_data(tmp_path), other_llama().eval()
    trainer = make_trainer(
        tmp_path, make_llama(), data, teacher, bf16=False, max_steps=1, per_device_train_batch_size=4
    )
    rows = [data["train_dataset"][i] for i in list(trainer._get_train_sampler())[:4]]
    trainer.train()
    expected = by_hand(make_llama(), teacher, rows, 0.0)
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(float(expected["loss"]), rel=1e-5) and "ce" not in entry
    assert entry["generic_kl"] == pytest.approx(float(expected["generic_kl"]), rel=1e-5)


def test_a_head_of_unknown_form_and_a_cached_teacher_have_the_same_loss(tmp_path):
    losses = []
    for kind in ("copy", "unknown head", "cache"):
        data, model, teacher = mixed_data(tmp_path), make_llama(), load_teacher(other_llama(), None)
        if kind == "unknown head":
            model.base_model_prefix = "nowhere"
        if kind == "cache":
            settings = CacheSettings(top_k=260, samples=1)
            teacher = make_cached_teacher(teacher, CPU, data, settings, str(tmp_path / "teachers"))
        trainer = make_trainer(tmp_path, model, data, teacher, bf16=False, max_steps=4, distill_ce_weight=0.2)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[2] == pytest.approx(losses[0], rel=3e-3)


def test_an_epoch_counts_the_domain_and_the_evaluation_is_that_of_the_domain(tmp_path):
    data = mixed_data(tmp_path, 0.25)
    mixed, teacher = data["train_dataset"], load_teacher(other_llama(), None)
    settings = {"bf16": False, "max_steps": -1, "num_train_epochs": 2, "learning_rate": 0.0,
                "per_device_train_batch_size": 1}  # fmt: skip
    trainer = make_trainer(tmp_path, make_llama(), data, teacher, **settings)
    trainer.train()
    assert trainer.state.global_step == 2 * len(mixed) and trainer.state.epoch == 2
    domain = sum(sum(label != -100 for label in row["labels"][1:]) for row in mixed.domain)
    assert trainer.labelled_tokens == 2 * domain
    plain = make_trainer(tmp_path, make_llama(), {**data, "train_dataset": mixed.domain}, teacher, **settings)
    figures = [t.evaluate() for t in (trainer, plain)]
    assert figures[0]["eval_kl"] == figures[1]["eval_kl"] and figures[0]["eval_loss"] == figures[1]["eval_loss"]


def test_generic_text_needs_a_teacher_and_an_order_of_ours(tmp_path):
    data = mixed_data(tmp_path)
    with pytest.raises(ValueError, match="give a teacher"):
        make_trainer(tmp_path, make_llama(), data, None)
    with pytest.raises(ValueError, match="--train_sampling_strategy sequential cannot have .*_generic none"):
        make_trainer(tmp_path, make_llama(), data, other_llama(), train_sampling_strategy="sequential")


# ---- Continuations ----


def test_continuations_have_the_teachers_distribution_whatever_the_batch():
    model, vocabulary = make_llama().eval(), 260
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # far from uniform
    tokens = sample(model, 3000, 3, BOS)
    assert tokens.shape == (3000, 3) and (tokens[:, 0] == 1).all()
    with torch.no_grad():
        expected = model(torch.tensor([[1]])).logits[0, 0].softmax(-1)
    counts = torch.bincount(torch.tensor(tokens[:, 1]), minlength=vocabulary) / 3000
    assert ((counts - expected).abs() < 5 * (expected / 3000).sqrt() + 1e-3).all()
    likeliest = int(expected.argmax())
    after = tokens[tokens[:, 1] == likeliest][:, 2]
    with torch.no_grad():
        second = model(torch.tensor([[1, likeliest]])).logits[0, 1].softmax(-1)
    counts = torch.bincount(torch.tensor(after), minlength=vocabulary) / len(after)
    assert ((counts - second).abs() < 5 * (second / len(after)).sqrt() + 2e-2).all()
    assert (sample(model, 50, 3, BOS) == sample(model, 50, 3, BOS)).all()
    assert (sample(model, 50, 3, BOS) != sample(model, 50, 3, BOS, seed=1)).any()


def test_continuations_are_sampled_once_and_kept_by_teacher_and_settings(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(continuations, "sample", lambda *args: (calls.append(args), sample(*args))[1])
    teacher = load_teacher(make_llama(), None)
    first, again = (sample_continuations(teacher, 4, 8, BOS, CPU, str(tmp_path)) for _ in range(2))
    assert len(calls) == 1 and first.to_list() == again.to_list() and set(first["length"]) == {8}
    assert all(row["labels"] == [-100, *row["input_ids"][1:]] for row in first)
    others = [(load_teacher(other_llama(), None), 4, 8, BOS), (teacher, 5, 8, BOS), (teacher, 4, 9, BOS)]
    others += [(teacher, 4, 8, Opening((2,))), (teacher, 4, 8, Opening((1,), ((2,), (2,))))]
    for changed in others:
        sample_continuations(*changed, CPU, str(tmp_path))
    assert len(calls) == 6


def test_a_teacher_without_keys_and_values_and_one_without_weights_are_refused(tmp_path):
    model = make_llama()
    forward = model.forward
    model.forward = lambda **kwargs: SimpleNamespace(logits=forward(**kwargs).logits)
    with pytest.raises(ValueError, match="keeps no keys and values to sample with; give a FILE .*_generic none"):
        sample(model, 2, 4, BOS)
    with pytest.raises(ValueError, match="fsdp_cpu_ram_efficient_loading: false .*_generic none"):
        sample_continuations(make_llama().to("meta"), 2, 4, BOS, CPU, str(tmp_path))


def test_a_teacher_that_does_not_fit_on_the_device_is_refused_with_a_remedy(monkeypatch, tmp_path):
    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(continuations, "sample", fails)
    with pytest.raises(ValueError, match=r"too little memory for it \(CUDA out of memory.*_generic none"):
        sample_continuations(make_llama(), 2, 4, BOS, CPU, str(tmp_path))


def test_a_text_begins_with_bos_or_with_the_end_of_the_one_before():
    tokenizer, model = make_tokenizer(), make_llama()
    tokenizer.bos_token, model.config.bos_token_id = None, None
    assert of_text(tokenizer, model) == Opening((tokenizer.eos_token_id,))
    model.config.bos_token_id = 7
    assert of_text(tokenizer, model) == Opening((7,))
    tokenizer.eos_token, model.config.bos_token_id = None, None
    with pytest.raises(ValueError, match="has neither; give a FILE .*_generic none"):
        of_text(tokenizer, model)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer(template: str | None = CHATML):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def test_conversations_open_as_the_chat_template_opens_them():
    tokenizer = chat_tokenizer()
    found = of_conversations(tokenizer)
    pieces = [tokenizer.decode(ids) for ids in (found.begin, *found.turns)]
    assert pieces == ["<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>user\n"]
    assert (found.kind, found.name(5), Opening((1,)).name(5)) == ("chat", "chat:5", "teacher:5")


@pytest.mark.parametrize(
    "template,message",
    [
        (None, "needs a chat template"),
        ("{{ raise_exception('no') }}", "cannot write a dialogue"),
        ("{{ messages[0].content }}", "cannot write a dialogue"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "begins with no special token"),
        ("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}", "writes nothing before a question"),
        (
            CHATML.replace("<|im_end|>", "{{ '</s>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}"),
            "ends the last answer with '</s>",
        ),
    ],
)
def test_chat_templates_whose_turns_cannot_be_sampled_are_refused(template, message):
    with pytest.raises(ValueError, match=f"--distill_generic chat:N.*{message}.*teacher:N.*_generic none"):
        of_conversations(chat_tokenizer(template))


@pytest.mark.parametrize("turns", [((9, 20, 21, 22), (9, 30)), ((8,), (9, 30, 31))])
def test_behind_the_end_of_a_turn_comes_what_the_template_puts_there_and_nothing_else_changes(turns):
    """Against a loop over each sequence; the tokens that are drawn in the place of given ones are dropped."""
    opening, generator = Opening((1, 2), turns), torch.Generator().manual_seed(0)
    drawn = torch.randint(7, 12, (40, 50), generator=generator)
    given = opening.given(40, torch.device("cpu"))
    found = torch.cat([given.instead_of(drawn[:, i : i + 1]) for i in range(50)], 1)
    for row, sampled in zip(found.tolist(), drawn.tolist(), strict=True):
        expected, turn, waiting = [], 0, []
        for token in sampled:
            if waiting:
                expected.append(waiting.pop(0))
                continue
            expected.append(token)
            if token == turns[turn][0]:
                waiting, turn = list(turns[turn][1:]), 1 - turn
        assert row == expected
    assert {20, 30} & set(found.flatten().tolist())


def test_conversations_are_sampled_with_the_template_between_turns_and_all_but_its_beginning_is_learned(tmp_path):
    opening = Opening((5, 6, 7), ((8, 3), (8, 4)))
    model = load_teacher(make_llama(), None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0)  # uniform over the vocabulary
    rows = sample_continuations(model, 200, 64, opening, CPU, str(tmp_path))
    after_ends = set()
    for row in rows:
        assert row["input_ids"][:3] == [5, 6, 7]
        assert row["labels"] == [-100] * 3 + row["input_ids"][3:]
        ends = [i for i, token in enumerate(row["input_ids"][:-1]) if token == 8]
        after_ends |= {(number % 2, row["input_ids"][i + 1]) for number, i in enumerate(ends)}
    assert after_ends == {(0, 3), (1, 4)}


def test_a_teacher_that_ends_no_turns_is_named_in_a_warning(tmp_path, caplog):
    model = load_teacher(make_llama(), None)
    with caplog.at_level("INFO", "training.teachers.continuations"):
        sample_continuations(model, 20, 8, Opening((5,), ((8, 3), (8, 4))), CPU, str(tmp_path))
    assert "conversations, so most have no answer" in caplog.text


def test_conversations_need_the_template_that_the_data_is_written_in():
    settings = DistillationArguments(True, distill_generic="chat:6")
    args = SimpleNamespace(**vars(CPU), model_max_length=48)
    with pytest.raises(ValueError, match="--chat_template none writes the data without it; give teacher:N"):
        generic.GenericText.read(settings, args, DataArguments(chat_template="none"), chat_tokenizer())


def test_conversations_that_are_asked_for_are_sampled_and_mixed_into_the_training_data(tmp_path):
    tokenizer, model = chat_tokenizer(), make_llama()
    model.resize_token_embeddings(len(tokenizer))
    settings = DistillationArguments(True, distill_generic="chat:6", distill_cache_dir=str(tmp_path))
    args = SimpleNamespace(**vars(CPU), model_max_length=48, seed=1, data_seed=None, max_steps=2)
    args.train_batch_size, args.gradient_accumulation_steps = 4, 1
    asked = generic.GenericText.read(settings, args, DataArguments(), tokenizer)
    asked.sample(load_teacher(model, None))
    begin = list(of_conversations(tokenizer).begin)
    assert all(row["input_ids"][: len(begin)] == begin and row["length"] == 48 for row in asked.samples)
    mixed = asked.mixed_into({"train_dataset": text()})["train_dataset"]
    rows = list(mixed)  # which ends: of either kind all
    assert sum(row["generic"][0] for row in rows) == max(mixed.generic_rows, 6) == len(rows) - 5
    assert [row["generic"][0] for row in mixed.first(4)] == [0, 0, 0, 1]
    args.model_max_length = len(begin)
    with pytest.raises(ValueError, match=f"chat template begins it with {len(begin)}; give more of both"):
        generic.GenericText.read(settings, args, DataArguments(), tokenizer)


def test_the_log_tells_how_often_the_text_is_read(tmp_path):
    mixed = MixedDataset(text(30), text(5), 0.25)
    args = SimpleNamespace(
        train_batch_size=4, gradient_accumulation_steps=1, world_size=1, max_steps=20, num_train_epochs=1
    )
    assert "5 rows, 57 tokens; it is 0.25 of the rows" in describe(mixed, "x.txt", 57, args)
    assert "reads 20 rows of it: each is read 4.0 times" in describe(mixed, "x.txt", 57, args)
    args.max_steps = 2
    assert "reads 2 rows of it: 3 of them are not read" in describe(mixed, "x.txt", 57, args)


# ---- Arguments and runs ----


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"distill_generic": "a.txt"}, "--distill_generic a.txt has no effect without --distill True.*_generic none"),
        ({"distill": True, "distill_generic": "teacher:0"}, "N of teacher:N is a positive number"),
        ({"distill": True, "distill_generic": "teacher:many"}, "N of teacher:N is a positive number"),
        ({"distill": True, "distill_generic": "teacher"}, "N of teacher:N is a positive number"),
        ({"distill": True, "distill_generic": "chat:0"}, "N of chat:N is a positive number"),
        ({"distill": True, "distill_generic": "chat"}, "N of chat:N is a positive number"),
        ({"distill": True, "distill_generic": " "}, "--distill_generic is empty"),
        ({"distill": True, "distill_generic": "a.txt", "distill_generic_share": 1.0}, "must lie between 0 and 1"),
        ({"distill": True, "distill_generic_share": 0.5}, "has no effect without --distill_generic;.*_generic none"),
        ({"distill": True, "distill_generic": "none", "distill_generic_share": 2.0}, "must lie between 0 and 1"),
        (
            {"distill": True, "distill_generic": "a.txt", "distill_generic_length": 64},
            "--distill_generic_length 64 has no effect without --distill_generic teacher:N or chat:N",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        DistillationArguments(**arguments)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Workspace:
    folder = tmp_path_factory.mktemp("generic")
    save_llama(folder / "model")
    other_llama().save_pretrained(folder / "other")
    make_tokenizer().save_pretrained(folder / "other")
    write_conversations(folder / "data.jsonl", 80)
    (folder / "book.txt").write_text("".join(f"Line {i} of a book on many things.\n\n" for i in range(60)))
    return Workspace(folder)


def flags(workspace: Workspace, **changes) -> dict:
    return {
        "teacher_model_name_or_path": str(workspace.folder / "other"), "distill_ce_weight": 0.3, "packing": True,
        "model_max_length": 64,
        "distill_generic": str(workspace.folder / "book.txt"), "distill_generic_share": 0.25, "max_steps": 6,
        "logging_steps": 3, "save_strategy": "steps", "save_steps": 2, "bf16": False,
        **changes,
    }  # fmt: skip


FIGURES = ("loss", "ce", "kl", "generic_kl", "labelled_tokens", "generic_tokens")


def test_two_processes_train_what_one_trains_and_a_killed_run_what_an_uninterrupted_one_does(workspace):
    settings, one = flags(workspace), {"gradient_accumulation_steps": 2}
    workspace.run("cpu", {"one": settings | one}, processes=1)
    workspace.run("ddp", {"two": settings})
    for figure in FIGURES:
        expected, found = workspace.logged("one", figure), workspace.logged("two", figure)
        assert found == pytest.approx(expected, rel=0 if "tokens" in figure else 1e-5) and len(found) == 2
    for name, tensor in workspace.weights("one").items():
        torch.testing.assert_close(workspace.weights("two")[name], tensor, rtol=1e-2, atol=1e-4)  # saved in BF16
    workspace.run("cpu", {"killed": settings | one}, processes=1, killed_at=7)
    assert [p.name for p in (workspace.folder / "killed").glob("checkpoint-*")] == ["checkpoint-2"]
    workspace.run("cpu", {"killed": settings | one}, processes=1)
    assert difference(workspace.folder / "one", workspace.folder / "killed") is None
    for figure in FIGURES:
        assert workspace.logged("killed", figure) == workspace.logged("one", figure)
    record = json.loads((workspace.folder / "one" / "checkpoint-6" / "run.json").read_text())
    assert record["order"]["distill_generic_share"] == 0.25 and record["order"]["distill_generic"].endswith("book.txt")


def test_one_of_two_processes_samples_the_continuations_that_both_train_on(workspace):
    teachers = workspace.folder / "teachers"
    settings = flags(workspace, distill_generic="teacher:6", distill_cache_dir=str(teachers), save_strategy="no")
    workspace.run("ddp", {"sampled": settings | {"max_steps": 3}})
    assert len(list(teachers.glob("*/tokens.bin"))) == 1
    assert workspace.logged("sampled", "generic_tokens") == [3 * 63]  # a row of four in each step, BOS is not learned


def test_short_continuations_are_packed_into_the_rows(workspace):
    settings = flags(
        workspace, distill_generic="teacher:6", distill_generic_length=16, save_strategy="no",
        distill_cache_dir=str(workspace.folder / "short"),
    )  # fmt: skip
    workspace.run("cpu", {"short": settings | {"max_steps": 3, "gradient_accumulation_steps": 2}}, processes=1)
    assert [path.stat().st_size for path in (workspace.folder / "short").glob("*/tokens.bin")] == [6 * 16 * 4]
    # Rows of 64 tokens have four or two of the six texts, without the first token of each.
    assert workspace.logged("short", "generic_tokens") == [(4 + 2 + 4) * 15]


def test_an_evaluation_over_a_recipe_samples_nothing_and_logs_it(workspace, monkeypatch, caplog):
    def never(*_args, **_kwargs):
        raise AssertionError("texts are sampled")

    monkeypatch.setattr(generic, "sample_continuations", never)
    words = ["--config", str(ROOT / "recipes" / "mxfp4.yaml"), "--do_train", "False", "--report_to", "none"]
    paths = {"model_name_or_path": "model", "dataset": "data.jsonl", "output_dir": "evaluated"}
    paths["distill_cache_dir"] = "unused"
    words += [f"--{name}={workspace.folder / path}" for name, path in paths.items()]
    main.main([*words, "--model_max_length", "64"])
    lines = [record.getMessage() for record in caplog.records if record.levelname == "INFO"]
    lines = [line for line in lines if "is for training only" in line]
    assert len(lines) == 1 and "(--distill_generic teacher:2000) is for training only and is not read" in lines[0]
    assert "--distill_cache_dir" in lines[0]
    assert json.loads((workspace.folder / "evaluated" / "eval_results.json").read_text())["eval_kl"] > 0


def test_several_machines_of_which_one_has_weights_are_refused_before_weights_are_read(monkeypatch):
    settings = DistillationArguments(True, distill_generic="teacher:6")
    several = SimpleNamespace(world_size=4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(generic, "first_process_loads", lambda: True)
    with pytest.raises(ValueError, match="fsdp_cpu_ram_efficient_loading: false .*or --distill_generic none"):
        generic.GenericText.read(settings, several, DataArguments(), None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert generic.GenericText.read(settings, several, DataArguments(), None).samples is None


@pytest.mark.parametrize("length", [1, 65])
def test_a_continuation_has_a_length_that_fits_into_a_row(workspace, length, capsys):
    words = ["--model_name_or_path", str(workspace.folder / "model"), "--dataset", str(workspace.folder / "data.jsonl")]
    words += ["--output_dir", str(workspace.folder / "no"), "--do_train", "True", "--distill", "True"]
    words += ["--distill_generic", "teacher:6", "--model_max_length", "64", "--distill_generic_length", str(length)]
    with pytest.raises(SystemExit):
        parse_arguments(words)
    assert f"--distill_generic_length {length} must lie between 2" in capsys.readouterr().err


def test_the_length_of_continuations_is_that_of_a_row_where_none_is_given(workspace):
    words = ["--model_name_or_path", str(workspace.folder / "model"), "--dataset", str(workspace.folder / "data.jsonl")]
    words += ["--output_dir", str(workspace.folder / "no"), "--do_train", "True", "--distill", "True"]
    words += ["--model_max_length", "64", "--distill_generic"]
    lengths = [parse_arguments([*words, name]).distillation.distill_generic_length for name in ("teacher:6", "a.txt")]
    assert lengths == [64, None]


def test_few_rows_are_sampled_at_once(monkeypatch):
    teacher, rows = other_llama(), []
    of_teacher = teacher.forward
    monkeypatch.setattr(
        teacher, "forward", lambda input_ids, **others: rows.append(len(input_ids)) or of_teacher(input_ids, **others)
    )
    assert sample(teacher, 300, 2, BOS).shape == (300, 2) and rows == [256, 44]


# ---- Evaluation ----


@pytest.mark.parametrize("cached", [False, True])
def test_a_text_that_is_evaluated_beside_the_data_has_figures_of_its_own_and_may_choose_the_checkpoint(
    tmp_path, cached
):
    data, held_out = mixed_data(tmp_path), text(4, 10)
    data["generic_eval_dataset"] = held_out
    copies = [load_teacher(other_llama(), None) for _ in range(2)]
    teacher = copies[0]
    if cached:
        settings = CacheSettings(top_k=260, samples=1)
        teacher = make_cached_teacher(teacher, CPU, data, settings, str(tmp_path / "teachers"))
    trainer = make_trainer(
        tmp_path, make_llama(), data, teacher, bf16=False, max_steps=3, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="generic_kl",
        learning_rate=0.3, lr_scheduler_type="constant",
    )  # fmt: skip
    first = trainer.evaluate()
    alone = make_trainer(
        tmp_path, make_llama(), {**make_data(tmp_path), "eval_dataset": held_out}, copies[1], bf16=False
    )
    expected, tolerance = alone.evaluate(), 2e-3 if cached else 1e-6
    for figure in ("kl", "loss", "perplexity"):
        assert first[f"eval_generic_{figure}"] == pytest.approx(expected[f"eval_{figure}"], rel=tolerance)
        assert first[f"eval_{figure}"] != first[f"eval_generic_{figure}"]
    trainer.train()
    found = {e["step"]: e["eval_generic_kl"] for e in trainer.state.log_history if "eval_generic_kl" in e and e["step"]}
    assert len(found) == 3 and trainer.state.best_metric == min(found.values())
