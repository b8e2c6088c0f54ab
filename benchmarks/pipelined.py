"""Pipelined kernels timed on the GPU that is there, beside bf16 and beside decoding first.

In: shapes, rows of x. Out: raw JSON of everything tried, the best of each on the terminal.

    python benchmarks/pipelined.py --out benchmarks/results/pipelined-nvidia-h200.json --limit 300

Every schedule is held against float32 first, on fresh numbers with poisoned results, twice: a wrong one, or
one whose two results differ, is reported and not timed. `slices` decodes some rows of the weight at a time,
so few that they stay in the L2, and multiplies them by the library before the next.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_timing import card, copies_past_cache, microseconds, read_bandwidth
from torch import Tensor

from bitfold.codegen import GemmSpec, choose, kernel_layout
from bitfold.codegen.compiling import shaped_parts
from bitfold.codegen.pipelined import Pipelined, modes
from bitfold.codegen.triton.build import decode
from bitfold.codegen.triton.pipelined_build import launch, warm, workspace
from bitfold.codegen.triton.run import run
from bitfold.formats import format

SHAPES = ("28672x4096", "4096x4096", "4096x14336", "8192x8192")
MS = (32, 64, 128, 256, 512, 1024, 4096)
ALLOWED = 2**-8  # of the error's norm: bf16 results of bf16 products
# Tiles, groups, stages and programs, by the most rows of x that they are tried for.
PLANS = {
    8: (
        "m8 n64 g1 w4 x2 j4 c4 p4 {} streamk", "m8 n64 g1 w4 x2 j4 c4 p4 {} streamk o1",
        "m8 n64 g1 w4 x2 j4 c4 p3 {} streamk o1", "m8 n64 g1 w4 x2 j4 c4 p2 {} streamk o2",
        "m8 n64 g1 w4 x2 j4 c6 p2 {} streamk u2 o1", "m8 n64 g1 w4 x2 j4 c3 p3 {} streamk u2 o1",
        "m8 n64 g1 w4 x2 j4 c2 p2 {} streamk u2 o2", "m8 n64 g1 w4 x2 j8 c3 p3 {} streamk u4 o1",
        "m8 n128 g1 w8 x2 j4 c4 p2 {} streamk o1", "m8 n128 g2 w4 x2 j4 c4 p2 {} streamk o1",
    ),
    16: (
        "m16 n64 g1 w4 x2 j4 c4 p3 {} streamk o1", "m16 n64 g1 w4 x2 j4 c3 p4 {} streamk o1",
        "m16 n128 g1 w8 x2 j4 c4 p2 {} streamk o1", "m16 n128 g2 w4 x2 j4 c4 p2 {} streamk o1",
        "m16 n64 g1 w4 x2 j8 c3 p2 {} streamk u2 o1", "m16 n64 g1 w4 x2 j8 c3 p3 {} streamk u4 o1",
    ),
    32: (
        "m32 n128 g2 w4 x3 j4 c4 p1", "m32 n64 g1 w4 x3 j2 c3 p3", "m32 n64 g1 w4 x3 j4 c3 p2",
        "m32 n128 g1 w8 x3 j4 c3 p2", "m32 n64 g1 w4 x2 j4 c2 p4",
    ),
    64: (
        "m64 n128 g2 w4 x4 j2 c4 p1", "m64 n128 g2 w4 x6 j1 c4 p1", "m64 n64 g1 w4 x3 j2 c3 p2",
        "m64 n64 g1 w4 x4 j1 c3 p3", "m64 n128 g1 w8 x6 j1 c3 p1", "m64 n128 g1 w8 x3 j4 c3 p1",
        "m32 n64 g1 w4 x3 j4 c3 p2",
    ),
    128: (
        "m128 n128 g2 w4 x6 j1 c4 p1", "m128 n128 g2 w4 x3 j2 c3 p1", "m128 n64 g1 w4 x4 j1 c2 p2",
        "m128 n128 g1 w8 x6 j1 c3 p1", "m64 n128 g2 w4 x4 j2 c3 p1", "m64 n64 g1 w4 x4 j1 c3 p3",
    ),
    256: (
        "m256 n128 g1 w8 x4 j1 c2 p1", "m128 n128 g2 w4 x6 j1 c3 p1", "m128 n64 g1 w4 x4 j1 c2 p2",
        "m256 n64 g1 w4 x4 j1 c2 p1", "m64 n128 g2 w4 x4 j2 c3 p1",
    ),
    1 << 30: ("m256 n128 g1 w8 x4 j1 c2 p1", "m128 n128 g2 w4 x6 j1 c3 p1", "m128 n128 g1 w8 x6 j1 c3 p1"),
}  # fmt: skip
SLICES = (2048, 4096, 8192)
TRYING = "begun"
MOST_PROCESSES = 6
GRACE = 20.0  # seconds beyond the limit that a process may take to end by itself


def plans(spec: GemmSpec, m: int) -> list[Pipelined]:
    """What is tried for m rows of x."""
    most = next(limit for limit in PLANS if m <= limit)
    texts = [
        text if "{}" in text else text + " {}" + tail
        for text in PLANS[most]
        for tail in ("", " streamk")
        if not ("{}" in text and tail)
    ]
    found = [Pipelined.parse("tma " + text.format(modes(spec)[0])) for text in texts]
    found = [replace(plan, joined=min(plan.joined, len(plan.walk(spec).slices))) for plan in found]
    return [plan for plan in found if plan.obstacle(spec) is None]


def compile_one(job: tuple[str, str]) -> None:
    spec = GemmSpec.parse(job[0])
    warm(spec, Pipelined.parse(job[1]), shaped_parts(spec.weight, spec.n, spec.k))


def compiled(jobs: Sequence[tuple[str, str]], workers: int, seconds: float) -> set[tuple[str, str]]:
    """Which of the jobs are in the compiler's cache in time; says why others are not."""
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    futures = {pool.submit(compile_one, job): job for job in jobs}
    done, late = wait(futures, timeout=seconds)
    pool.shutdown(wait=False, cancel_futures=True)
    for future in done:
        if (fault := future.exception()) is not None:
            print("not compiled:", futures[future], repr(fault)[:300])
    if late:
        print(f"{len(late)} kernels were not compiled within {seconds:.0f} s")
    return {futures[future] for future in done if future.exception() is None}


