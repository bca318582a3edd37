"""Count which share of the linear weights of published mixtures is quantized, on the meta device.

    python benchmarks/share.py

The configurations have the sizes of the published config.json files; no weight is allocated. Linear weights are all
weights with two or more dimensions but embeddings and the output head.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import transformers  # noqa: E402
from torch import nn  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from benchmarks.report import Report  # noqa: E402
from qat import prepare_qat, quantized_share  # noqa: E402
from qat.command_line import OneLineParser  # noqa: E402
from qat.errors import reported_in_one_line  # noqa: E402
from qat.layers.share import describe_left, describe_sites, left_unquantized, linear_weights  # noqa: E402
from qat.layers.sites import quantized_sites  # noqa: E402

REACH = 98  # per cent
MODELS = {
    "Qwen3-30B-A3B": ("Qwen3Moe", {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 768,
        "num_experts": 128, "num_experts_per_tok": 8,
    }),
    "gpt-oss-20b": ("GptOss", {
        "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32,
        "num_experts_per_tok": 4,
    }),
    "Mixtral-8x7B": ("Mixtral", {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
    }),
    "DeepSeek-V3": ("DeepseekV3", {
        "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "n_shared_experts": 1,
        "n_routed_experts": 256, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "qk_nope_head_dim": 128, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "first_k_dense_replace": 3,
    }),
}  # fmt: skip
NATIVE = "gpt-oss-20b"  # its native format holds experts only


def prepared(kind: str, sizes: dict, scheme: str, key: type | str = nn.Linear) -> nn.Module:
    """A model without weights, prepared for one scheme."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**sizes))
    with contextlib.redirect_stdout(io.StringIO()):
        return prepare_qat(model, {key: scheme})


def main() -> None:
    """Prepare each model, count, and write the rows."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scheme", default="MXFP4")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    report = Report("share")
    for name, (kind, sizes) in MODELS.items():
        model = prepared(kind, sizes, args.scheme)
        total = sum(weight.numel() for weight in linear_weights(model).values())
        report.add(f"{name}: linear weights", total / 1e9, unit="1e9")
        report.add(f"{name}: quantized", 100 * quantized_share(model), f"{REACH}", "%")
        report.note(f"  {describe_sites(quantized_sites(model))}")
        for line in describe_left(model, left_unquantized(model, model.qat_config)):
            report.note(f"  left unquantized: {line}")
    experts = prepared(*MODELS[NATIVE], args.scheme, "*.experts")
    report.add(f"{NATIVE}, native format: quantized", 100 * quantized_share(experts), unit="%")
    report.write(args.out)


if __name__ == "__main__":
    with reported_in_one_line():
        main()
