"""Tables of training on rounded numbers, as Markdown: what `benchmarks/qat*.py` wrote.

In: a record of `benchmarks/results/` and the link to it. Out: the sentence that says the machine, the raw
output and the script, and the table, as those of `tables.py`, which lists these.
"""

from __future__ import annotations

from typing import Any

from markdown_table import table


def qat_lm(record: dict[str, Any], raw: str) -> str:
    """Perplexities of the language model, and the share of what rounding takes that is won back."""
    rows, options = record["summary"], record["options"]
    floats = rows["float"]
    lines = []
    for name, row in rows.items():
        if name == "float":
            continue
        shares = (row["recovered"], row["recovered_strictly"], row["recovered_longer"])
        trained = "{:.3f} ± {:.3f}".format(*row["trained"])
        solved = (f"{row['solved']:.3f}", _share(row["solved_recovered"]))
        lines.append([f"`{name}`", f"{row['rounded']:.3f}", *solved, trained, *map(_share, shares)])
    algorithm = next(row["algorithm"] for name, row in rows.items() if name != "float")
    head = ["weights", "rounded", f"`{algorithm}`", "won back", "trained", "won back"]
    longer, seeds = len(record["float"]["runs"]), max(row.get("seeds", 0) for row in rows.values())
    return (
        f"{record['card']}, torch {record['torch']}, {options['steps']} steps, {seeds} seeds; "
        f"in floats {floats['base']:.3f} (base) and "
        f"{floats['longer'][0]:.3f} ± {floats['longer'][1]:.3f} (longer, {longer} seeds) "
        f"({raw}, `python benchmarks/qat_lm.py`):\n\n"
        + table([*head, "of the better float", "of longer"], lines)
    )


def qat_step(record: dict[str, Any], raw: str) -> str:
    """Time and memory of a step, of the float step's."""
    rows = [
        [
            f"{row['way']}",
            f"{row['milliseconds']:.1f} ms",
            f"{row['time_ratio']:.2f}x",
            f"{row['memory_ratio']:.2f}x",
        ]
        for row in record["rows"]
        if "milliseconds" in row
    ]
    size = record["options"]
    return (
        f"{record['card']}, torch {record['torch']}, {size['blocks']} blocks of width {size['width']}, "
        f"{size['batch']} x {size['sequence']} tokens, bfloat16 ({raw}, `python benchmarks/qat_step.py`):\n\n"
        + table(["step", "median", "time", "memory"], rows)
    )


def qat_images(record: dict[str, Any], raw: str) -> str:
    """Accuracy and loss of a classifier of images."""

    def cells(row: dict[str, Any]) -> list[str]:
        return ["{:.2f} ± {:.2f}".format(*row["accuracy"]), "{:.4f} ± {:.4f}".format(*row["loss"])]

    rows = record["summary"]
    lines = [["float", *cells(rows["float"]), ""]]
    for name, row in rows.items():
        if name != "float":
            lines.append([f"{name}, rounded", *cells(row["rounded"]), ""])
            lines.append([f"{name}, trained", *cells(row["trained"]), _share(row["recovered"])])
    return (
        f"{record.get('device', 'cpu')}, torch {record['torch']}, {len(record['runs'])} seeds, "
        f"{record['epochs']} epochs in floats and as many rounded ({raw}, `python benchmarks/qat.py`):\n\n"
        + table(["", "accuracy, %", "loss", "won back"], lines)
    )


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
