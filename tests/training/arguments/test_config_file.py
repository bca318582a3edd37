"""`--config FILE`: arguments from a file, flags over it; the recipes are such files, and hold the recipe alone."""

from __future__ import annotations

import re

import pytest
import yaml
from helpers import ROOT

from benchmarks.accuracy_rows import ROWS
from training.arguments.config_file import as_flags
from training.arguments.parse import GROUPS, parse_arguments

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def write(folder, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_is_trained_and_where_to(recipe):
    arguments = parse_arguments([str(recipe)])
    content = yaml.safe_load(recipe.read_text())
    groups = {name: value for group in arguments for name, value in vars(group).items()}
    different = {name for name, value in content.items() if groups[name] != value}
    assert different <= {"report_to", "lr_scheduler_type", "eval_strategy", "save_strategy"}  # a list, and enums
    assert arguments.training.do_train and arguments.training.do_eval and arguments.training.output_dir


def test_flags_win_over_the_file_wherever_they_stand(tmp_path):
    path = write(tmp_path, "learning_rate: 1e-5\nmax_steps: 7\ndo_train: true\n")
    flags = ["--model_name_or_path", "m", "--output_dir", "o"]
    for argv in (["--max_steps", "9", "--config", path, *flags], [*flags, f"--config={path}", "--max_steps", "9"]):
        training = parse_arguments(argv).training
        assert (training.learning_rate, training.max_steps, training.do_train) == (1e-5, 9, True)


def test_lists_and_mappings_in_the_file_mean_what_flags_mean(tmp_path):
    path = write(
        tmp_path,
        "model_name_or_path: m\noutput_dir: o\ndo_train: true\nlr_scheduler_type: cosine\n"
        "lr_scheduler_kwargs: {num_cycles: 2}\nrun_name: null\n",
    )
    training = parse_arguments([path]).training
    assert training.lr_scheduler_kwargs == {"num_cycles": 2} and not training.run_name
    words = as_flags({"include_for_metrics": ["loss", "inputs"]}, path, GROUPS)
    assert words == ["--include_for_metrics", "loss", "inputs"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_step: 7\n", r"run.yaml'?: 'max_step' is not an argument of main.py; did you mean 'max_steps'"),
        ("qqqqq: 7\n", r"run.yaml'?: 'qqqqq' is not an argument of main.py$"),
        ("- max_steps\n", "is not a mapping"),
        ("max_steps: [\n", "cannot be read"),
        ("max_steps: 7\nlearning_rate: 1e-5\nmax_steps: 9\n", "'max_steps' twice"),
    ],
)
def test_what_a_file_gets_wrong_is_named(tmp_path, capsys, text, message):
    with pytest.raises(SystemExit):
        parse_arguments(["--config", write(tmp_path, text), "--model_name_or_path", "m", "--output_dir", "o"])
    assert re.search(message, capsys.readouterr().err.strip())


def test_a_file_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--config", "nowhere.yaml", "--output_dir", "o"])
    assert "--config 'nowhere.yaml' cannot be read" in capsys.readouterr().err


def test_the_recipe_stands_nowhere_else():
    """Scripts and benchmarks read recipes; what they set themselves are departures from it."""
    recipe = yaml.safe_load((ROOT / "recipes" / "mxfp4.yaml").read_text())
    names = ("smooth_alpha", "input_transform", "weight_scale_rule", "input_scale_rule", "distill_ce_weight", "packing")
    pattern = re.compile(
        "|".join(rf"--{name}[ =,\"']+{re.escape(str(recipe[name]))}\b" for name in names), re.IGNORECASE
    )
    files = [*(ROOT / "scripts").rglob("*.sh"), *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "serving").rglob("*.py")]
    found = [f"{path.name}: {match}" for path in files for match in pattern.findall(path.read_text())]
    assert len(files) > 20 and not found
    row = ROWS["recipe"]
    own = [row.smooth_alpha, row.prepare_options["input_transforms"], row.weights, row.inputs]
    assert [*own, row.distill_options["distill_ce_weight"], row.packing] == [recipe[name] for name in names]
