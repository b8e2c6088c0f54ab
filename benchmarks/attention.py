"""Decode attention over a quantized KV cache against torch's on a bf16 one, in one run on one GPU.

In: nothing, or which formats, contexts and batches. Out: a JSON file of microseconds, and a table.

    python benchmarks/attention.py --out attention.json                 what is chosen without tuning
    python benchmarks/attention.py --out attention.json --sweep         and every schedule worth a try

Heads are Llama-3-8B's: 32 of queries, 8 of keys and values, of 128 numbers. Caches are rotated past the L2,
calls are replayed from a CUDA graph, each result is checked against float32 before it is timed, and the roof
is the bytes of codes and scales over the card's read bandwidth. Kernels are compiled beforehand in parallel.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_timing import card, copies_past_cache, microseconds, read_bandwidth
from torch import Tensor

from bitfold.codegen.attention import AttentionSpec, cache_format, empty_cache
from bitfold.codegen.attention_schedule import AttentionSchedule, choose_attention, choose_splits
from bitfold.codegen.triton.attention_build import attend, cache_write
from bitfold.lowering.kv_cache.attention import decoded

HEADS, KV_HEADS, DIM = 32, 8, 128
FORMATS = ["int8[bf16]", "int4[bf16]", "int4[g32]", "float8_e4m3fn[bf16]", "float8_e4m3fn[tensor]", "mxfp4"]
CONTEXTS = (8192, 32768)
BATCHES = (1, 16)
SWEPT = ["int8[bf16]", "int4[bf16]"]
# (block, warps)
TILES = ((32, 1), (32, 2), (64, 2), (64, 4), (128, 4))
STAGES = (3, 4)
PROGRAMS = (264, 528, 792, 1056)


def spec_of(text: str, page: int = 0) -> AttentionSpec:
    fmt = cache_format(text, DIM)
    return AttentionSpec(HEADS, KV_HEADS, DIM, "bf16", fmt, fmt, page=page)


def filled(spec: AttentionSpec, batch: int, tokens: int) -> list[Tensor]:
    """A cache of random tokens."""
    cache = empty_cache(spec, batch, tokens, "cuda")
    for part in cache:
        if part.is_floating_point() and part.shape[2] == 1:
            part.fill_(0.02)
    step = 4096
    for start in range(0, tokens, step):
        k, v = (torch.randn(batch, KV_HEADS, step, DIM, device="cuda", dtype=torch.bfloat16) for _ in "kv")
        cache_write(spec, cache, k, v, torch.arange(start, start + step, device="cuda")[None])
    return cache


def error(spec: AttentionSpec, q: Tensor, cache: list[Tensor], y: Tensor, tokens: int) -> float:
    """||y - want|| / ||want||, want in float32 on the numbers that the cache holds."""
    k, v = decoded(spec, [part[:1] for part in cache], None, torch.float32)
    q = q[:1].float().unflatten(1, (KV_HEADS, -1)).flatten(2, 3)
    want = (q @ k[:, :, :tokens].mT * spec.softmax_scale).softmax(-1) @ v[:, :, :tokens]
    got = y[:1].float().unflatten(1, (KV_HEADS, -1)).flatten(2, 3)
    return float((got - want).norm() / want.norm())


def schedules(text: str, sweep: bool) -> Iterator[tuple[AttentionSchedule, int | None]]:
    """(schedule, programs wanted; None for the default)."""
    spec = spec_of(text)
    late = torch.cuda.get_device_capability() >= (9, 0)
    chosen = replace(choose_attention(spec, 1), overlap=late)
    yield chosen, None
    if sweep and text in SWEPT:
        for (block, warps), stages, programs in itertools.product(TILES, STAGES, PROGRAMS):
            yield AttentionSchedule(8, block, warps, stages, chosen.overlap), programs
        other = AttentionSchedule(8, chosen.block, chosen.warps, chosen.stages, not chosen.overlap)
        yield from ((other, programs) for programs in PROGRAMS)


def warm(text: str, schedule: AttentionSchedule) -> str:
    """Compiles into Triton's cache, in a process of its own."""
    spec = spec_of(text)
    cache = filled(spec, 1, 4096)
    q = torch.randn(1, HEADS, 1, DIM, device="cuda", dtype=torch.bfloat16)
    limits = torch.full((1, 1), 4096, device="cuda", dtype=torch.int32)
    for splits in (1, 2):
        attend(spec, q, cache, limits, schedule=schedule, splits=splits)
    torch.cuda.synchronize()
    return f"{text} {schedule}"


def compile_all(formats: list[str], sweep: bool, processes: int) -> None:
    jobs = sorted({(text, str(s)) for text in formats for s, _ in schedules(text, sweep)})
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.starmap(warm, [(text, AttentionSchedule.parse(s)) for text, s in jobs], chunksize=1)


