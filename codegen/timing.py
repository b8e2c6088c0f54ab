"""Microseconds of a call on a CUDA GPU, as a model makes it: weights out of the memory, nothing of Python.

In: the same call on several copies of its weights. Out: the median time of one call.

    copies = [weight.clone() for _ in range(copies_past_cache(weight.nbytes))]
    microseconds([lambda w=w: linear(x, w) for w in copies])        ->   85.3

The calls are replayed from a CUDA graph, behind a pause on the device that is longer than the submission of
the graph: neither Python nor the driver is timed. The copies exceed the L2 several times over, as the layers
of a model do.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

PAST_CACHE = 400e6  # bytes; the largest L2 of these cards holds 126e6
LONG_ENOUGH = 1500.0  # microseconds in one graph, so that its start is below a percent
# A call so long is a product that power limits after some milliseconds: two of them in a row ran 8 % faster
# than a dozen (H200, M = 4096). All of that kind are timed in graphs of at least so many microseconds.
HEAVY, SUSTAINED = 100.0, 10_000.0
PAUSE = 2_000_000  # clock cycles, about a millisecond
MOST_CALLS = 600  # in a graph


def copies_past_cache(nbytes: float) -> int:
    """How many tensors of this size do not fit the L2 together."""
    return max(2, math.ceil(PAST_CACHE / nbytes))


def microseconds(calls: Sequence[Callable[[], Any]], repeats: int = 11) -> float:
    """One call's time: the median over `repeats` replays of all of them."""
    graph = _captured(calls, 1)
    once = _replayed(graph, 3)
    least = SUSTAINED if once / len(calls) > HEAVY else LONG_ENOUGH
    rounds = min(math.ceil(least / once), MOST_CALLS // len(calls))
    if rounds > 1:
        graph = _captured(calls, rounds)
    rounds = max(rounds, 1)
    return _replayed(graph, repeats) / (len(calls) * rounds)


def _captured(calls: Sequence[Callable[[], Any]], rounds: int) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize()  # operands come from another stream
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
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
    found: list[float] = []
    for _ in range(repeats):
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        torch.cuda._sleep(PAUSE)  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) * 1e3)
    return statistics.median(found)
