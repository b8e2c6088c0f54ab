"""What the benchmarks of training on rounded numbers write: JSON beside and then renamed, curves, shares.

In: records and curves. Out: files, and the numbers that all of these benchmarks count in the same way.

    write(Path("out/qat.json"), record)
    draw([Curve("float", 0, losses), Curve("int4", 8, losses)], Path("out/qat.png"), "epoch", "loss")
    won_back(0.038, 0.047, 0.040)   ->   0.78 of the loss that rounding adds
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Curve:
    """Losses, one for each epoch or step from `first` on."""

    name: str
    first: int
    losses: Sequence[float]


def device_word() -> str:
    """The GPU's name as a part of a file's name, or cpu."""
    if not torch.cuda.is_available():
        return "cpu"
    return torch.cuda.get_device_name().lower().replace(" ", "-")


def write(path: Path, record: Any) -> None:
    """`record` as JSON at `path`, whose folder is made; a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part.json")
    beside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def draw(curves: Sequence[Curve], path: Path, across: str, up: str, every: int = 1) -> None:
    """The curves on a logarithmic scale, as PNG; each point a mean of `every` losses."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for curve in curves:
        starts = range(0, len(curve.losses), every)
        means = [statistics.fmean(curve.losses[at : at + every]) for at in starts]
        color = {"color": "#64748b"} if curve.name == "float" else {}
        axes.plot([curve.first + at + every for at in starts], means, label=curve.name, **color)
    axes.set_yscale("log")
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part.png")
    figure.savefig(beside, dpi=120)
    pyplot.close(figure)
    beside.replace(path)


def spread(values: Sequence[float]) -> list[float]:
    """[mean, standard deviation] over seeds."""
    return [statistics.fmean(values), statistics.pstdev(values)]


def won_back(floats: float, rounded: float, trained: float) -> float | None:
    """The share of what rounding adds to a loss that training takes off; None if rounding adds nothing."""
    return (rounded - trained) / (rounded - floats) if rounded > floats else None
