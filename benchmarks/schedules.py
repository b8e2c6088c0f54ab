"""Schedules timed on the GPU that is there, and the table of the fastest that ships with bitfold.

In: formats, shapes, rows of x. Out: raw JSON of every schedule tried, a table, the best on the terminal.

    python benchmarks/schedules.py --out raw.json --table table.json --limit 560
    python benchmarks/schedules.py --out raw.json --table table.json --limit 560 --resume raw.json
    python benchmarks/schedules.py --table codegen/tables/nvidia_h200.json --from benchmarks/results/*.json

What is tried of each (format, shape, M) is what `bitfold tune` would: what runs untuned, and the cost
model's best few. `--random` draws from all candidates instead, for fitting the model. Both files are written
as rows come; with `--resume` what a file holds is not measured again. `--from` needs no GPU: it makes the
table anew from raw files, of schedules that run today's layouts, where what runs untuned was measured too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gemm_ours import FORMATS

from bitfold.codegen import CodegenError, GemmSpec, Schedule, kernel_layout
from bitfold.codegen.candidates import bucket, candidates, rows_each
from bitfold.codegen.choose import MOST_ROWS, untuned
from bitfold.codegen.device import Device, device, present
from bitfold.codegen.library import has_library
from bitfold.codegen.pipelined import parsed
from bitfold.codegen.table import LIBRARY, Table, best_of
from bitfold.codegen.tune import Row, best_rows, tune
from bitfold.formats import Format, format
from bitfold.formats.layout import Halfwords
from bitfold.formats.units import Units

SHAPES = ("28672x4096", "4096x14336", "4096x4096", "8192x8192", "6144x4096", "14336x4096")
MS = (1, 16, 32, 64, 128, 256, 512, 1024, 4096)
# Schedules drawn at random among which a good one may be expected.
MANY = 10
# How the GEMM benchmark calls what the table calls `library`.
BY_LIBRARY = "decode, then the library"


def specs_of(text: str, n: int, k: int, every_layout: bool) -> Iterator[GemmSpec]:
    """The format in the library's own layout, or with slices of 16 to 128 codes."""
    plain = format(text)
    own = kernel_layout(plain, k)
    if own is None:
        raise SystemExit(f"no kernel walks over {text} with rows of {k}; leave it out of --formats")
    if not every_layout or not isinstance(own.layout, Halfwords | Units):
        yield GemmSpec(own, n, k)
        return
    bits, cols = plain.element.bits, plain.scale.granularity.cols if plain.scale is not None else None
    for length in (16, 32, 64, 128):
        span = length * 16 // (bits & -bits)
        if span <= 1024 and (cols is None or cols % length == 0):
            yield GemmSpec(plain.with_layout(replace(own.layout, span=span)), n, k)


def record(rows: Sequence[Row]) -> dict[str, Any]:
    """Raw results as they are committed: facts of the spec beside its text."""
    import triton

    found = []
    for row in rows:
        spec = GemmSpec.parse(row["spec"])
        found.append({"format": str(spec.weight), "n": spec.n, "k": spec.k, **row})
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    return {"card": torch.cuda.get_device_name(), **versions, "rows": found}


def write(path: Path, held: dict[str, Any]) -> None:
    """One row a line."""
    rows = ",\n".join("  " + json.dumps(row) for row in held["rows"])
    head = json.dumps({name: value for name, value in held.items() if name != "rows"}, indent=1)
    path.write_text(f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n', encoding="utf-8")


def rows_in(path: Path) -> tuple[str, list[Row]]:
    """(card, rows) of a raw file: of this script, or ours in one of the GEMM benchmark."""
    held = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for row in held["rows"]:
        if row.get("peer", "bitfold") != "bitfold" or not row.get("us") or row.get("failed"):
            continue
        text = row.get("spec")
        if text is None:
            laid_out = _in_halfwords(row) if "peer" in row else format(row["format"])
            text = str(GemmSpec(laid_out, row["n"], row["k"])) if laid_out is not None else None
        if text is not None:
            schedule = LIBRARY if row["schedule"] == BY_LIBRARY else row["schedule"]
            rows.append({"spec": text, "m": row["m"], "schedule": schedule, "us": row["us"]})
    return held["card"], rows


def _in_halfwords(row: dict[str, Any]) -> Format | None:
    """What a row of the GEMM benchmark ran that names no kernel: it is from before there were whole codes."""
    laid_out = kernel_layout(format(row["format"]), row["k"])
    whole = laid_out is not None and isinstance(laid_out.layout, Units)
    return laid_out.with_layout(Halfwords(laid_out.layout.span)) if whole else laid_out


def shipped(paths: Sequence[Path]) -> Table:
    """The table of all files together. SystemExit if they are of several cards."""
    found = [(path, *rows_in(path)) for path in paths]
    cards = {card for _, card, _ in found}
    if len(cards) != 1:
        raise SystemExit(f"the raw files are of several cards: {', '.join(sorted(cards))}")
    (name,) = cards
    kept = list(holding([row for _, _, rows in found for row in rows], device(name)))
    table = best_of(name, kept, "")
    return Table(name, table.entries, tuple(path.name for path, _, rows in found if rows))


def holding(rows: Sequence[Row], card: Device) -> Iterator[Row]:
    """Rows that say something today: their layout is the library's, their schedule runs, and what runs
    untuned was measured beside them, or many others: the best of them is worth having in a table."""
    groups: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["spec"], row["m"]].append(row)
    for (text, m), group in groups.items():
        spec = GemmSpec.parse(text)
        if kernel_layout(spec.weight, spec.k, spec.activation) != spec.weight:
            continue
        size = bucket(rows_each(spec, m))
        measured = {row["schedule"] for row in group}
        if size > MOST_ROWS and has_library(spec) and LIBRARY not in measured:
            continue
        if str(untuned(spec, size, card)) in measured or len(group) >= MANY:
            runs = (row for row in group if row["schedule"] == LIBRARY or _runs(row["schedule"], spec))
            yield from runs


