"""Print the quickstart's results: a table, a plot, and the paths of models and logs."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import matplotlib

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qat.command_line import OneLineParser  # noqa: E402
from qat.errors import UserError, reported_in_one_line  # noqa: E402
from qat.files.paths import check_writable_file  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

NAMES = {
    "bf16": "BF16",
    "mxfp4-untrained": "MXFP4 before QAT",
    "mxfp4-qat": "MXFP4 after QAT",
    "mxfp4-packed": "MXFP4 packed, as served",
}


def main(out: Path) -> None:
    """Read the stages in `out`, print the table and draw `out/losses.png`.

    Raises:
        UserError: a stage has not finished there, or the plot cannot be written.
    """
    loss = {name: eval_loss(out / name / "all_results.json") for name in NAMES}
    check_writable_file("the plot", out / "losses.png")
    lost = loss["mxfp4-untrained"] - loss["bf16"]
    recovered = {name: (loss["mxfp4-untrained"] - loss[name]) / lost for name in ("mxfp4-qat", "mxfp4-packed")}

    print(f"\n{'model':<24}{'perplexity':>12}{'loss recovered':>18}")
    for name, title in NAMES.items():
        fraction = f"{recovered[name]:.0%}" if name in recovered else ""
        print(f"{title:<24}{math.exp(loss[name]):>12.2f}{fraction:>18}")
    draw(out, loss)
    print(f"\nmodels      {out / 'bf16'}  and  {out / 'mxfp4-qat'}")
    print(f"plot        {out / 'losses.png'}")
    print(f"logs        tensorboard --logdir {out}")
    print(f"serve       vllm serve {out / 'mxfp4-qat' / 'MXFP4'}      (docs/serving.md: which hardware computes what)")


def draw(out: Path, loss: dict[str, float]) -> None:
    """Training losses of both trained stages over steps, evaluation losses as dashed lines."""
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    offset = 0
    curves = (("bf16", "tab:blue", "BF16: cross-entropy"), ("mxfp4-qat", "tab:orange", "QAT: distillation loss"))
    for name, color, label in curves:
        log = read_json(out / name / "trainer_state.json")["log_history"]
        points = [(entry["step"] + offset, entry["loss"]) for entry in log if "loss" in entry]
        axis.plot(*zip(*points, strict=True), color=color, label=f"{label}, training", linewidth=1)
        offset = points[-1][0]
    for name, color in zip(NAMES, ("tab:blue", "tab:red", "tab:orange"), strict=False):
        axis.axhline(loss[name], color=color, linestyle="--", linewidth=1)
        axis.annotate(
            f"{NAMES[name]}: {loss[name]:.2f} held out", (offset, loss[name]), ha="right", va="bottom", color=color
        )
    axis.set(title="SmolLM2-135M, python-docs", xlabel="optimizer step (BF16, then QAT)", ylabel="nats per token")
    axis.legend(loc="lower left")
    figure.savefig(out / "losses.png", dpi=120)


def eval_loss(path: Path) -> float:
    """The evaluation loss of a finished stage.

    Raises:
        UserError: there is none.
    """
    try:
        return read_json(path)["eval_loss"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} has no eval_loss; run scripts/quickstart.sh again") from error


def read_json(path: Path):
    """The content of a JSON file.

    Raises:
        UserError: it is not there, or is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"{path} cannot be read ({reason}); give the output folder of a finished scripts/quickstart.sh"
        ) from error


def parse(argv: list[str] | None = None) -> Path:
    """The command line; a wrong one ends the program with one line."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the output folder of scripts/quickstart.sh")
    return parser.parse_args(argv).folder


if __name__ == "__main__":
    with reported_in_one_line():
        main(parse())
