"""Arguments of main.py: which data to learn from."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from data.bad_samples import POLICIES
from data.conversations.formatting import TRAIN_ON
from data.sources.readers import HELP as DATASET_HELP
from data.supervised import check_size
from qat.errors import UserError

from .option_table import MOST_WORKERS, WORKERS_OF_A_CORE


@dataclass
class DataArguments:
    """Which data to learn from."""

    dataset: str = field(default="Daring-Anteater", metadata={"help": f"{DATASET_HELP}. See docs/data.md."})
    eval_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Evaluate on this dataset, written like --dataset, not on held-out samples. 'none' holds none out."
        },
    )
    split: str | None = field(
        default=None,
        metadata={
            "help": "TRAIN or TRAIN,EVAL: names of the dataset's splits. TRAIN alone holds samples out of it. Default: "
            "train, evaluated on validation where there is one, else on held-out samples."
        },
    )
    train_size: float = field(
        default=0, metadata={"help": "Training samples: a number, or a fraction between 0 and 1; 0 uses all."}
    )
    eval_size: float = field(
        default=0,
        metadata={"help": "Evaluation samples: a number, or a fraction between 0 and 1; 0 uses the dataset's default."},
    )
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": "'none' joins turns by newlines (the format of INC's example); a .jinja file replaces the "
            "tokenizer's template. Default: the tokenizer's own, where it has one."
        },
    )
    train_on: str = field(
        default="assistant",
        metadata={"help": "Which tokens are learned: those of assistant turns, or all.", "choices": list(TRAIN_ON)},
    )
    packing: bool = field(
        default=False,
        metadata={"help": "Pack training samples into full rows of model_max_length tokens, without attention across."},
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read and tokenize while training, without a cache; needs --max_steps."},
    )
    on_bad_sample: str = field(
        default="error",
        metadata={"help": "End at the first bad sample, or skip and count them.", "choices": list(POLICIES)},
    )
    data_cache_dir: str | None = field(
        default=None, metadata={"help": "Where tokenized data is kept. Default: beside the caches of `datasets`."}
    )
    preprocessing_num_workers: int = field(
        default=0, metadata={"help": "Processes that tokenize; 0 chooses by cores and number of samples."}
    )

    def __post_init__(self) -> None:
        for argument in ("train_size", "eval_size"):
            check_size(argument, getattr(self, argument))
        if self.preprocessing_num_workers < 0:
            raise UserError(f"--preprocessing_num_workers {self.preprocessing_num_workers} is negative; 0 chooses one")
        most = max(MOST_WORKERS, WORKERS_OF_A_CORE * (os.cpu_count() or 1))
        if self.preprocessing_num_workers > most:
            raise UserError(
                f"--preprocessing_num_workers {self.preprocessing_num_workers} is more processes than this machine can "
                f"run; give at most {most}, or 0, which chooses by cores and number of samples"
            )
