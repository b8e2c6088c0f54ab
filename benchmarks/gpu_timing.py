"""Microseconds of a kernel on a GPU, and what the card can do at most.

In: the same call on several copies of its weights. Out: the median time of one call.

    copies = [weight.clone() for _ in range(copies_past_cache(weight.nbytes))]
    microseconds([lambda w=w: linear(x, w) for w in copies])        ->   85.3

The calls are replayed from a CUDA graph, behind a pause on the device that is longer than the submission of
the graph: neither Python nor the driver is timed. The copies exceed the L2 several times over, as the layers
of a model do.
"""

from __future__ import annotations

import math
import shutil
import statistics
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import torch

PAST_CACHE = 400e6  # bytes; the largest L2 of these cards holds 60e6
LONG_ENOUGH = 1500.0  # microseconds in one graph, so that its start is below a percent
PAUSE = 2_000_000  # clock cycles, about a millisecond
MOST_CALLS = 600  # in a graph


def copies_past_cache(nbytes: float) -> int:
    """How many tensors of this size do not fit the L2 together."""
    return max(2, math.ceil(PAST_CACHE / nbytes))


def microseconds(calls: Sequence[Callable[[], Any]], repeats: int = 11) -> float:
    """One call's time: the median over `repeats` replays of all of them."""
    graph = _captured(calls, 1)
    once = _replayed(graph, 3)
    rounds = min(math.ceil(LONG_ENOUGH / once), MOST_CALLS // len(calls))
    if rounds > 1:
        graph = _captured(calls, rounds)
    rounds = max(rounds, 1)
    return _replayed(graph, repeats) / (len(calls) * rounds)


def _captured(calls: Sequence[Callable[[], Any]], rounds: int) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize()  # operands come from another stream
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:  # compiles, tunes and allocates outside of the capture
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(rounds):
                for call in calls:
                    call()
    torch.cuda.synchronize()
    return graph


def _replayed(graph: torch.cuda.CUDAGraph, repeats: int) -> float:
    graph.replay()
    torch.cuda.synchronize()
    found = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(PAUSE)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) * 1e3)
    return statistics.median(found)


def card() -> dict[str, str]:
    """Names and versions that a number is worth nothing without."""
    import triton

    return {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
        "driver": _driver(),
    }


def _driver() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return printed.splitlines()[0]


def read_bandwidth() -> float:
    """Bytes a second of a reduction over 4 GiB; the better of two, which one differs between versions."""
    big = torch.randn(1 << 15, 1 << 15, device="cuda")
    reductions: list[Callable[[], Any]] = [lambda: torch.amax(big, 1), lambda: big.view(torch.int32).sum()]
    return max(big.nbytes / microseconds([one], 9) for one in reductions) * 1e6


def roof(side: int = 8192) -> dict[str, float]:
    """What the card reads in bytes a second, and flops a second of square products in three types."""
    read = read_bandwidth()
    a, b = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    ai, bi = (torch.randint(-127, 128, (side, side), device="cuda", dtype=torch.int8) for _ in range(2))
    one = torch.ones((), device="cuda")
    products: dict[str, Callable[[], Any]] = {
        "bf16": lambda: a @ b.t(),
        "fp8": lambda: torch._scaled_mm(a8, b8.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True),
        "int8": lambda: torch._int_mm(ai, bi.t()),
    }
    flops = {name: 2 * side**3 / microseconds([call], 9) * 1e6 for name, call in products.items()}
    return {"read": read, **flops}
