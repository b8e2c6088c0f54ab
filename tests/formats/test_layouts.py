"""Layouts: the index map, the bytes it makes, and the way back; every width, run and awkward length."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitfold.formats import Bytes, Field, FormatError, Layout, Packed, Planar, Quantized, format
from bitfold.formats.group_lanes import GroupLanes
from bitfold.formats.layout import Halfwords
from bitfold.formats.mover import K, evaluate, k
from bitfold.formats.spare import Spare
from bitfold.formats.units import Piece, Units, slices

LAYOUTS = [Bytes(), Packed(), Planar(), Planar(64), Planar(24), Halfwords(16), Halfwords(48)]
LAYOUTS += [Units(16), Units(48), Units(16, 9), Units(32, 10)]
LENGTHS = [0, 1, 2, 3, 5, 7, 8, 9, 31, 32, 33, 64, 96, 130]


def codes_of(bits: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 1 << bits, shape, dtype=torch.uint8)


def packed_by_the_map(layout: Layout, codes: torch.Tensor, bits: int, run: int | None) -> np.ndarray:
    """One bit at a time, straight from the sympy expressions: what pack must produce."""
    length = codes.shape[-1]
    out = np.zeros((codes.shape[0], layout.row_bytes(bits, run, length)), dtype=np.uint8)
    for field in layout.fields(bits, run):
        for place in range(length):
            at = {k: place, K: length}
            byte, bit = int(field.byte.subs(at)), int(field.bit.subs(at))
            value = (codes[:, place].numpy() >> field.low) & ((1 << field.width) - 1)
            assert (out[:, byte] & (((1 << field.width) - 1) << bit) == 0).all(), "two codes in one place"
            out[:, byte] |= (value << bit).astype(np.uint8)
    return out


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("bits", range(1, 9))
def test_round_trip(layout: Layout, bits: int) -> None:
    for length in LENGTHS:
        runs = [None] + [g for g in (1, 3, 16, 32) if length and length % g == 0]
        for run in runs:
            codes = codes_of(bits, 3, length)
            packed = layout.pack(codes, bits, run)
            assert packed.dtype == torch.uint8
            assert packed.shape == (3, layout.row_bytes(bits, run, length)), (length, run)
            assert torch.equal(layout.unpack(packed, length, bits, run), codes), (length, run)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("bits", range(1, 9))
def test_pack_is_the_map(layout: Layout, bits: int) -> None:
    for length, run in [(1, None), (13, None), (32, 16), (9, 3)]:
        codes = codes_of(bits, 1, length)
        got = layout.pack(codes, bits, run).numpy()
        np.testing.assert_array_equal(got, packed_by_the_map(layout, codes, bits, run), f"{length} {run}")


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("run", [None, 8, 32])
def test_the_map_repeats_after_a_period(layout: Layout, bits: int, run: int | None) -> None:
    """What makes checking one period a proof for all lengths."""
    codes, size = layout.period(bits, run, 40)
    whole_row = run is None and isinstance(layout, Planar) and layout.span is None
    if whole_row:
        return  # the period is the row itself
    byte, bit, _ = evaluate(layout, bits, run, 4 * codes)
    np.testing.assert_array_equal(byte[:, codes:], byte[:, :-codes] + size)
    np.testing.assert_array_equal(bit[:, codes:], bit[:, :-codes])


@pytest.mark.parametrize("bits", range(1, 8))
def test_packed_is_a_little_endian_bit_stream(bits: int) -> None:
    codes = codes_of(bits, 1, 29)
    stream = "".join(format_bits(c, bits)[::-1] for c in codes[0].tolist())
    stream += "0" * (-len(stream) % 8)
    want = [int(stream[i : i + 8][::-1], 2) for i in range(0, len(stream), 8)]
    assert Packed().pack(codes, bits).tolist() == [want]


def format_bits(code: int, bits: int) -> str:
    return f"{code:0{bits}b}"


def test_planar_by_hand() -> None:
    codes = torch.arange(8, dtype=torch.uint8)[None]
    assert Planar().pack(codes, 4).tolist() == [[0x40, 0x51, 0x62, 0x73]]
    assert Planar().pack(codes, 4, 4).tolist() == [[0x20, 0x31, 0x64, 0x75]]
    # 2 bits: byte j holds codes j, j + 2, j + 4, j + 6; 3 bits: that, then one byte of top bits
    assert Planar().pack(codes & 3, 2).tolist() == [[0b10_00_10_00, 0b11_01_11_01]]
    assert Planar().pack(codes, 3).tolist() == [[0b10_00_10_00, 0b11_01_11_01, 0b11110000]]


def test_spare_bits_by_hand() -> None:
    """3 bits: six codes in nibbles, two in their top bits; 7 bits: seven in bytes, one in theirs."""
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 0b011, 0b110]], dtype=torch.uint8)
    assert Spare(8).pack(codes, 3).tolist() == [[0b0_010_1_001, 0b1_100_1_011, 0b1_110_0_101]]
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0b1000101]], dtype=torch.uint8)
    tops = [128 * (0b1000101 >> b & 1) for b in range(7)]
    assert Spare(8).pack(codes, 7).tolist() == [[i + 1 + top for i, top in enumerate(tops)]]


def test_groups_lie_side_by_side() -> None:
    """Eight groups of 8: four codes of each, then the other four."""
    woven = GroupLanes(Planar(64)).weave(torch.arange(64), 8)
    assert woven[:12].tolist() == [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19]
    assert woven[32:40].tolist() == [4, 5, 6, 7, 12, 13, 14, 15]


def woven_cases() -> list[tuple[Layout, int, int, int]]:
    """(layout, bits, run, length)"""
    cases: list[tuple[Layout, int, int, int]] = []
    for length in (0, 1, 63, 64, 200):
        cases += [(Spare(span), bits, 8, length) for span in (8, 64) for bits in (3, 7)]
    for inner, bits in ((Planar(64), 4), (Planar(32), 5), (Spare(64), 3), (Spare(128), 7), (Packed(), 2)):
        cases += [(GroupLanes(inner), bits, run, count * run) for run in (16, 32) for count in (1, 8, 19)]
    return cases


@pytest.mark.parametrize(("layout", "bits", "run", "length"), woven_cases(), ids=lambda case: str(case))
def test_layouts_of_some_widths(layout: Layout, bits: int, run: int, length: int) -> None:
    codes = codes_of(bits, 2, length)
    packed = layout.pack(codes, bits, run)
    assert packed.shape == (2, layout.row_bytes(bits, run, length))
    assert torch.equal(layout.unpack(packed, length, bits, run), codes)
    byte, bit, low = evaluate(layout, bits, run, length)
    by_the_map = np.zeros(packed.shape, dtype=np.uint8)
    for row, which in enumerate(low):
        for r in range(2):
            np.bitwise_or.at(
                by_the_map[r], byte[row], (codes[r].numpy() >> which & 1) << bit[row].astype(np.uint8)
            )
    np.testing.assert_array_equal(packed.numpy(), by_the_map)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("int4[g32,spare256]", "3 or 7 bits"),
        ("int3[g32,spare12]", "multiple of 8"),
        ("int4[lanes.planar64]", "weaves groups"),
        ("int4[g2,lanes.planar64]", "weaves groups"),
        ("int4[g4,lanes.planar64]", "do not divide"),
        # A number in another script is no other spelling of the same layout.
        ("int3[g32,spare\u0668]", "none of a format's items"),
        ("int4[g32,planar\u0668]", "none of a format's items"),
        ("int4[g32,planar\u0668t]", "none of a format's items"),
    ],
)
def test_layouts_that_do_not_fit(text: str, why: str) -> None:
    with pytest.raises(FormatError, match=why):
        format(text).quantize(torch.randn(4, 64))


def test_halfwords_by_hand() -> None:
    """4 bits, codes 0 .. 15: unit i holds codes i, i + 8, i + 4 and i + 12 as nibbles, low to high."""
    codes = torch.arange(16, dtype=torch.uint8)[None]
    packed = Halfwords(16).pack(codes, 4)
    assert packed.tolist() == [[0x80, 0xC4, 0x91, 0xD5, 0xA2, 0xE6, 0xB3, 0xF7]]
    units = packed.numpy().view(np.uint16)[0].tolist()
    for i, nibbles in enumerate(([0, 8, 4, 12], [1, 9, 5, 13], [2, 10, 6, 14], [3, 11, 7, 15])):
        assert [units[i] >> (4 * j) & 15 for j in range(4)] == nibbles


def test_whole_codes_by_hand() -> None:
    """3 bits, a run of 32, slices of two codes: fifteen are whole, the last is the top bits of all units."""
    codes = torch.tensor([[j % 8 for j in range(16) for _ in (0, 1)]], dtype=torch.uint8)
    codes[0, 30:] = torch.tensor([5, 2], dtype=torch.uint8)
    units = Units(32).pack(codes, 3).numpy().view(np.uint16)[0].tolist()
    for i in range(3):
        first, second = units[2 * i : 2 * i + 2]
        assert [first >> 3 * j & 7 for j in range(5)] == [(5 * i + j) % 8 for j in range(5)]
        assert first & 0x7FFF == second & 0x7FFF
        assert (first >> 15, second >> 15) == (5 >> i & 1, 2 >> i & 1)


def test_signs_lie_where_the_float_has_them() -> None:
    """e2m1 for bfloat16: magnitudes at bits 0, 3, 6 and 9, two signs nine bits above theirs."""
    found = slices(4, 9)
    assert [pieces[0] for pieces in found] == [Piece(0, 0, 3, bit) for bit in (0, 3, 6, 9)]
    assert [pieces[1] for pieces in found] == [Piece(0, 3, 1, bit) for bit in (13, 12, 15, 14)]
    # e3m2: eight codes in three units, four signs ten bits above.
    assert sum(sign.bit - rest.bit == 10 for rest, sign in slices(6, 10)) == 4


@pytest.mark.parametrize("sign", [None, 9, 10, 11])
@pytest.mark.parametrize("bits", range(1, 9))
def test_most_codes_are_whole(bits: int, sign: int | None) -> None:
    """As many slices as fit whole are one piece, but for a sign."""
    found = slices(bits, sign)
    width = bits - (sign is not None)
    fit = len(found) * bits // 16 * (16 // width) if width else 0
    whole = [pieces for pieces in found if pieces[0].width >= width > 0]
    assert len(whole) >= min(fit, len(found))


@pytest.mark.parametrize("layout", [Halfwords(256), Units(256), Units(256, 9)], ids=str)
@pytest.mark.parametrize("bits", range(1, 9))
def test_one_shift_of_two_units_leaves_two_neighbours(bits: int, layout: Layout) -> None:
    """What halfwords are for: in a 32-bit register of two units, the same bits of both are those of codes
    next to each other, plane by plane."""
    byte, bit, _ = evaluate(layout, bits, None, 256)
    unit, inside = (byte * 8 + bit) // 16, (byte * 8 + bit) % 16
    first = unit % 2 == 0
    assert (unit[:, 1::2] - unit[:, ::2] == 1).all() and first[:, ::2].all()
    np.testing.assert_array_equal(inside[:, 1::2], inside[:, ::2])


@pytest.mark.parametrize("span", [0, -16, 8, 24, 100])
def test_halfwords_span_multiples_of_sixteen(span: int) -> None:
    with pytest.raises(FormatError, match="span"):
        Halfwords(span)


@pytest.mark.parametrize(("span", "sign"), [(0, None), (-16, None), (8, 9), (24, None), (32, 0), (32, 16)])
def test_units_span_multiples_of_sixteen_and_signs_lie_within(span: int, sign: int | None) -> None:
    with pytest.raises(FormatError, match="16"):
        Units(span, sign)


def test_units_are_spelled_with_span_and_sign() -> None:
    f = format("int3[g32,units64]")
    assert f.layout == Units(64) and str(f) == "int3[g32,units64]"
    g = format("mxfp4[units128s9]")
    assert g.layout == Units(128, 9) and str(g) == "mxfp4[units128s9]"
    for text in ("int4[units]", "int4[units64s]", "int4[units64sx]", "int4[unitss9]"):
        with pytest.raises(FormatError, match="units"):
            format(text)


def test_halfwords_are_spelled_with_their_span() -> None:
    f = format("int4[g32,halves64]")
    assert f.layout == Halfwords(64) and str(f) == "int4[g32,halves64]"
    for text in ("int4[halves]", "int4[halvesx]"):
        with pytest.raises(FormatError, match="halves"):
            format(text)


def test_even_element_in_the_low_nibble() -> None:
    assert Packed().pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x03]]


@given(
    bits=st.integers(1, 8),
    groups=st.integers(0, 5),
    run=st.integers(1, 40),
    rows=st.lists(st.integers(0, 3), max_size=2),
    layout=st.sampled_from([Packed(), Planar(), Planar(16), Halfwords(32), Units(32), Units(16, 9)]),
)
def test_any_shape(bits: int, groups: int, run: int, rows: list[int], layout: Layout) -> None:
    length = groups * run
    codes = codes_of(bits, *rows, length)
    packed = layout.pack(codes, bits, run)
    assert packed.shape == (*rows, layout.row_bytes(bits, run, length))
    assert torch.equal(layout.unpack(packed, length, bits, run), codes)


@pytest.mark.parametrize(
    "text", ["int4[g32]", "int3[g64]", "float6_e2m3", "nf4[g16]", "mxfp4", "int4[g32,2:4]", "int8"]
)
def test_relayout_keeps_every_value(text: str) -> None:
    f = format(text)
    x = torch.randn(5, 192)
    q = f.quantize(x)
    for layout in ("planar", "bytes", "planar64", "halves32", "units32", "units64s9", "packed"):
        moved = f.relayout(q, layout)
        assert torch.equal(moved.dequantize(), q.dequantize())
        assert torch.equal(moved.codes, f.with_layout(layout).quantize(x).codes)
        back = moved.format.relayout(moved, f.layout)
        assert torch.equal(back.codes, q.codes) and back.format == f


def test_a_layout_that_puts_two_codes_in_one_place_is_refused() -> None:
    @dataclass(frozen=True)
    class Clash(Packed):
        name: str = "clash"

        def fields(self, bits: int, run: int | None) -> tuple[Field, ...]:
            return (Field(0, bits, sympy.floor(k / 2), sympy.Integer(0)),)

    with pytest.raises(FormatError, match="two bits in one place"):
        Clash().pack(codes_of(4, 1, 8), 4)


def test_a_layout_that_forgets_bits_is_refused() -> None:
    @dataclass(frozen=True)
    class Forgetful(Packed):
        name: str = "forgetful"

        def fields(self, bits: int, run: int | None) -> tuple[Field, ...]:
            return (Field(0, bits - 1, k, sympy.Integer(0)),)

    with pytest.raises(FormatError, match="places bits"):
        Forgetful().pack(codes_of(4, 1, 8), 4)


def test_scales_by_group_are_stored_turned() -> None:
    """Kernels read the scales of neighbouring rows side by side: the part is [K / group, N], contiguous."""
    w = torch.randn(6, 64)
    plain = format("uint4[g32,zero]").quantize(w)
    for layout in ("halves64", "planar64t", "units64"):
        turned = plain.format.relayout(plain, layout)
        assert str(turned.format) == f"uint4[g32,zero,{layout}]"
        codes, scales, zeros = turned.parts
        assert scales.shape == zeros.shape == (2, 6) and scales.is_contiguous()
        assert torch.equal(scales, plain.scales.mT) and torch.equal(zeros, plain.zeros.mT)
        read = Quantized.from_parts(turned.format, [codes, scales, zeros], 64)
        assert all(a is b for a, b in zip(read.parts, (codes, scales, zeros), strict=True))
        assert torch.equal(read.dequantize(), plain.dequantize())
        back = turned.format.relayout(turned, plain.format.layout)
        assert all(torch.equal(a, b) for a, b in zip(back.parts, plain.parts, strict=True))
    assert format("int8[halves64]").quantize(w).parts[1].shape == (6, 1)
