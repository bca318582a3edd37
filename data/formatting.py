"""From a conversation to token ids and labels: only what the assistant says is learned, its end of turn included.

A tokenizer with a chat template formats as it will at inference. The labelled span of an assistant turn is found by
rendering the conversation up to that turn and through it: where both are beginnings of the whole text, the span between
them is exact. A tokenizer without a template joins turns by newlines, each answer closed by the end-of-sequence token.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100  # the label that torch's cross-entropy skips
_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}


def encode_conversation(sample: dict, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list[int]]:
    """Token ids and labels of one conversation, cut at `max_length` tokens.

    Args:
        sample: {"conversations": [{"from": role, "value": text}, ...]}, optionally {"system": text}.

    Returns:
        `input_ids` and `labels`, equally long; labels are IGNORE_INDEX outside of answers.

    Raises:
        ValueError: an unknown role, or a chat template that renders turns differently depending on what follows.
    """
    messages = _to_messages(sample)
    pieces = _render_chat(messages, tokenizer) if tokenizer.chat_template else _render_plain(messages, tokenizer)
    input_ids, labels = _tokenize(pieces, tokenizer)
    return {"input_ids": input_ids[:max_length], "labels": labels[:max_length]}


def _to_messages(sample: dict) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": sample["system"]}] if sample.get("system") else []
    for turn in sample["conversations"]:
        role = _ROLES.get(str(turn["from"]).lower())
        if role is None:
            raise ValueError(f"conversation turn from {turn['from']!r}; known roles are User, Assistant and System")
        messages.append({"role": role, "content": turn["value"]})
    return messages


def _render_plain(messages, tokenizer) -> list[tuple[str, bool]]:
    """Text pieces and whether each is an answer."""
    pieces = [(tokenizer.bos_token, False)] if tokenizer.bos_token else []
    for message in messages:
        is_answer = message["role"] == "assistant"
        pieces.append((message["content"] + (tokenizer.eos_token or "") * is_answer, is_answer))
        pieces.append(("\n", False))
    return pieces


def _render_chat(messages, tokenizer) -> list[tuple[str, bool]]:
    def render(count: int, add_generation_prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(
            messages[:count], tokenize=False, add_generation_prompt=add_generation_prompt
        )

    text, pieces, done = render(len(messages)), [], 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, through = render(index, add_generation_prompt=True), render(index + 1)
        if not (text.startswith(before) and text.startswith(through) and done <= len(before) <= len(through)):
            raise ValueError(
                "the tokenizer's chat template renders a turn differently depending on what follows it, so the tokens "
                "of the answers cannot be told exactly; use a template without this, or tokenizer.chat_template=None"
            )
        end = len(through.rstrip())  # white space after the end-of-turn token separates turns, it is not answered
        pieces += [(text[done : len(before)], False), (text[len(before) : end], True)]
        done = end
    pieces.append((text[done:], False))
    return pieces


def _tokenize(pieces: list[tuple[str, bool]], tokenizer) -> tuple[list[int], list[int]]:
    """Tokenize the joined text as one string (as inference would) and label the tokens that lie in answers."""
    encoded = tokenizer("".join(text for text, _ in pieces), add_special_tokens=False, return_offsets_mapping=True)
    spans, position = [], 0
    for text, is_answer in pieces:
        if is_answer:
            spans.append((position, position + len(text)))
        position += len(text)
    labels, current = [], 0
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        while current < len(spans) and start >= spans[current][1]:
            current += 1
        inside = current < len(spans) and start >= spans[current][0] and end <= spans[current][1]
        labels.append(token if inside and end > start else IGNORE_INDEX)
    return encoded["input_ids"], labels
