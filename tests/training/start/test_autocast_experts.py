"""A stage in BF16 computes experts in BF16, as it does linear layers."""

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from tests.helpers import make_tokenizer
from training.arguments.model import ModelArguments
from training.start.start import Start


def test_the_experts_of_an_unquantized_model_are_computed_in_the_dtype_of_autocast(tmp_path, monkeypatch):
    sizes = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**sizes, **heads)).bfloat16().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model = Start.read(ModelArguments(str(tmp_path))).load_model()
    assert model.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.float32
    dtypes = []
    grouped_mm = torch.nn.functional.grouped_mm
    monkeypatch.setattr(
        torch.nn.functional, "grouped_mm", lambda a, b, **k: dtypes.append((a.dtype, b.dtype)) or grouped_mm(a, b, **k)
    )
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.arange(12)[None])
    assert dtypes == [(torch.bfloat16, torch.bfloat16)] * 2
