"""The roofline of a model's kernels, and recipes against each other, as PNG files. Needs matplotlib.

In: an `Inspection`; points of recipes. Out: files.

    roofline(found, "roof.png");  pareto(points({"int8": a, "int4": b}), "recipes.png")
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..formats import BitfoldError
from .inspection import Inspection
from .pareto import Point
from .text_file import write_bytes


def _axes() -> tuple[Any, Any]:
    try:
        import matplotlib
    except ImportError as error:
        raise BitfoldError("plots are drawn by matplotlib: run `pip install 'bitfold[plots]'`") from error
    matplotlib.use("Agg")  # no window: the file is all that is wanted
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.6), dpi=120, layout="constrained")
    return figure, axes


def roofline(found: Inspection, path: str | os.PathLike[str]) -> Path:
    """Every timed kernel under the roof of its device. BitfoldError if there is none."""
    timed = [
        (name, done)
        for name, done in found.work.items()
        if name in found.kernels and done.seconds and done.flops and done.bytes
    ]
    if found.roof is None or not timed:
        raise BitfoldError("there is no timed kernel to draw; inspect a lowered pipeline with runs above 0")
    figure, axes = _axes()
    intensity = [done.flops / done.bytes for _, done in timed]
    reached = [done.flops / (done.seconds or 1.0) for _, done in timed]
    ends = sorted(
        [min(*intensity, found.roof.ridge) / 3, found.roof.ridge, max(*intensity, found.roof.ridge) * 3]
    )
    axes.loglog(
        ends, [min(found.roof.flops, found.roof.read * x) for x in ends], color="#d9480f", label="roof"
    )
    for kind in sorted({found.kernels[name].spec.split(" ")[0] for name, _ in timed}):
        mine = [i for i, (name, _) in enumerate(timed) if found.kernels[name].spec.startswith(kind)]
        axes.loglog([intensity[i] for i in mine], [reached[i] for i in mine], "o", alpha=0.6, label=kind)
    axes.set_xlabel("operations for each byte moved")
    axes.set_ylabel("operations a second")
    axes.set_title(f"{len(timed)} kernels, {found.roof.name}", parse_math=False, fontsize=10)
    return _write(figure, axes, path)


def pareto(points: Sequence[Point], path: str | os.PathLike[str]) -> Path:
    """Bits against error, time as the size of a point; the front as a line. BitfoldError without two
    points."""
    shown = [one for one in points if math.isfinite(one.sqnr_db)]
    if len(shown) < 2:
        raise BitfoldError(
            "recipes are compared from two on whose result differs from the unquantized model's"
        )
    figure, axes = _axes()
    slowest = max((one.seconds or 0.0 for one in shown), default=0.0)
    sizes = [30 + 220 * (one.seconds or 0.0) / slowest if slowest else 60 for one in shown]
    colours = ["#0b5fcc" if one.front else "#98a1ad" for one in shown]
    axes.scatter([one.bits for one in shown], [one.sqnr_db for one in shown], s=sizes, c=colours, alpha=0.75)
    front = [one for one in shown if one.front]
    axes.plot([one.bits for one in front], [one.sqnr_db for one in front], color="#0b5fcc", label="front")
    for one in shown:
        place = (one.bits, one.sqnr_db)
        axes.annotate(
            one.recipe, place, xytext=(7, 4), textcoords="offset points", fontsize=8, parse_math=False
        )
    axes.set_xlabel("bits for each weight")
    axes.set_ylabel("signal to noise of the result, dB")
    axes.set_title("larger points take longer" if slowest else "not timed", fontsize=10)
    return _write(figure, axes, path)


def search_front(
    front: Sequence[tuple[float, float]],
    uniform: Mapping[str, tuple[float, float]],
    path: str | os.PathLike[str],
    loss: str = "divergence of the predictions, nats",
) -> Path:
    """What `bf.search` can have: (bits, loss) of its best recipes as a line, recipes of one format as
    points."""
    if len(front) < 2:
        raise BitfoldError("a front has two recipes at least")
    figure, axes = _axes()
    axes.semilogy([bits for bits, _ in front], [loss for _, loss in front], color="#0b5fcc", label="search")
    axes.scatter(*zip(*uniform.values(), strict=True), c="#98a1ad", label="one format")
    for name, place in uniform.items():
        axes.annotate(name, place, xytext=(7, 4), textcoords="offset points", fontsize=8, parse_math=False)
    axes.set_xlabel("bits for each weight")
    axes.set_ylabel(loss)
    return _write(figure, axes, path)


def _write(figure: Any, axes: Any, path: str | os.PathLike[str]) -> Path:
    axes.margins(0.1)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    from matplotlib import pyplot

    pyplot.close(figure)
    return write_bytes(path, buffer.getvalue())
