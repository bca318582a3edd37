"""Measure how much of the accuracy that MXFP4 loses each recipe recovers: the table of docs/results.md.

    python benchmarks/accuracy.py --model quickstart/smollm2 --gguf_file SmolLM2-135M-Instruct.Q4_1.gguf --workers 4

SmolLM2-135M-Instruct is fine-tuned in BF16 on python-docs (200 steps of 4 samples); every row starts from that
checkpoint, with the same data order and seed, through QATTrainer. Columns: perplexity, KL to the BF16 model and
agreement of the most likely token with it on the held-out split; perplexity and KL on each text from elsewhere; steps,
labelled tokens trained on, time. The recovered fraction is that of the loss added by FLOOR rounding without training:
(ln FLOOR - ln row) / (ln FLOOR - ln BF16).

Texts from elsewhere: "foreign", the descriptions of installed Python packages; "generic", the last twentieth of
--generic, whose rest is what the rows generic-file-* are trained on; "never", that of --never.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from transformers import set_seed  # noqa: E402

from benchmarks.accuracy_rows import ALL, Row, row_of  # noqa: E402
from benchmarks.accuracy_table import check_texts, finished_rows, is_done, print_table, write_csv  # noqa: E402
from benchmarks.arguments import use_device  # noqa: E402
from benchmarks.report import check_source, environment, write_text  # noqa: E402
from qat import prepare_qat  # noqa: E402
from qat.command_line import OneLineParser, positive  # noqa: E402
from qat.errors import UserError, reported_in_one_line  # noqa: E402
from qat.layers.calibration import calibrate_inputs  # noqa: E402
from qat.layers.packed_base import pack_base  # noqa: E402
from training.adapters.inject import add_adapters, lora_config  # noqa: E402
from training.adapters.merging import put_merged  # noqa: E402
from training.arguments.data import DataArguments  # noqa: E402
from training.arguments.distillation import CacheSettings, DistillationArguments  # noqa: E402
from training.arguments.lora import LoraArguments  # noqa: E402
from training.arguments.model import ModelArguments  # noqa: E402
from training.arguments.training import TrainingArguments  # noqa: E402
from training.backends.masters import to_master_dtype  # noqa: E402
from training.losses.distillation import forward_kl, labelled_rows  # noqa: E402
from training.losses.metrics import token_loss_sums  # noqa: E402
from training.sensitivity.measure import Sensitivity, SensitivityArguments, propose_mapping  # noqa: E402
from training.start.loading import load_tokenizer  # noqa: E402
from training.start.smoothing import smooth_with_data  # noqa: E402
from training.start.start import load_model  # noqa: E402
from training.start.weights import compensate_with_data  # noqa: E402
from training.teachers.cache import make_cached_teacher  # noqa: E402
from training.teachers.generic import GenericText  # noqa: E402
from training.teachers.load import load_teacher  # noqa: E402
from utils import QATTrainer, make_supervised_data_module  # noqa: E402

OUT_OF_DOMAIN_PACKAGES = (
    "accelerate", "datasets", "huggingface-hub", "jinja2", "numpy", "pandas", "packaging", "pyyaml", "regex",
    "requests", "safetensors", "sympy", "tokenizers", "tqdm", "transformers",
)  # fmt: skip
LENGTH, BATCH, CALIBRATION_SAMPLES, ROWS_OF_TEXT = 256, 4, 32, 96


def out_of_domain_text() -> str:
    """Out-of-domain text: the long descriptions of installed packages, in a fixed order."""
    texts = []
    for name in OUT_OF_DOMAIN_PACKAGES:
        try:
            texts.append(metadata.metadata(name).get_payload() or "")
        except metadata.PackageNotFoundError:
            continue
    return "\n\n".join(texts)


def texts_to_measure(out: Path, generic: str | None, never: str | None) -> dict[str, str]:
    """The texts of the columns by name; writes what may be trained on to `out/generic.txt`.

    Each row does so, beside others that read it: the file is replaced, and never half there.
    """
    texts = {"foreign": out_of_domain_text()}
    if generic is not None:
        paragraphs = Path(generic).read_text(encoding="utf-8").split("\n\n")
        cut = len(paragraphs) * 19 // 20
        write_text(out / "generic.txt", "\n\n".join(paragraphs[:cut]))
        texts["generic"] = "\n\n".join(paragraphs[cut:])
    if never is not None:
        texts["never"] = Path(never).read_text(encoding="utf-8")
    return texts


@torch.no_grad()
def measure(model, teacher, tokenizer, eval_set, collate, device: str, texts: dict[str, str]) -> dict[str, float]:
    """The columns of a row: perplexities, KL and agreement; on texts, perplexities and KL."""
    model.eval()
    nll = tokens = kl = agree = 0.0
    for start in range(0, len(eval_set), 16):
        batch = {
            k: v.to(device)
            for k, v in collate([eval_set[i] for i in range(start, min(start + 16, len(eval_set)))]).items()
        }
        labels = batch.pop("labels")
        with torch.autocast(device, torch.bfloat16):
            logits, target = model(**batch).logits, teacher(**batch).logits
        sums, counts = token_loss_sums(logits, labels)
        ours, theirs = labelled_rows(logits, labels), labelled_rows(target, labels)
        nll, tokens = nll + sums.double().sum().item(), tokens + counts.sum().item()
        kl += forward_kl(ours, theirs).double().sum().item()
        agree += (ours.argmax(-1) == theirs.argmax(-1)).sum().item()
    figures = {"perplexity": math.exp(nll / tokens), "kl": kl / tokens, "agreement": agree / tokens}
    for name, text in texts.items():
        figures |= {f"{name}_{key}": value for key, value in on_text(model, teacher, tokenizer, text, device).items()}
    return figures


def on_text(model, teacher, tokenizer, text: str, device: str) -> dict[str, float]:
    """Perplexity and KL on the first rows of a text; every token of a row but the first is predicted."""
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    if len(ids) < LENGTH:
        raise UserError(
            f"a text of {len(ids)} tokens is too short to be measured, which takes {LENGTH}; give more of it"
        )
    ids = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)[:ROWS_OF_TEXT].to(device)
    nll = kl = 0.0
    for rows in ids.split(8):
        with torch.autocast(device, torch.bfloat16):
            logits, target = model(input_ids=rows).logits, teacher(input_ids=rows).logits
        nll += token_loss_sums(logits, rows)[0].double().sum().item()
        kl += forward_kl(labelled_rows(logits, rows), labelled_rows(target, rows)).double().sum().item()
    tokens = ids.shape[0] * (LENGTH - 1)
    return {"perplexity": math.exp(nll / tokens), "kl": kl / tokens}


def load(path: str, gguf_file: str | None, device: str, packing: bool = False):
    """Model in FP32 on the device, tokenizer, data."""
    arguments = ModelArguments(path, gguf_file)
    tokenizer, model = load_tokenizer(arguments, LENGTH), load_model(arguments).to(device)
    data = make_supervised_data_module(
        "python-docs", tokenizer, eval_size=96, on_bad_sample="skip", packing=packing, model=model
    )
    return model, tokenizer, data


def train(model, tokenizer, data, folder: Path, row: Row, teacher=None) -> QATTrainer:
    """Train `model` as in `row`, with QATTrainer; ends the program where a signal ends the training."""
    arguments = TrainingArguments(
        str(folder), max_steps=row.steps, learning_rate=row.lr, per_device_train_batch_size=BATCH,
        max_grad_norm=row.train.get("max_grad_norm", 1.0),
        lr_scheduler_type=row.train.get("lr_scheduler_type", "linear"), seed=row.seed, data_seed=row.seed,
        report_to="none", save_strategy="no", logging_steps=50, disable_tqdm=True, model_max_length=LENGTH,
        **{k: v for k, v in row.train.items() if k not in ("lr_scheduler_type", "max_grad_norm")},
    )  # fmt: skip
    if row.teacher == "self" and teacher is not None:
        teacher = "self"
    if row.teacher == "cache":
        teacher = make_cached_teacher(teacher, arguments, data, CacheSettings(), str(folder / "teacher"))
    trainer = QATTrainer(
        model=model, processing_class=tokenizer, args=arguments, teacher=teacher, **row.distill_options,
        **row.trainer_options, **data,
    )  # fmt: skip
    trainer.train()
    if trainer.was_interrupted:  # what was trained so far is no row
        sys.exit(trainer.exit_status)
    trainer.round_masters()  # the weights are measured as they would be saved
    return trainer


def prepare(model, row: Row, data: dict, training_data: dict | None = None) -> None:
    """Quantize `model` as in `row`; `training_data` has the text that is mixed into training, too."""
    if row.scheme is None:
        return
    mapping = {torch.nn.Linear: row.scheme, **row.others}
    if row.bits_budget is not None:
        mapping = mixed_mapping(model, row, data)
    quantize(model, mapping, row, data, training_data, **row.prepare_options)


def quantize(model, mapping: dict, row: Row, data: dict, training_data: dict | None = None, **options) -> None:
    """Prepare, smooth, compensate, and calibrate the inputs that need it."""
    prepare_qat(model, mapping, ("lm_head",), row.weights, row.inputs, **options)
    if row.smooth_alpha:
        smooth_with_data(model, data, row.smooth_alpha, model.device)
    if row.weight_init != "none":
        rounds = row.steps == 0
        compensate_with_data(model, training_data or data, row.weight_init_samples, model.device, rounds)
    with torch.autocast(model.device.type, torch.bfloat16):
        calibrate_inputs(model, calibration_batches(model, data))


def calibration_batches(model, data: dict) -> list[dict[str, torch.Tensor]]:
    """The first training samples, one by one, so that none is padded."""
    count = min(CALIBRATION_SAMPLES, len(data["train_dataset"]))
    samples = [data["train_dataset"][i] for i in range(count)]
    batches = [data["data_collator"]([{k: v for k, v in sample.items() if k != "length"}]) for sample in samples]
    return [{k: v.to(model.device) for k, v in batch.items() if k != "labels"} for batch in batches]


def mixed_mapping(model, row: Row, data: dict) -> dict[str, str]:
    """MXFP4 and MXFP8 by sensitivity, measured on training samples: the evaluation set must not choose."""
    arguments = SensitivityArguments(
        bits_budget=row.bits_budget, weight_scale_rule=row.weights, input_scale_rule=row.inputs,
        smooth_alpha=row.smooth_alpha,
    )  # fmt: skip
    batch = data["data_collator"]([data["train_dataset"][i] for i in range(16)])
    copy = deepcopy(model).eval()
    quantize(copy, {torch.nn.Linear: "MXFP4"}, row, data, **row.prepare_options)
    return propose_mapping(Sensitivity(copy, [batch]), arguments)["mapping"]


def with_generic(data: dict, row: Row, teacher, tokenizer, out: Path) -> dict:
    """The data of `row`'s training: with a text, or continuations of the teacher, in the divergence alone."""
    if not row.generic:
        return data
    name, cache = (str(out / "generic.txt"), None) if row.generic == "FILE" else (row.generic, str(out / "teachers"))
    settings = DistillationArguments(
        True, distill_generic=name, distill_generic_share=row.generic_share, distill_cache_dir=cache
    )
    arguments = TrainingArguments(
        str(out), model_max_length=LENGTH, max_steps=row.steps, per_device_train_batch_size=BATCH, data_seed=row.seed
    )
    generic = GenericText.read(settings, arguments, DataArguments(on_bad_sample="skip", packing=row.packing), tokenizer)
    generic.sample(teacher)
    return generic.mixed_into(data)


