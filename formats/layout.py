"""Where each code's bits lie in memory, as a sympy index map; pack and unpack are derived from it.

In: unpacked codes, uint8 [..., K], one a byte. Out: bytes [..., row_bytes], and back. Each row is laid out
by itself, but in `panels.py`.

    packed, 4 bits:   codes a b c d        ->  bytes  b<<4|a  d<<4|c            (byte k//2, bit 4*(k % 2))
    planar, 4 bits, groups of 4: a b c d   ->  bytes  c<<4|a  d<<4|b            (byte k%2,  bit 4*(k // 2))

A `Field` says for some bits of every code at which byte and bit they lie, as expressions in k (the position
in the row) and K (the row's length). The map repeats: `period` codes fill a whole number of bytes and the
next period starts behind them. Kernels print the same expressions; `mover.py` turns them into slices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor

from . import mover
from .errors import FormatError
from .mover import Field, K, k


class Layout(ABC):
    """A layout is a frozen dataclass with a `name`; `bits` is the width of a code, `run` the length of a
    group (None: the whole row).

    across: whether rows are woven, so that codes are laid out all at once.
    by_group: whether scales and zero points are stored [.., K / group, N], those of neighbouring rows side by
    side, as a kernel that takes many rows at once reads them, instead of [.., N, K / group].
    """

    name: str
    by_group: bool = False
    across: bool = False

    @abstractmethod
    def fields(self, bits: int, run: int | None) -> tuple[Field, ...]:
        """Where the bits of code k of a row of K codes lie."""

    @abstractmethod
    def period(self, bits: int, run: int | None, length: int) -> tuple[int, int]:
        """(codes, bytes) after which the map of a row of `length` codes repeats."""

    @abstractmethod
    def row_bytes(self, bits: int, run: int | None, length: int) -> int:
        """Bytes of a row of `length` codes."""

    def pack(self, codes: Tensor, bits: int, run: int | None = None) -> Tensor:
        """uint8 codes [..., K] -> uint8 bytes [..., row_bytes]."""
        length = codes.shape[-1]
        moves = mover.moves(self, bits, run, *self.period(bits, run, length))
        return mover.pack(codes, moves, self.row_bytes(bits, run, length))

    def unpack(self, packed: Tensor, length: int, bits: int, run: int | None = None) -> Tensor:
        """uint8 bytes [..., row_bytes] -> uint8 codes [..., length]."""
        moves = mover.moves(self, bits, run, *self.period(bits, run, length))
        return mover.unpack(packed, moves, length)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Bytes(Layout):
    """One code a byte, in its low bits."""

    name: str = "bytes"

    def fields(self, bits: int, run: int | None) -> tuple[Field, ...]:
        return (Field(0, bits, k, sympy.Integer(0)),)

    def period(self, bits: int, run: int | None, length: int) -> tuple[int, int]:
        return 1, 1

    def row_bytes(self, bits: int, run: int | None, length: int) -> int:
        return length

    def pack(self, codes: Tensor, bits: int, run: int | None = None) -> Tensor:
        return codes

    def unpack(self, packed: Tensor, length: int, bits: int, run: int | None = None) -> Tensor:
        return packed


@dataclass(frozen=True)
class Packed(Layout):
    """The canonical one below 8 bits: a dense little-endian stream of bits, each row padded to a byte."""

    name: str = "packed"

    def fields(self, bits: int, run: int | None) -> tuple[Field, ...]:
        # A width that divides 8 never crosses a byte; another is told bit by bit.
        width = bits if 8 % bits == 0 else 1
        return tuple(
            Field(low, width, sympy.floor((k * bits + low) / 8), sympy.Mod(k * bits + low, 8))
            for low in range(0, bits, width)
        )

    def period(self, bits: int, run: int | None, length: int) -> tuple[int, int]:
        codes = 8 // (bits & -bits)  # 8 / gcd(8, bits)
        return codes, codes * bits // 8

    def row_bytes(self, bits: int, run: int | None, length: int) -> int:
        return (length * bits + 7) // 8


@dataclass(frozen=True)
class Planar(Layout):
    """What a vector unit wants: a byte holds codes that lie a fraction of a run apart, so that one shift and
    one mask of contiguous bytes give contiguous codes.

    A width that is no power of two is split into planes that are (3 = 2 + 1, 6 = 4 + 2), low bits first, one
    plane behind the other in each run. The run is the group of the scale, or `span` if given, or the row.
    `planar256t` is one of span 256 with scales by group.
    """

    span: int | None = None
    name: str = "planar"
    by_group: bool = False

    def __post_init__(self) -> None:
        if self.span is not None and self.span < 1:
            raise FormatError(f"a planar layout's span is 1 or more codes, not {self.span}")

    def __str__(self) -> str:
        turned = "t" if self.by_group else ""
        return f"{self.name}{self.span or ''}{turned}"

    def fields(self, bits: int, run: int | None) -> tuple[Field, ...]:
        span = self.span or run
        length = sympy.Integer(span) if span else K
        in_run = sympy.Mod(k, length) if span else k
        start = sympy.floor(k / length) * _run_bytes(bits, length) if span else sympy.Integer(0)
        fields = []
        for low, width in planes(bits):
            stride = sympy.ceiling(length * width / 8)
            fields.append(
                Field(low, width, start + sympy.Mod(in_run, stride), width * sympy.floor(in_run / stride))
            )
            start = start + stride
        return tuple(fields)

    def period(self, bits: int, run: int | None, length: int) -> tuple[int, int]:
        codes = self.span or run or max(int(length), 1)
        return codes, int(_run_bytes(bits, sympy.Integer(codes)))

    def row_bytes(self, bits: int, run: int | None, length: int) -> int:
        if length == 0:
            return 0
        codes, size = self.period(bits, run, length)
        return -(-length // codes) * size


@dataclass(frozen=True)
class Halfwords(Planar):
    """Planar over units of 16 bits, what a GPU's 16-bit float instructions want: one shift and one mask of a
    32-bit register of two neighbouring units leave one code in each half, those of two neighbouring numbers.

    4 bits, 16 codes a .. p:  bytes  i<<4|a  m<<4|e  j<<4|b  n<<4|f  k<<4|c  o<<4|g  l<<4|d  p<<4|h

    Scales lie by group. The bytes are those of `planar`; the two halves of each plane of a run are woven
    together, so that byte b of a plane of 2*S bytes lies at 2*(b mod S) + b // S.
    """

    span: int | None = 512
    name: str = "halves"
    by_group: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.span is None or self.span % 16 != 0:
            raise FormatError(f"a layout of halfwords spans a multiple of 16 codes, not {self.span}")

    def __str__(self) -> str:
        return f"{self.name}{self.span}"

    def fields(self, bits: int, run: int | None) -> tuple[Field, ...]:
        assert self.span is not None
        start = sympy.floor(k / self.span) * _run_bytes(bits, sympy.Integer(self.span))
        fields = []
        for plain, (_, width) in zip(super().fields(bits, run), planes(bits), strict=True):
            size = self.span * width // 8
            within = plain.byte - start
            woven = 2 * sympy.Mod(within, size // 2) + sympy.floor(2 * within / size)
            fields.append(Field(plain.low, plain.width, start + woven, plain.bit))
            start = start + size
        return tuple(fields)

    def pack(self, codes: Tensor, bits: int, run: int | None = None) -> Tensor:
        return self._rewoven(Planar(self.span).pack(codes, bits, run), bits, weave=True)

    def unpack(self, packed: Tensor, length: int, bits: int, run: int | None = None) -> Tensor:
        return Planar(self.span).unpack(self._rewoven(packed, bits, weave=False), length, bits, run)

    def _rewoven(self, packed: Tensor, bits: int, *, weave: bool) -> Tensor:
        assert self.span is not None
        size = self.span * bits // 8
        runs = packed.reshape(*packed.shape[:-1], packed.shape[-1] // size, size)
        halves = []
        for plane in torch.split(runs, [self.span * width // 8 for _, width in planes(bits)], -1):
            half = plane.shape[-1] // 2
            shape = (2, half) if weave else (half, 2)
            halves.append(plane.reshape(*plane.shape[:-1], *shape).transpose(-1, -2).flatten(-2))
        return torch.cat(halves, -1).reshape(packed.shape)


def planes(bits: int) -> list[tuple[int, int]]:
    """(lowest bit, width) of the power-of-two planes of a code: 3 -> (0, 2), (2, 1)."""
    found, low = [], 0
    for width in (8, 4, 2, 1):
        if bits & width:
            found.append((low, width))
            low += width
    return found


def _run_bytes(bits: int, length: sympy.Expr) -> sympy.Expr:
    return sum((sympy.ceiling(length * width / 8) for _, width in planes(bits)), sympy.Integer(0))


BUILT_IN: dict[str, Layout] = {"bytes": Bytes(), "packed": Packed(), "planar": Planar()}


def default(bits: int) -> Layout:
    """What a format has when its text names no layout."""
    return BUILT_IN["bytes"] if bits == 8 else BUILT_IN["packed"]


def parse(text: str) -> Layout | None:
    """The built-in layout that `text` spells (`planar64` has a span), or None."""
    for prefix, spanned in (("planar", Planar), ("halves", Halfwords)):
        if (span := spelled(text, prefix)) is not None:
            return spanned(span)
    if (span := spelled(text, "planar", "t")) is not None:
        return Planar(span, by_group=True)
    return BUILT_IN.get(text)


def spelled(text: str, prefix: str, last: str = "") -> int | None:
    """The number between `prefix` and `last`, or None. Digits are ASCII's: `int` reads other scripts' too,
    and a layout would have two spellings."""
    digits = text[len(prefix) : len(text) - len(last)]
    whole = text.startswith(prefix) and text.endswith(last) and digits.isascii() and digits.isdecimal()
    return int(digits) if whole else None


def names() -> Iterable[str]:
    return BUILT_IN
