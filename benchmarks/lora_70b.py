"""Train adapters of a model of 70B shape whose frozen base is packed: memory and time of a step on one GPU.

    python benchmarks/lora_70b.py --out benchmarks/results
    python benchmarks/lora_70b.py --device cpu --hidden 256 --intermediate 512 --layers 2 --vocabulary 1024 --tokens 64

The model has the shape of Llama 3 70B and random weights. It is made on the device layer by layer, each layer's weights
being packed before the next layer is made, so that no BF16 copy of the base exists at any time. Then adapters of all
linear layers are trained as `main.py --base_in_scheme True --activation_checkpointing True` does: BF16 autocast, the
loss in chunks of tokens, AdamW in FP32.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch import nn  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from benchmarks.arguments import make_parser, use_device  # noqa: E402
from benchmarks.common import median_seconds  # noqa: E402
from benchmarks.report import Report  # noqa: E402
from benchmarks.workloads import make_batch  # noqa: E402
from qat import SCHEMES, prepare_qat  # noqa: E402
from qat.command_line import positive  # noqa: E402
from qat.errors import reported_in_one_line  # noqa: E402
from qat.layers.adapted import attach as attach_adapter  # noqa: E402
from qat.layers.lora import adapters  # noqa: E402
from qat.layers.packed_base import pack_base  # noqa: E402
from qat.layers.sites import quantized_sites  # noqa: E402
from training.losses.chunked import attach as attach_head  # noqa: E402
from training.losses.chunked import find_head  # noqa: E402
from training.losses.distillation import Objective  # noqa: E402

REACH_BYTES = 48e9
ALPHA = 32


def make_model(args: argparse.Namespace) -> LlamaForCausalLM:
    """The model on the device, its base packed or, with `--no_packing`, in BF16; adapters add nothing yet."""
    config = LlamaConfig(
        hidden_size=args.hidden, intermediate_size=args.intermediate, num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 128, num_key_value_heads=max(1, args.hidden // 1024),
        vocab_size=args.vocabulary, tie_word_embeddings=False, max_position_embeddings=8192, use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    prepare_qat(model, {nn.Linear: args.scheme}, weight_scale_rule=args.weight_scale_rule)
    model.requires_grad_(False)
    torch.manual_seed(0)
    for layer in model.model.layers:
        fill(layer, args.device)
        if not args.no_packing:
            pack_base(layer)
    for module in (model.model.embed_tokens, model.model.norm, model.lm_head):
        fill(module, args.device)
    with torch.device(args.device):  # its frequencies are no weights
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    for site in quantized_sites(model):
        add_adapter(site.module, args.rank, args.device)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    attach_head(model, find_head(model))
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    return model.train()


def fill(module: nn.Module, device: str) -> None:
    """Give the parameters of a module memory on the device and random values; those of norms are 1."""
    module.to_empty(device=device)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.02) if parameter.ndim > 1 else parameter.data.fill_(1)


def add_adapter(layer: nn.Linear, rank: int, device: str) -> None:
    """A as PEFT begins it, B zero."""
    a = torch.empty(rank, layer.in_features, device=device)
    nn.init.kaiming_uniform_(a, a=5**0.5)
    attach_adapter(layer, a, torch.zeros(layer.out_features, rank, device=device), ALPHA / rank)


class AdapterStep:
    """Forward, backward and AdamW of the adapters on one batch, over and over."""

    def __init__(self, model: LlamaForCausalLM, tokens: int) -> None:
        self.model, self.batch = model, make_batch(model, 1, tokens)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        self.losses: list[float] = []

    def __call__(self) -> None:
        with torch.autocast(self.model.device.type, torch.bfloat16):
            objective = Objective(self.batch["labels"], None, {"ce": 1.0})
            losses = self.model(input_ids=self.batch["input_ids"], objective=objective)
            loss = losses["loss"] / len(objective.targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(float(loss.detach()))


def peak(args: argparse.Namespace) -> tuple[int, int]:
    """Bytes that tensors and the allocator have held at most since the last call; 0 on a CPU."""
    if args.device == "cpu":
        return 0, 0
    found = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return found


def measure(args: argparse.Namespace, report: Report) -> None:
    """Build, train, and report one shape."""
    begin = time.perf_counter()
    model = make_model(args)
    report.add("building", time.perf_counter() - begin, unit="s")
    linear = sum(site.shape[0] * site.shape[1] for site in quantized_sites(model))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    held = sum(p.nbytes for p in model.parameters())
    frozen = sum(p.nbytes for site in quantized_sites(model) for p in site.module.parameters() if not p.requires_grad)
    report.add("weights of quantized layers", linear / 1e9, unit="1e9")
    report.add("adapters", len(adapters(model)))
    report.add("trained parameters", trained / 1e6, unit="1e6")
    report.add("frozen weights of quantized layers, bits a value", 8 * frozen / linear)
    report.add("all parameters", held / 1e9, unit="GB")
    report.add("peak while building", peak(args)[0] / 1e9, unit="GB")
    step = AdapterStep(model, args.tokens)
    seconds = median_seconds({"step": step}, args.repeats, args.device)["step"]
    allocated, reserved = peak(args)
    report.add(f"peak of training, {args.tokens} tokens", allocated / 1e9, f"{REACH_BYTES / 1e9:.0f}", "GB")
    report.add("the same, held by the allocator", reserved / 1e9, unit="GB")
    report.add("step", seconds, unit="s")
    report.add("tokens a second", args.tokens / seconds)
    report.add("loss of the first step", step.losses[0])
    report.add("loss of the last step", step.losses[-1])


def main() -> None:
    """Measure one shape and write the report."""
    parser = make_parser(__doc__, repeats=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--scheme", choices=SCHEMES, default="MXFP4")
    parser.add_argument("--weight_scale_rule", default="search")
    parser.add_argument("--rank", type=positive, default=16)
    parser.add_argument("--tokens", type=positive, default=1024)
    parser.add_argument("--hidden", type=positive, default=8192)
    parser.add_argument("--intermediate", type=positive, default=28672)
    parser.add_argument("--layers", type=positive, default=80)
    parser.add_argument("--vocabulary", type=positive, default=128256)
    parser.add_argument("--no_packing", action="store_true", help="keep the base in BF16, for comparison")
    args = parser.parse_args()
    use_device(args.device)
    report = Report(f"lora_70b_{args.device}", args.device)
    kind = "BF16" if args.no_packing else "packed"
    report.note(f"{args.layers} layers, hidden {args.hidden}, {args.scheme}, rank {args.rank}, base {kind}")
    measure(args, report)
    report.write(args.out)


if __name__ == "__main__":
    with reported_in_one_line():
        main()
