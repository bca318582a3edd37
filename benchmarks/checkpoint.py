"""Measure a checkpoint of FP32 masters and AdamW's moments, over writing its bytes.

    python benchmarks/checkpoint.py [--sizes 0.1 0.5] [--device cuda] [--folder DIR]

A random Llama of about `--sizes` billion parameters gets moments without training. Its trainer saves a checkpoint as it
does during a run: model, optimizer, checksums, flush, manifest, rename. The yardstick writes as many bytes from one
buffer in memory to one file in the same folder, and flushes it once. The two take turns, each from a disk with nothing
left to write; medians. The parts overlap in time: each is the sum of the seconds inside its functions, on all threads.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from benchmarks.arguments import make_parser  # noqa: E402
from benchmarks.report import Report  # noqa: E402
from qat import prepare_qat  # noqa: E402
from qat.command_line import positive_number  # noqa: E402
from qat.errors import UserError, reported_in_one_line  # noqa: E402
from qat.files.atomic import flush_path  # noqa: E402
from training.arguments.training import TrainingArguments  # noqa: E402
from training.trainer import QATTrainer  # noqa: E402

REACH = "1.3"
VOCABULARY = 32000
WIDTHS = {0.2: 768, 0.8: 1024, 3.0: 2048, float("inf"): 4096}  # up to so many billion parameters -> hidden size
PARTS = {
    "_save": "model.safetensors",
    "_save_optimizer_and_scheduler": "optimizer.pt",
    "flush_path": "flush",
    "entry_of": "checksums",
    "check_weights": "check of the weights",
    "put_in_place": "rename",
}
_BUFFER = memoryview(os.urandom(1 << 26))


def main() -> None:
    """Measure each size; print the table, write it to `--out`, draw seconds over parameters."""
    parser = make_parser(__doc__, repeats=5)
    parser.add_argument("--sizes", type=positive_number, nargs="+", default=[0.1, 0.5], help="parameters, in billions")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, default=None, help="where checkpoints are written; default: TMPDIR")
    args = parser.parse_args()
    report, points = Report(f"checkpoint_{args.device}", args.device), []
    for billions in args.sizes:
        folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=args.folder))
        try:
            points.append(measure(billions, folder, args, report))
        finally:
            shutil.rmtree(folder)
        gc.collect()
    report.write(args.out)
    draw(points, args.out / f"checkpoint_{args.device}.png")


def measure(billions: float, folder: Path, args: argparse.Namespace, report: Report) -> tuple[float, float, float]:
    """Parameters in billions, seconds of a checkpoint and of the yardstick; reports them with the parts."""
    check_space(billions, folder, args.device)
    trainer = make_trainer(billions, folder, args.device)
    with timed_parts() as parts:
        save(trainer)
        size_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        clear(folder)
        parts.clear()
        checkpoints, yardsticks = [], []
        for _ in range(args.repeats):
            yardsticks.append(seconds_of(lambda: write_bytes(folder / "yardstick", size_bytes)))
            clear(folder)
            checkpoints.append(seconds_of(lambda: save(trainer)))
            clear(folder)
    report.note(f"seconds in turn: yardstick {rounded(yardsticks)}, checkpoint {rounded(checkpoints)}")
    parameters = sum(p.numel() for p in trainer.model.parameters()) / 1e9
    name = f"{parameters:.2f}B"
    report.add(f"{name}: bytes", size_bytes / 2**30, unit="GiB")
    report.add(f"{name}: writing and flushing as many bytes", median(yardsticks), unit="s")
    report.add(f"{name}: checkpoint", median(checkpoints), unit="s")
    report.add(f"{name}: checkpoint over writing its bytes", median(checkpoints) / median(yardsticks), REACH)
    report.add(f"{name}: the fastest checkpoint over the fastest writing", min(checkpoints) / min(yardsticks))
    for function, part in PARTS.items():
        report.add(f"{name}: within it, {part}", parts[function] / args.repeats, unit="s")
    if args.device == "cuda":
        state = [value for each in trainer.optimizer.state.values() for value in each.values()]
        tensors = [*trainer.model.parameters(), *state]
        report.add(f"{name}: copy to host alone", seconds_of(lambda: [t.cpu() for t in tensors]), unit="s")
    return parameters, median(checkpoints), median(yardsticks)


def check_space(billions: float, folder: Path, device: str) -> None:
    """Refuse a size for which the disk or the memory is too small.

    Raises:
        UserError: names both sizes.
    """
    needed = 1.2 * billions * 1e9 * 12  # FP32: a master and two moments
    in_memory = torch.cuda.mem_get_info()[0] if device == "cuda" else available_bytes()
    on_disk = shutil.disk_usage(folder).free
    for option, place, free in (("folder", folder, on_disk), ("device", device, in_memory)):
        if free < needed:
            raise UserError(
                f"--sizes {billions:g} needs {needed / 1e9:.1f} GB, and --{option} {place} has {free / 1e9:.1f} GB "
                f"free; give a smaller size, or another --{option}"
            )


def available_bytes() -> int:
    """Memory that the kernel can give without swapping (Linux)."""
    (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


def rounded(seconds: list[float]) -> list[float]:
    """Two decimals, for the screen."""
    return [round(each, 2) for each in seconds]


def make_trainer(billions: float, folder: Path, device: str) -> QATTrainer:
    """A trainer of an MXFP4 model of FP32 masters whose optimizer has moments."""
    hidden = next(width for limit, width in WIDTHS.items() if billions <= limit)
    per_layer = 4 * hidden * hidden + 3 * hidden * 3 * hidden
    layers = max(1, round((billions * 1e9 - VOCABULARY * hidden) / per_layer))
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 128, vocab_size=VOCABULARY, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device=device)
    model.init_weights()
    random = torch.randn(1 << 20, device=device)
    for parameter in model.parameters():
        fill(parameter.data, random)
    args = TrainingArguments(str(folder), use_cpu=device == "cpu", report_to="none", max_steps=2, disable_tqdm=True)
    trainer = QATTrainer(model=prepare_qat(model, {torch.nn.Linear: "MXFP4"}), args=args, train_dataset=NoRows())
    trainer.create_optimizer_and_scheduler(num_training_steps=2)
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            moments = {name: fill(torch.empty_like(parameter.data), random) for name in ("exp_avg", "exp_avg_sq")}
            trainer.optimizer.state[parameter] = {"step": torch.tensor(1.0, device=device), **moments}
    trainer.state.global_step = 1
    trainer._ended = {}  # the progress of a training that has ended
    return trainer


class NoRows(Dataset):
    """Data of one row that nothing reads."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict:
        raise IndexError(index)


