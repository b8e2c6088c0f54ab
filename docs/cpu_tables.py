"""Tables of CPU kernels, as Markdown: bytes a second beside reading alone, and instructions a weight.

In: a record of `benchmarks/results/` and the link to it. Out: the sentence that says the machine, the raw
output and the script, and the table, as those of `tables.py`, which lists these.
"""

from __future__ import annotations

import statistics
from typing import Any

from markdown_table import table


def cpu_pages(record: dict[str, Any], raw: str) -> str:
    """What kernels on one row of x read a second, of what reading alone does in the same round."""
    alone, rows = record["read"], record["rows"]
    lines = []
    for row in rows:
        cells = [row["format"]]
        for pages in ("small", "large"):
            share = statistics.median(a / b for a, b in zip(row[pages], alone[pages], strict=True))
            cells += [f"{max(row[pages]) / 1e9:.1f} GB/s", f"{share:.0%}"]
        lines.append(cells)
    n, k = rows[0]["n"], rows[0]["k"]
    return (
        f"{record['machine']}, {record['vectors']}, {record['threads']} threads, {n} x {k}, M = 1 ({raw}, "
        f"`python benchmarks/cpu_pages.py {n}x{k}`). Reading alone: {max(alone['small']) / 1e9:.1f} GB/s in "
        f"pages of 4 KiB, {max(alone['large']) / 1e9:.1f} in pages of 2 MiB, the best of "
        f"{len(alone['small'])} rounds; shares are medians over rounds:\n\n"
        + table(["weight", "small pages", "of reading", "large pages", "of reading"], lines)
    )


def cpu_instructions(record: dict[str, Any], raw: str) -> str:
    """Instructions a weight of whole calls on one row of x, by the numbers of a row."""
    rows = record["rows"]
    lengths = list(dict.fromkeys(row["k"] for row in rows))
    found = {(row["format"], row["k"]): f"{row['instructions']:.2f}" for row in rows}
    lines = [
        [name, *(found.get((name, k), "") for k in lengths)]
        for name in dict.fromkeys(row["format"] for row in rows)
    ]
    return (
        f"Instructions a weight of one row of x, {record['vectors']}, counted by valgrind ({raw}, "
        "`python benchmarks/cpu_instructions.py`), by numbers in a row:\n\n"
        + table(["weight", *map(str, lengths)], lines)
    )
