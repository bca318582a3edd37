"""What samples of a teacher begin with, and what a chat template puts between the turns of a conversation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qat.errors import UserError

_REMEDY = "give teacher:N, which samples plain text, a FILE, or --distill_generic none"
_WORDS = ("FirstQuestionOfThree", "AnswerOfThree", "LastQuestionOfThree")  # stand in for what is said


@dataclass(frozen=True)
class Opening:
    """How sampled sequences begin and continue.

    Attributes:
        begin: ids of the first tokens.
        turns: of a conversation, by whose turn it is: the user's, the assistant's, and again. The ids that a template
            puts between a turn and the next one: the first of them ends the turn when it is sampled, the others are
            put behind it. Empty for plain text.
    """

    begin: tuple[int, ...]
    turns: tuple[tuple[int, ...], ...] = ()

    @property
    def kind(self) -> str:
        """The word before the number in --distill_generic."""
        return "chat" if self.turns else "teacher"

    def name(self, count: int) -> str:
        """What --distill_generic says for `count` such sequences."""
        return f"{self.kind}:{count}"

    def given(self, rows: int, device: torch.device) -> Given:
        """What goes between the turns of a batch that begins."""
        return Given(self, rows, device)


class Given:
    """What a template puts between turns, while a batch is sampled.

    Args:
        opening: see there.
        rows: of the batch.
        device: of its tokens.
    """

    def __init__(self, opening: Opening, rows: int, device: torch.device) -> None:
        longest = max(map(len, opening.turns), default=0)
        # Of each turn, the ids behind its end, filled up with -1, of which the last column is always one.
        behind = [[*turn[1:], *[-1] * (longest + 1 - len(turn))] for turn in opening.turns]
        self.behind = torch.tensor(behind, device=device)
        self.ends = torch.tensor([turn[0] for turn in opening.turns], device=device)
        self.turn = torch.zeros(rows, dtype=torch.int64, device=device)  # whose it is
        self.place = torch.full((rows,), longest - 1, device=device)  # in `behind` of the turn before

    def instead_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """The next tokens, int64 [rows, 1], from those that were sampled."""
        if not len(self.ends):
            return tokens
        sampled, count = tokens[:, 0], len(self.ends)
        found = self.behind[(self.turn - 1) % count, self.place]
        is_given = found >= 0
        ends = ~is_given & (sampled == self.ends[self.turn])
        self.place = torch.where(ends, 0, torch.where(is_given, self.place + 1, self.place))
        self.turn = torch.where(ends, (self.turn + 1) % count, self.turn)
        return torch.where(is_given, found, sampled)[:, None]


def of_text(tokenizer: PreTrainedTokenizerBase, teacher: PreTrainedModel) -> Opening:
    """Plain text begins with the tokenizer's BOS, else the model's, else EOS, which ends the text before.

    Raises:
        UserError: there is none of them.
    """
    config = teacher.config.get_text_config()
    for token in (tokenizer.bos_token_id, config.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return Opening((token,))
    raise UserError(
        "--distill_generic teacher:N begins each text with BOS or EOS, and the tokenizer has neither; give a FILE of "
        "text, or --distill_generic none"
    )


def of_conversations(tokenizer: PreTrainedTokenizerBase) -> Opening:
    """Conversations begin and continue as the tokenizer's chat template writes them.

    Raises:
        UserError: there is no template, it cannot write two turns, or it ends a turn with no special token.
    """
    if not tokenizer.chat_template:
        raise UserError(f"--distill_generic chat:N needs a chat template, and the tokenizer has none; {_REMEDY}")
    said = [{"role": role, "content": word} for role, word in zip(("user", "assistant", "user"), _WORDS, strict=True)]
    try:
        asked = tokenizer.apply_chat_template(said[:1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(said, tokenize=False)
        begin, to_assistant = str(asked).split(_WORDS[0])
        _, after = str(whole).split(_WORDS[1])
        to_user, _ = after.split(_WORDS[2])
        _, to_end = str(tokenizer.apply_chat_template(said[:2], tokenize=False)).split(_WORDS[1])
    except Exception as error:  # whatever a template raises
        raise UserError(
            f"--distill_generic chat:N: the chat template cannot write a dialogue ({error}); {_REMEDY}"
        ) from error
    texts = (begin, to_assistant, to_user, to_end)
    pieces = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    if not pieces[0]:
        raise UserError(
            "--distill_generic chat:N: the chat template writes nothing before a question, so there is nothing to "
            f"sample from; {_REMEDY}"
        )
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    for piece, text in zip(pieces[1:3], texts[1:3], strict=True):
        if not piece or piece[0] not in special:
            raise UserError(
                f"--distill_generic chat:N: the chat template ends a turn with {text!r}, which begins with no special "
                f"token, so a sampled end is not recognized; {_REMEDY}"
            )
    if pieces[2][0] != (pieces[3] or (None,))[0]:
        raise UserError(
            f"--distill_generic chat:N: the chat template ends the last answer with {to_end!r} and others with "
            f"{to_user!r}, so a sampled end is not recognized; {_REMEDY}"
        )
    return Opening(pieces[0], tuple(pieces[1:3]))
