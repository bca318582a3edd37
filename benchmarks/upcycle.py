"""Make a mixture of experts of a dense Llama: the model of the mixture's rows in docs/results.md.

    python benchmarks/upcycle.py --model quickstart/smollm2 --gguf_file SmolLM2-135M-Instruct.Q4_1.gguf --out mixture
    python benchmarks/accuracy.py --model mixture --out mixture/rows --csv benchmarks/results/accuracy_mixture.csv \
        --rows bf16,MXFP4-floor-floor,MXFP4-ptq,default

Sparse upcycling (Komatsuzaki et al., arXiv:2212.05055): every expert begins as the dense layer, moved by a little noise
so that experts can become different, under a router of small random weights. The weights of a token's experts sum to 1,
so the mixture begins close to the dense model; fine-tuning in BF16, which `accuracy.py` does first, tells the experts
apart.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM  # noqa: E402

from qat.command_line import OneLineParser, not_negative_number, positive  # noqa: E402
from qat.errors import reported_in_one_line  # noqa: E402
from training.arguments.model import ModelArguments  # noqa: E402
from training.start.loading import load_tokenizer, load_unquantized  # noqa: E402

_SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id",
    "pad_token_id", "rope_parameters",
)  # fmt: skip


@torch.no_grad()
def upcycled(dense: LlamaForCausalLM, experts: int, active: int, noise: float) -> MixtralForCausalLM:
    """A Mixtral whose experts are copies of the dense layers, each weight moved by `noise` standard deviations."""
    settings = {name: getattr(dense.config, name) for name in _SHARED}
    config = MixtralConfig(**settings, num_local_experts=experts, num_experts_per_tok=active, sliding_window=None)
    torch.manual_seed(0)
    mixture = MixtralForCausalLM(config).float()
    dense = dense.float()
    own, missing = dense.state_dict(), []
    for name, tensor in mixture.state_dict().items():
        if name in own:
            tensor.copy_(own[name])
        else:
            missing.append(name)
    for source, target in zip(dense.model.layers, mixture.model.layers, strict=True):
        mlp = source.mlp
        copies = {
            "gate_up_proj": torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
            "down_proj": mlp.down_proj.weight,
        }
        for name, weight in copies.items():
            parameter = getattr(target.mlp.experts, name)
            parameter.copy_(weight.expand_as(parameter))
            parameter.add_(torch.randn_like(parameter), alpha=noise * float(weight.std()))
        target.mlp.gate.weight.normal_(0, 0.02)
    assert all(".mlp." in name for name in missing), missing
    mixture.generation_config = dense.generation_config
    return mixture


def main() -> None:
    """Read, make, write."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a Llama: folder or hub id")
    parser.add_argument("--gguf_file")
    parser.add_argument("--experts", type=positive, default=8)
    parser.add_argument("--active", type=positive, default=2, help="experts of a token")
    parser.add_argument("--noise", type=not_negative_number, default=0.1, help="in standard deviations of the weight")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    arguments = ModelArguments(args.model, args.gguf_file)
    mixture = upcycled(load_unquantized(arguments), args.experts, args.active, args.noise)
    mixture.to(torch.bfloat16).save_pretrained(args.out)
    load_tokenizer(arguments, 2048).save_pretrained(args.out)
    print(
        f"{sum(p.numel() for p in mixture.parameters()) / 1e6:.0f} M parameters, {args.experts} experts in {args.out}"
    )


if __name__ == "__main__":
    with reported_in_one_line():
        main()
