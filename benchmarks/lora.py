"""Measure the cost of LoRA-QAT over LoRA in BF16 by peft alone: time of steps and peak memory.

    python benchmarks/lora.py --shape smollm2-135m --layers 6 --batch 2 --length 256
    python benchmarks/lora.py --shape 8b --layers 32 --batch 2 --length 2048 --device cuda --checkpointing on

One set of frozen random BF16 weights serves all candidates, which take turns on the same batch: forward in BF16
autocast, backward and AdamW on adapters in FP32, in every linear layer but the head.

    peft            the model of transformers, adapters of peft, the loss of transformers from logits of the whole batch
    peft, chunked   the same, with the loss of this project, which all further candidates have, too
    BF16            adapters of this project without a scheme
    SCHEME          LoRA-QAT
    MXFP4, teacher  LoRA-QAD: distilled from the model itself, quantizers and adapters off

Where peft is not installed, `ReferenceLora` computes what peft computes. On a GPU the peak is that of PyTorch's
allocator in one step, with what a candidate alone would hold; on a CPU it is the resident size of a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch import nn  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: E402

from benchmarks.arguments import RETURN_FREED, add_workload, make_parser, peak_memory, use_device  # noqa: E402
from benchmarks.common import median_seconds  # noqa: E402
from benchmarks.report import Report  # noqa: E402
from benchmarks.workloads import llama_config, make_batch  # noqa: E402
from qat import get_scheme, prepare_qat  # noqa: E402
from qat.command_line import positive, positive_number  # noqa: E402
from qat.errors import reported_in_one_line  # noqa: E402
from qat.layers import adapted  # noqa: E402
from qat.layers.calibration import calibrate_inputs  # noqa: E402
from training.losses.chunked import attach, find_head  # noqa: E402
from training.losses.distillation import Objective  # noqa: E402
from training.teachers.itself import SelfTeacher  # noqa: E402

HAS_PEFT = importlib.util.find_spec("peft") is not None
PEFT, CHUNKED, BF16 = "peft", "peft, chunked", "BF16"
TEACHER = ", teacher"
CANDIDATES = f"{PEFT};{CHUNKED};{BF16};MXFP4;MXFP4FP8;NVFP4;MXFP4A16;INT4_G32;MXFP4{TEACHER}"
TIME, MEMORY = "1.15", "1.10"  # to be reached


class ReferenceLora(nn.Module):
    """A frozen linear layer with an adapter beside it, computed as in peft's layer; autograd keeps what it wants."""

    def __init__(self, base: nn.Linear, rank: int, scaling: float) -> None:
        super().__init__()
        device = base.weight.device
        self.base_layer, self.scaling = base, scaling
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=device, dtype=torch.float32)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=device, dtype=torch.float32)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T + s (x A^T) B^T: [..., in_features] -> [..., out_features]."""
        result = self.base_layer(x)
        added = self.lora_B(self.lora_A(x.to(self.lora_A.weight.dtype))) * self.scaling
        return (result + added).to(result.dtype)


def make_base(shape: str, layers: int, device: str) -> LlamaForCausalLM:
    """A random Llama in BF16, made on its device, frozen."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(llama_config(shape, layers), dtype=torch.bfloat16)
    return model.requires_grad_(False)


