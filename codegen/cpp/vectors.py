"""What kernels can be written in: the vectors of processors, and which this one has.

    widest()    ->  VECTORS["avx512vnni"];  str(widest())  ->  "avx512vnni"
    runnable()  ->  those of avx512vnni, avx512, avx2, amx_model, portable

New ones are a line in `ALL`, a header that defines what the others do, and a line in `widest` that says who
has them.
"""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch


@dataclass(frozen=True)
class Vectors:
    """name: as texts and tests have it. header: of `headers/`, that defines them. flags: what GCC and Clang
    are told; these say an architecture: by Inductor's -march=native plain C++ becomes the vectors of the
    processor that compiles it, and others may share the library. macros: those of `CHOICES` that are then
    defined. also: names of narrower ones that each such processor has. capability: what
    ATEN_CPU_CAPABILITY makes torch, and so bitfold, take these on a wider processor; none where it cannot.
    lanes: whether lane i of their floats and of sums of bytes is of group i where eight groups of a row lie
    side by side (`formats/group_lanes.py`), as weights do for them then."""

    name: str
    header: str
    flags: tuple[str, ...]
    macros: frozenset[str] = frozenset()
    also: tuple[str, ...] = ()
    capability: str | None = None
    lanes: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def tiles(self) -> bool:
        """Whether products are in tiles of AMX, or of their model."""
        return "BITFOLD_TILES" in self.macros


# What headers choose by besides the vectors' own: those of convolutions, of words, of pairs of products.
CHOICES = ("__AVX2__", "__AVX512F__", "__AVX512VNNI__", "BITFOLD_TILES", "__ARM_FEATURE_DOTPROD")
_AVX2 = frozenset({"__AVX2__"})
_AVX512 = _AVX2 | {"__AVX512F__"}
_VNNI = _AVX512 | {"__AVX512VNNI__"}
_TILES = _VNNI | {"BITFOLD_TILES"}
_OF_AVX512 = ("-march=x86-64-v4",)
_OF_VNNI = (*_OF_AVX512, "-mavx512vnni")
# What every processor of a machine has.
_LEAST = {"x86_64": ("-march=x86-64",), "aarch64": ("-march=armv8-a",), "arm64": ("-march=armv8-a",)}

ALL = (
    Vectors("portable", "portable.h", _LEAST.get(os.uname().machine, ()), capability="default", lanes=True),
    Vectors("avx2", "avx2.h", ("-march=x86-64-v3",), _AVX2, ("portable",), "avx2", lanes=True),
    Vectors("avx512", "avx512.h", _OF_AVX512, _AVX512, ("avx2", "portable")),
    # Tiles in plain C++, for tests where there are none.
    Vectors("amx_model", "avx512.h", (*_OF_VNNI, "-DBITFOLD_AMX_MODEL"), _TILES),
    Vectors("avx512vnni", "avx512.h", _OF_VNNI, _VNNI, ("avx512", "avx2", "amx_model", "portable")),
    Vectors(
        name="amx",
        header="avx512.h",
        flags=(*_OF_VNNI, "-mamx-tile", "-mamx-int8"),
        macros=_TILES,
        also=("avx512vnni", "avx512", "avx2", "amx_model", "portable"),
    ),
    Vectors("neon", "neon.h", ("-march=armv8-a",), also=("portable",)),
    Vectors(
        name="neondot",
        header="neon.h",
        flags=("-march=armv8.2-a+dotprod",),
        macros=frozenset({"__ARM_FEATURE_DOTPROD"}),
        also=("neon", "portable"),
    ),
)
VECTORS = {one.name: one for one in ALL}


@cache
def widest() -> Vectors:
    """The widest vectors that this processor has and a header is written for."""
    found = torch.backends.cpu.get_cpu_capability()
    name = "portable"
    if found == "AVX512":
        name = "avx512vnni" if torch.cpu._is_vnni_supported() else "avx512"
        name = "amx" if name == "avx512vnni" and _has_tiles() else name
    elif found == "AVX2":
        name = "avx2"
    elif os.uname().machine in ("aarch64", "arm64"):
        name = "neondot" if _has_dot() else "neon"
    return VECTORS[name]


def runnable() -> tuple[Vectors, ...]:
    """All vectors that kernels can be written in and that this processor runs: what tests go through."""
    return (widest(), *(VECTORS[name] for name in widest().also))


def _has_dot() -> bool:
    """Whether this processor has ARM's dot product of bytes."""
    told = Path("/proc/cpuinfo")
    apple = sys.platform == "darwin" and os.uname().machine == "arm64"
    return apple or (told.exists() and "asimddp" in told.read_text(encoding="utf-8", errors="replace"))


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
