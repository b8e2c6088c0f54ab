"""What the compiler makes of a kernel, for any GPU, without one: PTX, registers, spills, shared memory.

In: a spec, a schedule, an architecture. Out: a `Compiled`.

    inspect(spec, schedule, arch=90).registers   ->   96
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ..schedule import Schedule
from ..spec import GemmSpec
from .arguments import arguments
from .build import kernel, options
from .machine_code import resources


@dataclass(frozen=True)
class Compiled:
    """registers and spill bytes a thread, shared memory in bytes a program, the texts of the stages, and what
    a disassembler reads."""

    registers: int
    spills: int
    shared: int
    ptx: str
    ttgir: str
    cubin: bytes


@lru_cache(maxsize=256)
def inspect(spec: GemmSpec, schedule: Schedule, arch: int = 90) -> Compiled:
    """Compiled for compute capability `arch` (80, 90, 100), scales with the rows next to each other."""
    schedule.check(spec, arch)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = kernel(spec, schedule)
    types = arguments(spec, schedule, False)
    names = function.arg_names
    strides = {"SN": 1, "SG": spec.n, "SE": spec.n}
    constants = {(names.index(name),): value for name, value in strides.items() if name in names}
    # Without this the compiler sees unaligned pointers: two-byte loads and no asynchronous copies.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if types[name].startswith("*") or (name == "x_stride" and spec.k % 16 == 0)
    }
    made = triton.compile(
        ASTSource(function, dict(types), constants, aligned),
        target=GPUTarget("cuda", arch, 32),
        options=options(schedule),
    )
    cubin = made.asm["cubin"]
    registers, spills = resources(cubin)
    return Compiled(registers, spills, made.metadata.shared, made.asm["ptx"], made.asm["ttgir"], cubin)
