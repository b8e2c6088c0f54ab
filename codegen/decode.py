"""Codes to 16-bit floats in a handful of register instructions, derived from the element.

In: an element, how a slice's bits are taken from its loads, bf16 or f16. Out: a `lanes.Program` whose inputs
are registers of two neighbouring units, one per load, and whose result holds two neighbouring values.

    int4, bits 4-7, bf16:  t = u >> 4;  v = (t & 0x000F000F) ^ 0x43084308;  v + -136
    float4_e2m1:           t = place sign and magnitude at the top of a bf16;  v = t * 2**126

Why these: OR-ing an integer into the mantissa of 2**m makes the number 2**m + code, exactly, and a small
float is a 16-bit float with the wrong exponent bias, which one multiplication by a power of two mends,
subnormals included. Two's complement costs nothing: its sign bit is flipped by the same lop3 that masks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..formats import Element, Float, Integer
from .lanes import AND, AND_OR, AND_XOR, LANE_TYPES, SELECT, Constant, Program, both, pair
from .slices import Take

MANTISSA = {"bf16": 7, "f16": 10}
BIAS = {"bf16": 127, "f16": 15}
MINUS_ZERO = both(0x8000)


@dataclass(frozen=True)
class Decoder:
    """`program.run` puts each slice's values in the registers `results`, in the order they were asked for."""

    program: Program
    results: tuple[int, ...]

    @property
    def asm(self) -> str:
        return self.program.ptx(self.results)


def decoder(
    element: Element, slices: Sequence[Sequence[Take]], lane: str, *, small: bool = False
) -> Decoder | None:
    """The program for these slices, loads numbered 0 .. in each take; None if the element has none.

    small: leave a float as it is before its last step, `raised(element, lane)` times too small.

    Exact wherever `element.values()` is finite and a `lane` number; codes that mean infinity or NaN are left
    to the caller.
    """
    loads = 1 + max(take.load for takes in slices for take in takes)
    program = Program(loads)
    if isinstance(element, Integer):
        if element.bits <= MANTISSA[lane]:
            results = [_integer(program, element, takes, lane) for takes in slices]
        else:
            results = [_wide_integer(program, element, takes, lane) for takes in slices]
    elif isinstance(element, Float):
        if not _float_fits(element, lane):
            return None
        results = [_float(program, element, takes, lane) for takes in slices]
        if not small:
            up = pair(raised(element, lane), lane)
            results = [program.fma(result, up, MINUS_ZERO, lane) for result in results]
    elif element.bits <= 4 and _table_fits(element, lane):
        if element.bits == 4 and all(len(takes) == 1 for takes in slices):
            results = _tabled_by_fours(program, element, slices, lane)
        else:
            results = [_tabled(program, element, takes, lane) for takes in slices]
    else:
        return None
    return Decoder(program, tuple(results))


def holds(element: Element, lane: str) -> bool:
    """Whether the lane's type has the element's values: exactly, or a table's as well as any number."""
    values = torch.tensor([v for v in element.values() if math.isfinite(v)], dtype=torch.float64)
    errors = (values.to(LANE_TYPES[lane]).to(torch.float64) - values).abs()
    allowed = 0.0 if isinstance(element, Integer | Float) else 2.0 ** -(MANTISSA[lane] + 1)
    return bool((errors <= allowed * values.abs()).all())


def finite(element: Element) -> bool:
    """Whether every code is a number, so that no packed tensor can hold one that a program gets wrong."""
    return all(math.isfinite(v) for v in element.values()[: 1 << element.bits])


def _gathered(
    program: Program, takes: Sequence[Take], start: Constant, last: int = AND_XOR, at: int = 0
) -> int:
    """The codes from bit `at` of each lane on, on top of the bits of `start`, which XORs them."""
    value: int | Constant = start
    for take in takes:
        shifted = program.shift(take.load, take.low + at - take.bit)
        mask = both(((1 << take.width) - 1) << (take.low + at))
        value = program.logic(shifted, mask, value, last)
    assert isinstance(value, int)
    return value


