"""The roof over every kernel of a device: how fast it reads memory, and how fast it multiplies.

In: a device. Out: a `Roof`, and of some work the least time that it can take, and which of the two is the
bound.

    roof = roof_of(torch.device("cpu"))     measured here: Roof("AMD EPYC ...", read=3.1e10, flops=1.7e11)
    roof.seconds(flops=2e6, bytes=4e6)      ->  1.3e-4;  roof.bound(...)  ->  "memory"

    time >= max(bytes / read, flops / rate)     (Williams, Waterman, Patterson 2009)

A GPU's figures are `codegen/device.py`'s (data sheets, times what was measured of them). A processor's are
measured when asked for, in a fifth of a second: a sum over memory that no cache holds, a square product in
float32. A cache may hold a small weight, so that its kernel runs above this roof: the roof is main memory's.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from ..codegen.device import Device, from_properties

_MEMORY = 64 << 20  # floats of the sum, 256 MiB: more than the last cache of most processors
_SIDE = 1024
_TRIES = 4


@dataclass(frozen=True)
class Roof:
    """read: bytes a second; flops: operations a second."""

    name: str
    read: float
    flops: float

    @property
    def ridge(self) -> float:
        """Operations for each byte from which on multiplying is the bound."""
        return self.flops / self.read

    def seconds(self, flops: float, bytes: float) -> float:
        """The least time."""
        return max(flops / self.flops, bytes / self.read)

    def bound(self, flops: float, bytes: float) -> str:
        """`compute` or `memory`."""
        return "compute" if flops / self.flops > bytes / self.read else "memory"


def of_card(card: Device) -> Roof:
    """A GPU's."""
    return Roof(card.name, card.read, card.flops)


@cache
def roof_of(device: torch.device) -> Roof:
    """That of a device of this machine, once a process."""
    if device.type == "cuda":
        return of_card(from_properties(torch.cuda.get_device_properties(device)))
    numbers = torch.ones(_MEMORY)
    square = torch.ones(_SIDE, _SIDE)
    read = numbers.nbytes / _best(numbers.sum)
    flops = 2 * _SIDE**3 / _best(lambda: square @ square)
    return Roof(f"{processor()}, {torch.get_num_threads()} threads", read, flops)


def _best(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_TRIES):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def processor() -> str:
    """Its name as the system tells it."""
    told = Path("/proc/cpuinfo")
    if told.exists():
        for line in told.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
