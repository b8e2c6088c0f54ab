"""The GEMM benchmark's JSON as a table in Markdown and as a plot, PNG and SVG.

In: one or more JSON files of `gemm.py`, of one card. Out: gemm-<card>.md, .png, .svg and .json (the rows of
all files together; of rows measured twice, those of the later file).

    python benchmarks/plot_gemm.py gemm.json        ->   benchmarks/results/gemm-nvidia-h200.{md,png,svg,json}
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from gemm_rows import (
    ALL,
    OURS,
    Row,
    band_lines,
    best_peer,
    finish,
    formats,
    label,
    labels,
    least_time,
    ratio_lines,
    shapes,
    sizes,
    time_lines,
)  # fmt: skip

RESULTS = Path(__file__).parent / "results"
ACCENT, REST = "#c2410c", ["#1d4ed8", "#0f766e", "#7c3aed", "#64748b", "#a16207", "#be185d", "#0891b2"]


def merged(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One result of several, compared anew; the roof is the first file's."""
    cards = {one["card"] for one in found}
    if len(cards) != 1:
        raise SystemExit(
            f"results of one card go together, not of {', '.join(sorted(cards))}; plot each alone"
        )
    rows: dict[Any, Row] = {}
    for one in found:
        rows.update({(row["peer"], row["format"], row["n"], row["k"], row["m"]): row for row in one["rows"]})
    absent = {name: reason for one in found for name, reason in one["absent"].items()}
    return {**found[0], "absent": absent, "rows": finish(rows.values(), found[0]["roof"])}


def markdown(found: dict[str, Any]) -> str:
    """The whole page."""
    rows, speeds = found["rows"], found["roof"]
    versions = ", ".join(f"{name} {found[name]}" for name in ("torch", "triton", "cuda", "driver"))
    heads = [f"M={m}" for m in sizes(rows)]
    page = [
        f"# GEMM with quantized weights on {found['card']}",
        f"{versions}. Read bandwidth {speeds['read'] / 1e12:.2f} TB/s, products {speeds['bf16'] / 1e12:.0f} "
        f"TFLOP/s in bf16, {speeds['fp8'] / 1e12:.0f} in fp8, {speeds['int8'] / 1e12:.0f} TOP/s in int8, all "
        "measured in the same run. Weights rotated past the L2, CUDA-graph replays, medians.",
        "## Against the best peer",
        "The best peer's time over ours (above 1 we are faster); peers of a format store as many bits, and "
        "bf16 is always among them.",
        grid(["format", "rows", "geometric mean", "least", "least fraction of the roof"], band_lines(rows)),
    ]
    for format in formats(rows):
        page += [
            f"### {format}: ratio, and fraction of the roof",
            grid(["N x K", *heads], ratio_lines(rows, format)),
        ]
    page.append("## Microseconds")
    for n, k in shapes(rows):
        page += [f"### {n} x {k}", grid(["", *heads], time_lines(rows, n, k))]
    wrong = [
        f"- {label(row)}, {row['n']}x{row['k']}, M={row['m']}: {row['failed']}"
        for row in rows
        if row.get("failed")
    ]
    absent = [f"- {name}: {reason}" for name, reason in found["absent"].items()]
    if wrong or absent:
        page += ["## Without a number", "\n".join(wrong + absent)]
    return "\n\n".join(page) + "\n"


