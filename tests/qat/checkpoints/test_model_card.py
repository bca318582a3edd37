"""The model card: what people read and what the Hub reads say the same, and say what is true."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import save_llama, save_qat
from huggingface_hub import ModelCard

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


def test_a_card_without_metrics_has_neither_an_index_nor_a_section_of_them(tmp_path):
    card = card_of(save_qat(tmp_path / "source", {"torch.nn.Linear": "MXFP8"}), tmp_path / "packed", {})
    assert card.data.eval_results is None and "## Results" not in card.text
    assert "model-index" not in card.content and "model_name" not in card.content


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_is_described_by_the_fields_of_its_formats(name):
    said = describe_scheme(get_scheme(name))
    if name == "FP8":
        assert said == (
            "FP8: weights in fp8_channel (not an OCP Microscaling format; values in E4M3, 8 bits; each output channel "
            "has a scale in BF16), activations in fp8_token (not an OCP Microscaling format; values in E4M3, 8 bits; "
            "each token has a scale in FP32)"
        )
    else:
        element, bits = {"MXFP4": ("E2M1", 4), "MXFP8": ("E4M3", 8)}[name.removesuffix("_RCEIL")]
        assert said == (
            f"{name}: weights in {name[:5].lower()} (an OCP Microscaling format; values in {element}, {bits} bits; "
            "32 values share a scale in E8M0), activations in the same format"
        )
