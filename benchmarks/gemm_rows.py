"""Measured rows of the GEMM benchmark, compared: with the roof, and ours with the best of the peers.

In: rows as the benchmark's processes write them, and the card's roof. Out: the same rows with a fraction of
the roof, and ours with a ratio; tables of text.

    {"peer": "bitfold", "format": "int4[g128]", "n": 4096, "k": 4096, "m": 1, "us": 7.0, "bytes": 8.7e6, …}
    ->  … "roof": 0.40, "best": "tinygemm", "ratio": 1.1

A ratio is the best peer's time over ours: above 1 we are faster. Peers of a format are those that name it in
`beside`, and bf16 stands beside every format.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

OURS = "bitfold"
ALL = "all"
BANDS = {"M <= 16": (1, 16), "M = 32 to 256": (17, 256), "M = 1024": (257, 1024), "M = 4096": (1025, 4096)}
Row = dict[str, Any]


def finish(rows: Iterable[Row], roof: dict[str, float]) -> list[Row]:
    """Rows with `roof`, the fraction of it, and for ours `best` (a peer's name) and `ratio`."""
    done = [{**row, "roof": least_time(row, roof) / row["us"] if row["us"] else None} for row in rows]
    for row in done:
        if row["peer"] == OURS:
            best = best_peer(done, row["format"], row["n"], row["k"], row["m"])
            row["best"] = label(best) if best else None
            row["ratio"] = best["us"] / row["us"] if best and row["us"] else None
    return done


def least_time(row: Row, roof: dict[str, float]) -> float:
    """Microseconds that the card needs at least for this row's bytes, or for its products."""
    flops = 2 * row["m"] * row["n"] * row["k"] * row.get("products", 1)
    return max(row["bytes"] / roof["read"], flops / roof[row["compute"]]) * 1e6


def best_peer(rows: Sequence[Row], format: str, n: int, k: int, m: int) -> Row | None:
    """The fastest row that is not ours and does the work of this format."""
    found = [
        row
        for row in rows
        if row["peer"] != OURS and row["us"] and (row["n"], row["k"], row["m"]) == (n, k, m)
        and (ALL in row["beside"] or format in row["beside"])
    ]  # fmt: skip
    return min(found, key=lambda row: row["us"], default=None)


def label(row: Row) -> str:
    """bitfold int4[g128]; humming uint4; bf16 (where a peer has one format)."""
    return f"{row['peer']} {row['format']}".strip()


def shapes(rows: Iterable[Row]) -> list[tuple[int, int]]:
    return list(dict.fromkeys((row["n"], row["k"]) for row in rows))


def sizes(rows: Iterable[Row]) -> list[int]:
    return sorted({row["m"] for row in rows})


def labels(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(label(row) for row in rows))


def formats(rows: Iterable[Row]) -> list[str]:
    """Of ours, in the order measured."""
    return list(dict.fromkeys(row["format"] for row in rows if row["peer"] == OURS))


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values))


def band_lines(rows: Sequence[Row]) -> list[list[str]]:
    """[format, band, geometric mean of the ratio, least ratio and where, least fraction of the roof]."""
    lines = []
    for format in formats(rows):
        for band, (low, high) in BANDS.items():
            mine = [
                row
                for row in rows
                if row["peer"] == OURS
                and row["format"] == format
                and low <= row["m"] <= high
                and row["ratio"]
            ]
            if not mine:
                continue
            least = min(mine, key=lambda row: row["ratio"])
            where = f"{least['n']}x{least['k']} M={least['m']}, {least['best']}"
            mean = geometric_mean([row["ratio"] for row in mine])
            slowest = min(row["roof"] for row in mine)
            lines.append([format, band, f"{mean:.2f}x", f"{least['ratio']:.2f}x ({where})", f"{slowest:.0%}"])
    return lines


def time_lines(rows: Sequence[Row], n: int, k: int) -> list[list[str]]:
    """[label, microseconds at each M…] of one shape; "-" where there is no number."""
    mine = [row for row in rows if (row["n"], row["k"]) == (n, k)]
    times = {(label(row), row["m"]): row["us"] for row in mine}
    return [[name, *(_time(times.get((name, m))) for m in sizes(rows))] for name in labels(mine)]


def ratio_lines(rows: Sequence[Row], format: str) -> list[list[str]]:
    """[shape, "ratio, fraction of the roof" at each M…] of one of our formats."""
    found = {
        (row["n"], row["k"], row["m"]): row for row in rows if row["peer"] == OURS and row["format"] == format
    }
    return [
        [f"{n}x{k}", *(_ratio(found.get((n, k, m))) for m in sizes(rows))] for n, k in shapes(found.values())
    ]


def _time(us: float | None) -> str:
    if us is None:
        return "-"
    return f"{us:.1f}" if us < 1000 else f"{us:.0f}"


def _ratio(row: Row | None) -> str:
    if row is None or row["us"] is None:
        return "-"
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}x "
    return f"{ratio}{row['roof']:.0%}"
