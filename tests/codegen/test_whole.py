"""A weight decoded as a whole, bit for bit `dequantize`: in Triton's words and in assembly, run on a CPU.

linear 72x576 bf16 int4[g64,halves256]  ->  every number of the weight, and none beside it
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import gluon_machine as machine
import pytest
import torch

from bitfold.codegen import GemmSpec, Walk, kernel_layout, walk
from bitfold.codegen.triton.values import needs_table
from bitfold.codegen.triton.whole import BLOCK_N, whole_source
from bitfold.formats import Quantized

CASES = [
    ("linear 72x576 bf16 int4[g64]", "asm"),
    ("linear 128x512 bf16 int4[g128]", "asm"),
    ("linear 128x512 f16 int4[g128,f16]", "asm"),
    ("linear 64x512 bf16 int4[g128,f32]", "asm"),
    ("linear 72x512 bf16 int8", "asm"),
    ("linear 64x512 bf16 uint4[g64,zero]", "asm"),
    ("linear 64x512 bf16 uint3[g64,f16,zero:min]", "asm"),
    ("linear 64x512 bf16 uint4[g128,zero:float]", "asm"),
    ("linear 64x512 bf16 int3[g64]", "asm"),
    ("linear 72x512 bf16 mxfp4", "asm"),
    ("linear 72x512 bf16 nvfp4", "asm"),
    ("linear 64x512 bf16 int4[unscaled]", "asm"),
    ("linear 64x512 bf16 nf4[g64]", "words"),
    ("linear 64x512 bf16 float8_e4m3fn", "words"),
]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(("text", "way"), CASES)
def test_every_bit(text: str, way: str, plain: bool) -> None:
    given = GemmSpec.parse(text)
    layout = kernel_layout(given.weight, given.k)
    assert layout is not None
    spec = replace(given, weight=layout)
    source = whole_source(spec, plain=plain)
    assert ("inline_asm" in source) == (way == "asm" and not plain)
    torch.manual_seed(spec.n)
    q = spec.weight.quantize(torch.randn(spec.n, spec.k) * torch.exp2(torch.randint(-3, 4, (spec.n, 1))))
    found = walk(spec.weight, spec.k)
    assert isinstance(found, Walk)
    w = torch.full((spec.n + 1, spec.k), float("nan"), dtype=spec.dtype)
    ran(source, spec, q, w, (-(-spec.n // BLOCK_N), found.runs))
    want = spec.weight.dequantize(q).to(spec.dtype)
    assert torch.equal(w[: spec.n].view(torch.int16), want.view(torch.int16))
    assert w[spec.n :].isnan().all()


def ran(source: str, spec: GemmSpec, q: Quantized, w: torch.Tensor, grid: tuple[int, int]) -> None:
    at = [0, 0]
    words = machine.language(machine.Machine())
    words.program_id, words.num_programs = at.__getitem__, grid.__getitem__
    lines = [line for line in source.split("\n") if not line.startswith("import triton")]
    held: dict[str, Any] = {"triton": SimpleNamespace(jit=lambda function: function), "tl": words}
    exec("\n".join(lines), held)
    scales = w if q.scales is None else q.scales
    strides = scales.stride() if q.scales is not None and scales.ndim == 2 else (0, 0)
    scales = scales.view(torch.uint8) if scales.dtype == torch.float8_e4m3fn else scales
    table = torch.tensor(spec.weight.element.values()) if needs_table(spec.weight.element) else w
    tensors = [
        q.codes.view(torch.int16),
        scales,
        w if q.zeros is None else q.zeros,
        w if q.tensor_scale is None else q.tensor_scale,
        table,
        w,
    ]
    for at[0] in range(grid[0]):
        for at[1] in range(grid[1]):
            held["kernel"](*(machine.pointer(tensor) for tensor in tensors), *strides)
