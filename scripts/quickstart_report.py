"""Print the quickstart's results: a table, a plot, and the paths of models and logs."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAMES = {
    "bf16": "BF16",
    "mxfp4-untrained": "MXFP4 before QAT",
    "mxfp4-qat": "MXFP4 after QAT",
    "mxfp4-packed": "MXFP4 packed, as served",
}


def main(out: Path) -> None:
    """Read the stages in `out`, print the table and draw `out/losses.png`."""
    loss = {name: read_json(out / name / "all_results.json")["eval_loss"] for name in NAMES}
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


def read_json(path: Path) -> dict:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the output folder of scripts/quickstart.sh")
    main(parser.parse_args().folder)
