"""What the compiler makes of a pipelined kernel, without a GPU: registers, spills, products on their way.

In: a spec, a schedule. Out: a `Made`.

    inspect_pipelined(spec, schedule).drained   ->   1
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..pipelined import Pipelined
from ..spec import GemmSpec
from .arguments import reads_bytes
from .lines import POINTERS
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
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        resources = _told("cuobjdump", "--dump-resource-usage", file.name)
        sass = _told("nvdisasm", file.name)
    used = re.search(r"REG:(\d+) STACK:(\d+)", resources)
    if used is None:
        raise RuntimeError(f"cuobjdump told no resources: {resources!r}")
    return Made(int(used[1]), int(used[2]), made.metadata.shared, made.asm["ptx"], sass)


def _told(tool: str, *arguments: str) -> str:
    import triton.backends.nvidia

    path = Path(triton.backends.nvidia.__file__).parent / "bin" / tool
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout


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
    y, scale = POINTERS[spec.x], spec.weight.scale
    stored = y
    if scale is not None:
        stored = "*u8" if scale.dtype in ("e8m0", "e4m3") else POINTERS[scale.dtype]
    zeros = ("*i8" if scale.zero == "int" else stored) if scale is not None and scale.zero != "none" else y
    level = "*fp32" if scale is not None and scale.two_level else y
    of_x = y
    if spec.activation is not None and spec.activation.scale is not None:
        dtype = spec.activation.scale.dtype
        of_x = "*u8" if dtype in ("e8m0", "e4m3") else POINTERS[dtype]
    rest = {
        "scales": stored,
        "x_scales": of_x,
        "zeros": zeros,
        "level": level,
        "bias": y,
        "partial": "*fp32",
        "flags": "*i32",
    }
    return maps | rest | {"m": "i32", "SN": "constexpr", "SG": "constexpr"}
