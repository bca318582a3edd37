"""benchmarks/real_many.py: rows on several GPUs, by programs that stand for real_models.py."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
from helpers import save_llama

from benchmarks import real_many
from benchmarks.real_rows import MAIN
from qat.errors import UserError

# Writes what it was started with, and fails where a file of its row says so, once.
STUB = """
import json, os, pathlib, sys, time
words = sys.argv[1:]
value = {name: words[len(words) - words[::-1].index(name)] for name in ("--rows", "--out") if name in words}
out, row = pathlib.Path(value["--out"]), value.get("--rows")
share = words[words.index("--training_share") + 1] if "--training_share" in words else None
name = row if share is None else "share-" + share.replace("/", "of")
with (out / "begun.txt").open("a") as file:
    file.write(json.dumps([name, os.environ["CUDA_VISIBLE_DEVICES"], time.time()]) + "\\n")
if share == "0/2":
    (out / "data.jsonl").write_text("{}")
    (out / "training_file").write_text(str(out / "data.jsonl"))
time.sleep(0.3)
with (out / "ended.txt").open("a") as file:
    file.write(json.dumps([name, time.time()]) + "\\n")
if (out / f"fail-{row}").exists():
    (out / f"fail-{row}").unlink()
    sys.exit(1)
sys.exit((out / f"always-{row}").exists())
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
        return [json.loads(line) for line in (tmp_path / "out" / name).read_text().splitlines()]

    return SimpleNamespace(run=run, read=read, out=tmp_path / "out")


def test_rows_run_beside_each_other_on_the_gpu_with_most_memory_once_the_data_is_there(machine):
    machine.run(f"bf16,{MAIN},mxfp4-rtn,mxfp4-600,mxfp4-ptq", "--train_gb", "40", "--measure_gb", "30")
    gpus = {name: gpu for name, gpu, _ in machine.read("begun.txt")}
    began = {name: at for name, _, at in machine.read("begun.txt")}
    ended = dict(machine.read("ended.txt"))
    assert set(gpus) == {"share-0of2", "share-1of2", "bf16", MAIN, "mxfp4-rtn", "mxfp4-600", "mxfp4-ptq"}
    assert (gpus["share-0of2"], gpus["share-1of2"], gpus["bf16"]) == ("0", "1", "0")
    shares = [ended["share-0of2"], ended["share-1of2"]]
    assert began["bf16"] < min(shares) and max(shares) < min(began[key] for key in (MAIN, "mxfp4-rtn"))
    # Into 78 GB fit a row that is trained and one that is not, but not two that are trained.
    assert gpus[MAIN] != gpus["mxfp4-600"] and began["mxfp4-600"] < ended[MAIN]


def test_a_row_that_fails_is_begun_again_and_named_if_it_fails_twice(machine, capsys):
    (machine.out / "fail-mxfp4-rtn").touch()
    (machine.out / "always-mxfp4-ptq").touch()
    (machine.out / "data.jsonl").touch()
    (machine.out / "training_file").write_text(str(machine.out / "data.jsonl"))
    with pytest.raises(UserError, match="not measured: mxfp4-ptq; see .*logs"):
        machine.run("mxfp4-rtn,mxfp4-ptq")
    begun = [name for name, *_ in machine.read("begun.txt")]
    assert begun.count("mxfp4-rtn") == 2 and begun.count("mxfp4-ptq") == 2
    assert "Baseline: " in capsys.readouterr().out


def test_nothing_begins_after_the_deadline(machine):
    (machine.out / "data.jsonl").touch()
    (machine.out / "training_file").write_text(str(machine.out / "data.jsonl"))
    machine.run("mxfp4-rtn,mxfp4-ptq,mxfp4-600", "--per_gpu", "1", "--gpus", "1", minutes=0.004)
    assert len(machine.read("begun.txt")) <= 2


@pytest.mark.parametrize("own", [["--train_gb", "90"], ["--measure_gb", "79"]])
def test_a_row_that_can_never_fit_is_one_line(machine, own):
    with pytest.raises(UserError, match="--gpu_gb 78 is less than a row needs"):
        machine.run("bf16", *own)


def test_data_that_was_not_made_is_an_error(machine, monkeypatch):
    monkeypatch.setattr(real_many.Machine, "answer", lambda self: None)
    with pytest.raises(UserError, match="training data was not made"):
        machine.run("mxfp4-rtn")
