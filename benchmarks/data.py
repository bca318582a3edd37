"""Measure data preparation: speed, padding of batches, and memory as the set grows.

    python benchmarks/data.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --out benchmarks/results

The text is Python's own documentation as conversations, repeated with a number in each question so that no two are
alike. Candidates read the same JSON Lines file and write a dataset to disk with the same tokenizer. `datasets.map`
renders the chat template and tokenizes, batched, and gives no labels; "turn by turn" is the reference's way, one sample
at a time with labels. Ours reads, checks, hashes, renders each answer's beginning, tokenizes and labels. Memory is the
peak of what a fresh process and its workers hold (PSS, so that shared pages count once), above what it held before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets  # noqa: E402
import numpy as np  # noqa: E402
import psutil  # noqa: E402
import pyarrow.compute  # noqa: E402
from transformers import AutoTokenizer, PreTrainedTokenizerBase  # noqa: E402

from benchmarks.common import bar_chart, median_seconds  # noqa: E402
from benchmarks.report import Report  # noqa: E402
from data.bad_samples import BadSamplePolicy  # noqa: E402
from data.conversations.formatting import Formatter  # noqa: E402
from data.sets.building import build, cores  # noqa: E402
from data.sets.packing import plan_packing  # noqa: E402
from data.sets.selection import Chosen, collect  # noqa: E402
from data.sets.summary import padding_fraction  # noqa: E402
from data.sources.python_docs import read_python_docs  # noqa: E402
from data.sources.readers import parse_sources  # noqa: E402
from qat.command_line import OneLineParser, positive  # noqa: E402
from qat.errors import reported_in_one_line  # noqa: E402


def main() -> None:
    """Measure and report."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--gguf_file", default=None)
    parser.add_argument("--tokens", type=positive, default=300_000, help="size of the set that is timed")
    parser.add_argument("--memory_tokens", type=positive, nargs=2, default=(1_000_000, 10_000_000))
    parser.add_argument("--max_length", type=positive, default=2048)
    parser.add_argument("--batch_size", type=positive, default=8)
    parser.add_argument("--out", type=Path, default=None, help="folder for the CSV file and the chart")
    parser.add_argument("--build_only", type=Path, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args)
    if args.build_only is not None:
        print(json.dumps(measure_memory(args.build_only, tokenizer)))
        return
    datasets.disable_progress_bars()
    report = Report("data")
    with tempfile.TemporaryDirectory() as folder:
        lengths = time_tokenization(report, tokenizer, args, Path(folder))
        report_padding(report, lengths, args)
        report_memory(report, tokenizer, args, Path(folder))
    if args.out is not None:
        report.write(args.out)


def load_tokenizer(args: argparse.Namespace) -> PreTrainedTokenizerBase:
    """The tokenizer named by the arguments, which must have a chat template."""
    source = {"gguf_file": args.gguf_file} if args.gguf_file else {}
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, model_max_length=args.max_length, **source)
    if tokenizer.chat_template is None:
        raise SystemExit(f"--model_name_or_path {args.model_name_or_path}: its tokenizer has no chat template")
    return tokenizer


