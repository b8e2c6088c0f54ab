"""Every GEMM with quantized weights that can be imported, and ours, on one GPU in one run.

In: options. Out: tables of microseconds and of ratios, and the numbers as JSON.

    python benchmarks/gemm.py --shapes 28672x4096 --ms 1 16 --peers bf16 humming-uint4 bitfold --out gemm.json
    python benchmarks/plot_gemm.py gemm.json

One process each: a fault in one must not poison the next. The roof is measured first: reading, and products.
Weights are rotated past the L2, calls replayed from a CUDA graph, medians reported. Peers are checked against
float32 where their weights are known, ours always, with fresh input, output poisoned with NaN, and two runs
equal to the bit. Our kernels are compiled by other processes while the peers are timed: only the device's own
clock is read, so a busy host does not show.

Peers that cannot be imported are reported as absent. `--formats` limits ours, `--pairs` those on activations
in codes (the product alone, and with the quantization of x); `--schedule` fixes for formats what bitfold
otherwise chooses. `mlp` and `experts` are more than one product (`gemm_blocks.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gemm_blocks import BLOCKS, time_block
from gemm_blocks import jobs as jobs_of_blocks
from gemm_ours import FORMATS, Ours, chooser, compile_all, jobs_of
from gemm_pairs import PAIRS, time_pair
from gemm_pairs import jobs as jobs_of_pairs
from gemm_peers import PEERS
from gemm_rows import OURS, Row, band_lines, finish, formats, label, ratio_lines, shapes, sizes, time_lines
from gpu_timing import card, microseconds, roof
from torch import Tensor

SHAPES = ["28672x4096", "4096x4096", "4096x14336", "8192x8192"]
MS = [1, 4, 16, 32, 64, 128, 256, 1024, 4096]
AT_FIRST = 5  # peers before ours: the int4 ones, while our kernels compile
ROOF, COMPILE = "roof", "compile"


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*[*PEERS][:AT_FIRST], OURS, *BLOCKS, *[*PEERS][AT_FIRST:]]
    parser.add_argument("--shapes", nargs="+", type=shape, default=[shape(text) for text in SHAPES])
    parser.add_argument("--ms", nargs="+", type=int, default=MS)
    parser.add_argument("--peers", nargs="+", choices=names, default=names, metavar="PEER")
    parser.add_argument("--formats", nargs="+", default=FORMATS, help="of ours")
    parser.add_argument("--pairs", nargs="*", choices=PAIRS, default=[*PAIRS], metavar="PAIR", help="of ours")
    parser.add_argument("--schedule", help='of ours, for every row: "m16 n64 w2 s3 k1 sum"')
    parser.add_argument("--repeats", type=int, default=11, help="replays, of which the median counts")
    parser.add_argument("--limit", type=float, default=540, help="seconds for everything")
    parser.add_argument("--peer-limit", type=float, default=120, help="seconds for one process")
    parser.add_argument("--out", type=Path, default=Path("gemm.json"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.repeats < 9:
        parser.error(f"--repeats {given.repeats} is too few for a median; 9 or more")
    return given


def shape(text: str) -> tuple[int, int]:
    """28672x4096 -> (28672, 4096): rows of the weight, then its columns."""
    n, x, k = text.partition("x")
    if not (x and n.isdecimal() and k.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; one reads: 28672x4096")
    return int(n), int(k)


def error_of(y: Tensor, x: Tensor, weight: Tensor) -> float:
    """Norm of the difference from a product in float32, over that product's."""
    exact = x.float() @ weight.t()
    return ((y.float() - exact).norm() / exact.norm()).item()


def time_peer(name: str, given: argparse.Namespace, report: Callable[[Row], None]) -> None:
    """Rows of one peer, in this process."""
    peer = PEERS[name]
    shared = {
        "peer": name.partition("-")[0],
        "format": peer.format,
        "beside": peer.beside,
        "compute": peer.compute,
    }
    for n, k in given.shapes:
        loaded = None
        torch.cuda.empty_cache()
        loaded = peer.load(n, k)
        for m in given.ms:
            row: Row = {**shared, "n": n, "k": k, "m": m, "us": None, "error": None, "bytes": None}
            try:
                x, meant = loaded.prepare(torch.randn(m, k, device="cuda", dtype=torch.bfloat16))
                y = loaded.run(loaded.copies[0], x)
                row["bytes"] = loaded.nbytes + meant.shape[0] * (2 * n + k * _width(x))
                if loaded.weight is not None:
                    row["error"] = error_of(y, meant, loaded.weight)
                calls = [partial(loaded.run, one, x) for one in loaded.copies]
                row["us"] = microseconds(calls, given.repeats)
            except Exception as refused:  # theirs to choose; the row says it
                row["failed"] = repr(refused)[:300]
            report(row)


