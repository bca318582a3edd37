"""Measure a full training in little memory: QAT with distillation of a whole model on one device, random weights.

    python benchmarks/memory.py                                          # Llama 8B on one GPU of 80 GB
    python benchmarks/memory.py --shape tiny --batch 2 --length 64       # on a CPU, to try it
    python benchmarks/memory.py --masters float32 --after_backward --layers 4
    torchrun --nproc_per_node 2 benchmarks/memory.py --masters float32 --after_backward   # FSDP2, to compare with

The step is that of main.py with --master_dtype, --optimizer_in_backward, --activation_checkpointing and --distill True:
the same quantized layers, loss in chunks, frozen teacher and optimizer. Weights are made on the device in the dtype of
the masters. The row has the peak of the memory that tensors take, from a model's creation on, and tokens in a second.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from benchmarks.arguments import make_parser, use_device  # noqa: E402
from benchmarks.report import Report  # noqa: E402
from benchmarks.workloads import make_batch  # noqa: E402
from qat import prepare_qat  # noqa: E402
from qat.command_line import not_negative, positive  # noqa: E402
from qat.errors import reported_in_one_line  # noqa: E402
from training.losses.chunked import Head, attach, find_head  # noqa: E402
from training.losses.distillation import Objective  # noqa: E402
from training.optimizers.in_backward import StepsInBackward  # noqa: E402
from training.optimizers.stochastic_adamw import StochasticAdamW  # noqa: E402
from training.teachers.frozen import FrozenTeacher  # noqa: E402

# name -> (hidden, intermediate, layers, heads, key-value heads, vocabulary)
SHAPES = {
    "llama-8b": (4096, 14336, 32, 32, 8, 128256),
    "smollm2-360m": (960, 2560, 32, 15, 5, 49152),
    "tiny": (64, 96, 2, 2, 1, 512),
}
SETTINGS = {"lr": 1e-5, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}


def make_llama(shape: str, layers: int, dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    """A random Llama whose parameters are made on `device` in `dtype`."""
    hidden, intermediate, depth, heads, kv_heads, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers or depth,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=False,
        max_position_embeddings=8192, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).train()
    finally:
        torch.set_default_dtype(torch.float32)


class Step:
    """Forward, backward and AdamW on one batch, over and over, as main.py with the same settings does."""

    def __init__(self, args, device: str) -> None:
        self.in_backward = None if args.after_backward else StepsInBackward()
        is_sharded, masters = dist.is_initialized(), getattr(torch, args.masters)
        teacher = None if args.no_teacher else make_llama(args.shape, args.layers, torch.bfloat16, device)
        self.teacher = None if teacher is None else FrozenTeacher(teacher, torch.device(device))
        if teacher is not None and is_sharded:
            self._shard_teacher(teacher)
        self.model = model = make_llama(args.shape, args.layers, masters, device)
        rules = {"weight_scale_rule": args.weight_scale_rule, "input_scale_rule": args.input_scale_rule}
        prepare_qat(model, {nn.Linear: args.scheme}, **{name: rule for name, rule in rules.items() if rule})
        attach(model, find_head(model))
        if is_sharded:
            shard(model)
        if not args.no_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.batch = make_batch(model, args.batch, args.length)
        if masters == torch.bfloat16:
            moments = getattr(torch, args.moments)
            self.optimizer: torch.optim.Optimizer = StochasticAdamW(
                model.parameters(), **SETTINGS, moment_dtype=moments
            )
        else:
            self.optimizer = torch.optim.AdamW(model.parameters(), **SETTINGS, fused=True)
        if self.in_backward is not None:
            self.in_backward.attach(self.optimizer)

    def _shard_teacher(self, teacher: LlamaForCausalLM) -> None:
        """The body is sharded; the head is whole on every device, as FrozenTeacher has it under FSDP."""
        head = self.teacher.head
        module = nn.Linear(1, 1, bias=False, device="meta")
        module.weight = nn.Parameter(teacher.lm_head.weight.detach(), requires_grad=False)
        self.teacher.head = Head(module, head.transform, head.value)
        teacher.lm_head = nn.Identity()
        shard(teacher.model)

    def __call__(self) -> float:
        """The loss."""
        with torch.autocast(self.model.device.type, torch.bfloat16):
            teacher = None if self.teacher is None else self.teacher.rows(self.batch)
            weights = {"ce": 1.0} if teacher is None else {"kl": 1.0}
            objective = Objective(self.batch["labels"], teacher, weights)
            losses = self.model(input_ids=self.batch["input_ids"], objective=objective)
            loss = losses["loss"] / len(objective.targets)
        loss.backward()
        if self.in_backward is not None:
            self.norm = self.in_backward.take_norm()
        self.optimizer.step()  # of nothing, once gradients were applied in backward
        self.optimizer.zero_grad()
        return float(loss.detach())


def shard(model: nn.Module) -> None:
    """FSDP2 as accelerate_config/fsdp2.yaml has it: whole decoder layers, gradients reduced in FP32."""
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    layers = model.model.layers if hasattr(model, "model") else model.layers
    for layer in layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def main() -> None:
    """Measure one setting: a row in memory.csv."""
    parser = make_parser(__doc__, repeats=5)
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--layers", type=not_negative, default=0, help="decoder layers, 0 for all of the shape")
    parser.add_argument("--batch", type=positive, default=2)
    parser.add_argument("--length", type=positive, default=2048)
    parser.add_argument("--scheme", default="MXFP4")
    parser.add_argument("--weight_scale_rule", default=None)
    parser.add_argument("--input_scale_rule", default=None)
    parser.add_argument("--masters", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--moments", choices=("bfloat16", "float32"), default="bfloat16", help="of BF16 weights")
    parser.add_argument("--after_backward", action="store_true", help="without --optimizer_in_backward")
    parser.add_argument("--no_checkpointing", action="store_true", help="keep activations")
    parser.add_argument("--no_teacher", action="store_true", help="learn labels, without a teacher")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    use_device(args.device)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    measure(args, processes)
    if processes > 1:
        dist.destroy_process_group()


def measure(args, processes: int) -> None:
    """Train `args.repeats` steps after two to warm up, and report."""
    is_gpu = args.device == "cuda"
    step, losses, seconds = Step(args, args.device), [], []
    parameters = sum(p.numel() for p in step.model.parameters())
    for number in range(2 + args.repeats):
        start = time.perf_counter()
        losses.append(step())
        if is_gpu:
            torch.cuda.synchronize()
        if number >= 2:
            seconds.append(time.perf_counter() - start)
    if processes > 1 and dist.get_rank():
        return
    peak = torch.cuda.max_memory_allocated() if is_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    steps = "after" if args.after_backward else "in"
    report = Report(f"memory_{args.shape}_{args.masters}_{processes}", args.device)
    report.note(
        f"{args.shape}, {parameters / 1e9:.3f} B parameters, {args.scheme}, {args.batch} x {args.length} tokens on "
        f"each of {processes} devices, masters {args.masters}, moments {args.moments}, steps {steps} backward, "
        f"checkpointing {not args.no_checkpointing}, teacher {not args.no_teacher}; losses "
        + ", ".join(f"{loss:.5f}" for loss in losses)
    )
    tokens = args.batch * args.length * processes / median(seconds)
    report.add("peak memory of a device, tensors" if is_gpu else "peak memory of the process", peak / 2**30, "", "GiB")
    if is_gpu:
        report.add("peak memory of a device, reserved", torch.cuda.max_memory_reserved() / 2**30, "", "GiB")
        report.add("memory of the device", torch.cuda.get_device_properties(0).total_memory / 2**30, "", "GiB")
    report.add("bytes a parameter at the peak", peak / parameters)
    report.add("tokens in a second, all devices", tokens)
    report.add("seconds of a step", median(seconds), "", "s")
    report.write(args.out)


if __name__ == "__main__":
    with reported_in_one_line():
        main()
