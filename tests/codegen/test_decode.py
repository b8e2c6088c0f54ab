"""Decoders, exhaustively: all half-words through the program of registers, against the element's values.

Each load takes all 65,536 half-words in an order of its own, twice (low lane and high lane): every load sees
every half-word while the others are random. Integers and floats are exact wherever the value is
finite; a table's values are those rounded to the lane's type. Slices of other spans are cut out alike
(`test_slices.py`), so one span of each element stands for all.
"""

from __future__ import annotations

import math
import subprocess
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

from bitfold.codegen.decode import Decoder, decoder, finite, raised
from bitfold.codegen.lanes import LANE_TYPES
from bitfold.codegen.slices import Take, Walk, walk
from bitfold.formats import Codebook, Element, Float, Format, Integer
from bitfold.formats.catalog import ELEMENTS
from bitfold.formats.layout import Halfwords
from bitfold.formats.units import Units

HALFWORDS = 1 << 16


def integers() -> list[Element]:
    """1 to 8 bits, both signs, all fractions."""
    return [
        Integer(bits, signed, fraction)
        for bits in range(1, 9)
        for signed in (True, False)
        for fraction in range(bits + 1)
    ]


def floats() -> list[Element]:
    """Every split, every ending it can have, and odd biases."""
    found: list[Element] = []
    for e in range(1, 8):
        for m in range(8 - e):
            endings = [""] if 1 + e + m < 8 else ["fn", "fnuz"] + ([""] if e > 1 and m else [])
            found += [Float(e, m, ending) for ending in endings]
            found += [Float(e, m, endings[0], bias) for bias in (0, 1, 7, 11, 16, 30, 100)]
    return list(dict.fromkeys(found))


def tables() -> list[Element]:
    """Those of the catalog, and random ones of 2 to 4 bits, full and not."""
    drawn = torch.Generator().manual_seed(1)
    sizes = {"full16": 16, "eleven": 11, "full8": 8, "five": 5, "three": 3}
    own = [Codebook(name, tuple(torch.randn(n, generator=drawn).tolist())) for name, n in sizes.items()]
    return [e for e in ELEMENTS.values() if isinstance(e, Codebook)] + own


ALL = integers() + floats() + tables()


def is_plain(element: Element) -> bool:
    """Whether the element is not merely another one times a power of two: those are for the full run."""
    if isinstance(element, Integer):
        return element.fraction in (0, element.bits)
    return not isinstance(element, Float) or "b" not in element.name or element.bias == 100


FAST_AND_SLOW = [e if is_plain(e) else pytest.param(e, marks=pytest.mark.slow) for e in ALL]


def walked(element: Element, layout: Halfwords | Units | None = None) -> Walk:
    """How rows of this element are walked: slices of 64 codes, halfwords if not said otherwise."""
    span = 64 * 16 // (element.bits & -element.bits)
    found = walk(Format(element, None, replace(layout or Halfwords(), span=span)), 4096)
    assert isinstance(found, Walk), found
    return found


def rounded(element: Element, lane: str) -> np.ndarray:
    """The value of every code, rounded to the lane; NaN where it has none."""
    return torch.tensor(element.values(), dtype=torch.float64).to(LANE_TYPES[lane]).double().numpy()


def is_exact(element: Element, lane: str) -> bool:
    """Whether the lane's type has all the finite values."""
    values = np.array(element.values())
    return bool((rounded(element, lane) == values)[np.isfinite(values)].all())


def needs_more_exponent(element: Element, lane: str) -> bool:
    """Whether the codes, put into the lane's fields, need its largest exponent or a larger one for numbers,
    or are off by a power of two that the lane's type lacks."""
    assert isinstance(element, Float)
    width, bias = {"bf16": (8, 127), "f16": (5, 15)}[lane]
    top = element.values()[(1 << (element.bits - 1)) - 1 - ((1 << element.mantissa_bits) - 1)]
    fills = element.exponent > width or (element.exponent == width and math.isfinite(top))
    return fills or not -14 <= bias - element.bias <= bias


def codes_of(takes: tuple[Take, ...], halves: np.ndarray) -> np.ndarray:
    """The codes that the takes cut out of half-words [loads, ...]."""
    code = np.zeros(halves.shape[1:], dtype=np.int64)
    for take in takes:
        code |= ((halves[take.load] >> take.bit) & ((1 << take.width) - 1)) << take.low
    return code


@lru_cache
def shuffled(loads: int) -> np.ndarray:
    """All half-words for each load and lane, int64 [loads, 2, 65536], each in an order of its own."""
    drawn = np.random.default_rng(0)
    return np.stack([[drawn.permutation(HALFWORDS) for _ in range(2)] for _ in range(loads)])


