"""The table of benchmarks/ptq.py, from its JSON.

In: the record of a run. Out: Markdown, a block of rows for each format.

    python benchmarks/ptq_table.py benchmarks/results/ptq-nvidia-h200.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HEAD = "| format | algorithm | bits | test perplexity | change | won back | divergence | minutes | memory |"


def table(record: dict[str, Any]) -> str:
    """Markdown. `won back`: of what rounding adds to the perplexity, where that is 2 % or more in bold."""
    low, high = record["float"]["interval"]
    other = "" if record.get("same text", True) else " **These texts are not those of the model.**"
    lines = [
        f"Float: {record['float']['test']:.3f} ({low:.2f} to {high:.2f}).{other}",
        "",
        HEAD,
        "| --- | --- | ---: | --- | ---: | --- | ---: | ---: | ---: |",
    ]
    lost: dict[str, float] = {
        row["format"]: row["change"] for row in record["rows"] if row["algorithm"] == "rounding"
    }
    lines += [_line(row, lost[row["format"]]) for row in record["rows"]]
    return "\n".join(lines)


def _line(row: dict[str, Any], lost: float) -> str:
    low, high = row["interval"]
    share = ""
    if "won" in row:
        first, last = row["won_interval"]
        share = f"{row['won']:.0%} ({first:.0%} to {last:.0%})"
        share = f"**{share}**" if lost >= 0.02 else share
    # Of the float model's predictions, in thousandths of a nat: has no sampling noise of the text's own.
    apart = f"{1000 * row['divergence']:.2f}" if "divergence" in row else ""
    if "won_divergence" in row:
        less = row["won_divergence"]
        apart += f" ({abs(less):.0%} {'less' if less >= 0 else 'more'})"
    variant = f" (`{row['variant']}`)" if row["variant"] else ""
    return (
        f"| {row['format']} | {row['algorithm']}{variant} | {row['bits']:.2f} | "
        f"{row['perplexity']:.3f} ({low:.2f} to {high:.2f}) | {row['change']:+.2%} | {share} | "
        f"{apart} | {row['seconds'] / 60:.2f} | {row['peak_mib']:.0f} MiB |"
    )


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
