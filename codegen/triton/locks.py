"""Counters by which the parts of a split find out which of them comes last: zero before a kernel, and after.

In: a device, how many. Out: int32 zeros on it.

    locks(torch.device("cuda"), 448)   ->   a slice of memory that is zero, and that the kernel leaves zero

Zeroing them anew for each call would cost a kernel of its own, as long as a small product takes. Kernels that
run one after the other share counters, and kernels that may run at the same time must not: each stream has
counters of its own, and so has each stream of each CUDA graph that is captured, as a graph may be replayed on
any stream, though never twice at a time. When the memory set aside is used up, a call zeroes its own.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

# Counters set aside on a device: enough for five hundred graphs.
RESERVED = 1 << 20
LINE = 32  # counters
# Counters of a stream; a call that needs more zeroes its own. Of a stream of a graph, as many at least.
OF_STREAM, OF_GRAPH = 1 << 14, 1 << 11
CAPTURING = 1  # CU_STREAM_CAPTURE_STATUS_ACTIVE


@dataclass
class _Arena:
    """Zeros on one device, given out from the start."""

    memory: Tensor
    used: int = 0
    of_streams: dict[int, Tensor] = field(default_factory=dict)
    of_graphs: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def take(self, count: int) -> Tensor | None:
        """Lines of the cache of its own: counters of two streams in one would wait for each other, and a
        kernel is compiled anew for an address that is no multiple of 16."""
        count = -(-count // LINE) * LINE
        if self.used + count > self.memory.numel():
            return None
        self.used += count
        return self.memory[self.used - count : self.used]


# The one thing here that changes: counters live as long as the process, on each device.
_arenas: dict[torch.device, _Arena] = {}


def reserve(device: torch.device) -> None:
    """Sets the counters of a CUDA device aside, once. Before a CUDA graph is warmed up or captured, as the
    first call does too that is not captured: memory from a graph's own pool must not outlive the graph."""
    device = torch.device(device.type, torch.cuda.current_device() if device.index is None else device.index)
    if device not in _arenas:
        _arenas[device] = _Arena(torch.zeros(RESERVED, dtype=torch.int32, device=device))


def locks(device: torch.device, count: int) -> Tensor:
    """`count` int32 zeros."""
    found = None
    if device.type == "cuda":
        # Of the current device: see `fused`.
        capturing = torch.cuda.is_current_stream_capturing()
        if not capturing:
            reserve(device)
        if (arena := _arenas.get(device)) is not None:
            stream = torch.cuda.current_stream(device).cuda_stream
            found = _of_graph(arena, stream, count) if capturing else _of_stream(arena, stream, count)
    return torch.zeros(count, dtype=torch.int32, device=device) if found is None else found[:count]


def _of_stream(arena: _Arena, stream: int, count: int) -> Tensor | None:
    if count > OF_STREAM:
        return None
    if stream not in arena.of_streams and (own := arena.take(OF_STREAM)) is not None:
        arena.of_streams[stream] = own
    return arena.of_streams.get(stream)


def _of_graph(arena: _Arena, stream: int, count: int) -> Tensor | None:
    """Counters of the graph being captured and its stream; of the call alone where the driver does not say
    which graph that is."""
    graph = capture_of(stream)
    if graph is None:
        return arena.take(count)
    held = arena.of_graphs.get((graph, stream))
    if held is None or held.numel() < count:
        held = arena.take(max(count, OF_GRAPH))
        if held is not None:
            arena.of_graphs[graph, stream] = held
    return held


def capture_of(stream: int) -> int | None:
    """A number that no other capture of this process has, of the one that a stream is in; None if it is in
    none, or the driver does not tell. CUDA driver API, cuStreamGetCaptureInfo_v2."""
    ask = _driver()
    if ask is None:
        return None
    status, number = ctypes.c_int(), ctypes.c_uint64()
    failed = ask(ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None)
    return number.value if failed == 0 and status.value == CAPTURING else None


@lru_cache(maxsize=1)
def _driver() -> ctypes._NamedFuncPointer | None:
    """torch has no function for it; the driver's library is in the process already."""
    try:
        return ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2
    except (OSError, AttributeError):
        return None