def torch_row(batch: int, tokens: int) -> dict[str, Any]:
    """torch's attention on a bf16 cache."""
    sdpa = partial(torch.nn.functional.scaled_dot_product_attention, enable_gqa=True)
    nbytes = 2 * batch * KV_HEADS * tokens * DIM * 2
    shape = (batch, KV_HEADS, tokens, DIM)
    count = min(copies_past_cache(nbytes), 16)
    made = [[torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in "kv"] for _ in range(count)]
    q = torch.randn(batch, HEADS, 1, DIM, device="cuda", dtype=torch.bfloat16)
    calls: list[Callable[[], Any]] = [partial(sdpa, q, k, v) for k, v in made]
    return {
        "format": "bf16", "batch": batch, "tokens": tokens, "us": microseconds(calls), "bytes": nbytes,
    }  # fmt: skip


def rows(text: str, batch: int, tokens: int, sweep: bool) -> Iterator[dict[str, Any]]:
    spec = spec_of(text)
    first = filled(spec, batch, tokens)
    nbytes = sum(part.nbytes for part in first)
    caches = [first] + [
        [part.clone() for part in first] for _ in range(min(copies_past_cache(nbytes), 24) - 1)
    ]
    q = torch.randn(batch, HEADS, 1, DIM, device="cuda", dtype=torch.bfloat16)
    limits = torch.full((batch, 1), tokens, device="cuda", dtype=torch.int32)
    for schedule, programs in schedules(text, sweep):
        splits = choose_splits(spec, schedule, batch, 1, tokens)
        if programs is not None:
            splits = max(1, min(programs // (batch * KV_HEADS), tokens // schedule.block))
        run = partial(attend, spec, q, limits=limits, schedule=schedule, splits=splits)
        y = run(cache=first)
        off = error(spec, q, first, y, tokens)
        same = torch.equal(y, run(cache=first))
        yield {
            "format": text, "batch": batch, "tokens": tokens, "schedule": str(schedule), "splits": splits,
            "chosen": programs is None, "us": microseconds([partial(run, cache=c) for c in caches], 7),
            "bytes": nbytes, "error": off, "same": same,
        }  # fmt: skip


def write_rows(text: str, batch: int, tokens: int) -> Iterator[dict[str, Any]]:
    """One token more."""
    spec = spec_of(text)
    cache = empty_cache(spec, batch, tokens, "cuda")
    k, v = (torch.randn(batch, KV_HEADS, 1, DIM, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    at = torch.tensor([[tokens // 2]], device="cuda")
    yield {
        "format": text, "batch": batch, "tokens": tokens, "write": True,
        "us": microseconds([partial(cache_write, spec, cache, k, v, at)]),
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    lines = [f"{'format':24}{'batch':>6}{'tokens':>8}{'us':>9}{'ratio':>7}{'roof':>6}{'error':>9}  schedule"]
    base = {(r["batch"], r["tokens"]): r["us"] for r in found["rows"] if r["format"] == "bf16"}
    for r in found["rows"]:
        if r.get("write"):
            lines.append(f"{'write ' + r['format']:24}{r['batch']:>6}{r['tokens']:>8}{r['us']:>9.1f}")
            continue
        roof = r["bytes"] / found["read"] * 1e6 / r["us"]
        ratio = base[r["batch"], r["tokens"]] / r["us"]
        lines.append(
            f"{r['format']:24}{r['batch']:>6}{r['tokens']:>8}{r['us']:>9.1f}{ratio:>7.2f}{roof:>6.0%}"
            f"{r.get('error', 0):>9.1e}  {r.get('schedule', '')} x{r.get('splits', 1)}"
            f"{' chosen' if r.get('chosen') else ''}{'' if r.get('same', True) else ' DIFFERS'}"
        )
    return "\n".join(lines)


def shown(found: dict[str, Any], most: int = 4) -> dict[str, Any]:
    """The chosen schedule and the best few of each case."""
    kept = []
    for _, group in itertools.groupby(
        found["rows"], lambda r: (r["format"], r["batch"], r["tokens"], r.get("write"))
    ):
        rows = list(group)
        best = sorted(rows, key=lambda r: r["us"])[:most]
        kept += [r for r in rows if r.get("chosen") and r not in best] + best
    return found | {"rows": kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--seconds", type=float, default=1e9, help="no new case is begun after so many")
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    started = time.time()
    compile_all(given.formats, given.sweep, given.processes)
    print(f"compiled in {time.time() - started:.0f} s", flush=True)
    found: dict[str, Any] = {**card(), "read": read_bandwidth(), "rows": []}
    cases = list(itertools.product(given.batches, given.contexts))
    for batch, tokens in cases:
        found["rows"].append(torch_row(batch, tokens))
    for text, (batch, tokens) in itertools.product(given.formats, cases):
        if time.time() - started > given.seconds:
            print(f"out of time before {text} {batch} {tokens}")
            break
        found["rows"] += rows(text, batch, tokens, given.sweep)
        torch.cuda.empty_cache()
        given.out.write_text(json.dumps(found, indent=1))
    for text in given.formats[:2]:
        found["rows"] += write_rows(text, 16, 8192)
    given.out.write_text(json.dumps(found, indent=1))
    print(f"read bandwidth {found['read'] / 1e12:.2f} TB/s, {time.time() - started:.0f} s")
    print(table(shown(found)))


if __name__ == "__main__":
    main()
