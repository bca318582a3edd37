"""In every scheme, what adapters train is what is saved and packed: the same logits, bit for bit."""

from __future__ import annotations

import pytest
import torch
from helpers import make_llama, make_mixture
from peft import LoraConfig
from trainers import make_data, make_trainer
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from qat import QATConfig, prepare_qat
from qat.checkpoints.pack import export_checkpoint
from qat.checkpoints.verify import verify
from qat.layers.lora import adapters
from qat.layers.restore import prepare_as_saved
from qat.schemes.presets import SCHEMES
from training.adapters.inject import add_adapters
from training.start.calibration import calibrate_with_data

IDS = torch.arange(4, 52).reshape(2, 24)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict:
    return make_data(tmp_path_factory.mktemp("data"))


def wide_llama() -> PreTrainedModel:
    """One layer that fits blocks of 128, with tied embeddings."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def train(folder, model: PreTrainedModel, data: dict, scheme: str | None, targets="all-linear", **options):
    """Two steps with the model as its own teacher, in BF16 over a frozen base; saved to `folder`/out."""
    for parameter in model.parameters():  # not the rotary frequencies, which are FP32 in a model that is loaded
        parameter.data = parameter.data.bfloat16()
    if scheme is not None:
        prepare_qat(model, {torch.nn.Linear: scheme, **options.pop("mapping", {})}, **options)
    add_adapters(model, LoraConfig(r=4, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    calibrate_with_data(model, data, 4, torch.device("cpu"))
    trainer = make_trainer(folder, model, data, "self", learning_rate=1e-2, distill_ce_weight=0.5)
    trainer.train()
    assert all(module.adapter.lora_B.any() for module in adapters(model).values())
    trainer.save_model()
    return model


def saved(folder) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.bfloat16)
    config = QATConfig.load(folder / "out")
    return model if config is None else prepare_as_saved(model, config)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model.eval()(input_ids=IDS).logits.float()


PACKED = ("MXFP4", "MXFP8A16", "MXFP4FP8_G128", "NVFP4", "INT4_G32", "FP8")  # one of each format


# Other scale rules and blocks make no difference here; tests/qat/layers/test_lora.py computes with every scheme.
TRAINED = sorted({*SCHEMES} - {"MXFP4_RCEIL", "MXFP8_RCEIL", "INT4_G128", "MXFP8"})


@pytest.mark.parametrize("scheme", TRAINED)
def test_the_trained_model_is_the_merged_one_that_is_saved_and_packed(scheme, data, tmp_path):
    trained = train(tmp_path, wide_llama(), data, scheme)
    assert torch.equal(logits(trained), logits(saved(tmp_path)))
    if scheme in PACKED:
        export_checkpoint(tmp_path / "out", tmp_path / "packed")
        verdict = verify(tmp_path / "packed", tmp_path / "out", with_logits=False)
        assert verdict["verified"] and verdict["weights"]["elements_that_differ"] == 0


def small(kind: str, **settings) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=260, **settings))


MODELS = {  # the model, the scheme, the layers with adapters, settings of prepare_qat
    "Conv1D": (lambda: small("gpt2", n_embd=64, n_layer=1, n_head=2, n_positions=64), "MXFP4", "all-linear", {}),
    "Falcon": (
        lambda: small("falcon", hidden_size=64, num_hidden_layers=1, num_attention_heads=2, bias=True),
        "MXFP4", "all-linear", {},
    ),
    "frozen experts": (
        lambda: make_mixture(layers=1), "MXFP4", ["q_proj", "v_proj"], {"mapping": {"*.experts": "MXFP8"}},
    ),
    "key/value cache": (make_llama, "MXFP8", "all-linear", {"kv_cache_scheme": "FP8"}),
    "adapted head": (lambda: make_llama(tie_word_embeddings=False), "MXFP4", ["lm_head", "down_proj"], {}),
    "not quantized": (make_llama, None, ["q_proj", "up_proj"], {}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_other_layers_are_trained_as_they_are_saved(name, data, tmp_path):
    make, scheme, targets, options = MODELS[name]
    trained = train(tmp_path, make(), data, scheme, targets, **options)
    assert torch.equal(logits(trained), logits(saved(tmp_path)))
