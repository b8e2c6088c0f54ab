"""One row of x in three digits: as exact as a sum of float32; floats where digits would say too little.

int4[g64], x of a block = [3.0, 1e-7, ..]   ->   y within 2**-23 (max |x|) (sum |w|) of each block
x with an infinity, or a number next to 60 that are 2**-17 of it   ->   what products of floats give
"""

from __future__ import annotations

import pytest
import torch
from cpp_cases import drawn, expected, operands, pair
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitfold.codegen import GemmSpec
from bitfold.codegen.cpp import build, source
from bitfold.codegen.cpp.body import Body
from bitfold.codegen.cpp.digits import MOST, digits
from bitfold.codegen.cpp.support import cpu_layout
from bitfold.codegen.cpp.vectors import VECTORS, runnable
from bitfold.formats import format

# Every way that codes are made small unsigned numbers, and sizes of blocks.
TEXTS = [
    "int4[g64]",
    "int4[g128]",
    "int3[g64]",
    "uint4[g32,zero]",
    "mxfp4",
    "int4",
    "int2[g32]",
    "int5[g32,f32]",
]


def spec_of(text: str, n: int, k: int, x: str = "f32") -> GemmSpec:
    f = cpu_layout(format(text), k)
    assert f is not None
    return GemmSpec(f, n, k, x)


def product(spec: GemmSpec, x: Tensor, parts: list[Tensor]) -> Tensor:
    (y,) = torch.ops.bitfold.fused([x, *parts], str(spec))
    return y


@pytest.fixture(scope="session")
def compiled() -> None:
    build.know([spec_of(text, 8, 512) for text in TEXTS])


@pytest.mark.parametrize("text", TEXTS)
def test_blocks_sums_cannot_overflow(text: str) -> None:
    """By the largest codes and digits: in 16 bits for each digit, in 32 bits joined."""
    made = digits(Body(spec_of(text, 8, 512)))
    assert made is not None
    assert made.block // 16 * made.high * 128 < 2**15
    assert made.block // 8 * max(made.base, made.high - made.base) * MOST < 2**31


@pytest.mark.parametrize("text", ["nf4[g64]", "float8_e4m3fn", "mxfp6_e3m2"])
def test_other_numbers_stay_floats(text: str) -> None:
    spec = spec_of(text, 8, 512)
    assert digits(Body(spec)) is None and "by_digits" not in source(spec)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("text", TEXTS)
def test_the_largest_of_everything(compiled: None, text: str, sign: float) -> None:
    """Sums that would pass 16 or 32 bits if any did: x the largest that digits hold, codes at one end."""
    spec = spec_of(text, 8, 512)
    q = spec.weight.quantize(drawn(8, 512, seed=1))
    for code in (0, (1 << spec.weight.element.bits) - 1):
        codes = spec.weight.pack(torch.full((8, 512), code, dtype=torch.uint8))
        parts = [codes, *q.parts[1:]]
        for x in (float(MOST), -float(MOST), 2.0**23 - 2.0**17, 1.0):
            given = torch.full((1, 512), sign * x)
            want, bound = expected(spec, [given, *parts])
            assert ((product(spec, given, parts).double() - want).abs() <= bound).all(), (code, x)


@pytest.mark.parametrize("text", TEXTS)
def test_as_exact_as_floats(compiled: None, text: str) -> None:
    """On the average of 64 sums, hardly further from the exact one than by the same call with two rows of x,
    which multiplies floats. At 64 x 4096 it is 0.8 to 1.4 times as far."""
    spec, ours, theirs = spec_of(text, 8, 512), 0.0, 0.0
    for seed in range(8):
        x = drawn(1, 512, seed=seed)
        parts = list(spec.weight.quantize(drawn(8, 512, seed=seed + 50)).parts)
        want, _ = expected(spec, [x, *parts])
        ours += float((product(spec, x, parts).double() - want).square().sum())
        theirs += float(
            (product(spec, x.expand(2, -1).contiguous(), parts)[:1].double() - want).square().sum()
        )
    assert ours < 2.5**2 * theirs


def blocks_bound(spec: GemmSpec, x: Tensor, parts: list[Tensor]) -> Tensor:
    """2**-23 (max |x|) (sum |w|) of each block, beside what float32 loses."""
    from bitfold.formats import Quantized

    made = digits(Body(spec))
    assert made is not None
    w = Quantized.from_parts(spec.weight, parts, spec.k).dequantize(torch.float64).abs()
    size = min(made.block, spec.k)
    tops = x.double().abs().reshape(-1, size).amax(1)
    return 2.0**-23 * (w.reshape(spec.n, -1, size).sum(2) @ tops)


