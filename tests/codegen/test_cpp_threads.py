"""Threads share the rows of a call out among them; however many they are, each row is computed, as by one."""

from __future__ import annotations

import pytest
import torch

from bitfold.codegen import GemmSpec
from bitfold.codegen.cpp import build
from bitfold.codegen.cpp.support import cpu_layout
from bitfold.formats import format

K = 4096  # so long that a few rows are worth a thread
# Rows: fewer than threads have pieces, no multiple of the four that a task takes, many pieces.
ROWS = (3, 26, 263, 1001)
BESIDE = (0, 4, 3, 1)  # products that are one call too


def spec_of(text: str, n: int) -> GemmSpec:
    laid_out = cpu_layout(format(text), K)
    assert laid_out is not None
    return GemmSpec(laid_out, n, K, "f32")


@pytest.mark.parametrize("m", [1, 5])
def test_however_many_threads(m: int) -> None:
    specs = [spec_of("int8", n) for n in ROWS] + [spec_of("int4[g64]", 130)]
    build.know(specs)
    torch.manual_seed(0)
    x = torch.randn(m, K)
    parts = [list(spec.weight.quantize(torch.randn(spec.n, K)).parts) for spec in specs]
    before = torch.get_num_threads()
    found = []  # kept: the next result is in memory that holds none of these
    try:
        for threads in (1, 2, 3, 7, 100):
            torch.set_num_threads(threads)
            alone = [
                torch.ops.bitfold.fused([x, *of], str(spec))[0] for spec, of in zip(specs, parts, strict=True)
            ]
            given = [x, *(part for i in BESIDE for part in parts[i])]
            together = torch.ops.bitfold.fused_beside(given, " & ".join(str(specs[i]) for i in BESIDE))
            found.append([*alone, *together])
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))
    for one, other in zip(found[0][5:], [found[0][i] for i in BESIDE], strict=True):
        assert torch.equal(one, other)
