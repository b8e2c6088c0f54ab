"""Codes of 3 or 7 bits in fields of 4 or 8, whose last bits hold more codes: no bit of a row is left over.

In: unpacked codes, uint8 [..., K]. Out: bytes [..., row_bytes].

    spare8, 3 bits, codes a .. h, each a2 a1 a0:

        byte 0, bits 7 .. 0:   h0 b2 b1 b0   g0 a2 a1 a0
        byte 1                 h1 d2 d1 d0   g1 c2 c1 c0
        byte 2                 h2 f2 f1 f0   g2 e2 e1 e0

`planar` has two planes for 3 bits, of 2 and of 1, and each code is joined from both: five instructions of a
vector unit for a vector of codes. Here six of eight codes are a mask, or a shift and a mask, away; the other
two are gathered from the bits that are left, three at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from .errors import FormatError
from .layout import Layout, spelled
from .mover import Field, k


@dataclass(frozen=True)
class Spare(Layout):
    """A run is `span` codes: eight slices of span / 8 neighbours each, in as many stretches of span / 8
    bytes as a code has bits. The first slices fill the fields of the stretches one after the other, the last
    ones what is left: bit b of theirs lies in stretch b."""

    span: int = 256
    name: str = "spare"

    def __post_init__(self) -> None:
        if self.span < 8 or self.span % 8:
            raise FormatError(f"a layout of spare bits spans a multiple of 8 codes, not {self.span}")

    def __str__(self) -> str:
        return f"{self.name}{self.span}"

    def fields(self, bits: int, run: int | None) -> tuple[Field, ...]:
        each = _fields_of_a_byte(bits, self)
        length = self.span // 8
        start = sympy.floor(k / self.span) * (bits * length)
        place = sympy.Mod(k, length)
        part = sympy.floor(sympy.Mod(k, self.span) / length)
        last = sympy.floor(part / (bits * each))  # 1 for a slice in what is left, else 0
        whole = 1 - last
        field = 8 // each
        bit = whole * field * sympy.Mod(part, each) + last * (field * (part - bits * each) + bits)
        return tuple(
            Field(
                low,
                1,
                start + place + length * (whole * sympy.floor(part / each) + last * low),
                bit + whole * low,
            )
            for low in range(bits)
        )

    def period(self, bits: int, run: int | None, length: int) -> tuple[int, int]:
        """FormatError if codes have other than 3 or 7 bits."""
        _fields_of_a_byte(bits, self)
        return self.span, self.span // 8 * bits

    def row_bytes(self, bits: int, run: int | None, length: int) -> int:
        codes, size = self.period(bits, run, length)
        return -(-length // codes) * size


def _fields_of_a_byte(bits: int, layout: Spare) -> int:
    if bits not in (3, 7):
        raise FormatError(f"the layout {layout} holds codes of 3 or 7 bits, not {bits}")
    return 8 // (bits + 1)


def parse(text: str) -> Spare | None:
    """The layout that `text` spells (`spare256`), or None."""
    span = spelled(text, "spare")
    return None if span is None else Spare(span)
