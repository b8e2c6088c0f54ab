"""The edges: zeros, nothing, one, odd sizes, NaN and infinity, shapes that do not fit, and large tensors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitfold.formats import Format, FormatError, Quantized, format, pieces

EVERY = [
    "int8", "int4[g32]", "int3[tensor]", "int2[g16,noclip]", "int1", "int1[g16]", "int8[g32,f16]",
    "uint4[g32,zero]", "int6[zero]", "uint4[g32,zero:float,hqq]", "uint4[zero:float]", "q4_0", "q4_1",
    "q8_0", "float8_e4m3fn", "float8_e5m2[tensor]", "float5_e2m2[g16]", "float8_e4m3fn[pow2]", "mxfp8",
    "mxfp4", "mxfp6_e3m2[rceil]", "mxint8[even]", "nvfp4", "nvfp4[one_level]", "nf4[g32]", "ternary",
    "binary[g32]", "int4[g32,2:4]", "nf4[1:4]", "int8[16x32]", "float8_e4m3fn[16x32,f32]", "int4[native]",
    "float8_e4m3fn[unscaled]", "float4_e2m1[unscaled,2:4]", "int5[planar]", "uint3[g32,planar]",
]  # fmt: skip


def rows_are_alone(f: Format) -> bool:
    """Whether a row's codes depend on that row only; the stop of hqq looks at the whole tensor."""
    return f.scale is not None and f.scale.granularity.rows == 1 and f.scale.rule != "hqq"


def is_block(f: Format) -> bool:
    return f.scale is not None and f.scale.granularity.is_block


@pytest.mark.parametrize("text", EVERY)
def test_zeros_stay_zero(text: str) -> None:
    f = format(text)
    x = torch.zeros(16, 64)
    back = f.dequantize(f.quantize(x))
    # A sign bit has no zero: the scale is then the smallest number there is.
    bound = 0.0 if 0.0 in f.element.values() or (f.scale and f.scale.zero != "none") else 1e-37
    assert back.abs().max().item() <= bound
    mixed = torch.randn(16, 64)
    if not is_block(f):
        mixed[3] = 0
        assert f.fake_quantize(mixed).isfinite().all()


@pytest.mark.parametrize("text", EVERY)
@pytest.mark.parametrize("shape", [(0, 64), (16, 0), (0,), (0, 0), (3, 0, 64)])
def test_nothing_quantizes_to_nothing(text: str, shape: tuple[int, ...]) -> None:
    f = format(text)
    if is_block(f) and len(shape) != 2:
        return
    x = torch.randn(shape)
    q = f.quantize(x)
    assert q.shape == x.shape
    assert f.dequantize(q).shape == x.shape
    assert f.fake_quantize(x).shape == x.shape


@pytest.mark.parametrize("text", EVERY)
@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 4, 64), (1, 1, 64)])
def test_any_number_of_dimensions(text: str, shape: tuple[int, ...]) -> None:
    f = format(text)
    if is_block(f):
        return
    x = torch.randn(shape)
    q = f.quantize(x)
    assert q.codes.shape[:-1] == x.shape[:-1] and q.shape == x.shape
    back = f.dequantize(q)
    assert torch.equal(f.fake_quantize(x), back)
    if rows_are_alone(f):
        row = f.quantize(x.reshape(-1, 64)[:1], None if not f.scale.two_level else [p[:1] for p in _flat(q)])
        assert torch.equal(row.codes.flatten(), q.codes.reshape(-1, q.codes.shape[-1])[0])


def _flat(q: Quantized) -> list[torch.Tensor]:
    return [p.reshape(-1, p.shape[-1]) for p in q.params]


@pytest.mark.parametrize(
    "text", ["int8", "int4", "int3", "float6_e3m2", "nf4", "uint4[zero]", "ternary", "mxfp4[g1]"]
)
@pytest.mark.parametrize("k", [1, 2, 3, 5, 7, 9, 31])
def test_odd_lengths(text: str, k: int) -> None:
    f = format(text)
    x = torch.randn(3, k)
    q = f.quantize(x)
    assert f.dequantize(q).shape == (3, k)
    assert torch.equal(f.with_layout("planar").quantize(x).dequantize(), q.dequantize())


