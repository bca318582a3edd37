"""make_supervised_data_module: tokenized training and evaluation sets, and the collator that batches them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import datasets
import torch
from transformers import PreTrainedTokenizerBase

from qat.errors import UserError
from qat.files.build_once import build_once

from .bad_samples import BadSamplePolicy
from .conversations.formatting import Formatter, set_chat_template
from .sets.building import build
from .sets.cache import default_root, fingerprint
from .sets.collating import SupervisedCollator
from .sets.ends import describe_plain_end
from .sets.packing import PackedDataset, check_packing, needs_one_row
from .sets.selection import collect, split_pools
from .sets.streaming import make_stream
from .sets.summary import describe_set
from .sets.totals import describe_left_out, describe_notes, describe_splits
from .sources.readers import Source, parse_sources
from .sources.splits import first_of, is_for_training

logger = logging.getLogger(__name__)

__all__ = ["SupervisedCollator", "make_supervised_data_module"]


def make_supervised_data_module(
    dataset: str = "Daring-Anteater",
    tokenizer: PreTrainedTokenizerBase | None = None,
    train_size: float = 0,
    eval_size: float = 0,
    *,
    eval_dataset: str | None = None,
    split: str | None = None,
    chat_template: str | None = None,
    train_on: str = "assistant",
    packing: bool = False,
    model: torch.nn.Module | None = None,
    streaming: bool = False,
    on_bad_sample: str = "error",
    data_cache_dir: str | None = None,
    preprocessing_num_workers: int = 0,
    batch_size: int = 8,
    seed: int = 42,
    evaluate: bool = True,
) -> dict:
    """What a Trainer needs for supervised fine-tuning: `train_dataset`, `eval_dataset` and `data_collator`.

    Samples are `input_ids`, `labels` (int lists, equally long) and `length`; packed rows have `position_ids` instead of
    the last. The evaluation set is never packed. See docs/data.md for what each choice means.

    Args:
        dataset: see `data.sources.readers.HELP`.
        tokenizer: a fast tokenizer; samples are cut at its `model_max_length`.
        train_size, eval_size: numbers of samples, or fractions between 0 and 1; 0: all, and the dataset's default.
        eval_dataset: evaluate on this instead of held-out samples; written like `dataset`. "none" holds nothing out.
        split: "TRAIN" or "TRAIN,EVAL": splits by name. TRAIN alone holds samples out of it. Default: "train", evaluated
            on the split "validation" where there is one.
        chat_template: None for the tokenizer's, "none" for turns joined by newlines, or a .jinja file, which
            `tokenizer` is given.
        train_on: "assistant" or "all".
        packing: pack training samples into rows of `model_max_length` tokens; needs `model`, which is tried.
        streaming: read and tokenize while training; nothing is cached, and the Trainer needs `max_steps`.
        on_bad_sample: "error" or "skip" (counted and reported).
        data_cache_dir: where tokenized sets are kept.
        preprocessing_num_workers: processes that tokenize; 0 chooses.
        batch_size: for the padding that the summary reports.
        seed: of the order of a stream; a set that is read ahead is shuffled by the Trainer.
        evaluate: whether there has to be an evaluation set. Without, `eval_dataset` is None where none can be had. What
            is held out does not depend on it, so that a later run can evaluate what this one trains.

    Raises:
        UserError: a wrong argument, or data that cannot be used; the message states which, where, and what to do.
    """
    if tokenizer is None:
        raise UserError("tokenizer=None: make_supervised_data_module needs the model's tokenizer")
    for argument, size in (("train_size", train_size), ("eval_size", eval_size)):
        check_size(argument, size)
    if packing and model is None:
        raise UserError("packing=True needs model=..., to try whether it keeps packed samples apart")
    if packing:
        check_packing(model)
    set_chat_template(tokenizer, chat_template)
    formatter = Formatter(tokenizer, tokenizer.model_max_length, train_on, chat_template)
    logger.info("format: %s", formatter.description)
    policy = BadSamplePolicy(on_bad_sample)
    plan = _Plan(dataset, eval_dataset, split, train_size, eval_size, streaming)
    if evaluate and plan.holds_nothing_out:
        raise UserError("--eval_dataset none leaves nothing to evaluate on; leave it out, or ask for no evaluation")
    for line in plan.report():
        logger.info(line)
    collator = SupervisedCollator(_pad_token_id(tokenizer), one_row=packing and needs_one_row(model))
    if streaming:
        train, held_out = make_stream(
            plan.train, plan.evaluation, train_size, eval_size, formatter, policy, packing, seed
        )
        _check_evaluation(held_out, evaluate, plan)
        module = {"train_dataset": train, "eval_dataset": held_out, "data_collator": collator}
        _warn_of_ends(module, formatter.max_length, tokenizer)
        return module

    key = fingerprint({"data": plan.identity(), "format": formatter.fingerprint, "on_bad_sample": on_bad_sample})
    root = Path(data_cache_dir) if data_cache_dir else default_root()
    folder = build_once(root, key, lambda f: _build_sets(f, plan, formatter, policy, preprocessing_num_workers))
    train, held_out = _open(folder, "train"), _open(folder, "eval")
    _check_evaluation(held_out, evaluate, plan)
    packed = PackedDataset(train, formatter.max_length) if packing else None
    _report(folder, train, held_out, packed, formatter.max_length, batch_size)
    module = {"train_dataset": packed or train, "eval_dataset": held_out, "data_collator": collator}
    _warn_of_ends(module, formatter.max_length, tokenizer)
    return module


def check_size(argument: str, size: float) -> None:
    """Raise a UserError unless `size` is 0, a whole number of samples or a fraction between 0 and 1."""
    if not (0 <= size < 1 or (size >= 1 and float(size).is_integer())):
        raise UserError(
            f"--{argument} {size:g} is neither a whole number of samples nor a fraction between 0 and 1; "
            "0 takes the default"
        )


class _Plan:
    """Which split of which source trains, and which evaluates (None: held-out samples of the source itself)."""

    def __init__(self, dataset, eval_dataset, split, train_size, eval_size, streaming) -> None:
        names = tuple(name.strip() for name in split.split(",")) if split else ()
        if len(names) > 2 or "" in names:
            raise UserError(f"--split {split!r} is neither TRAIN nor TRAIN,EVAL, such as train_sft,test_sft")
        self.holds_nothing_out = eval_dataset == "none"
        if self.holds_nothing_out and (eval_size or len(names) > 1):
            raise UserError("--eval_dataset none excludes --eval_size and a second name in --split; leave one out")
        sources = parse_sources(dataset, "dataset", names, streaming)
        train_split = names[0] if names else "train"
        self.train = [(source, _existing_split(source, train_split)) for source in sources]
        self.sizes = (float(train_size), float(eval_size))
        if self.holds_nothing_out:
            self.evaluation: list[tuple[Source, str] | None] = []
        elif eval_dataset is not None:
            wanted = names[1] if len(names) > 1 else None
            own = parse_sources(eval_dataset, "eval_dataset", names, streaming)
            self.evaluation = [(s, _eval_split(s, wanted)) for s in own]
        elif len(names) > 1:
            self.evaluation = [(source, _existing_split(source, names[1])) for source in sources]
        else:
            found = [None if names else first_of(source.splits(), "validation") for source in sources]
            self.evaluation = [name and (source, name) for source, name in zip(sources, found, strict=True)]
        self.has_own_evaluation = eval_dataset is not None
        self.sources = sources if eval_dataset is None or self.holds_nothing_out else [*sources, *own]

    def report(self) -> list[str]:
        """Lines about the files of each source, its splits that are used, and sources that are given twice."""
        names = [source.name for source, _ in self.train]
        uses = [f"{source.name}: train on {split}" for source, split in self.train]
        if not self.has_own_evaluation:
            found = [entry[1] if entry else "held-out samples of it" for entry in self.evaluation]
            uses = [f"{use}, evaluate on {split}" for use, split in zip(uses, found, strict=True)]
        elif not self.holds_nothing_out:
            uses += [f"{entry[0].name}: evaluate on {entry[1]}" for entry in self.evaluation if entry is not None]
        repeated = [name for name in dict.fromkeys(names) if names.count(name) > 1]
        lines = dict.fromkeys(line for source in self.sources for line in source.report())
        return [*lines, *uses, *(f"{name}: given more than once, so its samples are repeated" for name in repeated)]

    def identity(self) -> list:
        """What a cache must tell apart: contents, weights and sizes."""

        def of(entry: tuple[Source, str] | None) -> list | None:
            if entry is None:
                return None
            source, split = entry
            return [type(source).__name__, source.name, source.weight, split, source.identity(split)]

        return [[of(e) for e in self.train], [of(e) for e in self.evaluation], self.sizes, self.has_own_evaluation]


def _existing_split(source: Source, split: str) -> str:
    if split not in source.splits():
        found = source.splits()
        hint = next((f"; give --split {name}" for name in found if is_for_training(name)), "")
        raise UserError(f"--split {split!r}: {source.name} has the splits {', '.join(found)}{hint}")
    return split


def _eval_split(source: Source, wanted: str | None) -> str:
    """An evaluation set of its own: the split asked for, else its validation, test or only split."""
    if wanted is not None:
        return _existing_split(source, wanted)
    return first_of(source.splits(), "validation", "test") or source.splits()[0]


def _check_evaluation(held_out: datasets.Dataset | None, evaluate: bool, plan: _Plan) -> None:
    if held_out is not None:
        return
    if evaluate:
        names = " and ".join(source.name for source, _ in plan.train)
        raise UserError(
            f"--dataset {names}: all samples are alike, so none can be held out to evaluate on; give --eval_dataset, "
            "or ask for no evaluation"
        )
    logger.info("nothing is held out: there is no evaluation set")


# ---- Building and opening ----


def _build_sets(folder: Path, plan: _Plan, formatter: Formatter, policy: BadSamplePolicy, workers: int) -> None:
    pools = [collect(source, split, folder / f"raw-{i}", policy) for i, (source, split) in enumerate(plan.train)]
    held_out = [
        None if entry is None else collect(*entry, folder / f"raw-eval-{i}", policy)
        for i, entry in enumerate(plan.evaluation)
    ]
    chosen = dict(zip(("train", "eval"), split_pools(pools, held_out, *plan.sizes, policy), strict=True))
    totals = {}
    for name, words in (("train", "training samples"), ("eval", "evaluation samples")):
        if name == "eval" and not len(chosen[name]):
            continue
        totals[name] = build(chosen[name].rows(), folder / f"{name}.arrow", formatter, policy, words, workers).as_dict()
    notes = [f"{pool.source.name}: {note}" for pool in (*pools, *held_out) if pool is not None for note in pool.notes]
    notes = list(dict.fromkeys([*notes, *chosen["eval"].notes]))
    report = {"notes": notes, "totals": totals, "skipped": policy.report(), "unread": policy.unread_report()}
    (folder / "summary.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for path in folder.glob("raw-*"):
        path.unlink()


def _open(folder: Path, name: str) -> datasets.Dataset | None:
    path = folder / f"{name}.arrow"
    return datasets.Dataset.from_file(str(path)) if path.exists() else None


def _report(folder: Path, train, held_out, packed: PackedDataset | None, max_length: int, batch_size: int) -> None:
    report = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    for note in report["notes"]:
        logger.info(note)
    for name, samples, rows in (("train", train, packed and len(packed)), ("eval", held_out, None)):
        if samples is None:
            continue
        lengths = samples.data.column("length").to_numpy()
        totals = report["totals"][name]
        logger.info(describe_set(name, totals, lengths, batch_size, max_length, rows))
        left_out, is_warning = describe_left_out(name, totals, max_length)
        if left_out:
            logger.log(logging.WARNING if is_warning else logging.INFO, left_out)
        for line in filter(None, (describe_splits(name, totals), describe_notes(name, totals))):
            logger.warning(line)
    if report["unread"]:
        logger.warning(report["unread"])
    if report["skipped"]:
        logger.warning(report["skipped"])


def _warn_of_ends(module: dict, max_length: int, tokenizer: PreTrainedTokenizerBase) -> None:
    if warning := describe_plain_end(module, max_length, tokenizer):
        logger.warning(warning)


def _pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return 0 if pad is None else pad
