"""GenericText: what `--distill_generic` names, read or sampled, and mixed into the training data."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from data.sets.generic import read_generic
from data.sets.mixing import MixedDataset
from data.sets.packing import PackedDataset
from qat.errors import UserError

from ..arguments.data import DataArguments
from ..arguments.distillation import DistillationArguments
from ..backends.weightless import first_process_loads
from .continuations import no_weights, sample_continuations
from .turns import Opening, of_conversations, of_text

logger = logging.getLogger(__name__)


@dataclass
class GenericText:
    """Text from elsewhere on which the student learns the teacher's distributions, and no tokens of the data.

    Attributes:
        settings: of the run: what the text is, and its share.
        args: likewise.
        packing: whether rows are packed.
        tokens_of: the tokenizer of student and teacher.
        samples: the text, of columns `input_ids`, `labels`, `length`; None until it is sampled, or where none is asked.
        evaluated: likewise, that of --eval_generic.
        chat: how sampled conversations begin and continue; None where none are sampled.
    """

    settings: DistillationArguments
    args: TrainingArguments
    packing: bool
    tokens_of: PreTrainedTokenizerBase
    samples: Dataset | None = None
    evaluated: Dataset | None = None
    chat: Opening | None = None

    @classmethod
    def read(
        cls,
        settings: DistillationArguments,
        args: TrainingArguments,
        data_args: DataArguments,
        tokenizer: PreTrainedTokenizerBase,
    ) -> GenericText:
        """Read the text of a FILE; continuations of a teacher are sampled later. An evaluation alone reads none.

        Raises:
            UserError: it cannot be read, or is empty; or it cannot be sampled on each machine, or in this tokenizer.
        """
        text = cls(settings, args, data_args.packing, tokenizer)
        if settings.unread_generic is not None:
            logger.info(_unread(settings))
        several_machines = int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size)) < args.world_size
        if settings.generic_continuations and several_machines and first_process_loads():
            raise UserError(no_weights(str(settings.distill_generic)))
        if settings.samples_conversations:
            if data_args.chat_template == "none":
                raise UserError(
                    f"--distill_generic {settings.distill_generic} samples conversations in the tokenizer's chat "
                    "template, and --chat_template none writes the data without it; give teacher:N, or another "
                    "--chat_template"
                )
            text.chat = of_conversations(tokenizer)
            _check_length(len(text.chat.begin), settings, args)
        if settings.generic_file is not None:
            text.samples = read_generic(settings.generic_file, tokenizer, **_how_to_read(data_args))
        if settings.eval_generic is not None:
            text.evaluated = read_generic(settings.eval_generic, tokenizer, "eval_generic", **_how_to_read(data_args))
        return text

    def sample(self, teacher: PreTrainedModel) -> None:
        """Sample continuations from an unquantized teacher, where they are asked for; all processes must call it."""
        if count := self.settings.generic_continuations:
            length = self.settings.distill_generic_length or self.args.model_max_length
            opening = self.chat or of_text(self.tokens_of, teacher)
            self.samples = sample_continuations(
                teacher, count, length, opening, self.args, self.settings.distill_cache_dir
            )

    def mixed_into(self, data: dict) -> dict:
        """The data module with the text between the rows of its training set, and the text that is evaluated."""
        if self.evaluated is not None:
            data = {**data, "generic_eval_dataset": self.evaluated}
        if self.samples is None:
            return data
        rows = PackedDataset(self.samples, self.args.model_max_length) if self.packing else self.samples
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        mixed = MixedDataset(data["train_dataset"], rows, self.settings.distill_generic_share, seed)
        logger.info(describe(mixed, self.settings.distill_generic, int(sum(self.samples["length"])), self.args))
        return {**data, "train_dataset": mixed}


def _unread(settings: DistillationArguments) -> str:
    """One line: what an evaluation alone leaves out."""
    folder = settings.distill_cache_dir if settings.distill_teacher != "cache" else None
    unused = f", and --distill_cache_dir {folder} has no effect" if folder else ""
    return (
        f"generic text (--distill_generic {settings.unread_generic}) is for training only and is not read: this run "
        f"trains nothing{unused}"
    )


def _how_to_read(data_args: DataArguments) -> dict:
    names = ("chat_template", "train_on", "on_bad_sample", "data_cache_dir", "preprocessing_num_workers")
    return {name: getattr(data_args, name) for name in names}


def _check_length(begin: int, settings: DistillationArguments, args: TrainingArguments) -> None:
    """Raise a UserError where a conversation has no room behind what its template begins with."""
    length = settings.distill_generic_length or args.model_max_length
    if length <= begin:
        raise UserError(
            f"a sampled conversation has {length} tokens (--distill_generic_length, else --model_max_length), and the "
            f"chat template begins it with {begin}; give more of both, such as {begin + 256}, or --distill_generic none"
        )


def describe(mixed: MixedDataset, name: str, tokens: int, args: TrainingArguments) -> str:
    """One line: how much text there is, and how often the training reads it."""
    rows, epoch = len(mixed.generic), len(mixed)
    step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    total = args.max_steps * step if args.max_steps > 0 else round(args.num_train_epochs * epoch)
    read = round(total * float(mixed.share))
    use = f"each is read {read / rows:.1f} times" if read >= rows else f"{rows - read:,} of them are not read"
    return (
        f"generic text {name}: {rows:,} rows, {tokens:,} tokens; it is {float(mixed.share):.4g} of the rows of a step, "
        f"{mixed.generic_rows:,} rows beside the {len(mixed.domain):,} rows of an epoch of the domain; the training "
        f"reads {read:,} rows of it: {use}"
    )
