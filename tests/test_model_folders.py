"""Damaged and hostile model folders, and every tool that reads one: a UserError of one line that names what is wrong.

Nothing outside of the target is changed, no code of the folder runs, and nobody is asked for leave to run it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, make_llama, save_llama, save_qat
from safetensors.torch import load_file, save_file

from data import preview
from qat.checkpoints.pack import export_checkpoint
from qat.errors import UserError
from qat.files.model_folder import check_model_folder
from training.arguments.model import ModelArguments
from training.start.start import Start, load_model
from training.teachers.load import load_teacher

sys.path.insert(0, str(ROOT / "scripts"))

import evaluate  # noqa: E402

WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
MATRIX = "model.layers.1.mlp.up_proj.weight"
DEEP = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"


# ---- The tools ----


def train(folder: Path, _out: Path) -> None:
    Start.read(ModelArguments(str(folder))).load_model()


def sensitivity(folder: Path, _out: Path) -> None:
    load_model(ModelArguments(str(folder)))


def teach(folder: Path, out: Path) -> None:
    student = make_llama()
    student.config._name_or_path = str(out.parent / "sound")
    load_teacher(student, str(folder))


def export(folder: Path, out: Path) -> None:
    export_checkpoint(folder, out, scheme="MXFP4")


def evaluated(folder: Path, _out: Path, input_rule: str | None = None) -> None:
    args = SimpleNamespace(input_rule=input_rule, trust_remote_code=False, device="cpu", batch_size="1")
    evaluate.make_hf(str(folder), args)


def evaluated_by_our_operators(folder: Path, out: Path) -> None:
    evaluated(folder, out, "floor")


def previewed(folder: Path, out: Path) -> None:
    preview.main(["--model_name_or_path", str(folder), "--dataset", str(out.parent / "text.txt")])


LOADS = (train, teach, export, evaluated, sensitivity)
ALL = (*LOADS, previewed)
TOKENIZERS = (teach, evaluated, previewed)
PACKED = (train, evaluated, evaluated_by_our_operators, sensitivity)


# ---- The damage ----


def tensors(change: Callable[[dict], None]) -> Callable[[Path], None]:
    """Change the tensors of the folder."""

    def apply(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS, {"format": "pt"})

    return apply


def config(**entries) -> Callable[[Path], None]:
    """Change entries of config.json."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(content | entries))

    return apply