def grid(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rule = ["---" if i == 0 else "---:" for i in range(len(heads))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [heads, rule, *lines])


def plot(found: dict[str, Any], stem: Path) -> None:
    """Above: times over the roof of one format's contenders, a panel for each shape that it was measured at.
    Below: formats of ours beside their best peers, at the least M of the shape that has most of them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = found["rows"]
    names = formats(rows)
    main = names[0] if names else ""
    sides = shapes([row for row in rows if row["peer"] == OURS and row["format"] == main])
    figure = pyplot.figure(figsize=(4.2 * max(len(sides), 2), 8.5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1.1, 1])
    panels = above.subplots(1, len(sides), sharey=True, squeeze=False)[0]
    above.suptitle(
        f"{found['card']}: time over the roof, {main} and its peers (lower is better, 1 is the card)"
    )
    peers = labels([row for row in rows if main in row["beside"] or ALL in row["beside"]])
    styles: dict[str, Any] = {name: {"color": color} for name, color in zip(peers, cycle(REST), strict=False)}
    styles[f"{OURS} {main}"] = {"color": ACCENT, "linewidth": 2.6, "zorder": 3}
    lines: dict[str, Any] = {}
    for panel, (n, k) in zip(panels, sides, strict=True):
        here = [row for row in rows if (row["n"], row["k"]) == (n, k)]
        ours = [row for row in here if row["peer"] == OURS and row["format"] == main]
        lines |= _panel(panel, here, styles, {row["m"]: least_time(row, found["roof"]) for row in ours})
    panels[0].set_ylabel("time / roof")
    above.legend(
        lines.values(), lines.keys(), loc="outside lower center", ncols=min(len(lines), 6) or 1, frameon=False
    )
    _bars(below.subplots(), rows)
    for ending in ("png", "svg"):
        figure.savefig(stem.with_suffix(f".{ending}"), dpi=130)
    pyplot.close(figure)


def _panel(
    panel: Any, rows: Sequence[Row], styles: dict[str, Any], least: dict[int, float]
) -> dict[str, Any]:
    """One shape; `least` is the roof of our format's bytes at each M, so that all lines share it."""
    drawn = {}
    for name, style in styles.items():
        mine = [row for row in rows if label(row) == name and row["us"] and row["m"] in least]
        points = sorted((row["m"], row["us"] / least[row["m"]]) for row in mine)
        if points:
            (drawn[name],) = panel.plot(*zip(*points, strict=True), marker="o", markersize=3.5, **style)
    n, k = shapes(rows)[0]
    panel.set(title=f"{n} x {k}", xlabel="M", xscale="log", yscale="log")
    panel.set_xticks(sizes(rows), [str(m) for m in sizes(rows)], fontsize=7)
    panel.set_yticks([1, 1.5, 2, 3, 5, 10, 20, 40], ["1", "1.5", "2", "3", "5", "10", "20", "40"])
    panel.minorticks_off()
    panel.grid(alpha=0.25)
    return drawn


def _bars(panel: Any, rows: Sequence[Row]) -> None:
    mine = [row for row in rows if row["peer"] == OURS]
    if not mine:
        return
    m = sizes(mine)[0]
    at = {side: [r for r in mine if (r["n"], r["k"], r["m"]) == (*side, m)] for side in shapes(mine)}
    n, k = max(at, key=lambda side: len(at[side]))
    ours = {row["format"]: row for row in at[n, k]}
    names = list(ours)
    for i, name in enumerate(names):
        best = best_peer(rows, name, n, k, m)
        for row, color, shift in ((ours.get(name), ACCENT, -0.2), (best, REST[3], 0.2)):
            if row is None or not row["us"]:
                continue
            panel.bar(i + shift, row["us"], 0.38, color=color)
            text = (
                f"{row['us']:.1f}\n{row['roof']:.0%}"
                if row["peer"] == OURS
                else f"{row['us']:.1f}\n{label(row)}"
            )
            panel.text(i + shift, row["us"], text, ha="center", va="bottom", fontsize=6.5)
    panel.set_xticks(range(len(names)), [name.replace(", ", ",\n") for name in names], fontsize=8)
    panel.set_title(
        f"{n} x {k}, M = {m}: microseconds and fraction of the roof (left bitfold, right the best peer)"
    )
    panel.set_ylabel("microseconds")
    panel.margins(y=0.18)
    panel.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("--name", help="of these runs, after the card's")
    given = parser.parse_args()
    found = merged([json.loads(file.read_text()) for file in given.files])
    given.folder.mkdir(parents=True, exist_ok=True)
    name = f"-{given.name}" if given.name else ""
    stem = given.folder / f"gemm-{found['card'].lower().replace(' ', '-')}{name}"
    stem.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    stem.with_suffix(".md").write_text(markdown(found))
    plot(found, stem)
    print(f"wrote {stem}.md, .json, .png, .svg")


if __name__ == "__main__":
    main()
