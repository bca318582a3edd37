"""The rows of the table of real models: how each is quantized, and the arguments of main.py that train it.

A row without training has a name of UNTRAINED. One that is trained is named by what it is: a name of TRAINED, its
steps, names of VARIANTS, a learning rate and a seed, as in mxfp4-600+gptq+chat~3e-6@4.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from benchmarks.accuracy_rows import Row, of_ours, plain, settings_of

_RECIPES = Path(__file__).resolve().parent.parent / "recipes"
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
_HADAMARD: dict = {"weights": "search", "inputs": None, "prepare_options": {"input_transforms": "hadamard"}}
_ALL_TRANSFORMED: dict = {"input_transforms": {"*": "hadamard"}}
UNTRAINED: dict[str, RealRow] = {
    "bf16": RealRow("BF16"),
    "mxfp4-rtn": _without_training("MXFP4 RTN (EVEN)", "MXFP4", weights="even", inputs="even"),
    "mxfp4-rtn-smoothed": _without_training(
        "MXFP4 RTN (EVEN), smoothed", "MXFP4", weights="even", inputs="even", smooth_alpha=_SMOOTHED
    ),
    "mxfp4-ptq": RealRow("MXFP4 PTQ, prepared as in our recipe", of_ours("", distill=False, steps=0)),
    "mxfp4-gptq-ptq": RealRow(
        "MXFP4 PTQ, prepared as in our recipe, GPTQ", of_ours("", distill=False, steps=0, weight_init="gptq")
    ),
    "mxfp4-gptq512-ptq": RealRow(
        "MXFP4 PTQ, prepared as in our recipe, GPTQ with 512 rows",
        of_ours("", distill=False, steps=0, weight_init="gptq", weight_init_samples=512),
    ),
    "mxfp4-all-gptq-ptq": RealRow(
        "MXFP4 PTQ, prepared as in our recipe, all inputs transformed, GPTQ",
        of_ours("", distill=False, steps=0, weight_init="gptq", prepare_options=_ALL_TRANSFORMED),
    ),
    "mxfp4-all-gptq512-ptq": RealRow(
        "MXFP4 PTQ, prepared as in our recipe, all inputs transformed, GPTQ with 512 rows",
        of_ours(
            "", distill=False, steps=0, weight_init="gptq", weight_init_samples=512,
            prepare_options=_ALL_TRANSFORMED,
        ),
    ),
    "mxfp4-autoround": RealRow(
        "MXFP4, AutoRound with its extension, 200 iterations, smoothed",
        Row("", "MXFP4", weights="even", inputs="even", smooth_alpha=_SMOOTHED), iterations=200,
    ),
    "mxfp4fp8-ptq": _without_training("MXFP4FP8 PTQ, searched weights", "MXFP4FP8", weights="search", inputs=None),
    "mxfp4fp8-smoothed-ptq": _without_training(
        f"MXFP4FP8 PTQ, searched weights, smoothed {_SMOOTHED}", "MXFP4FP8", **settings_of("MXFP4FP8")
    ),
    "mxfp4fp8-hadamard-ptq": _without_training("MXFP4FP8 PTQ, searched weights, Hadamard", "MXFP4FP8", **_HADAMARD),
    "mxfp4fp8-auto-ptq": _without_training(
        "MXFP4FP8 PTQ, searched weights, Hadamard, smoothed auto", "MXFP4FP8", smooth_alpha="auto", **_HADAMARD
    ),
    "mxfp4fp8-gptq-ptq": _without_training(
        "MXFP4FP8 PTQ, searched weights, Hadamard, GPTQ", "MXFP4FP8", weight_init="gptq", **_HADAMARD
    ),
    "mxfp4fp8-gptq512-ptq": _without_training(
        "MXFP4FP8 PTQ, searched weights, Hadamard, GPTQ with 512 rows", "MXFP4FP8", weight_init="gptq",
        weight_init_samples=512, **_HADAMARD,
    ),
    "mxfp8-ptq": _without_training("MXFP8 PTQ, prepared", "MXFP8", **settings_of("MXFP8")),
    "int4_g32-ptq": _without_training("INT4_G32 PTQ, searched weights", "INT4_G32", **settings_of("INT4_G32")),
}  # fmt: skip

_NO_SAMPLES: _Flags = {"distill_generic": "none"}  # which recipes/mxfp4.yaml has
TRAINED: dict[str, RealRow] = {
    "mxfp4-reference": RealRow("MXFP4, the reference's recipe", recipe="mxfp4-reference", learning_rate="recipe"),
    "mxfp4": RealRow("MXFP4, our recipe", recipe="mxfp4", flags=_NO_SAMPLES),
    "mxfp4fp8": RealRow("MXFP4FP8, our recipe", recipe="int4", flags={"quant_scheme": "MXFP4FP8"}),
    "mxfp8": RealRow("MXFP8, our recipe", recipe="mxfp8"),
    "int4_g32": RealRow("INT4_G32, our recipe", recipe="int4", flags={"quant_scheme": "INT4_G32"}),
}
VARIANTS: dict[str, tuple[str, _Flags]] = {
    "samples": (
        "half of the rows 500 texts of the teacher",
        {"distill_generic": "teacher:500", "distill_generic_share": "0.5"},
    ),
    "samples2000": (
        "half of the rows 2,000 texts of the teacher",
        {"distill_generic": "teacher:2000", "distill_generic_share": "0.5"},
    ),
    "chat": (
        "half of the rows 1,000 conversations of the teacher",
        {"distill_generic": "chat:1000", "distill_generic_share": "0.5"},
    ),
    "kl": ("no cross-entropy", {"distill_ce_weight": "0"}),
    "half-ce": ("10 % cross-entropy", {"distill_ce_weight": "0.1"}),
    "gptq": ("GPTQ", {"weight_init": "gptq"}),
    "gptq512": ("GPTQ with 512 rows", {"weight_init": "gptq", "weight_init_samples": "512"}),
    "hadamard": ("Hadamard", {"input_transform": "hadamard"}),
    "all": ("all inputs transformed", {"input_transform_layers": "*"}),
    "auto": ("smoothed auto", {"smooth_alpha": "auto"}),
    "smoothed": (f"smoothed {_SMOOTHED}", {"smooth_alpha": str(_SMOOTHED)}),
    "plain": (f"no transforms, smoothed {_SMOOTHED}", {"input_transform": "none", "smooth_alpha": str(_SMOOTHED)}),
    "x4": ("4 times the batch", {"gradient_accumulation_steps": "4"}),
}  # fmt: skip
SEEDS = (3, 4)  # beside 2, for the main row
MAIN = "mxfp4-150"
_UNRESUMED = [key for key, row in UNTRAINED.items() if row.iterations]  # last, so that others do not wait for it
ALL = [
    *(key for key in UNTRAINED if key not in _UNRESUMED), "mxfp4-reference-150", MAIN, "mxfp4-600", "mxfp4-150+gptq",
    "mxfp4-600+gptq", "mxfp4-150+samples", "mxfp4-600+samples", "mxfp4fp8-150+hadamard", "mxfp4fp8-150+hadamard+gptq",
    "mxfp8-150", "int4_g32-150", *(f"{MAIN}@{seed}" for seed in SEEDS), *_UNRESUMED,
]  # fmt: skip


def row_of(key: str) -> RealRow:
    """The row of a key, see above.

    Raises:
        KeyError: there is no such row.
    """
    if key in UNTRAINED:
        return UNTRAINED[key]
    match = re.fullmatch(r"([a-z0-9_-]+)-([1-9]\d*)((?:\+[a-z0-9-]+)*)(?:~([0-9.e-]+))?(?:@(\d+))?", key)
    if match is None:
        raise KeyError(key)
    name, steps, variants, rate, seed = match.groups()
    row, names = TRAINED[name], variants.split("+")[1:]
    changes = [VARIANTS[variant][1] for variant in names]
    given = [flag for change in changes for flag in change]
    if len(given) > len(set(given)) or rate and not _is_rate(rate) or seed == str(row.seed):
        raise KeyError(key)  # two of the variants exclude each other, or the row has another name already
    flags = row.flags
    for change in changes:
        flags = flags | change
    unsampled = ["without samples of the teacher"] if flags.get("distill_generic") == "none" else []
    title = ", ".join((row.title, *unsampled, *(VARIANTS[variant][0] for variant in names), f"{steps} steps"))
    title += f", learning rate {rate}" if rate else ""
    title += f", seed {seed}" if seed else ""
    learning_rate, seed = rate or row.learning_rate, int(seed) if seed else row.seed
    return replace(row, title=title, flags=flags, steps=int(steps), learning_rate=learning_rate, seed=seed)


def settings_text(key: str) -> str:
    """What a row is, apart from titles: two rows with the same text have the same figures under the same arguments."""
    row = row_of(key)
    quantized = None if row.quantized is None else replace(row.quantized, title="")
    text = repr(replace(row, title="", quantized=quantized, flags=dict(sorted(row.flags.items()))))
    if row.recipe is None:
        return text
    recipe = yaml.safe_load((_RECIPES / f"{row.recipe}.yaml").read_text(encoding="utf-8"))
    return f"{text} {json.dumps(recipe, sort_keys=True)}"


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
