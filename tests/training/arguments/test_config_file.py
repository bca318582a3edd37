"""`--config FILE`: arguments from a file, flags over it; the recipes are such files, and hold the recipe alone."""

from __future__ import annotations

import re

import pytest
import yaml
from helpers import ROOT

from benchmarks.accuracy import LENGTH
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


def test_none_switches_off_the_generic_text_of_a_recipe_as_if_it_had_none(tmp_path):
    text = (ROOT / "recipes" / "mxfp4.yaml").read_text()
    without = write(tmp_path, "".join(line for line in text.splitlines(True) if not line.startswith("distill_generic")))
    switched_off = parse_arguments(["--config", str(ROOT / "recipes" / "mxfp4.yaml"), "--distill_generic", "none"])
    plain = parse_arguments([without])
    assert vars(switched_off.distillation) == vars(plain.distillation) and not plain.distillation.distill_generic
    assert switched_off.trainer_options == plain.trainer_options
    off = ["--distill", "False", "--distill_ce_weight", "0", "--distill_generic", "none"]
    assert not parse_arguments([without, *off, "--metric_for_best_model", "loss"]).distillation.distill


@pytest.mark.parametrize("settings", ["distill_generic_share: 0.5", "distill_generic_length: 64"])
def test_a_share_or_length_of_a_file_without_text_is_refused_and_not_with_none(tmp_path, capsys, settings):
    path = write(tmp_path, f"model_name_or_path: m\noutput_dir: o\ndo_train: true\ndistill: true\n{settings}\n")
    with pytest.raises(SystemExit):
        parse_arguments([path])
    assert "has no effect without --distill_generic" in capsys.readouterr().err
    assert parse_arguments([path, "--distill_generic", "none"]).distillation.distill_generic_share == 0.25


def test_an_evaluation_over_a_recipe_has_no_generic_text_whatever_a_training_would_refuse():
    words = [str(ROOT / "recipes" / "mxfp4.yaml"), "--do_train", "False", "--model_max_length", "64"]
    words += ["--train_sampling_strategy", "sequential", "--distill_generic", "a.txt", "--eval_generic", "a.txt"]
    words += ["--distill_generic_length", "0"]
    found = parse_arguments(words).distillation
    assert (found.distill_generic, found.distill_generic_length, found.generic_continuations) == (None, None, 0)
    assert (found.unread_generic, found.eval_generic) == ("a.txt", "a.txt")


def test_a_file_over_a_recipe_takes_no_length(tmp_path):
    words = [str(ROOT / "recipes" / "mxfp4.yaml"), "--distill_generic"]
    found = parse_arguments([*words, "a.txt", "--distill_generic_length", "0"]).distillation
    assert (found.generic_file, found.distill_generic_length, found.distill_generic_share) == ("a.txt", None, 0.5)


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
    sampled = ROWS["recipe-generic-teacher-0.5"]
    assert (sampled.generic, sampled.generic_share) == (recipe["distill_generic"], recipe["distill_generic_share"])
    assert recipe["distill_generic_length"] == LENGTH and not row.generic
