"""Every code of every element, and every place where rounding can go wrong, against float64 brute force.

The oracle knows only the list of values: it compares with their midpoints in float64, where midpoints of two
values of 24 bits and fewer are exact, and of two equally near values it takes the one with the even code.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bitfold.formats import Codebook, Element, Float, FormatError, Integer, format

INTEGERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 9)] + [
    "int1_twos",
    "int8f6",
    "uint4f2",
]
OCP = ["float8_e4m3fn", "float8_e5m2", "float6_e3m2", "float6_e2m3", "float4_e2m1"]
ODD = [
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float8_e4m3",
    "float8_e3m4",
    "float8_e4m3b11fnuz",
    "float8_e2m5fn",
]
ODD += [
    "float8_e6m1",
    "float8_e7m0fn",
    "float7_e3m3",
    "float7_e2m4",
    "float5_e2m2",
    "float5_e3m1",
    "float4_e1m2",
]
ODD += ["float4_e3m0", "float3_e1m1", "float2_e1m0", "float6_e4m1"]
BOOKS = ["nf4", "ternary", "binary", "int1"]
ALL = INTEGERS + OCP + ODD + BOOKS


def element(name: str) -> Element:
    return format(name).element


def every_code(e: Element) -> torch.Tensor:
    return torch.arange(1 << e.bits, dtype=torch.uint8)


def probes(e: Element) -> torch.Tensor:
    """All values, all midpoints of neighbours and the float32 numbers next to both, and far outside."""
    values = np.unique([v for v in e.values() if math.isfinite(v)])
    middles = (values[1:] + values[:-1]) / 2
    points = np.concatenate([values, middles, 3 * values, values / 3]).astype(np.float32)
    around = [points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(-np.inf))]
    noise = np.random.default_rng(0).normal(0, e.high / 2, 2000).astype(np.float32)
    tiny = np.float32([0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38, 3e38, -3e38])
    return torch.from_numpy(np.unique(np.concatenate([*around, noise, tiny])))


def nearest_by_brute_force(e: Element, x: np.ndarray) -> np.ndarray:
    """The value that x must round to, saturating."""
    pairs = sorted((v, c) for c, v in enumerate(e.values()) if math.isfinite(v))
    pairs = [(v, c) for v, c in pairs if v != 0 or c == e.values().index(0.0)]  # 0 once, not -0 as well
    values, codes = np.array([v for v, _ in pairs]), np.array([c for _, c in pairs])
    middles = (values[1:] + values[:-1]) / 2
    x = x.astype(np.float64)
    below = np.searchsorted(middles, x, side="left")  # a tie goes down
    above = np.searchsorted(middles, x, side="right")  # a tie goes up
    # Of equally near ones: the even code; a codebook, whose codes mean nothing, takes the smaller value.
    up = (codes[below] & 1 == 1) & (not isinstance(e, Codebook))
    return np.where(up, values[above], values[below])


@pytest.mark.parametrize("name", ALL)
def test_every_code_survives(name: str) -> None:
    e = element(name)
    decoded = e.decode(every_code(e))
    assert decoded.tolist() == pytest.approx(list(e.values()), rel=0, abs=0, nan_ok=True)
    finite = decoded.isfinite()
    again = e.encode(decoded[finite])
    # -0 is the one value with two codes; both must be kept apart where both exist.
    assert torch.equal(again, every_code(e)[finite])


@pytest.mark.parametrize("name", ALL)
def test_rounds_to_the_nearest_value(name: str) -> None:
    e = element(name)
    x = probes(e)
    got = e.decode(e.encode(x)).double().numpy()
    np.testing.assert_array_equal(got, nearest_by_brute_force(e, x.numpy()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ALL)
def test_rounding_without_codes_is_rounding_with_them(name: str, dtype: torch.dtype) -> None:
    e = element(name)
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16).to(torch.float32)
    x = torch.cat([probes(e), every]).to(dtype)  # infinities and NaN among them
    for result in (torch.float32, dtype):
        wanted, got = e.decode(e.encode(x), result), e.rounded(x, result)
        assert got.dtype == wanted.dtype
        assert torch.equal(got.isnan(), wanted.isnan())
        whole = {torch.float32: torch.int32}.get(result, torch.int16)
        bits = [torch.where(t.isnan(), 0.0, t).view(whole) for t in (wanted, got)]
        assert torch.equal(*bits)  # -0 too


@pytest.mark.parametrize("name", ALL)
def test_low_and_high_are_the_extreme_values(name: str) -> None:
    e = element(name)
    finite = [v for v in e.values() if math.isfinite(v)]
    assert (e.low, e.high) == (min(finite), max(finite))
    assert len(e.values()) == 1 << e.bits


@pytest.mark.parametrize("name", OCP + ODD + INTEGERS)
def test_infinity_saturates(name: str) -> None:
    e = element(name)
    got = e.decode(e.encode(torch.tensor([math.inf, -math.inf])))
    assert got.tolist() == [e.high, e.low]


@pytest.mark.parametrize("name", OCP + ODD)
def test_nan_stays_nan_where_there_is_one_and_is_the_largest_value_elsewhere(name: str) -> None:
    e = element(name)
    got = e.decode(e.encode(torch.tensor([math.nan]))).item()
    assert math.isnan(got) if e.bits == 8 else got == e.high


def test_nan_is_zero_as_an_integer() -> None:
    for name in INTEGERS[:16]:
        if name != "int1":
            assert element(name).encode(torch.tensor([math.nan])).item() == 0


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_agrees_with_torch_casts_on_every_bfloat16(name: str) -> None:
    dtype = getattr(torch, name)
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float()
    x = x[x.abs() <= torch.finfo(dtype).max]  # above it torch 2.13 saturates or not, depending on the dtype
    e = element(name)
    assert torch.equal(e.encode(x), x.to(dtype).view(torch.uint8))
    codes = every_code(e)
    torch.testing.assert_close(e.decode(codes), codes.view(dtype).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_the_general_arithmetic_agrees_with_the_cast(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The formats that torch knows go through its casts; the arithmetic of all others must give the same."""
    e = element(name)
    x = probes(e)
    cast = e.encode(x), e.decode(every_code(e))
    monkeypatch.setattr(Float, "torch_dtype", None)
    assert torch.equal(e.encode(x), cast[0])
    torch.testing.assert_close(e.decode(every_code(e)), cast[1], rtol=0, atol=0, equal_nan=True)
    assert e.decode(e.encode(torch.tensor([math.nan]))).isnan().all()


