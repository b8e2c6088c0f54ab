"""Every schedule that could run a format at small M, timed: what `bitfold.codegen.choose` rests on.

In: formats, shapes. Out: a JSON file of (format with its layout, n, k, m, schedule, microseconds, bytes), and
the best few of each.

    python benchmarks/schedules.py --formats 'int4[g128]' mxfp4 --shapes 28672x4096 --out out.json

Layouts of several slice lengths are tried too. As in `gemm.py` kernels are compiled beforehand in parallel,
weights are rotated past the L2, and calls are replayed from a CUDA graph; each kernel's result is checked
against the product with the decoded weight before it is timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gemm_ours import BOUND, FORMATS, Job, compile_all
from gpu_timing import copies_past_cache, microseconds

from bitfold.codegen import GemmSpec, Schedule, scales, walk
from bitfold.codegen.triton.build import launch
from bitfold.formats import Quantized, format
from bitfold.formats.layout import Halfwords

TILES = {1: ((8, 16, 1), (8, 32, 1), (8, 32, 2), (8, 64, 2), (8, 64, 4), (8, 128, 4)),
         16: ((16, 32, 1), (16, 64, 2), (16, 128, 4))}  # fmt: skip
STAGES = (3, 4, 6)
# Past this many bytes of shared memory a program is alone on its multiprocessor.
MOST_SHARED = 100_000


def candidates(text: str, n: int, k: int) -> Iterator[tuple[int, GemmSpec, Schedule]]:
    """(m, spec, schedule) worth a try."""
    plain = format(text)
    bits, scale = plain.element.bits, plain.scale
    cols = scale.granularity.cols if scale is not None else None
    for length in (16, 32, 64, 128):
        span = length * 16 // (bits & -bits)
        if span > 1024 or (cols is not None and cols % length):
            continue
        spec = GemmSpec(plain.with_layout(Halfwords(span)), n, k)
        found = walk(spec.weight, k)
        assert found
        modes = [mode for mode in scales(spec) if mode != "float"]
        for m, stages, mode in itertools.product(TILES, STAGES, modes):
            for (rows, block, warps), split in itertools.product(TILES[m], (1, 2, 4, 8)):
                programs = n * split / block
                shared = (stages - 1) * (block * found.units + rows * found.codes) * 2
                schedule = Schedule(rows, block, warps, stages, split, mode)
                if 132 <= programs <= 1400 and shared <= MOST_SHARED and not schedule.obstacle(spec):
                    yield m, spec, schedule


def timed(spec: GemmSpec, tries: list[tuple[int, Schedule]]) -> Iterator[dict[str, Any]]:
    """A row for each schedule of one spec."""
    q = spec.weight.quantize(torch.randn(spec.n, spec.k, device="cuda") * 0.05)
    nbytes = sum(part.nbytes for part in q.parts)
    weights = [[part.clone() for part in q.parts] for _ in range(copies_past_cache(nbytes))]
    decoded = (
        spec.weight.dequantize(Quantized.from_parts(spec.weight, q.parts, spec.k)).to(spec.dtype).float()
    )
    for m, schedule in tries:
        x = torch.randn(m, spec.k, device="cuda", dtype=spec.dtype)
        y = x.new_full((m, spec.n), float("nan"))
        room = None
        if schedule.split > 1:
            locks = torch.zeros(spec.n, device="cuda", dtype=torch.int32)
            room = (torch.empty(schedule.split * m * spec.n, device="cuda"), locks)
        row: dict[str, Any] = {"format": str(spec.weight), "n": spec.n, "k": spec.k, "m": m}
        row |= {"schedule": str(schedule), "bytes": nbytes}
        calls = [partial(launch, spec, schedule, x, w, out=y, workspace=room) for w in weights]
        try:
            calls[0]()
            wanted = x.float() @ decoded.T
            row["error"] = float((y.float() - wanted).norm() / wanted.norm())
            if row["error"] < BOUND:
                row["us"] = microseconds(calls, 7)
        except Exception as error:  # a schedule that does not fit is a row that says so
            row["failed"] = repr(error)[:200]
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--shapes", nargs="+", default=["28672x4096", "4096x4096"])
    parser.add_argument(
        "--most", type=int, default=60, help="schedules of a format and shape, drawn at random"
    )
    parser.add_argument("--limit", type=float, default=300, help="seconds in all")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    began = time.time()
    draw = random.Random(0)
    chosen: list[tuple[int, GemmSpec, Schedule]] = []
    for text, shape in itertools.product(given.formats, given.shapes):
        n, k = (int(size) for size in shape.split("x"))
        some = list(candidates(text, n, k))
        chosen += draw.sample(some, min(given.most, len(some)))
    jobs: list[Job] = list({(str(spec), str(schedule)): None for _, spec, schedule in chosen})
    failed = compile_all(jobs, max(1, (os.cpu_count() or 2) - 1), given.limit / 2)
    print(f"compiled {len(jobs) - len(failed)} of {len(jobs)} in {time.time() - began:.0f} s")
    by_spec: dict[GemmSpec, list[tuple[int, Schedule]]] = {}
    for m, spec, schedule in chosen:
        if (str(spec), str(schedule)) not in failed:
            by_spec.setdefault(spec, []).append((m, schedule))
    rows: list[dict[str, Any]] = []
    for spec, tries in by_spec.items():
        if time.time() - began < given.limit:
            rows += timed(spec, tries)
            record = {"card": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
            given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    best: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for row in sorted((row for row in rows if "us" in row), key=lambda row: row["us"]):
        best.setdefault(
            (row["format"].split(",halves")[0].split("[halves")[0], row["n"], row["m"]), []
        ).append(row)
    for (name, n, m), found in best.items():
        shown = "; ".join(
            f"{r['us']:.1f} {r['format'].rsplit('halves')[-1][:-1]} {r['schedule']}" for r in found[:4]
        )
        print(f"{name} {n} M={m}: {shown}")


if __name__ == "__main__":
    main()
