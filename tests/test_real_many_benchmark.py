"""benchmarks/real_many.py: rows on several GPUs, by programs that stand for real_models.py."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from helpers import save_llama

from benchmarks import real_many, real_models
from benchmarks.real_rows import MAIN
from qat.errors import UserError

# Writes when and where it was started, and what it measured; files of its row's name have it fail or take long.
STUB = """
import json, os, pathlib, sys, time
words = sys.argv[1:]
value = {name: words[len(words) - words[::-1].index(name)] for name in ("--rows", "--out") if name in words}
out, row = pathlib.Path(value["--out"]), value["--rows"]
share = words[words.index("--training_share") + 1] if "--training_share" in words else None
name = row if share is None else share
with (out / "begun.txt").open("a") as file:
    file.write(json.dumps([name, os.environ["CUDA_VISIBLE_DEVICES"], time.time(), os.getpid()]) + "\\n")
time.sleep(30 if (out / f"slow-{row}").exists() and share is None else 0.3)
with (out / "ended.txt").open("a") as file:
    file.write(json.dumps([name, time.time()]) + "\\n")
if share is not None:
    if not (out / "no-data").exists():
        (out / "data.jsonl").touch()
        (out / "training_file").write_text(str(out / "data.jsonl"))
    sys.exit()
for kind in ("always", "once"):
    if (out / f"{kind}-{row}").exists():
        if kind == "once":
            (out / f"once-{row}").unlink()
        sys.exit(1)
(out / "rows" / row).mkdir(parents=True)
(out / "rows" / row / "text_never.json").write_text(json.dumps({"value": 1.5, "error": 0.1, "kl": 0.2}))
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.setattr(real_many, "PROGRAM", [sys.executable, str(tmp_path / "stub.py")])
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "training.jsonl").write_text(json.dumps({"question": "What?", "answer": "1"}) + "\n")
    (tmp_path / "tasks" / "text_never.txt").write_text("A story.")
    save_llama(tmp_path / "model")
    (tmp_path / "out").mkdir()

    def run(rows: str, *own: str, minutes: float = 1):
        words = ["--gpus", "2", "--per_gpu", "2", "--answering", "1", "--pause", "0.01", *own, "--"]
        words += ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--tasks"]
        words += [str(tmp_path / "tasks"), "--rows", rows, "--figures", "text_never", "--minutes", str(minutes)]
        real_many.main(words)

    def read(name: str) -> list:
        path = tmp_path / "out" / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def make_data() -> None:
        (tmp_path / "out" / "data.jsonl").touch()
        (tmp_path / "out" / "training_file").write_text(str(tmp_path / "out" / "data.jsonl"))

    return SimpleNamespace(run=run, read=read, make_data=make_data, out=tmp_path / "out")


