"""What the compiler makes of a kernel, for any GPU, without one: PTX, registers, spills, shared memory.

In: a spec, a schedule, an architecture. Out: a `Compiled`.

    inspect(spec, schedule, arch=90).registers   ->   96
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..schedule import Schedule
from ..spec import GemmSpec
from .arguments import arguments
from .build import _options, kernel


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
        options=_options(schedule),
    )
    cubin = made.asm["cubin"]
    registers, spills = _resources(cubin)
    return Compiled(registers, spills, made.metadata.shared, made.asm["ptx"], made.asm["ttgir"], cubin)


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) of a compiled kernel, as `cuobjdump` reads them."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    if found is None:
        raise RuntimeError(f"cuobjdump told no resources: {told!r}")
    return int(found[1]), int(found[2])
