"""A CPU convolution as a program of its own, without torch, as `kernel_alone.py` has products.

In: a spec, vectors, a compiler. Out: a program (`built`), and what it computes from a call's tensors (`ran`).

    program = built(spec, VECTORS["neon"], folder, ["aarch64-linux-gnu-g++", "-static"])
    results = ran(program, spec, inputs, runner=["qemu-aarch64"])

What `conv_runtime.cpp` makes ready is made ready here, for specs whose groups have one row of the weight or
several channels of x, and whose epilogue has no batch norm of its own.
"""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from kernel_alone import compiled
from torch import Tensor

from bitfold.codegen.conv import ConvSpec
from bitfold.codegen.cpp.conv_build import facts_of
from bitfold.codegen.cpp.conv_end import normed
from bitfold.codegen.cpp.conv_source import source
from bitfold.codegen.cpp.vectors import Vectors

MAIN = Path(__file__).with_name("conv_main.cpp")
LANES = 16  # rows of a panel; what is read behind the last channel, too


def built(
    spec: ConvSpec,
    vectors: Vectors,
    folder: Path,
    compiler: Sequence[str] = ("g++",),
    flags: Sequence[str] = ("-O3",),
) -> Path:
    """The program, in `folder`; CalledProcessError with the compiler's words if it refuses."""
    return compiled(source(spec), MAIN, vectors, folder, [*compiler, *flags])


def alone(spec: ConvSpec) -> bool:
    """Whether such a program computes it."""
    return not normed(spec.epilogue) and (not spec.depthwise or spec.n == spec.groups)


def ran(program: Path, spec: ConvSpec, inputs: Sequence[Tensor], runner: Sequence[str] = ()) -> list[Tensor]:
    """The results; CalledProcessError if the program fails."""
    assert alone(spec), spec
    told, facts = spec.inputs(list(inputs)), facts_of(spec, {"run": None, "widen": None})
    x, unit, *zero = told.x
    lead, image = x.shape[0], x.shape[2:] if spec.kernel else ()
    if spec.kernel:  # channels innermost
        x = x.movedim(1, -1)
    images, height, width = (lead, *(1, *image)[-2:]) if spec.kernel else (1, 1, x.numel() // spec.k)
    down, across = spec.size(height, width) if spec.kernel else (1, width)
    groups = 1 if spec.depthwise else spec.groups
    coded = sum(1 << i for i, f in enumerate(spec.writes) if f is not None)
    numbers = [
        images, height, width, spec.k * spec.groups, down, across, spec.n,
        *(spec.kernel or (1, 1)), *spec.stride, *spec.padding[:2], *spec.dilation,
        groups, spec.n // groups, spec.k, int(zero[0]) if zero else 0,
        LANES * facts.row_bytes, len(spec.writes), coded, len(told.extras), len(told.vectors),
    ]  # fmt: skip
    codes, scales = told.parts
    behind = torch.zeros(LANES)
    given = iter(told.scales)
    of_results = [next(given) if f is not None else (torch.ones(1),) for f in spec.writes]
    blobs = [
        torch.cat([x.reshape(-1), torch.zeros(64, dtype=torch.uint8)]),
        _panels(codes.reshape(groups, -1), spec.n // groups, facts.row_bytes, 1 if spec.depthwise else 4),
        torch.cat([(unit * scales.view(-1)).expand(spec.n), behind]),
        torch.cat([torch.zeros(spec.n) if told.bias is None else told.bias, behind]),
        torch.cat([1 / one[0].view(1) for one in of_results]),
        torch.tensor([int(one[1]) if len(one) > 1 else 0 for one in of_results], dtype=torch.int32),
        torch.cat([behind[:0], *(part for vector in told.vectors for part in (vector, behind))]),
        torch.tensor([float(one[1]) if len(one) > 1 else 1.0 for one in told.extras]),
        torch.tensor([float(one[2]) if len(one) > 2 else 0.0 for one in told.extras]),
        *(one[0].movedim(1, -1) if spec.kernel else one[0] for one in told.extras),
    ]
    call, result = program.with_name("call"), program.with_name("result")
    with call.open("wb") as file:
        file.write(struct.pack(f"<{len(numbers)}q", *numbers))
        for blob in blobs:
            data = blob.contiguous().view(torch.uint8).numpy().tobytes()
            file.write(struct.pack("<q", len(data)) + data)
    subprocess.run([*runner, str(program), str(call), str(result)], check=True)
    found, rest = [], torch.frombuffer(bytearray(result.read_bytes()), dtype=torch.uint8)
    for f in spec.writes:
        size = images * down * across * spec.n * (4 if f is None else 1)
        y, rest = rest[:size] if f is not None else rest[:size].view(torch.float32), rest[size:]
        kept = (down, across)[2 - len(image) :]
        y = y.view(lead, *kept, spec.n).movedim(-1, 1) if spec.kernel else y.view(*x.shape[:-1], spec.n)
        found.append(y)
    return found


def _panels(codes: Tensor, rows: int, row_bytes: int, unit: int) -> Tensor:
    """[groups, bytes] -> panels of sixteen rows; one that ends a group has rows of zeros behind its own."""
    whole, narrow = divmod(rows, LANES)
    size = LANES * row_bytes
    found = codes[:, : whole * size]
    if narrow:
        last = codes[:, whole * size :].reshape(len(codes), row_bytes // unit, narrow, unit)
        wide = torch.nn.functional.pad(last, (0, 0, 0, LANES - narrow))
        found = torch.cat([found, wide.flatten(1)], 1)
    return found
