"""Arguments of main.py: which model to start from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from qat.errors import UserError


@dataclass
class ModelArguments:
    """Which model to start from."""

    model_name_or_path: str = field(
        default="meta-llama/Llama-3.1-8B",
        metadata={"help": "Hub id or local folder of a causal language model; a QAT folder brings its scheme along."},
    )
    gguf_file: str | None = field(
        default=None,
        metadata={"help": "Name of a GGUF file inside the local folder model_name_or_path; loaded dequantized."},
    )

    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run Python code that comes with a model or tokenizer; it can do all that you can."},
    )

    def __post_init__(self) -> None:
        if self.gguf_file is not None and not Path(self.model_name_or_path, self.gguf_file).is_file():
            raise UserError(
                f"--gguf_file {self.gguf_file!r} is not in --model_name_or_path {self.model_name_or_path!r}; "
                "name a .gguf file that lies in that local folder"
            )
