"""Chat templates of several families, and tokenizers with their special tokens, for tests of the data."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}"
    "{% set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.first %}{% set text = bos_token + text %}{% endif %}{{ text }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN = (
    "{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\nYou are Q.<|im_end|>\\n' }}{%- endif %}"
    "{%- for m in messages %}{%- if m.role == 'user' or m.role == 'assistant' or not loop.first %}"
    "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# Qwen3 leaves the thoughts of earlier turns out, so a turn changes when another follows.
FORGETFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}{{ m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
END_OF_TURN = {"smollm2": "<|im_end|>", "llama3": "<|eot_id|>", "qwen": "<|im_end|>"}
TEMPLATES = {"smollm2": SMOLLM2, "llama3": LLAMA3, "qwen": QWEN}
_CHATML, _LLAMA3 = ["<|im_start|>", "<|im_end|>"], ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
_SPECIAL = ["<|begin_of_text|>", *_CHATML, *_LLAMA3]
_TEXT = ["What is two plus two?\n\nIt is four.\n", "    def f(x):\n        return x\n\n", "assistant\n\nuser\nsystem"]


@cache
def _backend() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=_SPECIAL,
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(_TEXT * 20, trainer)
    return tokenizer.to_str()


def make_chat_tokenizer(template: str, max_length: int = 4096) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges (line breaks and indents among them), at most 400 tokens."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend()), bos_token="<|begin_of_text|>", eos_token="<|im_end|>",
        model_max_length=max_length, additional_special_tokens=_SPECIAL,
    )  # fmt: skip
    tokenizer.chat_template = template
    return tokenizer


# ---- Templates with tools and thoughts, in tests/data/templates ----

# name: begin of sequence, end of sequence, other special tokens
REAL = {
    "qwen3": ("<|endoftext|>", "<|im_end|>", ["<|im_start|>"]),
    "llama31": ("<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"]),
    "mistral_v3": ("<s>", "</s>", ["[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"]),
    "gpt_oss": ("<|startoftext|>", "<|return|>", ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>"]),
    "r1_distill": ("<|begin_of_sentence|>", "<|end_of_sentence|>", ["<|User|>", "<|Assistant|>"]),
}
TOOL = {
    "type": "function",
    "function": {
        "name": "clock", "description": "Tells the time.",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string", "description": "Where."}}},
    },
}  # fmt: skip


def make_real_tokenizer(name: str, max_length: int = 4096) -> PreTrainedTokenizerFast:
    """The tokenizer above with the special tokens and the template of a family of REAL."""
    bos, eos, special = REAL[name]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend()), bos_token=bos, eos_token=eos, model_max_length=max_length,
        additional_special_tokens=special,
    )  # fmt: skip
    tokenizer.chat_template = (Path(__file__).parent / "data" / "templates" / f"{name}.jinja").read_text()
    return tokenizer


def user(text: str = "q") -> dict:
    """A question."""
    return {"role": "user", "content": text}


def assistant(text: str | None = "a", **carried) -> dict:
    """An answer, and what it carries."""
    return {"role": "assistant", "content": text, **carried}


def call(name: str = "clock", **arguments) -> dict:
    """A call of a tool, as OpenAI writes it."""
    return {"type": "function", "id": "call12345", "function": {"name": name, "arguments": arguments}}


def tool(text: str = "12:00") -> dict:
    """The result of that call."""
    return {"role": "tool", "content": text, "tool_call_id": "call12345"}


def learned_texts(encoded, tokenizer) -> list[str]:
    """The runs of labelled tokens, decoded."""
    runs, inside = [], False
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        if label != -100:
            assert label == token
            runs = runs if inside else [*runs, []]
            runs[-1].append(int(token))
        inside = label != -100
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]
