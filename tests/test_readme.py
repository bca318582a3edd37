"""What users copy must run: commands and links of README.md and docs/, the scripts, the accelerate configurations."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from helpers import ROOT
from transformers import HfArgumentParser

import main
from data.preview import PreviewArguments
from qat import SCHEMES
from training.arguments.data import DataArguments
from training.arguments.model import ModelArguments
from training.sensitivity.measure import SensitivityArguments

SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, ROOT / "benchmarks" / "LOG.md"]
FOLDERS = (
    "accelerate_config/", "benchmarks/", "data/", "docs/", "qat/", "recipes/", "scripts/", "serving/", "tests/",
    "training/",
)  # fmt: skip
SEPARATORS = {";", "&&", "||", "|", "&"}


def blocks_of(page: Path, language: str) -> list[str]:
    """The contents of the page's code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands_of(page: Path) -> list[str]:
    """The lines of the page's bash blocks, continued ones joined, without comments."""
    lines = "\n".join(blocks_of(page, "bash")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def simple_commands(line: str) -> list[list[str]]:
    """The words of each command of a line such as `until A; do B; done`, without the shell's own words."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in lexer:
        if word in SEPARATORS:
            found.append([])
        elif found[-1] or not (word in ("until", "do", "done") or re.match(r"[A-Z_]+=", word)):
            found[-1].append(word)
    return [words for words in found if words]


def scripts_module(name: str):
    """A program of scripts/ as a module."""
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse_export(arguments: list[str]) -> None:
    scripts_module("export").parse(arguments)


def parse_evaluate(arguments: list[str]) -> None:
    """Parse where each word that may be a folder is one with a checkpoint."""
    for word in arguments:
        if not word.startswith(("-", *FOLDERS)):
            Path(word).mkdir(parents=True, exist_ok=True)
            Path(word, "config.json").write_text("{}")
    scripts_module("evaluate").parse(arguments)


def parse_dataclasses(*groups: type) -> Callable[[list[str]], object]:
    return HfArgumentParser(groups).parse_args_into_dataclasses


# What a command contains: what parses the words behind it.
PROGRAMS = {
    ("main.py",): main.parse_arguments,
    ("scripts/slurm.sh",): main.parse_arguments,
    ("-m", "data.preview"): parse_dataclasses(PreviewArguments),
    ("-m", "training.sensitivity"): parse_dataclasses(ModelArguments, DataArguments, SensitivityArguments),
    ("scripts/export.py",): parse_export,
    ("scripts/evaluate.py",): parse_evaluate,
    ("scripts/evaluate.sh",): parse_evaluate,
}


def program_of(words: list[str]) -> tuple[tuple[str, ...], list[str]] | None:
    """The key of PROGRAMS that a command runs, and the arguments behind it; None for other programs."""
    for names in PROGRAMS:
        for i in range(len(words) - len(names) + 1):
            if tuple(words[i : i + len(names)]) == names:
                return names, words[i + len(names) :]
    return None


COMMANDS = [
    pytest.param(words, id=f"{page.name}-{' '.join(words)[:70]}")
    for page in PAGES
    for line in commands_of(page)
    for words in simple_commands(line)
]


@pytest.fixture
def working_folder(tmp_path, monkeypatch) -> Path:
    """A folder with the repository's own folders, and the files that commands expect from earlier ones."""
    for name in FOLDERS:
        (tmp_path / name.rstrip("/")).symlink_to(ROOT / name)
    (tmp_path / "sensitivity").mkdir()
    mapping = {"mapping": {"torch.nn.Linear": "MXFP4", "*.down_proj": "MXFP8"}, "ignore": ["lm_head"]}
    (tmp_path / "sensitivity" / "mapping.json").write_text(json.dumps(mapping))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readme_names_the_two_commands():
    assert {"bash scripts/quickstart.sh", "bash scripts/test.sh"} <= set(commands_of(ROOT / "README.md"))


def test_programs_are_found_behind_launchers_variables_and_loops():
    line = "until A=1 accelerate launch --config_file x.yaml main.py --max_steps 1; do sleep 10; done  # a comment"
    loop, sleep = simple_commands(line)
    assert program_of(loop) == (("main.py",), ["--max_steps", "1"]) and sleep == ["sleep", "10"]
    assert program_of(sleep) is None


def test_the_documentation_shows_every_program():
    shown = {found[0] for command in COMMANDS if (found := program_of(command.values[0]))}
    assert shown >= {names for names in PROGRAMS if names != ("scripts/evaluate.py",)}  # evaluate.sh runs it


@pytest.mark.parametrize("words", [c for c in COMMANDS if program_of(c.values[0])])
def test_commands_of_the_documentation_parse(words, working_folder):
    names, arguments = program_of(words)
    PROGRAMS[names](arguments)


@pytest.mark.parametrize("words", COMMANDS)
def test_files_that_the_documentations_commands_name_exist(words):
    for word in words:
        if word.startswith(FOLDERS) or word.endswith(".py"):
            assert (ROOT / word).exists(), word


@pytest.mark.parametrize("page", LINKED, ids=lambda p: p.name)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text(encoding="utf-8")):
        name, _, heading = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles], target


@pytest.mark.parametrize("page", LINKED, ids=lambda p: p.name)
def test_files_and_functions_in_backticks_exist(page):
    """`qat/layers/prepare.py` is a file, `qat/layers/prepare.py:prepare_qat` a function or class in it."""
    for quoted in re.findall(r"`([\w./-]+(?::\w+)?)`", page.read_text(encoding="utf-8")):
        path, _, name = quoted.partition(":")
        if path.startswith(FOLDERS):
            assert (ROOT / path).exists(), quoted
            if name:
                assert re.search(rf"(def|class) {name}\b", (ROOT / path).read_text(encoding="utf-8")), quoted


