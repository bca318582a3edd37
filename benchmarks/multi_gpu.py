"""Compare training on two GPUs with training on one: main.py in one process and with each backend.

Each stage is compared: fine-tuning, QAT and QAT with distillation.

    python benchmarks/multi_gpu.py --out benchmarks/results                 # two GPUs, about six minutes
    python benchmarks/multi_gpu.py --device cpu --backends ddp,fsdp2        # two gloo processes

The reference is one process that accumulates over as many batches as the others have processes, so that all see the
same batches in the same order. The table compares the losses of all steps, the final weights, and the losses of a run
that resumes from a checkpoint in the middle. A backend that fails is a row with its error.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import transformers  # noqa: E402
from helpers import make_tokenizer, write_conversations  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: E402

from benchmarks.accuracy_rows import ROWS  # noqa: E402
from benchmarks.arguments import chosen  # noqa: E402
from benchmarks.launch import launcher, offline, run_logged  # noqa: E402
from benchmarks.report import check_device, environment  # noqa: E402
from qat.command_line import OneLineParser, positive, positive_number  # noqa: E402
from qat.errors import reported_in_one_line  # noqa: E402

STAGES = {"BF16": (), "MXFP4": ("--quant_scheme", "MXFP4")}
CE_WEIGHT = ROWS["recipe"].distill_options["distill_ce_weight"]
STAGES["distilled"] = (*STAGES["MXFP4"], "--distill", "True", "--distill_ce_weight", str(CE_WEIGHT))
BACKENDS = ("ddp", "fsdp1", "fsdp2")
COLUMNS = (
    "stage",
    "backend",
    "loss_difference",
    "weight_difference",
    "whole",
    "resumed_difference",
    "seconds",
    "error",
)


def make_model(folder: Path) -> Path:
    """A random Llama of 18 M parameters with tied embeddings and a tokenizer of bytes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=512, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