def _runs(text: str, spec: GemmSpec) -> bool:
    try:
        return parsed(text).obstacle(spec) is None
    except CodegenError:
        return False


def shown(rows: Sequence[Row]) -> str:
    """The best of each, and how far the model was from it."""
    lines = []
    for row in best_rows(rows):
        told = "" if row.get("model_us") is None else f"  (model {row['model_us']:.1f})"
        lines.append(f"{row['us']:9.1f} us  M={row['m']:<5d} {row['spec']}  {row['schedule']}{told}")
    return "\n".join(lines)


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="NxK")
    parser.add_argument("--ms", nargs="+", type=int, default=MS, metavar="M")
    parser.add_argument("--specs", nargs="+", default=[], metavar="TEXT", help="kernels' texts, instead")
    parser.add_argument("--top", type=int, default=8, help="schedules of each")
    parser.add_argument("--every-layout", action="store_true", help="other layouts than the library's too")
    parser.add_argument("--random", type=int, metavar="SEED", help="any candidates, not the likeliest")
    parser.add_argument("--limit", type=float, default=560, help="seconds in all")
    parser.add_argument("--workers", type=int, help="processes that compile")
    parser.add_argument("--out", type=Path, help="raw JSON")
    parser.add_argument("--table", type=Path, help="the table of the best; by default the user's own")
    parser.add_argument("--resume", type=Path, help="a raw file whose rows are kept")
    parser.add_argument("--from", type=Path, nargs="+", dest="raw", help="make --table of raw files; no GPU")
    given = parser.parse_args(arguments)
    if given.raw and given.table is None:
        parser.error("--from makes a table: say which file with --table")
    return given


def wanted(given: argparse.Namespace) -> list[tuple[GemmSpec, int]]:
    """(spec, m), a weight after another."""
    specs = [GemmSpec.parse(text) for text in given.specs]
    if not specs:
        for text, shape in itertools.product(given.formats, given.shapes):
            n, k = (int(size) for size in shape.split("x"))
            specs += specs_of(text, n, k, given.every_layout)
    return [(spec, m) for spec in specs for m in given.ms]


def main() -> None:
    given = options()
    if given.raw:
        table = shipped(given.raw)
        given.table.write_text(table.json(), encoding="utf-8")
        print(
            f"{given.table}: {sum(map(len, table.entries.values()))} entries of {len(table.entries)} kernels"
        )
        return
    began = time.monotonic()
    known: list[Row] = []
    if given.resume is not None:
        known = json.loads(given.resume.read_text(encoding="utf-8"))["rows"]
        known = [{k: v for k, v in row.items() if k not in ("format", "n", "k")} for row in known]
    rows, saved = list(known), began

    def report(row: Row) -> None:
        nonlocal saved
        rows.append(row)
        if given.out is not None and time.monotonic() - saved > 5:
            write(given.out, record(rows))
            saved = time.monotonic()

    tune(
        wanted(given),
        top=given.top,
        seconds=given.limit,
        workers=given.workers,
        table=given.table,
        known=known,
        report=report,
        choices=_drawn(given.random) if given.random is not None else None,
    )
    if given.out is not None:
        write(given.out, record(rows))
    print(shown(rows))
    failed = [row for row in rows if "failed" in row]
    print(f"{len(rows) - len(known)} tried in {time.monotonic() - began:.0f} s, {len(failed)} failed")
    for row in failed[:10]:
        print(f"  {row['spec']} M={row['m']} {row['schedule']}: {row['failed']}")


def _drawn(seed: int) -> Any:
    """Candidates at random."""
    draw, card = random.Random(seed), present()

    def choices(spec: GemmSpec, m: int, count: int) -> list[Schedule]:
        found = candidates(spec, m, card)
        return draw.sample(found, min(count, len(found)))

    return choices


if __name__ == "__main__":
    main()
