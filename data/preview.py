"""Show samples as the model will see them, so that a person can check format and labels by eye.

    python -m data.preview --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --dataset chats.jsonl

Learned text is green, or stands between ⟦ and ⟧ where there is no colour; `--packing True` shows whole rows, with a
line between their samples.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qat.errors import UserError, reported_in_one_line
from qat.files.paths import check_writable

from .bad_samples import POLICIES
from .command_line import DataclassParser
from .conversations.formatting import IGNORE_INDEX, TRAIN_ON, set_chat_template
from .sets.generic import read_generic
from .sets.packing import PackedDataset
from .sources.readers import HELP
from .supervised import make_supervised_data_module
from .tokenizer import load_tokenizer

COLORS = ("auto", "always", "never")
_GREEN, _RESET = "\033[1;32m", "\033[0m"


@dataclass
class PreviewArguments:
    """What to show; the data arguments mean what they mean to main.py."""

    model_name_or_path: str = field(metadata={"help": "Whose tokenizer to use: hub id or local folder."})
    gguf_file: str | None = field(default=None, metadata={"help": "Name of a GGUF file in that folder."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run Python code that comes with the tokenizer."})
    dataset: str = field(default="python-docs", metadata={"help": HELP})
    eval_dataset: str | None = field(default=None, metadata={"help": "As for main.py."})
    split: str | None = field(default=None, metadata={"help": "As for main.py."})
    chat_template: str | None = field(default=None, metadata={"help": "As for main.py."})
    train_on: str = field(default="assistant", metadata={"help": "As for main.py.", "choices": list(TRAIN_ON)})
    on_bad_sample: str = field(default="error", metadata={"help": "As for main.py.", "choices": list(POLICIES)})
    data_cache_dir: str | None = field(default=None, metadata={"help": "As for main.py."})
    model_max_length: int = field(default=2048, metadata={"help": "Samples are cut at this many tokens."})
    distill_generic: str | None = field(
        default=None, metadata={"help": "Show this FILE, as main.py mixes it into distillation, in place of --dataset."}
    )
    packing: bool = field(default=False, metadata={"help": "Show packed rows."})
    count: int = field(default=3, metadata={"help": "Samples or rows to show."})
    color: str = field(default="auto", metadata={"help": "Colour, or marks instead.", "choices": list(COLORS)})

    def __post_init__(self) -> None:
        if self.model_max_length < 2:
            raise UserError(f"--model_max_length {self.model_max_length} is too short; samples need at least 2 tokens")
        if self.count < 1:
            raise UserError(f"--count {self.count} shows nothing; give a positive number")
        if (self.distill_generic or "").startswith(("teacher:", "chat:")):
            raise UserError(
                f"--distill_generic {self.distill_generic} is sampled by main.py from its teacher, which no preview "
                "loads; give a FILE, or leave it out"
            )
        if self.data_cache_dir is not None:
            check_writable("--data_cache_dir", self.data_cache_dir)
        if self.gguf_file is not None and not Path(self.model_name_or_path, self.gguf_file).is_file():
            raise UserError(
                f"--gguf_file {self.gguf_file!r} is not in --model_name_or_path {self.model_name_or_path!r}; name a "
                ".gguf file that lies in that local folder"
            )


def main(argv: list[str] | None = None) -> None:
    """Prepare the data as main.py would, and print the first few training samples."""
    (args,) = DataclassParser(PreviewArguments, prog="data.preview").parse(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("data").setLevel(logging.INFO)
    tokenizer = load_tokenizer(
        args.model_name_or_path, args.model_max_length, gguf_file=args.gguf_file,
        trust_remote_code=args.trust_remote_code,
    )  # fmt: skip
    names = ("dataset", "eval_dataset", "split", "chat_template", "train_on", "on_bad_sample", "data_cache_dir")
    options = {name: getattr(args, name) for name in names}
    if args.distill_generic is not None:
        set_chat_template(tokenizer, args.chat_template)
        how = {name: options[name] for name in ("chat_template", "train_on", "on_bad_sample", "data_cache_dir")}
        samples = read_generic(args.distill_generic, tokenizer, **how)
    else:
        samples = make_supervised_data_module(tokenizer=tokenizer, evaluate=False, **options)["train_dataset"]
    rows = PackedDataset(samples, args.model_max_length) if args.packing else samples
    color = args.color == "always" or (args.color == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    for number in range(min(args.count, len(rows))):
        row = rows[number]
        learned = sum(label != IGNORE_INDEX for label in row["labels"])
        print(f"--- {number + 1} of {len(rows)}: {len(row['input_ids'])} tokens, {learned} of them learned ---")
        print(show(row, tokenizer, color) + "\n")


def show(row: dict, tokenizer: PreTrainedTokenizerBase, color: bool) -> str:
    """The text of a sample or packed row, learned tokens marked."""
    begin, end = (_GREEN, _RESET) if color else ("⟦", "⟧")
    parts = []
    for sample in _samples_of(row):
        pieces = []
        for learned, tokens in groupby(sample, key=lambda pair: pair[1] != IGNORE_INDEX):
            text = tokenizer.decode([token for token, _ in tokens], clean_up_tokenization_spaces=False)
            pieces.append(f"{begin}{text}{end}" if learned else text)
        parts.append("".join(pieces))
    return "\n~~~ next sample in this row ~~~\n".join(parts)


def _samples_of(row: dict) -> Iterable[list[tuple[int, int]]]:
    """(token, label) pairs, divided where positions start again."""
    pairs = list(zip(row["input_ids"], row["labels"], strict=True))
    starts = [i for i, p in enumerate(row["position_ids"]) if p == 0] if "position_ids" in row else [0]
    return [pairs[a:b] for a, b in zip(starts, [*starts[1:], len(pairs)], strict=True)]


if __name__ == "__main__":
    with reported_in_one_line():
        main()