def _width(x: Any) -> int:
    """Bytes of one activation, as the peer takes it."""
    width: int = (x[0] if isinstance(x, tuple) else x).element_size()
    return width


def time_ours(text: str, given: argparse.Namespace, report: Callable[[Row], None]) -> None:
    """Rows of one of our formats, in this process."""
    pick = chooser(given.schedule)
    for n, k in given.shapes:
        torch.cuda.empty_cache()
        ours = Ours.of(text, n, k, pick)
        for m in given.ms:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            row: Row = {
                "peer": OURS, "format": _canonical(text), "beside": [], "compute": "bf16",
                "n": n, "k": k, "m": m, "us": None, "error": None,
                "bytes": ours.nbytes + 2 * m * (n + k), "spec": str(ours.spec), "schedule": ours.schedule(m),
            }  # fmt: skip
            try:
                calls = ours.calls(x)
                row["error"] = error_of(calls[0](), x, ours.weight)
                row["failed"] = ours.problem(x, row["error"], calls)
                if row["failed"] is None:
                    row["us"] = microseconds(calls, given.repeats)
            except Exception as refused:  # Triton's errors share no other base; the row says it
                row["failed"] = repr(refused)[:300]
            report(row)
        del ours


def _canonical(text: str) -> str:
    from bitfold.formats import format

    return str(format(text))


def child(given: argparse.Namespace) -> None:
    """One process: the roof, our compilation, a peer or one of our formats. Rows are on disk at once."""
    sys.stdin.readline()  # imports are done; the card is another process's until it is this one's turn
    torch.manual_seed(0)
    if given.one == ROOF:
        given.out.write_text(json.dumps({**card(), "roof": roof()}))
        return
    if given.one == COMPILE:
        jobs = all_jobs(given)
        started = time.time()
        failed = compile_all(jobs, max(1, (os.cpu_count() or 1) - 2), given.limit)
        print(f"compiled {len(jobs) - len(failed)} of {len(jobs)} kernels in {time.time() - started:.0f} s")
        for job, reason in failed.items():
            print(f"  {job[0]}, {job[1]}: {reason}")
        return
    rows: list[Row] = []

    def report(row: Row) -> None:
        rows.append(row)
        beside = given.out.with_suffix(".tmp")
        beside.write_text(json.dumps(rows))
        beside.replace(given.out)

    with torch.no_grad():
        if given.one in PEERS:
            time_peer(given.one, given, report)
        elif given.one in PAIRS:
            time_pair(given.one, given, chooser(None), report)
        elif given.one in BLOCKS:
            time_block(given.one, given, chooser(None), report)
        else:
            time_ours(given.one, given, report)


def all_jobs(given: argparse.Namespace) -> list[tuple[str, str]]:
    """Every kernel of ours that the rows need, once, in the order in which they are timed."""
    found: list[tuple[str, str]] = []
    if OURS in given.peers:
        found += jobs_of(given.formats, given.shapes, given.ms, chooser(given.schedule))
        found += jobs_of_pairs(given.pairs, given.shapes, given.ms, chooser(None))
    found += jobs_of_blocks(given.peers, given.ms, chooser(None))
    return list(dict.fromkeys(found))


def start(one: str, given: argparse.Namespace, out: Path) -> subprocess.Popen[str]:
    """A process that imports what it needs, and then waits for a line."""
    command = [sys.executable, __file__, "--one", one, "--out", str(out), "--repeats", str(given.repeats)]
    command += ["--shapes", *(f"{n}x{k}" for n, k in given.shapes), "--ms", *map(str, given.ms)]
    command += ["--limit", str(given.limit * 0.5), "--formats", *given.formats, "--pairs", *given.pairs]
    command += ["--peers", *given.peers]
    command += ["--schedule", given.schedule] if given.schedule else []
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def finished(process: subprocess.Popen[str], seconds: float) -> tuple[int | None, str]:
    """(exit status, or None for a process that was ended since its time was up; what it printed)."""
    try:
        printed, _ = process.communicate("go\n", timeout=max(1.0, seconds))
        return process.returncode, printed
    except subprocess.TimeoutExpired:
        process.kill()
        return None, process.communicate()[0]


