"""The CPU target's product with codes: the weights of `dequantize` bit for bit, and sums within the bound."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bitfold.formats as formats
from bitfold.lowering.cpu import forms as cpu_forms
from bitfold.lowering.cpu.values import terms
from bitfold.lowering.tolerance import bound, gamma, roundoff, tolerance

ELEMENTS = [
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 9)),
    *("float8_e4m3fn", "float8_e5m2", "float6_e3m2", "float6_e2m3", "float4_e2m1", "float5_e2m2"),
    *("float7_e3m3", "float3_e1m1", "float8_e3m4fn", "nf4", "ternary", "binary", "int8f6"),
]

# One of each granularity, scale dtype, zero point and element width that a weight on the CPU may have.
WEIGHTS = [
    "int8", "int8[tensor]", "int8[g64]", "int8[g32,f32]", "uint8[zero]", "int7[g64]", "int6[g32]",
    "int5[g64]", "int4", "int4[g32]", "int4[g64,f16]", "int4[g192]", "uint4[g32,zero]",
    "uint4[g64,zero:float]", "q4_0", "q4_1", "q8_0", "int3[g64]", "int3", "uint3[g32,zero]",
    "int2[g64]", "uint2[g32,zero]", "ternary", "binary[g64]", "float8_e4m3fn",
    "float8_e5m2[tensor]", "float6_e3m2[g32]", "mxfp8", "mxfp6_e2m3", "mxfp4", "mxint8", "nvfp4",
    "nf4[g64]", "int8[64x64]", "float8_e4m3fn[32x64]", "int4[32x32]",
]  # fmt: skip


def laid(text: str, n: int, k: int) -> tuple[formats.Quantized, cpu_forms.Plan]:
    """A random weight in the layout that the CPU target wants, and the walk over it."""
    fmt = formats.format(text)
    fmt = fmt.with_layout(cpu_forms.vector_layout(fmt, k) or fmt.layout)
    walk = cpu_forms.plan(fmt, k)
    assert isinstance(walk, cpu_forms.Plan), walk.reason
    return fmt.quantize(torch.randn(n, k)), walk


@pytest.mark.parametrize("name", ELEMENTS)
def test_terms_are_the_values_of_every_code(name: str) -> None:
    element = formats.format(name).element
    codes = torch.arange(2**element.bits, dtype=torch.uint8)
    total = torch.stack(terms(element, codes)).sum(0)
    assert torch.equal(total.nan_to_num(nan=7e7), element.decode(codes).nan_to_num(nan=7e7))


@pytest.mark.parametrize("text", WEIGHTS)
@pytest.mark.parametrize("k", [384, 576])
def test_weights_are_bitwise_those_of_dequantize(text: str, k: int) -> None:
    q, walk = laid(text, 64, k)
    # One-hot rows pick out columns of the weight: every sum has a single term, so nothing may differ.
    picked = [0, 1, 15, 16, k // 2 - 1, k // 2, k - 17, k - 1]
    one_hot = torch.zeros(len(picked), k)
    one_hot[range(len(picked)), picked] = 1
    assert torch.equal(cpu_forms.gemv(one_hot, q.parts, q.format, walk), q.dequantize().t()[picked])


@pytest.mark.parametrize("text", WEIGHTS)
@pytest.mark.parametrize("m", [1, 8])
def test_sums_are_within_the_bound(text: str, m: int) -> None:
    q, walk = laid(text, 128, 576)
    x = torch.randn(m, 576)
    exact = x.double() @ q.dequantize().double().t()
    assert ((cpu_forms.gemv(x, q.parts, q.format, walk) - exact).abs() <= bound(x, q.dequantize())).all()


def test_the_bound_catches_a_wrong_scale() -> None:
    q, walk = laid("int4[g64]", 64, 576)
    assert q.scales is not None
    x, good = torch.randn(4, 576), q.dequantize()
    q.scales[:, 3] *= 1.5
    off = (cpu_forms.gemv(x, q.parts, q.format, walk) - x @ good.t()).abs() > bound(x, good)
    assert off.float().mean() > 0.9


@settings(max_examples=60, deadline=None)
@given(
    text=st.sampled_from(WEIGHTS),
    m=st.integers(1, 8),
    n=st.sampled_from([1, 5, 64]),
    groups=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_shape_either_works_or_says_why(
    text: str, m: int, n: int, groups: int, dtype: torch.dtype
) -> None:
    fmt = formats.format(text)
    granularity = fmt.scale.granularity if fmt.scale else formats.Granularity()
    n, k = n * (granularity.rows if granularity.is_block else 1), groups * (granularity.cols or 16)
    fmt = fmt.with_layout(cpu_forms.vector_layout(fmt, k) or fmt.layout)
    walk = cpu_forms.plan(fmt, k)
    if not walk:
        assert walk.reason
        return
    q, x = fmt.quantize(torch.randn(n, k)), torch.randn(m, k).to(dtype)
    y, exact = cpu_forms.gemv(x, q.parts, fmt, walk), x.double() @ q.dequantize().double().t()
    assert ((y - exact).abs() <= bound(x, q.dequantize())).all()


def test_layouts_fill_a_vector_register() -> None:
    wanted = {
        "int8": "None", "int4[g128]": "planar", "q4_1": "planar", "nvfp4": "planar32",
        "int3[g64]": "planar128", "int3": "planar", "int2[g32]": "planar64", "mxfp6_e2m3": "planar64",
        "int1[g32]": "planar128",
    }  # fmt: skip
    found = {text: str(cpu_forms.vector_layout(formats.format(text), 1536)) for text in wanted}
    assert found == wanted


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("int4[g64]", "the layout packed of int4[g64] cuts a run of 64 codes into 64 pieces of 1"),
        ("int8[g64,2:4]", "stores only some of a row's numbers"),
        ("int1[g32,planar128]", "a run of 128 codes is mostly padding in a row of 64"),
    ],
)
def test_no_plan_says_why(text: str, reason: str) -> None:
    found = cpu_forms.plan(formats.format(text), 64)
    assert not found
    assert reason in found.reason


def test_the_tolerance_is_as_derived() -> None:
    assert roundoff(torch.float32) == 2.0**-24
    assert roundoff(torch.bfloat16) == 2.0**-8
    assert gamma(1000) == pytest.approx(1000 * 2.0**-24, rel=1e-4)
    assert tolerance(576) == pytest.approx((2 * 581 + 3) * 2.0**-24, rel=1e-3)
    by_k = [tolerance(k) for k in (64, 576, 4096)]
    by_dtype = [tolerance(64, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    assert all(a < b for sizes in (by_k, by_dtype) for a, b in itertools.pairwise(sizes))
