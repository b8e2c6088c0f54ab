"""Epilogues on the library's sums: values through Triton's interpreter against torch, and what is compiled.

sums [M, n] of 2 weights, mul(silu(y0),y1)   ->   y [M, n], rounded once
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bitfold.codegen import GemmSpec
from bitfold.codegen.triton.finish import SIZE, arguments, finish_kernel, finish_source, tile
from bitfold.lowering.fused import finish

Interpret = Callable[..., dict[str, Any]]

CASES = [
    "linear {n}x64 bf16 2*int8[halves64] -> mul(silu(y0),y1)",
    "linear {n}x64 bf16 int8[halves64] bias -> add(y0,e0)",
    "linear {n}x64 f16 2*int8[halves64] bias -> mul(gelu_tanh(y0),sub(y1,v0))",
    "linear {n}x64 bf16 int8[halves64] -> f32(add(mul(tanh(y0),v0),e0))",
    "linear {n}x64 f16 3*int8[halves64] -> clamp(add(y0,mul(y1,y2)),-0.5,0.25)",
    "linear {n}x64 bf16 int8[halves64] bias -> relu(y0)",
]
SHAPES = [(1, 1), (5, 33), (3, 64), (2, 1024), (2, 1500), (0, 8)]


def operands(spec: GemmSpec, m: int) -> tuple[list[Tensor], list[Tensor]]:
    """(inputs of the kernel, of which the weights are not read; the sums)"""
    make = torch.Generator().manual_seed(spec.n + m)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make).to(spec.dtype)

    parts = [torch.zeros(1, dtype=torch.uint8)] * (len(spec.weight.parts) * spec.weights)
    inputs = [drawn(m, spec.k), *parts, *(drawn(spec.n) for _ in range(spec.weights * spec.bias))]
    inputs += [drawn(m, spec.n) for _ in range(spec.epilogue.count("e"))]
    inputs += [drawn(spec.n) for _ in range(spec.epilogue.count("v"))]
    return inputs, [drawn(m, spec.n) for _ in range(spec.weights)]


@pytest.mark.parametrize("text", CASES)
def test_values(interpret: Interpret, text: str) -> None:
    for m, n in SHAPES:
        spec = GemmSpec.parse(text.format(n=n))
        inputs, sums = operands(spec, m)
        want = finish(spec, sums, spec.inputs(inputs))
        told = interpret(what="finish", spec=spec, inputs=inputs, sums=sums)
        assert told["guarded"] and told["y"].dtype == want.dtype == spec.out
        # One rounding each, which the interpreter makes towards zero; 32 of float32 on the way.
        ulp = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 0.0}[spec.out]
        near = ulp + 32 * 2.0**-23
        torch.testing.assert_close(told["y"], want, rtol=near, atol=2.0**-24 + 32 * 2.0**-23)


def test_a_nan_and_an_infinity_stay(interpret: Interpret) -> None:
    spec = GemmSpec.parse(CASES[0].format(n=4))
    inputs, sums = operands(spec, 1)
    sums[0][0, :2] = torch.tensor([float("nan"), float("inf")])
    y = interpret(what="finish", spec=spec, inputs=inputs, sums=sums)["y"]
    assert y[0, 0].isnan() and y[0, 1].abs() == float("inf")


def test_programs_cover_rows_of_any_length() -> None:
    assert tile(1) == (SIZE, 1) and tile(33) == (16, 64) and tile(1024) == (1, 1024) == tile(28672)


def test_the_expression_is_the_kernel_s_own() -> None:
    spec = GemmSpec.parse("linear 14336x4096 bf16 2*int4[g128,halves256] -> mul(silu(y0),y1)")
    lines, result = spec.epilogue.triton({"y0": "y0", "y1": "y1"})
    text = finish_source(spec)
    assert all(f"    {line}\n" in text for line in lines)
    assert f"tl.store(y + at, {result}.to(tl.bfloat16), mask=kept)" in text


def test_compiled_it_reads_and_writes_16_bytes_at_once() -> None:
    """Eight numbers in one load, for both inputs and the result."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    spec = GemmSpec.parse("linear 14336x4096 bf16 2*int4[g128,halves256] -> mul(silu(y0),y1)")
    types = arguments(spec)
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind != "i32"}
    source = ASTSource(finish_kernel(spec), dict(types), {}, aligned)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    assert ptx.count("ld.global.v4.b32") == 2 and ptx.count("st.global.v4.b32") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("text", CASES)
def test_values_on_a_gpu(text: str) -> None:
    from bitfold.codegen.triton.finish import finish as finish_at_once

    for m, n in [*SHAPES, (4096, 14336)]:
        spec = GemmSpec.parse(text.format(n=n))
        inputs, sums = ([tensor.cuda() for tensor in group] for group in operands(spec, m))
        want = finish(spec, sums, spec.inputs(inputs))
        y = finish_at_once(spec, sums, spec.inputs(inputs))
        torch.testing.assert_close(y, want, rtol=2.0**-7, atol=2.0**-18)
