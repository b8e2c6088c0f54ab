"""Every way to combine element, scale, zero point, rule, sparsity, layout and shape: what must hold for all.

`make test` takes a cover in which every pair of choices that go together occurs; `make test-full` the whole
product, over two layouts and two shapes (the cover and `test_layouts.py` have the others).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable

import pytest
import torch

from bitfold.formats import Format, FormatError, Quantized, format

ELEMENTS = [
    "int8", "int5", "int4", "int2", "uint4", "uint3", "int1", "float8_e4m3fn", "float8_e5m2", "float6_e3m2",
    "float4_e2m1", "float5_e2m2", "nf4", "ternary", "int8f6",
]  # fmt: skip
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


def fits(f: Format | None, shape: tuple[int, ...]) -> bool:
    """Whether there is such a format and it takes the shape."""
    try:
        if f is not None:
            f.check(shape)
    except FormatError:
        return False
    return f is not None


def check(f: Format, shape: tuple[int, ...]) -> None:
    """What holds for every format and shape."""
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


Row = tuple[object, ...]
Pair = tuple[tuple[int, object], tuple[int, object]]


def pairs_of(row: Row) -> set[Pair]:
    return set(itertools.combinations(enumerate(row), 2))


def completed(pair: Pair, chance: random.Random) -> Row | None:
    """A row that holds the pair and contradicts itself nowhere, or None if none is found in many tries.

    The other choices are drawn, most of them the plain one, since two special ones seldom go together.
    """
    for _ in range(500):
        row = [axis[0] if chance.random() < 0.6 else chance.choice(axis) for axis in AXES]
        for axis, choice in pair:
            row[axis] = choice
        element, *items, shape = row
        if fits(spelled(element, items), shape):
            return tuple(row)
    return None


def test_a_cover_of_all_pairs() -> None:
    chance, covered = random.Random(0), set[Pair]()
    for i, j in itertools.combinations(range(len(AXES)), 2):
        for pair in itertools.product(((i, a) for a in AXES[i]), ((j, b) for b in AXES[j])):
            row = None if pair in covered else completed(pair, chance)
            if row is not None:
                element, *items, shape = row
                check(spelled(element, items), shape)
                covered |= pairs_of(row)
    # A search eight times as long finds 973; the other 160 contradict themselves (a float with a zero point).
    assert len(covered) >= 970


@pytest.mark.slow
@pytest.mark.parametrize("element", ELEMENTS)
def test_the_whole_product(element: str) -> None:
    found = [
        f
        for items in itertools.product(*AXES[1:-2], LAYOUTS[:2])
        if (f := spelled(element, items)) is not None
    ]
    taken = [(f, shape) for f in dict.fromkeys(found) for shape in SHAPES[:2] if fits(f, shape)]
    for f, shape in taken:
        check(f, shape)
    assert len(taken) > 100
