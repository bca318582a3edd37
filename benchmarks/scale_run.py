"""A run of benchmarks/scale.py, as the command line names it."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.scale_inputs import ATTENTIONS, SHAPES
from qat.errors import UserError

MXFP4 = ("--quant_scheme", "MXFP4")
STAGES = {"BF16": (), "MXFP4": MXFP4, "distilled": (*MXFP4, "--distill", "True")}


@dataclass(frozen=True)
class Run:
    """One run, as --runs names it.

    Attributes:
        name: the words.
        tokens: of a row. samples: in a row. rows: of a batch on a GPU.
        resumes, exports: whether a checkpoint is written and resumed from; whether the model is saved and packed.
    """

    name: str
    gpus: int
    stage: str
    tokens: int
    shape: str
    attention: str = "sdpa"
    rows: int = 2
    samples: int = 1
    resumes: bool = False
    exports: bool = False

    @classmethod
    def parse(cls, name: str, shape: str, tokens: int = 2048) -> Run:
        """A run by its words, with `shape` and `tokens` where they name none.

        Raises:
            UserError: a word is unknown.
        """
        gpus, _, rest = name.partition(":")
        stage, *words = rest.split(":")
        if not gpus.isdecimal() or int(gpus) < 1 or stage not in STAGES:
            raise UserError(f"--runs {name!r}: begin with the number of GPUs and one of {', '.join(STAGES)}: 2:BF16")
        values: dict = {"tokens": tokens, "shape": shape}
        for word in words:
            values |= cls._value_of(word, name)
        if values["tokens"] < 16 * values.get("samples", 1):
            raise UserError(f"--runs {name!r}: samples are shorter than 16 tokens; give fewer, or more tokens a row")
        return cls(name, int(gpus), stage, **values)

    @staticmethod
    def _value_of(word: str, name: str) -> dict:
        if word.isdecimal():
            return {"tokens": int(word)}
        if word in SHAPES:
            return {"shape": word}
        if word in ATTENTIONS:
            return {"attention": word}
        for what in ("rows", "samples"):
            if word.startswith(what) and word.removeprefix(what).isdecimal() and int(word.removeprefix(what)):
                return {what: int(word.removeprefix(what))}
        if word in ("resume", "export"):
            return {f"{word}s": True}
        raise UserError(
            f"--runs {name!r}: {word!r} is unknown; choose from a number of tokens, {', '.join(SHAPES)}, "
            f"{', '.join(ATTENTIONS)}, rowsN, samplesN, resume, export"
        )