@given(
    text=st.sampled_from(TEXTS), seed=st.integers(0, 999), spread=st.integers(0, 40), zeros=st.integers(0, 9)
)
@settings(max_examples=60, deadline=None)
def test_numbers_of_any_size(compiled: None, text: str, seed: int, spread: int, zeros: int) -> None:
    """From alike to 2**40 apart, with zeros among them: whichever way they go."""
    spec = spec_of(text, 8, 512)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 512, generator=generator) * 2.0 ** (
        spread * (torch.rand(1, 512, generator=generator) - 0.5)
    )
    x[torch.rand(1, 512, generator=generator) < zeros / 10] = 0
    parts = list(spec.weight.quantize(drawn(8, 512, seed=seed)).parts)
    want, bound = expected(spec, [x, *parts])
    error = (product(spec, x, parts).double() - want).abs()[0]
    assert (error <= bound[0] + blocks_bound(spec, x, parts)).all()


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_numbers_that_are_not_finite(compiled: None, text: str, value: float) -> None:
    """As with two rows of x, which know no digits."""
    spec = spec_of(text, 8, 512)
    x = drawn(1, 512, seed=3)
    x[0, 77] = value
    parts = list(spec.weight.quantize(drawn(8, 512, seed=4)).parts)
    one, two = product(spec, x, parts), product(spec, x.expand(2, -1).contiguous(), parts)
    assert torch.equal(one.nan_to_num(7, 8, 9), two[:1].nan_to_num(7, 8, 9)) and not one.isfinite().all()


def test_a_number_beside_much_smaller_ones(compiled: None) -> None:
    """Its weight is zero, and of the others digits would hold nothing: they are multiplied as floats."""
    spec = spec_of("int4[g64]", 8, 512)
    w = torch.ones(8, 512)
    w[:, 5] = 0
    parts = list(spec.weight.quantize(w).parts)
    x = torch.ones(1, 512)
    x[0, 5] = 1e20
    want, bound = expected(spec, [x, *parts])
    assert want.abs().max() < 1000 and ((product(spec, x, parts).double() - want).abs() <= bound).all()


@pytest.mark.parametrize("size", [2.0**-149, 2.0**-126, 2.0**-100, 2.0**-60, 2.0**100, 2.0**119])
def test_very_small_and_large(compiled: None, size: float) -> None:
    for text in ("int4[g64]", "uint4[g32,zero]", "int4"):
        spec = spec_of(text, 8, 512)
        x = torch.randint(-3, 4, (1, 512), generator=torch.Generator().manual_seed(1)) * size
        parts = list(spec.weight.quantize(drawn(8, 512, seed=5)).parts)
        want, bound = expected(spec, [x, *parts])
        error = (product(spec, x, parts).double() - want).abs()
        assert (error <= bound + 512 * 2.0**-149).all(), (text, size)


@pytest.mark.parametrize("x", [0.0, -0.0])
def test_zeros(compiled: None, x: float) -> None:
    spec = spec_of("int4[g64]", 8, 512)
    parts = list(spec.weight.quantize(drawn(8, 512, seed=5)).parts)
    assert (product(spec, torch.full((1, 512), x), parts) == 0).all()


def test_a_row_of_zeros_is_zero(compiled: None) -> None:
    """Sums of codes that are too high by half their range cancel in integers, not nearly in floats."""
    for text in ("int4[g64]", "int3[g64]", "mxfp4", "int4"):
        spec = spec_of(text, 8, 512)
        w = drawn(8, 512, seed=6)
        w[3] = 0
        y = product(spec, drawn(1, 512, seed=7).abs() + 1, list(spec.weight.quantize(w).parts))
        assert y[0, 3] == 0 and (y[0, :3] != 0).all()


@pytest.mark.parametrize("x", ["bf16", "f16"])
def test_half_floats(x: str) -> None:
    from cpp_cases import check

    for k in (64, 192, 4096 + 64):
        check(spec_of("int4[g64]", 13, k, x), 1)


@pytest.mark.parametrize("vectors", ["avx2", "portable"])
def test_other_vectors(vectors: str) -> None:
    if VECTORS[vectors] not in runnable():
        pytest.skip("needs AVX2")
    from cpp_cases import check

    for text in ("int3[g64]", "mxfp4", "int4[tensor]"):
        check(pair(text), 1, seed=2, vectors=VECTORS[vectors])
    assert operands(pair("mxfp4"), 1, 0)
