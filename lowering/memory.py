"""Freed memory, given back to the system.

In: a process that has just let go of many blocks of a few MiB. Out: the same process, smaller.

    release()      after quantizing SmolLM2: 984 MiB resident -> 640 MiB

glibc keeps freed blocks below its (growing) threshold for later use, so that a person who quantizes a model
to make it smaller would not see it. Elsewhere there is nothing to do.
"""

from __future__ import annotations

import ctypes
import gc
import sys


def release() -> None:
    """Collect what only cycles hold (captured graphs do), and return free memory to the system on Linux."""
    gc.collect()
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
