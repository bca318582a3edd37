"""The model card: what people read and what the Hub reads say the same, and say what is true."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import save_llama, save_qat
from huggingface_hub import ModelCard
from tiny_families import save_family

from qat import SCHEMES, get_scheme
from qat.checkpoints.model_card import CardFacts, describe_scheme
from qat.checkpoints.pack import export_checkpoint

RESULTS = {"eval_loss": 2.5257, "eval_perplexity": 12.5, "eval_kl": 0.33, "train_loss": 2.7, "eval_runtime": 3.0}
FACTS = CardFacts("meta-llama/Llama-3.2-1B", "python-docs")


def card_of(source: Path, target: Path, results: dict[str, float], **settings) -> ModelCard:
    """The card of `source`, exported after a run that measured `results`."""
    (source / "all_results.json").write_text(json.dumps(results), encoding="utf-8")
    return ModelCard.load(export_checkpoint(source, target, facts=FACTS, **settings) / "README.md")


def test_metrics_of_the_run_are_in_the_metadata_of_the_card(tmp_path):
    card = card_of(save_qat(tmp_path / "source", {"torch.nn.Linear": "MXFP4"}), tmp_path / "packed", RESULTS)
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {"loss": 2.5257, "perplexity": 12.5, "kl_divergence": 0.33}
    assert {result.dataset_name for result in card.data.eval_results} == {"python-docs, held-out samples"}
    assert card.data.model_name == "Llama-3.2-1B MXFP4" and card.data.base_model == "meta-llama/Llama-3.2-1B"
    for said in ("| perplexity in evaluation | 12.5000 |", "| loss in training | 2.7000 |", "vllm serve"):
        assert said in card.text, said


def test_metrics_of_an_unquantized_source_are_not_claimed_for_the_packed_model(tmp_path):
    card = card_of(save_llama(tmp_path / "source"), tmp_path / "packed", RESULTS, scheme="MXFP4")
    assert card.data.eval_results is None and "12.5" not in card.data.to_yaml()
    assert "**Not of these files**" in card.text and "| perplexity in evaluation | 12.5000 |" in card.text


def test_metrics_that_are_not_finite_stay_out_of_the_metadata(tmp_path):
    results = {"eval_loss": 800.0, "eval_perplexity": float("inf")}
    card = card_of(save_qat(tmp_path / "source", {"torch.nn.Linear": "FP8"}), tmp_path / "packed", results)
    assert [result.metric_type for result in card.data.eval_results] == ["loss"]
    assert "| perplexity in evaluation | inf |" in card.text


def test_a_card_says_how_keys_and_values_are_cached(tmp_path):
    source, scales = save_llama(tmp_path / "source", layers=1), ("k_scale", "v_scale")
    settings = {"scheme": "FP8", "calibrated_scales": {f"model.layers.0.self_attn.{name}": 0.5 for name in scales}}
    cached = card_of(source, tmp_path / "cached", {}, kv_cache_scheme="FP8", **settings)
    assert "| key/value cache | FP8: values in E4M3; the keys of a layer have one scale in FP32, its" in cached.text
    plain = card_of(source, tmp_path / "plain", {}, scheme="FP8")
    assert "| key/value cache | not quantized |" in plain.text


def test_a_card_says_the_share_and_what_was_left_and_why(tmp_path):
    ignore = ("lm_head", "layers.0.mlp.up_proj")
    card = card_of(save_llama(tmp_path / "source"), tmp_path / "packed", {}, scheme="MXFP4", ignore=ignore)
    weights = 2 * (3 * 64 * 96 + 2 * 64 * 64 + 2 * 32 * 64)
    assert f"\n{100 * (1 - 64 * 96 / weights):.1f} % of the linear weights are quantized: 13 linear layers" in card.text
    left = [f"1 module with {count:,} weights (ignored by {name!r}), e.g. " for name, count in
            (("lm_head", 260 * 64), ("layers.0.mlp.up_proj", 96 * 64))]  # fmt: skip
    assert f"| left unquantized | {left[0]}lm_head; {left[1]}model.layers.0.mlp.up_proj |" in card.text


def test_a_card_tells_experts_from_linear_layers(tmp_path):
    source, rules = save_family("mixtral", tmp_path / "source"), "| scale rule of the activations in transformers |"
    quantized = card_of(source, tmp_path / "quantized", {}, scheme="MXFP4").text
    assert f"{rules} EVEN; experts NOT QUANTIZED |" in quantized and "from_pretrained" in quantized
    by_options = card_of(source, tmp_path / "options", {}, scheme="MXFP4MXFP8").text
    option = "--quantization-config.{}.activation mxfp8"
    assert option.format("linear") in by_options and option.format("moe") in by_options
    weights_only = card_of(source, tmp_path / "weights", {}, scheme="MXFP4A16").text
    assert f"{rules} NOT QUANTIZED |" in weights_only


def test_a_card_offers_no_way_of_loading_that_fails(tmp_path):
    text = card_of(save_family("mixtral", tmp_path / "source"), tmp_path / "packed", {}, scheme="MXFP8").text
    assert "transformers cannot load these files: " in text and "multiplies experts in mxfp8" in text
    assert "from_pretrained" not in text and "in transformers | not loaded there, see below |" in text


def test_a_card_without_metrics_has_neither_an_index_nor_a_section_of_them(tmp_path):
    card = card_of(save_qat(tmp_path / "source", {"torch.nn.Linear": "MXFP8"}), tmp_path / "packed", {})
    assert card.data.eval_results is None and "## Results" not in card.text
    assert "model-index" not in card.content and "model_name" not in card.content


MX = "an OCP Microscaling format; values in {}, {} bits; 32 values share a scale in E8M0"
OTHER = "not an OCP Microscaling format; values in {}, {} bits; "
MXFP4, MXFP8 = f"mxfp4 ({MX.format('E2M1', 4)})", f"mxfp8 ({MX.format('E4M3', 8)})"
NVFP4 = f"nvfp4 ({OTHER.format('E2M1', 4)}16 values share a scale in E4M3, and the tensor has one in FP32)"
TOKEN = f"fp8_token ({OTHER.format('E4M3', 8)}each token has a scale in FP32)"
DESCRIBED = {  # weights, activations
    "MXFP4": (MXFP4, "in the same format"),
    "MXFP8": (MXFP8, "in the same format"),
    "MXFP4_RCEIL": (MXFP4, "in the same format"),
    "MXFP8_RCEIL": (MXFP8, "in the same format"),
    "MXFP4A16": (MXFP4, "not quantized"),
    "MXFP8A16": (MXFP8, "not quantized"),
    "MXFP4FP8": (MXFP4, f"in {TOKEN}"),
    "MXFP4FP8_G128": (MXFP4, f"in fp8_g128 ({OTHER.format('E4M3', 8)}128 values share a scale in FP32)"),
    "MXFP4MXFP8": (MXFP4, f"in {MXFP8}"),
    "NVFP4": (NVFP4, "in the same format"),
    "NVFP4A16": (NVFP4, "not quantized"),
    "INT4_G32": (f"int4_g32 ({OTHER.format('INT4', 4)}32 values share a scale in BF16)", "not quantized"),
    "INT4_G128": (f"int4_g128 ({OTHER.format('INT4', 4)}128 values share a scale in BF16)", "not quantized"),
    "FP8": (f"fp8_channel ({OTHER.format('E4M3', 8)}each output channel has a scale in BF16)", f"in {TOKEN}"),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_is_described_by_the_fields_of_its_formats(name):
    weights, activations = DESCRIBED[name]
    assert describe_scheme(get_scheme(name)) == f"{name}: weights in {weights}, activations {activations}"


def test_the_card_of_weight_only_layers_says_that_activations_are_not_quantized(tmp_path):
    source = save_qat(tmp_path / "source", {"torch.nn.Linear": "INT4_G32", "*.down_proj": "MXFP8"})
    text = card_of(source, tmp_path / "packed", RESULTS).text
    assert "* INT4_G32: weights in int4_g32 " in text and ", activations not quantized, in 12 linear layers." in text
    assert "| scale rule of the activations in training | FLOOR, NOT QUANTIZED |" in text
    assert "| scale rule of the activations in transformers | EVEN, NOT QUANTIZED |" in text


def test_text_of_the_divergence_is_told_beside_the_data():
    facts = CardFacts("M", "chats.jsonl", generic="teacher:500")
    assert facts.training == "chats.jsonl; in the divergence from the teacher also teacher:500"
    assert facts.evaluation == "chats.jsonl, held-out samples" and FACTS.training == "python-docs"