def last_line(printed: str) -> str:
    return (printed.strip().splitlines() or ["nothing printed"])[-1][:300]


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything that was asked for, as far as the time goes; --out is rewritten after each process."""
    deadline = time.time() + given.limit
    ours = any(name in given.peers for name in (OURS, *BLOCKS))
    compiling = start(COMPILE, given, folder / "compile") if ours else None
    if compiling is not None and compiling.stdin is not None:
        compiling.stdin.write("go\n")
        compiling.stdin.flush()
    found: dict[str, Any] = {**_measured_roof(given, folder), "absent": {}, "rows": []}
    mine = [*given.formats, *given.pairs]
    turns = [one for name in given.peers for one in (mine if name == OURS else [name])]
    outs = [folder / f"{i}.json" for i in range(len(turns))]
    following = start(turns[0], given, outs[0]) if turns else None
    for i, one in enumerate(turns):
        if compiling is not None and one not in PEERS:
            print(compiling.communicate()[0].strip(), flush=True)
            compiling = None
        began, process = time.time(), following
        following = start(turns[i + 1], given, outs[i + 1]) if i + 1 < len(turns) else None
        assert process is not None
        status, printed = finished(process, min(deadline - began, given.peer_limit))
        if outs[i].exists():
            found["rows"] += json.loads(outs[i].read_text())
        if status != 0:
            found["absent"][one] = "ended: its time was up" if status is None else last_line(printed)
        print(f"{one:22} {time.time() - began:5.0f} s   {found['absent'].get(one, '')}", flush=True)
        _save(found, given.out)
    return {**found, "rows": finish(found["rows"], found["roof"])}


def _measured_roof(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    out = folder / "roof.json"
    status, printed = finished(start(ROOF, given, out), given.limit)
    if status != 0:
        raise SystemExit(f"the card's roof could not be measured: {last_line(printed)}")
    found: dict[str, Any] = json.loads(out.read_text())
    speeds = found["roof"]
    print(", ".join(f"{name} {value}" for name, value in found.items() if isinstance(value, str)))
    flops = ", ".join(f"{name} {speeds[name] / 1e12:.0f} T/s" for name in ("bf16", "fp8", "int8"))
    print(f"reads {speeds['read'] / 1e12:.2f} TB/s; products: {flops}", flush=True)
    return found


def _save(found: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps({**found, "rows": finish(found["rows"], found["roof"])}, indent=1) + "\n")


def show(found: dict[str, Any]) -> None:
    """Tables for people."""
    from rich.console import Console
    from rich.table import Table

    rows, console = found["rows"], Console(width=150)

    def table(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> None:
        made = Table(title=title, title_justify="left")
        for i, column in enumerate(columns):
            made.add_column(column, justify="left" if i < left else "right", no_wrap=True)
        for line in lines:
            # A format's brackets would be read as markup.
            made.add_row(*(cell.replace("[", r"\[") for cell in line))
        console.print(made)

    heads = [f"M={m}" for m in sizes(rows)]
    for n, k in shapes(rows):
        table(f"{n} x {k}, microseconds", ["", *heads], time_lines(rows, n, k), 1)
    for format in formats(rows):
        title = f"bitfold {format}: the best peer's time over ours, and the fraction of the roof"
        table(title.replace("[", r"\["), ["shape", *heads], ratio_lines(rows, format), 1)
    heads = ["format", "rows", "mean ratio", "least ratio", "least roof"]
    table("geometric means", heads, band_lines(rows), 2)
    for row in rows:
        if row.get("failed"):
            console.print(f"{label(row)} {row['n']}x{row['k']} M={row['m']}: {row['failed']}", markup=False)
    for name, reason in found["absent"].items():
        console.print(f"absent: {name}: {reason}", markup=False)


def main() -> None:
    given = options()
    if given.one:
        child(given)
        return
    with tempfile.TemporaryDirectory() as folder:
        show(measure(given, Path(folder)))


if __name__ == "__main__":
    main()
