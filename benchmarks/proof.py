"""Measure the export of a model's shape and the proof of it, against reading and writing the same bytes.

    python benchmarks/proof.py --shapes 0.5b 1b 8b

A random Llama checkpoint in shards of up to 5 GB is packed and proven, as at the end of a run. The yardstick reads the
source's bytes and writes the packed ones into the same folder, flushed to disk, in chunks of 1 MiB. The parts of the
export are summed over its threads, which work at once; those of the proof are measured alone, each process by itself.
What is read is in the page cache. The plot has seconds over parameters.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
_TOKENS = 128
_PARTS = ("start", "load", "compute")
# The program of a logits process with a clock: run by `python -c`.
_CLOCKED = """
import sys, time
begin = time.time(); start = float(sys.argv[1])
from qat.checkpoints import verify_logits as program
load, compute, seconds = program.load_for_logits, program._logits, {"start": 0.0, "load": 0.0, "compute": 0.0}
def clocked(name, function):
    def run(*given):
        begin = time.time(); result = function(*given); seconds[name] += time.time() - begin
        return result
    return run
program.load_for_logits, program._logits = clocked("load", load), clocked("compute", compute)
seconds["start"] = time.time() - start
program.main(sys.argv[2:])
print(*(seconds[name] for name in ("start", "load", "compute")))
"""


def main() -> None:
    """Measure each shape; print the table, write proof.csv and proof.png to `--out`."""
    from benchmarks.random_llama import SHAPES
    from qat.command_line import OneLineParser

    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["0.5b", "1b"])
    parser.add_argument("--scheme", default="MXFP4")
    parser.add_argument("--device", help="as in scripts/export.py")
    parser.add_argument("--folder", type=Path, help="where the checkpoints are made; default: a temporary folder")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="where proof.csv goes")
    args = parser.parse_args()
    import torch

    from benchmarks.report import Report

    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("qat").setLevel(logging.INFO)
    on_gpu = torch.cuda.is_available() and args.device != "cpu"
    report, points = Report("proof", "cuda" if on_gpu else "cpu"), []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for shape in args.shapes:
            points.append(measure(Path(folder, shape), shape, args.scheme, args.device, report))
    report.write(args.out)
    draw(points, args.out / "proof.png")


def measure(folder: Path, shape: str, scheme: str, device: str | None, report) -> dict[str, float]:
    """The rows of a shape; returns the parameters and the seconds of the whole."""
    from benchmarks.export import copy_raw
    from benchmarks.random_llama import write_model
    from qat.checkpoints.pack import export_checkpoint
    from qat.checkpoints.verify import verify

    source, packed = folder / "source", folder / "packed"
    parameters = write_model(shape, source)
    with clocked_parts() as parts:
        start = time.perf_counter()
        export_checkpoint(source, packed, scheme=scheme, device=device)
        export_s = time.perf_counter() - start
        start = time.perf_counter()
        verdict = verify(packed, source, _TOKENS, device=device)
        proof_s = time.perf_counter() - start
    start = time.perf_counter()
    weights = verify(packed, source, _TOKENS, with_logits=False, device=device)
    weights_s = time.perf_counter() - start
    assert verdict["verified"] and verdict["logits"]["bit_equal"] and weights["verified"]
    written = sum(path.stat().st_size for path in packed.glob("*.safetensors"))
    copy_s = min(copy_raw(source, folder / "copy", written) for _ in range(2))
    report.add(f"{shape}: parameters", parameters / 1e9, unit="1e9")
    report.add(f"{shape}: reading and writing its bytes", copy_s, unit="s")
    report.add(f"{shape}: export", export_s, unit="s")
    for name, seconds in parts.items():
        report.add(f"{shape}: export, {name}, all threads", seconds, unit="s")
    report.add(f"{shape}: comparing weights", weights_s, unit="s")
    report.add(f"{shape}: proof, weights and logits at once", proof_s, unit="s")
    report.add(f"{shape}: export and proof", export_s + proof_s, unit="s")
    report.add(f"{shape}: export and proof over reading and writing", (export_s + proof_s) / copy_s, "4")
    report.add(f"{shape}: logits on a GPU", float("cuda" in verdict["logits"]["device"]))
    for what in ("packed", "fake-quantized"):
        command = logits_command(what, source, packed, verdict, device)
        for name, seconds in zip(_PARTS, run_clocked(command), strict=True):
            report.add(f"{shape}: logits, {what}: {name}", seconds, unit="s")
    for path in (*source.iterdir(), *packed.iterdir()):
        path.unlink()
    return {"parameters": parameters, "copy": copy_s, "export": export_s, "proof": proof_s}


@contextmanager
def clocked_parts() -> Iterator[Counter]:
    """Seconds of all threads of an export in its parts, while the block runs."""
    from qat.checkpoints.pack_tensors import Packing
    from qat.checkpoints.shard_writer import ShardWriter

    seconds: Counter = Counter()
    lock, kept = threading.Lock(), []

    def clock(owner: object, name: str, label: str) -> None:
        function = getattr(owner, name)
        kept.append((owner, name, function))

        def run(*given, **named):
            begin = time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                with lock:
                    seconds[label] += time.perf_counter() - begin

        setattr(owner, name, run)

    clock(Packing, "_pack", "reading, packing, writing and flushing")
    clock(Packing, "_quantize", "packing")
    clock(ShardWriter, "_write", "writing")
    clock(os, "fsync", "flushing")
    try:
        yield seconds
    finally:
        for owner, name, function in kept:
            setattr(owner, name, function)


def logits_command(what: str, source: Path, packed: Path, verdict: dict, device: str | None) -> list[str]:
    """The arguments of the program that `logits_proof.py` starts."""
    place = "cpu" if verdict["logits"]["device"] == "the CPU" else verdict["logits"]["device"].split()[0]
    rules = [f"{name}={rule or ''}" for name, rule in verdict["logits"]["engine_activation_rules"].items()]
    more = ["--folder", str(packed)]
    if what == "fake-quantized":
        more = ["--folder", str(source), "--qat_config", str(packed), "--rules", *rules]
    return [what, *more, "--device", place]


def run_clocked(arguments: list[str]) -> list[float]:
    """Seconds of starting (with imports), loading and computing, in a process by itself."""
    import torch
    from safetensors.torch import save_file

    from benchmarks.launch import modules_of

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        save_file({"input_ids": torch.arange(_TOKENS)[None]}, folder / "in.safetensors")
        files = ["--inputs", str(folder / "in.safetensors"), "--outputs", str(folder / "out.safetensors")]
        command = [sys.executable, "-c", _CLOCKED, str(time.time()), *arguments, *files]
        environment = os.environ | {"PYTHONPATH": modules_of()}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"the program for logits ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    return [float(word) for word in done.stdout.split()[-3:]]


def draw(points: list[dict[str, float]], path: Path) -> None:
    """Plot seconds over parameters."""
    try:
        import matplotlib
    except ImportError:
        print(f"{path} is not drawn: matplotlib is not installed")
        return

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(figsize=(6, 4))
    billions = [point["parameters"] / 1e9 for point in points]
    for name, label in (("copy", "reading and writing its bytes"), ("export", "export"), ("proof", "proof")):
        axes.plot(billions, [point[name] for point in points], "o-", label=label)
    axes.set(xscale="log", yscale="log", xlabel="parameters (1e9)", ylabel="seconds")
    axes.legend()
    plt.savefig(path, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    from qat.errors import reported_in_one_line

    with reported_in_one_line():
        main()