def _integer(program: Program, element: Integer, takes: Sequence[Take], lane: str) -> int:
    at = _where(element.bits, takes, lane)
    flip = 1 << (element.bits - 1) if element.signed else 0
    raised = _gathered(program, takes, both(_magic(lane) | flip << at), at=at)
    unit = 2.0**-element.fraction
    # The mantissa's bit `at` is worth 2**at.
    base = 2.0 ** (MANTISSA[lane] - at) + flip
    return program.fma(raised, pair(unit * 2.0**-at, lane), pair(-unit * base, lane), lane)


def _where(bits: int, takes: Sequence[Take], lane: str) -> int:
    """From which bit of the mantissa on a code is decoded. As many codes as fit there share a shift: those of
    2 bits at bits 6, 8 and 10 of a unit are all shifted by 6, those of 3 at 6 and 9 too."""
    shared = MANTISSA[lane] // bits * bits
    at = (takes[0].bit - takes[0].low) % shared
    return at if at + bits <= MANTISSA[lane] else 0


def _wide_integer(program: Program, element: Integer, takes: Sequence[Take], lane: str) -> int:
    """8 bits are one more than bf16's mantissa: high and low nibble apart, both exact, as is their sum."""
    one, unit = _magic(lane), 2.0**-element.fraction
    flip = 8 if element.signed else 0
    low = _gathered(program, _part(takes, 0, 4), both(one))
    high = _gathered(program, _part(takes, 4, 8), both(one | flip))
    base = 2.0 ** MANTISSA[lane]
    sixteen = program.fma(high, pair(16.0, lane), pair(-(16 * (base + flip) + base), lane), lane)
    if element.fraction == 0:
        return program.fma(low, pair(1.0, lane), sixteen, lane)
    whole = program.fma(low, pair(1.0, lane), sixteen, lane)
    return program.fma(whole, pair(unit, lane), MINUS_ZERO, lane)


def _part(takes: Sequence[Take], start: int, end: int) -> list[Take]:
    """The bits start .. end - 1 of the codes, as if they were codes of their own."""
    found = []
    for take in takes:
        a, b = max(take.low, start), min(take.low + take.width, end)
        if a < b:
            found.append(Take(take.load, a - start, b - a, take.bit + a - take.low))
    return found


def _magic(lane: str) -> int:
    """Bits of the number whose last mantissa bit is worth 1."""
    return (BIAS[lane] + MANTISSA[lane]) << MANTISSA[lane]


def _float_fits(element: Float, lane: str) -> bool:
    values = torch.tensor([v for v in element.values() if math.isfinite(v)], dtype=torch.float64)
    shift = 2.0 ** (BIAS[lane] - element.bias)
    exact = torch.equal(values.to(LANE_TYPES[lane]).to(torch.float64), values)
    # Where the exponent fills the lane's, its largest one is the lane's infinity before it is multiplied.
    top = element.values()[: 1 << (element.bits - 1)][-1 << element.mantissa_bits :]
    spare = 15 - MANTISSA[lane] - element.exponent
    reaches = spare > 0 or (spare == 0 and not any(math.isfinite(v) for v in top))
    narrow = element.mantissa_bits <= MANTISSA[lane]
    return exact and reaches and narrow and 2.0**-14 <= shift <= torch.finfo(LANE_TYPES[lane]).max


def _float(program: Program, element: Float, takes: Sequence[Take], lane: str) -> int:
    """Sign, exponent and mantissa at the lane's places: a number with the wrong bias."""
    up = MANTISSA[lane] - element.mantissa_bits
    top = element.bits - 1
    masks: dict[tuple[int, int], int] = {}
    for take in takes:
        # The magnitude's bits go to the top of the mantissa, the sign to bit 15; what is shifted alike is
        # masked together.
        for a, b, target in ((take.low, min(take.low + take.width, top), None), (top, top + 1, 15)):
            if a >= b or not take.low <= a < take.low + take.width:
                continue
            place = a + up if target is None else target
            moved = take.load, place - (take.bit + a - take.low)
            masks[moved] = masks.get(moved, 0) | ((1 << (b - a)) - 1) << place
    value: int | Constant = both(0)
    for (load, by), mask in masks.items():
        value = program.logic(program.shift(load, by), both(mask), value, AND_OR)
    assert isinstance(value, int)
    return value


