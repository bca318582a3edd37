"""Check the options of Hugging Face's Trainer by the table of option_table.py, and write it as docs/trainer_options.md:
`python -m training.arguments.trainer_options > docs/trainer_options.md`.
"""

from __future__ import annotations

import os
from dataclasses import MISSING, fields
from typing import Any

import transformers

from qat.errors import UserError

from .option_conditions import plain
from .option_table import METRICS, TRAINER_OPTIONS, Option


def check_trainer_options(args: transformers.TrainingArguments, except_for: tuple[str, ...] = ()) -> None:
    """Refuse what does not work here. Call it before transformers reads the arguments, or after.

    Args:
        args: with the options as attributes.
        except_for: options that are not looked at.

    Raises:
        UserError: an option has a value that is refused. The message names the argument, its value, the reason and
            the remedy.
    """
    defaults = _defaults()
    for option in TRAINER_OPTIONS:
        if option.name not in defaults or option.name in except_for:
            continue  # such as an older transformers, from 5.17 on, does not know it
        value = plain(getattr(args, option.name, defaults[option.name]))
        is_default = value == defaults[option.name] or value in (None, "", [], {})
        for refusal in option.refusals:
            if not is_default and refusal.applies(value, args):
                shown = "" if option.name == "hub_token" else f" {value}"
                raise UserError(f"--{option.name}{shown}: {refusal.reason}; {refusal.remedy}")
            if refusal.variable and os.environ.get(refusal.variable, "").lower() in ("true", "1"):
                raise UserError(
                    f"--{option.name}, asked for by accelerate launch ({refusal.variable}): {refusal.reason}; "
                    f"{refusal.remedy}"
                )


def check_with_stream(args: transformers.TrainingArguments) -> None:
    """Refuse what has no effect on a stream, which comes in an order of its own and has no length.

    Raises:
        UserError: an option asks for another order, or a training has no number of steps.
    """
    if args.do_train and args.max_steps <= 0:
        raise UserError(
            "--streaming True needs --max_steps: a stream has no known length, so epochs cannot be counted; give the "
            "number of steps, or leave --streaming out"
        )
    strategy = plain(args.train_sampling_strategy)
    if strategy != _defaults()["train_sampling_strategy"]:
        raise UserError(
            f"--train_sampling_strategy {strategy} has no effect with --streaming True: a stream is shuffled in a "
            "buffer while it is read, in an order of its own; leave one of the two out"
        )


def check_metric(args: transformers.TrainingArguments, has_teacher: bool, has_generic: bool = False) -> None:
    """Refuse a metric that an evaluation here does not have, and to prefer its higher values.

    Raises:
        UserError: as described.
    """
    metric = args.metric_for_best_model
    if metric is None:
        return
    name = metric.removeprefix("eval_")
    if name == "kl" and not has_teacher:
        raise UserError(
            f"--metric_for_best_model {metric} is the divergence from a teacher, and there is none: give --distill "
            "True, or choose loss or perplexity"
        )
    if name.startswith("generic_") and name.removeprefix("generic_") in METRICS:
        if not has_generic:
            raise UserError(
                f"--metric_for_best_model {metric} is of generic text, and none is evaluated: give --eval_generic FILE"
            )
        name = name.removeprefix("generic_")
    if name not in METRICS:
        raise UserError(f"--metric_for_best_model {metric} is not measured here; choose one of {', '.join(METRICS)}")
    if args.greater_is_better:
        raise UserError(
            f"--greater_is_better True: {metric} is better when it is lower, so the worst checkpoint would count as "
            "the best; leave it out"
        )


def check_with_teacher(args: transformers.TrainingArguments) -> None:
    """Refuse what a loss against a teacher's distributions would ignore.

    Raises:
        UserError: labels are to be smoothed.
    """
    if args.label_smoothing_factor:
        raise UserError(
            f"--label_smoothing_factor {args.label_smoothing_factor} has no effect with a teacher: its distributions "
            "take the place of labels; leave it out, or train without --distill True"
        )


def check_with_generic(args: transformers.TrainingArguments) -> None:
    """Refuse an order of samples that cannot have generic text between them.

    Raises:
        UserError: samples come in an order of transformers' own.
    """
    strategy = plain(args.train_sampling_strategy)
    if strategy not in ("random", "group_by_length"):
        raise UserError(
            f"--train_sampling_strategy {strategy} cannot have the rows of --distill_generic between those of "
            "--dataset; choose random or group_by_length, or give --distill_generic none"
        )


def _defaults() -> dict[str, Any]:
    """The default of each option, as transformers has it."""
    return {
        f.name: plain(f.default if f.default is not MISSING else f.default_factory())
        for f in fields(transformers.TrainingArguments)
    }


# ---- The documentation ----

_HEAD = """# Options of Trainer

`main.py` takes the options of transformers' `TrainingArguments`. Each works as transformers documents it, or is refused
before the model is loaded with the reason and the remedy. The table is `training/arguments/option_table.py`; a test
compares it with the installed transformers (5.23). This page is written by

```bash
python -m training.arguments.trainer_options > docs/trainer_options.md
```

The program's own options stand in `python main.py --help`.
"""


def document() -> str:
    """The text of docs/trainer_options.md."""
    parts = [_HEAD]
    for group in dict.fromkeys(option.group for option in TRAINER_OPTIONS):
        parts.append(f"\n## {group}\n\n| option | verdict | what is particular |\n|---|---|---|\n")
        parts += [_row(option) for option in TRAINER_OPTIONS if option.group == group]
    return "".join(parts)


def _row(option: Option) -> str:
    verdict = "refused" if not option.works else "works, with exceptions" if option.refusals else "works"
    notes = [option.note] if option.note else []
    for refusal in option.refusals:
        values = f"Refused: {refusal.values}. " if refusal.values else ""
        notes.append(f"{values}{refusal.reason[0].upper()}{refusal.reason[1:]}. Remedy: {refusal.remedy}.")
    return f"| `{option.name}` | {verdict} | {' '.join(notes)} |\n"


if __name__ == "__main__":
    print(document(), end="")
