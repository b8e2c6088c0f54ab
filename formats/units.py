"""Whole codes in units of 16 bits, for widths that do not divide 16 and for floats that a GPU decodes.

In: unpacked codes, uint8 [..., K]. Out: bytes [..., row_bytes], like every layout.

    3 bits, 16 slices in 3 units        slices 0-4 at bits 0, 3, 6, 9, 12 of unit 0, 5-9 in unit 1, 10-14 in
                                        unit 2; the three bits 15 that are left are slice 15's
    float4_e2m1 with s9, 4 in 1 unit    magnitudes at bits 0, 3, 6, 9; signs of slices 1 and 2 at bits 12 and
                                        15, nine above their magnitudes; 0 and 3 take bits 13 and 14

A run of `span` codes is cut into slices of contiguous codes, and code l of every slice lies in the l-th unit
of each of the run's few stretches. So one shift and one mask of a 32-bit register of two neighbouring units
leave two neighbouring numbers, as in `Halfwords`; where that one cuts codes into planes of 2 + 1 or 4 + 2
bits and takes a shift and a mask of each, here most codes are one piece. A magnitude and a sign as far apart
as in the float that they become take one shift and one mask together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import sympy
from torch import Tensor

from .errors import FormatError
from .layout import Layout
from .mover import Field, k

UNIT = 16


@dataclass(frozen=True)
class Piece:
    """Bits low .. low + width - 1 of a slice's codes lie in the slice's unit `unit` from bit `bit` on."""

    unit: int
    low: int
    width: int
    bit: int


@dataclass(frozen=True)
class Units(Layout):
    """span: codes of a run, a multiple of 16; sign: how far above its magnitude's low bit the top bit of a
    code should lie (15 - 6 where e2m1 becomes bfloat16), None where a code's bits are all alike. Scales lie
    by group."""

    span: int = 256
    sign: int | None = None
    name: str = "units"
    by_group: bool = True

    def __post_init__(self) -> None:
        if self.span < UNIT or self.span % UNIT:
            raise FormatError(f"a layout of units spans a multiple of 16 codes, not {self.span}")
        if self.sign is not None and not 0 < self.sign < UNIT:
            raise FormatError(f"a sign lies 1 to 15 bits above a magnitude in a unit of 16, not {self.sign}")

    def __str__(self) -> str:
        return f"{self.name}{self.span}" + ("" if self.sign is None else f"s{self.sign}")

    @classmethod
    def parse(cls, text: str) -> Units | None:
        """The layout that `text` spells (units256, units128s9), or None."""
        span, separator, sign = text.removeprefix("units").partition("s")
        if not text.startswith("units") or not span.isdecimal() or bool(separator) != sign.isdecimal():
            return None
        return cls(int(span), int(sign) if sign else None)

    def fields(self, bits: int, run: int | None) -> tuple[Field, ...]:
        return self._fields(bits, woven=True)

    def period(self, bits: int, run: int | None, length: int) -> tuple[int, int]:
        return self.span, self.span * bits // 8

    def row_bytes(self, bits: int, run: int | None, length: int) -> int:
        return -(-length // self.span) * (self.span * bits // 8)

    def pack(self, codes: Tensor, bits: int, run: int | None = None) -> Tensor:
        return self._woven(_ByBytes(self).pack(codes, bits, run), bits, (2, -1))

    def unpack(self, packed: Tensor, length: int, bits: int, run: int | None = None) -> Tensor:
        return _ByBytes(self).unpack(self._woven(packed, bits, (-1, 2)), length, bits, run)

    def _woven(self, packed: Tensor, bits: int, halves: tuple[int, int]) -> Tensor:
        """Low and high bytes of each stretch of units, which lie behind one another (2, -1) or by turns
        (-1, 2), the other way."""
        length = self.span // len(slices(bits, self.sign))
        shape = [length if size == -1 else size for size in halves]
        stretches = packed.reshape(*packed.shape[:-1], packed.shape[-1] // (2 * length), *shape)
        return stretches.transpose(-1, -2).reshape(packed.shape)

    def _fields(self, bits: int, *, woven: bool) -> tuple[Field, ...]:
        """woven: a unit's two bytes side by side; else all low bytes of a stretch before its high ones."""
        found = slices(bits, self.sign)
        length = self.span // len(found)
        start, inside = sympy.floor(k / self.span) * (self.span * bits // 8), sympy.Mod(k, length)
        which = sympy.floor(sympy.Mod(k, self.span) / length)
        fields = []
        for low in range(bits):
            places = [_place(pieces, low) for pieces in found]
            if woven:
                within = [2 * unit * length + bit // 8 for unit, bit in places]
            else:
                within = [(2 * unit + bit // 8) * length for unit, bit in places]
            byte = start + _chosen(which, within) + (2 if woven else 1) * inside
            fields.append(Field(low, 1, byte, _chosen(which, [bit % 8 for _, bit in places])))
        return tuple(fields)


@dataclass(frozen=True)
class _ByBytes(Layout):
    """The same with low and high bytes apart, which tensors move in long stretches."""

    of: Units
    name: str = "units by bytes"

    def fields(self, bits: int, run: int | None) -> tuple[Field, ...]:
        return self.of._fields(bits, woven=False)

    def period(self, bits: int, run: int | None, length: int) -> tuple[int, int]:
        return self.of.period(bits, run, length)

    def row_bytes(self, bits: int, run: int | None, length: int) -> int:
        return self.of.row_bytes(bits, run, length)


@lru_cache(maxsize=64)
def slices(bits: int, sign: int | None) -> tuple[tuple[Piece, ...], ...]:
    """The pieces of each slice of a run: the fewest slices that fill whole units.

    Codes (without their sign, if they have one) go first, from bit 0 of each unit on, as many as fit whole.
    Of the bits that are left signs take those at their distance, then the codes that found no place take the
    next ones in order, then the other signs the rest.
    """
    count = UNIT // math.gcd(UNIT, bits)
    units = count * bits // UNIT
    width = bits if sign is None else bits - 1
    fit = UNIT // width if width else 0
    whole = [(unit, at * width) for unit in range(units) for at in range(fit)][:count]
    free = {(unit, bit) for unit in range(units) for bit in range(UNIT)}
    free -= {(unit, bit + i) for unit, bit in whole for i in range(width)}
    placed: list[list[Piece]] = [[Piece(unit, 0, width, bit)] for unit, bit in whole]
    signs: dict[int, tuple[int, int]] = {}
    if sign is not None:
        at_distance = {i: (unit, bit + sign) for i, (unit, bit) in enumerate(whole)}
        signs = {i: place for i, place in at_distance.items() if place in free}
        free -= set(signs.values())
    rest = iter(sorted(free))
    for _ in range(count - len(whole)):
        placed.append(list(_gathered(rest, width)))
    if sign is not None:
        for i, pieces in enumerate(placed):
            unit, bit = signs[i] if i in signs else next(rest)
            pieces.append(Piece(unit, width, 1, bit))
    return tuple(tuple(piece for piece in pieces if piece.width) for pieces in placed)


def _gathered(rest: Iterator[tuple[int, int]], width: int) -> Iterator[Piece]:
    """The next `width` bits of those that are left, neighbours as one piece."""
    last: Piece | None = None
    for low in range(width):
        unit, bit = next(rest)
        if last is not None and (unit, bit) == (last.unit, last.bit + last.width):
            last = Piece(unit, last.low, last.width + 1, last.bit)
            continue
        if last is not None:
            yield last
        last = Piece(unit, low, 1, bit)
    if last is not None:
        yield last


def _place(pieces: tuple[Piece, ...], low: int) -> tuple[int, int]:
    """(unit, bit) of one bit of a slice's codes."""
    (found,) = (p for p in pieces if p.low <= low < p.low + p.width)
    return found.unit, found.bit + low - found.low


def _chosen(which: sympy.Expr, values: list[int]) -> sympy.Expr:
    """values[which], as an expression."""
    if len(set(values)) == 1:
        return sympy.Integer(values[0])
    *most, last = enumerate(values)
    return sympy.Piecewise(*((value, sympy.Eq(which, i)) for i, value in most), (last[1], True))