def run_row(
    key: str, out: Path, device: str, generic: str | None = None, never: str | None = None, *, command: str = "",
    workers: int = 1,
) -> None:  # fmt: skip
    """Train and measure one row; write `out/KEY.json`.

    Args:
        command: that asked for the rows, and how many of them at a time (`workers`).
    """
    row = row_of(key)
    texts = texts_to_measure(out, generic, never)
    set_seed(row.seed)
    model, tokenizer, data = load(str(out / "bf16-model"), None, device, row.packing)
    teacher = load_teacher(model, None).to(device)
    to_master_dtype(model, getattr(torch, row.train.get("master_dtype", "float32")))
    start, steps, tokens = time.perf_counter(), row.steps, 0
    if row.first:
        stage = replace(row, **row.first, first={})
        prepare(model, stage, data)
        trainer = train(model, tokenizer, data, out / "runs" / f"{key}-first", stage, teacher if row.distill else None)
        trainer.save_model(str(out / "runs" / f"{key}-first"))
        model = load(str(out / "runs" / f"{key}-first"), None, device, row.packing)[0]
        steps, tokens = steps + stage.steps, trainer.labelled_tokens
    mixed = with_generic(data, row, teacher, tokenizer, out) if row.steps else data
    prepare(model, row, data, mixed)
    if row.lora:  # the weights that a run freezes have the dtype that they are saved in
        arguments = LoraArguments(**row.lora)
        model.bfloat16()
        if arguments.base_in_scheme:
            pack_base(model)
        add_adapters(model, lora_config(arguments), row.seed)
    if row.steps:
        trainer = train(model, tokenizer, mixed, out / "runs" / key, row, teacher if row.distill else None)
        tokens += trainer.labelled_tokens
    seconds = time.perf_counter() - start
    put_merged(model).float()  # measured as all others are
    figures = measure(model, teacher, tokenizer, data["eval_dataset"], data["data_collator"], device, texts)
    figures |= {
        "title": row.title,
        "steps": steps,
        "labelled_tokens": tokens,
        "seconds": seconds,
        "seed": row.seed,
    } | environment(device)
    figures["device"] += f", {workers} rows at a time"
    figures["command"] = command or figures["command"]
    write_text(out / f"{key}.json", json.dumps(figures))


