"""A CPU kernel as a program of its own, without torch: what sanitizers, emulators and valgrind run.

In: a spec, vectors, a compiler. Out: a program (`built`), and what it computes from a call's tensors (`ran`).

    program = built(spec, VECTORS["neon"], folder, ["aarch64-linux-gnu-g++", "-static"])
    y = ran(program, spec, inputs, runner=["qemu-aarch64"])

x comes as float32 or int8 codes, and the epilogue is plain: it is the products that are looked at.
"""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from bitfold.codegen import GemmSpec
from bitfold.codegen.cpp import source
from bitfold.codegen.cpp.build import facts_of
from bitfold.codegen.cpp.library import HEADERS
from bitfold.codegen.cpp.vectors import Vectors

MAIN = Path(__file__).with_name("kernel_main.cpp")


def built(
    spec: GemmSpec,
    vectors: Vectors,
    folder: Path,
    compiler: Sequence[str] = ("g++",),
    flags: Sequence[str] = ("-O3",),
) -> Path:
    """The program, in `folder`; CalledProcessError with the compiler's words if it refuses."""
    return compiled(source(spec), MAIN, vectors, folder, [*compiler, *flags])


def compiled(text: str, main: Path, vectors: Vectors, folder: Path, command: Sequence[str]) -> Path:
    """A program of a kernel's text and what calls it."""
    kernel, program = folder / "kernel.cpp", folder / "kernel"
    kernel.write_text(text, encoding="utf-8")
    told = [f'-DVECTORS="{vectors.header}"', f"-I{HEADERS}", *vectors.flags, "-std=c++17"]
    subprocess.run([*command, *told, str(kernel), str(main), "-o", str(program)], check=True)
    return program


def ran(
    program: Path,
    spec: GemmSpec,
    inputs: Sequence[Tensor],
    *,
    turn: bool | None = False,
    repeats: int = 1,
    runner: Sequence[str] = (),
) -> Tensor:
    """y [m, n]; turn: by panels of x, as many rows of it are, None: if the kernel wants them for so many;
    CalledProcessError if the program fails."""
    assert spec.weights == 1 and spec.epilogue.plain and spec.x == "f32"
    told, facts = spec.inputs(inputs), facts_of(spec, {"run": None, "many": None, "wants": None})
    m = told.x.numel() // spec.k
    parts = dict(zip(spec.weight.parts, told.parts[0], strict=True))
    numbers = [
        m, spec.n, spec.k, facts.padded, facts.stride, facts.scale_row, facts.scale_group, facts.groups,
        facts.sum_cols, facts.codes, -1 if turn is None else int(turn), 4, repeats, facts.scale_count,
    ]  # fmt: skip
    x_scales = told.x_scales
    if x_scales is not None and x_scales.numel() == 1:
        x_scales = x_scales.expand(m, 1)
    blobs = [told.x, x_scales, *(parts.get(name) for name in ("codes", "scales", "zeros", "tensor_scale"))]
    call, result = program.with_name("call"), program.with_name("result")
    with call.open("wb") as file:
        file.write(struct.pack(f"<{len(numbers)}q", *numbers))
        for blob in [*blobs, told.biases[0] if spec.bias else None]:
            data = b"" if blob is None else blob.contiguous().view(torch.uint8).numpy().tobytes()
            file.write(struct.pack("<q", len(data)) + data)
    subprocess.run([*runner, str(program), str(call), str(result)], check=True)
    return torch.frombuffer(bytearray(result.read_bytes()), dtype=torch.float32).reshape(m, spec.n)