def raised(element: Float, lane: str) -> float:
    """The power of two between a float and the lane's number with its bits at the lane's places."""
    return 2.0 ** (BIAS[lane] - element.bias)


def _table_fits(element: Element, lane: str) -> bool:
    """Always for a sum that rounds weights to this type anyway: the reference rounds the same values."""
    return all(abs(v) <= torch.finfo(LANE_TYPES[lane]).max for v in element.values() if math.isfinite(v))


def _table(element: Element, lane: str) -> np.ndarray:
    """The values' bits, uint16 [16], rounded to the lane's type; 0 for codes without a value."""
    values = torch.tensor([0.0 if math.isnan(v) else v for v in element.values()])
    bits = values.to(LANE_TYPES[lane]).view(torch.int16).numpy().view(np.uint16)
    return np.pad(bits, (0, 16 - len(bits)))


def _bytes(table: np.ndarray, half: int) -> list[Constant]:
    """Four registers with the low (half 0) or high bytes of 16 entries."""
    picked = (table >> (8 * half)).astype(np.uint8)
    return [Constant(int(np.frombuffer(picked[i : i + 4].tobytes(), "<u4")[0])) for i in range(0, 16, 4)]


def _tabled(program: Program, element: Element, takes: Sequence[Take], lane: str) -> int:
    """Two codes are the selectors of a byte permutation over the table's low bytes, and its high bytes."""
    table = _table(element, lane)
    codes = _gathered(program, takes, both(0))
    if element.bits == 4:
        high_half = program.logic(program.shift(codes, -1), both(4), both(0), AND)
        codes = program.logic(codes, both(7), both(0), AND)
    selectors = program.logic(program.shift(codes, -12), Constant(0xFFFFFFFF), codes, AND_OR)
    found = []
    for half in (0, 1):
        parts = _bytes(table, half)
        byte = program.permute(parts[0], parts[1], selectors)
        if element.bits == 4:
            upper = program.permute(parts[2], parts[3], selectors)
            mask_selectors = program.logic(
                program.shift(high_half, -12), Constant(0xFFFFFFFF), high_half, AND_OR
            )
            mask = program.permute(Constant(0), Constant(0xFFFFFFFF), mask_selectors)
            byte = program.logic(mask, upper, byte, SELECT)
        found.append(byte)
    return program.permute(found[0], found[1], Constant(0x5140))


def _tabled_by_fours(
    program: Program, element: Element, slices: Sequence[Sequence[Take]], lane: str
) -> list[int]:
    """All four codes of a unit at once: they are the four selectors of one permutation as they lie."""
    table = _table(element, lane)
    by_bit: dict[tuple[int, int], int] = {}
    for load in sorted({takes[0].load for takes in slices}):
        units = []
        for shift in (0, -16):
            word = program.shift(load, shift)
            low = program.logic(word, both(0x7777), both(0), AND)
            upper = program.logic(program.shift(word, -1), both(0x4444), both(0), AND)
            mask = program.permute(Constant(0), Constant(0xFFFFFFFF), upper)
            halves = []
            for half in (0, 1):
                parts = _bytes(table, half)
                few = program.permute(parts[0], parts[1], low)
                rest = program.permute(parts[2], parts[3], low)
                halves.append(program.logic(mask, rest, few, SELECT))
            units.append([program.permute(halves[0], halves[1], Constant(s)) for s in (0x5140, 0x7362)])
        for i in range(4):
            first, second = units[0][i // 2], units[1][i // 2]
            by_bit[load, 4 * i] = program.permute(first, second, Constant((0x5410, 0x7632)[i % 2]))
    return [by_bit[takes[0].load, takes[0].bit] for takes in slices]
