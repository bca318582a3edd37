"""Measure what quantization costs real models on real tasks, and what training recovers.

    python benchmarks/models.py qwen2.5-coder-0.5b && python benchmarks/tasks/fetch.py
    python benchmarks/real_models.py --model runs/models/qwen2.5-coder-0.5b \\
      --gguf_file Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf --out runs/real/qwen2.5-coder-0.5b --minutes 9

One call runs for `--minutes` and is given again until it says that all is done: training resumes from its checkpoint,
answers from the last piece. First the model is written in BF16 and answers the training questions
(`benchmarks/training_data.py`); then each row is trained by main.py with its recipe, or quantized, and measured:
tasks in the model's chat template, zero-shot and greedy; bits per byte of two out-of-domain texts, and the KL to the
BF16 model on them and on its own answers. `OUT/real_models.csv` has every figure that is there, with the minutes of
training on its device. `benchmarks/real_report.py` prints the table, `benchmarks/real_many.py` measures rows on several
GPUs at once.

The baseline is a GGUF file, dequantized: a model of 4 to 6 bits a weight in BF16, which is told in the table.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks import training_data  # noqa: E402
from benchmarks.arguments import use_device  # noqa: E402
from benchmarks.models import MODELS  # noqa: E402
from benchmarks.real_quantized import autorounded, prepared, trained  # noqa: E402
from benchmarks.real_report import BASELINE, LEGEND, lines, write_csv  # noqa: E402
from benchmarks.real_rows import ALL, TRAINED, VARIANTS, is_row, row_of, settings_text  # noqa: E402
from benchmarks.real_training import LEAST_MINUTES, OutOfTime, flags, train  # noqa: E402
from benchmarks.report import check_source, environment, write_text  # noqa: E402
from benchmarks.tasks.divergence import ANSWERS, PROBLEMS, kl_on_answers, task_of  # noqa: E402
from benchmarks.tasks.generation import answers  # noqa: E402
from benchmarks.tasks.overlap import runs_of_tasks  # noqa: E402
from benchmarks.tasks.problems import FOLDER, TASKS, mean_and_error, read  # noqa: E402
from benchmarks.tasks.texts import TEXTS, bits_per_byte, read_text  # noqa: E402
from qat.checkpoints.load import load_plain  # noqa: E402
from qat.command_line import OneLineParser, positive, positive_number  # noqa: E402
from qat.errors import UserError, reported_in_one_line  # noqa: E402
from qat.files.model_folder import check_model_folder  # noqa: E402
from training.arguments.model import ModelArguments  # noqa: E402
from training.start.loading import load_tokenizer, load_unquantized  # noqa: E402

FIGURES = (*TASKS, *TEXTS, *ANSWERS)
ALL_DONE, OVER = "all is done", "{:g} minutes are over; give the same command again"


class Table:
    """A model, its rows, and where they are measured."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, args.out
        self.deadline = time.monotonic() + 60 * args.minutes
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.base = self.out / "bf16"
        titles = [model.title for model in MODELS.values() if model.gguf_file == args.gguf_file]
        self.baseline = titles[0] if titles else str(args.gguf_file or args.model)
        self._loaded: tuple[str, torch.nn.Module] | None = None

    def check_time(self) -> None:
        """Raise OutOfTime at the deadline."""
        if time.monotonic() > self.deadline:
            raise OutOfTime

    # ---- Models ----

    def write_base(self) -> None:
        """The unquantized model as a plain folder in BF16, which everything starts from."""
        done = self.base / "finished"
        source = check_source(done, self.args.model, self.args.gguf_file)
        if not done.exists():
            arguments = ModelArguments(self.args.model, self.args.gguf_file)
            load_unquantized(arguments).bfloat16().save_pretrained(self.base)
            load_tokenizer(arguments, self.args.length).save_pretrained(self.base)
            write_text(done, source)
        self.tokenizer = load_tokenizer(ModelArguments(str(self.base)), self.args.length)

    def teacher(self) -> torch.nn.Module:
        """The BF16 model."""
        return load_plain(str(self.base), "--model", torch.bfloat16).to(self.device).eval()

    def training_file_is_there(self) -> bool:
        """Whether the conversations to learn from were made."""
        done = self._training_file()
        return done.exists() and Path(done.read_text()).is_file()

    def _training_file(self) -> Path:
        """Where the path of the conversations is kept; those of fewer questions, or of other kinds, are others."""
        parts = ["training_file"] if self.args.written is None else [f"training_file-written{self.args.written}"]
        return self.out / "-".join(parts + ([] if self.args.questions is None else [str(self.args.questions)]))

    def training_file(self) -> Path:
        """The conversations to learn from."""
        done = self._training_file()
        if self.training_file_is_there():
            return Path(done.read_text())
        rows = training_data.first_questions(self.args.tasks, self.args.written, self.args.questions)
        path = training_data.make(
            self.teacher(), self.tokenizer, rows, self.out / "training", self.args.batch_size, self.deadline,
            self.args.training_share or (0, 1), avoided=runs_of_tasks(self.args.tasks, training_data.AVOIDED),
        )  # fmt: skip
        if path is None:
            raise OutOfTime
        write_text(done, str(path))
        return path

    def model_of(self, key: str) -> torch.nn.Module:
        """The model of a row as it would be served, in BF16; the last one is kept in memory."""
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None
            self._loaded = key, self._load(key)
        return self._loaded[1]

    def _load(self, key: str) -> torch.nn.Module:
        row = row_of(key)
        if row.quantized is None:
            folder = self.base if row.recipe is None else self.out / "rows" / key / "trained"
            if not folder.is_dir():  # it was measured and removed
                raise UserError(
                    f"{folder} was removed once all figures asked for were there, and another is asked for now; remove "
                    f"{folder.parent} to train and measure the row again, or leave it out with --rows"
                )
            return trained(folder, self.device)
        if row.iterations:
            return autorounded(
                row, self.base, self.out / "rows" / key, self.training_file(), self.tokenizer, self.deadline
            )
        return prepared(row.quantized, self.base, self.training_file(), self.tokenizer, self.device)

    def flags(self, key: str) -> list[str]:
        """The arguments of main.py for a row."""
        return flags(key, self.base, self.out / "rows" / key / "trained", self.training_file(), self.args)

    def check_settings(self, key: str) -> None:
        """Note what a row is measured with, in its folder.

        Raises:
            UserError: the folder has figures of other settings, or of an earlier version that did not note them.
        """
        path = self.out / "rows" / key / "settings.json"
        row = row_of(key)
        names = ["limit", "length"]
        names += ["questions", "written"] if key != BASELINE else []  # made the training data, which calibrates too
        names += ["train_batch_size"] if row.recipe is not None else []
        names += ["learning_rate"] if row.recipe is not None and row.learning_rate is None else []
        wanted = {"row": settings_text(key)} | {name: getattr(self.args, name) for name in names}
        if not path.exists() and not any(path.parent.glob("*")):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(wanted))
            return
        found = {"written": None} | json.loads(path.read_text()) if path.exists() else {}  # None before it was a choice
        if differing := [name for name, value in wanted.items() if found.get(name, self) != value]:
            raise UserError(
                f"{path.parent} was measured with another {differing[0]}: {found.get(differing[0], 'not noted')}, not "
                f"{wanted[differing[0]]}; remove the folder, or give another --out"
            )

    # ---- Figures ----

    def measure(self, key: str, figure: str) -> None:
        """Measure a figure of a row, in pieces, and write it and the table of what is there."""
        path = self.out / "rows" / key / f"{figure}.json"
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if figure in ANSWERS:
            result = self.on_answers(key, task_of(figure))
        else:
            result = self.text(key, figure) if figure in TEXTS else self.task(key, figure, path.with_suffix(""))
        about = environment(self.device)
        if self.args.rows_on_gpu > 1:
            about["device"] += f", up to {self.args.rows_on_gpu} rows at once"
        if key != BASELINE:
            about["data"] = self.training_file().stem
        write_text(path, json.dumps({**result, "baseline": self.baseline, **about}))
        write_csv(self.out, FIGURES)

    def task(self, key: str, name: str, folder: Path) -> dict:
        """Which problems a row solves."""
        task, problems, right = TASKS[name], read(name, self.args.tasks)[: self.args.limit], []
        folder.mkdir(exist_ok=True)
        for start in range(0, len(problems), self.args.batch_size):
            piece, chosen = folder / f"{start:06}.json", problems[start : start + self.args.batch_size]
            if not (piece.exists() and len(json.loads(piece.read_text())["right"]) == len(chosen)):
                self.check_time()
                questions = [task.prompt(problem) for problem in chosen]
                texts = answers(
                    self.model_of(key), self.tokenizer, questions, task.max_new_tokens, self.args.batch_size
                )
                write_text(piece, json.dumps({"answers": texts, "right": task.score(chosen, texts)}))
            right += json.loads(piece.read_text())["right"]
        value, error = mean_and_error([float(is_right) for is_right in right])
        return {"value": value, "error": error, "count": len(right), "right": right}

    def on_answers(self, key: str, name: str) -> dict:
        """The KL to the BF16 model on its own answers to the first problems of a task."""
        self.check_time()
        if key == BASELINE:
            return {"value": 0.0, "error": 0.0, "kl": 0.0}
        task, problems = TASKS[name], read(name, self.args.tasks)[: self.args.limit or PROBLEMS][:PROBLEMS]
        questions, teacher = [task.prompt(problem) for problem in problems], self.teacher()
        path = self.out / "answers" / f"{name}-{len(questions)}.json"  # once, so that all rows have the same
        if not path.exists():
            texts = answers(teacher, self.tokenizer, questions, task.max_new_tokens, self.args.batch_size)
            path.parent.mkdir(exist_ok=True)
            if not path.exists():  # of another process meanwhile
                write_text(path, json.dumps(texts))
        figures = kl_on_answers(self.model_of(key), teacher, self.tokenizer, questions, json.loads(path.read_text()))
        return {**figures, "kl": figures["value"], "count": len(questions)}

    def text(self, key: str, name: str) -> dict:
        """Bits per byte of a text, and the KL to the BF16 model."""
        self.check_time()
        rows = self.args.limit or sys.maxsize
        teacher = None if key == BASELINE else self.teacher()
        figures = bits_per_byte(
            self.model_of(key), self.tokenizer, read_text(name, self.args.tasks), min(1024, self.args.length), 4,
            teacher, rows,
        )  # fmt: skip
        return {"value": figures["bits_per_byte"], "error": figures["error"], "kl": figures.get("kl", 0.0)}

    def run(self) -> None:
        """Everything that is not done, row by row.

        Raises:
            OutOfTime: some of it is left for the next call.
        """
        self.write_base()
        for key in self.args.rows:
            self.check_time()
            self.check_settings(key)
            train(key, self.out / "rows" / key, self.flags, self.deadline)
            for figure in self.args.figures:
                self.measure(key, figure)
            if not self.args.keep:
                for folder in ("trained", "autoround"):
                    shutil.rmtree(self.out / "rows" / key / folder, ignore_errors=True)
            print(f"{key}: done", flush=True)