def write_corpus(path: Path, tokenizer: PreTrainedTokenizerBase, tokens: int) -> int:
    """JSON Lines of about `tokens` tokens; returns the number of samples."""
    samples = read_python_docs()
    some = [json.dumps(sample) for sample in samples[:: max(1, len(samples) // 300)]]
    per_sample = sum(len(ids) for ids in tokenizer(some)["input_ids"]) / len(some)
    count = round(tokens / per_sample)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            question, answer = samples[number % len(samples)]["conversations"]
            turns = [{**question, "value": f"{number}. {question['value']}"}, answer]
            file.write(json.dumps({"conversations": turns}) + "\n")
    return count


# ---- Speed ----


def ours(path: Path, tokenizer: PreTrainedTokenizerBase, folder: Path, workers: int) -> int:
    """Read and tokenize without the cache; returns the number of tokens."""
    policy = BadSamplePolicy("skip")
    [source] = parse_sources(str(path))
    pool = collect(source, "train", folder / "raw", policy)
    chosen = Chosen([(pool, np.arange(len(pool)))])
    formatter = Formatter(tokenizer, tokenizer.model_max_length)
    return build(chosen.rows(), folder / "out.arrow", formatter, policy, "samples", workers).tokens


def to_messages(sample: dict) -> list[dict]:
    """A conversation in the form that chat templates take."""
    roles = {"User": "user", "Assistant": "assistant"}
    return [{"role": roles[turn["from"]], "content": turn["value"]} for turn in sample["conversations"]]


def batched_map(path: Path, tokenizer: PreTrainedTokenizerBase, folder: Path, workers: int) -> int:
    """`datasets.map` as its documentation shows it: batched, tokens only."""

    def encode(columns: dict) -> dict:
        messages = [to_messages({"conversations": turns}) for turns in columns["conversations"]]
        texts = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer(texts, add_special_tokens=False, truncation=True, return_attention_mask=False)["input_ids"]
        return {"input_ids": ids}

    return _tokens_of(path, folder, encode, workers, batched=True)


def turn_by_turn(path: Path, tokenizer: PreTrainedTokenizerBase, folder: Path, workers: int) -> int:
    """The reference's way: one sample at a time, each turn tokenized alone."""

    def encode(sample: dict) -> dict:
        input_ids, labels = [], []
        for turn in sample["conversations"]:
            ids = tokenizer(turn["value"] + "\n", add_special_tokens=False)["input_ids"]
            input_ids += ids
            labels += ids if turn["from"] == "Assistant" else [-100] * len(ids)
        return {"input_ids": input_ids[: tokenizer.model_max_length], "labels": labels[: tokenizer.model_max_length]}

    return _tokens_of(path, folder, encode, workers, batched=False)


def _tokens_of(path: Path, folder: Path, encode: Callable, workers: int, batched: bool) -> int:
    cache = tempfile.mkdtemp(dir=folder)  # a new one each time: nothing may come from a cache
    rows = datasets.load_dataset("json", data_files=str(path), cache_dir=cache, split="train")
    encoded = rows.map(encode, batched=batched, num_proc=workers, remove_columns=rows.column_names)
    return pyarrow.compute.sum(pyarrow.compute.list_value_length(encoded.data.column("input_ids"))).as_py()


def time_tokenization(
    report: Report, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace, folder: Path
) -> np.ndarray:
    """Tokens per second of each candidate; returns the lengths of ours."""
    path = folder / "corpus.jsonl"
    samples = write_corpus(path, tokenizer, args.tokens)
    ways = {"ours": ours, "datasets.map, no labels": batched_map, "datasets.map, turn by turn": turn_by_turn}
    tokens: dict[str, int] = {}
    candidates = {}
    for workers in dict.fromkeys((1, cores())):
        for name, way in ways.items():
            label = f"{name}, {workers} process{'es' * (workers > 1)}"
            tokens[label] = way(path, tokenizer, folder, workers)
            candidates[label] = lambda way=way, workers=workers: way(path, tokenizer, folder, workers)
    seconds = median_seconds(candidates, rounds=3)
    report.note(f"{samples:,} samples")
    rates = {label: tokens[label] / seconds[label] for label in candidates}
    for label, rate in rates.items():
        report.add(label, rate, unit="tok/s")
    lengths = datasets.Dataset.from_file(str(folder / "out.arrow")).data.column("length").to_numpy()
    start = time.perf_counter()
    plan_packing(lengths.tolist(), args.max_length)
    report.add("packing", float(lengths.sum()) / (time.perf_counter() - start), unit="tok/s")
    if args.out is not None:
        bar_chart(args.out / "data.png", "Preparing data", "tokens per second", {"tokenization": rates})
    return lengths


def report_padding(report: Report, lengths: np.ndarray, args: argparse.Namespace) -> None:
    """Report the fraction of a batch that is padding."""
    rows = len(plan_packing(lengths.tolist(), args.max_length))
    fractions = {
        "every sample to the maximum length": 1 - int(lengths.sum()) / (len(lengths) * args.max_length),
        f"batches of {args.batch_size}": padding_fraction(lengths, args.batch_size),
        f"packed into rows of {args.max_length}": 1 - int(lengths.sum()) / (rows * args.max_length),
    }
    for way, fraction in fractions.items():
        report.add(f"padding, {way}", 100 * fraction, unit="%")


# ---- Memory ----


def report_memory(report: Report, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace, folder: Path) -> None:
    """Peak memory of building sets of two sizes, each in a process of its own."""
    for tokens in args.memory_tokens:
        path = folder / f"{tokens}.jsonl"
        write_corpus(path, tokenizer, tokens)
        command = [sys.executable, __file__, "--model_name_or_path", args.model_name_or_path, "--build_only", str(path)]
        command += ["--max_length", str(args.max_length)] + (["--gguf_file", args.gguf_file] if args.gguf_file else [])
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        result = json.loads(output.splitlines()[-1])
        report.add(f"memory of preparing {result['tokens']:,} tokens", result["mib"], unit="MiB")
        report.add(f"tokens per second over {result['tokens']:,} tokens", result["rate"], unit="tok/s")


def measure_memory(path: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Build the set once, while a thread watches what this process and its workers hold."""
    process, peak, done = psutil.Process(), [0], threading.Event()

    def held() -> int:
        total = 0
        for member in [process, *process.children(recursive=True)]:
            try:
                total += member.memory_full_info().pss
            except psutil.NoSuchProcess:
                continue
        return total

    def watch() -> None:
        while not done.wait(0.1):
            peak[0] = max(peak[0], held())

    before = held()
    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tokens = ours(path, tokenizer, Path(folder), workers=0)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return {"tokens": tokens, "mib": (peak[0] - before) / 2**20, "rate": tokens / seconds}


if __name__ == "__main__":
    with reported_in_one_line():
        main()