class Runs:
    """Launches main.py with the same settings on one process or under a backend."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.work = args, work
        self.model = Path(args.model).resolve() if args.model else make_model(work / "model")
        self.data = write_conversations(work / "data.jsonl", 400)
        self.port = 20000 + os.getpid() * 16 % 20000

    def command(self, backend: str) -> list[str]:
        """The launcher's part of the command line."""
        if backend == "one":
            return [sys.executable, "main.py"]
        self.port += 1
        on_cpu = self.args.device == "cpu" and backend.startswith("fsdp")
        return [*launcher(backend, self.args.processes, self.port), "tests/fsdp_on_cpu.py" if on_cpu else "main.py"]

    def run(self, stage: str, backend: str, name: str, *flags: str) -> tuple[Path, list[float], float]:
        """One run into a folder of its own -> folder, loss of each step, seconds.

        Raises:
            RuntimeError: main.py failed or took too long; the message is the end of its output.
        """
        folder = self.work / name
        one = backend == "one"
        command = [
            *self.command(backend),
            "--model_name_or_path", str(self.model), "--dataset", str(self.data), "--eval_size", "8",
            "--data_cache_dir", str(self.work / "cache"), "--output_dir", str(folder), "--do_train", "True",
            "--max_steps", str(self.args.steps), "--save_steps", str(self.args.steps // 2),
            "--per_device_train_batch_size", "4", "--learning_rate", str(self.args.learning_rate),
            "--gradient_accumulation_steps", str(self.args.processes if one else 1),
            "--logging_steps", "1", "--report_to", "none", "--disable_tqdm", "True", "--export_format", "none",
            "--ddp_timeout", "120", *STAGES[stage], *self.args.flags, *flags,
        ]  # fmt: skip
        environment_of_run = offline()
        if one and self.args.device == "cuda":
            environment_of_run["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        start = time.perf_counter()
        run_logged(command, self.work / f"{name}.log", environment_of_run, self.args.timeout)
        return folder, losses(folder), time.perf_counter() - start


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def difference(a: list[float], b: list[float]) -> float:
    """Largest relative difference of two lists of losses; infinite when one is shorter."""
    if len(a) != len(b) or not a:
        return float("inf")
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def check_whole(folder: Path, reference: dict[str, torch.Tensor]) -> tuple[str, float]:
    """Whether the checkpoint has the reference's names, shapes and dtypes and loads; largest difference of a weight."""
    saved = weights(folder)
    if saved.keys() != reference.keys():
        return f"keys differ: {sorted(saved.keys() ^ reference.keys())[:3]}", float("inf")
    wrong = [k for k, v in saved.items() if (v.dtype, v.shape) != (reference[k].dtype, reference[k].shape)]
    if wrong:
        return f"{wrong[0]} is {saved[wrong[0]].dtype}", float("inf")
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"]:
        return f"missing {list(info['missing_keys'])[:3]}", float("inf")
    return "yes", max((v.float() - reference[k].float()).abs().max().item() for k, v in saved.items())


def resume(runs: Runs, stage: str, backend: str, whole: Path) -> list[float]:
    """All losses of a run that has only the checkpoint in the middle of `whole`, and resumes from it."""
    half = f"checkpoint-{runs.args.steps // 2}"
    name = f"{whole.name}-resumed"
    shutil.copytree(whole / half, runs.work / name / half)
    return runs.run(stage, backend, name)[1]


def measure(runs: Runs, stage: str, backend: str, reference: Path) -> dict:
    """One row of the table."""
    row = dict.fromkeys(COLUMNS, "") | {"stage": stage, "backend": backend}
    try:
        folder, found, row["seconds"] = runs.run(stage, backend, f"{stage}-{backend}")
        row["loss_difference"] = difference(found, losses(reference))
        row["whole"], row["weight_difference"] = check_whole(folder, weights(reference))
        if stage in runs.args.resume:
            row["resumed_difference"] = difference(resume(runs, stage, backend, folder), found)
    except Exception as error:  # a row of the table, not the end of it
        row["error"] = f"{type(error).__name__}: {error}"
        if not isinstance(error, RuntimeError):
            traceback.print_exc()
    return row


def show(row: dict) -> None:
    cells = [f"{value:.2e}" if isinstance(value, float) else str(value) for value in row.values()]
    print("".join(f"{cell:<21}" if i < 7 else f"  {cell}" for i, cell in enumerate(cells)), flush=True)


def main() -> None:
    """Run everything, print the table, write multi_gpu.csv."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--backends", default=",".join(BACKENDS), help="of ddp, fsdp1, fsdp2")
    parser.add_argument("--stages", default=",".join(STAGES), help="of BF16, MXFP4, distilled")
    parser.add_argument("--resume", default="MXFP4", help="stages in which each backend is resumed as well")
    parser.add_argument("--model", help="a local model folder; default: a small random Llama")
    parser.add_argument("--processes", type=positive, default=2)
    parser.add_argument("--steps", type=positive, default=10)
    parser.add_argument("--learning_rate", type=positive_number, default=3e-4)
    parser.add_argument("--timeout", type=positive_number, default=150, help="seconds for one run of main.py")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("flags", nargs="*", help="after --: further flags of main.py, for every run")
    args = parser.parse_args()
    check_device(args.device)
    stages, backends = chosen("--stages", args.stages, STAGES), chosen("--backends", args.backends, BACKENDS)
    args.resume = chosen("--resume", args.resume, STAGES) if args.resume else []

    transformers.utils.logging.disable_progress_bar()
    work = Path(tempfile.mkdtemp(prefix="multi_gpu-"))
    runs, rows, start = Runs(args, work), [], time.perf_counter()
    show(dict(zip(COLUMNS, COLUMNS, strict=True)))
    for stage in stages:
        row = dict.fromkeys(COLUMNS, "") | {"stage": stage, "backend": "one process"}
        try:
            reference, _, row["seconds"] = runs.run(stage, "one", f"{stage}-one")
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"
            reference = work / "none"
        show(row)
        rows.append(row)
        for backend in backends:
            rows.append(measure(runs, stage, backend, reference))
            show(rows[-1])

    args.out.mkdir(parents=True, exist_ok=True)
    about = environment(args.device) | {"processes": str(args.processes), "steps": str(args.steps)}
    with (args.out / "multi_gpu.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[*COLUMNS, *about], lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {**{k: f"{v:.3g}" if isinstance(v, float) else v for k, v in r.items()}, **about} for r in rows
        )
    if any(row["error"] for row in rows):
        logs = args.out / "multi_gpu_logs"
        logs.mkdir(exist_ok=True)
        for path in work.glob("*.log"):
            shutil.copy(path, logs)
        print(f"Outputs of main.py: {logs}")
    else:
        shutil.rmtree(work)
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    with reported_in_one_line():
        main()
