"""Load a model's tokenizer, for training and for the preview alike."""

from __future__ import annotations

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qat.errors import UserError
from qat.files.model_folder import check_file_name, check_model_folder


def load_tokenizer(
    name: str,
    model_max_length: int | None = None,
    argument: str = "--model_name_or_path",
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
    cache_dir: str | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer in a local folder or of a hub id, with a padding token.

    Args:
        name: folder or hub id.
        model_max_length: where it truncates; None for its own length.
        argument: by which argument the user named it, for messages.
        gguf_file: take it from this file of the local folder.
        trust_remote_code: run Python code that comes with it.
        cache_dir: of downloads.

    Raises:
        UserError: there is no such folder or model, or no tokenizer that can be read in it.
    """
    check_model_folder(name, argument)
    options: dict = {} if model_max_length is None else {"model_max_length": model_max_length}
    if gguf_file is not None:
        check_file_name(name, argument, gguf_file, "--gguf_file")
        options["gguf_file"] = gguf_file
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, cache_dir=cache_dir, trust_remote_code=trust_remote_code, **options
        )
    except Exception as error:  # the tokenizers library raises bare ones
        raise UserError(_problem(error, name, argument)) from error
    if len(tokenizer) == 0:
        raise UserError(f"{argument} {name!r} has an empty tokenizer; copy the tokenizer's files there")
    template = tokenizer.chat_template
    if not all(
        isinstance(text, str) for text in (template.values() if isinstance(template, dict) else [template or ""])
    ):
        raise UserError(f"{argument} {name!r} has a chat template that is no text; correct its tokenizer_config.json")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _problem(error: Exception, name: str, argument: str) -> str:
    if "trust_remote_code" in str(error):
        return (
            f"the tokenizer of {argument} {name!r} needs Python code that comes with it, which is not run without "
            "--trust_remote_code; it can do all that you can, so read it first"
        )
    text = " ".join(str(error).split())
    short = text if len(text) <= 200 else f"{text[:197]}..."
    return (
        f"{argument} {name!r} has no tokenizer that can be read ({type(error).__name__}: {short}); it needs the files "
        "of one (tokenizer.json, tokenizer_config.json) and a sound config.json"
    )