def cuts(spec: GemmSpec) -> bool:
    """Whether each part of the weight has an entry a row, so that rows can be cut off."""
    scale = spec.weight.scale
    return scale is None or (scale.granularity.rows == 1 and not scale.two_level)


def by_slices(spec: GemmSpec, rows: int, x: Tensor, parts: Sequence[Tensor], y: Tensor) -> None:
    """Decodes `rows` rows of the weight at a time, and multiplies them."""
    fmt = spec.weight
    named = list(zip(fmt.parts, parts, strict=True))
    for start in range(0, spec.n, rows):
        end = min(start + rows, spec.n)
        few = GemmSpec(fmt, end - start, spec.k, spec.x)
        cut = [fmt.turned(name, fmt.turned(name, part)[start:end]) for name, part in named]
        w = decode(few, cut, x)
        torch.mm(x, w.t(), out=y[:, start:end])


def by_decoding(spec: GemmSpec, x: Tensor, parts: Sequence[Tensor], y: Tensor) -> None:
    torch.mm(x, decode(spec, parts, x).t(), out=y)


def fault_of(call: Callable[[], Any], y: Tensor, want: Tensor) -> str | None:
    """Why a call's results are not what they should be, or None."""
    results = []
    for _ in range(2):
        y.fill_(float("nan"))
        call()
        results.append(y.clone())
    error = ((results[0].float() - want).norm() / want.norm()).item()
    if not error < ALLOWED:
        return f"error {error:.3g}"
    return None if torch.equal(*results) else "two results differ"


def measured(text: str, ms: Sequence[int], ready: set[tuple[str, str]], until: float, to: Path) -> None:
    """Rows of one spec, a line each, in a process of its own; what is being tried is said before its row.
    What the file holds already is not tried again."""
    spec = GemmSpec.parse(text)
    n, k = spec.n, spec.k
    held = [json.loads(line) for line in to.read_text().splitlines()] if to.exists() else []
    before = {(row["m"], row["what"]) for row in held}
    q = spec.weight.quantize(torch.randn(n, k, device="cuda") * 0.02)
    weight = spec.weight.dequantize(q).bfloat16()
    nbytes = sum(part.nbytes for part in q.parts)
    copies = [[part.clone() for part in q.parts] for _ in range(copies_past_cache(nbytes))]
    wide = [weight.clone() for _ in range(copies_past_cache(weight.nbytes))]
    assert torch.equal(decode(spec, q.parts, weight), weight), "decoding is bit for bit"
    count = torch.cuda.get_device_properties(0).multi_processor_count

    with to.open("a") as file:

        def note(m: int, what: str, us: float | None = None, fault: str | None = None) -> None:
            row = {"n": n, "k": k, "m": m, "format": str(spec.weight), "bytes": nbytes + 2 * m * (n + k)}
            file.write(json.dumps({**row, "what": what, "us": us, "fault": fault}) + "\n")
            file.flush()

        if (0, "decode") not in before:
            note(0, "decode", microseconds([partial(decode, spec, copy, weight) for copy in copies], 7))
        for m in ms:
            x, y = (torch.randn(m, size, device="cuda").bfloat16() for size in (k, n))
            want = x.float() @ weight.float().T
            if (m, "bf16") not in before:
                note(m, "bf16", microseconds([partial(torch.nn.functional.linear, x, w) for w in wide], 7))
            for what, each in calls_of(spec, m, x, y, copies, ready, count).items():
                if (m, what) in before or time.monotonic() > until:
                    continue
                note(m, what, fault=TRYING)
                fault = fault_of(each[0], y, want)
                note(m, what, None if fault else microseconds(each, 7), fault)


