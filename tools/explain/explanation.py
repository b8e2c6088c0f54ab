"""The findings and the tree of modules of an inspected pipeline, as data.

In: an `Inspection`. Out: an `Explanation`.

    found = explain(inspection);  found.findings[0].where;  found.rows[0].format

Modules that are alike (layers.0 .. layers.29) are one row each, with the worst error and the sum of times.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ...passes.provenance import FROM_KEY, origin
from ..held import held_bytes
from ..inspection import Inspection
from ..viz.overlay import targets
from .coverage import never_asked, not_done
from .finding import Finding, ranked
from .numerics import layers, own_errors, saturated, shared_scales
from .structure import not_fused, wide_products

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
CHECKS = (not_done, never_asked, shared_scales, saturated, not_fused, wide_products, own_errors)


@dataclass(frozen=True)
class Row:
    """One module, or several alike: its formats, the bits of a weight, who runs it and by what, its own error
    (the worst), microseconds, and how many modules the row stands for."""

    path: str
    format: str = ""
    bits: float | None = None
    nbytes: int = 0
    target: str = ""
    kernel: str = ""
    own_db: float | None = None
    seconds: float = 0.0
    count: int = 1


@dataclass(frozen=True)
class Explanation:
    """findings: the gravest first; rows: of the tree of modules, in the model's order; seconds: of all
    operators; error_db: of the model's result."""

    findings: tuple[Finding, ...]
    rows: tuple[Row, ...]
    seconds: float
    error_db: float
    weight_bytes: tuple[int, int]
    summary: str

    def __str__(self) -> str:
        """As the command prints it, without colours."""
        import io

        from rich.console import Console

        from .show import show

        out = io.StringIO()
        show(self, Console(file=out, width=140), all=True)
        return out.getvalue().rstrip()


def explain(found: Inspection) -> Explanation:
    """Everything there is to say."""
    findings = ranked(finding for check in CHECKS for finding in check(found))
    # A module that only holds others, or whose operations went into a neighbour's kernel, has nothing to
    # tell.
    told = {path: row for path, row in _rows(found).items() if row.format or row.seconds or row.nbytes}
    rows = _alike(told)
    last = next(reversed(list(found.errors.values())), None)
    return Explanation(
        tuple(findings),
        tuple(rows),
        sum(done.seconds or 0.0 for done in found.work.values()),
        math.nan if last is None else last.sqnr_db,
        (held_bytes(found.reference), held_bytes(found.final)),
        ", ".join(str(step) for step in found.trace.steps[1:] if step.name != "finish"),
    )


def _rows(found: Inspection) -> dict[str, Row]:
    """By module path, in the order of the captured graph."""
    rows: dict[str, Row] = {}
    for node in found.reference.graph.nodes:
        path = origin(node).module_path
        if node.op.startswith("call_") and path:
            rows.setdefault(path, Row(path))
    paths = {name: path for path, name in _formats(found, rows)}
    for _, path, _, own in layers(found):
        row = rows.get(path) or Row(path)
        rows[path] = replace(row, own_db=own if row.own_db is None else min(own, row.own_db))
    for stats in found.weights.values():
        row = rows.get(stats.layer) or Row(stats.layer)
        count = math.prod(stats.shape)
        bits = 8 * stats.nbytes / count if count else None
        rows[stats.layer] = replace(row, bits=bits, nbytes=row.nbytes + stats.nbytes)
    _who(found, rows, paths)
    return rows


def _formats(found: Inspection, rows: dict[str, Row]) -> Iterable[tuple[str, str]]:
    """Fills in formats; gives (path, name) of every captured node."""
    notes = {node.name: node for step in found.trace.steps for node in step.snapshot if node.note}
    for node in notes.values():
        if node.module_path in rows:
            text = re.sub(r" weight(?=,|$)", "", node.note)
            rows[node.module_path] = replace(rows[node.module_path], format=text)
    return [(origin(node).module_path, node.name) for node in found.reference.graph.nodes]


def _who(found: Inspection, rows: dict[str, Row], paths: Mapping[str, str]) -> None:
    """Times, targets and kernels, from the nodes that run."""
    by_node = targets(found)
    for node in found.final.graph.nodes:
        names = node.meta.get(FROM_KEY) or (node.name,)
        path = origin(node).module_path or next((paths[name] for name in names if name in paths), "")
        done, kernel = found.work.get(node.name), found.kernels.get(node.name)
        if not node.op.startswith("call_") or path not in rows:
            continue
        row = rows[path]
        seconds = row.seconds + (0.0 if done is None else done.seconds or 0.0)
        words = (
            " ".join(part for part in (kernel.language, kernel.schedule) if part) if kernel else row.kernel
        )
        who = row.target if row.kernel else by_node.get(node.name, row.target).partition(",")[0]
        rows[path] = replace(row, seconds=seconds, kernel=words, target=who)
        for other in {paths[name] for name in names if name in paths} - {path}:
            # Its product is one of those that the kernel of a neighbour has; the time stands there.
            if kernel is not None and other in rows and rows[other].format and not rows[other].kernel:
                rows[other] = replace(rows[other], kernel=f"in {path.rpartition('.')[2]}'s", target=who)


def _alike(rows: Mapping[str, Row]) -> list[Row]:
    """Rows whose paths differ in a number alone, and that got the same, as one."""
    joined: dict[tuple[str, ...], Row] = {}
    numbers: dict[tuple[str, ...], list[int]] = {}
    for row in rows.values():
        found = _NUMBER.search(row.path)
        pattern = row.path if found is None else f"{row.path[: found.start()]}#{row.path[found.end() :]}"
        key = (pattern, row.format, row.target, row.kernel)
        numbers.setdefault(key, []).extend([int(found.group())] if found else [])
        before = joined.get(key)
        joined[key] = row if before is None else _sum(before, row)
    return [
        replace(row, path=key[0].replace("#", _span(numbers[key]))) if numbers[key] else row
        for key, row in joined.items()
    ]


def _sum(a: Row, b: Row) -> Row:
    known = [own for own in (a.own_db, b.own_db) if own is not None]
    return replace(
        a,
        own_db=min(known) if known else None,
        seconds=a.seconds + b.seconds,
        nbytes=a.nbytes + b.nbytes,
        count=a.count + b.count,
    )


def _span(numbers: list[int]) -> str:
    """`{0..29}`, `{0..3,7}`, `5`."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) + "}"