def _share(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    return int(number), int(of)


def _names(text: str, known: list[str], argument: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in known and not (argument == "--rows" and is_row(name)):
            more = (
                f"; or {', '.join(TRAINED)} with -STEPS, and behind them +VARIANT ({', '.join(VARIANTS)}), ~RATE, a "
                "learning rate, and @SEED, a whole number"
            )
            more = more if argument == "--rows" else ""
            raise UserError(f"{argument} {name!r} is unknown; choose from {', '.join(known)}{more}")
    return names


def _check(args: argparse.Namespace) -> None:
    """Refuse what cannot be measured before anything is written."""
    check_model_folder(args.model, "--model")
    if args.gguf_file is not None and not Path(args.model, args.gguf_file).is_file():
        raise UserError(f"--gguf_file {args.gguf_file!r} is not in --model {args.model!r}; name a .gguf file in there")
    for figure in args.figures:
        (read_text if figure in TEXTS else read)(task_of(figure), args.tasks)
    if any(row_of(key).quantized or row_of(key).recipe for key in args.rows):
        training_data.first_questions(args.tasks, args.written, args.questions)
        if args.written is not None:  # whose questions need no file, and must not be like those of the tasks
            runs_of_tasks(args.tasks, training_data.AVOIDED)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments, checked."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--gguf_file", help="its GGUF file, if that is what the folder holds")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", type=Path, default=FOLDER, help="folder of benchmarks/tasks/fetch.py")
    parser.add_argument("--rows", default=",".join(ALL), help="names from real_rows.py, such as mxfp4-600+gptq~5e-6@3")
    parser.add_argument("--figures", default=",".join(FIGURES))
    parser.add_argument("--minutes", type=positive_number, default=9.0, help="of this call")
    parser.add_argument("--limit", type=positive, help="problems of each task, rows of each text; default: all")
    parser.add_argument("--questions", type=positive, help="to make training data from; default: all")
    parser.add_argument("--written", type=positive, help=training_data.WRITTEN)
    parser.add_argument("--batch_size", type=positive, help="of answers; default: 660 on a GPU, 8 on a CPU")
    parser.add_argument("--train_batch_size", type=positive, default=4)
    parser.add_argument("--length", type=positive, default=1024, help="tokens of a training row")
    parser.add_argument("--learning_rate", type=positive_number, default=1e-5, help="of rows that name none")
    parser.add_argument("--keep", action="store_true", help="keep the trained models")
    parser.add_argument("--training_share", type=_share, help=argparse.SUPPRESS)  # of real_many.py, as is the next one
    parser.add_argument("--rows_on_gpu", type=positive, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.rows, args.figures = _names(args.rows, ALL, "--rows"), _names(args.figures, list(FIGURES), "--figures")
    args.batch_size = args.batch_size or (660 if torch.cuda.is_available() else 8)
    _check(args)
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def main(argv: list[str] | None = None) -> None:
    """Measure for some minutes, and print what is there."""
    args = parse(argv)
    table = Table(args)
    use_device(table.device)
    if args.training_share is not None:
        table.write_base()
        with suppress(OutOfTime):  # other processes have the rest
            table.training_file()
        return
    try:
        table.run()
        print(ALL_DONE)
    except OutOfTime:
        is_short = args.minutes < LEAST_MINUTES and any(row_of(key).recipe for key in args.rows)
        hint = f", with --minutes {LEAST_MINUTES:g} or more, which a training needs" if is_short else ""
        print(OVER.format(args.minutes) + hint, flush=True)
    print(f"\nBaseline: {table.baseline}. {LEGEND}", *lines(args.out, args.rows, args.figures), sep="\n")


if __name__ == "__main__":
    with reported_in_one_line():
        main()
