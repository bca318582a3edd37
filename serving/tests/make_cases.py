"""Step 1 of scripts/test_serving.sh, in this project's environment: checkpoints and expected outputs.

For each case a small Llama is packed, and its fake-quantized twin computes in FP32 the log-probability of each token of
the prompts, and the greedy continuation. In FP32, because BF16's noise flips FP4 decisions of two correct engines. vLLM
refuses FP32 for AutoRound's dialect, so that one is compared with weights quantized only, where noise stays noise.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qat import is_quantlinear, prepare_qat
from qat.checkpoints.pack import export_checkpoint
from qat.layers.restore import prepare_as_saved, set_input_rule

MIXED = {"torch.nn.Linear": "MXFP4", "*.down_proj": "MXFP8"}
# name -> (scheme, export format, rule of the activations in the engine)
CASES = {
    "mxfp4-even": ({"torch.nn.Linear": "MXFP4"}, "compressed-tensors", "even"),
    "mxfp4-floor": ({"torch.nn.Linear": "MXFP4"}, "compressed-tensors", "floor"),
    "mxfp4-auto-round": ({"torch.nn.Linear": "MXFP4_RCEIL"}, "auto_round", "none"),
    "mxfp8-floor": ({"torch.nn.Linear": "MXFP8"}, "compressed-tensors", "floor"),
    "mixed-even": (MIXED, "compressed-tensors", "even"),
}
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 4, 24, 16


def main(folder: Path) -> None:
    """Write each case into `folder`, and `cases.json`."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(2, 512, (PROMPTS, PROMPT_TOKENS), generator=generator)
    cases = {}
    for name, (mapping, export_format, rule) in CASES.items():
        source = folder / name / "source"
        prepared = prepare_qat(make_model(), mapping)
        prepared.save_pretrained(source)
        prepared.qat_config.save(source)
        export_checkpoint(source, folder / name / "packed", export_format)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        prepare_as_saved(model, prepared.qat_config)
        set_engine_rule(model, rule)
        exact = {"dtype": "float32", "tolerance": 1e-4} if rule != "none" else {"dtype": "bfloat16", "tolerance": 0.1}
        cases[name] = {"packed": str(folder / name / "packed"), "rule": rule, **exact, **expect(model.eval(), prompts)}
        set_engine_rule(model, "rceil")
        cases[name]["log_probabilities_under_another_rule"] = log_probabilities(model, prompts).tolist()
    (folder / "cases.json").write_text(json.dumps({"prompts": prompts.tolist(), "cases": cases}))


def set_engine_rule(model, rule: str) -> None:
    """Quantize inputs under `rule`, or not at all ("none")."""
    for layer in filter(is_quantlinear, model.modules()):
        if rule == "none":
            layer.input_quantizer.disable()
        else:
            layer.input_quantizer.enable()
    if rule != "none":
        set_input_rule(model, rule)


def make_model() -> LlamaForCausalLM:
    """Two layers with weights large enough for distinct answers, all shapes that vLLM's CPU kernels accept."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, max_position_embeddings=256, initializer_range=0.1,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).bfloat16()


def expect(model, prompts: torch.Tensor) -> dict:
    """Log-probabilities of the prompts' tokens [prompts, time - 1], and NEW_TOKENS greedy tokens."""
    tokens = prompts
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            tokens = torch.cat((tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    return {
        "log_probabilities": log_probabilities(model, prompts).tolist(),
        "greedy": tokens[:, prompts.shape[1] :].tolist(),
    }


@torch.no_grad()
def log_probabilities(model, prompts: torch.Tensor) -> torch.Tensor:
    """Of each token but the first [prompts, time - 1]."""
    logits = model(prompts, use_cache=False).logits[:, :-1].log_softmax(-1)
    return logits.gather(-1, prompts[:, 1:, None]).squeeze(-1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the cases and cases.json are written")
    main(parser.parse_args().folder)
