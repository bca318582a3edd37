"""Names of models that are none: each is refused at once, by argument and value."""

from __future__ import annotations

import pytest

from qat.files import json_file
from qat.files.json_file import read_json
from qat.files.model_folder import check_model_folder
from training.arguments.distillation import DistillationArguments
from training.arguments.model import ModelArguments
from training.arguments.quantization import QuantizationArguments
from training.start.start import Start

# What a user may give in place of a folder, and what is said of it.
NAMES = [
    ("", "is neither a folder nor a hub id"),
    ("nosuchfolder", "neither a folder nor a model that can be had from the hub or its cache"),
    ("no/such-id", "neither a folder nor a model that can be had from the hub or its cache"),
    ("./no/such/folder", "is neither a folder nor a hub id"),
    ("/no/such/folder", "is neither a folder nor a hub id"),
    ("~/model", "is neither a folder nor a hub id"),
    ("a/b/c", "is neither a folder nor a hub id"),
    ("..--x", "is neither a folder nor a hub id"),
    ("https://huggingface.co/org/model", "is neither a folder nor a hub id"),
    ("a\0b", "is neither a folder nor a hub id"),
    ("x" * 5000, "is neither a folder nor a|neither a folder nor a model"),
    ("{folder}/file", "is a file; give the folder"),
    ("{folder}/empty", "has no config.json; it is empty"),
    ("{folder}", r"has no config.json; it holds empty/, file"),
]


@pytest.mark.parametrize(("name", "said"), NAMES, ids=[repr(name[:20]) for name, _ in NAMES])
def test_a_name_that_is_no_model_is_refused_by_argument_and_value(tmp_path, name, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    name = name.format(folder=tmp_path)
    with pytest.raises(ValueError, match=said) as error:
        Start.read(ModelArguments(name), str(tmp_path / "cache"))
    assert name[:50] in str(error.value) or "\0" in name
    start = Start(ModelArguments("unused"), str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=said) as error:
        start.check(QuantizationArguments(), DistillationArguments(teacher_model_name_or_path=name), True)
    assert "--teacher_model_name_or_path" in str(error.value) or "config.json" in str(error.value)


def test_what_may_be_a_hub_id_is_left_to_the_hub():
    for name in ("gpt2", "org/model", "HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen2.5-0.5B", "a/b_c.d-e"):
        assert check_model_folder(name) is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[" * 200 + "]" * 200, "nested deeper than 100 levels"), ("[" * 10**6, "nested too deeply"),
        ("1" * 10**5, "is not JSON"), ("\ufeff{}", "is not JSON"), (" " * 300, "more than the 256"),
    ],
    ids=["deep", "deeper", "a long number", "a byte order mark", "large"],
)  # fmt: skip
def test_json_that_would_hang_or_end_a_program_is_refused_by_name(tmp_path, monkeypatch, content, said):
    if "256" in said:
        monkeypatch.setattr(json_file, "_MAX_BYTES", 256)
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=f"x.json .*{said}"):
        read_json(tmp_path / "x.json")
