"""The rows of the table of real models: how each is quantized, and the arguments of main.py that train it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from benchmarks.accuracy_rows import Row, of_ours, plain, settings_of

SEEDS = (3, 4)  # beside 2, for the main row


_Flags = dict[str, str | tuple[str, ...]]


@dataclass(frozen=True)
class RealRow:
    """A line of the table.

    Attributes:
        title: in the table.
        quantized: of a row without training, how; None for BF16 and for a trained row.
        recipe: of a trained row, recipes/NAME.yaml.
        flags: of main.py beside the recipe; a tuple for an argument that takes several words.
        steps: of training.
        learning_rate: of training; None for that of the command line, "recipe" for that of the recipe.
        seed: of training.
        iterations: of AutoRound, on the model that `quantized` has smoothed; 0 for another row.
    """

    title: str
    quantized: Row | None = None
    recipe: str | None = None
    flags: _Flags = field(default_factory=dict)
    steps: int = 0
    learning_rate: str | None = None
    seed: int = 2
    iterations: int = 0


def _without_training(title: str, scheme: str, **settings) -> RealRow:
    return RealRow(title, Row(title, scheme, **settings))


_SMOOTHED = plain("").smooth_alpha
_SAMPLES: _Flags = {
    "distill_generic": "teacher:500", "distill_generic_share": "0.5", "distill_ce_weight": "0.1",
}  # fmt: skip
_NO_SAMPLES: _Flags = {"distill_generic": "none"}  # which the recipe has
_GPTQ: _Flags = {"weight_init": "gptq"}
_MXFP4FP8: tuple[tuple[str, str, _Flags], ...] = (
    ("", "", {}),
    ("-hadamard", ", Hadamard", {"input_transform": "hadamard"}),
    ("-gptq", ", Hadamard, GPTQ", {"input_transform": "hadamard", **_GPTQ}),
    ("-smoothed", f", smoothed {_SMOOTHED}", {"smooth_alpha": str(_SMOOTHED)}),
)
MAIN = "mxfp4-150"
ROWS: dict[str, RealRow] = {
    "bf16": RealRow("BF16"),
    "mxfp4-rtn": _without_training("MXFP4 RTN (EVEN)", "MXFP4", weights="even", inputs="even"),
    "mxfp4-rtn-smoothed": _without_training(
        "MXFP4 RTN (EVEN), smoothed", "MXFP4", weights="even", inputs="even", smooth_alpha=_SMOOTHED
    ),
    "mxfp4-ptq": RealRow("MXFP4 PTQ, prepared as in our recipe", of_ours("", distill=False, steps=0)),
    "mxfp4-gptq-ptq": RealRow(
        "MXFP4 PTQ, prepared as in our recipe, GPTQ", of_ours("", distill=False, steps=0, weight_init="gptq")
    ),
    "mxfp4-autoround": RealRow(
        "MXFP4, AutoRound, 200 iterations, smoothed",
        Row("", "MXFP4", weights="even", inputs="even", smooth_alpha=_SMOOTHED), iterations=200,
    ),
    "mxfp4-reference": RealRow(
        "MXFP4, the reference's recipe, 150 steps", recipe="mxfp4-reference", steps=150, learning_rate="recipe"
    ),
    **{
        f"mxfp4-{steps}": RealRow(
            f"MXFP4, our recipe, {steps} steps", recipe="mxfp4", steps=steps, flags=_NO_SAMPLES
        )
        for steps in (150, 300, 600)
    },
    **{
        f"mxfp4-plain-{steps}": RealRow(
            f"MXFP4, our recipe without transforms, smoothed {_SMOOTHED}, {steps} steps", recipe="mxfp4", steps=steps,
            flags={"input_transform": "none", "smooth_alpha": str(_SMOOTHED), **_NO_SAMPLES},
        )
        for steps in (150, 600)
    },
    **{
        f"mxfp4-samples-{steps}": RealRow(
            f"MXFP4, our recipe, half of the rows samples of the teacher, {steps} steps", recipe="mxfp4", steps=steps,
            flags=_SAMPLES,
        )
        for steps in (150, 600)
    },
    **{
        f"mxfp4-gptq-{steps}": RealRow(
            f"MXFP4, our recipe, GPTQ, {steps} steps", recipe="mxfp4", steps=steps, flags=_NO_SAMPLES | _GPTQ
        )
        for steps in (150, 600)
    },
    **{
        f"mxfp4-gptq-samples-{steps}": RealRow(
            f"MXFP4, our recipe, GPTQ, half of the rows samples of the teacher, {steps} steps", recipe="mxfp4",
            steps=steps, flags=_SAMPLES | _GPTQ,
        )
        for steps in (150, 600)
    },
    "mxfp4fp8-ptq": _without_training("MXFP4FP8 PTQ, searched weights", "MXFP4FP8", weights="search", inputs=None),
    "mxfp4fp8-hadamard-ptq": _without_training(
        "MXFP4FP8 PTQ, searched weights, Hadamard", "MXFP4FP8", weights="search", inputs=None,
        prepare_options={"input_transforms": "hadamard"},
    ),
    "mxfp4fp8-gptq-ptq": _without_training(
        "MXFP4FP8 PTQ, searched weights, Hadamard, GPTQ", "MXFP4FP8", weights="search", inputs=None,
        weight_init="gptq", prepare_options={"input_transforms": "hadamard"},
    ),
    "mxfp4fp8-smoothed-ptq": _without_training(
        f"MXFP4FP8 PTQ, searched weights, smoothed {_SMOOTHED}", "MXFP4FP8", **settings_of("MXFP4FP8")
    ),
    **{
        f"mxfp4fp8{name}{'' if steps == 150 else f'-{steps}'}": RealRow(
            f"MXFP4FP8, our recipe, {steps} steps{title}", recipe="int4", steps=steps,
            flags={**flags, "quant_scheme": "MXFP4FP8"},
        )
        for name, title, flags in _MXFP4FP8
        for steps in (150, 600)
    },
    "mxfp8-ptq": _without_training("MXFP8 PTQ, prepared", "MXFP8", **settings_of("MXFP8")),
    "mxfp8": RealRow("MXFP8, our recipe, 150 steps", recipe="mxfp8", steps=150),
    "int4_g32-ptq": _without_training("INT4_G32 PTQ, searched weights", "INT4_G32", **settings_of("INT4_G32")),
    "int4_g32": RealRow(
        "INT4_G32, our recipe, 150 steps", recipe="int4", steps=150, flags={"quant_scheme": "INT4_G32"}
    ),
}  # fmt: skip
ALL = [*ROWS, *(f"{MAIN}@{seed}" for seed in SEEDS)]


def row_of(key: str) -> RealRow:
    """The row of a key: a name of ROWS; of a trained one with ~RATE, a learning rate, and @SEED behind it.

    Raises:
        KeyError: there is no such row.
    """
    match = re.fullmatch(r"([^~@]+)(?:~([0-9.e-]+))?(?:@([0-9]+))?", key)
    name, rate, seed = match.groups() if match else (key, None, None)
    row = ROWS[name]
    if (rate or seed) and row.recipe is None or rate and not _is_rate(rate):
        raise KeyError(key)
    if rate:
        row = replace(row, title=f"{row.title}, learning rate {rate}", learning_rate=rate)
    return replace(row, title=f"{row.title}, seed {seed}", seed=int(seed)) if seed else row


def settings_text(key: str) -> str:
    """What a row is, apart from titles: two rows with the same text have the same figures under the same arguments."""
    row = row_of(key)
    quantized = None if row.quantized is None else replace(row.quantized, title="")
    return repr(replace(row, title="", quantized=quantized))


def is_row(key: str) -> bool:
    """Whether there is a row of a key."""
    try:
        return row_of(key) is not None
    except KeyError:
        return False


def _is_rate(text: str) -> bool:
    try:
        return 0 < float(text) < 1
    except ValueError:
        return False
