"""What Nsight Compute says of skinny kernels' loops, in a few lines each.

In: two pages of a profile of kernels launched one after another, and what these are called. Out: text.

    ncu --import m1.ncu-rep --page details > m1.details.txt
    ncu --import s1.ncu-rep --page source --csv > s1.source.csv
    python benchmarks/ncu_summary.py m1.details.txt s1.source.csv "int4[g128] m8 n64 w2 s3 k1 sum o1" ...

    int4[g128] m8 n64 w2 s3 k1 sum o1
        20.86 us alone and cold; 448 programs; 123 registers; 6.43 warps a multiprocessor, 1.65 a scheduler
        ...

A turn of the loop is what a warp does for one run of codes: its instructions times the cycles from one to the
next of the same warp. Waits are shares of the samples in the loop; `selected` is no wait but an instruction
issued, and `long_sb` is the memory.
"""

from __future__ import annotations

import csv
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

SHOWN = 8
# A loop has more instructions than anything else that as many warps run as often.
LEAST = 40


def kernels(page: str) -> list[dict[str, str]]:
    """Of each kernel of a page of details: metric -> value."""
    return [
        {line[1]: line[2] for line in re.finditer(r"^ {4}(\S.*?)  +.*?(\S+)$", part, re.MULTILINE)}
        for part in re.split(r"^  \S+ \(\d+, \d+, \d+\)x", page, flags=re.MULTILINE)[1:]
    ]


def listings(path: Path) -> Iterator[list[dict[str, str]]]:
    """Of each kernel of a page of sources: its instructions, by column."""
    found: list[dict[str, str]] = []
    head: list[str] = []
    for row in csv.reader(path.open(encoding="utf-8")):
        if row[:1] == ["Kernel Name"] and found:
            yield found
            found = []
        elif row[:1] == ["Address"]:
            head = row
        elif row and row[0].startswith("0x"):
            found.append(dict(zip(head, row, strict=False)))
    yield found


def loop(listing: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The instructions that are executed most often."""
    times = Counter(int(row["Instructions Executed"]) for row in listing)
    most = max(count for count, many in times.items() if many > LEAST)
    return [row for row in listing if int(row["Instructions Executed"]) == most]


def operation(row: dict[str, str]) -> str:
    """`@!P0 LOP3.LUT R1, ..`   ->   LOP3"""
    words = row["Source"].split()
    return words[words[0].startswith("@")].split(".")[0]


def summary(name: str, details: dict[str, str], listing: Sequence[dict[str, str]]) -> str:
    """Lines on one kernel."""
    body = loop(listing)
    waits = Counter[str]()
    for column in (c for c in body[0] if c.startswith("stall_") and "(" not in c):
        waits[column.removeprefix("stall_")] = sum(int(row[column] or 0) for row in body)
    samples = sum(int(row["# Samples"]) for row in body)
    cycles = float(details["Warp Cycles Per Issued Instruction"])
    turn = len(body) * cycles / (1000 * float(details["SM Frequency"]))
    shares = ", ".join(f"{kind} {100 * count / samples:.0f} %" for kind, count in waits.most_common(SHOWN))
    kinds = ", ".join(f"{kind} {count}" for kind, count in Counter(map(operation, body)).most_common(SHOWN))
    return "\n    ".join(
        (
            name,
            f"{details['Duration']} us alone and cold; {details['Grid Size']} programs; "
            f"{details['Registers Per Thread']} registers; {details['Achieved Active Warps Per SM']} warps a "
            f"multiprocessor, {details['Active Warps Per Scheduler']} a scheduler",
            f"a warp issues every {cycles} cycles, a scheduler in {details['One or More Eligible']} % of "
            f"them; memory at {details['DRAM Throughput']} % of its peak",
            f"loop: {len(body)} instructions, a turn takes {turn:.2f} us: {kinds}",
            f"samples in the loop: {shares}",
        )
    )


def main() -> None:
    page, sources, *names = sys.argv[1:]
    found = kernels(Path(page).read_text(encoding="utf-8"))
    for name, details, listing in zip(names, found, listings(Path(sources)), strict=True):
        print(summary(name, details, listing))


if __name__ == "__main__":
    main()
