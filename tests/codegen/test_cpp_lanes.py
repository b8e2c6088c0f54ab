"""Kernels whose weights have eight groups of a row side by side, as AVX2's have: values against float64.

    linear 13x704 f32 int4[g64,lanes.planar64], M = 5    ->   y within `bound`: eight groups, and three

Whole rows of eight groups, and rows that end within eight; x in digits, in floats, in int8, in panels.
"""

from __future__ import annotations

import pytest
import torch
from cpp_cases import check, drawn

from bitfold.codegen import CodegenError, GemmSpec
from bitfold.codegen.cpp import build
from bitfold.codegen.cpp.body import Body
from bitfold.codegen.cpp.digits import MOST, digits
from bitfold.codegen.cpp.support import cpu_layout, obstacle, side_by_side
from bitfold.codegen.cpp.vectors import VECTORS, Vectors, runnable
from bitfold.formats import format
from bitfold.lowering.cpu.target import CpuTarget

FAST = ["int4[g64]", "int3[g128]", "uint4[g32,zero]", "mxfp4", "int4[g64] x int8", "int2[g16] x int8"]
MORE = [
    "nvfp4", "int2[g16]", "int1[g32]", "uint3[g64,f16,zero:min]", "int7[g32,f32]", "int6[g64]",
    "uint4[g128,zero:float]", "int4[g48,f32]", "int4[g64,e4m3]", "int3[g32] x int8",
    "uint5[g32,zero] x int8", "uint2[g32,f16,zero:min] x int8", "int7[g64] x int8[tensor]",
    "int4[g48] x int8", "uint4[g24,zero] x int8", "uint2[g112] x int8",
]  # fmt: skip
HERE = [one for one in (VECTORS["avx2"], VECTORS["portable"]) if one in runnable()]
# In plain C++ what differs from AVX2 most: two of them.
CASES = [
    (one, text) for one in HERE for text in FAST if str(one) != "portable" or text in FAST[:1] + FAST[4:5]
]


def spec_of(text: str, groups: int, **more: object) -> GemmSpec:
    weight, _, activation = text.partition(" x ")
    f, of_x = format(weight), format(activation) if activation else None
    layout = side_by_side(f, of_x)
    assert layout is not None and f.cols is not None
    return GemmSpec(f.with_layout(layout), 13, groups * f.cols, "f32", activation=of_x, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def compiled() -> None:
    for vectors in HERE:
        build.know([spec_of(text, 8) for of, text in CASES if of == vectors], vectors)


@pytest.mark.parametrize(("vectors", "text"), CASES, ids=str)
def test_values(compiled: None, vectors: Vectors, text: str) -> None:
    for groups, m in ((8, 1), (11, 1), (16, 3), (11, 4), (8, 8), (19, 9), (16, 30)):
        check(spec_of(text, groups), m, seed=m, vectors=vectors)


@pytest.mark.slow
@pytest.mark.parametrize("text", FAST + MORE)
@pytest.mark.parametrize("vectors", HERE, ids=str)
def test_more_values(vectors: Vectors, text: str) -> None:
    for groups, m in ((8, 1), (11, 1), (16, 3), (11, 4), (8, 8), (19, 9), (16, 30)):
        check(spec_of(text, groups), m, seed=m, vectors=vectors)


@pytest.mark.parametrize("vectors", HERE, ids=str)
def test_rows_longer_than_a_block_of_scales(vectors: Vectors) -> None:
    for m in (1, 4):
        check(spec_of("int4[g64]", 8 * 9 + 3), m, vectors=vectors)


@pytest.mark.parametrize("text", [text for text in FAST + MORE if " x " not in text])
def test_sums_cannot_overflow(text: str) -> None:
    """By the largest codes and digits: in 16 bits for each digit, in 32 bits joined, in each lane."""
    made = digits(Body(spec_of(text, 8)))
    assert made is not None
    each = made.joined // 8  # numbers of a group, so of a lane
    assert each // 4 * 2 * made.high * 128 < 2**15
    assert each * max(made.base, made.high - made.base) * MOST < 2**31


@pytest.mark.parametrize("vectors", HERE, ids=str)
def test_a_row_of_zeros_is_zero(vectors: Vectors) -> None:
    """What codes are too high by is taken off in integers, in each lane."""
    spec = spec_of("int4[g64]", 11)
    build.know([spec], vectors)
    q = spec.weight.quantize(torch.zeros(13, spec.k))
    (y,) = torch.ops.bitfold.fused([drawn(1, spec.k, seed=3), *q.parts], str(spec))
    assert (y == 0).all()


def test_numbers_that_have_no_digits() -> None:
    """An infinity, and numbers far apart, go the way of floats."""
    spec = spec_of("int4[g64]", 8)
    build.know([spec], HERE[0])
    weight = drawn(13, spec.k, seed=4)
    weight[:, 1::2] = 0  # what is large meets zeros, and digits of what is small would be few
    q = spec.weight.quantize(weight)
    x = drawn(1, spec.k, seed=5)
    x[0, ::2] *= 2.0**-20
    (y,) = torch.ops.bitfold.fused([x, *q.parts], str(spec))
    w = q.dequantize(torch.float64)
    bound = (2 * spec.k + 32) * 2.0**-24 * (x.double().abs() @ w.abs().T)
    assert ((y - x.double() @ w.T).abs() <= bound).all()
    x[0, 77] = torch.inf
    (y,) = torch.ops.bitfold.fused([x, *q.parts], str(spec))
    assert not y.isfinite().any()  # NaN where the weight is zero


def test_who_reads_it() -> None:
    avx2, vnni = VECTORS["avx2"], VECTORS["avx512vnni"]
    f = format("int4[g64]")
    assert str(cpu_layout(f, 4096, vectors=avx2)) == "int4[g64,lanes.planar64]"
    assert str(cpu_layout(f, 4096, vectors=vnni)) == "int4[g64,planar128]"
    # Nine groups would be filled to sixteen, 172 to 176.
    assert str(cpu_layout(f, 576, vectors=avx2)) == "int4[g64,planar64]"
    assert str(cpu_layout(f, 172 * 64, vectors=avx2)) == "int4[g64,lanes.planar64]"
    assert str(cpu_layout(format("int4"), 4096, vectors=avx2)) == str(
        cpu_layout(format("int4"), 4096, vectors=vnni)
    )
    spec = spec_of("int4[g64]", 8)
    assert obstacle(spec, avx2) is None and "read no groups side by side" in (obstacle(spec, vnni) or "")
    with pytest.raises(CodegenError, match="no groups of float8"):
        build.know([GemmSpec(format("float8_e4m3fn[g64,lanes.planar64]"), 8, 512, "f32")], avx2)


@pytest.mark.parametrize("k", [576, 4096])
@pytest.mark.parametrize(
    "text", [f"int{bits}" for bits in range(1, 9)] + ["uint7[zero]", "int7[g64]", "int3[g64]"]
)
def test_what_the_target_lays_out_has_a_kernel(text: str, k: int) -> None:
    target, f = CpuTarget(), format(text)
    if not target.has_kernels():
        pytest.skip("no C++ compiler")
    assert obstacle(GemmSpec(f.with_layout(target.layout(f, k)), 8, k, "f32")) is None


def test_a_weight_of_no_rows() -> None:
    f = format("int4[g64]")
    layout = side_by_side(f)
    assert layout is not None
    q = f.with_layout(layout).quantize(torch.zeros(0, 704))
    assert q.dequantize().shape == (0, 704)
