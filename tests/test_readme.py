"""What users copy must run: commands of the README, the scripts, the accelerate configurations."""

from __future__ import annotations

import os
import re
import shlex
import subprocess

import pytest
import yaml
from helpers import ROOT

import main

SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))


def readme_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def main_flags(command: str) -> list[str] | None:
    words = shlex.split(command, comments=True)
    return words[words.index("main.py") + 1 :] if "main.py" in words else None


def test_the_readme_names_the_two_commands():
    assert {"bash scripts/quickstart.sh", "bash scripts/test.sh"} <= set(readme_commands())


@pytest.mark.parametrize("command", [c for c in readme_commands() if "main.py" in c])
def test_the_readmes_main_commands_parse(command):
    main.parse_arguments(main_flags(command))


@pytest.mark.parametrize("command", readme_commands())
def test_files_that_the_readmes_commands_name_exist(command):
    for word in shlex.split(command, comments=True):
        if word.startswith(("scripts/", "accelerate_config/", "benchmarks/", "tests/", "docs/")):
            assert (ROOT / word).exists(), word


def test_links_of_the_readme_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_valid_bash(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0


@pytest.mark.parametrize("script", ["finetune_bf16.sh", "qat_mxfp4.sh", "qat_mxfp8.sh"])
def test_the_flags_of_a_stage_script_parse_and_can_be_overridden(script, tmp_path):
    stub = tmp_path / "accelerate"
    stub.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@" >"$RECORD"\n')
    stub.chmod(0o755)
    record = tmp_path / "record"
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": str(record), "MODEL": "some/model"}
    command = ["bash", str(ROOT / "scripts" / script), "--learning_rate", "3e-6"]
    subprocess.run(command, env=environment, check=True)
    words = record.read_text().splitlines()
    model, training, data, quantization, _ = main.parse_arguments(words[words.index("main.py") + 1 :])
    assert (ROOT / words[words.index("--config_file") + 1]).exists()
    assert model.model_name_or_path == "some/model" and training.learning_rate == 3e-6
    assert data.dataset == "Daring-Anteater" and training.do_train and training.do_eval
    assert quantization.quant_scheme == {"qat_mxfp4.sh": "MXFP4", "qat_mxfp8.sh": "MXFP8"}.get(script)
    assert (training.max_steps, training.num_train_epochs)[script == "finetune_bf16.sh"] in (1000, 2.0)


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
    models, training, _, quantization, distillation = zip(*stages, strict=True)
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
        assert plugin["fsdp_version"] == int(path.stem[-1])


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
