"""The accuracy benchmark: names of rows, texts that are measured, the fraction that is recovered, its plot."""

from __future__ import annotations

import csv
import json
import math
from types import SimpleNamespace

import pytest

from benchmarks import accuracy, accuracy_plot, accuracy_table
from benchmarks.accuracy_rows import ALL, ROWS, row_of
from qat.errors import UserError


@pytest.mark.parametrize(
    "key,steps,seed",
    [("recipe", 150, 2), ("recipe-600", 600, 2), ("recipe-600@4", 600, 4), ("generic-file-0.5-600", 600, 2),
     ("mxfp8-50", 50, 2), ("mxfp8-50@3", 50, 3), ("recipe-mixed-5", 150, 2)],
)  # fmt: skip
def test_a_name_tells_steps_and_seed(key, steps, seed):
    row = row_of(key)
    assert (row.steps, row.seed) == (steps, seed)
    assert ("600 steps" in row.title) == (steps == 600)


def test_all_rows_have_names_and_no_row_is_changed_by_its_name():
    assert all(row_of(key).title for key in ALL)
    assert ROWS["recipe"].steps == 150 and ROWS["recipe"].seed == 2


@pytest.mark.parametrize("key", ["recipes", "recipe@", "recipe@x", "recipe-", "MXFP4-floor-floor-600", ""])
def test_a_name_of_no_row_is_refused(key):
    with pytest.raises(UserError, match="--rows .* is no row"):
        row_of(key)


def test_the_end_of_a_text_is_measured_and_its_beginning_trained_on(tmp_path):
    text = tmp_path / "text.md"
    text.write_text("\n\n".join(f"paragraph {i}" for i in range(40)))
    (tmp_path / "never.txt").write_text("another")

    texts = accuracy.texts_to_measure(tmp_path, str(text), str(tmp_path / "never.txt"))

    assert texts["generic"] == "paragraph 38\n\nparagraph 39" and texts["never"] == "another"
    assert (tmp_path / "generic.txt").read_text().endswith("paragraph 37") and texts["foreign"]
    text.write_text("other\n\nparagraphs")
    with (tmp_path / "generic.txt").open() as read_by_another_row:
        accuracy.texts_to_measure(tmp_path, str(text), None)
        assert read_by_another_row.read().endswith("paragraph 37")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["generic.txt", "never.txt", "text.md"]


def test_a_row_recovers_what_it_lowers_the_loss_of_rounding_on_each_text(tmp_path):
    figures = {
        "MXFP4-floor-floor": (40.0, 90.0),
        "bf16": (10.0, 10.0),
        "recipe": (20.0, 10.0),
        "recipe-600": (10.0, 30.0),
    }
    for key, (domain, foreign) in figures.items():
        row = {"perplexity": domain, "foreign_perplexity": foreign, "kl": 0.0, "foreign_kl": 0.0}
        (tmp_path / f"{key}.json").write_text(json.dumps(row))

    rows = accuracy_table.finished_rows(tmp_path, ["bf16", "recipe", "recipe-600", "inc"])

    assert [row["row"] for row in rows] == ["bf16", "recipe", "recipe-600"]
    assert [row["recovered"] for row in rows] == pytest.approx([1, 0.5, 1])
    assert [row["foreign_recovered"] for row in rows] == pytest.approx([1, 1, 0.5])
    alone = accuracy_table.finished_rows(tmp_path / "other", ["bf16"])
    assert alone == []
    (tmp_path / "bf16.json").unlink()
    assert math.isnan(accuracy_table.finished_rows(tmp_path, ["recipe"])[0]["recovered"])


def test_the_plot_takes_all_steps_and_seeds_of_a_row(tmp_path):
    rows = [("recipe", 150, 0.8), ("recipe@3", 150, 0.9), ("recipe-600", 600, 0.95), ("recipe-600@3", 600, 0.97),
            ("recipe-lr", 150, 0.1), ("no-ce", 150, 0.2)]  # fmt: skip
    lines = [{"row": row, "steps": str(steps), "recovered": str(value)} for row, steps, value in rows]

    assert accuracy_plot.series(lines, "recipe", "recovered") == {150: [0.8, 0.9], 600: [0.95, 0.97]}
    accuracy_plot.plot(lines, ["recipe", "no-ce"], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    with pytest.raises(UserError, match="'inc'"):
        accuracy_plot.plot(lines, ["inc"], tmp_path / "plot.png")


def test_a_row_that_was_not_measured_on_a_text_is_not_done(tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps({"perplexity": 2.0, "foreign_kl": 0.1}))

    assert accuracy_table.is_done(tmp_path, "recipe", ["foreign"])
    assert not accuracy_table.is_done(tmp_path, "recipe", ["foreign", "never"])
    assert not accuracy_table.is_done(tmp_path, "recipe-600", [])


def test_rows_of_another_text_are_not_taken_for_those_of_this_one(tmp_path):
    accuracy_table.check_texts(tmp_path, {"foreign": "a", "never": "b"})
    accuracy_table.check_texts(tmp_path, {"foreign": "a"})
    accuracy_table.check_texts(tmp_path, {"foreign": "a", "never": "b", "generic": "c"})
    for name, argument in (("never", "--never"), ("generic", "--generic"), ("foreign", "installed packages")):
        with pytest.raises(UserError, match=f"on another text for the column '{name}' .*{argument}"):
            accuracy_table.check_texts(tmp_path, {name: "other"})


def test_the_csv_has_of_each_row_what_it_was_measured_with(tmp_path):
    about = {"threads": "2", "versions": "v", "date": "2026-01-01"}
    rows = [{"row": key, "perplexity": 2.0, "device": key.upper(), "command": f"python {key}"} | about for key in "ab"]
    accuracy_table.write_csv(rows, tmp_path / "table.csv")
    with (tmp_path / "table.csv").open() as file:
        found = [(line["device"], line["command"], line["date"]) for line in csv.DictReader(file)]
    assert found == [("A", "python a", "2026-01-01"), ("B", "python b", "2026-01-01")]


def test_a_row_that_fails_ends_the_program_with_an_error(tmp_path, monkeypatch):
    (tmp_path / "bf16-model").mkdir()
    (tmp_path / "bf16-model" / "config.json").write_text("{}")
    monkeypatch.setattr("sys.argv", ["accuracy.py", "--model", "m", "--out", str(tmp_path), "--rows", "bf16",
                                     "--csv", str(tmp_path / "table.csv")])  # fmt: skip
    failed = SimpleNamespace(returncode=1, stderr="no memory")
    monkeypatch.setattr(accuracy, "subprocess", SimpleNamespace(run=lambda *_, **__: failed))

    with pytest.raises(UserError, match="not measured: bf16"):
        accuracy.main()


def test_a_training_that_a_signal_ends_is_no_row(tmp_path, monkeypatch):
    interrupted = SimpleNamespace(train=lambda: None, was_interrupted=True, exit_status=143)
    monkeypatch.setattr(accuracy, "QATTrainer", lambda **kwargs: interrupted)
    with pytest.raises(SystemExit) as raised:
        accuracy.train(None, None, {}, tmp_path, row_of("ce-30"))
    assert raised.value.code == 143
