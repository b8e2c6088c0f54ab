"""What NVIDIA's tools, which come with Triton, read off a compiled kernel. No GPU is needed.

In: a cubin. Out: registers and stack of a thread; the listing of its machine code.

    resources(made.asm["cubin"])      ->   (96, 0)
    disassembled(made.asm["cubin"])   ->   "... /*0150*/ LDGSTS.E.BYPASS.128 [R11], [R2.64] ; ..."
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of a thread; a stack is what was spilled."""
    told = _told(cubin, "cuobjdump", "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    if found is None:
        raise RuntimeError(f"cuobjdump told no resources: {told!r}")
    return int(found[1]), int(found[2])


def disassembled(cubin: bytes) -> str:
    """The machine code, with labels where it jumps to."""
    return _told(cubin, "nvdisasm", "-c")


def _told(cubin: bytes, tool: str, option: str) -> str:
    import triton.backends.nvidia

    path = Path(triton.backends.nvidia.__file__).parent / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(path), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
