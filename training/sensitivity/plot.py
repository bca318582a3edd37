"""The picture of a sensitivity measurement: a map of the model, and what the proposed mixture is worth."""

from __future__ import annotations

import math
from pathlib import Path

from ..monitoring.layer_groups import block_of


def draw(result: dict, path: Path) -> None:
    """Write a PNG from the content of `mapping.json`.

    On the left the KL of each unit by block and projection, dots where the wide scheme was chosen; on the right the KL
    of the whole model in the narrow, the mixed and the wide scheme.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    narrow = next(iter(result["kl"]))
    cells = {(_kind(unit["name"]), block_of(unit["name"] + ".")[1] or 0): unit for unit in result["units"]}
    kinds = sorted({kind for kind, _ in cells})
    blocks = range(max(block for _, block in cells) + 1)
    values = [[_kl(cells.get((kind, block)), narrow) for block in blocks] for kind in kinds]

    size = (max(7, 3 + 0.28 * len(blocks)) + 4, max(3.2, 1.8 + 0.5 * len(kinds)))
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=size, layout="constrained", width_ratios=[max(2, len(blocks) / 8), 1]
    )
    positive = [value for row in values for value in row if value > 0]
    norm = matplotlib.colors.LogNorm(min(positive), max(positive)) if len(set(positive)) > 1 else None
    image = left.imshow(values, aspect="auto", norm=norm, cmap="viridis_r")
    chosen = [(block, kinds.index(kind)) for (kind, block), unit in cells.items() if unit["wide"]]
    if chosen:
        left.scatter(*zip(*chosen, strict=True), s=14, color="tab:red", label="wide scheme")
        left.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, borderpad=0)
    left.set(xlabel="block", yticks=range(len(kinds)), yticklabels=kinds)
    left.xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=left, label=f"KL, unit alone in {narrow}\nnats a token")

    bars = right.bar(list(result["kl"]), list(result["kl"].values()), color=["tab:blue", "tab:orange", "tab:green"])
    right.bar_label(bars, fmt="%.3g")
    right.set(title=f"whole model\nmixed: {result['bits_per_weight']:.2f} bits a weight", ylabel="KL, nats a token")
    right.margins(y=0.12)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _kind(name: str) -> str:
    block, _ = block_of(name + ".")
    rest = name.removeprefix(block or "").lstrip(".")
    return rest or "block"


def _kl(unit: dict | None, scheme: str) -> float:
    return math.nan if unit is None else unit["kl"][scheme]
