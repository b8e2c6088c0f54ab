"""What the compiler makes of a pipelined kernel, without a GPU: registers, spills, products on their way.

In: a spec, a schedule. Out: a `Made`.

    inspect_pipelined(spec, schedule).drained   ->   1
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from ..pipelined import Pipelined
from ..spec import GemmSpec
from .arguments import reads_bytes, stored, weight_types
from .lines import POINTERS
from .machine_code import disassembled, resources
from .pipelined_build import blocks, options, pipelined_kernel, shared_layout, widths


@dataclass(frozen=True)
class Made:
    """registers and spilled bytes of a thread, shared memory of a program in bytes, PTX and machine code."""

    registers: int
    spills: int
    shared: int
    ptx: str
    sass: str

    @property
    def products(self) -> int:
        """Instructions that multiply."""
        return len(re.findall(r"\b[HQI]GMMA\b", self.sass))

    @property
    def drained(self) -> int:
        """How often the code waits for all products of a warp. One a group, at the end of a piece, is meant;
        where the compiler finds no way to keep products on their way, it adds one to each of them."""
        return self.sass.count("WARPGROUP.DEPBAR.LE gsb0, 0x0")


@lru_cache(maxsize=256)
def inspect_pipelined(spec: GemmSpec, schedule: Pipelined) -> Made:
    """What the compiler makes of the kernel for compute capability 9.0, with scales that have neighbouring
    rows side by side."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    function = pipelined_kernel(spec, schedule)
    types = _signature(spec, schedule)
    names = function.arg_names
    constants = {(names.index("SN"),): 1, (names.index("SG"),): spec.n}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name].startswith("*")}
    made = triton.compile(
        GluonASTSource(function, types, constants, aligned),
        target=GPUTarget("cuda", 90, 32),
        options=options(schedule),
    )
    cubin = made.asm["cubin"]
    registers, spills = resources(cubin)
    return Made(registers, spills, made.metadata.shared, made.asm["ptx"], disassembled(cubin))


def _signature(spec: GemmSpec, schedule: Pipelined) -> dict[str, str]:
    """Types of the kernel's arguments, as Triton writes them; absent tensors stand as y does."""
    units = "i8" if spec.activation is not None else "i16"
    kinds = {
        "x": POINTERS[spec.lane][1:],
        "codes": "fp8e4nv" if reads_bytes(spec) else units,
        "y": POINTERS[spec.x][1:],
    }
    maps = {
        name: f"tensordesc<{kinds[name]}{block},{shared_layout(block, widths(spec)[name])!r}>"
        for name, block in blocks(spec, schedule).items()
    }
    held = weight_types(spec, units)
    if spec.activation is not None and spec.activation.scale is not None:
        held["x_scales"] = stored(spec.activation.scale)
    rest = {
        **{name: POINTERS[held.get(name, spec.x)] for name in ("scales", "x_scales", "zeros", "level")},
        "bias": POINTERS[spec.x],
        "partial": "*fp32",
        "flags": "*i32",
    }
    return maps | rest | {"m": "i32", "SN": "constexpr", "SG": "constexpr"}
