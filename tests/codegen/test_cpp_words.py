"""One row of x in two words: bytes are multiplied exactly, and closer than floats would.

int8, x of a block = [3.0, 1e-7, ..]   ->   y within 2**-29 (max |x|) (sum |w|) of each block
x with an infinity, or mostly numbers far below the largest   ->   what products of floats give
"""

from __future__ import annotations

import pytest
import torch
from cpp_cases import check, drawn, expected, pair
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cpp_digits import product, spec_of
from torch import Tensor

from bitfold.codegen import GemmSpec
from bitfold.codegen.cpp import build, source
from bitfold.codegen.cpp.body import Body
from bitfold.codegen.cpp.vectors import VECTORS, runnable
from bitfold.codegen.cpp.words import LARGEST, words
from bitfold.formats import Quantized

# A scale a row, one in all, groups that share a block of x or have several; rows that end within a vector.
CASES = [("int8", 512), ("int8", 1100), ("int8", 72), ("int8[tensor]", 300), ("int8[g128]", 512),
         ("int8[g256,f32]", 4096), ("int8f6", 512)]  # fmt: skip


@pytest.fixture(scope="session")
def compiled() -> None:
    build.know([spec_of(text, 8, k) for text, k in CASES])


def bound_of(spec: GemmSpec, x: Tensor, parts: list[Tensor]) -> Tensor:
    """2**-29 (max |x|) (sum |w|) of each block."""
    made = words(Body(spec))
    assert made is not None
    w = Quantized.from_parts(spec.weight, parts, spec.k).dequantize(torch.float64).abs()
    pieces = zip(w.split(made.block, 1), x.double().abs().split(made.block, 1), strict=True)
    return 2.0**-29 * sum(a.sum(1) * b.max() for a, b in pieces)  # type: ignore[return-value]


@pytest.mark.parametrize(("text", "k"), CASES)
def test_sums_of_a_block_fit_in_32_bits(text: str, k: int) -> None:
    """128 times the largest word, for each product of a sum, of which a vector has eight."""
    made = words(Body(spec_of(text, 8, k)))
    assert made is not None and made.block <= LARGEST
    assert made.block // 8 * 128 * 2**14 < 2**31


@pytest.mark.parametrize("text", ["int8[g64]", "uint8[g128,zero]", "float8_e4m3fn", "int4", "int8 x int8"])
def test_other_numbers_have_no_words(text: str) -> None:
    spec = pair(text)
    assert words(Body(spec)) is None and "run_of_words" not in source(spec)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("text", "k"), CASES)
def test_the_largest_of_everything(compiled: None, text: str, k: int, sign: float) -> None:
    spec = spec_of(text, 8, k)
    q = spec.weight.quantize(drawn(8, k, seed=1))
    for code in (0x80, 0x7F, 0x81):
        parts = [torch.full_like(q.parts[0], code), *q.parts[1:]]
        for x in (2.0 - 2.0**-23, 1.0, 3.4e38, 2.0**-97):
            given = torch.full((1, k), sign * x)
            want, bound = expected(spec, [given, *parts])
            if want.abs().max() < 1e38:
                assert ((product(spec, given, parts).double() - want).abs() <= bound).all(), (code, x)


@pytest.mark.parametrize(("text", "k"), CASES)
def test_closer_than_floats(compiled: None, text: str, k: int) -> None:
    """On the average of 64 sums, against two rows of x, which are multiplied as floats."""
    spec, ours, theirs = spec_of(text, 8, k), 0.0, 0.0
    for seed in range(8):
        x = drawn(1, k, seed=seed)
        parts = list(spec.weight.quantize(drawn(8, k, seed=seed + 50)).parts)
        want, _ = expected(spec, [x, *parts])
        twice = product(spec, x.expand(2, -1).contiguous(), parts)[:1]
        ours += float((product(spec, x, parts).double() - want).square().sum())
        theirs += float((twice.double() - want).square().sum())
    assert ours < theirs


@given(
    case=st.sampled_from(CASES), seed=st.integers(0, 999), spread=st.integers(0, 60), zeros=st.integers(0, 9)
)
@settings(max_examples=60, deadline=None)
def test_numbers_of_any_size(
    compiled: None, case: tuple[str, int], seed: int, spread: int, zeros: int
) -> None:
    """From alike to 2**60 apart, with zeros among them: whichever way they go."""
    text, k = case
    spec, generator = spec_of(text, 8, k), torch.Generator().manual_seed(seed)
    x = torch.randn(1, k, generator=generator)
    x *= 2.0 ** (spread * (torch.rand(1, k, generator=generator) - 0.5))
    x[torch.rand(1, k, generator=generator) < zeros / 10] = 0
    parts = list(spec.weight.quantize(drawn(8, k, seed=seed)).parts)
    want, bound = expected(spec, [x, *parts])
    error = (product(spec, x, parts).double() - want).abs()[0]
    assert (error <= bound[0] + bound_of(spec, x, parts)).all()


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_numbers_that_are_not_finite(compiled: None, value: float) -> None:
    spec = spec_of("int8", 8, 512)
    x = drawn(1, 512, seed=3)
    x[0, 77] = value
    parts = list(spec.weight.quantize(drawn(8, 512, seed=4)).parts)
    one, two = product(spec, x, parts), product(spec, x.expand(2, -1).contiguous(), parts)
    assert torch.equal(one.nan_to_num(7, 8, 9), two[:1].nan_to_num(7, 8, 9)) and not one.isfinite().all()


@pytest.mark.parametrize("size", [0.0, 2.0**-149, 2.0**-126, 2.0**-98, 2.0**-60, 2.0**100, 2.0**119])
def test_very_small_and_large(compiled: None, size: float) -> None:
    spec = spec_of("int8", 8, 512)
    x = torch.randint(-3, 4, (1, 512), generator=torch.Generator().manual_seed(1)) * size
    parts = list(spec.weight.quantize(drawn(8, 512, seed=5)).parts)
    want, bound = expected(spec, [x, *parts])
    assert ((product(spec, x, parts).double() - want).abs() <= bound + 512 * 2.0**-149).all()


@pytest.mark.parametrize("x", ["bf16", "f16"])
def test_half_floats(x: str) -> None:
    for k in (64, 200, 4096 + 64):
        check(spec_of("int8", 13, k, x), 1)


@pytest.mark.parametrize("vectors", ["avx2", "portable"])
def test_other_vectors(vectors: str) -> None:
    if VECTORS[vectors] not in runnable():
        pytest.skip("needs AVX2")
    for text in ("int8", "int8[g128]"):
        check(pair(text), 1, seed=2, vectors=VECTORS[vectors])
