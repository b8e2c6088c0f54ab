"""What kernels can be written in: the vectors of processors, and which this one has.

    vectors()   ->  "avx512vnni";  runnable()  ->  ("avx512vnni", "avx512", "avx2", "amx_model", "portable")
    FLAGS["avx512vnni"]  ->  what GCC and Clang are told;  header("avx512vnni")  ->  "avx512.h"

New ones are a line in FLAGS, a header that defines what the others do, and a line here that says who has
them.
"""

from __future__ import annotations

import os
import sys
import warnings
from functools import cache
from pathlib import Path

import torch


def _arm() -> str:
    """The least of ARM's architectures that has what this processor does and kernels use."""
    told = Path("/proc/cpuinfo")
    apple = sys.platform == "darwin" and os.uname().machine == "arm64"
    has = apple or (told.exists() and "asimddp" in told.read_text(encoding="utf-8", errors="replace"))
    return "armv8.2-a+dotprod" if has else "armv8-a"


_PLAIN = {"x86_64": ("-march=x86-64",), "aarch64": ("-march=armv8-a",), "arm64": ("-march=armv8-a",)}
# Vectors -> how GCC and Clang are told of them. Each says an architecture: by Inductor's -march=native plain
# C++ becomes the vectors of the processor that compiles it, and others may share the library.
FLAGS = {
    "avx2": ("-march=x86-64-v3",),
    "avx512": ("-march=x86-64-v4",),
    "avx512vnni": ("-march=x86-64-v4", "-mavx512vnni"),
    "amx": ("-march=x86-64-v4", "-mavx512vnni", "-mamx-tile", "-mamx-int8"),
    # Tiles in plain C++, for tests where there are none.
    "amx_model": ("-march=x86-64-v4", "-mavx512vnni", "-DBITFOLD_AMX_MODEL"),
    "neon": (f"-march={_arm()}",),
    "portable": _PLAIN.get(os.uname().machine, ()),
}
_AVX512 = ("avx512vnni", "amx", "amx_model")
# Vectors -> narrower ones that the same processor has.
_ALSO = {
    "amx": ("avx512vnni", "avx512", "avx2", "amx_model"),
    "avx512vnni": ("avx512", "avx2", "amx_model"),
    "avx512": ("avx2",),
}


@cache
def vectors() -> str:
    """The widest vectors that this processor has and a header is written for."""
    found = torch.backends.cpu.get_cpu_capability()
    if found == "AVX512":
        if not torch.cpu._is_vnni_supported():
            return "avx512"
        return "amx" if _has_tiles() else "avx512vnni"
    if found == "AVX2":
        return "avx2"
    return "neon" if os.uname().machine in ("aarch64", "arm64") else "portable"


def runnable() -> tuple[str, ...]:
    """All vectors that kernels can be written in and that this processor runs: what tests go through."""
    return tuple(dict.fromkeys((vectors(), *_ALSO.get(vectors(), ()), "portable")))


def _has_tiles() -> bool:
    """Whether this process may use AMX: the system keeps tiles for those that ask (`arch_prctl`, once)."""
    if not torch.cpu._is_amx_tile_supported():
        return False
    if torch.cpu._init_amx():
        return True
    warnings.warn(
        "this processor has AMX, but the system does not let this process use it, so kernels do with AVX-512 "
        "VNNI; a kernel of Linux 5.16 or newer that is not sandboxed grants it",
        stacklevel=2,
    )
    return False


def header(vectors: str) -> str:
    """The file that these vectors are written in."""
    return "avx512.h" if vectors in _AVX512 else f"{vectors}.h"