def test_rows_run_beside_each_other_on_the_gpu_with_most_memory_once_the_data_is_there(machine, capsys):
    machine.run(f"bf16,{MAIN},mxfp4-rtn,mxfp4-600,mxfp4-ptq", "--train_gb", "40", "--measure_gb", "30")
    gpus = {name: gpu for name, gpu, *_ in machine.read("begun.txt")}
    began = {name: at for name, _, at, _ in machine.read("begun.txt")}
    ended = dict(machine.read("ended.txt"))
    assert set(gpus) == {"0/2", "1/2", "bf16", MAIN, "mxfp4-rtn", "mxfp4-600", "mxfp4-ptq"}
    assert (gpus["0/2"], gpus["1/2"], gpus["bf16"]) == ("0", "1", "0")
    shares = [ended["0/2"], ended["1/2"]]
    assert began["bf16"] < min(shares) and max(shares) < min(began[key] for key in (MAIN, "mxfp4-rtn"))
    # Into 78 GB fit a row that is trained and one that is not, but not two that are trained.
    assert gpus[MAIN] != gpus["mxfp4-600"] and began["mxfp4-600"] < ended[MAIN]
    output = capsys.readouterr().out
    assert "all is done" in output and "Baseline: " in output
    lines = (machine.out / "real_models.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == ["bf16", "mxfp4-rtn", "mxfp4-ptq", MAIN, "mxfp4-600"]


def test_one_place_makes_the_data_too_and_a_row_named_twice_is_measured_once(machine):
    machine.run("mxfp4-rtn,mxfp4-rtn", "--gpus", "1", "--per_gpu", "2")
    assert [name for name, *_ in machine.read("begun.txt")] == ["0/1", "mxfp4-rtn"]


def test_a_share_of_the_training_data_is_all_that_such_a_process_makes(machine, monkeypatch):
    done = []
    monkeypatch.setattr(real_models.Table, "write_base", lambda table: done.append("base"))
    monkeypatch.setattr(real_models.Table, "training_file", lambda table: done.append(table.args.training_share))
    monkeypatch.setattr(real_models.Table, "run", lambda table: done.append("all"))
    words = ["--model", str(machine.out.parent / "model"), "--out", str(machine.out), "--rows", "bf16"]
    words += ["--tasks", str(machine.out.parent / "tasks"), "--figures", "text_never"]
    real_models.main([*words, "--training_share", "0/1"])
    assert done == ["base", (0, 1)]


def test_a_row_that_fails_is_begun_again_and_named_if_it_fails_twice(machine, capsys):
    (machine.out / "once-mxfp4-rtn").touch()
    (machine.out / "always-mxfp4-ptq").touch()
    machine.make_data()
    with pytest.raises(UserError, match="not measured: mxfp4-ptq; see .*logs"):
        machine.run("mxfp4-rtn,mxfp4-ptq")
    begun = [name for name, *_ in machine.read("begun.txt")]
    assert begun.count("mxfp4-rtn") == 2 and begun.count("mxfp4-ptq") == 2
    assert "Baseline: " in capsys.readouterr().out


def test_what_is_left_at_the_deadline_is_told_and_measured_by_the_next_call(machine, capsys):
    machine.make_data()
    machine.run("mxfp4-rtn,mxfp4-ptq", minutes=0.0001)
    assert not machine.read("begun.txt") and "give the same command again" in capsys.readouterr().out
    machine.run("mxfp4-rtn,mxfp4-ptq")
    assert len(machine.read("begun.txt")) == 2 and "all is done" in capsys.readouterr().out


def test_the_gpus_that_are_visible_are_used(machine, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")
    machine.make_data()
    machine.run("mxfp4-rtn,mxfp4-ptq", "--per_gpu", "1")
    assert {gpu for _, gpu, *_ in machine.read("begun.txt")} == {"5", "GPU-7"}
    with pytest.raises(UserError, match="--gpus 3 are more than CUDA_VISIBLE_DEVICES=5,GPU-7 has"):
        machine.run("mxfp4-rtn", "--gpus", "3")


def test_sigterm_ends_all_processes(machine):
    (machine.out / "slow-bf16").touch()

    def end() -> None:
        last = time.monotonic() + 60
        while len(machine.read("begun.txt")) < 3 and time.monotonic() < last:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end, daemon=True).start()
    with pytest.raises(SystemExit, match="143"):
        machine.run("bf16,mxfp4-rtn")
    for *_, pid in machine.read("begun.txt"):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize(
    ("rows", "own"), [(MAIN, ["--train_gb", "90"]), ("bf16", ["--measure_gb", "79"]), ("bf16", ["--gpu_gb", "20"])]
)
def test_a_row_that_can_never_fit_is_one_line(machine, rows, own):
    with pytest.raises(UserError, match="is less than the .* of a row"):
        machine.run(rows, *own)


def test_data_that_was_not_made_is_an_error(machine):
    (machine.out / "no-data").touch()
    with pytest.raises(UserError, match="training data was not made; see training-data-"):
        machine.run("mxfp4-rtn")


def test_arguments_of_the_other_program_before_the_dashes_are_one_line():
    with pytest.raises(UserError, match="go behind --"):
        real_many.main(["--model", "M"])