def check(element: Element, lane: str, made: Decoder, slices: tuple[tuple[Take, ...], ...]) -> None:
    halves = shuffled(made.program.inputs)
    registers = made.program.run([(h[0] | h[1] << 16).astype(np.uint32) for h in halves])
    values = rounded(element, lane)
    for takes, result in zip(slices, made.results, strict=True):
        got = torch.from_numpy(registers[result].view(np.int16).reshape(-1, 2).copy())
        got = got.view(LANE_TYPES[lane]).double().numpy().T
        want = values[codes_of(takes, halves)]
        known = np.isfinite(want)
        same = (got == want) & (np.signbit(got) == np.signbit(want))
        assert (same | ~known).all(), f"{element} {lane} {takes}: {got[known & ~same][:4]}"


@pytest.mark.parametrize("lane", ["bf16", "f16"])
@pytest.mark.parametrize("element", FAST_AND_SLOW, ids=str)
def test_every_half_word(element: Element, lane: str) -> None:
    found = walked(element)
    made = decoder(element, found.slices, lane)
    if made is None:
        # Without a program only where the lane's type lacks a value, or its exponent a bit to put it in.
        assert not is_exact(element, lane) or needs_more_exponent(element, lane)
        return
    assert made.program.inputs == len(found.loads)
    check(element, lane, made, found.slices)


E4M3 = np.array([v for v in Float(4, 3, "fn").values() if math.isfinite(v)])


@pytest.mark.parametrize(("lane", "left"), [("bf16", 2.0**-7), ("f16", 2.0**-7)])
@pytest.mark.parametrize("element", [Float(2, 1), Float(3, 2), Float(2, 3)], ids=str)
def test_a_scale_in_e4m3_takes_the_last_step_over(element: Float, lane: str, left: float) -> None:
    """What is decoded but for the last product, times each scale and that product's power of two, less what
    would make the scale infinite: scale and value multiplied, no bit lost."""
    found = walked(element, Units(sign=15 - 7 + (element.mantissa or 0)))
    made = decoder(element, found.slices, lane, small=True)
    assert made is not None
    halves = np.stack([np.stack([np.arange(HALFWORDS)[::37]] * 2) for _ in found.loads])
    registers = made.program.run([(h[0] | h[1] << 16).astype(np.uint32) for h in halves])
    lifted = torch.from_numpy(E4M3 * raised(element, lane) * left)
    assert torch.equal(lifted.to(LANE_TYPES[lane]).double(), lifted)
    for takes, result in zip(found.slices, made.results, strict=True):
        small = torch.from_numpy(registers[result].view(np.int16).reshape(-1, 2)[:, 0].copy())
        got = (small.view(LANE_TYPES[lane]).double()[:, None] * lifted).to(LANE_TYPES[lane]).double() / left
        want = torch.from_numpy(rounded(element, lane)[codes_of(takes, halves)[0]])[:, None]
        assert torch.equal(got, want * torch.from_numpy(E4M3))


NARROW = [e for e in ALL if e.bits < 8 and (not isinstance(e, Integer) or e.fraction in (0, e.bits))]


@pytest.mark.parametrize("lane", ["bf16", "f16"])
@pytest.mark.parametrize("element", [e for e in NARROW if is_plain(e)], ids=str)
def test_every_half_word_of_whole_codes(element: Element, lane: str) -> None:
    """The same of codes that lie whole in the units, signs apart or not."""
    for layout in (Units(), Units(sign=15 - 7 + (element.mantissa or 0))):
        found = walked(element, layout)
        made = decoder(element, found.slices, lane)
        assert (made is None) == (decoder(element, walked(element).slices, lane) is None)
        if made is not None:
            check(element, lane, made, found.slices)


@pytest.mark.parametrize(
    ("element", "layout", "steps", "of"),
    [
        # Whole codes: 15 shifts and masks for 16 numbers, and three for the last. In planes it was 60.
        (Integer(3), Units(), 42, 16),
        # Bits 0, 2, 4 as they lie, 6, 8, 10 after one shift, 12, 14 after another.
        (Integer(2), Halfwords(), 18, 8),
        # Signs apart: 5 + 3 + 2 + 5 where nibbles take 19.
        (Float(2, 1), Units(sign=9), 15, 4),
        (Float(2, 1), Halfwords(), 19, 4),
        (Float(3, 2), Units(sign=10), 29, 8),
        (Integer(4), Halfwords(), 11, 4),
    ],
    ids=str,
)
def test_instructions_to_bfloat16(element: Element, layout: Halfwords | Units, steps: int, of: int) -> None:
    """Of two numbers of each slice: what was counted when layouts were chosen."""
    found = walked(element, layout)
    made = decoder(element, found.slices, "bf16")
    assert made is not None
    assert (len(made.program.steps), len(found.slices)) == (steps, of)


