"""prepare_qat: which layers it takes, what it refuses, what it says."""

from __future__ import annotations

import pytest
import torch
from helpers import make_llama
from torch import nn

from qat import QATConfig, get_quantization_format, is_quantlinear, prepare_qat


def quantized(model: nn.Module) -> dict[str, str]:
    return {name: m.scheme.name for name, m in model.named_modules() if is_quantlinear(m)}


def test_default_is_mxfp8_for_every_linear_but_the_head():
    model = make_llama()
    assert prepare_qat(model) is model
    assert len(quantized(model)) == 14 and set(quantized(model).values()) == {"MXFP8"}
    assert type(model.lm_head) is nn.Linear


def test_later_mapping_entries_win():
    model = prepare_qat(make_llama(), {nn.Linear: "MXFP4", "*.down_proj": "MXFP8"})
    schemes = quantized(model)
    assert schemes["model.layers.0.mlp.down_proj"] == "MXFP8" and schemes["model.layers.0.mlp.up_proj"] == "MXFP4"
    assert get_quantization_format(model) == "mixed: MXFP4 x 12, MXFP8 x 2"
    assert get_quantization_format(model.model.layers[0].mlp.down_proj) == "MXFP8"
    assert get_quantization_format(make_llama()) is None


def test_an_earlier_type_key_does_not_win_over_a_later_one():
    model = prepare_qat(make_llama(), {"*.down_proj": "MXFP8", nn.Linear: "MXFP4"})
    assert set(quantized(model).values()) == {"MXFP4"}


def test_globs_alone_leave_other_layers_unquantized():
    model = prepare_qat(make_llama(), {"model.layers.1.*": "MXFP4_RCEIL"}, ignore=("o_proj", "lm_head"))
    assert all(name.startswith("model.layers.1.") for name in quantized(model)) and len(quantized(model)) == 6


def test_regular_expressions_match_from_the_beginning_of_a_name():
    model = prepare_qat(make_llama(), {r"re:model\.layers\.\d\.mlp": "MXFP4"}, ignore=("re:.*down_proj$",))
    assert set(quantized(model)) == {f"model.layers.{i}.mlp.{name}_proj" for i in (0, 1) for name in ("gate", "up")}


def test_disabled_quantizers_show_in_the_format():
    layer = prepare_qat(make_llama(), {"*.o_proj": "MXFP4"}).model.layers[0].self_attn.o_proj
    layer.input_quantizer.disable()
    assert get_quantization_format(layer) == "MXFP4 weight only"
    layer.weight_quantizer.disable()
    assert get_quantization_format(layer) is None


def test_tied_weights_stay_tied_and_computable():
    model = prepare_qat(make_llama(tie_word_embeddings=True), {nn.Linear: "MXFP4"}, ignore=())
    assert is_quantlinear(model.lm_head) and model.lm_head.weight is model.model.embed_tokens.weight
    model(input_ids=torch.arange(8)[None]).logits.sum().backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0


def test_meta_models_convert_and_compute_after_materializing():
    with torch.device("meta"):
        model = make_llama()
    prepare_qat(model, {nn.Linear: "MXFP4"})
    assert all(p.is_meta for p in model.parameters()) and len(quantized(model)) == 14
    assert model(input_ids=torch.zeros(1, 4, dtype=torch.long, device="meta")).logits.shape == (1, 4, 260)


@pytest.mark.parametrize(
    "mapping,ignore,message",
    [
        ({nn.Linear: "MXFP5"}, (), "'MXFP5' is unknown; choose one of MXFP4, MXFP8"),
        ("MXFP4", (), "mapping='MXFP4' does not map layers to schemes"),
        (
            {"*.no_such": "MXFP4"},
            (),
            "'\\*.no_such' matches no layer that can be quantized; the model has 15 weight modules: .*"
            r"model.layers.\*.mlp.up_proj, .*, lm_head",
        ),
        ({nn.Conv2d: "MXFP4"}, (), "mapping key .*Conv2d.* is neither"),
        ({nn.Linear: "MXFP4"}, ("*",), "nothing to quantize"),
        (
            {nn.Linear: "MXFP4"},
            ("no_such",),
            "ignore pattern 'no_such' .* matches no layer; give a name such as lm_head",
        ),
        ({nn.Linear: "MXFP4"}, ("lm_head", "model.layers.0"), "ignore pattern 'model.layers.0' .* matches no layer"),
        ({nn.Linear: "MXFP4"}, ("re:down_proj",), "ignore pattern 're:down_proj' .* matches no layer"),
        ({nn.Linear: "MXFP4"}, ("re:(",), "'re:\\(' is not a regular expression"),
        ({"re:nothing": "MXFP4"}, (), "'re:nothing' matches no layer that can be quantized"),
        ({nn.Linear: "MXFP4", "lm_head": "MXFP8"}, ("lm_head",), "'lm_head' matches only layers that ignore"),
    ],
)
def test_requests_that_cannot_be_met_are_errors_and_change_nothing(mapping, ignore, message):
    model = make_llama()
    with pytest.raises(ValueError, match=message):
        prepare_qat(model, mapping, ignore)
    assert not quantized(model)


def test_a_prepared_model_is_refused():
    with pytest.raises(ValueError, match="already a QuantLinear"):
        prepare_qat(prepare_qat(make_llama()))


def test_the_summary_counts_layers_and_says_why_others_were_left(capsys):
    model = make_llama()
    model.extra = nn.Conv1d(4, 4, 1)
    prepare_qat(model, {nn.Linear: "MXFP4", "*.down_proj": "MXFP8"}, ignore=("lm_head",))
    said = capsys.readouterr().out
    assert "12 linear layers in MXFP4" in said and "2 linear layers in MXFP8" in said
    assert "1 module with 16,640 weights (ignored by 'lm_head'), e.g. lm_head" in said
    assert "1 module with 16 weights (Conv1d is not a torch.nn.Linear" in said


def test_config_survives_saving_and_a_damaged_one_is_an_error(tmp_path):
    config = prepare_qat(make_llama(), {nn.Linear: "MXFP4_RCEIL"}).qat_config
    assert config.scale_rules == {"MXFP4_RCEIL": {"weight": "floor", "input": "rceil"}}
    assert QATConfig.load(tmp_path) is None
    config.save(tmp_path)
    assert QATConfig.load(tmp_path) == config
    (tmp_path / "qat_config.json").write_text('{"format_version": 99}')
    with pytest.raises(ValueError, match="qat_config.json is not a QAT configuration.*99"):
        QATConfig.load(tmp_path)