def test_the_tree_of_the_architecture_names_every_room_and_the_files_of_qat():
    (tree,) = blocks_of(ROOT / "docs" / "architecture.md", "")
    folders, files = (set(re.findall(pattern, tree)) for pattern in (r"(\w+)/", r"\w+\.py(?:\.typed)?|py\.typed"))
    for package in ("qat", "data", "training"):
        paths = [path for path in (ROOT / package).iterdir() if path.stem not in ("__init__", "__pycache__")]
        assert {path.name for path in paths if path.is_dir()} <= folders
        assert {path.name for path in paths if path.is_file()} <= files
    assert {path.name for path in (ROOT / "qat").glob("*/*.py")} - {"__init__.py"} <= files


@pytest.mark.parametrize("page,heading", [("README.md", "## Schemes,"), ("docs/quantization.md", "## Schemes")])
def test_tables_of_schemes_have_every_scheme_and_no_other(page, heading):
    section = (ROOT / page).read_text(encoding="utf-8").split(heading)[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)} - {"absmax", "absmax_native"}  # FP8's rules
    assert named == set(SCHEMES)


@pytest.mark.parametrize("code", blocks_of(ROOT / "README.md", "python"))
def test_python_of_the_readme_runs(code):
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_valid_bash(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0


_SCHEMES = {"qat_mxfp4.sh": "MXFP4", "qat_mxfp4_lora.sh": "MXFP4", "qat_mxfp8.sh": "MXFP8"}


@pytest.mark.parametrize("script", ["finetune_bf16.sh", "qat_mxfp4.sh", "qat_mxfp4_lora.sh", "qat_mxfp8.sh"])
def test_the_flags_of_a_stage_script_parse_and_can_be_overridden(script, tmp_path):
    stub = tmp_path / "accelerate"
    stub.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@" >"$RECORD"\n')
    stub.chmod(0o755)
    record = tmp_path / "record"
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": str(record), "MODEL": "some/model"}
    command = ["bash", str(ROOT / "scripts" / script), "--learning_rate", "3e-6"]
    subprocess.run(command, env=environment, check=True)
    words = record.read_text().splitlines()
    model, training, data, quantization, *_ = main.parse_arguments(words[words.index("main.py") + 1 :])
    assert (ROOT / words[words.index("--config_file") + 1]).exists()
    assert model.model_name_or_path == "some/model" and training.learning_rate == 3e-6
    assert data.dataset == "Daring-Anteater" and training.do_train and training.do_eval
    assert quantization.quant_scheme == _SCHEMES.get(script)
    assert (training.max_steps, training.num_train_epochs)[script == "finetune_bf16.sh"] in (1000, 2.0)


def test_no_stage_of_the_quickstart_samples_from_the_teacher():
    text = (ROOT / "scripts" / "quickstart.sh").read_text().replace("\\\n", " ")
    stages = [line.split() for line in text.splitlines() if line.startswith("stage ") and "mxfp4.yaml" in line]
    for _, _, *flags in stages:
        words = [re.sub(r'"\$\w+_steps"', "3", word) for word in flags]
        distillation = main.parse_arguments(["--output_dir", "out", "--model_max_length", "96", *words]).distillation
        assert distillation.distill_generic is None and distillation.unread_generic is None
    assert [words[1] for words in stages] == ["mxfp4-untrained", "mxfp4-qat"]


def test_the_progressive_script_trains_in_mxfp8_first_and_goes_on_in_mxfp4_from_there(tmp_path):
    stub = tmp_path / "accelerate"
    stub.write_text('#!/usr/bin/env bash\n{ printf "%s\\t" "$@"; echo; } >>"$RECORD"\n')
    stub.chmod(0o755)
    record = tmp_path / "record"
    settings = {
        "MODEL": "some/model",
        "OUTPUT_DIR": "out",
        "FIRST_STEPS": "7",
        "RECORD": str(record),
    }
    command = ["bash", str(ROOT / "scripts" / "qat_progressive.sh"), "--learning_rate", "3e-6"]
    subprocess.run(command, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"} | settings, check=True)
    stages = []
    for line in record.read_text().splitlines():
        words = line.split("\t")[:-1]
        stages.append(main.parse_arguments(words[words.index("main.py") + 1 :]))
    models, training, _, quantization, distillation, _ = zip(*stages, strict=True)
    assert [m.model_name_or_path for m in models] == ["some/model", "out/MXFP8"]
    assert [t.output_dir for t in training] == ["out/MXFP8", "out/MXFP4"]
    assert [(t.max_steps, t.learning_rate) for t in training] == [(7, 3e-6), (1000, 3e-6)]
    assert [q.quant_scheme for q in quantization] == ["MXFP8", "MXFP4"]
    assert [d.teacher_model_name_or_path for d in distillation] == ["some/model"] * 2


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_config").glob("*.yaml")), ids=lambda p: p.name)
def test_accelerate_configurations_are_accepted_by_accelerate(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.mixed_precision == "bf16"
    plugin = yaml.safe_load(path.read_text()).get("fsdp_config", {})
    assert "fsdp_transformer_layer_cls_to_wrap" not in plugin  # it comes from the model
    if path.stem.startswith("fsdp"):
        assert plugin["fsdp_version"] == int(path.stem.removeprefix("fsdp")[0])


def test_requirements_and_constraints_agree():
    from packaging.requirements import Requirement

    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            pinned[requirement.name.replace("_", "-")] = next(iter(requirement.specifier)).version
    for name in ("requirements.txt", "tests/requirements.txt"):
        for line in (ROOT / name).read_text().splitlines():
            if line and not line.startswith("#"):
                requirement = Requirement(line)
                assert requirement.specifier.contains(pinned[requirement.name]), requirement
