"""Codes to what 8-bit tensor cores multiply: int8 or e4m3 in each byte of a register.

In: an element, how a slice's bits are taken from its loads, int8 or e4m3. Out: a `ByteDecoder`: a
`lanes.Program` on registers of four neighbouring bytes, and how a lane's number becomes the code's value:

    value = lane * factor + middle

    int4, bits 0-3, int8:   u << 4 & 0xF0F0F0F0                  16 times the integer; factor 1/16
    uint4, int8:            the same ^ 0x80808080                16 * (code - 8); middle 8
    float4_e2m1, e4m3:      sign to bit 7, magnitude to bit 2    factor 2**6
    int4, e4m3:             sign and magnitude, as a number of units 2**-9; factor 2**9

An integer lies at the top of its byte, since a byte's sign bit is there; a small float is an e4m3 with the
wrong exponent bias; and an integer up to 16 is its own e4m3 in units of the smallest subnormal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..formats import Element, Float, Integer
from .decode import finite
from .lanes import AND, AND_OR, AND_XOR, OR, XOR, Constant, Program
from .slices import Take

E4M3 = Float(4, 3, "fn")
SUBNORMAL = 2.0**-9  # e4m3's smallest number
# Integers of so many bits are e4m3 numbers in units of the smallest: 16 still is, as a power of two.
WIDEST = {True: 5, False: 4}


@dataclass(frozen=True)
class ByteDecoder:
    """asm: the block for one slice, or None where a slice's bytes are lanes as they lie."""

    program: Program
    result: int
    factor: float
    middle: float

    @property
    def asm(self) -> str | None:
        return None if self.result < self.program.inputs else self.program.ptx([self.result])


def byte_decoder(element: Element, takes: Sequence[Take], lane: str) -> ByteDecoder | None:
    """The program for one slice, loads numbered 0 .. in each take; None if the lane has not the values."""
    program = Program(1 + max(take.load for take in takes))
    if isinstance(element, Integer):
        if lane == "int8":
            return _integer(program, element, takes)
        return _small_integer(program, element, takes) if element.bits <= WIDEST[element.signed] else None
    if isinstance(element, Float) and lane == "e4m3" and fits(element):
        return _float(program, element, takes)
    return None


def codes_of(takes: Sequence[Take], flip: int) -> tuple[Program, int]:
    """(program, register): the codes of one slice in the low bits of their bytes, XORed with `flip`."""
    program = Program(1 + max(take.load for take in takes))
    return program, _placed(program, takes, 0, flip)


def fits(element: Float) -> bool:
    """Whether the element's codes are e4m3 codes but for the exponent's bias."""
    narrow = element.exponent <= E4M3.exponent and element.mantissa_bits <= E4M3.mantissa_bits
    return element == E4M3 or (narrow and element.bits < 8 and finite(element))


def all_bytes(pattern: int) -> Constant:
    """The same byte four times."""
    return Constant(pattern * 0x01010101)


def _placed(program: Program, takes: Sequence[Take], up: int, flip: int) -> int:
    """The codes, moved up by `up` bits, XORed with `flip`."""
    value: int | Constant = all_bytes(flip)
    for i, take in enumerate(takes):
        shifted = program.shift(take.load, take.low + up - take.bit)
        mask = all_bytes(((1 << take.width) - 1) << (take.low + up))
        if mask == all_bytes(0xFF) and i == 0:
            value = shifted if flip == 0 else program.logic(shifted, value, Constant(0), XOR)
        else:
            value = program.logic(shifted, mask, value, AND_XOR)
    assert isinstance(value, int)
    return value


def _integer(program: Program, element: Integer, takes: Sequence[Take]) -> ByteDecoder:
    up = 8 - element.bits
    unit = 2.0**-element.fraction
    lanes = _placed(program, takes, up, 0 if element.signed else 0x80)
    middle = 0.0 if element.signed else unit * (1 << (element.bits - 1))
    return ByteDecoder(program, lanes, unit * 2.0**-up, middle)


def _small_integer(program: Program, element: Integer, takes: Sequence[Take]) -> ByteDecoder:
    """Two's complement to sign and magnitude, four at a time: with s the sign as 0 or 1 and m the bits
    below it, the magnitude is (m ^ (s * low ones)) + s, and nothing carries from byte to byte."""
    factor = 2.0**-element.fraction / SUBNORMAL
    codes = _placed(program, takes, 0, 0)
    if not element.signed:
        return ByteDecoder(program, codes, factor, 0.0)
    top = element.bits - 1
    sign = program.logic(codes, all_bytes(1 << top), Constant(0), AND)
    one = program.shift(sign, -top)
    ones = program.subtract(sign, one)
    flipped = program.logic(codes, all_bytes((1 << top) - 1), ones, AND_XOR)
    magnitude = program.add(flipped, one)
    return ByteDecoder(
        program, program.logic(program.shift(sign, 7 - top), magnitude, Constant(0), OR), factor, 0.0
    )


def _float(program: Program, element: Float, takes: Sequence[Take]) -> ByteDecoder:
    factor = 2.0 ** (E4M3.bias - element.bias)
    if element.bits == 8:
        return ByteDecoder(program, _placed(program, takes, 0, 0), factor, 0.0)
    up, top = E4M3.mantissa_bits - element.mantissa_bits, element.bits - 1
    value: int | Constant = Constant(0)
    for take in takes:
        for a, b in ((take.low, min(take.low + take.width, top)), (top, top + 1)):
            if a >= b or not take.low <= a < take.low + take.width:
                continue
            place = a + up if a < top else 7
            shifted = program.shift(take.load, place - (take.bit + a - take.low))
            value = program.logic(shifted, all_bytes(((1 << (b - a)) - 1) << place), value, AND_OR)
    assert isinstance(value, int)
    return ByteDecoder(program, value, factor, 0.0)
