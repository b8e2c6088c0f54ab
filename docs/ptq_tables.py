"""Tables of algorithms and of searches, as Markdown: what `benchmarks/ptq.py` and `search.py` wrote.

In: a record of `benchmarks/results/` and the link to it. Out: the sentence that says the machine, the raw
output, the script and what it was asked, and the table, as those of `tables.py`, which lists these.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from markdown_table import table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))


def ptq(record: dict[str, Any], raw: str) -> str:
    """All of a run of `benchmarks/ptq.py`."""
    from ptq_table import table as whole

    return (
        f"{record['where']['device']}, {record['windows']['test'][0]} windows of test text, "
        f"{record['asked']['calibration']} of calibration ({raw}, {_asked(record)}). " + whole(record) + "\n"
    )


def ptq_short(record: dict[str, Any], raw: str) -> str:
    """Three numbers a format: what rounding, GPTQ alone, and the best by the validation text lose."""
    by_format: dict[str, dict[str, Any]] = {}
    for row in record["rows"]:
        by_format.setdefault(row["format"], {})[row["algorithm"]] = row
    rows = [
        [
            f"`{name}`",
            f"{ways['rounding']['bits']:.2f}",
            f"{ways['rounding']['change']:+.2%}",
            f"{ways['gptq']['change']:+.2%}",
            f"{ways['best']['change']:+.2%} (`{ways['best']['variant']}`)",
            f"{ways['best']['won_divergence']:.0%}",
        ]
        for name, ways in by_format.items()
        if {"rounding", "gptq", "best"} <= set(ways)
    ]
    head = ("format", "bits", "rounding", "`gptq`", "best", "less divergence")
    return (
        f"{record['where']['device']}, perplexity {record['float']['test']:.2f} in floats "
        f"({raw}, {_asked(record)}):\n\n" + table(head, rows)
    )


def _asked(record: dict[str, Any]) -> str:
    """The command, and among which variants the best is the best."""
    asked = record["asked"]
    words = ["--first"] if asked["first"] else []
    words += [f"--{name} {asked[name]}" for name in ("batch", "processes")]
    among = "the first variant of each algorithm alone" if asked["first"] else "every variant"
    return f"`python benchmarks/ptq.py {' '.join(words)}`; {among}"


def search_sizes(record: dict[str, Any], raw: str) -> str:
    """Recipes of `bf.search` against one format everywhere, of the same size."""
    asked, seconds = record["asked"], record["seconds"]

    def both(pair: tuple[float, float]) -> str:
        return f"{pair[0]:.3f} ({1e3 * pair[1]:.1f})"

    ways = ("uniform", "measured", "trace")
    lines = [
        [f"`{row['format']}`", f"{row['bits']:.2f}", *(both(row[way]) for way in ways)]
        for row in record["rows"]
    ]
    head = ["size of", "bits", "that format everywhere", "search, measured", "search, by trace"]
    options = f"--windows {asked['windows']} --judge {asked['judge']}"
    return (
        f"{record['where']['device']}, layers measured on {asked['windows']} windows of training text, "
        f"recipes on {asked['judge']} of validation text; perplexity, and divergence in thousandths of a nat "
        f"({raw}, `python benchmarks/search.py {options}`). The traces took "
        f"{seconds['trace'] / seconds['measured']:.2f} of the measured table's time:\n\n" + table(head, lines)
    )


def search_times(record: dict[str, Any], raw: str) -> str:
    """What recipes for a time were predicted to take, and took: the share by which the prediction is off."""
    lines = [
        [
            ", ".join(f"{count} in `{text}`" for text, count in row["layers"].items()),
            f"{row['predicted'] / record['times'][0]['predicted']:.3f}",
            f"{row['measured'] / record['times'][0]['measured']:.3f}",
            f"{row['predicted'] / row['measured'] - 1:+.1%}",
        ]
        for row in record["times"]
    ]
    head = ["layers", "predicted, of the first", "measured, of the first", "the prediction is off by"]
    tokens = record["asked"]["tokens"][-1]
    return (
        f"{record['where']['device']}, {record['where']['threads']} threads, {tokens} tokens of a decoder of "
        f"67 M weights ({raw}, `python benchmarks/search.py --seconds --wide`):\n\n" + table(head, lines)
    )