def test_small_floats_agree_with_torchao_on_every_bfloat16() -> None:
    kernels = pytest.importorskip("torchao.prototype.mx_formats.kernels")
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float()
    x = x[x.isfinite()]
    assert torch.equal(element("float4_e2m1").encode(x), kernels.f32_to_f4_unpacked(x))
    assert torch.equal(element("float6_e3m2").encode(x), kernels.f32_to_f6_e3m2_unpacked(x))
    assert torch.equal(element("float6_e2m3").encode(x), kernels.f32_to_f6_e2m3_unpacked(x))
    codes = torch.arange(64, dtype=torch.uint8)
    assert torch.equal(element("float6_e3m2").decode(codes), kernels.f6_e3m2_unpacked_to_f32(codes))
    assert torch.equal(element("float6_e2m3").decode(codes), kernels.f6_e2m3_unpacked_to_f32(codes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_in_and_out(dtype: torch.dtype) -> None:
    for name in ("int4", "uint3", "float8_e4m3fn", "float6_e2m3", "nf4"):
        e = element(name)
        codes = every_code(e)
        codes = codes[e.decode(codes).isfinite()]
        values = e.decode(codes, dtype)
        assert values.dtype == dtype
        torch.testing.assert_close(values, e.decode(codes).to(dtype), rtol=0, atol=0)
        if name != "nf4":  # its values are float32 numbers
            assert torch.equal(e.encode(values), codes)


@pytest.mark.parametrize("flush", [False, True])
def test_decoding_does_not_depend_on_float32_subnormals(flush: bool) -> None:
    torch.set_flush_denormal(flush)
    try:
        for name in ("float8_e6m1", "float7_e3m3", "float4_e2m1"):
            e = element(name)
            finite = [v for v in e.values() if math.isfinite(v)]
            assert [v for v in e.decode(every_code(e)).tolist() if math.isfinite(v)] == finite
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Integer(9), "1 to 8 bits, not 9"),
        (lambda: Integer(4, fraction=5), "0 to 4 fraction bits"),
        (lambda: Float(0, 3), "at most 8 bits together, not e0m3"),
        (lambda: Float(5, 3), "at most 8 bits together, not e5m3"),
        (lambda: Float(2, 1, "fnuz"), "'fnuz' is for 8-bit floats"),
        (lambda: Float(7, 0), "write float8_e7m0fn"),
        (lambda: Float(4, 3, "x"), "ending"),
        (lambda: Codebook("c", (1.0,)), "2 to 256 values, not 1"),
        (lambda: Codebook("c", (1.0, 1.0)), "all different"),
        (lambda: Codebook("c", (1.0, math.nan)), "finite"),
        (lambda: format("float6_e3m3"), "does not add up"),
    ],
)
def test_impossible_elements_say_why(make: object, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        make()  # type: ignore[operator]


def test_codebooks_of_many_values() -> None:
    table = tuple(
        float(v) for v in np.random.default_rng(1).permutation(np.linspace(-1, 1, 200, dtype=np.float32))
    )
    e = Codebook("many", table)
    assert e.bits == 8
    codes = torch.arange(200, dtype=torch.uint8)
    assert torch.equal(e.encode(e.decode(codes)), codes)
    x = probes(e)
    np.testing.assert_array_equal(
        e.decode(e.encode(x)).double().numpy(), nearest_by_brute_force(e, x.numpy())
    )
