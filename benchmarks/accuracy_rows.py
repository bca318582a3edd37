"""The rows of the accuracy table: how the model is quantized and trained in each."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from qat.errors import UserError
from qat.layers.learned import optimizer_settings
from qat.schemes.presets import PRESETS

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


@dataclass
class Row:
    """One line of the table: how the model is quantized and trained."""

    title: str
    scheme: str | None = "MXFP4"
    weights: str | None = "floor"  # scale rules; None: that of the scheme
    inputs: str | None = "floor"
    steps: int = 0
    lr: float = 0.0
    distill: bool = False
    seed: int = 2
    train: dict = field(default_factory=dict)
    distill_options: dict = field(default_factory=dict)
    packing: bool = False
    smooth_alpha: float | str = 0.0
    weight_init: str = "none"
    weight_init_samples: int = 128
    prepare_options: dict = field(default_factory=dict)
    trainer_options: dict = field(default_factory=dict)
    teacher: str = "copy"  # or "cache" or "self", as with --distill_teacher
    generic: str = ""  # text mixed into the divergence: "FILE" (that of --generic), or "teacher:N"
    generic_share: float = 0.25
    lora: dict = field(default_factory=dict)  # LoraArguments; empty: all weights are trained
    first: dict = field(default_factory=dict)  # changes that make an earlier stage out of this row
    bits_budget: float | None = None  # of a mixture of MXFP4 and MXFP8 by sensitivity
    others: dict[str, str] = field(default_factory=dict)  # schemes of other layers, by patterns


def of_recipe(name: str, title: str, **changes) -> Row:
    """The quantization, loss and data of recipes/NAME.yaml without its samples of the teacher, with changes.

    Rows that have samples name them in `generic`. Steps and learning rate are chosen for a model of 135 M parameters.
    """
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    distill, transform = recipe.get("distill", False), recipe.get("input_transform", "none")
    settings = {
        "scheme": recipe["quant_scheme"], "weights": recipe["weight_scale_rule"], "inputs": recipe["input_scale_rule"],
        "distill": distill, "packing": recipe.get("packing", False), "smooth_alpha": recipe.get("smooth_alpha", 0.0),
        "weight_init": recipe.get("weight_init", "none"),
        "distill_options": {"distill_ce_weight": recipe["distill_ce_weight"]} if distill else {},
        "prepare_options": {"input_transforms": transform} if transform != "none" else {},
        "steps": 150, "lr": 2e-4 if distill else recipe["learning_rate"],
    }  # fmt: skip
    return Row(title, **settings | changes)


def of_ours(title: str, **changes) -> Row:
    """Our recipe, with changes."""
    return of_recipe("mxfp4", title, **changes)


def plain(title: str, **changes) -> Row:
    """Our recipe without transformed inputs and with one strength of smoothing, with changes."""
    return of_ours(title, **{"smooth_alpha": 0.7, "weight_init": "none", "prepare_options": {}} | changes)


ROWS: dict[str, Row] = {"bf16": Row("BF16", scheme=None)}
for _scheme in ("MXFP4", "MXFP8"):
    for _weights, _inputs in (("floor", "floor"), ("even", "even"), ("rceil", "rceil"), ("search", "even"),
                              ("search", "rceil")):  # fmt: skip
        ROWS[f"{_scheme}-{_weights}-{_inputs}"] = Row(
            f"{_scheme} PTQ, weights {_weights}, inputs {_inputs}", _scheme, _weights, _inputs
        )
for _alpha in (0.3, 0.5, 0.7, 0.9):
    ROWS[f"untrained-smooth-{_alpha}"] = Row(
        f"MXFP4 PTQ with smoothing {_alpha}, search, even", weights="search", inputs="even", smooth_alpha=_alpha
    )
ROWS |= {
    "inc": of_recipe("mxfp4-reference", "cross-entropy, FLOOR, lr 1e-5 (the reference's recipe)"),
    "ce": Row("cross-entropy, FLOOR, lr 5e-5", steps=150, lr=5e-5),
    "recipe": of_ours("our recipe"),
    "plain": plain("plain"),
    "cached-teacher": plain("plain, teacher from a cache", teacher="cache"),
    "no-smoothing": plain("plain without smoothing", smooth_alpha=0.0),
    "no-packing": plain("plain without packing", packing=False),
    "no-ce": plain("plain without cross-entropy", distill_options={}),
    "more-ce": plain("plain, 40 % cross-entropy", distill_options={"distill_ce_weight": 0.4}),
    "no-distillation": plain("plain, cross-entropy instead of distillation", distill=False, distill_options={}),
    "rceil": plain("plain, RCEIL inputs", inputs="rceil"),
    "floor-weights": plain("plain, FLOOR weights", weights="floor"),
    "even-weights": plain("plain, EVEN weights", weights="even"),
    "lr-1e-4": plain("plain, lr 1e-4", lr=1e-4),
    "lr-4e-4": plain("plain, lr 4e-4", lr=4e-4),
    "lr-8e-4": plain("plain, lr 8e-4", lr=8e-4),
    "mxfp8-50": of_recipe("mxfp8", "MXFP8, our recipe, 50 steps, lr 1e-4", steps=50, lr=1e-4),
}

for _lr in ("3e-3", "1e-2", "3e-2"):
    ROWS[f"learned-{_lr}"] = plain(
        f"plain, learned exponents at lr {_lr}",
        prepare_options={"learn_exponent": True},
        trainer_options={"parameter_groups": optimizer_settings(exponents=float(_lr))},
    )
ROWS |= {
    "progressive": plain("plain, 50 steps of MXFP8 first (200 in all)", first={"scheme": "MXFP8", "steps": 50}),
    "progressive-150": plain("plain, MXFP8 for 50 of 150 steps", steps=100, first={"scheme": "MXFP8", "steps": 50}),
    "mixed-untrained": Row("mixed at 5 bits a weight, PTQ", weights="search", inputs="even", bits_budget=5.0),
    "mixed": plain("plain, mixed MXFP4 and MXFP8 at 5 bits a weight", bits_budget=5.0),
}

# Text from elsewhere in the divergence alone (docs/distillation.md): a file, and continuations of the teacher.
for _share in (0.25, 0.5, 0.75):
    for _text, _name in (("FILE", "text of --generic"), ("teacher:2000", "2,000 continuations of the teacher")):
        ROWS[f"generic-{_text.partition(':')[0].lower()}-{_share}"] = plain(
            f"plain, {_share:.0%} {_name}", generic=_text, generic_share=_share
        )

# The same with less memory (docs/memory.md), each beside "plain".
_IN_BACKWARD: dict = {"optimizer_in_backward": True, "max_grad_norm": 0.0}
ROWS |= {
    "memory-bf16": plain("plain, BF16 without masters", train={"master_dtype": "bfloat16"}),
    "memory-bf16-fp32-moments": plain(
        "plain, BF16 without masters, FP32 moments", train={"master_dtype": "bfloat16", "moment_dtype": "float32"}
    ),
    "memory-in-backward": plain("plain, steps in backward", train=_IN_BACKWARD),
    "memory-bf16-in-backward": plain(
        "plain, BF16 without masters, steps in backward", train={"master_dtype": "bfloat16", **_IN_BACKWARD}
    ),
}
for _optim in ("muon", "adafactor", "adamw_torch_8bit", "adamw_torch_4bit", "adamw_bnb_8bit"):
    ROWS[f"memory-{_optim}"] = plain(f"plain, {_optim}", train={"optim": _optim})

# The hidden size of this model, 576, is no multiple of 128: formats in blocks of 128 quantize down_proj alone.
IN_BLOCKS_OF_128 = {"INT4_G128": "INT4_G32", "MXFP4FP8_G128": "MXFP4FP8"}
SERVED = ("MXFP4A16", "MXFP8A16", "MXFP4FP8", "MXFP4FP8_G128", "MXFP4MXFP8", "NVFP4", "NVFP4A16", "INT4_G32",
          "INT4_G128", "FP8")  # fmt: skip


def settings_of(name: str) -> dict:
    """The schemes of a row, and its scale rules under our recipe: searched weights where they exist, EVEN MX inputs."""
    scheme = PRESETS[name]
    searched = "search" if "search" in scheme.weight.format.rules else None
    even = "even" if scheme.input is not None and "even" in scheme.input.format.input_rules else None
    smooth_alpha = 0.0 if scheme.input is None else plain("").smooth_alpha
    return {"weights": searched, "inputs": even, "smooth_alpha": smooth_alpha}


def served_rows(name: str) -> dict[str, Row]:
    """PTQ in a scheme, PTQ with what our recipe does before training, and our recipe."""
    settings = settings_of(name)
    schemes: dict = {"scheme": name}
    label = name
    if name in IN_BLOCKS_OF_128:
        other = IN_BLOCKS_OF_128[name]
        schemes, label = {"scheme": other, "others": {"*.down_proj": name}}, f"{name} (down_proj; others {other})"
    prepared = [text for text in ("searched weights" * bool(settings["weights"]),
                                  "smoothing" * bool(settings["smooth_alpha"])) if text]  # fmt: skip
    rows = {f"{name}-ptq": Row(f"{label} PTQ", weights=None, inputs=None, **schemes)}
    if prepared:
        rows[f"{name}-ptq-prepared"] = Row(f"{label} PTQ, {', '.join(prepared)}", **schemes | settings)
    return rows | {f"{name}-qad": plain(f"{label}, plain", **schemes | settings)}


for _name in SERVED:
    ROWS |= served_rows(_name)
for _name in ("MXFP4A16", "MXFP4FP8", "NVFP4", "INT4_G32"):
    ROWS[f"{_name}-lr-4e-4"] = plain(f"{_name}, plain, lr 4e-4", scheme=_name, lr=4e-4, **settings_of(_name))
for _name in ("MXFP4A16", "MXFP4FP8"):
    ROWS[f"{_name}-more-ce"] = plain(
        f"{_name}, plain, 40 % cross-entropy", scheme=_name, distill_options={"distill_ce_weight": 0.4},
        **settings_of(_name),
    )  # fmt: skip
# Learned scales, each beside the same recipe without.
for _name in ("NVFP4", "INT4_G32"):
    for _rule in ("absmax", "search"):
        _recipe: dict = {"scheme": _name, **settings_of(_name), "weights": _rule}
        if _rule == "absmax":  # with search it is the row NAME-qad
            ROWS[f"{_name}-absmax"] = plain(f"{_name}, plain without search", **_recipe)
        for _lr in ("1e-3", "1e-2"):
            ROWS[f"{_name}-{_rule}-learned-{_lr}"] = plain(
                f"{_name}, plain with {_rule} and learned scales, lr {_lr}",
                prepare_options={"learn_scale": True},
                trainer_options={"parameter_groups": optimizer_settings(scales=float(_lr))},
                **_recipe,
            )
# Low-rank adapters in place of all weights, by rank and learning rate; the scaling is 2 at every rank.
for _rank in (16, 64):
    for _lr in ("5e-4", "1e-3", "2e-3", "4e-3"):
        ROWS[f"lora-r{_rank}-{_lr}"] = plain(
            f"adapters of rank {_rank}, plain, lr {_lr}", lr=float(_lr), teacher="self",
            lora={"lora_r": _rank, "lora_alpha": 2 * _rank},
        )  # fmt: skip
# The same on a base that is kept in the scheme, whose teacher has to be another model.
for _rank, _lr in ((16, "1e-3"), (16, "2e-3"), (64, "1e-3")):
    ROWS[f"qlora-r{_rank}-{_lr}"] = plain(
        f"adapters of rank {_rank} on a packed base, plain, lr {_lr}", lr=float(_lr),
        lora={"lora_r": _rank, "lora_alpha": 2 * _rank, "base_in_scheme": True},
    )  # fmt: skip
# The key/value cache in FP8, beside the same without.
_cache: dict = {"prepare_options": {"kv_cache_scheme": "FP8"}}
ROWS["MXFP8A16-kv-ptq"] = Row(
    "MXFP8A16 PTQ, FP8 key/value cache", scheme="MXFP8A16", weights=None, inputs=None, **_cache
)
ROWS["MXFP4FP8-kv-ptq"] = Row(
    "MXFP4FP8 PTQ, FP8 key/value cache", scheme="MXFP4FP8", weights=None, inputs=None, **_cache
)
ROWS["MXFP4FP8-kv"] = plain(
    "MXFP4FP8, plain, FP8 key/value cache", scheme="MXFP4FP8", **settings_of("MXFP4FP8"), **_cache
)
# Inputs transformed by Hadamard blocks of 32, see qat/layers/transform.py.
for _name, _patterns in (("hadamard", ("*.down_proj", "*.o_proj")), ("hadamard-all", ("*",))):
    _transforms: dict = {"prepare_options": {"input_transforms": dict.fromkeys(_patterns, "hadamard")}}
    _of = "all layers" if _name.endswith("all") else "down_proj and o_proj"
    ROWS[f"{_name}-ptq"] = Row(
        f"MXFP4 PTQ with smoothing 0.7, search, even, Hadamard inputs of {_of}", weights="search", inputs="even",
        smooth_alpha=0.7, **_transforms,
    )  # fmt: skip
    ROWS[_name] = plain(f"plain, Hadamard inputs of {_of}", **_transforms)
# Smoothing by a strength of each activation's own, with and without transformed inputs, see qat/transforms/strength.py.
ROWS["smooth-auto-ptq"] = Row(
    "MXFP4 PTQ with smoothing auto, search, even", weights="search", inputs="even", smooth_alpha="auto"
)
for _strength in (0, 0.3, 0.5, "auto"):
    ROWS[f"hadamard-all-smooth-{_strength}-ptq"] = Row(
        f"MXFP4 PTQ with smoothing {_strength}, search, even, Hadamard inputs of all layers", weights="search",
        inputs="even", smooth_alpha=_strength, **_transforms,
    )  # fmt: skip
ROWS["smooth-auto"] = plain("plain, smoothing auto", smooth_alpha="auto")
# Our recipe, which has both, with text from elsewhere and other settings.
for _key in [key for key in ROWS if key.startswith("generic-")]:
    _row, _ours = ROWS[_key], of_ours("")
    ROWS[f"recipe-{_key}"] = replace(
        _row, title=_row.title.replace("plain", "our recipe"), smooth_alpha=_ours.smooth_alpha,
        prepare_options=_ours.prepare_options,
    )  # fmt: skip
for _key, _changes in (
    ("no-ce", {"distill_options": {}}),
    ("more-ce", {"distill_options": {"distill_ce_weight": 0.4}}),
    ("lr-1e-4", {"lr": 1e-4}),
    ("lr-4e-4", {"lr": 4e-4}),
    ("mixed-4.5", {"bits_budget": 4.5}),
    ("mixed-5", {"bits_budget": 5.0}),
):
    ROWS[f"recipe-{_key}"] = of_ours(f"our recipe, {_key}", **_changes)
# With the mean cross-entropy of half as many tokens, each of them counts twice; this one has it count as without text.
ROWS["recipe-teacher-ce-0.1"] = of_ours(
    "our recipe, 50% 2,000 continuations of the teacher, 10 % cross-entropy", generic="teacher:2000",
    generic_share=0.5, distill_options={"distill_ce_weight": 0.1},
)  # fmt: skip
# Weights that make up for their own rounding before training, see qat/compensation/gptq.py.
_gptq: dict = {"weight_init": "gptq"}
ROWS["recipe-gptq-ptq"] = of_ours("MXFP4 PTQ, prepared as in our recipe, GPTQ", distill=False, steps=0, **_gptq)
ROWS["recipe-gptq"] = of_ours("our recipe, GPTQ", **_gptq)
ROWS["recipe-gptq-generic-teacher-0.5"] = of_ours(
    "our recipe, GPTQ, 50% 2,000 continuations of the teacher", generic="teacher:2000", generic_share=0.5, **_gptq
)
# W4A8 with and without what W4A4 needs.
_w4a8: dict = {"scheme": "MXFP4FP8", "weights": "search", "inputs": None}
ROWS["MXFP4FP8-search-ptq"] = Row("MXFP4FP8 PTQ, searched weights", **_w4a8)
ROWS["MXFP4FP8-hadamard-ptq"] = Row("MXFP4FP8 PTQ, searched weights, Hadamard inputs", **_w4a8, **_transforms)
for _name, _changes in (("", {}), ("-gptq", _gptq)):
    ROWS[f"MXFP4FP8-hadamard-auto{_name}-ptq"] = Row(
        f"MXFP4FP8 PTQ, searched weights, Hadamard inputs, smoothing auto{', GPTQ' * bool(_name)}",
        smooth_alpha="auto", **_w4a8, **_transforms, **_changes,
    )  # fmt: skip
# Fewer continuations of the teacher, each read more often.
for _count in (75, 300):
    ROWS[f"recipe-teacher-{_count}"] = of_ours(
        f"our recipe, 50% {_count} continuations of the teacher", generic=f"teacher:{_count}", generic_share=0.5
    )
HEADLINE = ("recipe", "recipe-600", "plain", "plain-600")
ALL = [*ROWS, *(f"{name}-600" for name in ("recipe", "plain", "lr-4e-4", "more-ce", "hadamard-all")),
       *(f"{name}@{seed}" for name in HEADLINE for seed in (3, 4))]  # fmt: skip


def row_of(key: str) -> Row:
    """The row of a key: a name of ROWS, with -STEPS and @SEED behind it for other steps and another seed.

    Raises:
        UserError: there is no such row.
    """
    match = re.fullmatch(r"(?P<name>.+?)(-(?P<steps>\d+))?(@(?P<seed>\d+))?", key)
    name, steps, seed = (match["name"], match["steps"], match["seed"]) if match else ("", None, None)
    if steps and f"{name}-{steps}" in ROWS:  # mxfp8-50
        name, steps = f"{name}-{steps}", None
    if name not in ROWS or (steps and not ROWS[name].steps):
        raise UserError(
            f"--rows {key!r} is no row; names are in benchmarks/accuracy_rows.py, such as recipe, and -600 or @3 goes "
            "behind one that is trained for other steps or another seed"
        )
    row = replace(ROWS[name])
    if steps:
        row = replace(row, steps=int(steps), title=f"{row.title}, {int(steps)} steps")
    return replace(row, seed=int(seed)) if seed else row
