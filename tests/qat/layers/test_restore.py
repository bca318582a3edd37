"""One function restores a saved configuration, with the scale rules of each scheme."""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers import MIXED, make_llama, save_qat

from qat import QATConfig, get_scheme, prepare_qat
from qat.layers.restore import prepare_as_saved, set_input_rule
from qat.layers.sites import quantized_sites
from training.arguments.model import ModelArguments
from training.arguments.quantization import QuantizationArguments
from training.start.start import Start, saved_config

RULES = {"MXFP4": {"weight": "search", "input": "even"}, "MXFP8": {"weight": "floor", "input": "rceil"}}


def rules_of(model) -> dict[str, dict[str, str]]:
    return {site.scheme.name: site.scheme.rules for site in quantized_sites(model)}


def test_a_mixed_configuration_keeps_the_rules_of_each_scheme():
    config = QATConfig(MIXED, scale_rules=RULES)
    model = prepare_as_saved(make_llama(), config)
    assert rules_of(model) == RULES and model.qat_config is config
    again = prepare_qat(make_llama(), MIXED, scale_rules=RULES).qat_config
    assert again.same_training(config)


def test_a_stage_that_starts_from_a_mixed_folder_trains_under_its_rules(tmp_path):
    folder = save_qat(tmp_path / "trained", MIXED)
    QATConfig(MIXED, scale_rules=RULES).save(folder)
    start = Start.read(ModelArguments(str(folder)))
    for learns in (False, True):
        model = start.load_model()
        start.quantize(model, QuantizationArguments(learn_exponent=learns))
        assert rules_of(model) == RULES == model.qat_config.scale_rules
        assert model.qat_config.training == ({"learn_exponent": True} if learns else {})


def test_a_model_by_hub_id_finds_its_configuration_too(tmp_path, caplog):
    snapshot = tmp_path / "models--somebody--trained" / "snapshots" / "0123"
    shutil.copytree(save_qat(tmp_path / "trained", {"torch.nn.Linear": "MXFP8"}), snapshot)
    (tmp_path / "models--somebody--trained" / "refs").mkdir()
    (tmp_path / "models--somebody--trained" / "refs" / "main").write_text("0123")
    assert saved_config("somebody/trained", str(tmp_path)).mapping == {"torch.nn.Linear": "MXFP8"}
    start = Start.read(ModelArguments("somebody/trained"), str(tmp_path))
    model = start.load_model()
    start.quantize(model, QuantizationArguments())
    assert rules_of(model) == {"MXFP8": {"weight": "floor", "input": "floor"}}
    assert "is not known" not in caplog.text
    assert saved_config("somebody/unknown", str(tmp_path)) is None
    assert "Whether somebody/unknown was trained to be quantized is not known" in caplog.text
    (tmp_path / "models--somebody--plain" / "refs").mkdir(parents=True)
    (tmp_path / "models--somebody--plain" / "refs" / "main").write_text("0123")
    (tmp_path / "models--somebody--plain" / ".no_exist" / "0123").mkdir(parents=True)
    (tmp_path / "models--somebody--plain" / ".no_exist" / "0123" / "qat_config.json").touch()
    assert saved_config("somebody/plain", str(tmp_path)) is None and "somebody/plain" not in caplog.text


def test_inputs_can_be_put_under_the_rule_of_an_engine():
    model = prepare_qat(make_llama(), MIXED)
    set_input_rule(model, "even")
    assert rules_of(model) == {name: {"weight": "floor", "input": "even"} for name in ("MXFP4", "MXFP8")}
    with pytest.raises(ValueError, match="not possible for inputs in mxfp4"):
        set_input_rule(model, "search")


def test_weight_only_layers_take_no_rule_of_an_engine():
    model = prepare_qat(make_llama(), {torch.nn.Linear: "MXFP4A16", "*.down_proj": "MXFP4"})
    set_input_rule(model, "even")
    assert {name: rules["input"] for name, rules in rules_of(model).items()} == {"MXFP4A16": None, "MXFP4": "even"}
    with pytest.raises(ValueError, match="no layer quantizes its inputs"):
        set_input_rule(prepare_qat(make_llama(), {torch.nn.Linear: "MXFP4A16"}), "even")


def test_a_scheme_of_weights_alone_leaves_inputs_as_they_are():
    from qat import convert
    from qat.schemes.spec import Scheme

    scheme = Scheme("MXFP4A16", get_scheme("MXFP4").weight)
    layer = convert(torch.nn.Linear(64, 48), scheme, "layer")
    x = torch.randn(3, 64)
    assert layer.scheme == scheme and layer.scheme.rules == {"weight": "floor", "input": None}
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight_quantizer(layer.weight), layer.bias))
    with pytest.raises(ValueError, match="MXFP4A16 does not quantize inputs"):
        scheme.with_rules(input="even")
