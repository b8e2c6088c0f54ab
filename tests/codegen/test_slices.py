"""Walks over a row: what a kernel takes out of the units is what the layout put there.

codes 0 .. 999 of 3 bits, packed as halves1024   ->   16 slices of 64, each from two loads   ->   the codes
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitfold.codegen import Walk, walk
from bitfold.codegen.slices import Take, Unwalkable
from bitfold.formats import Field, Format, Integer, Planar, format
from bitfold.formats.layout import Halfwords
from bitfold.formats.mover import k as at
from bitfold.formats.units import Units

SPANS = [256, 512, 1024, 2048]
LENGTHS = [1, 2, 15, 16, 255, 256, 257, 1000, 1024, 4099]


def laid_out(bits: int, span: int, layout: type[Halfwords] | type[Units] = Halfwords) -> Format:
    return Format(Integer(bits, signed=False), None, layout(span))


def taken(found: Walk, packed: torch.Tensor, k: int) -> np.ndarray:
    """Codes [rows, k], cut out of packed rows as a kernel does it: by run, load and slice."""
    units = packed.contiguous().numpy().view(np.uint16).astype(np.int64)
    rows = units.reshape(units.shape[0], found.runs, found.units)
    loads = [rows[..., start : start + found.length] for start in found.loads]
    slices = []
    for takes in found.slices:
        parts = [((loads[t.load] >> t.bit) & ((1 << t.width) - 1)) << t.low for t in takes]
        slices.append(np.bitwise_or.reduce(parts))
    return np.concatenate(slices, -1).reshape(units.shape[0], -1)[:, :k]


@pytest.mark.parametrize("layout", [Halfwords, Units])
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_a_walk_takes_out_what_was_packed(bits: int, span: int, layout: type[Halfwords | Units]) -> None:
    narrowest = bits & -bits
    for length in LENGTHS:
        f = laid_out(bits, span, layout)
        found = walk(f, length)
        assert isinstance(found, Walk), found
        assert (found.codes, found.units) == (span, span * bits // 16)
        assert found.runs == -(-length // span)
        assert found.length == span * narrowest // 16 and len(found.slices) == 16 // narrowest
        codes = torch.randint(0, 1 << bits, (3, length), dtype=torch.uint8)
        np.testing.assert_array_equal(taken(found, f.pack(codes), length), codes.numpy(), f"k={length}")


@given(
    bits=st.integers(1, 8),
    blocks=st.sampled_from([1, 2, 4, 8]),
    k=st.integers(1, 3000),
    layout=st.sampled_from([Halfwords(256), Units(256), Units(256, 9), Units(256, 11)]),
)
def test_any_length(bits: int, blocks: int, k: int, layout: Halfwords | Units) -> None:
    span = blocks * 256 // (bits & -bits)
    f = Format(Integer(bits, signed=False), None, replace(layout, span=span))
    found = walk(f, k)
    assert isinstance(found, Walk)
    codes = torch.randint(0, 1 << bits, (2, k), dtype=torch.uint8)
    np.testing.assert_array_equal(taken(found, f.pack(codes), k), codes.numpy())


@pytest.mark.parametrize("layout", [Halfwords(1024), Units(1024), Units(1024, 10)], ids=str)
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_bit_of_every_unit_is_taken_once(bits: int, layout: Halfwords | Units) -> None:
    found = walk(Format(Integer(bits, signed=False), None, layout), 1024)
    assert isinstance(found, Walk)
    seen = np.zeros((found.units, 16), dtype=int)
    for takes in found.slices:
        assert sorted(b for t in takes for b in range(t.low, t.low + t.width)) == list(range(bits))
        for t in takes:
            first = found.loads[t.load]
            seen[first : first + found.length, t.bit : t.bit + t.width] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("layout", [Halfwords, Units])
@pytest.mark.parametrize("bits", range(1, 9))
def test_slices_are_cut_alike_for_all_spans(bits: int, layout: type[Halfwords | Units]) -> None:
    """Why decoders are tested for one span: only where loads start depends on it."""
    made = [walk(laid_out(bits, span, layout), 4096) for span in SPANS]
    assert len({found.slices for found in made if isinstance(found, Walk)}) == 1
    assert all(isinstance(found, Walk) for found in made)


def test_int4_by_hand() -> None:
    found = walk(format("int4[g128,halves512]"), 4096)
    assert found == Walk(
        codes=512,
        units=128,
        runs=8,
        stride=1024,
        length=128,
        loads=(0,),
        slices=tuple((Take(0, 0, 4, bit),) for bit in (0, 8, 4, 12)),
    )


def test_int3_by_hand() -> None:
    """1024 codes: two loads of 64 units for the low two bits, one for the high bit."""
    found = walk(format("int3[halves1024]"), 1024)
    assert isinstance(found, Walk)
    assert (found.length, found.loads, len(found.slices)) == (64, (0, 64, 128), 16)
    assert found.slices[0] == (Take(0, 0, 2, 0), Take(2, 2, 1, 0))
    assert found.slices[1] == (Take(1, 0, 2, 0), Take(2, 2, 1, 8))


def test_whole_codes_of_three_bits_by_hand() -> None:
    """1024 codes: three loads of 64 units with five slices each, and the top bit of all three."""
    found = walk(format("int3[units1024]"), 1024)
    assert isinstance(found, Walk)
    assert (found.length, found.loads, len(found.slices)) == (64, (0, 64, 128), 16)
    assert found.slices[6] == (Take(1, 0, 3, 3),)
    assert found.slices[15] == (Take(0, 0, 1, 15), Take(1, 1, 1, 15), Take(2, 2, 1, 15))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("int4[g128]", "a run of 2 codes of .* takes 1 bytes, no whole 16-bit units"),
        ("int8", "a run of 1 codes of .* takes 1 bytes, no whole 16-bit units"),
        ("int3", "a run of 8 codes of .* takes 3 bytes, no whole 16-bit units"),
        ("int4[planar128]", "leaves slices of 1 codes; a kernel needs a power of two from 16 on"),
        ("int4[halves48]", "leaves slices of 12 codes; a kernel needs a power of two from 16 on"),
        ("int4[halves128]", None),
        ("int4[halves64]", None),
        ("int4[halves32]", "leaves slices of 8 codes"),
        ("int4[halves32768]", "repeats after 32768 codes; lay it out as halves"),
        ("int4[planar]", "repeats after 65536 codes; lay it out as halves"),
    ],
)
def test_why_a_layout_cannot_be_walked(text: str, reason: str | None) -> None:
    found = walk(format(text), 65536)
    if reason is None:
        assert isinstance(found, Walk) and found
        return
    assert isinstance(found, Unwalkable) and not found
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(found.reason)


def test_a_row_of_nothing_is_no_walk() -> None:
    assert not walk(format("int4[halves256]"), 0)


def test_overlapping_loads_are_refused() -> None:
    """A layout whose second plane starts in the middle of the first one's units."""

    @dataclass(frozen=True)
    class Overlapping(Planar):
        span: int | None = 32
        name: str = "overlapping"

        def fields(self, bits: int, run: int | None) -> tuple[Field, ...]:
            low = at % 32
            return (Field(0, 1, 2 * low, at * 0), Field(1, 1, 2 * (low + 8), at * 0 + 1))

        def period(self, bits: int, run: int | None, length: int) -> tuple[int, int]:
            return 32, 80

    found = walk(Format(Integer(2), None, Overlapping()), 64)
    assert isinstance(found, Unwalkable) and "takes codes from overlapping units" in found.reason
