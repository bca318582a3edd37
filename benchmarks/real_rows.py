"""The rows of the table of real models: how each is quantized, and the arguments of main.py that train it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from benchmarks.accuracy_rows import Row, of_ours, plain, settings_of

SEEDS = (3, 4)  # beside 2, for the main row


@dataclass(frozen=True)
class RealRow:
    """A line of the table.

    Attributes:
        title: in the table.
        quantized: of a row without training, how; None for BF16 and for a trained row.
        recipe: of a trained row, recipes/NAME.yaml.
        flags: of main.py beside the recipe; a tuple for an argument that takes several words.
        steps: of training.
        learning_rate: None for that of the command line, "recipe" for that of the recipe.
        seed: of training.
        iterations: of AutoRound, on the model that `quantized` has smoothed; 0 for another row.
    """

    title: str
    quantized: Row | None = None
    recipe: str | None = None
    flags: dict[str, str | tuple[str, ...]] = field(default_factory=dict)
    steps: int = 0
    learning_rate: str | None = None
    seed: int = 2
    iterations: int = 0


def _without_training(title: str, scheme: str, **settings) -> RealRow:
    return RealRow(title, Row(title, scheme, **settings))


_SMOOTHED = plain("").smooth_alpha
MAIN = "mxfp4-150"
ROWS: dict[str, RealRow] = {
    "bf16": RealRow("BF16"),
    "mxfp4-rtn": _without_training("MXFP4 RTN (EVEN)", "MXFP4", weights="even", inputs="even"),
    "mxfp4-rtn-smoothed": _without_training(
        "MXFP4 RTN (EVEN), smoothed", "MXFP4", weights="even", inputs="even", smooth_alpha=_SMOOTHED
    ),
    "mxfp4-ptq": RealRow("MXFP4 PTQ, prepared as in our recipe", of_ours("", distill=False, steps=0)),
    "mxfp4-autoround": RealRow(
        "MXFP4, AutoRound, 200 iterations, smoothed",
        Row("", "MXFP4", weights="even", inputs="even", smooth_alpha=_SMOOTHED), iterations=200,
    ),
    "mxfp4-reference": RealRow(
        "MXFP4, the reference's recipe, 150 steps", recipe="mxfp4-reference", steps=150, learning_rate="recipe"
    ),
    MAIN: RealRow("MXFP4, our recipe, 150 steps", recipe="mxfp4", steps=150),
    "mxfp4-600": RealRow("MXFP4, our recipe, 600 steps", recipe="mxfp4", steps=600),
    **{
        f"mxfp4-plain-{steps}": RealRow(
            f"MXFP4, our recipe without transforms, smoothed {_SMOOTHED}, {steps} steps", recipe="mxfp4", steps=steps,
            flags={"input_transform": "none", "smooth_alpha": str(_SMOOTHED)},
        )
        for steps in (150, 600)
    },
    **{
        f"mxfp4-lr-{rate}": RealRow(
            f"MXFP4, our recipe, 150 steps, learning rate {rate}", recipe="mxfp4", steps=150,
            flags={"learning_rate": rate},
        )
        for rate in ("2e-5", "1e-4")
    },
    "mxfp4fp8-ptq": _without_training("MXFP4FP8 PTQ, prepared", "MXFP4FP8", **settings_of("MXFP4FP8")),
    "mxfp4fp8": RealRow(
        "MXFP4FP8, our recipe, 150 steps", recipe="int4", steps=150,
        flags={"quant_scheme": "MXFP4FP8", "smooth_alpha": str(_SMOOTHED)},
    ),
    "mxfp8-ptq": _without_training("MXFP8 PTQ, prepared", "MXFP8", **settings_of("MXFP8")),
    "mxfp8": RealRow("MXFP8, our recipe, 150 steps", recipe="mxfp8", steps=150),
    "int4_g32-ptq": _without_training("INT4_G32 PTQ, searched weights", "INT4_G32", **settings_of("INT4_G32")),
    "int4_g32": RealRow(
        "INT4_G32, our recipe, 150 steps", recipe="int4", steps=150, flags={"quant_scheme": "INT4_G32"}
    ),
}  # fmt: skip
ALL = [*ROWS, *(f"{MAIN}@{seed}" for seed in SEEDS)]


def row_of(key: str) -> RealRow:
    """The row of a key of ROWS, with "@SEED" behind it for another seed."""
    name, _, seed = key.partition("@")
    return replace(ROWS[name], seed=int(seed), title=f"{ROWS[name].title}, seed {seed}") if seed else ROWS[name]
