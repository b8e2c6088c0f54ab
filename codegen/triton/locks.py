"""Counters by which the parts of a split find out which of them comes last: zero before a kernel, and after.

In: a device, how many. Out: int32 zeros on it.

    locks(torch.device("cuda"), 448)   ->   a slice of memory that is zero, and that the kernel leaves zero

Zeroing them anew for each call would cost a kernel of its own, as long as a small product takes. Kernels that
run one after the other share counters, and kernels that may run at the same time must not: each stream has
counters of its own, and each call that a CUDA graph captures has its own too, as a graph may be replayed on
any stream. When the memory set aside for captured calls is used up, a call zeroes its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

# Counters set aside on a device: enough for two thousand captured calls of 528 programs.
RESERVED = 1 << 20
LINE = 32  # counters
# Counters of a stream; a call that needs more zeroes its own.
OF_STREAM = 1 << 14


@dataclass
class _Arena:
    """Zeros on one device, given out from the start."""

    memory: Tensor
    used: int = 0
    of_streams: dict[int, Tensor] = field(default_factory=dict)

    def take(self, count: int) -> Tensor | None:
        """Lines of the cache of its own: counters of two calls in one would wait for each other, and a
        kernel is compiled anew for an address that is no multiple of 16."""
        count = -(-count // LINE) * LINE
        if self.used + count > self.memory.numel():
            return None
        self.used += count
        return self.memory[self.used - count : self.used]


# The one thing here that changes: counters live as long as the process, on each device.
_arenas: dict[torch.device, _Arena] = {}


def reserve(device: torch.device) -> None:
    """Sets the counters of a CUDA device aside. Call it before a CUDA graph is warmed up or captured: memory
    that is taken from a graph's own pool must not outlive the graph."""
    device = torch.device(device.type, torch.cuda.current_device() if device.index is None else device.index)
    if device not in _arenas:
        _arenas[device] = _Arena(torch.zeros(RESERVED, dtype=torch.int32, device=device))


def locks(device: torch.device, count: int) -> Tensor:
    """`count` int32 zeros."""
    arena = _arenas.get(device) if device.type == "cuda" else None
    found = None
    if arena is not None and torch.cuda.is_current_stream_capturing():  # of the current device: see `fused`
        found = arena.take(count)
    elif arena is not None and count <= OF_STREAM:
        stream = torch.cuda.current_stream(device).cuda_stream
        if stream not in arena.of_streams and (own := arena.take(OF_STREAM)) is not None:
            arena.of_streams[stream] = own
        found = arena.of_streams.get(stream)
    return torch.zeros(count, dtype=torch.int32, device=device) if found is None else found[:count]
