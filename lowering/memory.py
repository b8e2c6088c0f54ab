"""Freed memory, given back to the system.

In: a process that has just let go of many blocks of a few MiB. Out: the same process, smaller.

    release(before - held(model))      after quantizing SmolLM2: 984 MiB resident -> 640 MiB

glibc keeps freed blocks below its (growing) threshold for later use, so that a person who quantizes a model
to make it smaller would not see it. Elsewhere there is nothing to do.
"""

from __future__ import annotations

import ctypes
import gc
import sys

from torch import nn

# Collecting takes a third of a second in a process with torch; a smaller gain is not worth it.
WORTH = 64 << 20


def held(model: nn.Module) -> int:
    """Bytes of all parameters, each counted once."""
    return sum(parameter.nbytes for parameter in model.parameters())


def release(freed: int) -> None:
    """After `freed` bytes were let go: collect what only cycles hold, give free memory to the system."""
    if freed < WORTH:
        return
    gc.collect()
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