def calls_of(
    spec: GemmSpec, m: int, x: Tensor, y: Tensor, copies: Sequence[list[Tensor]],
    ready: set[tuple[str, str]], count: int,
) -> dict[str, list[Callable[[], Any]]]:  # fmt: skip
    """Everything that is tried for m rows of x: the kernel that is chosen today, the library, the plans."""
    found: dict[str, list[Callable[[], Any]]] = {}
    chosen = choose(spec, m)
    if chosen is not None:
        found[f"now {chosen}"] = [partial(run, spec, chosen, [x, *p], out=y) for p in copies]
    if m >= 512:
        found["decode, then the library"] = [partial(by_decoding, spec, x, p, y) for p in copies]
        for size in SLICES if cuts(spec) else ():
            found[f"slices of {size}"] = [partial(by_slices, spec, size, x, p, y) for p in copies]
    for plan in plans(spec, m):
        if (str(spec), str(plan)) in ready:
            room = workspace(plan, count, x)
            found[str(plan)] = [partial(launch, spec, plan, x, p, out=y, room=room) for p in copies]
    return found


def settled(lines: Sequence[str]) -> list[dict[str, Any]]:
    """One row each of what was tried: the last that was said of it. What was only begun ended its process."""
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for row in map(json.loads, lines):
        found[row["m"], row["what"]] = row
    return [
        row | ({"fault": "ended its process"} if row["fault"] == TRYING else {}) for row in found.values()
    ]


def in_processes(
    spec: GemmSpec, ms: Sequence[int], ready: set[tuple[str, str]], until: float, folder: Path
) -> list[dict[str, Any]]:
    """Rows of one spec. A process that a kernel ended is followed by another, for the rest."""
    to = folder / "rows.jsonl"
    to.unlink(missing_ok=True)
    for _ in range(MOST_PROCESSES):
        given = (str(spec), ms, ready, until, to)
        process = multiprocessing.get_context("spawn").Process(target=measured, args=given)
        process.start()
        process.join(max(1.0, until + GRACE - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
            break
        if process.exitcode == 0:
            break
    return settled(to.read_text().splitlines()) if to.exists() else []


def shown(rows: Sequence[dict[str, Any]]) -> str:
    """The fastest of each shape and number of rows, and what went wrong."""
    lines = []
    for name, n, k, m in sorted({(row["format"], row["n"], row["k"], row["m"]) for row in rows}):
        here = [row for row in rows if (row["format"], row["n"], row["k"], row["m"]) == (name, n, k, m)]
        timed = sorted((row for row in here if row["us"] is not None), key=lambda row: row["us"])
        best = " | ".join(f"{row['us']:.1f} {row['what']}" for row in timed[:5])
        bf16 = next((f"{row['us']:.1f}" for row in here if row["what"] == "bf16"), "-")
        lines.append(f"{name} {n}x{k} M={m} bf16 {bf16}: {best}")
        lines += [f"    {row['what']}: {row['fault']}" for row in here if row["fault"]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--formats", nargs="*", default=["int4[g128]"])
    parser.add_argument("--shapes", nargs="*", default=SHAPES)
    parser.add_argument("--m", nargs="*", type=int, default=MS)
    parser.add_argument("--workers", type=int, default=15)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds in all")
    given = parser.parse_args()
    until = time.monotonic() + given.limit
    specs = [spec_of(text, shape) for text in given.formats for shape in given.shapes]
    wanted = {(str(spec), str(plan)): None for spec in specs for m in given.m for plan in plans(spec, m)}
    ready = compiled(list(wanted), given.workers, given.limit / 2)
    found: dict[str, Any] = {**card(), "read": read_bandwidth(), "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        for spec in specs:
            found["rows"] += in_processes(spec, given.m, ready, until, Path(folder))
            given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(shown(found["rows"]))


def spec_of(text: str, shape: str) -> GemmSpec:
    n, k = (int(size) for size in shape.split("x"))
    layout = kernel_layout(format(text), k)
    if layout is None:
        raise SystemExit(f"no kernel walks over {text} with rows of {k}; take other --formats")
    return GemmSpec(layout, n, k)


if __name__ == "__main__":
    main()
