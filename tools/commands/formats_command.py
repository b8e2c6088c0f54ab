"""List the formats, or describe some: bits a number, range, how the scale is chosen, where it is defined.

bitfold formats                         every format that has a name
bitfold formats 'int4[g128]' nf4        these, with every value that a code can stand for
"""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from ...formats import Format, describe, format
from .shared import plain, say

ABOUT = "list the formats, or describe one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("format", nargs="*", metavar="FORMAT", help="a text such as int4[g128] or mxfp4")


def run(arguments: argparse.Namespace, console: Console) -> None:
    texts: list[str] = arguments.format
    found = [format(text) for text in texts]
    if not texts:
        console.print(_table())
        say(
            console,
            "\nMore are spelled than are named: int4[g64], uint4[row,zero], float5_e2m2[g32] ...",
        )
    for text, what in zip(texts, found, strict=True):
        say(console, _details(text, what))


def _table() -> Table:
    table = Table(box=None, pad_edge=False)
    for head in ("format", "stands for", "bits", "range", "source"):
        table.add_column(head, justify="right" if head == "bits" else "left")
    for row in describe():
        cells = (row.name, row.stands_for, f"{row.bits:.4g}", row.range, row.source)
        table.add_row(*map(plain, cells))
    return table


def _details(text: str, what: Format) -> str:
    """The stored tensors, their bytes for a weight of a usual size, and the values of every code."""
    row = describe([text])[0]
    bits = what.bits_per_element((4096, 4096))
    values = what.element.values()
    shown = " ".join(f"{value:g}" for value in values[:64])
    more = f" ... ({len(values)} in all)" if len(values) > 64 else ""
    lines = (
        f"{text}",
        f"  stands for   {row.stands_for} ({row.source})",
        f"  scale        {row.rule}",
        f"  stored as    {', '.join(what.parts)}; layout {what.layout}",
        f"  a weight     4096x4096 takes {bits * 2:.2f} MiB, {32 / bits:.1f} times less than float32",
        f"  codes        {shown}{more}",
    )
    return "\n".join(lines) + "\n"
