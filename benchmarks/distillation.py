"""Measure the cost of distillation: memory of the loss, time of a step per teacher, bytes and noise of a cache.

    python benchmarks/distillation.py --shape smollm2-135m --layers 6
    python benchmarks/distillation.py --model quickstart/smollm2 --gguf_file SmolLM2-135M-Instruct.Q4_1.gguf

Memory is what a forward and a backward pass need on top of weights and teacher: on a GPU the allocator's peak, on a CPU
the growth of the resident size of a fresh process, whose heap gives freed tensors back at once. "Whole logits" is the
plain way: the model's logits, converted to FP32 as accelerate converts them, then the loss. Steps of all teachers
alternate in one process on one batch. The noise of a cache is the distance of its gradient with respect to the logits
from that of the whole distribution, of a token and of the mean of all tokens, relative to the latter's norm there.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from benchmarks.arguments import RETURN_FREED, add_workload, make_parser, peak_memory, use_device  # noqa: E402
from benchmarks.common import median_seconds  # noqa: E402
from benchmarks.report import Report  # noqa: E402
from benchmarks.workloads import make_batch, make_model  # noqa: E402
from data.supervised import make_supervised_data_module  # noqa: E402
from qat import prepare_qat  # noqa: E402
from qat.command_line import positive  # noqa: E402
from qat.errors import reported_in_one_line  # noqa: E402
from training.arguments.distillation import CacheSettings  # noqa: E402
from training.arguments.model import ModelArguments  # noqa: E402
from training.losses.chunked import attach, find_head  # noqa: E402
from training.losses.distillation import HiddenRows, Objective, SampledRows, forward_kl, labelled_rows  # noqa: E402
from training.start.loading import load_tokenizer  # noqa: E402
from training.start.start import load_model  # noqa: E402
from training.teachers.frozen import FrozenTeacher  # noqa: E402
from training.teachers.load import load_teacher  # noqa: E402
from training.teachers.sampled_tokens import as_rows, bytes_of_a_token, sample_rows  # noqa: E402

LOSSES = ("cross-entropy, whole logits", "cross-entropy", "distillation, whole logits", "distillation")
CACHES = ((0, 32), (8, 8), (16, 16), (32, 32), (64, 64))


class Losses:
    """One student in MXFP4, its teachers, one batch; each method is the forward pass of a loss."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = torch.device(args.device)
        self.student = make_model(args.shape, None, args.layers, args.device)
        self.batch = make_batch(self.student, args.batch, args.length)
        self.teacher = FrozenTeacher(load_teacher(self.student, None), self.device)
        prepare_qat(self.student, {nn.Linear: "MXFP4"})
        self.head = find_head(self.student)
        attach(self.student, self.head)
        self.labels = self.batch["labels"]
        self.inputs = {"input_ids": self.batch["input_ids"]}

    def sampled(self, settings: CacheSettings) -> SampledRows:
        """What a cache holds of the batch."""
        hidden_rows = self.teacher.rows(self.batch)
        parts = [sample_rows(hidden_rows.head(rows), settings) for rows in hidden_rows.hidden.split(256)]
        return as_rows({name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def whole(self, distill: bool) -> torch.Tensor:
        """Logits of the batch in FP32, then the loss."""
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = self.student(**self.inputs).logits
        rows = labelled_rows(logits.float(), self.labels)
        if not distill:
            return nn.functional.cross_entropy(rows, self.labels[:, 1:].flatten())
        hidden_rows = self.teacher.rows(self.batch)
        with torch.no_grad():
            teacher = hidden_rows.head(hidden_rows.hidden)
        return forward_kl(rows, teacher).mean()

    def chunked(self, teacher: HiddenRows | SampledRows | None) -> torch.Tensor:
        """The loss of QATTrainer, in chunks."""
        objective = Objective(self.labels, teacher, {"kl": 1.0} if teacher else {"ce": 1.0})
        with torch.autocast(self.device.type, torch.bfloat16):
            return self.student(**self.inputs, objective=objective)["loss"] / len(objective.targets)

    def run(self, name: str) -> None:
        """Forward and backward of one of LOSSES."""
        if "whole" in name:
            loss = self.whole("distillation" in name)
        else:
            loss = self.chunked(self.teacher.rows(self.batch) if "distillation" in name else None)
        loss.backward()
        self.student.zero_grad()


def print_peak_memory(args: argparse.Namespace) -> None:
    """The child of `peak_memory`: GiB that forward and backward of a loss add."""
    losses = Losses(args)
    if args.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        losses.run(args.memory_of)
        print((torch.cuda.max_memory_allocated() - before) / 2**30)
        return
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    losses.run(args.memory_of)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(peak - pages * os.sysconf("SC_PAGE_SIZE") / 2**30)


def measure_steps(args: argparse.Namespace, report: Report) -> None:
    """Forward and backward under each teacher, over cross-entropy."""
    losses = Losses(args)
    cached = losses.sampled(CacheSettings())

    def backward(loss: torch.Tensor) -> None:
        loss.backward()
        losses.student.zero_grad()

    steps = {
        "cross-entropy": lambda: losses.run("cross-entropy"),
        "cross-entropy, whole logits": lambda: losses.run("cross-entropy, whole logits"),
        "teacher copy, whole logits": lambda: losses.run("distillation, whole logits"),
        "teacher copy": lambda: losses.run("distillation"),
        "teacher cache": lambda: backward(losses.chunked(cached)),
    }
    seconds = median_seconds(steps, args.repeats, args.device)
    report.add("cross-entropy, forward and backward", seconds["cross-entropy"], unit="s")
    for name in list(steps)[1:]:
        report.add(f"{name}, time over cross-entropy", seconds[name] / seconds["cross-entropy"])


@torch.no_grad()
def measure_caches(args: argparse.Namespace, report: Report) -> None:
    """Bytes and noise of caches of a real model's distributions on python-docs."""
    arguments = ModelArguments(args.model, args.gguf_file)
    model = load_model(arguments).to(args.device, torch.bfloat16).eval()
    tokenizer = load_tokenizer(arguments, 256)
    data = make_supervised_data_module("python-docs", tokenizer, eval_size=args.samples, on_bad_sample="skip")
    batch = data["data_collator"]([data["eval_dataset"][i] for i in range(args.samples)])
    batch = {name: value.to(args.device) for name, value in batch.items()}
    labels = batch.pop("labels")
    teacher = labelled_rows(model(**batch).logits, labels)[:2048]
    prepare_qat(model, {nn.Linear: "MXFP4"})
    student = labelled_rows(model(**batch).logits, labels)[:2048].float()
    p, q = student.softmax(-1), teacher.float().softmax(-1)
    exact = p - q
    report.add("teacher's logits in BF16, bytes of a token", 2 * teacher.shape[-1], unit="B")
    for top_k, samples in CACHES:
        settings = CacheSettings(top_k, samples)
        rows = as_rows(sample_rows(teacher, settings))
        estimate = p.scatter_add(1, rows.ids.long(), -rows.weights)
        noise = (estimate - exact).norm() / exact.norm()
        of_mean = (estimate - exact).mean(0).norm() / exact.mean(0).norm()
        name = f"cache of {top_k} tokens and {samples} samples"
        report.add(f"{name}, bytes of a token", bytes_of_a_token(settings, teacher.shape[-1]), unit="B")
        report.add(f"{name}, noise of a token's gradient", noise)
        report.add(f"{name}, noise of the mean over {len(p)} tokens", of_mean)
        top = q.topk(top_k + samples)
        biased = p - torch.zeros_like(q).scatter_(1, top.indices, top.values / top.values.sum(-1, keepdim=True))
        report.add(
            f"plain top {top_k + samples}, error of the mean", (biased - exact).mean(0).norm() / exact.mean(0).norm()
        )


def main() -> None:
    """Measure and report."""
    parser = make_parser(__doc__, repeats=5)
    add_workload(parser)
    parser.add_argument("--model", help="folder of a real model, for the noise of caches")
    parser.add_argument("--gguf_file", help="its GGUF file, if that is what the folder holds")
    parser.add_argument("--samples", type=positive, default=16, help="samples of python-docs for that")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    use_device(args.device)
    if args.memory_of:
        return print_peak_memory(args)
    report = Report("distillation_cache" if args.model else f"distillation_{args.shape}", args.device)
    if args.model:
        measure_caches(args, report)
    else:
        for name in LOSSES:
            report.add(f"{name}, memory of forward and backward", peak_memory(args, name, RETURN_FREED), unit="GiB")
        measure_steps(args, report)
    report.write(args.out)


if __name__ == "__main__":
    with reported_in_one_line():
        main()
