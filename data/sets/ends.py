"""Which tokens end the answers of a set: a model stops at a token only if it has learned it there."""

from __future__ import annotations

from collections import Counter

import datasets
from transformers import PreTrainedTokenizerBase

from ..conversations.formatting import IGNORE_INDEX
from .packing import PackedDataset

_LOOKED_AT = 256  # samples


def ends_of_answers(data_module: dict, max_length: int) -> Counter[int]:
    """Ids of the last learned tokens of the first samples, by how often they occur; cut samples do not count.

    Args:
        data_module: `eval_dataset`, or without one `train_dataset`; of a stream without an evaluation set nothing is
            known beforehand.
    """
    samples = data_module["eval_dataset"]
    if samples is None:
        samples = data_module["train_dataset"]
        samples = samples.samples if isinstance(samples, PackedDataset) else samples
    ends: Counter[int] = Counter()
    if isinstance(samples, datasets.IterableDataset):
        return ends
    for sample in samples.select(range(min(_LOOKED_AT, len(samples)))):
        labels = [label for label in sample["labels"] if label != IGNORE_INDEX]
        if len(sample["labels"]) < max_length and labels:
            ends[labels[-1]] += 1
    return ends


def is_special(token: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a token is one of those added to the vocabulary, of which text has none."""
    return token in tokenizer.all_special_ids or token in tokenizer.get_added_vocab().values()


def describe_plain_end(data_module: dict, max_length: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """A warning if most answers end with a token that does not end generation; "" otherwise."""
    ends = ends_of_answers(data_module, max_length)
    plain = Counter({token: count for token, count in ends.items() if not is_special(token, tokenizer)})
    if 2 * plain.total() <= ends.total():
        return ""
    [(token, _)] = plain.most_common(1)
    eos = tokenizer.eos_token
    return (
        f"answers end with no special token ({tokenizer.decode([token])!r} is the last that is learned), so the model "
        f"does not learn where to stop. Give a template that ends assistant turns with {eos or 'a special token'!r}: "
        "--chat_template FILE.jinja"
    )