def finetune(model_path: str, gguf_file: str | None, out: Path, device: str) -> None:
    """The BF16 stage that every row starts from."""
    set_seed(2)
    model, tokenizer, data = load(model_path, gguf_file, device)
    trainer = train(model, tokenizer, data, out / "runs" / "bf16", Row("", steps=200, lr=5e-5))
    trainer.save_model(str(out / "bf16-model"))


def main() -> None:
    """Fine-tune once, then run the rows, several at a time, each in a process of its own."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--gguf_file", help="its GGUF file, if that is what the folder holds")
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"))
    parser.add_argument(
        "--rows",
        help="names from ROWS, with -STEPS and @SEED for other steps and another seed (recipe-30@3); default: all",
    )
    parser.add_argument("--generic", help="text for the rows generic-file-*, and for a column; not a JSON file")
    parser.add_argument("--never", help="text for a column, which chooses nothing")
    parser.add_argument("--workers", type=positive, default=1, help="rows trained at the same time")
    parser.add_argument("--csv", type=Path, default=Path("runs/accuracy/accuracy.csv"), help="where the table goes")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--command", help=argparse.SUPPRESS)  # that started the program for --row
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    use_device(device)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.row == "finetune":
        return finetune(args.model, args.gguf_file, args.out, device)
    if args.row:
        return run_row(args.row, args.out, device, args.generic, args.never, command=args.command, workers=args.workers)
    keys = args.rows.split(",") if args.rows else [key for key in ALL if args.generic or row_of(key).generic != "FILE"]
    if args.generic is None and (wanting := [key for key in keys if row_of(key).generic == "FILE"]):
        parser.error(f"--rows {','.join(wanting)}: no text is named for them; give --generic FILE")

    for name in ("generic", "never"):
        if (path := getattr(args, name)) is not None and not Path(path).is_file():
            parser.error(f"--{name} {path}: there is no such file")

    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.workers))}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    gpus = visible.split(",")

    def spawn(task: tuple[int, str]) -> None:
        number, key = task
        command = [sys.executable, __file__, "--model", args.model, "--out", str(args.out), "--row", key]
        command += ["--workers", str(args.workers), "--command", environment(device)["command"]]
        command += ["--gguf_file", args.gguf_file] if args.gguf_file else []
        for name in ("generic", "never"):
            command += [f"--{name}", getattr(args, name)] if getattr(args, name) else []
        share = threads | os.environ | {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]}
        result = subprocess.run(command, capture_output=True, text=True, env=share)
        print(f"{key}: {'done' if result.returncode == 0 else result.stderr[-1500:]}", flush=True)

    write_text(args.out / "model.txt", check_source(args.out / "model.txt", args.model, args.gguf_file))
    given = {name: path for name in ("generic", "never") if (path := getattr(args, name))}
    texts = {"foreign": out_of_domain_text()} | {name: Path(p).read_text(encoding="utf-8") for name, p in given.items()}
    check_texts(args.out, texts)  # all of each, what is trained on too
    if not (args.out / "bf16-model" / "config.json").exists():
        spawn((0, "finetune"))
    todo = sorted((key for key in keys if not is_done(args.out, key, list(texts))), key=lambda key: -row_of(key).steps)
    with ThreadPoolExecutor(args.workers) as pool:  # the longest first
        list(pool.map(spawn, enumerate(todo)))
    rows = finished_rows(args.out, keys)
    print_table(rows)
    write_csv(rows, args.csv)
    if missing := [key for key in keys if not is_done(args.out, key, list(texts))]:
        raise UserError(f"not measured: {', '.join(missing)}; what each said stands above")


if __name__ == "__main__":
    with reported_in_one_line():
        main()
