"""Measure the cost of QAT over BF16 training in mixtures of experts: time of steps, bytes kept for backward.

    python benchmarks/experts.py --layers 1 --tokens 2048
    python benchmarks/experts.py --layers 4 --tokens 8192 --device cuda --schemes MXFP4,MXFP4A16,MXFP8,NVFP4

The model has the shape of Qwen3-30B-A3B: 128 experts of 768 x 2048 in each layer, 8 for each token. One set of weights
serves all candidates, which take turns on the same batch: the BF16 step of this project, that of transformers' own
grouped products with weights cast to BF16, and each scheme.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch import nn  # noqa: E402
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM  # noqa: E402
from transformers.integrations.moe import grouped_mm_experts_forward  # noqa: E402

from benchmarks.arguments import make_parser, use_device  # noqa: E402
from benchmarks.common import median_seconds  # noqa: E402
from benchmarks.report import Report  # noqa: E402
from benchmarks.workloads import TrainingStep, make_batch, saved_bytes_of_a_block  # noqa: E402
from qat import get_scheme, prepare_qat  # noqa: E402
from qat.command_line import positive  # noqa: E402
from qat.errors import reported_in_one_line  # noqa: E402
from qat.layers.calibration import calibrate_inputs  # noqa: E402
from qat.layers.experts import Experts  # noqa: E402
from qat.layers.sites import quantized_sites, quantizers_off  # noqa: E402

SIZES = {"hidden_size": 2048, "moe_intermediate_size": 768, "intermediate_size": 6144, "head_dim": 128}
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 4}


def make_model(layers: int, experts: int, device: str) -> Qwen3MoeForCausalLM:
    """A random mixture in FP32, prepared for QAT."""
    config = Qwen3MoeConfig(
        **SIZES, **HEADS, num_hidden_layers=layers, num_experts=experts, num_experts_per_tok=8, vocab_size=8192,
        max_position_embeddings=32768, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3MoeForCausalLM(config)
    return prepare_qat(model, {nn.Linear: "MXFP4"}).train()


@contextmanager
def products_of_transformers(model: nn.Module) -> Iterator[None]:
    """Let experts compute as transformers does, from weights cast to BF16."""
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    for module in experts:
        module.forward = _forward_of_transformers(module)  # hides that of the class
    try:
        with quantizers_off(model):
            yield
    finally:
        for module in experts:
            del module.forward


def _forward_of_transformers(module: nn.Module) -> Callable:
    def forward(hidden_states, top_k_index, top_k_weights):
        cast = {name: getattr(module, name).to(torch.bfloat16) for name in ("gate_up_proj", "down_proj")}
        settings = {"has_gate": True, "has_bias": False, "is_transposed": False, "has_post_expert_norm": False}
        own = SimpleNamespace(
            **cast, **settings, _is_expert_parallel=False, num_experts=module.num_experts,
            _apply_gate=module._apply_gate,
        )  # fmt: skip
        return grouped_mm_experts_forward(own, hidden_states, top_k_index, top_k_weights)

    return forward


@contextmanager
def quantized_in(model: nn.Module, scheme: str, rules: tuple[str | None, str | None]) -> Iterator[None]:
    """Let all layers compute in a scheme, under scale rules for weights and inputs."""
    for site in quantized_sites(model):
        site.module.set_scheme(get_scheme(scheme, *rules))
    yield


def candidates(model: nn.Module, schemes: dict[str, tuple]) -> dict[str, Callable]:
    """The contexts in which a step is measured, by name."""
    return {
        "BF16": lambda: quantizers_off(model),
        "transformers": lambda: products_of_transformers(model),
        **{name: lambda args=args: quantized_in(model, *args) for name, args in schemes.items()},
    }


def main() -> None:
    """Measure and report one shape."""
    parser = make_parser(__doc__, repeats=5)
    parser.add_argument("--layers", type=positive, default=1)
    parser.add_argument("--experts", type=positive, default=128)
    parser.add_argument("--tokens", type=positive, default=2048)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--schemes", default="MXFP4,MXFP4A16,MXFP8")
    parser.add_argument("--no_optimizer", action="store_true", help="measure forward and backward alone")
    args = parser.parse_args()
    use_device(args.device)
    schemes: dict[str, tuple] = {name: (name, (None, None)) for name in args.schemes.split(",")}
    if "MXFP4" in schemes:
        schemes["MXFP4, recipe"] = ("MXFP4", ("search", "even"))
    measure(args, make_model(args.layers, args.experts, args.device), schemes)


def measure(args: argparse.Namespace, model: Qwen3MoeForCausalLM, schemes: dict[str, tuple]) -> None:
    """Measure all candidates and write the report."""
    report = Report(f"experts_{args.device}", args.device)
    step = TrainingStep(model, make_batch(model, 1, args.tokens))
    for name, settings in schemes.items():
        if get_scheme(name.split(",")[0]).weight.format.tensor_scale is not None:
            with quantized_in(model, *settings):
                calibrate_inputs(model, [{"input_ids": torch.arange(64, device=model.device)[None]}])
    contexts = candidates(model, schemes)
    run = step if not args.no_optimizer else lambda: (step.loss().backward(), model.zero_grad())

    def within(context: Callable) -> Callable:
        def timed() -> None:
            with context():
                run()

        return timed

    seconds = median_seconds({name: within(c) for name, c in contexts.items()}, args.repeats, args.device)
    saved, peaks = {}, {}
    for name, context in contexts.items():
        with context():
            saved[name] = saved_bytes_of_a_block(model, args.tokens)
            if args.device == "cuda":
                gc.collect()
                torch.cuda.reset_peak_memory_stats()
                run()
                peaks[name] = torch.cuda.max_memory_allocated()
    report.note(
        f"{args.layers} layers, {args.experts} experts, {args.tokens} tokens, optimizer {not args.no_optimizer}"
    )
    report.add("BF16 step", seconds["BF16"], unit="s")
    reach = "1.25" if args.device == "cpu" else "1.15"
    for name in list(contexts)[1:]:
        for base, words in (("BF16", "BF16"), ("transformers", "transformers' BF16")):
            report.add(f"{name} step over {words}", seconds[name] / seconds[base], reach)
            report.add(f"{name} bytes kept for backward over {words}", saved[name] / saved[base], "0.75")
            if peaks:
                report.add(f"{name} peak memory over {words}", peaks[name] / peaks[base], "1.00")
    report.write(args.out)


if __name__ == "__main__":
    with reported_in_one_line():
        main()
