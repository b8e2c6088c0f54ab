"""Codes to numbers in vectors of 32 bytes: which of a handful of ways an element takes, and its source.

In: an element, how a slice's bits are taken from its loads. Out: a `Decode`, C++ in the words of
`headers/avx2.h`.

    int4, bits 4-7 of load 0   ->   Bytes: and_(b0, all(0xF0)); Floats: of_integers<part>(..), times 1/16
    float4_e2m1                ->   Bytes: look_up(kTable, codes), in halves; of_integers, times 1/2
    float8_e4m3fn              ->   of_floats<part, 8, 3>(codes), times 2**8
    nf4                        ->   of_table<part, 4>(kTable, codes)

The steps on bytes are the register programs of `byte_lanes.py`, printed for vectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...formats import Element, Float, Integer
from ..byte_lanes import byte_decoder, codes_of
from ..lanes import AND, AND_OR, AND_XOR, OR, XOR, Constant, Operand, Program
from ..slices import Take

# Exponent and mantissa bits, and bias, of the 16-bit float that small ones are widened to.
HALF_EXPONENT, HALF_MANTISSA, HALF_BIAS = 5, 10, 15


@dataclass(frozen=True)
class Decode:
    """bytes: an expression on b0, b1 .. (vectors of units); floats: one on that, `codes`, and `part`; factor,
    middle: value = number * factor + middle; table: a C++ definition that the two read, or nothing."""

    bytes: str
    floats: str
    factor: float = 1.0
    middle: float = 0.0
    table: str = ""


def decode(element: Element, takes: Sequence[Take]) -> Decode:
    """The way to float32. Exact for every element; codes that mean infinity or NaN are so only where the
    element's own bits say so (float8_e5m2)."""
    if isinstance(element, Integer):
        made = byte_decoder(element, takes, "int8")
        assert made is not None
        text = expression(made.program, made.result)
        return Decode(text, "of_integers<part>(codes)", made.factor, made.middle)
    program, result = codes_of(takes, 0)
    codes = expression(program, result)
    if (found := multiples(element)) is not None:
        unit, whole = found
        table = f"alignas(16) constexpr int8_t kTable[16] = {{{', '.join(map(str, whole))}}};"
        return Decode(f"look_up(kTable, {codes})", "of_integers<part>(codes)", unit, 0.0, table)
    if isinstance(element, Float) and element.exponent <= HALF_EXPONENT and _as_half(element):
        factor = 2.0 ** (HALF_BIAS - element.bias)
        kind = f"{element.bits}, {element.mantissa_bits}, {str(_ends_in_nan(element)).lower()}"
        return Decode(codes, f"of_floats<part, {kind}>(codes)", factor)
    size = max(16, 1 << element.bits)
    numbers = ", ".join(number(v) for v in _padded(element, size))
    table = f"alignas(64) const float kTable[{size}] = {{{numbers}}};"
    return Decode(codes, f"of_table<part, {element.bits}>(kTable, codes)", table=table)


def raw(element: Integer, takes: Sequence[Take]) -> str:
    """The codes as unsigned numbers, 2**(bits - 1) above the integers that signed ones mean."""
    program, result = codes_of(takes, 1 << (element.bits - 1) if element.signed else 0)
    return expression(program, result)


def expression(program: Program, result: int) -> str:
    """A register of a program as a C++ expression on the inputs b0, b1 .."""
    if result < program.inputs:
        return f"b{result}"
    step = program.steps[result - program.inputs]

    def operand(of: Operand) -> str:
        return f"all(0x{of.bits & 0xFF:02X})" if isinstance(of, Constant) else expression(program, of)

    a, *rest = step.operands
    if step.op in ("shl", "shr"):
        return f"{step.op}<{step.detail}>({operand(a)})"
    if step.op != "lop3":
        raise ValueError(f"vectors of bytes know no {step.op}")
    b, c = rest
    masked = f"and_({operand(a)}, {operand(b)})"
    nothing = isinstance(c, Constant) and c.bits == 0
    if step.detail == AND or (nothing and step.detail in (AND_XOR, AND_OR)):
        return masked
    words = {AND_XOR: ("xor_", masked, c), AND_OR: ("or_", masked, c)}
    words |= {OR: ("or_", operand(a), b), XOR: ("xor_", operand(a), b)}
    name, first, second = words[int(step.detail)]
    return f"{name}({first}, {operand(second)})"


def multiples(element: Element) -> tuple[float, list[int]] | None:
    """(unit, how many of it each code means), of an element whose codes go through a table of 16 bytes."""
    unit = _unit(element) if element.bits <= 4 and not isinstance(element, Integer) else None
    if unit is None:
        return None
    return unit, [round(v / unit) if math.isfinite(v) else 0 for v in _padded(element, 16)]


def _unit(element: Element) -> float | None:
    """What all of an element's values are int8 multiples of: the largest such power of two."""
    values = [v for v in element.values() if math.isfinite(v)]
    for power in range(8, -9, -1):
        unit = 2.0**power
        if all(v / unit == round(v / unit) and -128 <= v / unit <= 127 for v in values):
            return unit
    return None


def _as_half(element: Float) -> bool:
    """Whether the codes, moved up, are float16 numbers times a power of two, the largest exponent included
    only where it means the same."""
    top = element.values()[: 1 << (element.bits - 1)][-1 << element.mantissa_bits :]
    narrower = element.exponent < HALF_EXPONENT
    specials = [v for v in element.values() if not math.isfinite(v)]
    known = not specials or not narrower or _ends_in_nan(element)
    return known and element.mantissa_bits <= HALF_MANTISSA and (narrower or not any(map(math.isfinite, top)))


def _ends_in_nan(element: Float) -> bool:
    """Whether the largest magnitude, of either sign, is NaN, and nothing else is no number."""
    values = element.values()
    half = len(values) // 2
    ends = (values[half - 1], values[-1])
    return all(v != v for v in ends) and sum(not math.isfinite(v) for v in values) == 2


def _padded(element: Element, size: int) -> list[float]:
    values = list(element.values())
    return values + [0.0] * (size - len(values))


def number(value: float) -> str:
    if math.isfinite(value):
        return f"{float(value).hex()}f"
    return "NAN" if value != value else ("INFINITY" if value > 0 else "-INFINITY")
