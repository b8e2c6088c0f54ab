"""Every way to combine element, scale, zero point, rule, sparsity, layout and shape: what must hold for all.

`make test` takes a cover in which every pair of choices occurs; `make test-full` the whole product, over two
layouts and two shapes (the cover and `test_layouts.py` have the others).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
import torch

from bitfold.formats import Format, FormatError, Quantized, format

ELEMENTS = [
    "int8",
    "int5",
    "int4",
    "int2",
    "uint4",
    "uint3",
    "int1",
    "float8_e4m3fn",
    "float8_e5m2",
    "float6_e3m2",
]
ELEMENTS += ["float4_e2m1", "float5_e2m2", "nf4", "ternary", "int8f6"]
GRANULARITIES = ["tensor", "row", "g16", "g24", "16x48"]
DTYPES = ["f32", "bf16", "f16", "e8m0", "e4m3"]
ZEROS = ["", "zero", "zero:float", "zero:min"]
RULES = ["", "noclip", "narrow", "signed", "absmean", "pow2", "ceil", "even", "rceil", "hqq"]
EXTRA = ["", "native", "two_level"]
SPARSE = ["", "2:4"]
LAYOUTS = ["", "planar", "bytes"]
SHAPES = [(16, 48), (3, 16, 48), (48,), (0, 48), (32, 144)]
AXES = [ELEMENTS, GRANULARITIES, DTYPES, ZEROS, RULES, EXTRA, SPARSE, LAYOUTS, SHAPES]


def spelled(element: object, items: Iterable[object]) -> Format | None:
    """The format of these choices, or None if they contradict each other."""
    try:
        return format(f"{element}[{','.join(str(i) for i in items if i)}]")
    except FormatError:
        return None


def holds(f: Format | None, shape: tuple[int, ...]) -> bool:
    """Whether there is such a format and it takes the shape; if so, its properties are asserted."""
    try:
        if f is None:
            return False
        f.check(shape)
    except FormatError:
        return False
    text = str(f)
    x = torch.randn(shape)
    q = f.quantize(x)
    back = q.dequantize()
    assert format(str(f)) == f, text
    assert back.shape == x.shape and back.isfinite().all(), text
    assert torch.equal(f.fake_quantize(x), back), text
    assert tuple(q.codes.shape[:-1]) == shape[:-1], text
    if x.numel():
        assert q.nbytes * 8 == pytest.approx(f.bits_per_element(x.shape) * x.numel()), text
        # A power-of-two scale is at most twice the exact one, and the largest code of a sign bit is 1.
        assert back.abs().max() <= 2.01 * x.abs().max(), text
    again = Quantized.from_parts(f, [p.clone() for p in q.parts], q.k)
    assert torch.equal(again.dequantize(), back), text
    assert torch.equal(f.relayout(q, "planar").dequantize(), back), text
    assert torch.equal(f.pack(f.unpack(q.codes, q.k)), q.codes), text
    fixed = f.quantize(x, q.params)
    assert torch.equal(fixed.codes, q.codes), text
    return True


def valid_pairs() -> Iterable[tuple[object, ...]]:
    """For every pair of choices the first few rows that hold it, the rest taken in turn."""
    for i, j in itertools.combinations(range(len(AXES)), 2):
        for number, (a, b) in enumerate(itertools.product(AXES[i], AXES[j])):
            row: list[object] = [
                axis[number % len(axis)] if n < 2 else axis[0] for n, axis in enumerate(AXES)
            ]
            row[i], row[j] = a, b
            yield tuple(row)


def test_a_cover_of_all_pairs() -> None:
    rows = list(dict.fromkeys(valid_pairs()))
    assert sum(holds(spelled(element, items), shape) for element, *items, shape in rows) > 400


@pytest.mark.slow
@pytest.mark.parametrize("element", ELEMENTS)
def test_the_whole_product(element: str) -> None:
    found = [
        f
        for items in itertools.product(*AXES[1:-2], LAYOUTS[:2])
        if (f := spelled(element, items)) is not None
    ]
    assert sum(holds(f, shape) for f in dict.fromkeys(found) for shape in SHAPES[:2]) > 100
