"""Products for tests of CPU kernels: formats, operands of a call, the answer in float64 and its bound.

    pair("int4[g64] x int8")  ->  the spec, laid out;  check(spec, m=5)  ->  y within `bound`

The cases' formats are those of the Triton kernels' tests. Rows of x have four numbers each, or all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitfold.codegen import GemmSpec
from bitfold.codegen.cpp import build
from bitfold.codegen.cpp.body import Body
from bitfold.codegen.cpp.support import cpu_layout, obstacle
from bitfold.codegen.cpp.vectors import Vectors
from bitfold.codegen.epilogue import OPS, Apply
from bitfold.formats import Format, Quantized, format

U = 2.0**-24


FAST = [
    "int4[g64]", "int4", "int8", "int3[g64]", "uint4[g32,zero]", "uint2[g64,f16,zero:min]", "uint3[zero]",
    "mxfp4", "nvfp4", "nf4[g64]", "float8_e4m3fn", "float6_e2m3[16x32,f32]",
]  # fmt: skip


MORE = [
    "int2[g32]", "int4[g128]", "int4[g64,e4m3]", "int4[unscaled]", "int6", "int8[g32,f32]", "int8[128x128]",
    "int8f6[g32,e8m0]", "uint4[g128,zero:float]", "uint4[tensor,zero]", "uint4[g48,f32,zero:min]", "mxfp8",
    "float8_e4m3fn[g64,e4m3,two_level]", "float8_e5m2fnuz", "float4_e2m1b30[g32,f32]", "ternary", "int1[g32]",
    "int4[g16,f16]", "int4[tensor]", "int5[g32,f32]", "int7[g64,f16]", "uint1[g32,zero]", "uint8[g16,zero]",
    "mxfp6_e3m2", "float8_e5m2[g32]", "float5_e2m2[g64]", "float8_e5m2b0", "int1_twos",
]  # fmt: skip


INTEGERS = [
    "int8 x int8", "int4[g64] x int8", "int4 x int8", "uint4[g64,zero] x int8", "uint8[zero] x int8[tensor]",
    "int3[g64] x int8", "uint4[zero:float] x int8", "int8[32x32] x int8[g32,f32]", "int6[unscaled] x int8",
    "uint2[g32,f16,zero:min] x int8",
]  # fmt: skip


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sizes(f: Format, activation: Format | None = None) -> tuple[int, int]:
    """N and K that are no whole tiles, as far as the groups let them."""
    held = [g.scale.granularity for g in (f, activation) if g is not None and g.scale is not None]
    cols = max((grain.cols or 1 for grain in held), default=1)
    rows = max((grain.rows or 1 for grain in held), default=1)
    return -(-13 // rows) * rows, -(-200 // cols) * cols


def laid(text: str, activation: Format | None = None) -> GemmSpec:
    f = format(text)
    n, k = sizes(f, activation)
    found = cpu_layout(f, k, activation)
    assert found is not None, text
    return GemmSpec(found, n, k, "f32", activation=activation)


def pair(text: str) -> GemmSpec:
    weight, _, activation = text.partition(" x ")
    return laid(weight, format(activation) if activation else None)


def operands(spec: GemmSpec, m: int, seed: int) -> list[Tensor]:
    x = drawn(m, spec.k, seed=seed)
    for i in range(seed % 2, m, 2):
        mask = torch.ones(spec.k, dtype=torch.bool)
        mask[torch.randperm(spec.k, generator=torch.Generator().manual_seed(seed + i))[:4]] = False
        x[i, mask] = 0
    found = [x.to(spec.dtype)] if spec.activation is None else list(spec.activation.quantize(x).parts)
    for which in range(spec.weights):
        weight = drawn(spec.n, spec.k, seed=seed + 10 + which) * (0.5 + torch.arange(spec.n) % 3)[:, None]
        found += spec.weight.quantize(weight).parts
    found += [drawn(spec.n, seed=seed + 20 + i).to(spec.dtype) for i in range(spec.weights * spec.bias)]
    found += [drawn(m, spec.n, seed=seed + 30 + i).to(spec.dtype) for i in range(spec.epilogue.count("e"))]
    return found + [drawn(spec.n, seed=seed + 40 + i).to(spec.dtype) for i in range(spec.epilogue.count("v"))]


def evaluated(of: object, given: dict[str, Tensor]) -> Tensor:
    if isinstance(of, Apply):
        return OPS[of.op].run(*(evaluated(operand, given) for operand in of.operands))
    return given[of] if isinstance(of, str) else of  # type: ignore[return-value]


def expected(spec: GemmSpec, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(y, bound) in float64. A sum of K products and its scaling lose at most (2 K + 32) u sum |x| |w| in
    float32, with offsets and codes taken apart where they cancel; an epilogue four times its slope's."""
    told = spec.inputs(inputs)
    x = told.x.double()
    if spec.activation is not None:
        assert told.x_scales is not None
        x = Quantized.from_parts(spec.activation, [told.x, told.x_scales], spec.k).dequantize(torch.float64)
    named, moved = {}, {}
    for i, parts in enumerate(told.parts):
        q = Quantized.from_parts(spec.weight, parts, spec.k)
        w = q.dequantize(torch.float64)
        apart = w.abs()
        if Body(spec).needs_sums:
            scale = (
                torch.ones(())
                if q.scales is None
                else spec.weight.scale.decode(q.scales).double().abs().max()
            )  # type: ignore[union-attr]
            apart = apart + 2 * (spec.weight.element.high - spec.weight.element.low) * scale
        y = x @ w.T
        bias = told.biases[i].double() if spec.bias else torch.zeros(())
        named[f"y{i}"] = y + bias
        moved[f"y{i}"] = (2 * spec.k + 32) * U * (x.abs() @ apart.T + bias.abs())
    matrices = spec.epilogue.count("e")
    named |= {f"e{i}": extra.double() for i, extra in enumerate(told.extras[:matrices])}
    named |= {
        f"v{i}": extra.double().expand(x.shape[0], -1) for i, extra in enumerate(told.extras[matrices:])
    }
    leaves = {name: value.clone().requires_grad_() for name, value in named.items()}
    y = evaluated(spec.epilogue.root, leaves)
    if not isinstance(spec.epilogue.root, str):
        y.sum().backward()
    bound = sum(
        (
            moved[name] * (1 if leaf.grad is None else 4 * leaf.grad.abs() + 1e-3)
            for name, leaf in leaves.items()
            if name in moved
        ),
        start=torch.zeros(()),
    )
    y = y.detach()
    largest = torch.stack([value.abs() for value in named.values()]).amax(0)
    r = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[spec.out]
    return y, bound + 32 * U * (largest + 1) * (not spec.epilogue.plain) + r * y.abs() + 2.0**-24 * (r > 0)


def check(spec: GemmSpec, m: int, seed: int = 0, vectors: Vectors | None = None) -> None:
    why = obstacle(spec, vectors)
    assert why is None, why
    build.know([spec], vectors)
    inputs = operands(spec, m, seed)
    (y,) = torch.ops.bitfold.fused(inputs, str(spec))
    want, bound = expected(spec, inputs)
    assert y.dtype == spec.out and y.shape == (m, spec.n)
    error = (y.double() - want).abs()
    assert (error <= bound).all(), f"{spec}, M={m}: {(error / bound).nan_to_num(0).max():.3g} tolerances"
