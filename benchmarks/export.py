"""Measure the time, output size and memory of packing a checkpoint.

    python benchmarks/export.py [--gib 1] [--shards 4]

A random Llama checkpoint of several shards is packed in a process of its own, libraries loaded beforehand. Two
yardsticks read the source's bytes and write the packed ones: safetensors, which loads each shard into memory and saves
the packed tensors, and raw files in chunks of 1 MiB. Both flush what they wrote to disk, as the export does. What is
read is in the page cache; of everything, the best of three.
Peak memory is the growth of the resident set, mapped files included, in shards of the source.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SCHEMES = ("MXFP4", "MXFP8", "FP8")
REPEATS = 3
_CHUNK = 1 << 20


def main() -> None:
    """Measure each scheme; print the table and write it to `--out`."""
    from qat.command_line import OneLineParser, positive, positive_number

    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=positive_number, default=1.0, help="size of the BF16 checkpoint")
    parser.add_argument("--shards", type=positive, default=4)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="where export.csv goes")
    parser.add_argument("--export", nargs=3, metavar=("SRC", "DST", "SCHEME"), help="one measurement, used internally")
    args = parser.parse_args()
    if args.export:
        export_once(*args.export)
        return
    from benchmarks.report import Report

    report = Report("export")
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        source = make_checkpoint(Path(folder, "source"), args.gib, args.shards)
        for scheme in SCHEMES:
            measure(source, Path(folder, scheme), scheme, report)
    report.write(args.out)


def make_checkpoint(folder: Path, gib: float, shards: int) -> Path:
    """A random BF16 Llama of about `gib` GiB in about `shards` files."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, vocabulary = 2048, 5632, 8192
    per_layer = 2 * (2 * hidden * hidden + 2 * hidden * 512 + 3 * hidden * intermediate)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=max(1, round(gib * 2**30 / per_layer)),
        num_attention_heads=16, num_key_value_heads=4, vocab_size=vocabulary, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data = torch.empty(parameter.shape, dtype=torch.bfloat16).normal_(0, 0.02)
    model.save_pretrained(folder, max_shard_size=int(gib * 2**30 / shards) + per_layer)
    return folder


def measure(source: Path, target: Path, scheme: str, report) -> None:
    """Export in a fresh process, then copy as many bytes."""
    command = [sys.executable, __file__, "--export", str(source), str(target), scheme]
    seconds, peak_bytes = map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    read, written = (sum(p.stat().st_size for p in f.glob("*.safetensors")) for f in (source, target))
    largest = max(p.stat().st_size for p in source.glob("*.safetensors"))
    through = min(copy_through_safetensors(source, target) for _ in range(REPEATS))
    raw = min(copy_raw(source, target.with_suffix(".copy"), written) for _ in range(REPEATS))
    report.add(f"{scheme}: {read / 2**20:.0f} MiB packed into", written / 2**20, unit="MiB")
    report.add(f"{scheme}: export", seconds, unit="s")
    report.add(f"{scheme}: throughput over safetensors reading and writing", through / seconds, "0.5")
    report.add(f"{scheme}: throughput over copying raw bytes", raw / seconds)
    report.add(f"{scheme}: peak memory, in shards of the source", peak_bytes / largest, "2")


def export_once(source: str, target: str, scheme: str) -> None:
    """Print the seconds of an export and the bytes by which it raised the peak of the resident set."""
    import torch

    from qat.checkpoints.folder import CheckpointFolder
    from qat.checkpoints.pack import export_checkpoint
    from qat.checkpoints.skeleton import prepared_skeleton
    from qat.numerics import ops
    from qat.schemes.presets import get_scheme

    weight = get_scheme(scheme).weight
    ops.quantize(torch.zeros(32, 32), weight.format.name, weight.rule, torch.bfloat16)
    prepared_skeleton(CheckpointFolder.open(source), scheme)
    before, seconds = peak_resident_bytes(), []
    for _ in range(REPEATS):
        start = time.perf_counter()
        export_checkpoint(source, target, scheme=scheme, overwrite=True)
        seconds.append(time.perf_counter() - start)
    print(min(seconds), peak_resident_bytes() - before)


def peak_resident_bytes() -> int:
    """The kernel's high-water mark of this process (Linux); unlike getrusage's, it does not include the parent."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def copy_through_safetensors(source: Path, packed: Path) -> float:
    """Seconds to load all tensors of `source` into memory and to save those of `packed`, shard by shard."""
    from safetensors.torch import load_file, save_file

    from qat.files.atomic import flush_path

    seconds = 0.0
    for path in sorted(source.glob("*.safetensors")):
        to_write = {name: tensor.clone() for name, tensor in load_file(packed / path.name).items()}
        start = time.perf_counter()
        loaded = {name: tensor.clone() for name, tensor in load_file(path).items()}
        save_file(to_write, packed / "copy.tmp")
        flush_path(packed / "copy.tmp")
        seconds += time.perf_counter() - start
        del loaded
    (packed / "copy.tmp").unlink()
    return seconds


def copy_raw(source: Path, target: Path, bytes_to_write: int) -> float:
    """Seconds to read all weights of `source` and to write `bytes_to_write` bytes."""
    from qat.files.atomic import flush_path

    start = time.perf_counter()
    with target.open("wb", buffering=0) as out:
        for path in sorted(source.glob("*.safetensors")):
            with path.open("rb", buffering=0) as file:
                while chunk := file.read(_CHUNK):
                    out.write(chunk[: max(0, bytes_to_write - out.tell())])
    flush_path(target)
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


if __name__ == "__main__":
    from qat.errors import reported_in_one_line

    with reported_in_one_line():
        main()
