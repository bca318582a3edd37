"""qat_config.json: what is saved is read again, and everything else is refused by the file's name."""

from __future__ import annotations

import json
import time
from fnmatch import fnmatchcase

import pytest
import torch
from torch import nn

from qat import QATConfig, prepare_qat
from qat.schemes.mapping_file import load_mapping
from qat.schemes.patterns import matches

RULES = {"MXFP4": {"weight": "search", "input": "even"}}
SOUND = QATConfig({"torch.nn.Linear": "MXFP4", "*.down": "FP8"}, ("lm_head",), RULES, {"learn_exponent": True})


def test_what_is_saved_is_read_again(tmp_path):
    SOUND.save(tmp_path)
    assert QATConfig.load(tmp_path) == SOUND
    assert QATConfig.load(tmp_path / "elsewhere") is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format_version": 2}, "format_version is 2"), ({"format_version": None}, "format_version is None"),
        ({"mapping": []}, "mapping is"), ({"mapping": None}, "mapping is None"), ({"mapping": {}}, "mapping is {}"),
        ({"mapping": {"torch.nn.Linear": 4}}, "mapping is"), ({"mapping": {"a": "MXFP5"}}, "'MXFP5' is unknown"),
        ({"mapping": {f"*{i}": "MXFP4" for i in range(10**5)}}, "100000 globs are more than 1000"),
        ({"ignore": "lm_head"}, "ignore is 'lm_head', not a list"), ({"ignore": [1]}, "ignore is"),
        ({"ignore": None}, "ignore is None"), ({"ignore": [f"?{i}" for i in range(10**5)]}, "more than 1000"),
        ({"scale_rules": []}, "scale_rules is"), ({"scale_rules": "even"}, "scale_rules is 'even'"),
        ({"scale_rules": {"MXFP4": {"weight": "even"}}}, "scale_rules of MXFP4 is"),
        ({"scale_rules": {"MXFP4": {"weight": 1, "input": None}}}, "rules are texts"),
        ({"scale_rules": {"MXFP4": {"weight": "evn", "input": None}}}, "evn"),
        ({"scale_rules": {"MXFP5": {"weight": "even", "input": None}}}, "'MXFP5' is unknown"),
        ({"training": []}, "training is"), ({"training": {"x": 1}}, "training has the unknown setting 'x'"),
        ({"training": {"learn_exponent": "yes"}}, "training.learn_exponent is 'yes', not of type bool"),
        ({"versions": "0.2"}, "versions is '0.2'"), ({"versions": {"torch": 2}}, "versions.torch is 2"),
        ({"surplus": 1}, "unknown key 'surplus'"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_a_configuration_of_another_form_is_refused_by_the_files_name(tmp_path, change, said):
    SOUND.save(tmp_path)
    path = tmp_path / "qat_config.json"
    content = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None or key != "x"}))
    with pytest.raises(ValueError, match=f"qat_config.json is not a QAT configuration .*{said}") as error:
        QATConfig.load(tmp_path)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("key", ["mapping", "ignore", "format_version"])
def test_what_a_configuration_lacks_is_named(tmp_path, key):
    SOUND.save(tmp_path)
    path = tmp_path / "qat_config.json"
    content = json.loads(path.read_text())
    del content[key]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"qat_config.json .*{key}"):
        QATConfig.load(tmp_path)


def test_a_mapping_file_is_held_to_the_same_limits(tmp_path):
    (tmp_path / "m.json").write_text(json.dumps({"mapping": {f"*{i}": "MXFP4" for i in range(2000)}}))
    with pytest.raises(ValueError, match="2000 globs are more than 1000"):
        load_mapping(tmp_path / "m.json")
    (tmp_path / "m.json").write_text("[" * 10**5)
    with pytest.raises(ValueError, match="m.json.* nested too deeply"):
        load_mapping(tmp_path / "m.json")


def test_a_slip_in_a_key_of_a_mapping_file_is_an_error_and_another_key_is_left_alone(tmp_path):
    path, mapping = tmp_path / "m.json", {"*": "MXFP4"}
    path.write_text(json.dumps({"mapping": mapping, "ignored": ["*.o_proj"]}))
    with pytest.raises(ValueError, match="m.json' has the key 'ignored', which is not read; say 'ignore'"):
        load_mapping(path)
    path.write_text(json.dumps({"mapping": mapping, "ignore": ["*.o_proj"], "layers": {}, "bits": 4.5}))
    assert load_mapping(path) == (mapping, ("*.o_proj",))
    path.write_text(json.dumps(mapping | {"ignore": ["*.o_proj"]}))
    with pytest.raises(ValueError, match='m.json\' has "ignore" beside layers, and no "mapping"; expected'):
        load_mapping(path)


def test_patterns_match_as_fnmatch_does_a_name_or_a_dotted_end_of_it():
    names = ("lm_head", "model.lm_head", "a.b.c", "a.b.cc", "xlm_head", "a", "model.layers.1.up")
    for pattern in ("lm_head", "*head", "b.?", "a.*", "[ab]*", "c", "model", "layers.1.*", "", "*"):
        for name in names:
            expected = fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
            assert matches(name, pattern) == expected, (name, pattern)


def test_a_hundred_thousand_names_are_matched_in_seconds():
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
    began = time.process_time()
    with pytest.raises(ValueError, match="matches no layer that can be quantized"):
        prepare_qat(model, {torch.nn.Linear: "MXFP4"} | {f"layer.{i}": "MXFP4" for i in range(10**5)})
    assert time.process_time() - began < 10
