"""Panels against a plain loop over their definition, and round trips."""

from __future__ import annotations

import pytest
import torch

from bitfold.formats import BitfoldError, format
from bitfold.formats.panels import Panels, parse


def by_definition(layout: Panels, codes: torch.Tensor) -> torch.Tensor:
    """Where each code goes, one by one."""
    count, length = codes.shape
    channels = length // layout.taps
    runs = -(-channels // layout.each)
    rows = layout.rows or count
    out: list[int] = []
    for group in range(count // rows):
        for first in range(0, rows, layout.lanes):
            lanes = range(group * rows + first, group * rows + min(first + layout.lanes, rows))
            for tap in range(layout.taps):
                for run in range(runs):
                    for row in lanes:
                        for i in range(run * layout.each, (run + 1) * layout.each):
                            out.append(int(codes[row, i * layout.taps + tap]) if i < channels else 0)
    return torch.tensor(out, dtype=torch.uint8).reshape(count, layout.taps * runs * layout.each)


@pytest.mark.parametrize(
    "text", ["panels16x4", "panels16x4t9", "panels8x1t9", "panels4x4t3r6", "panels16x4r3"]
)
@pytest.mark.parametrize("count, channels", [(24, 8), (36, 5), (6, 1)])
def test_codes_lie_where_the_definition_says(text: str, count: int, channels: int) -> None:
    layout = parse(text)
    assert layout is not None and str(layout) == text
    codes = torch.randint(0, 256, (count, channels * layout.taps), dtype=torch.uint8)
    packed = layout.pack(codes, 8)
    assert torch.equal(packed, by_definition(layout, codes))
    assert packed.shape[-1] == layout.row_bytes(8, None, codes.shape[-1])
    assert torch.equal(layout.unpack(packed, codes.shape[-1], 8), codes)


def test_a_format_with_panels_keeps_every_value() -> None:
    plain, woven = format("int8"), format("int8[panels16x4t9]")
    assert format(str(woven)) == woven
    weight = torch.randn(1100, 1170)  # large enough that other layouts are made a few rows at a time
    q = woven.quantize(weight)
    assert torch.equal(q.dequantize(), plain.quantize(weight).dequantize())
    again = woven.relayout(q, "bytes")
    assert torch.equal(again.codes, plain.quantize(weight).codes)
    assert torch.equal(plain.relayout(again, woven.layout).codes, q.codes)


def test_no_rows() -> None:
    q = format("int8[panels16x4]").quantize(torch.empty(0, 8))
    assert q.codes.shape == (0, 8) and q.dequantize().shape == (0, 8)


@pytest.mark.parametrize(
    "text, shape, says",
    [
        ("int4[panels16x4]", (4, 4), "8 bits, not 4"),
        ("int8[panels16x4t9]", (4, 10), "4 rows of 10"),
        ("int8[panels16x4r3]", (4, 8), "4 rows of 8"),
        ("int8[panels16x4]", (2, 4, 4), "3 dimensions"),
    ],
)
def test_what_does_not_fit_is_refused(text: str, shape: tuple[int, ...], says: str) -> None:
    with pytest.raises(BitfoldError, match=says):
        format(text).quantize(torch.zeros(shape))
    with pytest.raises(BitfoldError, match="1 or more lanes"):
        Panels(lanes=0)