@pytest.mark.parametrize("text", [t for t in EVERY if "unscaled" not in t])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_never_hides(text: str, bad: float) -> None:
    """It makes its block NaN (or stays what it is), and no other block."""
    f = format(text)
    x = torch.randn(16, 64)
    x[2, 1] = bad
    back = f.dequantize(f.quantize(x))
    if text.startswith("uint3") and bad == -math.inf:
        assert back[2, 1] == 0  # below the range of an unsigned format, like any other negative number
    else:
        assert not back[2, 1].isfinite()
    assert torch.equal(f.fake_quantize(x).isfinite(), back.isfinite())
    if rows_are_alone(f) and not f.scale.two_level:
        others = torch.arange(16) != 2
        assert torch.equal(back[others], f.dequantize(f.quantize(x[others])))


@pytest.mark.parametrize("text", EVERY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_input_and_output_dtypes(text: str, dtype: torch.dtype) -> None:
    f = format(text)
    x = torch.randn(16, 64).to(dtype)
    q = f.quantize(x)
    assert q.dequantize(dtype).dtype == dtype
    fake = f.fake_quantize(x)
    assert fake.dtype == dtype
    assert torch.equal(fake, q.dequantize(dtype))
    if not (f.scale and f.scale.native):
        assert torch.equal(q.dequantize(dtype), q.dequantize().to(dtype))
        same = f.quantize(x.float())
        assert all(
            torch.equal(a.view(torch.uint8), b.view(torch.uint8))
            for a, b in zip(q.parts, same.parts, strict=True)
        )


@pytest.mark.parametrize("text", EVERY)
def test_views_that_are_not_contiguous(text: str) -> None:
    f = format(text)
    x = torch.randn(64, 32).t()[:, ::1]
    wide = torch.randn(32, 128)[:, ::2]
    for view in (x, wide):
        assert torch.equal(f.quantize(view).codes, f.quantize(view.contiguous()).codes)


@pytest.mark.parametrize("text", EVERY)
def test_large_tensors_go_in_pieces_with_the_same_result(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    f = format(text)
    x = torch.randn(64, 96 if not is_block(f) else 64)
    whole = f.quantize(x)
    back, fake = whole.dequantize(), f.fake_quantize(x)
    monkeypatch.setattr(pieces, "PIECE", 700)
    cut = f.quantize(x)
    assert all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(cut.parts, whole.parts, strict=True)
    )
    assert torch.equal(cut.dequantize(), back)
    assert torch.equal(f.fake_quantize(x), fake)


@pytest.mark.parametrize(
    ("text", "shape", "message"),
    [
        ("int4[g128]", (3, 576), "a group of 128 does not divide the last dimension 576 of shape (3, 576)"),
        ("int4[g128]", (3, 576), "these do: 16, 18, 24, 32, 36, 48, 64, 72"),
        ("int4[g32]", (3, 7), "these do: 1, 7"),
        ("int8[128x128]", (100, 128), "128 rows a block do not divide the 100 rows"),
        ("int8[16x16]", (2, 16, 16), "blocks of 16x16 are for 2-D weights"),
        ("int8[2:4]", (2, 6), "2:4 sparsity needs a last dimension that 4 divides, not 6"),
        ("int8", (), "without dimensions"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused_with_what_would(
    text: str, shape: tuple[int, ...], message: str
) -> None:
    f = format(text)
    for call in (f.check, lambda s: f.quantize(torch.zeros(s)), lambda s: f.fake_quantize(torch.zeros(s))):
        with pytest.raises(FormatError) as caught:
            call(shape)
        assert message in str(caught.value) and "\n" not in str(caught.value)


def test_wrong_parts_and_parameters_are_refused() -> None:
    f = format("uint4[g32,zero]")
    x = torch.randn(2, 64)
    with pytest.raises(FormatError, match=r"takes the parameters \(scales, zeros\), not 1 tensors"):
        f.quantize(x, f.choose(x)[:1])
    with pytest.raises(FormatError, match="stores codes, scales, zeros, not 2 tensors"):
        Quantized.from_parts(f, f.quantize(x).parts[:2], 64)
    with pytest.raises(FormatError, match="needs the data itself"):
        format("ternary").from_range(-x, x)


def test_numbers_that_a_format_does_not_hold_or_give() -> None:
    f, x = format("int4[g32]"), torch.randn(2, 64)
    for call in (f.quantize, f.fake_quantize):
        with pytest.raises(FormatError, match=r"int4\[g32\] holds real numbers, not torch.complex64"):
            call(x.to(torch.complex64))
    with pytest.raises(FormatError, match="values are decoded to a floating dtype such as"):
        f.dequantize(f.quantize(x), torch.int8)
    with pytest.raises(FormatError, match=r"int8 cannot read what is stored as int4\[g32\]; call q.dequant"):
        format("int8").dequantize(f.quantize(x))


def test_scales_of_zero_in_a_file_are_harmless() -> None:
    for text in ("q4_0", "q8_0", "q4_1", "float8_e4m3fn[g32,f16]", "uint4[g32,f16,zero]"):
        f = format(text)
        params = [torch.zeros_like(p) for p in f.choose(torch.zeros(2, 64))]
        assert f.fake_quantize(torch.zeros(2, 64), params).count_nonzero() == 0


def test_float16_scales_reach_small_weights() -> None:
    x = torch.randn(4, 64) * 1e-4
    error = (format("int8[g32,f16]").fake_quantize(x) - x).norm() / x.norm()
    assert error < 0.02  # the smallest normal float16, as a floor, would lose everything (error 1)


@given(
    text=st.sampled_from(EVERY),
    rows=st.integers(0, 4),
    groups=st.integers(0, 4),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_the_error_is_bounded_by_the_step(text: str, rows: int, groups: int, scale: float, seed: int) -> None:
    """Nothing kept is further from its value than the widest gap of the element, in scales."""
    f = format(text)
    x = torch.randn(rows * 16, groups * 64, generator=torch.Generator().manual_seed(seed)) * scale
    q = f.quantize(x)
    back = q.dequantize()
    assert back.shape == x.shape and back.isfinite().all()
    assert torch.equal(f.fake_quantize(x), back)
    if f.scale is None or x.numel() == 0 or "f16" in f.scale.dtype or f.scale.dtype == "e4m3":
        return  # unscaled values clip, and scales of few exponents do not follow the magnitude
    values = sorted({v for v in f.element.values() if math.isfinite(v)})
    gap = max(b - a for a, b in itertools.pairwise(values))
    kept = f.sparsity.mask(x)
    # Clipping and a rounded scale add at most one more step to it (absmax /7.5 clips half a step, floor
    # scaling less than the top binade); codebooks with a mean scale clip without bound.
    if f.element.rule == "absmean" or f.scale.rule in ("floor", "even"):
        return
    assert q.scales is not None
    steps = f._granularity.spread(f.scale.decode(q.scales)).abs().max()
    assert ((back - x) * kept).abs().max() <= 1.01 * gap * steps


@pytest.mark.parametrize(
    "text", ["int8", "int4[g32]", "q4_0", "q4_1", "uint4[g32,zero]", "ternary", "nf4[g32]", "mxfp4", "nvfp4"]
)
def test_what_a_format_holds_is_finite(text: str) -> None:
    f = format(text)
    assert f.holds(-3.0, 3.0) and not f.holds(-1e38, 0.0) and not f.holds(0.0, 1e60)
    for reach in (1e3, 6e4, 5e5, 1e7, 1e20, 1e30):
        for low, high in ((-reach, reach), (0.0, reach), (-reach, 0.0)):
            x = low + (high - low) * torch.rand(8, 128, generator=torch.Generator().manual_seed(1))
            if f.holds(low, high):
                assert f.fake_quantize(x).isfinite().all()