def text(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Let a file hold something else."""
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(data) and None


def without(*names: str) -> Callable[[Path], None]:
    """Remove files."""
    return lambda folder: [(folder / name).unlink() for name in names] and None


def linked(name: str) -> Callable[[Path], None]:
    """Move a file out of the folder, and link to it."""

    def apply(folder: Path) -> None:
        outside = folder.parent / f"outside-{name}"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return apply


def relabelled(old: bytes, new: bytes) -> Callable[[Path], None]:
    """Let the header of the weights name another dtype of the same size."""
    return lambda folder: text(WEIGHTS, (folder / WEIGHTS).read_bytes().replace(old, new))(folder)


def index(files: dict[str, str] | None = None, every: str | None = None) -> Callable[[Path], None]:
    """Let an index name files by tensor; `every`: one for all."""

    def apply(folder: Path) -> None:
        names = dict.fromkeys(load_file(folder / WEIGHTS), every) if every else files
        (folder / WEIGHTS).rename(folder / "w.safetensors")
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))

    return apply


def of_its_own_code(folder: Path) -> None:
    """Python in the folder, for the configuration, the model and the tokenizer."""
    (folder / "own.py").write_text(f"from pathlib import Path\nPath({str(folder.parent / 'ran')!r}).touch()\n")
    config(model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})(folder)
    path = folder / "tokenizer_config.json"
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.T", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))


def headless(folder: Path) -> None:
    """Save the model without its head."""
    make_llama(tie_word_embeddings=False).bfloat16().model.save_pretrained(folder)


def adapter(folder: Path) -> None:
    """Leave an adapter alone in the folder."""
    without(CONFIG, WEIGHTS)(folder)
    text("adapter_config.json", json.dumps({"base_model_name_or_path": "org/base", "r": 8}))(folder)
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")


def truncated(folder: Path) -> None:
    text(WEIGHTS, (folder / WEIGHTS).read_bytes()[:-100])(folder)


MODELOPT = "is quantized by modelopt as quant_algo None|is packed; give|already quantized .modelopt"
PLAIN = {
    # weights
    "one tensor x": (tensors(lambda t: (t.clear(), t.update(x=torch.zeros(1)))), "lacks 21 tensors", LOADS),
    "a missing matrix": (tensors(lambda t: t.pop(MATRIX)), f"lacks 1 tensors of .*, e.g. {MATRIX}", LOADS),
    "no head": (headless, "lacks 1 tensors of LlamaForCausalLM, e.g. lm_head.weight", LOADS),
    "another shape": (tensors(lambda t: t.update({MATRIX: t[MATRIX][1:]})), f"{MATRIX} has the shape .95, 64", LOADS),
    "more layers": (config(num_hidden_layers=3), "lacks 9 tensors of .* e.g. model.layers.2", LOADS),
    "fewer layers": (config(num_hidden_layers=1), "has 9 tensors that .* no place for, e.g. model.layers.1", LOADS),
    "a million layers": (config(num_hidden_layers=10**6), "num_hidden_layers 1000000, but the weights", LOADS),
    "a huge vocabulary": (config(vocab_size=10**12), "vocab_size 1000000000000, but the weights are", LOADS),
    "a larger vocabulary": (config(vocab_size=300), r"embed_tokens.weight has the shape \(260, 64\)", LOADS),
    "a huge head": (config(head_dim=10**9), "head_dim 1000000000, but the weights are 20 tensors", LOADS),
    "no heads": (config(num_attention_heads=0), "config.json", LOADS),
    "a foreign tensor": (
        tensors(lambda t: t.update({"model.layers.0.mlp.up_proj.weight_quantizer._amax": torch.ones(1)})),
        "no place for, e.g. model.layers.0.mlp.up_proj.weight_quantizer._amax", LOADS,
    ),
    "a bias too many": (
        tensors(lambda t: t.update({"model.layers.0.mlp.up_proj.bias": torch.ones(96)})), "e.g. .*up_proj.bias", LOADS,
    ),
    "int16": (tensors(lambda t: t.update({MATRIX: t[MATRIX].view(torch.int16)})), f"stores {MATRIX} in I16", LOADS),
    "BF16 called U16": (relabelled(b'"BF16"', b'"U16" '), "stores .* in U16|truncated or corrupted", LOADS),
    "NaN": (tensors(lambda t: t[MATRIX].view(-1)[7].fill_(torch.nan)), f"{MATRIX} holds NaN or infinity", LOADS),
    "inf in a norm": (
        tensors(lambda t: t["model.norm.weight"][1].fill_(torch.inf)), "model.norm.weight holds NaN or infinity", LOADS,
    ),
    "packed, and not said": (
        tensors(lambda t: t.update({MATRIX.replace("weight", "weight_packed"): t.pop(MATRIX).view(torch.uint8)})),
        "up_proj.weight_packed.*quantization_config was lost", LOADS,
    ),
    "cut": (truncated, "model.safetensors is truncated or corrupted", LOADS),
    "empty": (text(WEIGHTS, b""), "model.safetensors is truncated or corrupted", LOADS),
    "garbage": (text(WEIGHTS, b"\xff" * 999), "model.safetensors is truncated or corrupted", LOADS),
    "an unknown dtype": (relabelled(b'"BF16"', b'"XF16"'), "model.safetensors is truncated or corrupted", LOADS),
    "no weights": (without(WEIGHTS), "neither model.safetensors nor", LOADS),
    # the index
    "a shard that is not there": (index(every="gone.safetensors"), "gone.safetensors is missing", LOADS),
    "a tensor that is not there": (index({"y": "w.safetensors"}), "w.safetensors lacks 1 tensors .* e.g. y", LOADS),
    "an index to the parent": (index(every="../model/w.safetensors"), "index.json names .* not lie in its folder", ALL),
    "an index to the root": (index(every="/etc/passwd"), "index.json names .* not lie in its folder", ALL),
    "an index to the folder itself": (index(every="."), "index.json names .* not lie in its folder", ALL),
    "an index with NUL": (index(every="w\0.safetensors"), "index.json names .* not lie in its folder", ALL),
    "an index to JSON": (index(every=CONFIG), "no .safetensors file", LOADS),
    "an index of numbers": (index({"x": 5}), "index.json .*5", ALL),
    "an index of nothing": (index({}), "index.json is damaged: it has no weight_map", ALL),
    "two sets of weights": (text(INDEX, '{"weight_map": {"x": "a.safetensors"}}'), "has both model.safe", LOADS),
    # JSON
    "no config": (without(CONFIG), "has no config.json; it holds", LOADS),
    "a cut config": (text(CONFIG, '{"a": '), "config.json is damaged: it is not JSON", ALL),
    "a config of a list": (text(CONFIG, "[]"), "config.json is damaged: it holds a list", ALL),
    "a deep config": (text(CONFIG, DEEP), "config.json is damaged: it is nested too deeply", ALL),
    "a deep index": (text(INDEX, DEEP), "index.json is damaged: it is nested too deeply", ALL),
    "a binary config": (text(CONFIG, b"\xff\xfe\x00"), "config.json is damaged: it is not JSON", ALL),
    "an empty config": (text(CONFIG, "{}"), "config.json: ValueError: Unrecognized model", LOADS),
    "an unknown model": (config(model_type="nosuch"), "config.json: ValueError.*nosuch", LOADS),
    "a config of wrong types": (config(hidden_size="64"), "hidden_size", LOADS),
    "a quantization of text": (config(quantization_config="mxfp4"), "quantization_config is str", LOADS),
    "a cut generation config": (text("generation_config.json", "{"), "generation_config.json is damaged", ALL),
    "a tokenizer config of a list": (text("tokenizer_config.json", "[1]"), "tokenizer_config.json is damaged", ALL),
    "a cut tokenizer": (text("tokenizer.json", '{"version": '), "has no tokenizer that can be read", TOKENIZERS),
    "no tokenizer": (
        without("tokenizer.json", "tokenizer_config.json"), "has no tokenizer that can be read", TOKENIZERS,
    ),
    "a wrong qat_config": (text("qat_config.json", "[]"), "qat_config.json is damaged", (train, export, evaluated)),
    # links, pickles, code
    "linked weights": (linked(WEIGHTS), "model.safetensors is a link out of its folder", ALL),
    "a linked config": (linked(CONFIG), "config.json is a link out of its folder", ALL),
    "a linked tokenizer": (linked("tokenizer.json"), "tokenizer.json is a link out of its folder", ALL),
    "a link to nothing": (lambda f: (f / "vocab.txt").symlink_to("nothing"), "vocab.txt is a link .* to nothing", ALL),
    "a pipe": (lambda f: os.mkfifo(f / "merges.txt"), "merges.txt is not a regular file", ALL),
    "a pickle": (lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin") and None, "pytorch_model.bin, a pickle", ALL),
    "its own code": (of_its_own_code, "needs Python code that comes with it.*--trust_remote_code", ALL),
    "weights elsewhere": (config(transformers_weights="w.safetensors"), "weights in 'w.safetensors'", LOADS),
    # what is no plain model
    "an adapter": (adapter, "an adapter .* base model 'org/base'; .*--adapter_name_or_path .*merge it first", ALL),
    "an adapter beside a model": (
        text("adapter_config.json", '{"base_model_name_or_path": "org/base"}'),
        "is an adapter.*remove adapter_config.json", ALL,
    ),
    "GPTQ": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "is quantized by gptq", LOADS),
    "modelopt": (config(quantization_config={"producer": {"name": "modelopt"}}), MODELOPT, LOADS),
    "modelopt beside it": (text("hf_quant_config.json", "{}"), MODELOPT, LOADS),
    "bitsandbytes": (config(quantization_config={"_load_in_4bit": True}), "is quantized by bitsandbytes", LOADS),
    "FP8 of others": (config(quantization_config={"quant_method": "fp8"}), "is quantized by fp8", LOADS),
}  # fmt: skip

PACKED_DAMAGE = {
    "missing scales": (tensors(lambda t: t.pop(f"{MATRIX}_scale")), f"incomplete: {MATRIX}_packed or its weight_scale"),
    "missing codes": (tensors(lambda t: t.pop(f"{MATRIX}_packed")), f"incomplete: {MATRIX}.* is missing"),
    "more layers": (config(num_hidden_layers=3), "lacks 9 tensors of .* e.g. model.layers.2"),
    "a missing norm": (tensors(lambda t: t.pop("model.norm.weight")), "lacks 1 tensors of .* e.g. model.norm.weight"),
    "lost settings": (lambda f: config(quantization_config=None)(f), "holds packed weights .* was lost"),
    "NaN scales": (tensors(lambda t: t[f"{MATRIX}_scale"][0].fill_(255)), f"{MATRIX}_scale holds scales that are NaN"),
    "NaN in a norm": (tensors(lambda t: t["model.norm.weight"][0].fill_(torch.nan)), "model.norm.weight holds NaN"),
    "another scheme": (
        lambda f: text("qat_config.json", (f / "qat_config.json").read_text().replace("MXFP4", "MXFP8"))(f),
        "qat_config.json contradicts the weights in .* is packed in mxfp4, and it says mxfp8",
    ),
    "settings of nothing": (config(quantization_config={}), "is quantized by an unnamed method|was lost"),
}  # fmt: skip


def fingerprint(folder: Path) -> dict[str, str]:
    """All files below a folder and what they hold."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A plain folder, and beside it a packed one."""
    folder = tmp_path_factory.mktemp("folders")
    save_llama(folder / "sound", tie_word_embeddings=True)
    export_checkpoint(save_qat(folder / "qat", {"torch.nn.Linear": "MXFP4"}), folder / "packed")
    return folder


def copy(source: Path, target: Path) -> Path:
    target.mkdir(parents=True)
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def check(tool: Callable, folder: Path, message: str) -> None:
    """`tool` raises a UserError of one line that matches, and leaves everything as it is."""
    (folder.parent / "text.txt").write_text("Now is better than never.\n")
    before = fingerprint(folder.parent)
    with pytest.raises(UserError, match=message) as error:
        tool(folder, folder.parent / "out")
    assert fingerprint(folder.parent) == before and not (folder.parent / "out").exists()
    assert "\n" not in str(error.value).strip() and len(str(error.value)) < 700, error.value


@pytest.mark.parametrize("damage", PLAIN)
def test_a_folder_that_is_no_sound_model_is_refused_by_every_tool(sound, tmp_path, monkeypatch, damage):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    change, message, tools = PLAIN[damage]
    copy(sound / "sound", tmp_path / "sound")
    folder = copy(sound / "sound", tmp_path / "model")
    change(folder)
    for tool in tools:
        check(tool, folder, message)


@pytest.mark.parametrize("damage", PACKED_DAMAGE)
def test_a_packed_folder_that_is_damaged_is_refused_by_every_tool(sound, tmp_path, damage):
    change, message = PACKED_DAMAGE[damage]
    folder = copy(sound / "packed", tmp_path / "model")
    change(folder)
    for tool in PACKED:
        check(tool, folder, message)


def test_a_folder_that_may_not_be_entered_is_named(monkeypatch):
    def denied(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "is_dir", denied)
    with pytest.raises(UserError, match="--model_name_or_path '/models/m' cannot be read .*Permission denied"):
        check_model_folder("/models/m")
