"""An explanation on a terminal.

In: an `Explanation`, a rich console. Out: lines: what to look at first, the tree of modules, the sum.

    1  layers.3.down: left as it was by a rule, which says “sensitive”: 8 % of all weights' bytes
       try: leave out the rule '*.3.down' if its reason no longer holds
"""

from __future__ import annotations

import math

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .explanation import Explanation, Row

_SHOWN = 12
_LOW_DB = 15.0


def show(found: Explanation, console: Console, *, all: bool = False) -> None:
    """Print it. all: every finding, not the first twelve."""
    shown = found.findings if all else found.findings[:_SHOWN]
    for number, finding in enumerate(shown, 1):
        colour = "red" if finding.weight >= 60 else "yellow" if finding.weight >= 20 else "cyan"
        console.print(
            f"[bold {colour}]{number:>2}[/]  {escape(str(finding))}", highlight=False, soft_wrap=True
        )
        console.print(f"    [dim]try:[/] {escape(finding.remedy)}", highlight=False, soft_wrap=True)
    if len(found.findings) > len(shown):
        console.print(f"    [dim]and {len(found.findings) - len(shown)} more (--all shows them)[/]")
    if not found.findings:
        console.print("[green]Everything that was asked for was done, and nothing stands out.[/]")
    console.print()
    console.print(_table(found))
    console.print()
    console.print(_sum(found), highlight=False, soft_wrap=True)


def _table(found: Explanation) -> Table:
    table = Table(box=None, pad_edge=False)
    heads = ("module", "format", "bits", "runs on", "kernel", "own error", "time")
    for head in heads:
        right = head in ("bits", "own error", "time")
        table.add_column(
            head, justify="right" if right else "left", overflow="fold", no_wrap=head != "kernel"
        )
    for depth, name, row in _tree(found.rows):
        cells = ("", "", "", "", "", "") if row is None else _cells(row, found.seconds)
        table.add_row(f"{'  ' * depth}{escape(name)}", *cells)
    return table


def _cells(row: Row, seconds: float) -> tuple[str, ...]:
    own = "" if row.own_db is None else f"{row.own_db:.1f} dB"
    own = f"[red]{own}[/]" if row.own_db is not None and row.own_db < _LOW_DB else own
    share = f"{100 * row.seconds / seconds:.1f} %" if seconds and row.seconds else ""
    bits = "" if row.bits is None else f"{row.bits:.2f}"
    return escape(row.format) or "[dim]as it was[/]", bits, row.target, escape(row.kernel), own, share


def _tree(rows: tuple[Row, ...]) -> list[tuple[int, str, Row | None]]:
    """(depth, name, row) in the order of a tree; a module without a row of its own has None. A chain of
    modules with nothing in between is one line."""
    root: dict[str, dict] = {}  # type: ignore[type-arg]
    by_path = {row.path: row for row in rows}
    order: dict[str, list[Row]] = {}
    for row in rows:
        order.setdefault(row.path, []).append(row)
        here = root
        for part in _parts(row.path):
            here = here.setdefault(part, {})
    out: list[tuple[int, str, Row | None]] = []

    def visit(tree: dict, path: str, depth: int) -> None:  # type: ignore[type-arg]
        for part, below in tree.items():
            full, name = f"{path}.{part}" if path else part, part
            while len(below) == 1 and full not in by_path:
                (only, deeper) = next(iter(below.items()))
                full, name, below = f"{full}.{only}", f"{name}.{only}", deeper
            mine: list[Row | None] = [*order.get(full, [])]
            name = name or "(the model)"
            out.extend((depth, name, row) for row in mine or [None])
            visit(below, full, depth + 1)

    visit(root, "", 0)
    return out


def _parts(path: str) -> list[str]:
    """At dots, but for those of a span: `layers.{0..29}.mlp`."""
    held = path.replace("..", "\0")
    return [part.replace("\0", "..") for part in held.split(".")]


def _sum(found: Explanation) -> str:
    before, after = (count / 2**20 for count in found.weight_bytes)
    parts = [f"weights {before:.1f} -> {after:.1f} MiB"]
    if not math.isnan(found.error_db):
        told = "exact" if found.error_db == math.inf else f"{found.error_db:.1f} dB"
        parts.append(f"signal to noise of the result {told}")
    if found.seconds:
        parts.append(f"{1e3 * found.seconds:.2f} ms operator by operator (compiled, less)")
    return escape(" · ".join(parts))
