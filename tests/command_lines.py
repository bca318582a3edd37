"""Wrong command lines of all programs, and what is named in the one line that each ends with.

A row of command_lines.txt is the words behind the program and a text that the line must have. `{plain}` and the like
are the files and folders of `make_files`; `{new}` does not exist. TRAIN and the like stand for `WORDS`.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
from helpers import ROOT, make_llama, make_mixture, make_tokenizer, save_llama, save_qat, write_conversations
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from qat.checkpoints.pack import export_checkpoint

_TRAIN = (
    "--model_name_or_path {plain} --output_dir {new} --dataset {data} --eval_size 6 --do_train True --max_steps 2 "
    "--report_to none --report False"
)
WORDS = {  # what many rows begin with: correct commands
    "TRAIN": _TRAIN,
    "QUANT": f"{_TRAIN} --quant_scheme MXFP4",
    "EVAL": "--model_name_or_path {plain} --dataset {data} --eval_size 6 --do_eval True --report_to none "
    "--output_dir {new}",
    "MEASURE": "--model_name_or_path {plain} --dataset {data} --eval_size 6 --output_dir {new}",
}


def read_rows() -> list[tuple[str, str, str]]:
    """(program, words, what the line must have) of each row of command_lines.txt."""
    rows, program = [], ""
    for line in Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            program = line.strip("[]")
        elif line:
            words, _, named = f" {line}".partition(" | ")
            rows.append((program, words.strip(), named.strip()))
    return rows


def words_of(row: str, names: dict[str, Path]) -> list[str]:
    """The words of a row, with the files and folders that it names."""
    first, _, rest = row.partition(" ")
    words = f"{WORDS.get(first, first)} {rest}".split()
    return [re.sub(r"\{(\w+)\}", lambda match: str(names[match[1]]), word) for word in words]


_ARGUMENT_FILES = {
    "typed.yaml": "max_steps: ten\n", "syntax.yaml": "max_steps: 5\n  - : [\n", "empty.yaml": "",
    "list.yaml": "- max_steps\n", "twice.yaml": "max_steps: 1\nmax_steps: 2\n", "unknown.yaml": "max_step: 7\n",
    "broken.json": '{"max_steps": }', "values.yaml": "max_steps: [1, 2]\n", "nested.yaml": "run_name: " + "[" * 5000,
    "false.yaml": 'do_eval: "False"\npacking: "False"\n', "dates.yaml": "max_steps: 2024-01-01\n",
}  # fmt: skip
_MAPPINGS = {
    "tied": {"mapping": {"torch.nn.Linear": "MXFP4"}, "ignore": []}, "keys": {"*.no_such": "MXFP4"},
    "ignores": {"mapping": {"torch.nn.Linear": "MXFP4"}, "ignore": ["lm_head", "no_such"]},
    "wrong": {"torch.nn.Linear": "MXFP5"},
}  # fmt: skip


def make_files(root: Path) -> dict[str, Path]:
    """Files and folders that the rows name, in `root`."""
    names = {"root": root, "new": root / "new", "recipe": ROOT / "recipes" / "mxfp4.yaml"}
    names["plain"] = save_llama(root / "plain")
    names["twin"] = Path(shutil.copytree(root / "plain", root / "twin"))
    names["qat"] = save_qat(root / "qat", {"torch.nn.Linear": "MXFP4"})
    names["packed"] = export_checkpoint(names["qat"], root / "packed")
    names["data"] = write_conversations(root / "data.jsonl")
    for name in ("nothing", "folder", "occupied/MXFP4"):
        names[name] = root / name
        names[name].mkdir(parents=True)
    names["occupied"] = root / "occupied"
    (root / "occupied/MXFP4/notes.txt").write_text("mine")
    write_conversations(root / "folder" / "chats.jsonl")
    names["linked"] = root / "linked"
    names["linked"].symlink_to(root / "plain")
    for file, text in _ARGUMENT_FILES.items():
        names[file.partition(".")[0]] = root / file
        (root / file).write_text(text)
    names["json"] = names.pop("broken")
    names["binary"] = root / "binary.yaml"
    names["binary"].write_bytes(bytes(range(256)))
    for name, content in _MAPPINGS.items():
        names[name] = root / f"{name}.json"
        names[name].write_text(json.dumps(content))
    names |= _models(root) | _adapters(root)
    (root / "long.jsonl").write_text(json.dumps({"text": "a" * 64}) + "\n" + json.dumps({"text": "b" * 64}) + "\n")
    return names | {"long": root / "long.jsonl"}


def _adapters(root: Path) -> dict[str, Path]:
    """An adapter of {plain}, others that cannot be read, and runs with a checkpoint of weights and of adapters."""
    model = get_peft_model(
        make_llama(), LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    model.save_pretrained(root / "adapter")
    changes = {
        "dora": {"use_dora": True}, "saving": {"modules_to_save": ["lm_head"]}, "biased": {"bias": "all"},
        "tokens": {"trainable_token_indices": [1]}, "ia3": {"peft_type": "IA3"},
        "decomposed": {"init_lora_weights": "pissa"},
        "newer": {"use_xyz": 1}, "wider": {"r": 8}, "elsewhere": {"target_modules": ["o_proj"]}, "rankless": {"r": "x"},
        "missed": {"target_modules": ["q_prej"]}, "more": {"target_modules": ["q_proj", "o_proj"]},
        "pickled": {}, "empty_adapter": {},
    }  # fmt: skip
    for name, change in changes.items():
        shutil.copytree(root / "adapter", root / name)
        path = root / name / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (root / "pickled/adapter_model.safetensors").rename(root / "pickled/adapter_model.bin")
    (root / "empty_adapter/adapter_model.safetensors").unlink()
    for name in ("lora_run", "full_run"):
        folder = root / name / "checkpoint-2"
        shutil.copytree(root / ("adapter" if name == "lora_run" else "plain"), folder)
        (folder / "trainer_state.json").write_text("{}")
    return {name: root / name for name in ("adapter", *changes, "lora_run", "full_run")}


def _models(root: Path) -> dict[str, Path]:
    """Models whose tokenizer has a token too many, whose vocabulary or positions are others, and no language model."""
    for name, change in (("padded", {"pad_token": "[PAD]"}), ("ended", {"additional_special_tokens": ["<|end|>"]})):
        shutil.copytree(root / "plain", root / name)
        tokenizer = make_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|a|>", "<|b|>"]})  # ids 258 and 259 have rows
        tokenizer.add_special_tokens(change)
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '<|end|>' }}{% endfor %}"
        if name == "padded":
            tokenizer.chat_template = None
        tokenizer.save_pretrained(root / name)
    model = make_llama(layers=1)
    model.resize_token_embeddings(512)
    model.save_pretrained(root / "other")
    make_tokenizer().save_pretrained(root / "other")
    config = GPT2Config(vocab_size=260, n_embd=32, n_layer=1, n_head=1, n_positions=16)
    GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(root / "gpt2")
    make_tokenizer().save_pretrained(root / "gpt2")
    make_mixture("qwen3_moe", layers=1).to(torch.bfloat16).save_pretrained(root / "mixture")
    make_tokenizer().save_pretrained(root / "mixture")
    shutil.copytree(root / "plain", root / "t5")
    (root / "t5" / "config.json").write_text('{"model_type": "t5", "architectures": ["T5Model"]}')
    return {name: root / name for name in ("padded", "ended", "other", "gpt2", "mixture", "t5")}