def sharing_weights(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy of a model with the very same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def linear_layers(model: LlamaForCausalLM) -> dict[str, nn.Linear]:
    """What "all-linear" means: every linear layer but the head."""
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def add_reference(model: LlamaForCausalLM, rank: int, alpha: float) -> LlamaForCausalLM:
    """Adapters of peft; without it, those that compute the same."""
    if HAS_PEFT:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear")
        return get_peft_model(model, config).base_model.model
    for name, layer in linear_layers(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, ReferenceLora(layer, rank, alpha / rank))
    return model


def add_adapters(model: LlamaForCausalLM, rank: int, alpha: float) -> LlamaForCausalLM:
    """Adapters of this project, as main.py adds them."""
    for name, layer in linear_layers(model).items():
        (outputs, inputs), device = layer.weight.shape, layer.weight.device
        a = nn.init.kaiming_uniform_(torch.empty(rank, inputs, device=device), a=5**0.5)
        adapted.attach(layer, a, torch.zeros(outputs, rank, device=device), alpha / rank, name)
    return model


class LoraStep:
    """Forward, backward and AdamW on the adapters of one candidate, over and over.

    Args:
        base: frozen; its parameters are shared.
    """

    def __init__(self, name: str, base: LlamaForCausalLM, args: argparse.Namespace) -> None:
        model = sharing_weights(base)
        self.is_whole, has_teacher = name == PEFT, name.endswith(TEACHER)
        torch.manual_seed(0)
        if name in (PEFT, CHUNKED):
            model = add_reference(model, args.rank, args.alpha)
        else:
            if name != BF16:
                prepare_qat(model, {nn.Linear: name.removesuffix(TEACHER)})
            add_adapters(model, args.rank, args.alpha)
            calibrate_inputs(model, [{"input_ids": torch.arange(64, device=model.device)[None]}])
        if args.checkpointing == "on":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model, self.batch = model.train(), make_batch(model, args.batch, args.length)
        if not self.is_whole:
            head = find_head(model)
            attach(model, head)
            self.teacher = SelfTeacher(model, head) if has_teacher else None
        self.run = torch.compile(model) if args.compiled else model
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def loss(self) -> torch.Tensor:
        """Forward in BF16 autocast."""
        with torch.autocast(self.model.device.type, torch.bfloat16):
            if self.is_whole:
                return self.run(**self.batch).loss
            teacher = None if self.teacher is None else self.teacher.rows(self.batch, self.run)
            objective = Objective(self.batch["labels"], teacher, {"ce": 1.0} if teacher is None else {"kl": 1.0})
            losses = self.run(input_ids=self.batch["input_ids"], objective=objective)
            return losses["loss"] / len(objective.targets)

    def __call__(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def held_bytes(self) -> int:
        """What the candidate alone holds between steps: weights, adapters and moments."""
        moments = [v for state in self.optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
        return sum(tensor.nbytes for tensor in [*self.model.parameters(), *moments])


def peak_on_gpu(step: LoraStep) -> float:
    """GiB at the peak of a step; what other candidates hold is left out."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before + step.held_bytes()) / 2**30


def print_peak_memory(args: argparse.Namespace) -> None:
    """The child of `peak_memory`: peak resident GiB of three steps."""
    step = LoraStep(args.memory_of, make_base(args.shape, args.layers, args.device), args)
    for _ in range(3):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def main() -> None:
    """Measure and report one shape."""
    parser = make_parser(__doc__, repeats=7)
    add_workload(parser)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rank", type=positive, default=16)
    parser.add_argument("--alpha", type=positive_number, default=32.0)
    parser.add_argument("--checkpointing", choices=("off", "on"), default="off", help="of activations, in all alike")
    parser.add_argument("--compiled", action="store_true", help="by torch.compile")
    parser.add_argument("--candidates", default=CANDIDATES, help="divided by semicolons")
    parser.add_argument("--no_memory", action="store_true", help="leave out peak memory")
    args = parser.parse_args()
    use_device(args.device)
    if args.memory_of:
        return print_peak_memory(args)
    measure(args, [name.strip() for name in args.candidates.split(";")])


def measure(args: argparse.Namespace, names: list[str]) -> None:
    """Measure all candidates and write the report."""
    report = Report(f"lora_{args.device}_{args.shape}_{args.checkpointing}", args.device)
    report.note("adapters of peft" if HAS_PEFT else "peft is not installed: its layer is written out")
    base = make_base(args.shape, args.layers, args.device)
    report.note(f"{sum(p.numel() for p in base.parameters()):,} parameters, rank {args.rank}")
    steps, peaks = {}, {}
    for name in names:
        if name not in (PEFT, CHUNKED, BF16):
            get_scheme(name.removesuffix(TEACHER))
        start = time.perf_counter()
        step = steps[name] = LoraStep(name, base, args)
        for _ in range(2):
            step()
        if not args.no_memory:
            peaks[name] = peak_on_gpu(step) if args.device == "cuda" else peak_memory(args, name, RETURN_FREED)
        report.note(f"[{name}: {time.perf_counter() - start:.0f} s]")
    seconds = median_seconds(steps, args.repeats, args.device, slow_rounds=args.repeats)
    for name in names:
        report.add(f"{name}: step", seconds[name] * 1e3, unit="ms")
    add_ratios(report, "step", seconds, names, TIME)
    for name in names if peaks else ():
        report.add(f"{name}: peak memory", peaks[name], unit="GiB")
    add_ratios(report, "peak memory", peaks, names, MEMORY)
    report.write(args.out)


def add_ratios(report: Report, figure: str, values: dict[str, float], names: list[str], reach: str) -> None:
    """Each candidate over each of the references, which come from peft."""
    for reference in [name for name in names if name in (PEFT, CHUNKED) and values]:
        for name in [name for name in names if name not in (PEFT, CHUNKED)]:
            report.add(f"{name}: {figure} over {reference}", values[name] / values[reference], reach)


if __name__ == "__main__":
    with reported_in_one_line():
        main()