def fill(tensor: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """Repeat `random` in `tensor`; nothing between here and the disk compresses."""
    for chunk in tensor.view(-1).split(len(random)):
        chunk.copy_(random[: len(chunk)])
    return tensor


def save(trainer: QATTrainer) -> None:
    """A checkpoint as Trainer asks for it between two steps."""
    trainer._save_checkpoint(trainer.model, None)


def write_bytes(path: Path, count: int) -> None:
    """Write `count` bytes of one buffer, and flush them once."""
    with path.open("wb", buffering=0) as file:
        while count:
            count -= file.write(_BUFFER[:count])
    flush_path(path)


def clear(folder: Path) -> None:
    """Remove what was written and have the disk finish with it, so that the next candidate does not wait for it."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    os.sync()


def seconds_of(run) -> float:
    """Wall time of one call, with what it left to do on the GPU."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


@contextmanager
def timed_parts() -> Iterator[dict[str, float]]:
    """Seconds inside each function of PARTS, on all threads, while the block runs."""
    from qat.files import atomic, manifest, sealing
    from training.resume import checkpointing, written

    seconds: dict[str, float] = defaultdict(float)
    lock, replaced = threading.Lock(), []

    def timed(name, function):
        def run(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                with lock:
                    seconds[name] += time.perf_counter() - start

        return run

    modules = (atomic, manifest, sealing, written, checkpointing)
    for owner in (QATTrainer, *modules):
        for name in PARTS:
            if hasattr(owner, name):
                own = vars(owner).get(name)
                replaced.append((owner, name, own))
                setattr(owner, name, timed(name, getattr(owner, name)))
    try:
        yield seconds
    finally:
        for owner, name, own in replaced:
            delattr(owner, name) if own is None else setattr(owner, name, own)


def draw(points: list[tuple[float, float, float]], path: Path) -> None:
    """Seconds over parameters."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = sorted(points)
    figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for index, label in ((1, "checkpoint"), (2, "writing and flushing as many bytes")):
        axis.plot([p[0] for p in points], [p[index] for p in points], marker="o", label=label)
    axis.set(xlabel="parameters [billions]", ylabel="seconds", xlim=(0, None), ylim=(0, None))
    axis.set_title("A checkpoint of masters and moments")
    axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    with reported_in_one_line():
        main()