ALONE: list[Element] = [
    Integer(3),
    Integer(7),
    Integer(8, False),
    Float(3, 2),
    ELEMENTS["nf4"],
    ELEMENTS["int1"],
]


@pytest.mark.parametrize("lane", ["bf16", "f16"])
@pytest.mark.parametrize("element", ALONE, ids=str)
def test_each_slice_by_itself(element: Element, lane: str) -> None:
    """As kernels print most of them: one block a slice, its loads renumbered from 0."""
    for takes in walked(element).slices:
        loads = sorted({take.load for take in takes})
        alone = tuple(Take(loads.index(t.load), t.low, t.width, t.bit) for t in takes)
        made = decoder(element, [alone], lane)
        assert made is not None
        check(element, lane, made, (alone,))


def test_what_must_have_a_program_has_one() -> None:
    """No integer, no table of up to 4 bits, no public float falls back on plain decoding."""
    public = ["float8_e4m3fn", "float8_e5m2", "float6_e3m2", "float6_e2m3", "float4_e2m1", "float5_e2m2"]
    named = [f for name in public if (f := Float.parse(name)) is not None]
    assert len(named) == len(public)
    small = [t for t in tables() if t.bits <= 4]
    for lane in ("bf16", "f16"):
        for element in integers() + named + small:
            assert decoder(element, walked(element).slices, lane) is not None, (str(element), lane)


def test_tables_past_four_bits_or_past_the_lane_have_none() -> None:
    wide = Codebook("wide", tuple(float(i) for i in range(17)))
    far = Codebook("far", (0.0, 1e5))
    assert decoder(wide, walked(wide).slices, "bf16") is None
    assert decoder(far, walked(far).slices, "f16") is None
    assert decoder(far, walked(far).slices, "bf16") is not None


def test_finite() -> None:
    assert finite(Integer(4)) and finite(Float(2, 1)) and finite(Codebook("two", (0.0, 1.0)))
    assert not finite(Float(4, 3, "fn")) and not finite(Codebook("three", (0.0, 1.0, 2.0)))


def assembled(asm: str, results: int, inputs: int, name: str) -> str:
    """A PTX entry around one block: its inputs are loaded, its results stored."""
    body = asm
    for i in reversed(range(results + inputs)):
        body = body.replace(f"${i}", f"%r{i}")
    reads = [f"ld.global.b32 %r{results + i}, [%a+{4 * i}];" for i in range(inputs)]
    writes = [f"st.global.b32 [%a+{4 * i}], %r{i};" for i in range(results)]
    lines = [
        f".visible .entry {name}(.param .u64 p) {{",
        f".reg .b32 %r<{results + inputs}>; .reg .b64 %a;",
        "ld.param.u64 %a, [p]; cvta.to.global.u64 %a, %a;",
    ]
    return "\n".join([*lines, *reads, body, *writes, "ret;", "}"])


@pytest.mark.parametrize(("arch", "version"), [(80, "7.8"), (90, "7.8"), (100, "8.7")])
def test_every_program_assembles(arch: int, version: str, tmp_path: Path) -> None:
    """What the evaluator runs is also what the assembler takes, for all elements at once."""
    backend = pytest.importorskip("triton.backends.nvidia")
    entries = []
    for element in ALL:
        for lane in ("bf16", "f16"):
            made = decoder(element, walked(element).slices[:4], lane)
            if made is not None and (element.bits in (3, 4, 8) or not isinstance(element, Integer)):
                results, inputs = len(made.results), made.program.inputs
                entries.append(assembled(made.asm, results, inputs, f"k{len(entries)}"))
    assert len(entries) > 100
    source = tmp_path / "decoders.ptx"
    source.write_text(f".version {version}\n.target sm_{arch}\n.address_size 64\n" + "\n".join(entries))
    folder = Path(backend.__file__).parent / "bin"
    tool = folder / ("ptxas-blackwell" if arch >= 100 and (folder / "ptxas-blackwell").exists() else "ptxas")
    told = subprocess.run(
        [str(tool), f"--gpu-name=sm_{arch}", "-O0", str(source), "-o", str(tmp_path / "out.cubin")],
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stderr[:2000]


def test_the_evaluator_sees_a_wrong_program() -> None:
    """The check above fails when one constant of a decoder is off: it is not blind."""
    element = Integer(4)
    found = walked(element)
    made = decoder(Integer(4, signed=False), found.slices, "bf16")
    assert made is not None
    with pytest.raises(AssertionError):
        check(element, "bf16", made, found.slices)
    assert math.isnan(rounded(Float(4, 3, "fn"), "bf16")[0x7F])
