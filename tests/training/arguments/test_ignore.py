"""--ignore: it adds to what is ignored already, is recorded, and a run resumes only under the same."""

from __future__ import annotations

import json

import pytest
from helpers import make_llama

from qat import QATConfig, prepare_qat
from training.arguments.quantization import QuantizationArguments
from training.sensitivity.arguments import SensitivityArguments


def test_patterns_add_to_those_of_the_mapping_file_or_the_default(tmp_path):
    (tmp_path / "m.json").write_text(json.dumps({"mapping": {"*.mlp.*": "MXFP8"}, "ignore": ["*.up_proj"]}))
    given = ["re:.*down_proj", "*.up_proj"]
    mapped = QuantizationArguments(quant_mapping=str(tmp_path / "m.json"), ignore=given)
    assert mapped.layers() == ({"*.mlp.*": "MXFP8"}, ("*.up_proj", "re:.*down_proj"))
    assert QuantizationArguments(quant_scheme="MXFP4", ignore=given).layers()[1] == ("lm_head", *given)
    assert QuantizationArguments(quant_scheme="MXFP4").layers()[1] == ("lm_head",)
    assert SensitivityArguments(ignore=given).ignore == ["lm_head", *given]
    assert SensitivityArguments().ignore == ["lm_head"]


def test_patterns_are_recorded_and_compared_when_a_run_resumes(tmp_path):
    layers = QuantizationArguments(quant_scheme="MXFP4", ignore=["*.o_proj"]).layers()
    config = prepare_qat(make_llama(), *layers).qat_config
    config.save(tmp_path)
    saved = QATConfig.load(tmp_path)
    assert saved.ignore == ("lm_head", "*.o_proj") and saved.same_training(config)
    assert not saved.same_training(prepare_qat(make_llama(), {"torch.nn.Linear": "MXFP4"}).qat_config)


def test_patterns_without_anything_to_quantize_are_refused():
    with pytest.raises(ValueError, match=r"--ignore \*.o_proj has no effect without --quant_scheme or --quant_mapping"):
        QuantizationArguments(ignore=["*.o_proj"])
